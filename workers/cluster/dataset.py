"""Segment a folder or Parquet files with every accelerator of a Ray cluster, or of this machine.

    python scripts/segment_dataset.py --input photos/ --output out/ --settings configs/daemon.yaml
    python scripts/segment_dataset.py --input 'train/*.parquet' --output out/ --format parquet --address ray-head:6379
    python scripts/segment_dataset.py --input photos/ --output out/ --resume

Leaves in --output results.json, the list of all COCO results (or results.parquet, a row for each image),
failures.json, the images without a result and why, and the journal. Images are files, folders (the images right in
them), quoted globs, or Parquet files with a column of encoded images. All nodes must see --input and --output under
the same paths.

--resume continues a run that ended early, however it did: what is in the journal is not done again, unless its file was
changed since; images that failed for reasons of their own stay failed. Without --address a cluster that runs on this
machine is used, else one is started for the run.

Exit codes: 0 all done · 1 an image failed, listed at the end · 2 wrong arguments · 3 no cluster, or no device in it ·
4 --output cannot be written · 130 Ctrl-C.
"""
from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from daemon import program, settings
from daemon.program import NoDaemonError, OutputError, UsageError
from daemon.protocol import Options
from daemon.settings import Settings, SettingsError
from daemon.spawn import SpawnError
from workers.cluster import journal, outputs, placement, tasks
from workers.cluster.actor import SegmentTasks
from workers.cluster.journal import Run
from workers.cluster.placement import PlacementError
from workers.cluster.tasks import Inputs, Task

OBJECT_STORE_BYTES = 200 << 20  # of a cluster of our own: only tasks and counts go through it
CALLS_AT_ONCE = 2  # of a worker: the next task is read while one runs
TASKS_AT_ONCE = 4


@dataclass(slots=True)
class Tally:
    """What was done in this run, by device; a device's FPS are by its worker's own clock, from its first task on."""

    started: float = field(default_factory=time.monotonic)
    images: Counter[str] = field(default_factory=Counter)  # by node/device
    failed: int = 0
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)  # by node/device and process

    def add(self, row: Mapping[str, Any]) -> None:
        name = f"{row['node']}/{row['device']}"
        self.images[name] += row["images"]
        self.failed += row["failed"]
        life = name, row["pid"]
        self.seconds[life] = max(self.seconds.get(life, 0.0), row["seconds"])

    def fps(self) -> dict[str, float]:
        """By device; their sum is the combined FPS."""
        busy = dict.fromkeys(sorted(self.images), 0.0)
        for (name, _), seconds in self.seconds.items():
            busy[name] += seconds
        return {name: self.images[name] / max(seconds, 1e-9) for name, seconds in busy.items()}

    def summary(self, before: int) -> str:
        """Images and FPS of each device and of all together."""
        fps = self.fps()
        lines = [f"{before} images were done before"] if before else []
        lines += [f"{name}: {self.images[name]} images, {each:.2f} FPS" for name, each in fps.items()]
        took = time.monotonic() - self.started
        combined = f"combined: {self.images.total()} images, {sum(fps.values()):.2f} FPS; {took:.1f} s with the start"
        return "\n".join([*lines, combined])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    return program.guarded("segment_dataset", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    try:
        loaded = settings.load(arguments.settings, os.environ, arguments.set, arguments.devices)
    except SettingsError as error:
        raise UsageError(str(error)) from None
    inputs = tasks.find(arguments.input, arguments.column, arguments.name_column)
    options = Options(
        score_threshold=arguments.score_threshold, max_detections=arguments.max_detections,
        mask_format=arguments.mask_format,
    )  # fmt: skip
    folder = arguments.output.absolute()
    Run(folder, _about(inputs, options, loaded)).open(resume=arguments.resume, anew=arguments.anew)
    stamps = inputs.stamps()
    before = {place for place, entry in journal.index(folder, stamps).items() if entry.final}
    tally, interrupted = Tally(), False
    try:
        if len(before) < len(inputs.names):
            _segment(arguments, loaded, inputs, before, options, tally)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        done = journal.index(folder, stamps)
        parquet = arguments.format == "parquet"
        failures = outputs.write(folder, inputs.names, done, parquet=parquet, mask_format=options.mask_format)
    console = Console(highlight=False, soft_wrap=True)
    program.tell_failures(console, failures)
    console.print(escape(tally.summary(len(before))))
    if interrupted:
        console.print("[yellow]interrupted: --resume goes on from here")
        return program.EXIT_INTERRUPTED
    return program.EXIT_FAILED if failures else 0


def _about(inputs: Inputs, options: Options, loaded: Settings) -> dict[str, Any]:
    """What answers depend on."""
    return {
        "images": len(inputs.names),
        "images_sha256": inputs.digest,
        "options": msgspec.to_builtins(options),
        "engine": loaded.engine,
        "model": msgspec.to_builtins(loaded.model),
    }


def _segment(
    arguments: argparse.Namespace, loaded: Settings, inputs: Inputs, before: set[int], options: Options, tally: Tally
) -> None:
    """Do what is left. Raises `NoDaemonError` without a cluster or a device, `OutputError` when the disk is full."""
    _connect(arguments.address)
    try:
        workers = _workers(arguments.workers, loaded)
        left = tasks.plan(inputs, before, workers)
        with _progress() as progress:
            bar = progress.add_task("", total=sum(len(task.places) for task in left))
            for row in _rows(left, loaded, arguments.output.absolute(), options, workers):
                tally.add(row)
                progress.update(bar, advance=row["images"], description=_description(tally))
    except (PlacementError, SpawnError) as error:
        raise UsageError(str(error)) from None
    except RayError as error:
        raise _explained(error) from error
    finally:
        ray.shutdown()


def _rows(
    left: Sequence[Task], loaded: Settings, folder: Path, options: Options, workers: int
) -> Iterator[dict[str, Any]]:
    """What came of each task, as it comes."""
    items = [{"task": msgspec.json.encode(task)} for task in left]
    compute = ActorPoolStrategy(
        min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=TASKS_AT_ONCE,
        max_concurrent_calls_per_actor=CALLS_AT_ONCE, enable_true_multi_threading=True,
    )  # fmt: skip
    done = ray.data.from_items(items, override_num_blocks=len(items)).map(
        SegmentTasks, compute=compute, fn_constructor_args=[settings.to_tree(loaded), str(folder), options],
        **placement.actor_options(loaded),
    )  # fmt: skip
    yield from done.iter_rows()


def _connect(address: str | None) -> None:
    """To the cluster at `address`, to one that runs here, or to one of our own."""
    logging.getLogger("ray").setLevel(logging.WARNING)
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        ray.init(address=address or "auto", **quiet)
    except ConnectionError as error:
        if address:
            raise NoDaemonError(f"--address {address}: no Ray cluster there: {error}") from None
        ray.init(
            address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES,
            **quiet,
        )  # fmt: skip
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _workers(wanted: int | None, loaded: Settings) -> int:
    resources = ray.cluster_resources()
    found = placement.capacity(loaded, resources)
    if not found and not wanted:
        raise NoDaemonError(f"devices = {loaded.devices}: no node of the cluster has such a device; its resources are "
                            f"{resources}")  # fmt: skip
    return wanted or found


def _explained(error: RayError) -> Exception:
    """The error of a worker in this program's words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    kind, _, text = last.partition(": ")
    if kind.endswith("OutputError"):
        return OutputError(text)
    return NoDaemonError(f"the workers cannot go on: {text or last}")


def _progress() -> Progress:
    return Progress(
        BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=Console(stderr=True),
    )  # fmt: skip


def _description(tally: Tally) -> str:
    fps = tally.fps()
    text = f"{sum(fps.values()):.2f} FPS of {len(fps)} device{'s' if len(fps) != 1 else ''}"
    return f"{text}, [red]{tally.failed} failed" if tally.failed else text


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", metavar="IMAGES", nargs="+", required=True, help="files, folders, quoted globs, or "
                        "Parquet files or folders of them")  # fmt: skip
    parser.add_argument("--output", metavar="DIR", type=Path, required=True)
    parser.add_argument("--settings", metavar="FILE", help="as the daemon's; default: its defaults")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, over the file's")
    parser.add_argument("--devices", metavar="DEVICE", nargs="+", help="of which kind: npu:0, cuda:0 or cpu:0")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster; default: the one on this machine")
    parser.add_argument("--workers", metavar="N", type=program.positive, help="at most; default: all of the cluster's")
    parser.add_argument("--format", choices=["coco", "parquet"], default="coco", help="results.json or results.parquet")
    parser.add_argument("--column", metavar="NAME", default="image", help="of a Parquet file, with the encoded images; "
                        "default image")  # fmt: skip
    parser.add_argument("--name-column", metavar="NAME", help="with the images' file names; default: FILE#ROW")
    parser.add_argument("--score-threshold", metavar="S", type=program.share, default=0.3, help="0 to 1, default 0.3")
    parser.add_argument("--max-detections", metavar="N", type=program.count, help="the best ones; default: all")
    parser.add_argument("--mask-format", choices=["rle", "polygon", "none"], default="rle")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue a run that ended early")
    again.add_argument("--anew", action="store_true", help="begin anew although --output holds a run")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
