"""A 3x3 convolution at a few cells instead of everywhere: the top layer is wide, and few of its cells are ever read.

Axes: N images, C channels, H x W one level, D cells of one level or of several. Shapes depend on D only.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def convolve(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """Return what a 3x3 convolution gives at the cells of `patches` (D, 9, C): (D, channels out)."""
    return F.linear(patches.flatten(1).to(conv.weight.dtype), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def patches_at(features: Tensor, images: Tensor, cells: Tensor) -> Tensor:
    """Return what a 3x3 convolution reads at `cells` (D,), row-major, of `images` (D,): (D, 9, C), zero outside.

    `features` (N, C, H, W) may have either memory layout; neither is copied. A cell beyond the last is not an error.
    """
    height, width = features.shape[2:]
    step = torch.arange(-1, 2, device=cells.device)
    y = torch.div(cells, width, rounding_mode="floor")[:, None] + step  # (D, 3)
    x = (cells % width)[:, None] + step
    outside_y, outside_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
    place = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]  # (D, 3, 3)
    values = features.flatten(2)[images[:, None], :, place.flatten(1)]  # (D, 9, C)
    return values.masked_fill((outside_y[:, :, None] | outside_x[:, None, :]).view(-1, 9, 1), 0.0)


def patches_of_levels(maps: Sequence[Tensor], images: Tensor, levels: Tensor, cells: Tensor) -> Tensor:
    """Return `patches_at` for cells that lie on several levels, (D, 9, C); maps are (N, C, H_l, W_l).

    Every level is read for every cell, somewhere where it is not the cell's: shapes stay fixed.
    """
    gathered = maps[0].new_zeros(len(cells), 9, maps[0].shape[1])
    for level, features in enumerate(maps):
        here = (levels == level)[:, None, None]
        gathered = torch.where(here, patches_at(features, images, cells), gathered)
    return gathered


def values_of_levels(maps: Sequence[Tensor], images: Tensor, levels: Tensor, cells: Tensor) -> Tensor:
    """Return the values at cells that lie on several levels, (D, C); maps are (N, C, H_l, W_l). Shapes stay fixed."""
    gathered = maps[0].new_zeros(len(cells), maps[0].shape[1])
    for level, values in enumerate(maps):
        at_cells = values.flatten(2)[images, :, cells.clamp(max=values.shape[2] * values.shape[3] - 1)]  # (D, C)
        gathered = torch.where((levels == level)[:, None], at_cells, gathered)
    return gathered
