"""Submit images to a running daemon, and keep its answers.

    python scripts/submit.py ipc:///run/blendmaskd/client.sock photos/ --out results/
    python scripts/submit.py tcp://host:5555 'val2017/*.jpg' --out results/ --annotations instances_val2017.json

Leaves in --out an overlay for each image (NAME.jpg) and results.json, the list of all COCO results. Images are files,
folders (the images right in them) and quoted globs (** goes into folders).

Exit codes: 0 all done · 1 an image failed, listed at the end · 2 wrong arguments · 3 no daemon · 130 Ctrl-C.
Once images were submitted results.json is written however the run ends, with what there is.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from daemon import overlay, photographs, program
from daemon.client import Client, JobFailed, Segmentation
from daemon.program import Failure, Interruptible, UsageError

OVERLAY_THREADS = 2  # beside the one that keeps the daemon fed


@dataclass(frozen=True, slots=True)
class Source:
    """An image to submit, and what it is called afterwards."""

    path: Path
    file_name: str  # in results.json
    image_id: int
    overlay: Path


@dataclass(slots=True)
class Run:
    """What came of a run so far."""

    started: float = field(default_factory=time.monotonic)
    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)  # by device
    interrupted: bool = False  # by Ctrl-C
    seconds: float = 0.0  # until the last answer

    def take(self, source: Source, answer: Segmentation | JobFailed) -> None:
        self.seconds = time.monotonic() - self.started
        if isinstance(answer, JobFailed):
            self.failures.append(Failure(source.path, answer.code.value, answer.reason))
            return
        self.images[answer.device] += 1
        named = {"image_id": source.image_id, "file_name": source.file_name}
        self.results += [{**named, **detection} for detection in answer.detections]

    def summary(self) -> str:
        """Images and FPS of each device and of all together."""
        lines = [
            f"{device}: {images} images, {images / self.seconds:.2f} FPS"
            for device, images in sorted(self.images.items())
        ]
        done = self.images.total()
        combined = done / self.seconds if done else 0.0
        return "\n".join([*lines, f"combined: {done} images in {self.seconds:.1f} s, {combined:.2f} FPS"])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return program.guarded("submit", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    sources = plan(photographs.find(arguments.images), arguments.out, arguments.annotations)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: {error}") from None
    with program.connect(arguments) as client:
        run = submit(client, sources, arguments)
    _tell(run)
    if run.interrupted:
        return program.EXIT_INTERRUPTED
    return program.EXIT_FAILED if run.failures else 0


# -- which images, and what they are called ---------------------------------------------------------------------------


def plan(paths: Sequence[Path], out: Path, annotations: Path | None) -> list[Source]:
    """What each image is called in results.json, its id there, and where its overlay goes.

    The id is the one of its name in the COCO annotations, else its place, from 1. Raises `UsageError` for an image that
    is not in the annotations and for an overlay that would take the place of an image.
    """
    overlays = [out / name for name in overlay_names(photographs.below_common_folder(paths))]
    originals = {os.path.realpath(path): path for path in paths}
    for target in overlays:
        if os.path.realpath(target) in originals:
            raise UsageError(f"the overlay {target} would take the place of that image: choose another --out")
    ids = _annotated_ids(paths, annotations) if annotations else range(1, len(paths) + 1)
    return [Source(*each) for each in zip(paths, photographs.names(paths), ids, overlays)]


def overlay_names(below: Sequence[Path]) -> list[Path]:
    """A file name for each image's overlay, no two the same.

    Its base name and .jpg; if two images share that, with the folders in front (a/1.jpg, b/1.jpg); if two in one
    folder do, with the old suffix as well (1.png.jpg, 1.tif.jpg).
    """
    choices = (
        [Path(path.stem + ".jpg") for path in below],
        [path.with_suffix(".jpg") for path in below],
        [path.with_name(path.name + ".jpg") for path in below],
    )
    return next(names for names in choices if photographs.unique(names))


def _annotated_ids(paths: Sequence[Path], annotations: Path) -> list[int]:
    try:
        entries = json.loads(annotations.read_text(encoding="utf-8"))["images"]
        ids = {str(entry["file_name"]): int(entry["id"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{annotations}: not COCO annotations: {type(error).__name__}: {error}") from None
    return [_annotated_id(path, ids, annotations) for path in paths]


def _annotated_id(path: Path, ids: dict[str, int], annotations: Path) -> int:
    """By the longest end of its path that is named: an annotation's file_name may have folders in front."""
    parts = Path(os.path.abspath(path)).parts
    for start in range(1, len(parts)):
        name = "/".join(parts[start:])
        if name in ids:
            return ids[name]
    raise UsageError(f"{path}: not among the images of {annotations}")


# -- the run ----------------------------------------------------------------------------------------------------------


def submit(client: Client, sources: Sequence[Source], arguments: argparse.Namespace) -> Run:
    """Submit all images and write results.json and the overlays."""
    run = Run()
    overlays: list[tuple[Source, Future[None]]] = []
    with _progress() as progress, ThreadPoolExecutor(OVERLAY_THREADS) as pool:
        task = progress.add_task("", total=len(sources))
        try:
            with contextlib.closing(_answers(client, sources, arguments, run)) as answers, Interruptible() as ctrl_c:
                while (answered := ctrl_c.wait(lambda: next(answers, None))) is not None:
                    source, answer = answered
                    run.take(source, answer)
                    if isinstance(answer, Segmentation) and arguments.overlays:
                        overlays.append((source, pool.submit(draw_overlay, source, answer)))
                    progress.update(task, advance=1, description=_failed_so_far(run))
        except KeyboardInterrupt:
            run.interrupted = True
        finally:
            program.write_json(arguments.out / "results.json", run.results)
    run.failures += _failed_overlays(overlays)
    return run


def _answers(
    client: Client, sources: Sequence[Source], arguments: argparse.Namespace, run: Run
) -> Generator[tuple[Source, Segmentation | JobFailed], None, None]:
    """Each image with its answer, in order. When no answer comes any more, what is left is put among the failures."""
    answers = client.map(
        [source.path for source in sources],
        window=arguments.window,
        on_error="return",
        score_threshold=arguments.score_threshold,
        max_detections=arguments.max_detections,
        mask_format=arguments.mask_format,
    )
    left = deque(sources)
    with contextlib.closing(answers):
        try:
            for answer in answers:
                yield left.popleft(), answer
        except TimeoutError as error:
            run.failures += [Failure(source.path, "no-answer", str(error)) for source in left]


def draw_overlay(source: Source, answer: Segmentation) -> None:
    """Write the image with its results drawn over it."""
    with Image.open(source.path) as image:
        drawn = overlay.draw(_upright(image), answer.detections)
    source.overlay.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(source.overlay, quality=92)


def _upright(image: Image.Image) -> Image.Image:
    """As the daemon saw it."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF raises all sorts, and does not count
        return image


def _failed_overlays(overlays: Iterable[tuple[Source, Future[None]]]) -> list[Failure]:
    errors = [(source, future.exception()) for source, future in overlays]
    return [Failure(source.path, "overlay", f"{type(error).__name__}: {error}") for source, error in errors if error]


# -- telling ----------------------------------------------------------------------------------------------------------


class _FpsColumn(TextColumn):
    """Images per second lately; in the end, of the whole run."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text(f"{speed:.2f} FPS" if speed else "-.-- FPS")


def _progress() -> Progress:
    return Progress(
        BarColumn(), MofNCompleteColumn(), _FpsColumn(), TimeRemainingColumn(), TextColumn("[red]{task.description}"),
        console=Console(stderr=True),
    )  # fmt: skip


def _failed_so_far(run: Run) -> str:
    return f"{len(run.failures)} failed" if run.failures else ""


def _tell(run: Run) -> None:
    console = Console(highlight=False, soft_wrap=True)
    if run.interrupted:
        console.print("[yellow]interrupted: what was not answered is cancelled")
    program.tell_failures(console, run.failures)
    console.print(escape(run.summary()))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="of the daemon: ipc:///PATH or tcp://HOST:PORT")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a file, a folder or a quoted glob")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for overlays and results.json")
    parser.add_argument("--annotations", metavar="FILE", type=Path, help="COCO annotations whose image ids are used")
    parser.add_argument("--score-threshold", metavar="S", type=program.share, default=0.3, help="0 to 1, default 0.3")
    parser.add_argument("--max-detections", metavar="N", type=program.count, help="the best ones; default: all")
    parser.add_argument("--mask-format", choices=["rle", "polygon", "none"], default="rle")
    program.add_connection(parser)
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="only results.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
