"""Preview: now and then the last segmented image with its results, small, for the status page (`show_last_image`).

Drawing takes longer than many a device does for an image, so it is a thread's own work, done after the answer has left,
at most every `EACH_S` and never for more than `SHARE` of the time: a picture that took long to draw keeps the next one
away. Of raw pixels it is a copy, because those of shared memory are their client's again after the answer.
"""
from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from blendmaskd.coco import bitmaps
from blendmaskd.images import overlay
from blendmaskd.images.decoding import Photograph, rgb
from blendmaskd_workers.results import encode_rle

log = logging.getLogger("blendmaskd.worker")

EACH_S = 2.0
SHARE = 0.05
SIDE = 960  # pixels of the longer one
BEST = 30  # instances that are drawn
QUALITY = 80

Size = tuple[int, int]  # width, height


class Previews:
    """`take` decides, from any thread, whether this image is one; `draw` sends its picture, a JPEG, when it is done."""

    def __init__(self, send: Callable[[bytes], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._send = send
        self._clock = clock
        self._lock = threading.Lock()
        self._next = clock()
        self._artist = ThreadPoolExecutor(1, thread_name_prefix="preview")

    def take(self, photograph: Photograph) -> Image.Image | None:
        """The photograph, ours for good, if a picture is due; it is to be drawn when its results are known."""
        with self._lock:
            now = self._clock()
            if now < self._next:
                return None
            self._next = now + EACH_S
        return rgb(photograph)

    def draw(self, image: Image.Image, results: Sequence[Mapping[str, Any]]) -> None:
        self._artist.submit(self._draw, image, results)

    def _draw(self, image: Image.Image, results: Sequence[Mapping[str, Any]]) -> None:
        start = self._clock()
        try:
            self._send(picture(image, results))
        except Exception:
            log.exception("the preview could not be drawn")
        end = self._clock()
        with self._lock:
            self._next = max(self._next, end + (end - start) / SHARE)


def picture(image: Image.Image, results: Sequence[Mapping[str, Any]]) -> bytes:
    """A JPEG of an image with its best COCO results drawn over it: made small first, as masks are drawn whole."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    drawn = overlay.draw(small, [_scaled(result, image.size, small.size) for result in results[:BEST]])
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _scaled(result: Mapping[str, Any], size: Size, small: Size) -> Mapping[str, Any]:
    """A result of an image of `size` (width, height), as one of the same image in another size."""
    scale = np.divide(small, size)
    scaled = {**result, "bbox": (np.reshape(result["bbox"], (2, 2)) * scale).ravel().tolist()}
    match result.get("segmentation"):
        case list(polygons):
            scaled["segmentation"] = [(np.reshape(each, (-1, 2)) * scale).ravel() for each in polygons]
        case dict(rle):
            columns, rows = (((np.arange(count) + 0.5) / by).astype(int) for count, by in zip(small, scale))
            bitmap = bitmaps.decode(rle, size[1], size[0])[np.ix_(rows, columns)]
            scaled["segmentation"] = encode_rle((bitmap, (0, 0)), small[::-1])
    return scaled
