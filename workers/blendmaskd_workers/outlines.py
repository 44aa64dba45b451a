"""From the runs of a mask's columns to its outlines: work and memory grow with the outline, not with the area.

A mask is known by its edges: where its pixels change down each column, a start and an end in turn. An edge is a piece
of outline, one pixel long. Between two columns, the edges of both, sorted by row, are joined two by two: between them
lies an upright piece of outline, or nothing where they are in one row. So each edge has one that follows it, with the
mask on its right, and following them leads around each outline and hole. Pixels that share a corner only are apart.

Numpy, but for two steps in Python for each edge.
"""
from __future__ import annotations

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Points = npt.NDArray[np.float64]  # (n, 2) x, y


def trace(x: Integers, y: Integers) -> list[Points]:
    """The outlines of a mask along pixel edges, corners cut by half a pixel: one for each connected part.

    `x` and `y` are the columns and rows of its edges, ascending in this order. A hole is joined to its outline by a cut
    of no width, because COCO has no other way to write one.
    """
    if len(x) == 0:
        return []
    edges, cut, starts = _in_order(_following(x, y).tolist())
    points, starts = _pieces(x[edges], y[edges], edges % 2 == 0, cut, starts)
    corners = _is_corner(points, starts)
    return np.split(points[corners], np.cumsum(np.add.reduceat(corners, starts))[:-1])


def _following(x: Integers, y: Integers) -> Integers:
    """(n,) which edge follows each: a start is left at its right, an end at its left."""
    count = len(x)
    edges = np.tile(np.arange(count), 2)
    at_right = np.arange(2 * count) >= count
    is_start = edges % 2 == 0
    order = np.lexsort([is_start, np.tile(y, 2), np.concatenate([x, x + 1])])  # an end first: corners do not join
    pairs, left = edges[order].reshape(-1, 2), (at_right == is_start)[order][::2]
    following = np.empty(count, np.int64)
    following[np.where(left, *pairs.T)] = np.where(left, *pairs.T[::-1])
    return following


def _in_order(following: list[int]) -> tuple[Integers, Flags, Integers]:
    """The edges in the order of the outlines, after which of them a cut is passed, and where each outline begins.

    The first edge of an outline is a start; that of a hole is an end, and the edge before it, where the mask starts
    above the hole, is of an outline that was met before. From there the hole is cut in: both edges are passed twice.
    """
    edges = list(range(len(following)))
    seen = bytearray(len(following))
    outlines, cuts = [], []
    for first in edges.copy():
        if seen[first]:
            continue
        last = _around(following, first, seen)[-1]
        if first % 2 == 0:
            outlines.append(first)
            continue
        above, again = first - 1, len(edges)
        edges += [first, above]
        cuts += [above, again]
        following += [again + 1, following[above]]
        following[above], following[last] = first, again
    seen = bytearray(len(edges))
    parts = [_around(following, first, seen) for first in outlines]
    order = [place for part in parts for place in part]
    is_cut = np.zeros(len(edges), bool)
    is_cut[cuts] = True
    return np.array(edges)[order], is_cut[order], np.cumsum([0, *map(len, parts[:-1])])


def _around(following: list[int], first: int, seen: bytearray) -> list[int]:
    """What follows an edge until it comes again."""
    found, at = [], first
    while not seen[at]:
        seen[at] = 1
        found.append(at)
        at = following[at]
    return found


def _pieces(x: Integers, y: Integers, is_start: Flags, cut: Flags, starts: Integers) -> tuple[Points, Integers]:
    """The middles of the pieces of outline, one pixel long, without those inside an upright line."""
    _, after = _neighbours(starts, len(x))
    rise = np.where(cut, 0, y[after] - y)
    half, line = np.sign(rise) / 2, x + is_start
    middles = np.stack([x + 0.5, y, line, y + half, line, y + rise - half], axis=1).reshape(-1, 3, 2)
    there = np.stack([np.ones(len(x), bool), rise != 0, np.abs(rise) > 1], axis=1)
    counts = np.add.reduceat(there.sum(axis=1), starts)
    return middles[there], np.cumsum([0, *counts[:-1]])


def _is_corner(points: Points, starts: Integers) -> Flags:
    """Whether the outline turns there; exact, because coordinates are multiples of a half."""
    before, after = _neighbours(starts, len(points))
    arriving, leaving = points - points[before], points[after] - points
    turning: Flags = arriving[:, 0] * leaving[:, 1] != arriving[:, 1] * leaving[:, 0]
    return turning


def _neighbours(starts: Integers, count: int) -> tuple[Integers, Integers]:
    """(count,) what is before and after each in its outline, which is closed."""
    before, after = np.arange(count) - 1, np.arange(count) + 1
    ends = np.append(starts[1:], count)
    before[starts], after[ends - 1] = ends - 1, starts
    return before, after
