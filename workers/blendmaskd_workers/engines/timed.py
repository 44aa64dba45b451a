"""The engine timed: for load tests, without a network."""
from __future__ import annotations

import functools
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blendmaskd.coco import categories
from blendmaskd.images.decoding import Photograph, Pixels, bgr
from blendmaskd.protocol import Options
from blendmaskd.settings import Timed
from blendmaskd_workers import results
from blendmaskd_workers.engines import Times

CHECKED_BYTES = 16 << 10  # of an image of at least `LARGE_BYTES`
LARGE_BYTES = 128 << 10
LARGEST_BATCH = 64  # that the settings allow
BEGINNING = 0.136  # of the first visit: R_50_1x's multiply-adds up to res3


@dataclass(frozen=True, slots=True)
class TimedInput:
    """An image of which only the `checksum` is kept."""

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    checksum: int


class TimedRun:
    """A batch of the timed engine."""

    def __init__(self, engine: TimedEngine, batch: Sequence[Any]) -> None:
        self._engine, self._batch = engine, batch
        self._idle_s: list[float] = []  # before each part
        self._starved_s = 0.0  # by launches that were slower than the device
        self._end = 0.0  # of what was asked for last
        self._ask(0)

    def complete(self) -> None:
        self._ask(1)

    def arrived(self) -> bool:
        return time.monotonic() >= self._end

    def choose(self) -> None:
        self._wait()
        self._outputs = [self._engine.output(prepared) for prepared in self._batch]
        self._ask(2)

    def collect(self) -> list[Any]:
        self._wait()
        return self._outputs

    def times(self) -> Times:
        before_first, before_rest, before_second = self._idle_s
        idle_s = {"input": before_first, "launches": before_rest + self._starved_s, "selection": before_second}
        return Times(*self._engine.seconds[len(self._batch)], idle_s)

    def _ask(self, part: int) -> None:
        engine, now = self._engine, time.monotonic()
        free = engine.free or now
        done = max(now, free) + engine.parts[part][len(self._batch)]
        engine.launch_operators(part)
        self._end = engine.free = max(done, time.monotonic())
        self._idle_s.append(max(now - free, 0.0))
        self._starved_s += self._end - done

    def _wait(self) -> None:
        if (left := self._end - time.monotonic()) > 0:  # sleeping for no time takes 0.08 ms
            time.sleep(left)


class TimedEngine:
    """A device that takes the time that the table says, `timed.blend_ms` of it in the second visit.

    What it is asked for it does one after the other, never two things at once: it begins when the first operator is
    launched, and does not end before the last.
    """

    device = exact = model = None
    overlaps = True

    def __init__(self, timed: Timed) -> None:
        whole = by_batch(timed.latency_ms)
        second = np.minimum(by_batch(timed.blend_ms), whole)
        beginning = BEGINNING * (whole - second)
        self.parts: list[list[float]] = [each.tolist() for each in (beginning, whole - beginning - second, second)]
        self.seconds = list(zip((whole - second).tolist(), whole.tolist()))  # in the first visit, and in both
        self.free: float | None = None  # when all that was asked for is done

    def load(self) -> None:
        pass

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        pass

    def prepare(self, photograph: Photograph) -> Any:
        pixels = bgr(photograph)
        height, width = pixels.shape[:2]
        return TimedInput((height, width), (height, width), checksum(pixels))

    def launch(self, batch: Sequence[Any]) -> TimedRun:
        return TimedRun(self, batch)

    def launch_operators(self, part: int) -> None:
        """What launching costs the host in this part."""

    def output(self, prepared: Any) -> Any:
        """What the device and the host's choice make of an image."""
        return prepared.checksum

    def finish(self, output: Any, prepared: Any, options: Options, deadline: float = math.inf) -> list[dict[str, Any]]:
        """One detection, the whole image, with the key `checksum` beside the usual ones."""
        return [{**detection, "checksum": output} for detection in _whole_image(prepared.image_size, options)]


def by_batch(milliseconds: Mapping[int, float]) -> Any:
    """Seconds by number of images (LARGEST_BATCH + 1,).

    Sizes between the entries are interpolated; beyond the last, each image takes as long as in the last.
    """
    sizes = sorted(milliseconds)
    counts = np.arange(LARGEST_BATCH + 1)
    found = np.interp(counts, sizes, [milliseconds[size] for size in sizes])
    found[sizes[-1] :] = milliseconds[sizes[-1]] / sizes[-1] * counts[sizes[-1] :]
    return found / 1000


def checksum(image: Pixels) -> int:
    """zlib.crc32 of the BGR pixels, of a large image every n-th row: enough to know it by, and cheap beside serving."""
    step = image.nbytes // CHECKED_BYTES if image.nbytes >= LARGE_BYTES else 1
    return zlib.crc32(np.ascontiguousarray(image[::step]).data)


@functools.lru_cache(maxsize=64)
def _whole_image(image_size: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    height, width = image_size
    box, score, class_ = np.array([[0, 0, width, height]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64)
    mask = results.Pasted(lambda _: (np.ones(image_size, np.bool_), (0, 0)), image_size)
    return results.to_coco(box, score, class_, mask, [categories.Category(1, "image")], options)
