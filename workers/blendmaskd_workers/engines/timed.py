"""The engine timed: for load tests, without a network."""
from __future__ import annotations

import functools
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blendmaskd.coco import categories
from blendmaskd.protocol import Options
from blendmaskd_workers import results
from blendmaskd_workers.engines import Pixels

CHECKED_BYTES = 64 << 10
LARGEST_BATCH = 64  # that the settings allow


@dataclass(frozen=True, slots=True)
class TimedInput:
    """An image of which only the `checksum` is kept."""

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    checksum: int


class TimedEngine:
    """Takes the time that the table says, in full from the moment it gets a batch.

    Sizes between entries are interpolated; beyond the last, each image takes as long as in the last.
    """

    device = exact = model = None

    def __init__(self, latency_ms: dict[int, float]) -> None:
        sizes = sorted(latency_ms)
        counts = np.arange(LARGEST_BATCH + 1)
        milliseconds = np.interp(counts, sizes, [latency_ms[size] for size in sizes])
        milliseconds[sizes[-1] :] = latency_ms[sizes[-1]] / sizes[-1] * counts[sizes[-1] :]
        self._seconds: list[float] = (milliseconds / 1000).tolist()

    def load(self) -> None:
        pass

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        pass

    def prepare(self, image: Pixels) -> TimedInput:
        height, width = image.shape[:2]
        return TimedInput((height, width), (height, width), checksum(image))

    def segment(self, batch: Sequence[TimedInput]) -> list[int]:
        self.sleep(len(batch))
        return [item.checksum for item in batch]

    def sleep(self, images: int) -> None:
        """What the device does for a batch of so many images."""
        if self._seconds[images]:  # sleeping for no time takes 0.08 ms
            time.sleep(self._seconds[images])

    def finish(self, output: int, prepared: TimedInput, options: Options) -> list[dict[str, Any]]:
        """One detection, the whole image, with the key `checksum` beside the usual ones."""
        return [{**detection, "checksum": output} for detection in _whole_image(prepared.image_size, options)]


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
