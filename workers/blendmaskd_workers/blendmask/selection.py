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
Booleans = npt.NDArray[np.bool_]

OFFSET_TRICK_LIMIT = 1000  # boxes; up to here torchvision separates classes by shifting their boxes apart
BLOCK = 64  # boxes that are suppressed together: of the smaller ones numpy's calls cost more, of larger ones the pairs


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
    levels = np.repeat(np.arange(len(counts)), counts)
    with np.errstate(over="ignore", invalid="ignore"):  # of boxes that are not finite
        candidates = _decode(packed, levels, np.array([width for _, width in level_sizes]), np.array(config.strides))
    candidates = candidates.take(np.flatnonzero(np.isfinite(candidates.boxes).all(axis=1)))
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes,
                       config.nms_threshold, config.post_nms_topk)
    return candidates.take(keep)


def _decode(packed: Floats, levels: Integers, widths: Integers, strides: Integers) -> Selection:
    """Return all candidates in the order of level, cell, class; `widths` and `strides` are those of the levels."""
    chosen = np.flatnonzero(packed[:, 0] >= 0)  # the others are NOT_A_CANDIDATE
    classes, cells, levels = packed[chosen, 1].astype(np.int64), packed[chosen, 2].astype(np.int64), levels[chosen]
    order = np.lexsort((classes, cells, levels))
    rows, classes, cells, levels = packed[chosen[order]], classes[order], cells[order], levels[order]
    stride = strides[levels, None]
    y, x = np.divmod(cells, widths[levels])
    locations = (np.stack([x, y], axis=1) * stride + stride // 2).astype(np.float32)
    distances = rows[:, 3:] * stride.astype(np.float32)  # left, top, right, bottom
    boxes = np.concatenate([locations - distances[:, :2], locations + distances[:, 2:]], axis=1)
    # PyTorch's square root, which need not round like numpy's: near-equal scores must order as in the reference.
    scores = torch.from_numpy(rows[:, 0].copy()).sqrt().numpy()
    return Selection(boxes, scores, classes, locations, levels, cells)


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
    order = np.argsort(-scores, kind="stable")
    kept = order[:0]
    for start in range(0, len(order), BLOCK):
        block = order[start:start + BLOCK]
        if len(kept) >= topk and scores[block[0]] != scores[kept[topk - 1]]:
            break
        overlap = _overlap(boxes, groups, np.concatenate([kept, block]), block, threshold)
        survives = ~np.logical_or.reduce(overlap[:len(kept)])
        for place, others in enumerate(overlap[len(kept):]):
            if survives[place]:
                survives[place + 1:] &= ~others[place + 1:]
        kept = np.concatenate([kept, block[survives]])
    best, rest = kept[:topk], kept[topk:]
    return np.concatenate([best, rest[scores[rest] == scores[best[-1]]]])


def _overlap(boxes: Floats, groups: Integers, rows: Integers, columns: Integers, threshold: float) -> Booleans:
    """Return which of the boxes `rows` (r,) overlap which of `columns` (c,) of their group by more, (r, c).

    Intersection over union is computed in float32 and compared in float64, in which the threshold is given. Two boxes
    without area give NaN, which exceeds no threshold.
    """
    x0, y0, x1, y1 = boxes[rows].T[:, :, None]
    left, top, right, bottom = boxes[columns].T
    width = np.maximum(np.minimum(x1, right) - np.maximum(x0, left), np.float32(0))
    height = np.maximum(np.minimum(y1, bottom) - np.maximum(y0, top), np.float32(0))
    inter = width * height
    union = (x1 - x0) * (y1 - y0) + (right - left) * (bottom - top) - inter
    overlap: Booleans = (inter / union).astype(np.float64) > threshold
    return overlap & (groups[rows, None] == groups[columns])
