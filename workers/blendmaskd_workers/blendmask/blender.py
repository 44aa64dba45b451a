"""Blender (BlendMask, arXiv:2001.00309, section 3.1, equations 2 to 5): bases and attentions in, masks out.

Axes: N images, K bases, D detections of the whole batch, A side of an attention map, R side of a mask.
Boxes are xyxy in network pixels, unclipped. Runs on the device; shapes depend on D, which the host knows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BASES_SCALE = 0.25  # bases have stride 4
OUTSIDE = -2.0  # more than one base pixel off any map


def blend(bases: Tensor, attentions: Tensor, images: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Return mask probabilities (D, R, R).

    bases (N, K, H/4, W/4); attentions (D, K, A, A); images (D,) the image of each detection; boxes (D, 4).
    """
    return combine(roi_align(bases, images, boxes, resolution), attentions).sigmoid()


def combine(crops: Tensor, attentions: Tensor) -> Tensor:
    """Return mask logits (D, R, R): the bases' crops (D, K, R, R), weighted by the attentions (D, K, A, A)."""
    weights = F.interpolate(attentions, size=crops.shape[2:], mode="bilinear", align_corners=False)
    if isinstance(crops.shape[0], Tensor):  # traced for ONNX, whose runtimes are slow at a softmax of this axis
        weights = (weights - weights.amax(dim=1, keepdim=True)).exp()
        return (crops * weights).sum(dim=1) / weights.sum(dim=1)
    return (crops * weights.softmax(dim=1)).sum(dim=1)


def roi_align(bases: Tensor, images: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Sample `bases` bilinearly at the centre of each of R x R bins of each box; returns (D, K, R, R) float32.

    Detectron2's ROIAlignV2 at sampling ratio 1: base pixels have their centres at whole numbers, which are half a
    base pixel off the box's coordinates. A sample more than one base pixel outside the map is 0; within that pixel
    the border is repeated. Boxes may overhang the image, be empty or not finite.
    """
    count, (height, width) = boxes.shape[0], bases.shape[2:]
    table = bases.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format).flatten(0, 2)
    start, end = (boxes * BASES_SCALE - 0.5).view(count, 2, 2, 1).unbind(1)  # (D, 2, 1) each: x and y
    bins = (end - start) / resolution
    steps = torch.arange(resolution, dtype=boxes.dtype, device=boxes.device)
    samples = torch.add(start + steps * bins, bins, alpha=0.5)  # (D, 2, R)
    last = torch.linspace(width - 1, height - 1, 2, dtype=boxes.dtype, device=boxes.device)[:, None]
    index, weights = _neighbours(samples.nan_to_num(nan=OUTSIDE), last)
    x, y = index.unbind(2)  # (2, D, R) each
    y = torch.add(y.view(2, 1, count, resolution, 1), images.view(count, 1, 1), alpha=height)
    place = torch.add(x.view(2, count, 1, resolution), y, alpha=width)  # (2, 2, D, R, R): above, below; left, right
    x, y = weights.unbind(2)
    weight = y.view(2, 1, count, resolution, 1, 1) * x.view(2, count, 1, resolution, 1)
    corners = F.embedding(place, table).mul_(weight).flatten(0, 1).unbind(0)  # four of (D, R, R, K)
    return (corners[0] + corners[1] + corners[2] + corners[3]).permute(0, 3, 1, 2).contiguous()


def _neighbours(positions: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return the base pixels before and after each position (int64) and their weights, (2, ...) each.

    Weights of positions outside are 0, their pixels the nearest, so that indices are always valid.
    """
    nearest = positions.clamp(min=0).minimum(last)
    outside = (positions - nearest).abs() > 1
    before = nearest.floor()
    share = nearest - before
    index = torch.stack([before, nearest.ceil()]).long()
    return index, torch.stack([1 - share, share]).masked_fill(outside, 0.0)
