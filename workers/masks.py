"""From mask probabilities to COCO's RLE without a bitmap: only where an edge crosses a column of pixels is computed.

The reference stretches R x R probabilities over a box by bilinear interpolation at pixel centres, zero outside, and
takes the pixels that reach 0.5 (`workers.blendmask.postprocess`, specification section 7). Within one column of pixels
that interpolation is piecewise linear with a node per source row, so between two nodes it crosses 0.5 at most once, and
only if one node reaches 0.5 and the other does not. So the crossings of a column follow from its R + 2 nodes, and they
are the ends of the column's runs: the work does not grow with the height of the box, nor with the image.

Axes: n masks, R side of a mask, C columns of pixels of all masks together, S = R + 2 source nodes, zeros around them.
Numpy only; no loop over masks but for cutting the strings.
"""
from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Window = tuple[npt.NDArray[np.bool_], tuple[int, int]]  # the part that can be true, its top left (y, x)

THRESHOLD = np.float32(0.5)
MOST_GROUPS = 7  # of five bits: counts up to 2^34
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


def window(probability: Floats, box: Floats, image_size: tuple[int, int]) -> Window:
    """One mask (R, R) over one box (4,) as a bitmap of its box, and a pixel more on each side."""
    height, width = image_size
    _, x, y = _edges(probability[None], box[None].astype(np.float64), height, width)
    left, top = (max(int(side) - 1, 0) for side in np.floor(box[:2]))
    right, bottom = (min(int(side) + 1, limit) for side, limit in zip(np.ceil(box[2:]), (width, height)))
    changes = np.zeros((right - left, bottom - top + 1), np.int64)  # a row more: where runs at the foot end
    np.add.at(changes, (x - left, y - top), 1)
    return (np.cumsum(changes, axis=1)[:, :-1] & 1).astype(np.bool_).T, (top, left)


def _edges(
    probabilities: Floats, boxes: npt.NDArray[np.float64], height: int, width: int
) -> tuple[Integers, Integers, Integers]:
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
    values = nodes[first]  # (c, S)
    values += (nodes[first + 1] - values) * share[:, None]
    inside = values >= THRESHOLD
    place = np.flatnonzero(inside[:, 1:] != inside[:, :-1])
    column, node = np.divmod(place, inside.shape[1] - 1)
    above, below = values[column, node], values[column, node + 1]
    return column + offset, node, (THRESHOLD - above) / (below - above)


def _first_row(
    owner: Integers, node: Integers, crossing: Floats, boxes: npt.NDArray[np.float64], scale: Any, height: int
) -> Integers:
    """The first pixel row behind each crossing."""
    place = (node + crossing - 0.5) / scale[owner] + boxes[owner, 1] - 0.5  # in pixel centres
    rows: Integers = np.clip(np.ceil(place), 0, height).astype(np.int64)
    return rows


def _strings(owners: Integers, positions: Integers, masks: int, pixels: int) -> list[str]:
    """COCO's compressed strings from the places where pixels change."""
    owners, positions = _without_empty_runs(owners, positions)
    # A mask's counts are the distances between its edges, from 0 and up to the last pixel.
    edges_of = np.bincount(owners, minlength=masks)
    ends = np.cumsum(edges_of + 1)  # behind each mask's counts
    starts = ends - edges_of - 1
    counts = np.zeros(ends[-1] if masks else 0, np.int64)
    is_last = np.zeros(len(counts), bool)
    is_last[ends - 1] = True
    counts[~is_last] = positions
    counts[is_last] = pixels
    previous = np.concatenate([[0], counts[:-1]])
    previous[starts] = 0
    counts -= previous
    keep = ~(is_last & (counts == 0) & (np.arange(len(counts)) > np.repeat(starts, edges_of + 1)))
    place = np.arange(len(counts)) - np.repeat(starts, edges_of + 1)
    # From the fourth on, counts are written as differences from the one but one before.
    deltas = counts.copy()
    late = np.flatnonzero(place > 2)
    deltas[late] -= counts[late - 2]
    return _base32(deltas[keep], np.add.reduceat(keep, starts) if masks else np.zeros(0, np.int64))


def _without_empty_runs(owners: Integers, positions: Integers) -> tuple[Integers, Integers]:
    """Two changes at one place are none: an edge that leaves again before the next pixel, or at a column's end."""
    key_changes = np.ones(len(positions) + 1, bool)
    key_changes[1:-1] = (positions[1:] != positions[:-1]) | (owners[1:] != owners[:-1])
    starts = np.flatnonzero(key_changes)
    odd = starts[:-1][np.diff(starts) % 2 == 1]
    return owners[odd], positions[odd]


def _base32(numbers: Integers, lengths: Integers) -> list[str]:
    """Each number in groups of five bits, least first, with a flag that more follow; cut into strings of `lengths`."""
    magnitude = numbers ^ (numbers >> 63)
    groups = np.ones(len(numbers), np.int64)
    for more in range(MOST_GROUPS - 1):
        groups += magnitude >= 16 << 5 * more
    ends = np.cumsum(groups)
    text = np.empty(ends[-1] if len(ends) else 0, np.uint8)
    for group in range(int(groups.max(initial=0))):
        having = np.flatnonzero(groups > group)
        follow = (groups[having] > group + 1) << 5
        text[ends[having] - groups[having] + group] = (numbers[having] >> 5 * group & 31) + follow + 48
    whole = text.tobytes().decode("ascii")
    cuts = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(lengths)])].tolist()
    return [whole[start:end] for start, end in pairwise(cuts)]
