"""An offline run on a Ray cluster: `SegmentTasks` as Ray Data's actors, and what is told of it; see `program`."""
from __future__ import annotations

import argparse
import logging
import os
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

from blendmaskd import settings
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, NoDaemonError, OutputError, UsageError
from blendmaskd.programs.failures import tell_failures
from blendmaskd.protocol import Code, Options
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.topology import HostError
from blendmaskd_workers.cluster import journal, outputs, placement, tasks
from blendmaskd_workers.cluster.actor import SegmentTasks
from blendmaskd_workers.cluster.placement import PlacementError
from blendmaskd_workers.cluster.tasks import Inputs, Task

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
        fps = self.fps()
        lines = [f"{before} images were done before"] if before else []
        lines += [f"{name}: {self.images[name]} images, {each:.2f} FPS" for name, each in fps.items()]
        took = time.monotonic() - self.started
        combined = f"combined: {self.images.total()} images, {sum(fps.values()):.2f} FPS; {took:.1f} s with the start"
        return "\n".join([*lines, combined])


def run(arguments: argparse.Namespace) -> int:
    """The exit code. Raises what `blendmaskd.programs.errors.guarded` knows."""
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
    journal.open_run(folder, _about(inputs, options, loaded), resume=arguments.resume, anew=arguments.anew)
    stamps = inputs.stamps()
    again = {Code.WORKER_LOST} if arguments.retry_lost else set()
    before = {
        place for place, entry in journal.index(folder, stamps).items() if entry.final and entry.code not in again
    }
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
    tell_failures(console, failures)
    console.print(escape(tally.summary(len(before))))
    if interrupted:
        console.print("[yellow]interrupted: --resume continues from here")
        return EXIT_INTERRUPTED
    return EXIT_FAILED if failures else 0


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
        columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
        with Progress(*columns, console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=sum(len(task.places) for task in left))
            for row in _rows(left, loaded, arguments.output.absolute(), options, workers):
                tally.add(row)
                progress.update(bar, advance=row["images"], description=_description(tally))
    except (PlacementError, HostError) as error:
        raise UsageError(str(error)) from None
    except RayError as error:
        raise _explained(error) from error
    finally:
        ray.shutdown()


def _rows(
    left: Sequence[Task], loaded: Settings, folder: Path, options: Options, workers: int
) -> Iterator[dict[str, Any]]:
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
        ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **quiet)
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


def _description(tally: Tally) -> str:
    fps = tally.fps()
    text = f"{sum(fps.values()):.2f} FPS of {len(fps)} device{'s' if len(fps) != 1 else ''}"
    return f"{text}, [red]{tally.failed} failed" if tally.failed else text
