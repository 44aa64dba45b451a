"""What a training wants the network to say: FCOS's assignment of locations to instances, and masks within boxes.

Axes: G instances (of an image, or of a batch where said), S locations, R side of a mask, H x W an image. Boxes are
xyxy in network pixels, those of the resized image. Locations of a batch are flattened in one order everywhere: level
slowest, then image, then row-major cell. Numbers and rounding are AdelaiDet's (FCOS, arXiv:1904.01355, section 3.1,
with centre sampling). Inference never imports this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from blendmaskd_workers.blendmask.selection import Booleans, Floats

Doubles = npt.NDArray[np.float64]

SMALLEST_SIDE = 0.1  # pixels: narrower boxes are treated as this wide when polygons are scaled to them
FARTHEST = 1e8  # pixels: upper bound of the coarsest level
ROUNDING = 1e-9  # of sums that are exactly one half on paper


@dataclass(frozen=True)
class GroundTruth:
    """The instances of one image."""

    boxes: Tensor  # (G, 4) float32, xyxy, network pixels, inside the image
    classes: Tensor  # (G,) int64, 0 up to the number of classes
    masks: Tensor  # (G, R, R) float32, 0 or 1: each instance's mask within its box
    semantic: Tensor | None  # (h, w) integers: class + 1 of the pixel's instance, 0 where there is none

    def to(self, device: torch.device | str) -> "GroundTruth":
        semantic = None if self.semantic is None else self.semantic.to(device)
        return GroundTruth(self.boxes.to(device), self.classes.to(device), self.masks.to(device), semantic)


@dataclass(frozen=True)
class Targets:
    """The assignment of all S locations of a batch, and what the P positive ones should predict."""

    labels: Tensor  # (S,) int64 class, or the number of classes for background
    positives: Tensor  # (P,) int64, ascending positions among the S locations
    instances: Tensor  # (P,) int64, the instance of each, counted through the batch
    distances: Tensor  # (P, 4) float32 to the left, top, right, bottom side of its box, in strides
    centreness: Tensor  # (P,) float32, 0..1


def assign(ground_truths: Sequence[GroundTruth], level_sizes: Sequence[tuple[int, int]], strides: Sequence[int],
           bounds: Sequence[float], radius: float, num_classes: int) -> Targets:
    """Assign every location of a batch to an instance or to the background.

    `level_sizes` are the levels' heights and widths in cells; `bounds` the largest distances that the levels but the
    last are for, in pixels, ascending; `radius` that of centre sampling, in strides.
    """
    device = ground_truths[0].boxes.device
    counts = [height * width for height, width in level_sizes]
    places = torch.cat([locations(size, stride, device) for size, stride in zip(level_sizes, strides)])  # (S/N, 2)
    stride_of, low, high = (
        torch.cat([torch.full((count,), float(value), device=device) for count, value in zip(counts, values)])
        for values in (strides, (-1.0, *bounds), (*bounds, FARTHEST)))
    matches, offset = [], 0
    for truth in ground_truths:
        match = match_locations(places, truth.boxes, stride_of * radius, low, high)
        matches.append(torch.where(match >= 0, match + offset, -1))
        offset += len(truth.boxes)
    match = _level_slowest(torch.stack(matches), counts)  # (S,)
    positives = (match >= 0).nonzero().squeeze(1)
    instances = match[positives]
    labels = torch.full_like(match, num_classes)
    labels[positives] = torch.cat([truth.classes for truth in ground_truths])[instances]
    batch = len(ground_truths)
    boxes = torch.cat([truth.boxes for truth in ground_truths])[instances]
    place = _level_slowest(places.expand(batch, -1, -1), counts)[positives]
    stride = _level_slowest(stride_of.expand(batch, -1), counts)[positives]
    distances = _distances(place, boxes) / stride[:, None]  # (P, 4)
    return Targets(labels, positives, instances, distances, centreness(distances))


def locations(size: tuple[int, int], stride: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the place (x, y) of each cell of a level, row-major, (H_l * W_l, 2) float32, network pixels."""
    y, x = (torch.arange(count, device=device) * stride + stride // 2 for count in size)
    return torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=1).float()


def match_locations(places: Tensor, boxes: Tensor, reach: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return for each place (S, 2) of an image the index of its box (G, 4), or -1, (S,) int64.

    A place belongs to the smallest of the boxes (the first, of equal ones) to which all of this applies: it lies
    inside; it lies nearer to the centre than `reach` (S,), horizontally and vertically; its largest distance to a
    side is between `low` and `high` (S,), inclusive. Like the reference, it gives up on the whole image when the
    first box is centred on x = 0.
    """
    if len(boxes) == 0:
        return torch.full((len(places),), -1, dtype=torch.int64, device=places.device)
    centres = (boxes[:, :2] + boxes[:, 2:]) * 0.5  # (G, 2)
    from_low = torch.maximum(centres - reach[:, None, None], boxes[:, :2])  # (S, G, 2)
    to_high = torch.minimum(centres + reach[:, None, None], boxes[:, 2:])
    place = places[:, None]  # (S, 1, 2)
    inside = torch.minimum(place - from_low, to_high - place).amin(dim=2) > 0  # (S, G)
    farthest = _distances(place, boxes).amax(dim=2)
    fits = inside & (farthest >= low[:, None]) & (farthest <= high[:, None]) & (centres[0, 0] != 0)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = (sides[:, 0] * sides[:, 1]).expand_as(fits).masked_fill(~fits, torch.inf)
    return torch.where(fits.any(dim=1), areas.argmin(dim=1), -1)


def _distances(place: Tensor, boxes: Tensor) -> Tensor:
    """Return the distances of places (..., 2) to the left, top, right, bottom side of boxes (..., 4)."""
    return torch.cat([place - boxes[..., :2], boxes[..., 2:] - place], dim=-1)


def centreness(distances: Tensor) -> Tensor:
    """Return FCOS's centre-ness (equation 3) of distances (P, 4) to left, top, right, bottom."""
    left, top, right, bottom = distances.unbind(dim=1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt()


def _level_slowest(per_image: Tensor, counts: Sequence[int]) -> Tensor:
    """Flatten (N, S/N, ...) with images slowest into (S, ...) with levels slowest."""
    return torch.cat([level.flatten(0, 1) for level in torch.split(per_image, list(counts), dim=1)])


# ---- masks within boxes -----------------------------------------------------------------------------------------

def polygon_mask(polygons: Sequence[Doubles], box: Floats, resolution: int) -> Floats:
    """Return the union of polygons (x, y, x, y, … in network pixels) within an xyxy box as (R, R) float32, 0 or 1."""
    x1, y1, x2, y2 = (float(side) for side in box)
    scale = np.array([resolution / max(x2 - x1, SMALLEST_SIDE), resolution / max(y2 - y1, SMALLEST_SIDE)])
    parts = [((polygon.reshape(-1, 2) - (x1, y1)) * scale).ravel().tolist() for polygon in polygons]
    union = coco_mask.merge(coco_mask.frPyObjects(parts, resolution, resolution))
    return coco_mask.decode(union).astype(np.float32)


def bitmap_mask(bitmap: Booleans, box: Floats, resolution: int) -> Floats:
    """Return what of a bitmap (h, w) in network pixels lies within an xyxy box as (R, R) float32, 0 or 1.

    The box lies inside the image. Detectron2's ROIAlignV2 at sampling ratio 0, where it is at least one half: each of
    R x R bins is the mean of as many bilinear samples as it has pixels, rounded up, along each axis.
    """
    left, right = max(int(box[0]) - 1, 0), math.ceil(box[2]) + 1  # the columns that samples can touch
    rows = _mean_samples(bitmap[:, left:right].astype(np.float64), float(box[1]), float(box[3]), resolution)  # (R, c)
    columns = _mean_samples(rows.T, float(box[0]) - left, float(box[2]) - left, resolution)  # (R, R), x slowest
    return (columns.T >= 0.5 - ROUNDING).astype(np.float32)


def _mean_samples(lines: Doubles, start: float, end: float, resolution: int) -> Doubles:
    """Return the mean of bilinear samples of lines (size, c) along the first axis, in each bin, (R, c).

    Bins lie between `start` and `end`; line i has its centre at i + 0.5, and the outermost lines go on for ever: boxes
    lie inside the image. Elementwise, not as a product of matrices: BLAS would wake its threads for every mask.
    """
    samples = max(math.ceil((end - start) / resolution), 1)  # of each bin
    position = start - 0.5 + (np.arange(resolution * samples) + 0.5) * (end - start) / (resolution * samples)
    position = position.clip(0, len(lines) - 1)
    before = position.astype(np.int64)
    share = (position - before)[:, None]
    values = lines[before] * (1 - share) + lines[np.minimum(before + 1, len(lines) - 1)] * share
    mean: Doubles = values.reshape(resolution, samples, -1).mean(axis=1)
    return mean
