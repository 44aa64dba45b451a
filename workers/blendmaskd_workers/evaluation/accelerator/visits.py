"""How long a device takes for a batch, by its own clock, with two runs on it as in a worker.

`python -m blendmaskd_workers.evaluation.accelerator.visits '[[HEIGHT, WIDTH], [BATCH, …], SECONDS]'` is started as the
daemon starts workers, for one precision; not for people. It tells a row for each batch size, first without graphs:

====================  ============================================================================
graphs, batch         whether, images
images_per_s          by the wall clock
device_images_per_s   what the device could do if it never waited
first_ms, second_ms   the device's two visits, medians
idle_ms               what it waited before the parts of a run, by reason, means
idle_share            of its time, 0 to 1
alone_ms              one run with nothing else on the device, by the wall clock, median
peak_mb, taken_mb     see `blendmaskd_workers.devices.Memory`; the peak is the largest so far
warm_up_s             the first runs, and recording graphs
runs                  that were timed
====================  ============================================================================

or ``unsupported``, ``skipped`` or ``failed`` with a reason.
"""
from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from blendmaskd import assignment
from blendmaskd.assignment import Assignment
from blendmaskd.protocol import IDLE
from blendmaskd_workers import engines, process
from blendmaskd_workers.devices import UnsupportedError
from blendmaskd_workers.engines import Engine, EngineError, Run, Times, segment
from blendmaskd_workers.evaluation.accelerator.children import TIME_IS_UP, Row, Tell, telling

LEAST_RUNS = 3
ALONE_RUNS = 3
RUNS = 1 + ALONE_RUNS + LEAST_RUNS + 1  # at least, of a batch size: to warm up, and one in flight at the end
MOST_S = 3.0  # for a batch size
NOT_THERE = ("not implemented", "not supported", "unsupported")


def main(argv: list[str]) -> int:
    process.end_with_parent()
    size, batches, seconds = json.loads(argv[0])  # what follows it is for `ps`
    deadline = time.monotonic() + seconds
    assigned = assignment.read(os.environ)
    with telling() as tell:
        for graphs in (False, True):
            left_s = deadline - time.monotonic()
            until = deadline if graphs or assigned.local_device == "cpu" else deadline - left_s / 2
            _time_kind(assigned, graphs, tuple(size), batches, until, partial(tell, graphs=graphs))
    return 0


def _time_kind(
    assigned: Assignment, graphs: bool, size: tuple[int, int], batches: Sequence[int], until: float, tell: Tell
) -> None:
    if graphs and assigned.local_device == "cpu":
        tell(unsupported="a CPU has no graphs")
        return
    try:
        engine = _loaded(assigned, graphs)
    except EngineError as error:
        if not isinstance(error.__cause__, UnsupportedError):
            raise
        tell(unsupported=str(error))
    else:
        _time_all(engine, size, batches, until, tell)


def _loaded(assigned: Assignment, graphs: bool) -> Engine:
    settings = assigned.settings
    model = msgspec.structs.replace(settings.model, graphs=graphs)
    engine = engines.make(msgspec.structs.replace(settings, model=model), assigned.local_device)
    engine.load()
    return engine


def _time_all(engine: Engine, size: tuple[int, int], batches: Sequence[int], deadline: float, tell: Tell) -> None:
    prepared = engine.prepare(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    refused, per_image_s = "", 0.0
    for number, batch in enumerate(batches):
        left = deadline - time.monotonic()
        if not refused and per_image_s * batch * RUNS > left:
            refused = TIME_IS_UP
        if refused:
            tell(batch=batch, skipped=refused)
            continue
        try:
            row = _time(engine, size, [prepared] * batch, left / (len(batches) - number))
            per_image_s = row["alone_ms"] / 1000 / batch
        except Exception as error:  # whatever a driver raises
            row = why(error)
            refused = f"batch {batch} did not run"
        tell(batch=batch, **row)


def why(error: Exception) -> Row:
    """What an error says of the device: that it has not the memory or the means, or that it failed."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "out of memory" in str(error).lower():
        return {"skipped": f"out of memory: {text}"}
    missing = any(words in str(error).lower() for words in NOT_THERE)
    if missing or isinstance(error, UnsupportedError | NotImplementedError | AttributeError):
        return {"unsupported": text}
    return {"failed": f"{type(error).__name__}: {text}"}


def _time(engine: Engine, size: tuple[int, int], batch: list[Any], seconds: float) -> Row:
    start = time.monotonic()
    engine.warm_up([size], len(batch))
    warm_up_s = time.monotonic() - start
    alone_s = [_seconds(engine, batch) for _ in range(ALONE_RUNS)]
    begun = time.monotonic()
    times = fly(engine, batch, begun + min(seconds - (begun - start), MOST_S))
    wall_s = time.monotonic() - begun
    return {
        "images_per_s": len(times) * len(batch) / wall_s,
        **figures(times[1:], len(batch)),  # the first one found an idle device
        "alone_ms": 1000 * statistics.median(alone_s),
        **_memory(engine),
        "warm_up_s": warm_up_s,
        "runs": len(times),
    }


def _memory(engine: Engine) -> Row:
    memory = engine.device.memory() if engine.device else None
    return {} if memory is None else {"peak_mb": memory.peak / 1e6, "taken_mb": memory.taken / 1e6}


def figures(times: Sequence[Times], batch: int) -> Row:
    """What the device's clock says of runs of a batch."""
    busy_s = statistics.median(each.busy_s for each in times)
    idle_s = {reason: statistics.fmean(each.idle_s.get(reason, 0.0) for each in times) for reason in IDLE}
    whole_s = statistics.fmean(each.busy_s for each in times) + sum(idle_s.values())
    return {
        "device_images_per_s": batch / busy_s,
        "first_ms": 1000 * statistics.median(each.first_s for each in times),
        "second_ms": 1000 * statistics.median(each.busy_s - each.first_s for each in times),
        "idle_ms": {reason: 1000 * seconds for reason, seconds in idle_s.items()},
        "idle_share": sum(idle_s.values()) / whole_s,
    }


def fly(engine: Engine, batch: list[Any], until: float) -> list[Times]:
    """Runs until then, at least `LEAST_RUNS`; where the device overlaps, each begins before the last one's choice."""
    times: list[Times] = []
    last = _begun(engine, batch)
    while len(times) < LEAST_RUNS or time.monotonic() < until:
        following = engine.launch(batch) if engine.overlaps else None
        last.choose()
        if following is not None:
            following.complete()
        times.append(_collected(last))
        last = following or _begun(engine, batch)
    last.choose()
    return [*times, _collected(last)]


def _begun(engine: Engine, batch: list[Any]) -> Run:
    run = engine.launch(batch)
    run.complete()
    return run


def _collected(run: Run) -> Times:
    run.collect()
    return run.times()


def _seconds(engine: Engine, batch: list[Any]) -> float:
    start = time.perf_counter()
    segment(engine, batch)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
