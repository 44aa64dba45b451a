"""A 3x3 convolution at a few cells instead of everywhere: the top layer is wide, and few of its cells are ever read.

Axes: N images, C channels, H x W one level, S cells of all levels, D cells of one level or of several. Shapes depend
on D only.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.selection import Integers


def convolve(conv: nn.Conv2d, patches: Tensor) -> Tensor:
    """Return what a 3x3 convolution gives at the cells of `patches` (D, 9, C): (D, channels out)."""
    return F.linear(patches.flatten(1).to(conv.weight.dtype), conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def patches_at(features: Tensor, images: Tensor, cells: Tensor) -> Tensor:
    """Return what a 3x3 convolution reads at `cells` (D,), row-major, of `images` (D,): (D, 9, C), zero outside.

    `features` (N, C, H, W) may have either memory layout; neither is copied. A cell beyond the last is not an error.
    """
    height, width = features.shape[2:]
    step = torch.arange(-1, 2, device=cells.device)
    cells = cells.int()  # some NPUs divide int64 on a CPU of their own
    y = torch.div(cells, width, rounding_mode="floor")[:, None] + step  # (D, 3)
    x = (cells % width)[:, None] + step
    outside_y, outside_x = (y < 0) | (y >= height), (x < 0) | (x >= width)
    place = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]  # (D, 3, 3)
    values = features.flatten(2)[images[:, None], :, place.flatten(1)]  # (D, 9, C)
    return values.masked_fill((outside_y[:, :, None] | outside_x[:, None, :]).view(-1, 9, 1), 0.0)


def table_of_levels(maps: Sequence[Tensor]) -> Tensor:
    """Return the cells of all levels, row-major, level after level, and then zeros: (N, S + 1, C) of (N, C, H_l, W_l).

    All levels can then be read at once; `rows_of_patches` says where.
    """
    rows = [level.permute(0, 2, 3, 1).flatten(1, 2) for level in maps]
    return torch.cat([*rows, rows[0].new_zeros(rows[0].shape[0], 1, rows[0].shape[2])], dim=1)


def rows_of_patches(levels: Integers, cells: Integers, level_sizes: Sequence[tuple[int, int]]) -> Integers:
    """Return which rows of that table a 3x3 convolution reads at cells (D,) of levels (D,): (D, 9). Host only."""
    heights, widths = np.array(level_sizes).T
    starts = np.concatenate([[0], np.cumsum(heights * widths)])
    step = np.arange(-1, 2)
    height, width = heights[levels, None], widths[levels, None]  # (D, 1)
    y, x = (at[:, None] + step for at in np.divmod(cells, width[:, 0]))  # (D, 3)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None]
    rows = starts[levels, None, None] + y[:, :, None] * width[:, :, None] + x[:, None]
    return np.where(inside, rows, starts[-1]).reshape(-1, 9)


def values_of_levels(maps: Sequence[Tensor], images: Tensor, rows: Tensor) -> Tensor:
    """Return the values at rows (D,) of the levels' cells, as that table has them: (D, C) of (N, C, H_l, W_l)."""
    gathered = maps[0].new_zeros(len(rows), maps[0].shape[1])
    start = 0
    for level in maps:
        values = level.flatten(2)
        at_rows = values[images, :, (rows - start).clamp(0, values.shape[2] - 1)]  # somewhere where it is not the row's
        gathered = torch.where((rows >= start)[:, None], at_rows, gathered)
        start += values.shape[2]
    return gathered
