"""Selection as it was before it took boxes in blocks: level by level, and one survivor at a time."""

from collections.abc import Sequence

import numpy as np
import torch

from blendmaskd_workers.blendmask import Config
from blendmaskd_workers.blendmask.fcos import candidates_of_level
from blendmaskd_workers.blendmask.selection import OFFSET_TRICK_LIMIT, Floats, Integers, Selection


def select(packed: Floats, level_sizes: Sequence[tuple[int, int]], config: Config) -> Selection:
    counts = [candidates_of_level(h * w, config.num_classes, config.pre_nms_topk) for h, w in level_sizes]
    levels = np.split(packed, np.cumsum(counts)[:-1])
    with np.errstate(over="ignore", invalid="ignore"):
        parts = [
            decode_level(rows, level, width, config)
            for level, (rows, (_, width)) in enumerate(zip(levels, level_sizes))
        ]
        candidates = Selection(*(np.concatenate([getattr(part, name) for part in parts])
                                 for name in Selection.__dataclass_fields__))
    candidates = candidates.take(np.flatnonzero(np.isfinite(candidates.boxes).all(axis=1)))
    keep = batched_nms(candidates.boxes, candidates.scores, candidates.classes,
                       config.nms_threshold, config.post_nms_topk)
    return candidates.take(keep)


def decode_level(rows: Floats, level: int, width: int, config: Config) -> Selection:
    rows = rows[rows[:, 0] >= 0]
    classes, cells = rows[:, 1].astype(np.int64), rows[:, 2].astype(np.int64)
    order = np.lexsort((classes, cells))
    rows, classes, cells = rows[order], classes[order], cells[order]
    stride = config.strides[level]
    y, x = np.divmod(cells, width)
    locations = np.stack([x, y], axis=1) * stride + stride // 2
    locations = locations.astype(np.float32)
    distances = rows[:, 3:] * np.float32(stride)
    boxes = np.concatenate([locations - distances[:, :2], locations + distances[:, 2:]], axis=1)
    scores = torch.from_numpy(rows[:, 0].copy()).sqrt().numpy()
    return Selection(boxes, scores, classes, locations, np.full(len(rows), level), cells)


def batched_nms(boxes: Floats, scores: Floats, classes: Integers, threshold: float, topk: int,
                offset_trick_limit: int = OFFSET_TRICK_LIMIT) -> Integers:
    if len(boxes) == 0:
        return np.zeros(0, np.int64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if len(boxes) <= offset_trick_limit:
            step = boxes.max() + np.float32(1)
            boxes = boxes + (classes.astype(np.float32) * step)[:, None]
            classes = np.zeros_like(classes)
        return suppress(boxes, scores, classes, threshold, topk)


def suppress(boxes: Floats, scores: Floats, groups: Integers, threshold: float, topk: int) -> Integers:
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left = np.argsort(-scores, kind="stable")
    kept: list[np.int64] = []
    while len(left) and (len(kept) < topk or scores[left[0]] == scores[kept[topk - 1]]):
        best, left = left[0], left[1:]
        kept.append(best)
        overlap = iou(boxes[best], areas[best], boxes[left], areas[left]) > threshold
        left = left[~(overlap & (groups[left] == groups[best]))]
    return np.array(kept, np.int64)


def iou(box: Floats, area: np.float32, boxes: Floats, areas: Floats) -> Floats:
    low = np.maximum(box[:2], boxes[:, :2])
    high = np.minimum(box[2:], boxes[:, 2:])
    sides = np.maximum(high - low, np.float32(0))
    inter = sides[:, 0] * sides[:, 1]
    return np.divide(inter, area + areas - inter).astype(np.float64)
