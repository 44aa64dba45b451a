"""What one polite client sees while another floods the daemon.

The polite one has one job in flight. The other is a process of its own with `JOBS` in flight on one connection: it
sends the next one whenever it gets an answer, be it `busy`, and minds no `retry_after_s`.
"""
from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import zmq

from blendmaskd.protocol import Options
from blendmaskd_workers.benchmark import load, pictures
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.load_socket import NAME_BYTES, Sending, Template
from blendmaskd_workers.benchmark.measure import Point, Row

JOBS = 1000
POLITE = Point(1)
DEADLINE_S = 60.0
SNAPSHOT_S = 0.2  # between two questions for a newer one


def flood_one(generator: Generator, endpoint: str, size: tuple[int, int], warm_up_s: float, seconds: float) -> Row:
    """The polite client's latencies without and with the flood, which sends raw images of `size` (height, width).

    ``lonely`` and ``flooded`` as `load.figures`, ``ratio`` of their p99, and the flood's own ``flood_fps`` and
    ``refused_per_s``.
    """
    lonely, _ = _figures(generator, warm_up_s, seconds)
    with _flood(endpoint, size):
        flooded, others = _figures(generator, warm_up_s, seconds)
    return {"lonely": lonely, "flooded": flooded, "ratio": flooded["p99_ms"] / lonely["p99_ms"], **others}


def line(row: Row) -> str:
    lonely, flooded = row["lonely"], row["flooded"]
    return (
        f"round {row['round']}: p50/p99 alone {lonely['p50_ms']:.1f}/{lonely['p99_ms']:.1f} ms, beside a flood "
        f"{flooded['p50_ms']:.1f}/{flooded['p99_ms']:.1f} ms: p99 {row['ratio']:.2f}x; {flooded['jobs']} jobs, "
        f"{sum(flooded['failures'].values())} failed; the flood got {row['flood_fps']:.1f} images/s and "
        f"{row['refused_per_s']:.0f} refusals/s"
    )


def _figures(generator: Generator, warm_up_s: float, seconds: float) -> tuple[Row, Row]:
    generator.begin(POLITE.schedule(time.monotonic()))
    generator.run(warm_up_s)
    start, before = time.monotonic(), generator.stats()
    generator.run(seconds)
    end, after = time.monotonic(), generator.stats()
    while after["seq"] == before["seq"]:
        generator.run(SNAPSHOT_S)
        after = generator.stats()
    generator.drain()
    figures = load.figures(generator.samples, start, end)
    spent = after["time"] - before["time"]
    refused = after["failures"].get("busy", 0) - before["failures"].get("busy", 0)
    others = {
        "flood_fps": (after["answered"] - before["answered"]) / spent - figures["fps"],
        "refused_per_s": refused / spent,
    }
    return figures, others


@contextlib.contextmanager
def _flood(endpoint: str, size: tuple[int, int]) -> Iterator[None]:
    argv = [sys.executable, "-P", "-m", "blendmaskd_workers.benchmark.flood", endpoint, *map(str, size)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # its first answer
        yield
    finally:
        process.kill()
        process.communicate()


def main(argv: Sequence[str]) -> None:
    endpoint, height, width = argv
    picture = pictures.synthetic((int(height), int(width)), "raw")
    template = Template(picture.image, [picture.payload], Sending("socket", Options(), DEADLINE_S, 1))
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.SNDHWM, 0)
        dealer.connect(endpoint)
        for number in itertools.count():
            if number >= JOBS:
                dealer.recv_multipart(copy=False)
            if number == JOBS:
                print("flooding", flush=True)
            dealer.send_multipart(template.frames(f"{number:0{NAME_BYTES}}"), copy=False)


if __name__ == "__main__":
    main(sys.argv[1:])
