"""The engine timed: for load tests, without a network."""
from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blendmaskd.coco import categories
from blendmaskd.images.decoding import Photograph, Pixels, bgr
from blendmaskd.protocol import IDLE, Options
from blendmaskd.settings import Timed
from blendmaskd_workers import results
from blendmaskd_workers.engines import Times

CHECKED_BYTES = 64 << 10
LARGEST_BATCH = 64  # that the settings allow
BEGINNING = 0.136  # of the first visit: R_50_1x's multiply-adds up to res3


@dataclass(frozen=True, slots=True)
class TimedInput:
    """An image of which only the `checksum` is kept."""

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    checksum: int


class Visits:
    """A device's queue: visits take the time that is said, in the order in which they were asked for, one at a time."""

    def __init__(self) -> None:
        self._free: float | None = None  # when all that was asked for is done

    def visit(self, seconds: float, launch: Callable[[], None]) -> Visit:
        """The device begins with the first operator that `launch` asks for, and does not end before the last."""
        now = time.monotonic()
        before = now if self._free is None else self._free
        begin = max(now, before)
        launch()
        self._free = max(begin + seconds, time.monotonic())
        return Visit(begin - before, self._free - begin - seconds, self._free)


@dataclass(frozen=True, slots=True)
class Visit:
    """A part of a run on the device: seconds of waiting before it and for its launches; its end."""

    idle_s: float
    starved_s: float
    end: float  # time.monotonic

    def wait(self) -> None:
        if (left := self.end - time.monotonic()) > 0:  # sleeping for no time takes 0.08 ms
            time.sleep(left)


class TimedRun:
    """A batch of the timed engine."""

    def __init__(self, engine: TimedEngine, batch: Sequence[Any]) -> None:
        self._engine, self._batch = engine, batch
        self._visits = [engine.visit(0, len(batch))]

    def complete(self) -> None:
        self._visits.append(self._engine.visit(1, len(self._batch)))

    def arrived(self) -> bool:
        return time.monotonic() >= self._visits[1].end

    def choose(self) -> None:
        self._visits[1].wait()
        self._outputs = [self._engine.output(prepared) for prepared in self._batch]
        self._visits.append(self._engine.visit(2, len(self._batch)))

    def collect(self) -> list[Any]:
        self._visits[2].wait()
        return self._outputs

    def times(self) -> Times:
        idle_s = dict(zip(IDLE, (visit.idle_s for visit in self._visits), strict=True))
        idle_s["launches"] += sum(visit.starved_s for visit in self._visits)
        return Times(*self._engine.seconds(len(self._batch)), idle_s)


class TimedEngine:
    """A device that takes the time that the table says, `timed.blend_ms` of it in the second visit."""

    device = exact = None
    overlaps = True

    def __init__(self, timed: Timed) -> None:
        whole = by_batch(timed.latency_ms)
        second = np.minimum(by_batch(timed.blend_ms), whole)
        self._whole: list[float] = whole.tolist()
        beginning = BEGINNING * (whole - second)
        self._parts = [each.tolist() for each in (beginning, whole - beginning - second, second)]
        self._queue = Visits()

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

    def visit(self, which: int, images: int) -> Visit:
        """Ask the device for the beginning (0) or rest (1) of a batch's first visit, or for its second (2)."""
        return self._queue.visit(self._parts[which][images], lambda: self.launch_operators(which))

    def seconds(self, images: int) -> tuple[float, float]:
        """What the device works for a batch of so many images: in the first visit, and in both."""
        return self._whole[images] - self._parts[2][images], self._whole[images]

    def launch_operators(self, which: int) -> None:
        """What launching costs the host in a visit."""

    def output(self, prepared: Any) -> Any:
        """What the device and the host's choice make of an image."""
        return prepared.checksum

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
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
    step = max(image.nbytes // CHECKED_BYTES, 1)
    return zlib.crc32(np.ascontiguousarray(image[::step]).data)


@functools.lru_cache(maxsize=64)
def _whole_image(image_size: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    height, width = image_size
    return results.to_coco(
        np.array([[0, 0, width, height]], np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        results.Pasted(lambda _: (np.ones(image_size, np.bool_), (0, 0)), image_size),
        [categories.Category(1, "image")],
        options,
    )
