"""The values of COCO's annotations, each as it may be written and what it means: numbers, boxes, polygons, runs.

Rules: a value that has one meaning is understood, anything else raises `Fault`. What passes can be given to
pycocotools, which draws polygons in as many steps as they are long, believes an RLE's text, and takes a polygon of two
points for a box. Nothing is drawn here. Must never import torch.
"""
from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LONGEST_SIDE = 65535  # pixels of an image, the daemon's own bound
REACH = 10  # how far outside its image an annotation may lie, in longer sides of the image
LONGEST_OUTLINE = 2_000_000  # pixels around a polygon: drawing takes 80 bytes for each
LONGEST_NUMBER = 7  # characters in an RLE's text, as many as any count of pixels needs

Id = int | str
Box = tuple[float, float, float, float]  # x, y, width, height, pixels of the image
Polygon = npt.NDArray[np.float64]  # (2 * points,) x, y, x, y, … pixels of the image
Counts = npt.NDArray[np.int64]


class Fault(ValueError):
    """What is wrong with a value."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as COCO's runs, down the columns: of background and object in turn, together the whole image."""

    height: int  # pixels
    width: int
    counts: Counts  # (runs,) pixels; only the first may be 0

    def uncompressed(self) -> dict[str, Any]:
        """As pycocotools' frPyObjects takes it."""
        return {"size": [self.height, self.width], "counts": self.counts.tolist()}


def show(value: Any) -> str:
    """A value in a message: short, in one line, of characters that can be printed."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 3


# -- numbers ----------------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """JSON's, not true and false, which Python takes for 1 and 0."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(value: Any) -> int | None:
    """A whole number, also as other tools write it, 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def identity(value: Any) -> Id | None:
    """A whole number or a text; None for anything else."""
    return value if isinstance(value, str) else whole(value)


def side(value: Any) -> int | None:
    """Height or width of an image; None for anything else."""
    pixels = whole(value)
    return pixels if pixels is not None and 1 <= pixels <= LONGEST_SIDE else None


def crowd(value: Any) -> bool:
    """`iscrowd`; without one it is none."""
    if value is None:
        return False
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise Fault(f"iscrowd {show(value)}: expected 0 or 1")


def area(value: Any) -> float | None:
    """Square pixels; None where nothing is written."""
    if value is None:
        return None
    number = _finite(value)
    if number is None or number < 0:
        raise Fault(f"area {show(value)}: expected a number of at least 0, or none")
    return number


def _finite(value: Any) -> float | None:
    try:
        number = float(value) if is_number(value) else math.nan
    except OverflowError:  # a whole number beyond all floats
        return None
    return number if math.isfinite(number) else None


# -- boxes and polygons -----------------------------------------------------------------------------------------------


def box(value: Any, width: int, height: int) -> Box:
    """`bbox` in an image of that size; it may lie a little outside, and have no width or height."""
    numbers = [_finite(part) for part in value] if isinstance(value, list) and len(value) == 4 else []
    match numbers:
        case [float() as x, float() as y, float() as across, float() as down] if across >= 0 and down >= 0:
            _check_reach("bbox", (x, x + across), (y, y + down), width, height)
            return x, y, across, down
    raise Fault(f"bbox {show(value)}: expected [x, y, width, height] in pixels")


def is_outside(box: Box, width: int, height: int) -> bool:
    """Whether it has no part of an image of that size."""
    x, y, across, down = box
    return x > width or y > height or x + across < 0 or y + down < 0


def polygon(value: Any, name: str, width: int, height: int) -> Polygon | str:
    """A polygon in an image of that size, or why nothing can be drawn of it."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        raise Fault(f"{name} {show(value)}: expected a list of numbers, x and y of each point")
    try:
        points = np.array(value, np.float64)
        finite = math.isfinite(math.fsum(value))  # NaN and infinity stay what they are in a sum
    except (OverflowError, ValueError):  # a whole number beyond all floats; infinity less infinity
        finite = False
    if not finite:
        raise Fault(f"{name}: has a number that is not finite")
    if len(value) % 2 or len(value) < 6:
        return f"{name}: has {len(value)} numbers: expected x and y of at least three points"
    shorter = min(width, height)
    if min(value) >= 0 and max(value) <= shorter and len(value) * shorter < LONGEST_OUTLINE:  # as nearly all are
        return points
    x, y = points[::2], points[1::2]
    _check_reach(name, (float(x.min()), float(x.max())), (float(y.min()), float(y.max())), width, height)
    if (length := outline(points)) > LONGEST_OUTLINE:
        raise Fault(f"{name}: is {length:.0f} pixels around, more than {LONGEST_OUTLINE}: its points are out of order")
    return points


def outline(polygon: Polygon) -> float:
    """How far it is around, in pixels, as COCO's drawing counts: the longer of the two directions of each edge."""
    points = polygon.reshape(-1, 2)
    return float(np.abs(points - np.roll(points, -1, axis=0)).max(axis=1).sum())


def is_flat(polygon: Polygon) -> bool:
    """Whether all points lie on one line, so that nothing is enclosed."""
    points = polygon.reshape(-1, 2) - polygon[:2]
    farthest = points[np.abs(points).max(axis=1).argmax()]
    return bool(np.abs(points[:, 0] * farthest[1] - points[:, 1] * farthest[0]).max() <= 1e-9 * (farthest**2).sum())


def _check_reach(what: str, x: tuple[float, float], y: tuple[float, float], width: int, height: int) -> None:
    """A little outside is usual. Far outside are points of another image or unit, and drawing them takes all memory."""
    reach = REACH * max(width, height)
    if min(x[0], y[0]) < -reach or x[1] > width + reach or y[1] > height + reach:
        raise Fault(f"{what}: reaches from ({x[0]:g}, {y[0]:g}) to ({x[1]:g}, {y[1]:g}), more than {reach} pixels "
                    f"outside the image of {width} x {height} (width x height)")  # fmt: skip


# -- runs -------------------------------------------------------------------------------------------------------------


def rle(value: dict[str, Any], width: int, height: int) -> Rle:
    """The mask of an image of that size, from an RLE as COCO writes it, compressed or not."""
    size = value.get("size")
    if not isinstance(size, list) or [whole(each) for each in size] != [height, width]:
        raise Fault(f"segmentation: its RLE has size {show(size)}, the image [{height}, {width}] (height, width)")
    match value.get("counts"):
        case str() as text:
            counts = _decompressed(text)
        case list() as runs:
            counts = _listed(runs)
        case other:
            raise Fault(f"segmentation: counts {show(other)} of its RLE: expected a string or a list")
    if counts is None or (counts < 0).any():
        raise Fault(f"segmentation: counts {show(value['counts'])} of its RLE are damaged")
    if (pixels := int(counts.sum())) != height * width:
        raise Fault(f"segmentation: the counts of its RLE do not add up to {height} x {width} pixels but to {pixels}")
    return Rle(height, width, _without_empty(counts, pixels))


def _listed(runs: list[Any]) -> Counts | None:
    numbers = [whole(run) for run in runs]
    if not all(number is not None and 0 <= number <= LONGEST_SIDE**2 for number in numbers):
        return None
    return np.array(numbers, np.int64)


def _decompressed(text: str) -> Counts | None:
    """The counts in COCO's text form, None where it is none.

    Each character has five bits of a number, from the lowest on; bit 32 says that more follow, and bit 16 of the last
    one is the sign. From the fourth on a number is the difference to the one before the last (pycocotools'
    rleFrString).
    """
    codes = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not len(codes):
        return codes
    ends = np.flatnonzero(codes & 32 == 0)
    if codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > LONGEST_NUMBER:
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((codes & 31) << shifts, starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def _without_empty(counts: Counts, pixels: int) -> Counts:
    """The same mask without runs of no pixels, at which pycocotools' overlap may end early."""
    if counts[1:].all():
        return counts
    places, times = np.unique(np.cumsum(counts)[:-1], return_counts=True)
    turns = places[(times % 2 == 1) & (places < pixels)]
    left: Counts = np.diff(turns, prepend=0, append=pixels)
    return left
