"""The devices' own limit: an engine in a bare loop, batches of one prepared image, one after the other, by its clock.

No daemon, transport, decoding and masks. The loop runs in a process of its own, started on the first device as the
daemon starts a worker: same CPUs, threads, allocator and environment. `python -m blendmaskd_workers.benchmark.device`
is that process, and not for people.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blendmaskd import assignment
from blendmaskd.core import launch_plan
from blendmaskd.images.decoding import Pixels
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd_workers.batching import WORTH

LARGEST_BATCH = 16  # that is tried for batch auto
LEAST_RUNS = 2


class LimitError(OSError):
    """The bare loop could not run; the text says why."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What one device does alone."""

    batch: int
    fps: float


def limit(settings: Settings, pixels: Pixels, seconds: float) -> Limit:
    """Measure the first device for about `seconds` on an image (HxWx3 BGR). Raises `LimitError`."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        np.save(file, pixels)
        file.flush()
        plan = launch_plan.plan(
            settings.devices[0], launch.basis(settings), os.environ,
            arguments=("-m", "blendmaskd_workers.benchmark.device", file.name, str(seconds)),
        )  # fmt: skip
        process = launch.launch(plan, stdout=subprocess.PIPE)
        try:
            output, _ = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise LimitError(f"the bare loop of engine {settings.engine} ended with {process.returncode}; see above")
    return Limit(**json.loads(output.splitlines()[-1]))


def main(argv: list[str]) -> int:
    image, seconds, _ = argv  # the last is for `ps`
    from blendmaskd_workers import engines

    assigned = assignment.read(os.environ)
    engine = engines.make(assigned.settings, assigned.local_device)
    try:
        engine.load()
    except engines.EngineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    found = _best(engine, engine.prepare(np.load(image)), assigned.settings, float(seconds))
    print(json.dumps(asdict(found)))
    return 0


def _best(engine: Any, prepared: Any, settings: Settings, seconds: float) -> Limit:
    """At the batch that the worker begins with; where it would try larger ones, the best of these."""
    from blendmaskd_workers import engines

    best = _loop(engine, prepared, engines.best_batch(settings), seconds)
    learns = engines.batch_size(settings) == "auto" and settings.engine != "timed" and not settings.batch_latency_ms
    while learns and best.batch < LARGEST_BATCH:
        more = _loop(engine, prepared, 2 * best.batch, seconds)
        if more.fps < WORTH * best.fps:
            break
        best = more
    return best


def _loop(engine: Any, prepared: Any, batch: int, seconds: float) -> Limit:
    """By the device's own clock: what it does while it waits for the host does not count."""
    _run(engine, [prepared] * batch)
    device_s: list[float] = []
    start = time.perf_counter()
    while len(device_s) < LEAST_RUNS or time.perf_counter() - start < seconds:
        device_s.append(_run(engine, [prepared] * batch))
    return Limit(batch, len(device_s) * batch / sum(device_s))


def _run(engine: Any, batch: list[Any]) -> float:
    run = engine.launch(batch)
    run.complete()
    run.choose()
    run.collect()
    return float(run.times().busy_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
