"""Submit images to a running daemon, and keep its answers.

    python scripts/submit.py ipc:///run/blendmaskd/client.sock photos/ --out results/
    python scripts/submit.py tcp://host:5555 'val2017/*.jpg' --out results/ --annotations instances_val2017.json

    python scripts/submit.py ipc:///run/blendmaskd/client.sock photos/ --out results/ --resume

Writes to --out an overlay of each image (NAME.jpg), results.json, the list of all COCO results, and journal.jsonl, each
answer as it arrived. Images are files, folders (the images directly in them) and quoted globs (** descends into
folders).

--annotations gives each image the id that COCO annotations assign to its name, with its type, so that pycocotools can
compare results.json with that file. Images that would get the same id are refused.

--resume continues a run that ended early, for whatever reason, given the same images and options. Answered images are
not submitted again unless their file has changed; failed images are retried and missing overlays drawn. An image that
failed as worker-lost is not retried unless --retry-lost is given, because the daemon has already retried it and lost
workers to it. If there is nothing to continue, a new run begins. Without --resume a run starts from scratch, but never
overwrites the answers of an unfinished one.

Exit codes: 0 all done · 1 an image failed, listed at the end · 2 wrong arguments · 3 no daemon · 4 --out cannot be
written, for example because the disk is full · 130 Ctrl-C, SIGTERM or SIGHUP. Once images have been submitted,
results.json is written with the results so far however the run ends, but for kill -9.
"""
from __future__ import annotations

import argparse
import contextlib
import errno
import sys
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from blendmaskd import files
from blendmaskd.client.blocking import Client, JobFailed, Segmentation
from blendmaskd.images import decoding as images
from blendmaskd.images import overlay
from blendmaskd.images.quiet import quiet
from blendmaskd.output import Help
from blendmaskd.programs import input_images
from blendmaskd.programs.arguments import add_results, parse_resuming
from blendmaskd.programs.connecting import add_connection, connect
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OUTPUT, OutputError, UsageError, guarded
from blendmaskd.programs.failures import Failure, tell_failures
from blendmaskd.programs.interruption import Interruptible
from blendmaskd.programs.journal import Journal, settled
from blendmaskd.programs.lines import Stamp, stamp
from blendmaskd.programs.sources import Source, plan
from blendmaskd.protocol import Code

JOURNAL = "journal.jsonl"
OVERLAY_THREADS = 2  # beside the one that keeps the daemon fed


@dataclass(slots=True)
class Run:
    """What came of a run so far."""

    journal: Journal
    started: float = field(default_factory=time.monotonic)
    results: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by place
    failures: list[Failure] = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)  # by device
    before: int = 0  # images that an earlier run did
    interrupted: bool = False  # by a signal
    trouble: str = ""  # why nothing more can be kept
    seconds: float = 0.0  # until the last answer

    def take(self, source: Source, stamp: Stamp, answer: Segmentation | JobFailed) -> None:
        """Keep an answer. Raises `OutputError`."""
        self.seconds = time.monotonic() - self.started
        if isinstance(answer, JobFailed):
            self.failures.append(Failure(source.path, answer.code.value, answer.reason))
            self.journal.failed(source.place, stamp, answer.code.value, answer.reason)
            return
        self.journal.answered(source.place, stamp, answer.device, answer.detections)
        self.images[answer.device] += 1
        self._keep(source, answer.detections)

    def recall(self, source: Source) -> None:
        """What the journal has of it."""
        if failed := self.journal.contents.failed.get(source.place):
            self.failures.append(Failure(source.path, failed.code, failed.reason))
        else:
            self.before += 1
            self._keep(source, self.journal.contents.answers[source.place].detections)

    def _keep(self, source: Source, detections: list[dict[str, Any]]) -> None:
        named = {"image_id": source.image_id, "file_name": source.file_name}
        self.results[source.place] = [{**named, **detection} for detection in detections]

    def ordered(self) -> list[dict[str, Any]]:
        """All results in the order of the images."""
        return [result for _, results in sorted(self.results.items()) for result in results]

    def summary(self) -> str:
        """Images and FPS of each device and of all together."""
        lines = [f"{self.before} images were done before"] if self.before else []
        lines += [
            f"{device}: {images} images, {images / self.seconds:.2f} FPS"
            for device, images in sorted(self.images.items())
        ]
        done = self.images.total()
        combined = done / self.seconds if done else 0.0
        return "\n".join([*lines, f"combined: {done} images in {self.seconds:.1f} s, {combined:.2f} FPS"])


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("submit", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    quiet()
    sources = plan(input_images.find(arguments.images), arguments.out, arguments.annotations)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror}") from None
    named = [(source.file_name, source.image_id) for source in sources]
    journal = Journal(arguments.out / JOURNAL, named, _options(arguments))
    with journal.open(resume=arguments.resume, anew=arguments.anew):
        run = Run(journal)
        left = _recall(run, sources, retry_lost=arguments.retry_lost)
        with connect(arguments) if left else contextlib.nullcontext() as client:
            submit(client, run, sources, left, arguments)
    _tell(run, sources)
    if run.trouble:
        return EXIT_OUTPUT
    if run.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if run.failures else 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that an answer depends on."""
    return {name: getattr(arguments, name) for name in ("score_threshold", "max_detections", "mask_format")}


def _recall(run: Run, sources: Sequence[Source], *, retry_lost: bool) -> list[Source]:
    """Take over what the journal has; returns what is left to submit."""
    places = settled(run.journal.contents, [source.path for source in sources], retry_lost=retry_lost)
    for place in sorted(places):
        run.recall(sources[place])
    return [source for source in sources if source.place not in places]


# -- the run ----------------------------------------------------------------------------------------------------------


def submit(
    client: Client | None, run: Run, sources: Sequence[Source], left: Sequence[Source], arguments: argparse.Namespace
) -> None:
    """Submit what is left, and write results.json and the overlays. Without anything left no client is needed."""
    with _progress() as progress, ThreadPoolExecutor(OVERLAY_THREADS) as pool:
        overlays = Overlays(run, pool, wanted=arguments.overlays)
        overlays.catch_up(sources)
        task = progress.add_task("", total=len(left))
        try:
            if client is not None:
                with contextlib.closing(_answers(client, left, arguments, run)) as answers, Interruptible() as ctrl_c:
                    while (answered := ctrl_c.wait(lambda: next(answers, None))) is not None:
                        source, stamp, answer = answered
                        run.take(source, stamp, answer)
                        if isinstance(answer, Segmentation):
                            overlays.draw(source, answer.detections)
                        overlays.collect()
                        failed = f"{len(run.failures)} failed" if run.failures else ""
                        progress.update(task, advance=1, description=failed)
        except KeyboardInterrupt:
            run.interrupted = True
        except OutputError as error:
            run.trouble = str(error)
        finally:
            _write_results(run, arguments.out / "results.json")
        overlays.finish()


def _write_results(run: Run, path: Path) -> None:
    try:
        files.write_json(path, run.ordered())
    except OSError as error:
        run.trouble = run.trouble or f"{path}: {error.strerror}"


def _answers(
    client: Client, sources: Sequence[Source], arguments: argparse.Namespace, run: Run
) -> Generator[tuple[Source, Stamp, Segmentation | JobFailed], None, None]:
    """Each image with its answer, in order. When no answer comes any more, what is left is put among the failures."""
    left = deque(sources)
    stamps: deque[Stamp] = deque()

    def paths() -> Iterator[Path]:
        for source in sources:
            stamps.append(stamp(source.path))  # before it is read: what is changed in between is not taken for done
            yield source.path

    answers = client.map(paths(), window=arguments.window, on_error="return", **_options(arguments))
    with contextlib.closing(answers):
        try:
            for answer in answers:
                yield left.popleft(), stamps.popleft(), answer
        except TimeoutError as error:
            run.failures += [Failure(source.path, "no-answer", str(error)) for source in left]


class Overlays:
    """The overlays of a run, drawn by threads of `pool`; `wanted` false: none are."""

    def __init__(self, run: Run, pool: ThreadPoolExecutor, *, wanted: bool) -> None:
        self._run = run
        self._pool = pool
        self._wanted = wanted
        self._drawing: deque[tuple[Source, Future[None]]] = deque()

    def draw(self, source: Source, detections: Sequence[dict[str, Any]]) -> None:
        if self._wanted:
            self._drawing.append((source, self._pool.submit(draw_overlay, source, detections)))

    def catch_up(self, sources: Sequence[Source]) -> None:
        """Draw what an earlier run did not come to, and what is gone since."""
        contents = self._run.journal.contents
        for place in sorted(self._run.results):
            if place not in contents.drawn or not sources[place].overlay.is_file():
                self.draw(sources[place], contents.answers[place].detections)

    def collect(self) -> None:
        """Take note of those that are done. Raises `OutputError` when the disk is full."""
        while self._drawing and self._drawing[0][1].done():
            self._note(*self._drawing.popleft())

    def finish(self) -> None:
        """Wait for those that are not done, unless nothing can be written any more."""
        try:
            while self._drawing and not self._run.trouble:
                self._note(*self._drawing.popleft())
        except OutputError as error:
            self._run.trouble = str(error)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _note(self, source: Source, drawing: Future[None]) -> None:
        error = drawing.exception()
        if error is None:
            self._run.journal.drew(source.place)
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{source.overlay}: {error.strerror}")
        else:
            self._run.failures.append(Failure(source.path, "overlay", f"{type(error).__name__}: {error}"))


def draw_overlay(source: Source, detections: Sequence[dict[str, Any]]) -> None:
    """Write the image with its results drawn over it, whole or not at all."""
    drawn = overlay.draw(images.read(source.path), detections)
    source.overlay.parent.mkdir(parents=True, exist_ok=True)
    with files.whole(source.overlay, mark="part") as beside:  # the journal's lock keeps others off
        drawn.save(beside, "JPEG", quality=92)


# -- telling ----------------------------------------------------------------------------------------------------------


class _FpsColumn(TextColumn):
    """Images per second lately; in the end, of the whole run."""

    def render(self, task: Task) -> Text:
        speed = task.completed / task.finished_time if task.finished_time else task.speed
        return Text(f"{speed:.2f} FPS" if speed else "-.-- FPS")


def _progress() -> Progress:
    return Progress(
        BarColumn(), MofNCompleteColumn(), _FpsColumn(""), TimeRemainingColumn(), TextColumn("[red]{task.description}"),
        console=Console(stderr=True),
    )  # fmt: skip


def _tell(run: Run, sources: Sequence[Source]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    tell_failures(console, run.failures)
    console.print(escape(run.summary()))
    if run.interrupted:
        console.print("[yellow]interrupted: unanswered jobs are cancelled; --resume continues from here")
    elif any(failure.code == "no-answer" for failure in run.failures):
        console.print("[yellow]--resume continues from here once a daemon answers again")
    if any(failure.code == Code.WORKER_LOST for failure in run.failures):
        console.print("[yellow]worker-lost is final: only --resume --retry-lost retries it")
    if run.trouble:
        done = len(run.journal.contents.answers)
        print(f"submit: cannot write {run.trouble}: stopped. {done} of {len(sources)} images are done and kept in the "
              "journal; free some space, then continue with --resume", file=sys.stderr)  # fmt: skip


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("endpoint", metavar="ENDPOINT", help="the daemon's: ipc:///PATH or tcp://HOST:PORT")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="a file, a folder or a quoted glob")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for overlays and results.json")
    parser.add_argument("--annotations", metavar="FILE", type=Path, help="take image ids from these COCO annotations")
    add_results(parser)
    add_connection(parser)
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="write only results.json")
    return parse_resuming(parser, argv, "--out")
