"""Results: a network's detections in the form of COCO's results, plain values that JSON and msgpack can write.

A result is ``bbox`` [x, y, width, height] in pixels of the original image, ``score`` (0 to 1), ``class_index``
(0-based, without gaps), ``category_id`` (the dataset's own), ``category_name`` and ``segmentation``: an RLE as
`pycocotools.mask.decode` reads it, or a list of polygons [x, y, x, y, …].

Rules: a mask is computed only for a detection that is kept, one at a time, and only inside its window: a hundred masks
of a large photograph would not fit in memory. Nothing is rounded. Must never import torch: what comes in is numpy.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from contourpy import FillType, contour_generator
from pycocotools import mask as coco_mask

from blendmaskd.coco.categories import Category
from blendmaskd.protocol import Options
from blendmaskd_workers import masks
from blendmaskd_workers.masks import Floats, Integers, Window


class Masks(Protocol):
    """An image's masks, by the index of their detection; none is computed before it is asked for."""

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """COCO's RLEs, ``{"size": [height, width], "counts": str}``."""

    def window(self, index: int) -> Window:
        """One mask as a bitmap of its window."""


@dataclass(frozen=True, slots=True)
class Stretched:
    """Masks that are probabilities (n, R, R) stretched over boxes (n, 4), in an image of (height, width)."""

    probabilities: Floats
    boxes: Floats
    image_size: tuple[int, int]

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return masks.encode(self.probabilities[indices], self.boxes[indices], self.image_size)

    def window(self, index: int) -> Window:
        return masks.window(self.probabilities[index], self.boxes[index], self.image_size)


@dataclass(frozen=True, slots=True)
class Pasted:
    """Masks that `paste` gives as bitmaps, in an image of (height, width)."""

    paste: Callable[[int], Window]
    image_size: tuple[int, int]

    def rles(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [encode_rle(self.paste(index), self.image_size) for index in indices]

    def window(self, index: int) -> Window:
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
    for those detections only that are kept, and not at all when the mask format is ``none``.
    """
    results = []
    kept = keep(scores, options)
    rles = found_masks.rles(kept) if options.mask_format == "rle" else []
    rows = zip(kept, boxes[kept].tolist(), scores[kept].tolist(), classes[kept].tolist())
    for place, (index, (x1, y1, x2, y2), score, class_index) in enumerate(rows):
        result = {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
            "class_index": class_index,
            "category_id": categories[class_index].id,
            "category_name": categories[class_index].name,
        }
        if options.mask_format == "rle":
            result["segmentation"] = rles[place]
        elif options.mask_format == "polygon":
            result["segmentation"] = trace_polygons(found_masks.window(index))
        results.append(result)
    return results


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


def trace_polygons(window: Window) -> list[list[float]]:
    """The mask's outlines along pixel edges, one polygon per connected part, in pixels of the image.

    A hole is joined to its outline by a cut of no width, because COCO has no other way to write one. A mask without a
    true pixel gives no polygon.
    """
    mask, (top, left) = window
    around = np.pad(mask, 1).astype(np.float32)  # so that outlines close at the window's border
    generator = contour_generator(z=around, fill_type=FillType.OuterOffset)
    polygons = []
    for points, offsets in zip(*generator.filled(0.5, 1.5)):
        rings = [_without_collinear(points[start : end - 1]) for start, end in pairwise(offsets)]
        # Pixel i covers i to i + 1: its centre is i + 0.5, and the padding moved it by one.
        polygons.append((_joined(rings) + np.array([left - 0.5, top - 0.5])).ravel().tolist())
    return polygons


def _run_lengths(window: Window, height: int, width: int) -> list[int]:
    """COCO's uncompressed counts: lengths of alternating runs, false first, down the columns of the whole image."""
    mask, (top, left) = window
    columns = np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8)
    column, row = np.nonzero(np.diff(columns, axis=1))  # where runs start and end, alternating
    turns = (left + column) * height + top + row
    if len(turns):
        # A run that reaches the foot of a column goes on at the head of the next.
        apart = turns[1:-1:2] != turns[2::2]
        turns = turns[np.concatenate([[True], np.repeat(apart, 2), [True]])]
    counts: list[int] = np.diff(turns, prepend=0, append=height * width).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]


def _without_collinear(ring: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The corners of a closed ring (n, 2); exact, because its coordinates are multiples of a half."""
    arriving = ring - np.roll(ring, 1, axis=0)
    leaving = np.roll(arriving, -1, axis=0)
    turning = arriving[:, 0] * leaving[:, 1] != arriving[:, 1] * leaving[:, 0]
    corners: npt.NDArray[np.float64] = ring[turning]
    return corners


def _joined(rings: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    """One ring out of an outline and its holes: from the nearest corner to the hole, around it, and back."""
    joined = rings[0]
    for hole in rings[1:]:
        nearest = int(np.argmin(np.square(joined - hole[0]).sum(axis=1)))
        joined = np.concatenate([joined[: nearest + 1], hole, hole[:1], joined[nearest:]])
    return joined
