"""What clients see of the death of a worker under load."""
from __future__ import annotations

import os
import signal
import time

from blendmaskd_workers.benchmark import load
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.measure import Point, Row


def kill_one(generator: Generator, point: Point, warm_up_s: float, seconds: float) -> Row:
    """kill -9 of the first device's worker after `seconds` of load, watched for as long after its successor is ready.

    Rates before, in the meantime and in each half of the time after; ``ready_s`` until the successor was seen ready;
    ``half_s``; and of all jobs ``jobs``, ``failures``, ``wrong``, ``max_ms`` as in `load.figures`.
    """
    generator.begin(point.schedule(time.monotonic()))
    generator.run(warm_up_s)
    start = time.monotonic()
    generator.run(seconds)
    [first, *_] = generator.stats()["devices"]
    killed = time.monotonic()
    os.kill(first["pid"], signal.SIGKILL)
    while (snapshot := generator.stats())["devices"][0]["generation"] == first["generation"] or snapshot["degraded"]:
        generator.run(0.02)
    ready = time.monotonic()
    generator.run(seconds)
    generator.drain()
    samples, half = generator.samples, seconds / 2
    figures = load.figures(samples, start, ready + seconds)
    return {
        "before_fps": load.rate(samples, start, killed),
        "meanwhile_fps": load.rate(samples, killed, ready),
        "first_half_fps": load.rate(samples, ready, ready + half),
        "second_half_fps": load.rate(samples, ready + half, ready + seconds),
        "half_s": half,
        "ready_s": ready - killed,
        **{key: figures[key] for key in ("jobs", "failures", "wrong", "max_ms")},
    }


def line(row: Row) -> str:
    failures = ", ".join(f"{number} {code}" for code, number in row["failures"].items()) or "none failed"
    return (
        f"round {row['round']}: before {row['before_fps']:.2f} images/s; successor ready (and seen so) after "
        f"{row['ready_s']:.2f} s, meanwhile {row['meanwhile_fps']:.2f}; first {row['half_s']:g} s "
        f"{row['first_half_fps']:.2f}, next {row['second_half_fps']:.2f}; of {row['jobs']} jobs {failures}, "
        f"{row['wrong']} answers wrong; the longest took {row['max_ms']:.0f} ms"
    )
