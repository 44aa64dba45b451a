"""How many images to run at once: what the device's own latency says. Pure: no clock, no device.

A device that takes ``latency(n)`` for n images gives ``n / latency(n)`` images per second. `Batching` learns that
latency for each padded size while the worker serves, and aims at the batch of most images per second. What it knows
before is the settings' table, whose ratios it keeps when the device turns out to be faster or slower.

Rules for ``auto``: the smallest batch counts as best unless a larger one gives more by `WORTH`. While the best is the
largest that is known, twice as many are tried, if that many are there at once and the device takes less than
`LONG_S`: batching saves what a launch costs, and nobody sees that in a quarter of a second. The first run of a new
size is not counted, because a device may compile for it.

For any thread. What was learnt is replaced and never changed, so who reads it reads one state of it. Of the padded
sizes, those that ran last are remembered: whoever sends images chooses them.
"""
from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

WORTH = 1.01  # a gain below is noise
LONG_S = 0.25
LARGEST = 16  # that is tried unasked
RUNS_TO_KNOW = 3
RUNS_REMEMBERED = 9
SIZES_REMEMBERED = 64  # 800 to 1333 pixels, in steps of 32, are 35

Size = tuple[int, int]  # height, width, padded


def ahead(preparing_s: float, busy_s: float, threads: int) -> int:
    """How many images to hold beyond those of the batches: as many as are prepared while the device runs one.

    The host's `threads` spent `preparing_s` together, and the device `busy_s`, on equally many images.
    """
    return min(int(preparing_s / max(busy_s, 1e-9)), threads)


@dataclass(frozen=True, slots=True)
class Runs:
    """What was seen of one batch size."""

    seconds: tuple[float, ...] = ()  # of the last ones
    first_s: float = 0.0  # the first visit of the very last
    compiled: bool = False  # its first run is over
    refused: bool = False  # the engine cannot do it

    @property
    def known(self) -> bool:
        return len(self.seconds) >= RUNS_TO_KNOW and not self.refused


class Batching:
    """See the module. `batch` is the setting, `table` seconds by batch size, `longest_s` what one run may take."""

    def __init__(
        self, batch: Literal["auto"] | int, table: Mapping[int, float] | None = None, longest_s: float = math.inf
    ) -> None:
        self._fixed = None if batch == "auto" else batch
        self._table = dict(table or {})
        self._longest_s = longest_s
        self._learning = threading.Lock()  # for writing the next
        self._runs: Mapping[Size, Mapping[int, Runs]] = {}  # in the order of their last

    def target(self, size: Size | None = None) -> int:
        """How many images of this padded size to gather: the best batch, or a larger one that is worth a try.

        Without a size: the largest target of the sizes met so far.
        """
        if self._fixed is not None:
            return self._fixed
        if size is None:
            return max(map(self._target, self._runs.values()), default=self._best(self._table))
        return self._target(self._runs.get(size, {}))

    def choose(self, size: Size, ready: int) -> int:
        """How many of `ready` images (at least 1) to run now."""
        target = self.target(size)
        if self._fixed is not None or ready >= target:
            return min(ready, target)
        latencies = self._latencies(self._runs.get(size, {}))
        return self._best({n: s for n, s in latencies.items() if n <= ready})

    def first_s(self, size: Size, count: int) -> float:
        """How long the first visit of the last such batch was; 0 if there was none."""
        return self._of(size, count).first_s

    def observe(self, size: Size, count: int, seconds: float, first_s: float = 0.0) -> None:
        """A batch of `count` images took the device so long, and `first_s` of it in the first visit."""
        with self._learning:
            runs = self._of(size, count)
            counted = (*runs.seconds, seconds)[-RUNS_REMEMBERED:] if runs.compiled else ()
            self._learn(size, count, Runs(counted, first_s, compiled=True, refused=runs.refused))

    def refuse(self, size: Size, count: int) -> None:
        """The engine failed on a batch of `count` whose images it can do alone: memory, mostly."""
        with self._learning:
            self._learn(size, count, replace(self._of(size, count), refused=True))

    def seen(self) -> list[tuple[int, int, int, float | None]]:
        """Batch sizes that are remembered: count, height, width, and the median of the last runs in seconds."""
        return [
            (count, *size, statistics.median(runs.seconds) if runs.seconds else None)
            for size, counts in self._runs.items()
            for count, runs in counts.items()
        ]

    def _of(self, size: Size, count: int) -> Runs:
        return self._runs.get(size, {}).get(count, Runs())

    def _learn(self, size: Size, count: int, runs: Runs) -> None:
        others = [other for other in self._runs if other != size][1 - SIZES_REMEMBERED :]
        before = {other: self._runs[other] for other in others}
        self._runs = {**before, size: {**self._runs.get(size, {}), count: runs}}

    def _target(self, runs: Mapping[int, Runs]) -> int:
        return self._next_try(runs) or self._best(self._latencies(runs))

    def _latencies(self, runs: Mapping[int, Runs]) -> dict[int, float]:
        """Seconds by batch size, as far as known: seen, or else the table's in proportion."""
        seen = {count: statistics.median(each.seconds) for count, each in runs.items() if each.known}
        ratios = [seconds / self._table[count] for count, seconds in seen.items() if self._table.get(count)]
        scale = statistics.median(ratios) if ratios else 1.0
        refused = min((count for count, each in runs.items() if each.refused), default=LARGEST * LARGEST)
        expected = {count: seconds * scale for count, seconds in self._table.items() if count < refused}
        return {**expected, **seen}

    def _best(self, latencies: Mapping[int, float]) -> int:
        rates = {n: n / max(s, 1e-9) for n, s in latencies.items() if n == 1 or s <= self._longest_s}
        most = max(rates.values(), default=0.0)
        return min((n for n, rate in rates.items() if rate * WORTH >= most), default=1)

    def _next_try(self, runs: Mapping[int, Runs]) -> int | None:
        latencies = self._latencies(runs)
        best = self._best(latencies)
        if best not in runs or not runs[best].known or best < max(latencies):
            return None
        more = 2 * best
        if more > LARGEST or runs.get(more, Runs()).refused:
            return None
        return more if latencies[best] < LONG_S and 2 * latencies[best] <= self._longest_s else None
