"""From packed candidates to detections, on the host: threshold, boxes, suppression per class, the best 100.

Rules: the host's arithmetic only, so that it runs beside the device; results equal the reference's (AdelaiDet's FCOS,
torchvision's `batched_nms` on a CPU) to the last bit, ties and rounding included. Boxes are xyxy in network pixels
(those of the resized image, origin at its top left corner) and are not clipped to the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from blendmaskd_workers.blendmask.config import Config
from blendmaskd_workers.blendmask.fcos import FIELDS, candidates_of_level

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

OFFSET_TRICK_LIMIT = 1000  # boxes; up to here torchvision separates classes by shifting their boxes apart


@dataclass(frozen=True)
class Selection:
    """Boxes of one image; those that `select` returns are in descending score."""

    boxes: Floats  # (n, 4) xyxy, network pixels, unclipped
    scores: Floats  # (n,) 0..1
    classes: Integers  # (n,)
    locations: Floats  # (n, 2) x, y of the cell that predicted the box, network pixels
    levels: Integers  # (n,) 0 is p3
    cells: Integers  # (n,) row-major index of that cell in its level

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, index: Integers) -> "Selection":
        """Return the boxes at the positions `index`, in that order."""
        return Selection(self.boxes[index], self.scores[index], self.classes[index], self.locations[index],
                         self.levels[index], self.cells[index])


def select(packed: Floats, level_sizes: Sequence[tuple[int, int]], config: Config) -> Selection:
    """Choose the detections of one image from its candidates `packed` (sum of M, FIELDS), see `Fcos.candidates`.

    `level_sizes` are the heights and widths of the levels in cells. Boxes that are not finite are dropped.
    """
    counts = [candidates_of_level(h * w, config.num_classes, config.pre_nms_topk) for h, w in level_sizes]
    assert packed.shape == (sum(counts), FIELDS)
    levels = np.split(packed, np.cumsum(counts)[:-1])
    with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are not finite
        candidates = _concatenate([
            _decode_level(rows, level, width, config)
            for level, (rows, (_, width)) in enumerate(zip(levels, level_sizes))
        ])
    candidates = candidates.take(np.flatnonzero(np.isfinite(candidates.boxes).all(axis=1)))
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes,
                       config.nms_threshold, config.post_nms_topk)
    return candidates.take(keep)


def _decode_level(rows: Floats, level: int, width: int, config: Config) -> Selection:
    rows = rows[rows[:, 0] >= 0]  # the others are NOT_A_CANDIDATE
    classes, cells = rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64)
    order = np.lexsort((classes, cells))
    rows, classes, cells = rows[order], classes[order], cells[order]
    stride = config.strides[level]
    y, x = np.divmod(cells, width)
    locations = np.stack([x, y], axis=1) * stride + stride // 2
    locations = locations.astype(np.float32)
    distances = rows[:, 3:] * np.float32(stride)  # left, top, right, bottom
    boxes = np.concatenate([locations - distances[:, :2], locations + distances[:, 2:]], axis=1)
    # PyTorch's square root, which need not round like numpy's: near-equal scores must order as in the reference.
    scores = torch.from_numpy(rows[:, 0].copy()).sqrt().numpy()
    return Selection(boxes, scores, classes, locations, np.full(len(rows), level), cells)


def _concatenate(parts: Sequence[Selection]) -> Selection:
    return Selection(*(np.concatenate([getattr(part, name) for part in parts])
                       for name in Selection.__dataclass_fields__))


def batched_nms(boxes: Floats, scores: Floats, classes: Integers, threshold: float, topk: int) -> Integers:
    """Return the indices that survive non-maximum suppression within their class, in descending score.

    At most `topk` survive, except that all boxes which tie with the last one stay. Like torchvision on a CPU: up to
    1000 boxes, classes are shifted apart by multiples of the largest coordinate plus one and suppressed together,
    in float32 (so rounding, and coordinates below zero, can let classes meet); above, each class is on its own.
    """
    if len(boxes) == 0:
        return np.zeros(0, np.int64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of vast boxes and of boxes without area
        if len(boxes) <= OFFSET_TRICK_LIMIT:
            step = boxes.max() + np.float32(1)
            boxes = boxes + (classes.astype(np.float32) * step)[:, None]
            classes = np.zeros_like(classes)
        return _suppress(boxes, scores, classes, threshold, topk)


def _suppress(boxes: Floats, scores: Floats, groups: Integers, threshold: float, topk: int) -> Integers:
    """Greedy suppression within groups, best first; stops once `topk` survivors cannot be joined by a tie."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-scores, kind="stable")  # the undecided, best first
    kept: list[np.int64] = []
    while len(left) and (len(kept) < topk or scores[left[0]] == scores[kept[topk - 1]]):
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = _iou(boxes[best], areas[best], boxes[left], areas[left]) > threshold
        left = left[~(overlap & (groups[left] == groups[best]))]
    return np.array(kept, np.int64)


def _iou(box: Floats, area: np.float32, boxes: Floats, areas: Floats) -> npt.NDArray[np.float64]:
    """Intersection over union, computed in float32 and returned in float64, in which the threshold is given.

    Two boxes without area give NaN, which exceeds no threshold.
    """
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    sides = np.maximum(high - low, np.float32(0))
    inter = sides[:, 0] * sides[:, 1]
    iou: npt.NDArray[np.float64] = np.divide(inter, area + areas - inter).astype(np.float64)
    return iou
