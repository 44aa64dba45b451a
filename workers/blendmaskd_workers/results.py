"""Results: a network's detections in the form of COCO's results, plain values that JSON and msgpack can write.

A result is ``bbox`` [x, y, width, height] in pixels of the original image, ``score`` (0 to 1), ``class_index``
(0-based, without gaps), ``category_id`` (the dataset's own), ``category_name`` and ``segmentation``: an RLE as
`pycocotools.mask.decode` reads it, or a list of polygons [x, y, x, y, …].

Rules: a mask is computed only for a detection that is kept, one at a time, and only inside its window: a hundred masks
of a large photograph would not fit in memory. Nothing is rounded. Must never import torch: what comes in is numpy.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from blendmaskd.coco.categories import Category
from blendmaskd.images.decoding import ImageError
from blendmaskd.protocol import Code, Options
from blendmaskd_workers import masks, outlines
from blendmaskd_workers.masks import Floats, Integers

MOST_EDGES = 2_000_000  # see `outlines`, of all masks of an image: 1.5 s, and at most twice as many points

Window = tuple[npt.NDArray[np.bool_], tuple[int, int]]  # the part that can be true, its top left (y, x)


class LateError(RuntimeError):
    """The deadline passed before all masks were done."""


class Masks(Protocol):
    """An image's masks, by the index of their detection; none is computed before it is asked for."""

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """COCO's RLEs, ``{"size": [height, width], "counts": str}``."""

    def edges(self, index: int) -> tuple[Integers, Integers]:
        """Where one mask changes down a column: columns x, rows y, ascending in this order."""


@dataclass(frozen=True, slots=True)
class Stretched:
    """Masks that are probabilities (n, R, R) stretched over boxes (n, 4), in an image of (height, width)."""

    probabilities: Floats
    boxes: Floats
    image_size: tuple[int, int]

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return masks.encode(self.probabilities[indices], self.boxes[indices], self.image_size)

    def edges(self, index: int) -> tuple[Integers, Integers]:
        return masks.edges(self.probabilities[index], self.boxes[index], self.image_size)


@dataclass(frozen=True, slots=True)
class Pasted:
    """Masks that `paste` gives as bitmaps, in an image of (height, width).

    A bitmap takes as long as its area is large, so none is begun after `deadline` (time.monotonic): raises `LateError`.
    """

    paste: Callable[[int], Window]
    image_size: tuple[int, int]
    deadline: float = math.inf

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [encode_rle(self._window(index), self.image_size) for index in indices]

    def edges(self, index: int) -> tuple[Integers, Integers]:
        return edges(self._window(index))

    def _window(self, index: int) -> Window:
        if time.monotonic() >= self.deadline:
            raise LateError
        return self.paste(index)


def to_coco(
    boxes: Floats,
    scores: Floats,
    classes: Integers,
    found_masks: Masks,
    categories: Sequence[Category],
    options: Options,
) -> list[dict[str, Any]]:
    """The results that `options` ask for, in descending score (equal scores keep their order).

    `boxes` (n, 4) x1, y1, x2, y2 in pixels, `scores` (n,), `classes` (n,) indices into `categories`. Masks are asked
    for those detections only that are kept, and not at all when the mask format is ``none``. Raises `ImageError` when
    polygons would take more than `MOST_EDGES`.
    """
    results = []
    kept = keep(scores, options)
    segmentations = _segmentations(found_masks, kept, options)
    rows = zip(boxes[kept].tolist(), scores[kept].tolist(), classes[kept].tolist())
    for place, ((x1, y1, x2, y2), score, class_index) in enumerate(rows):
        result = {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "class_index": class_index,
            "category_id": categories[class_index].id,
            "category_name": categories[class_index].name,
        }
        if segmentations:
            result["segmentation"] = segmentations[place]
        results.append(result)
    return results


def _segmentations(found_masks: Masks, kept: Sequence[int], options: Options) -> Sequence[Any]:
    match options.mask_format:
        case "rle":
            return found_masks.rles(kept)
        case "polygon":
            return _polygons(found_masks, kept)
    return ()


def _polygons(found_masks: Masks, kept: Sequence[int]) -> list[list[list[float]]]:
    polygons, left = [], MOST_EDGES
    for index in kept:
        x, y = found_masks.edges(index)
        left -= len(x)
        if left < 0:
            reason = f"its outlines cross columns over {MOST_EDGES} times: ask for mask_format rle, or a smaller image"
            raise ImageError(Code.TOO_LARGE, reason)
        polygons.append([part.ravel().tolist() for part in outlines.trace(x, y)])
    return polygons


def keep(scores: Floats, options: Options) -> list[int]:
    """Indices of the detections that reach the score threshold, at most `max_detections`, in descending score."""
    order = np.argsort(-scores, kind="stable")
    passing = order[scores[order] >= options.score_threshold]
    kept: list[int] = passing[: options.max_detections].tolist()
    return kept


def encode_rle(window: Window, image_size: tuple[int, int]) -> dict[str, Any]:
    """The window's mask as an RLE of the whole image (height, width): `pycocotools.mask.encode`'s, byte for byte.

    Only the window is looked at, so the cost does not grow with the image.
    """
    height, width = image_size
    counts = _run_lengths(window, height, width)
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}


def edges(window: Window) -> tuple[Integers, Integers]:
    """Where a bitmap changes down a column: columns x, rows y of the image, ascending in this order."""
    mask, (top, left) = window
    columns = np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8)
    x, y = np.nonzero(np.diff(columns, axis=1))
    return left + x, top + y


def _run_lengths(window: Window, height: int, width: int) -> list[int]:
    """COCO's uncompressed counts: lengths of alternating runs, false first, down the columns of the whole image."""
    x, y = edges(window)  # where runs start and end, alternating
    turns = x * height + y
    if len(turns):
        # A run that reaches the foot of a column goes on at the head of the next.
        apart = turns[1:-1:2] != turns[2::2]
        turns = turns[np.concatenate([[True], np.repeat(apart, 2), [True]])]
    counts: list[int] = np.diff(turns, prepend=0, append=height * width).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]
