"""COCO's segmentations as bitmaps, in numpy: what pycocotools decodes, where it is not installed.

A segmentation is an RLE, ``{"size": [height, width], "counts": text}``, whose runs go down the columns, or a list of
polygons [x, y, x, y, …], in pixels of the image: pixel i covers i to i + 1. A pixel is in a polygon if its centre is.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from blendmaskd.coco.values import rle

Bitmap = npt.NDArray[np.bool_]


def decode(segmentation: Any, height: int, width: int) -> Bitmap:
    """The mask (height, width). Raises ValueError for one of another size, and for text that is no RLE."""
    if isinstance(segmentation, list):
        inside = [_polygon(np.asarray(polygon, float).reshape(-1, 2), height, width) for polygon in segmentation]
        return np.logical_or.reduce(inside, initial=False) if inside else np.zeros((height, width), bool)
    runs = rle(segmentation, width, height).counts
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _polygon(points: npt.NDArray[np.float64], height: int, width: int) -> Bitmap:
    """By the even-odd rule: a hole that a cut joins to its outline is a hole. Edges are looked at from left to right,
    so that the two ways along a cut cancel out to the last bit."""
    ends = np.stack([points, np.roll(points, -1, axis=0)])  # (2, edges, 2)
    backwards = ends[0, :, 0] > ends[1, :, 0]
    ends[:, backwards] = ends[::-1, backwards]
    (x, y), (to_x, to_y) = ends[0].T, ends[1].T
    first, last = (np.clip(np.ceil(side - 0.5), 0, width).astype(int) for side in (x, to_x))
    edge = np.repeat(np.arange(len(points)), last - first)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - last, last - first)
    slope = (to_y - y)[edge] / (to_x - x)[edge]
    row = np.clip(np.ceil(y[edge] + (column + 0.5 - x[edge]) * slope - 0.5), 0, height).astype(int)
    crossed = np.zeros((width, height + 1), bool)  # whether inside and outside change just above a row
    np.logical_xor.at(crossed, (column, row), True)
    inside: Bitmap = np.logical_xor.accumulate(crossed, axis=1)[:, :-1].T
    return inside
