"""Measure a running daemon's average precision on a COCO data set.

    python scripts/evaluate_coco.py ipc:///run/blendmaskd/client.sock --images val2017/ \\
        --annotations instances_val2017.json --require-box-ap 39 --require-mask-ap 35

Sends the images listed in the annotations (each `file_name` is relative to --images) through the daemon with a score
threshold of 0, and compares the results with the annotations using pycocotools' COCOeval. It prints COCO's usual 12
lines for boxes and for masks, then a table by class and a summary. Unless stated otherwise, AP is the mean over IoU
0.50:0.95. The 12 lines range from 0 to 1; the table, the summary, --json and the required values are in percent.

The annotations are validated as a whole before the first image is sent, and refused with a list of all faults, by
annotation and image. Defaults follow COCO: annotation ids are only names, a missing iscrowd is 0, a missing area is
that of the mask. If no annotation has a segmentation, only boxes are measured.

Exit codes: 0 all done · 1 an image failed, listed at the end, or an AP is below the required value · 2 wrong arguments
or annotations · 3 no daemon · 130 Ctrl-C. A failed image counts as one in which nothing was found.
"""
from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from blendmaskd import files
from blendmaskd.client.blocking import Client, JobFailed, Segmentation
from blendmaskd.output import Help, in_a_line
from blendmaskd.programs.arguments import output_file, percentage, positive
from blendmaskd.programs.connecting import add_connection, connect
from blendmaskd.programs.errors import EXIT_FAILED, UsageError, guarded
from blendmaskd.programs.failures import Failure, tell_failures

if TYPE_CHECKING:
    from blendmaskd.coco.average_precision import Reference, Scores
    from blendmaskd.coco.instances import Instances, Picture
    from blendmaskd.coco.values import Box

MISSING = "{name} is not installed, and average precision needs it: pip install pycocotools"
SLACK = 2.0  # pixels by which rounding may move a box out of its image
RUNS = re.compile(r"([P-o]*[0-O])*")  # an RLE's text: characters of five bits, the last without the bit for more


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image that the annotations name."""

    number: int  # among the images of the annotations, from 1
    path: Path
    size: tuple[int, int]  # width and height, pixels, as annotated


@dataclass(slots=True)
class Answers:
    """What came back. `results` are COCO results of all images."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)  # by device
    seconds: float = 0.0  # from the first image to the last answer

    def take(self, wanted: Wanted, answer: Segmentation | JobFailed) -> None:
        if isinstance(answer, JobFailed):
            self.failures.append(Failure(wanted.path, answer.code.value, answer.reason))
            return
        if (answer.width, answer.height) != wanted.size:
            reason = f"{answer.width}x{answer.height} pixels, the annotations say {wanted.size[0]}x{wanted.size[1]}"
            self.failures.append(Failure(wanted.path, "wrong-size", reason))
            return
        if reason := next(filter(None, (flaw(each, wanted.size) for each in answer.detections)), ""):
            self.failures.append(Failure(wanted.path, "bad-result", reason))
            return
        self.images[answer.device] += 1
        self.results += [{"image_id": wanted.number, **detection} for detection in answer.detections]

    @property
    def images_per_s(self) -> float:
        return self.images.total() / self.seconds if self.seconds else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("evaluate_coco", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    try:
        from blendmaskd.coco import average_precision
    except ModuleNotFoundError as error:
        raise UsageError(MISSING.format(name=error.name)) from None
    truth = read_annotations(arguments.annotations)
    wanted = plan(truth, arguments.images, arguments.limit)
    if arguments.require_mask_ap and not truth.has_masks:
        raise UsageError(f"--require-mask-ap: {truth.path} has no masks: no annotation has a segmentation")
    reference = average_precision.Reference(truth)
    for note in notes(truth, reference):
        print(f"evaluate_coco: {arguments.annotations}: {note}", file=sys.stderr)
    with connect(arguments) as client:
        answers = ask(client, wanted, arguments.window)
    numbers = [image.number for image in wanted]
    box = average_precision.score(reference, answers.results, numbers, "bbox")
    mask = average_precision.score(reference, answers.results, numbers, "segm") if truth.has_masks else None
    if arguments.json:
        files.write_json(arguments.json, report(answers, box, mask))
    _tell(answers, box, mask, strangers(truth, answers.results))
    missed = [*_missed("box", box, arguments.require_box_ap), *_missed("mask", mask, arguments.require_mask_ap)]
    for line in missed:
        print(line)
    return EXIT_FAILED if answers.failures or missed else 0


# -- the images and their answers -------------------------------------------------------------------------------------


def read_annotations(path: Path) -> Instances:
    """COCO instances. Raises `UsageError` for a file that cannot be measured against."""
    from blendmaskd.coco import instances as coco_instances

    try:
        return coco_instances.read(path, for_training=False)
    except coco_instances.InstancesError as error:
        raise UsageError(str(error)) from None


def plan(truth: Instances, folder: Path, limit: int | None) -> list[Wanted]:
    """The first `limit` images of the annotations, or all.

    Raises `UsageError` when there is no such folder, and when there is nothing to find in them.
    """
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder")
    pictures = truth.pictures[:limit]
    if not any(each.picture < len(pictures) and not each.crowd for each in truth.annotations):
        which = f"the first {limit} images" if limit else "the images"
        raise UsageError(f"{truth.path}: not COCO instances that can be measured: no annotations of {which}, or only "
                         "of crowds")  # fmt: skip
    return [
        Wanted(number, folder / picture.file_name, (picture.width, picture.height))
        for number, picture in enumerate(pictures, 1)
    ]


def notes(truth: Instances, reference: Reference) -> Iterator[str]:
    """What the reader of a number must know about the annotations."""
    total = len(truth.annotations)
    if not truth.has_masks:
        yield "no annotation has a segmentation: only boxes are measured"
    if computed := sum(each.area is None for each in truth.annotations):
        what = "mask" if truth.has_masks else "box"
        yield f"{computed} of {total} annotations have no area: that of the {what} counts"
    if reference.without_pixels:
        yield f"{reference.without_pixels} of {total} masks have no pixel: nothing can match them"
    if wide := sum(_reaches_out(each.box, truth.pictures[each.picture]) for each in truth.annotations):
        yield f"{wide} of {total} boxes extend beyond their image: expected [x, y, width, height]"


def _reaches_out(box: Box, picture: Picture) -> bool:
    x, y, width, height = box
    return min(x, y) < -SLACK or x + width > picture.width + SLACK or y + height > picture.height + SLACK


def ask(client: Client, wanted: Sequence[Wanted], window: int) -> Answers:
    """Send the images through the daemon. When no answer comes any more, what is left is put among the failures."""
    answers = Answers()
    started = time.monotonic()
    found = client.map([image.path for image in wanted], window=window, on_error="return", score_threshold=0.0)
    left = iter(wanted)
    with contextlib.closing(found):
        try:
            for answer in track(found, "segmenting", len(wanted), console=Console(stderr=True)):
                answers.take(next(left), answer)
                answers.seconds = time.monotonic() - started
        except TimeoutError as error:
            answers.failures += [Failure(image.path, "no-answer", str(error)) for image in left]
    return answers


def flaw(detection: dict[str, Any], size: tuple[int, int]) -> str:
    """What of a result cannot be measured, "" for nothing. `size` is the image's width and height."""
    if not all(map(math.isfinite, (detection["score"], *detection["bbox"]))):
        return f"score {detection['score']}, bbox {detection['bbox']}: not finite"
    found = detection["segmentation"]
    if found["size"] != [size[1], size[0]] or not RUNS.fullmatch(found["counts"]):
        return f"segmentation: not an RLE of {size[1]} x {size[0]} pixels (height x width)"
    return ""


def strangers(truth: Instances, results: Sequence[dict[str, Any]]) -> list[str]:
    """Categories of the results that the annotations lack or call differently: signs of the wrong data set."""
    names = {category.id: category.name for category in truth.categories}
    named = sorted({(result["category_id"], result["category_name"]) for result in results})
    return [
        f"{number} {name} ({names.get(number, 'none')} in the annotations)"
        for number, name in named
        if names.get(number) != name
    ]


# -- telling ----------------------------------------------------------------------------------------------------------


def report(answers: Answers, box: Scores, mask: Scores | None) -> dict[str, Any]:
    """What --json writes; AP and AR in percent, null for a mean over nothing, and for masks that were not measured."""
    return {
        "images": answers.images.total(),
        "failures": [{**asdict(failure), "path": str(failure.path)} for failure in answers.failures],
        "detections": len(answers.results),
        "seconds": answers.seconds,
        "images_per_s": answers.images_per_s,
        "images_by_device": dict(answers.images),
        "box": box.metrics,
        "mask": mask and mask.metrics,
        "classes": {name: {"box": box.classes[name], "mask": mask and mask.classes[name]} for name in box.classes},
    }


def _tell(answers: Answers, box: Scores, mask: Scores | None, strange: Sequence[str]) -> None:
    measured = {"box": box} | ({"mask": mask} if mask else {})
    print("\n".join(f"{what}\n{scores.lines}" for what, scores in measured.items()))
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(measured))
    if strange:
        console.print(f"[yellow]categories of a different data set: {escape(in_a_line('; '.join(strange)))}")
    tell_failures(console, answers.failures)
    mask_ap = _shown(mask.metrics["AP"]) if mask else "not measured"
    console.print(
        f"box AP {_shown(box.metrics['AP'])}, mask AP {mask_ap}; {answers.images.total()} images in"
        f" {answers.seconds:.1f} s, {answers.images_per_s:.2f} images/s"
    )


def _table(measured: dict[str, Scores]) -> Table:
    table = Table("class")
    for what in measured:
        table.add_column(f"{what} AP", justify="right")
        table.add_column(f"{what} AP50", justify="right")
    for name in measured["box"].classes:
        values = [scores.classes[name][metric] for scores in measured.values() for metric in ("AP", "AP50")]
        table.add_row(escape(in_a_line(name)), *map(_shown, values))
    return table


def _shown(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def _missed(what: str, scores: Scores | None, required: float) -> list[str]:
    reached = scores.metrics["AP"] if scores else None
    if (reached or 0.0) >= required:
        return []
    return [f"{what} AP {_shown(reached)} is below the {required:g} that is required"]


def _report(text: str) -> Path:
    """An output file whose folder is made."""
    with contextlib.suppress(OSError):  # `output_file` says what is wrong
        Path(text).absolute().parent.mkdir(parents=True, exist_ok=True)
    return output_file(text)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="the daemon's: ipc:///PATH or tcp://HOST:PORT")
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="folder of the annotated images")
    parser.add_argument("--annotations", metavar="FILE", type=Path, required=True, help="COCO instances")
    parser.add_argument("--json", metavar="FILE", type=_report, help="write the figures to this file")
    parser.add_argument("--limit", metavar="N", type=positive, help="only the first N images")
    parser.add_argument("--require-box-ap", metavar="X", type=percentage, default=0.0, help="minimum, percent")
    parser.add_argument("--require-mask-ap", metavar="Y", type=percentage, default=0.0, help="minimum, percent")
    add_connection(parser)
    return parser.parse_args(argv)
