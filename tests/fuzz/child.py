"""Inputs in a process of its own: which one it is at is written where its parent can read it, whatever happens.

``python -m fuzz.child LAYER SEED FIRST STOP FOLDER`` feeds inputs, and prints what came of them,
see `Progress`. What breaks a rule is told, and ends it with exit code 1.
"""
from __future__ import annotations

import faulthandler
import mmap
import sys
import time
from pathlib import Path
from random import Random

import msgspec
import psutil

from blendmaskd.images import decoding as images
from blendmaskd.images.quiet import quiet
from blendmaskd.settings import Limits
from fuzz import bombs, rules

WARM = 2000  # inputs, after which memory should not grow any more


class Progress(msgspec.Struct):
    """What a child, or a whole layer, has come to."""

    inputs: int = 0
    outcomes: dict[str, int] = msgspec.field(default_factory=dict)
    slowest_s: float = 0.0
    slowest: int = 0  # number of the input
    warm_bytes: int = 0  # resident after `WARM` inputs
    bytes: int = 0  # resident now
    peak_bytes: int = 0

    def add(self, other: Progress) -> None:
        self.inputs += other.inputs
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + count
        self.slowest_s, self.slowest = max((self.slowest_s, self.slowest), (other.slowest_s, other.slowest))
        self.warm_bytes = max(self.warm_bytes, other.warm_bytes)
        self.bytes = max(self.bytes, other.bytes)
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


def input_random(seed: int, layer: str, number: int) -> Random:
    """All chance that an input needs: it is the same whoever asks."""
    return Random(f"{seed}/{layer}/{number}")


def measure(name: str, limits: Limits) -> dict[str, object]:
    """Decode a bomb: what came of it, seconds, and by how many bytes the process grew meanwhile."""
    payload = bombs.make(name, limits)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = peak_bytes(), time.monotonic()
    outcome = rules.outcome_of_image(lambda: images.decode(payload, limits), limits)
    return {"outcome": outcome, "s": time.monotonic() - start, "bytes": peak_bytes() - before, "size": len(payload)}


def peak_bytes() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def main(argv: list[str]) -> int:
    faulthandler.enable()
    quiet()
    layer, folder = argv[0], argv[4]
    seed, first, stop = map(int, argv[1:4])
    feed = rules.LAYERS[layer](Path(folder))
    where = open(f"{folder}/{first}.at", "r+b")  # noqa: SIM115
    at = mmap.mmap(where.fileno(), 8)
    process, progress = psutil.Process(), Progress()
    for number in range(first, stop):
        at[:] = number.to_bytes(8, "little")
        start = time.monotonic()
        try:
            outcome = feed(input_random(seed, layer, number))
        except Exception as error:
            print(f"{layer} {number}: {type(error).__name__}: {error}", file=sys.stderr)
            raise
        progress.add(Progress(1, {outcome: 1}, time.monotonic() - start, number))
        if progress.inputs == WARM:
            progress.warm_bytes = process.memory_info().rss
    progress.bytes, progress.peak_bytes = process.memory_info().rss, peak_bytes()
    print(msgspec.json.encode(progress).decode(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
