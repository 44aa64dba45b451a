"""From mask probabilities to COCO's RLE without a bitmap: only where an edge crosses a column of pixels is computed.

The reference stretches R x R probabilities over a box by bilinear interpolation at pixel centres, zero outside, and
takes the pixels that reach 0.5 (`blendmaskd_workers.blendmask.postprocess`, specification section 7). Within one
column of pixels that interpolation is piecewise linear with a node per source row, so between two nodes it crosses
0.5 at most once, and only if one node reaches 0.5 and the other does not. So the crossings of a column follow from
its R + 2 nodes, and they are the ends of the column's runs: the work does not grow with the height of the box, nor
with the image.

Axes: n masks, R side of a mask, C columns of pixels of all masks together, S = R + 2 source nodes, zeros around them.
Numpy only; no loop over masks but for cutting the strings.
"""
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

THRESHOLD = np.float32(0.5)
COLUMNS_AT_ONCE = 2048  # their nodes stay in the processor's cache


def encode(probabilities: Floats, boxes: Floats, image_size: tuple[int, int]) -> list[dict[str, Any]]:
    """The masks' RLEs, as pycocotools writes and reads them.

    `probabilities` (n, R, R) in 0..1, `boxes` (n, 4) x1, y1, x2, y2, clipped to the image and not empty, `image_size`
    (height, width). Pixels whose value is 0.5 but for rounding may differ from what the reference's own rounding gives.
    """
    height, width = image_size
    if len(boxes) == 0:
        return []
    owners, x, y = _edges(probabilities, boxes.astype(np.float64), height, width)
    strings = _strings(owners, x * height + y, len(boxes), height * width)
    return [{"size": [height, width], "counts": counts} for counts in strings]


def edges(probability: Floats, box: Floats, image_size: tuple[int, int]) -> tuple[Integers, Integers]:
    """Where one mask (R, R) over one box (4,) changes down a column: columns x, rows y, ascending in this order."""
    height, width = image_size
    _, x, y = _edges(probability[None], box[None].astype(np.float64), height, width)
    places = _without_empty_runs(x * (height + 1) + y)  # one row more: a column's foot is not the next one's head
    return places // (height + 1), places % (height + 1)


def _edges(probabilities: Floats, boxes: Doubles, height: int, width: int) -> tuple[Integers, Integers, Integers]:
    """Where a mask changes down a column: masks, columns x, rows y (up to `height`), ascending in this order."""
    side = probabilities.shape[1]
    nodes = np.pad(probabilities, ((0, 0), (1, 1), (1, 1))).transpose(0, 2, 1)  # (n, S, S): mask, x, y
    nodes = np.ascontiguousarray(nodes).reshape(-1, side + 2)  # (n * S, S)
    lefts = np.maximum(np.floor(boxes[:, 0]).astype(np.int64) - 1, 0)
    rights = np.minimum(np.ceil(boxes[:, 2]).astype(np.int64) + 1, width)
    owner = np.repeat(np.arange(len(boxes)), rights - lefts)  # (C,)
    x = np.arange(len(owner)) - np.repeat(np.cumsum(rights - lefts) - rights, rights - lefts)  # (C,) image columns
    scale = side / (boxes[:, 2:] - boxes[:, :2])  # (n, 2) source nodes per pixel
    at = np.clip((x + 0.5 - boxes[owner, 0]) * scale[owner, 0] + 0.5, 0, side + 1 - 1e-9)  # (C,) in nodes, zeros from 0
    before = at.astype(np.int64)
    share = (at - before).astype(np.float32)
    found = []
    for start in range(0, len(owner), COLUMNS_AT_ONCE):
        part = slice(start, start + COLUMNS_AT_ONCE)
        first = owner[part] * (side + 2) + before[part]
        found.append(_crossings(nodes, first, share[part], start))
    column, node, crossing = (np.concatenate(each) for each in zip(*found))
    y = _first_row(owner[column], node, crossing, boxes, scale[:, 1], height)
    return owner[column], x[column], y


def _crossings(nodes: Floats, first: Integers, share: Floats, offset: int) -> tuple[Integers, Integers, Floats]:
    """Column, node before and distance from it (0 to 1) of each crossing of 0.5, column by column, downwards."""
    values = nodes.take(first, axis=0)  # (c, S)
    steps = nodes.take(first + 1, axis=0)
    steps -= values
    steps *= share[:, None]
    values += steps
    line = values.ravel()  # all columns one behind the other: each begins and ends with a zero
    inside = line >= THRESHOLD
    place = np.flatnonzero(inside[1:] != inside[:-1]).astype(np.int32)
    column = place // np.int32(values.shape[1])
    above, below = line.take(place), line.take(place + 1)
    return column + offset, place - column * values.shape[1], (THRESHOLD - above) / (below - above)


def _first_row(owner: Integers, node: Integers, crossing: Floats, boxes: Doubles, scale: Any, height: int) -> Integers:
    """The first pixel row behind each crossing."""
    place = (node + crossing - 0.5) / scale[owner] + boxes[owner, 1] - 0.5  # in pixel centres
    rows: Integers = np.clip(np.ceil(place), 0, height).astype(np.int64)
    return rows


def _strings(owners: Integers, positions: Integers, masks: int, pixels: int) -> list[str]:
    """COCO's compressed strings from the places where pixels change."""
    stride = pixels + 1  # a change may be behind a mask's last pixel, which is not the next mask's first
    places = _without_empty_runs(owners * stride + positions)
    borders = np.arange(masks) * stride + pixels
    edges_before = np.searchsorted(places, borders, side="right")
    counts = np.diff(np.insert(places, edges_before, borders), prepend=-1)
    if pixels < 2**31:
        counts = counts.astype(np.int32)  # half the work of the rest
    last = edges_before + np.arange(masks)
    first = np.concatenate([[0], last[:-1] + 1])
    counts[first] -= 1
    # From the fourth on, counts are written as differences from the one but one before.
    numbers = counts.copy()
    numbers[2:] -= counts[:-2]
    for place in range(3):
        early = (first + place)[first + place <= last]
        numbers[early] = counts[early]
    # An edge behind the last pixel leaves a run of no length, which is not written.
    superfluous = (counts[last] == 0) & (last > first)
    return _base32(np.delete(numbers, last[superfluous]), last - first + 1 - superfluous)


def _without_empty_runs(places: Integers) -> Integers:
    """Two changes at one place are none: an edge that leaves again before the next pixel, or at a column's end."""
    is_first = np.ones(len(places) + 1, bool)
    np.not_equal(places[1:], places[:-1], out=is_first[1:-1])
    starts = np.flatnonzero(is_first)
    odd = np.flatnonzero(np.diff(starts) & 1)
    return places.take(starts.take(odd))


def _base32(numbers: Integers, lengths: Integers) -> list[str]:
    """Each number in groups of five bits, least first, with a flag that more follow; cut into strings of `lengths`."""
    magnitude = np.maximum(numbers, ~numbers)
    groups = np.ones(len(numbers), np.int8)
    bound = 16
    while (longer := magnitude >= bound).any():
        groups += longer
        bound <<= 5
    ends = np.cumsum(groups, dtype=np.int64)
    text = np.empty(ends[-1] if len(ends) else 0, np.uint8)
    where = ends - groups
    while len(where):
        more = groups > 1
        digits = (numbers & 31).astype(np.uint8)
        digits += 48
        digits += more.view(np.uint8) << 5
        text[where] = digits
        left = np.flatnonzero(more)
        where, numbers, groups = where.take(left) + 1, numbers.take(left) >> 5, groups.take(left) - 1
    whole = text.tobytes().decode("ascii")
    cuts = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(lengths)])].tolist()
    return [whole[start:end] for start, end in pairwise(cuts)]
