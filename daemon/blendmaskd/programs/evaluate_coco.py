"""Measure a running daemon's average precision on a COCO data set.

    python scripts/evaluate_coco.py ipc:///run/blendmaskd/client.sock --images val2017/ \\
        --annotations instances_val2017.json --require-box-ap 39 --require-mask-ap 35

Sends the images that the annotations name, each `file_name` relative to --images, through the daemon, takes all that
the network keeps (score threshold 0) and lets pycocotools' COCOeval compare it with the annotations: box and mask,
COCO's usual 12 lines each, then a table by class and a summary. AP without more said is the mean over IoU 0.50:0.95.
The 12 lines go from 0 to 1; the table, the summary, --json and what is required are in percent.

Exit codes: 0 all done · 1 an image failed, listed at the end, or an AP is below what is required · 2 wrong arguments ·
3 no daemon · 130 Ctrl-C. An image that failed counts as one in which nothing was found.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from blendmaskd.client.blocking import Client, JobFailed, Segmentation
from blendmaskd.programs import program
from blendmaskd.programs.program import Failure, UsageError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # as COCO's 12 lines
UNSEEN = -1  # of COCOeval, for a mean over nothing


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image that the annotations name."""

    image_id: int
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
        self.images[answer.device] += 1
        self.results += [{"image_id": wanted.image_id, **detection} for detection in answer.detections]

    @property
    def images_per_s(self) -> float:
        return self.images.total() / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Scores:
    """How well results agree with annotations, in percent; None is a mean over nothing."""

    metrics: dict[str, float | None]  # by METRICS
    classes: dict[str, dict[str, float | None]]  # AP and AP50 by the category's name
    lines: str  # COCO's own


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return program.guarded("evaluate_coco", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    truth = read_annotations(arguments.annotations)
    wanted = plan(truth, arguments.images, arguments.limit)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
    with program.connect(arguments) as client:
        answers = ask(client, wanted, arguments.window)
    image_ids = [image.image_id for image in wanted]
    box, mask = (score(truth, answers.results, image_ids, kind) for kind in ("bbox", "segm"))
    _tell(answers, box, mask, strangers(truth, answers.results))
    if arguments.json:
        program.write_json(arguments.json, report(answers, box, mask))
    missed = [
        *_missed("box", box, arguments.require_box_ap),
        *_missed("mask", mask, arguments.require_mask_ap),
    ]
    for line in missed:
        print(line)
    return program.EXIT_FAILED if answers.failures or missed else 0


# -- the images and their answers -------------------------------------------------------------------------------------


def read_annotations(path: Path) -> COCO:
    """COCO instances. Raises `UsageError` for a file that cannot be read or holds something else."""
    truth = COCO()
    try:
        truth.dataset = json.loads(path.read_text(encoding="utf-8"))
        if not (truth.dataset["images"] and truth.dataset["annotations"] and truth.dataset["categories"]):
            raise ValueError("no images, no annotations or no categories")
        if not all({"id", "file_name", "width", "height"} <= image.keys() for image in truth.dataset["images"]):
            raise ValueError("an image without id, file_name, width or height")
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not COCO instances: {type(error).__name__}: {error}") from None
    return truth


def plan(truth: COCO, folder: Path, limit: int | None) -> list[Wanted]:
    """The first `limit` images of the annotations, or all. Raises `UsageError` when there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"--images {folder}: no such folder")
    return [
        Wanted(image["id"], folder / image["file_name"], (image["width"], image["height"]))
        for image in truth.dataset["images"][:limit]
    ]


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


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def score(
    truth: COCO, results: Sequence[dict[str, Any]], image_ids: Sequence[int], kind: Literal["bbox", "segm"]
) -> Scores:
    """Compare COCO results with the annotations of these images by COCOeval; no result is changed."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _found(truth, results, kind), kind)
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        evaluation.summarize()
    return Scores(
        {name: _percent(np.array(value)) for name, value in zip(METRICS, evaluation.stats)},
        dict(_by_class(truth, evaluation)),
        lines.getvalue(),
    )


def _found(truth: COCO, results: Sequence[dict[str, Any]], kind: str) -> COCO:
    """The results as COCOeval takes them; COCO.loadRes would refuse an empty list.

    For masks, without the boxes: small, medium and large go by the area of the mask.
    """
    left_out = "bbox" if kind == "segm" else "segmentation"
    kept = [{key: value for key, value in result.items() if key != left_out} for result in results]
    if kept:
        return truth.loadRes(kept)
    found = COCO()
    found.dataset = {**truth.dataset, "annotations": []}
    found.createIndex()
    return found


def _by_class(truth: COCO, evaluation: COCOeval) -> Iterator[tuple[str, dict[str, float | None]]]:
    precision = evaluation.eval["precision"][..., 0, -1]  # (IoUs, recalls, classes), all areas, 100 detections
    for index, category_id in enumerate(evaluation.params.catIds):
        of_class = precision[:, :, index]
        yield truth.cats[category_id]["name"], {"AP": _percent(of_class), "AP50": _percent(of_class[0])}


def _percent(shares: Any) -> float | None:
    """The mean of those shares that were seen."""
    seen = shares[shares != UNSEEN]
    return float(seen.mean() * 100) if seen.size else None


def strangers(truth: COCO, results: Sequence[dict[str, Any]]) -> list[str]:
    """Categories of the results that the annotations lack or call differently: signs of the wrong data set."""
    named = sorted({(result["category_id"], result["category_name"]) for result in results})
    return [
        f"{number} {name} ({truth.cats[number]['name'] if number in truth.cats else 'none'} in the annotations)"
        for number, name in named
        if number not in truth.cats or truth.cats[number]["name"] != name
    ]


# -- telling ----------------------------------------------------------------------------------------------------------


def report(answers: Answers, box: Scores, mask: Scores) -> dict[str, Any]:
    """What --json writes; AP and AR in percent, null for a mean over nothing."""
    return {
        "images": answers.images.total(),
        "failures": [{**asdict(failure), "path": str(failure.path)} for failure in answers.failures],
        "detections": len(answers.results),
        "seconds": answers.seconds,
        "images_per_s": answers.images_per_s,
        "images_by_device": dict(answers.images),
        "box": box.metrics,
        "mask": mask.metrics,
        "classes": {name: {"box": box.classes[name], "mask": mask.classes[name]} for name in box.classes},
    }


def _tell(answers: Answers, box: Scores, mask: Scores, strange: Sequence[str]) -> None:
    print(f"box\n{box.lines}mask\n{mask.lines}")
    console = Console(highlight=False, soft_wrap=True)
    console.print(_table(box, mask))
    if strange:
        console.print(f"[yellow]categories of another data set: {escape('; '.join(strange))}")
    program.tell_failures(console, answers.failures)
    console.print(
        f"box AP {_shown(box.metrics['AP'])}, mask AP {_shown(mask.metrics['AP'])}; {answers.images.total()} images in"
        f" {answers.seconds:.1f} s, {answers.images_per_s:.2f} images/s"
    )


def _table(box: Scores, mask: Scores) -> Table:
    table = Table("class")
    for column in ("box AP", "box AP50", "mask AP", "mask AP50"):
        table.add_column(column, justify="right")
    for name in box.classes:
        values = [scores.classes[name][metric] for scores in (box, mask) for metric in ("AP", "AP50")]
        table.add_row(escape(name), *map(_shown, values))
    return table


def _shown(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.2f}"


def _missed(what: str, scores: Scores, required: float) -> list[str]:
    reached = scores.metrics["AP"]
    if (reached or 0.0) >= required:
        return []
    return [f"{what} AP {_shown(reached)} is below the {required:g} that is required"]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="of the daemon: ipc:///PATH or tcp://HOST:PORT")
    parser.add_argument("--images", metavar="DIR", type=Path, required=True, help="where the annotated images are")
    parser.add_argument("--annotations", metavar="FILE", type=Path, required=True, help="COCO instances")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there")
    parser.add_argument("--limit", metavar="N", type=program.positive, help="only the first N images")
    parser.add_argument("--require-box-ap", metavar="X", type=program.percentage, default=0.0, help="percent")
    parser.add_argument("--require-mask-ap", metavar="Y", type=program.percentage, default=0.0, help="percent")
    program.add_connection(parser)
    return parser.parse_args(argv)
