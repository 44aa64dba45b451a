"""Blender (BlendMask, arXiv:2001.00309, section 3.1, equations 2 to 5): bases and attentions in, masks out.

Axes: N images, K bases, D detections of the whole batch, A side of an attention map, R side of a mask.
Boxes are xyxy in network pixels, unclipped. Runs on the device; shapes depend on D, which the host knows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BASES_SCALE = 0.25  # bases have stride 4


def blend(bases: Tensor, attentions: Tensor, images: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Return mask probabilities (D, R, R).

    bases (N, K, H/4, W/4); attentions (D, K, A, A); images (D,) the image of each detection; boxes (D, 4).
    """
    return combine(roi_align(bases.float(), images, boxes, resolution), attentions).sigmoid()


def combine(crops: Tensor, attentions: Tensor) -> Tensor:
    """Return mask logits (D, R, R): the bases' crops (D, K, R, R), weighted by the attentions (D, K, A, A)."""
    weights = F.interpolate(attentions, size=crops.shape[2:], mode="bilinear", align_corners=False)
    return (crops * weights.softmax(dim=1)).sum(dim=1)


def roi_align(bases: Tensor, images: Tensor, boxes: Tensor, resolution: int) -> Tensor:
    """Sample `bases` bilinearly at the centre of each of R x R bins of each box; returns (D, K, R, R).

    Detectron2's ROIAlignV2 at sampling ratio 1: base pixels have their centres at whole numbers, which are half a
    base pixel off the box's coordinates. A sample more than one base pixel outside the map is 0; within that pixel
    the border is repeated. Boxes may overhang the image, be empty or not finite.
    """
    height, width = bases.shape[2:]
    corners = boxes * BASES_SCALE - 0.5  # (D, 4)
    bins = (corners[:, 2:] - corners[:, :2]) / resolution  # (D, 2)
    steps = torch.arange(resolution, dtype=boxes.dtype, device=boxes.device)
    samples = corners[:, :2, None] + steps * bins[:, :, None] + 0.5 * bins[:, :, None]  # (D, 2, R)
    x0, x1, right, inside_x = _neighbours(samples[:, 0], width)
    y0, y1, down, inside_y = _neighbours(samples[:, 1], height)
    table = bases.permute(0, 2, 3, 1).reshape(-1, bases.shape[1]).contiguous()  # (N * H/4 * W/4, K)

    def corner(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:  # (D, R), (D, R), (D, R, R) -> (D, R, R, K)
        index = (images[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]
        return table.index_select(0, index.flatten()).view(*index.shape, -1) * weight[..., None]

    right, down = right[:, None, :], down[:, :, None]
    value = corner(y0, x0, (1 - down) * (1 - right)) + corner(y0, x1, (1 - down) * right)
    value = value + corner(y1, x0, down * (1 - right)) + corner(y1, x1, down * right)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    return value.masked_fill(~inside[..., None], 0.0).permute(0, 3, 1, 2).contiguous()


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the base pixels before and after each position (int64), the share of the second, and which are inside.

    Positions outside, NaN included, come back as pixel 0, so that indices are always valid.
    """
    inside = (position >= -1) & (position <= size)
    position = position.masked_fill(~inside, 0.0).clamp(0, size - 1)
    before = position.floor()
    share = position - before
    before = before.long()
    return before, (before + 1).clamp(max=size - 1), share, inside
