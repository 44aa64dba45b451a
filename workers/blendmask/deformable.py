"""Modulated deformable convolution (Zhu et al., Deformable ConvNets v2, arXiv:1811.11168, equation 1).

Axes: N images, C channels in, H x W the input map, T taps of the kernel (row by row), L output cells.
Plain tensor operations with fixed shapes, so that it runs on every device; the reference has a kernel for CUDA only.
"""

import torch
from torch import Tensor, nn


class DeformableConv(nn.Module):
    """A convolution without bias whose taps each sample the input at a place, and with a weight, of their own.

    `geometry` (N, 3 * T, h, w) belongs to the output's cells: for each tap its offset down and to the right, in
    pixels of the input, tap after tap; then T modulations before their sigmoid.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, kernel, kernel))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor, geometry: Tensor) -> Tensor:
        taps, cells = self.kernel**2, geometry.shape[2:]
        offsets, modulation = geometry.split((2 * taps, taps), dim=1)
        # Half precision has no room for a place's fraction.
        places = regular_places(self.kernel, self.stride, offsets) + offsets.float().unflatten(1, (taps, 2))
        rows, columns = places.flatten(3).transpose(1, 3).unbind(2)  # (N, L, T) each
        weights = modulation.sigmoid().flatten(2).transpose(1, 2)  # (N, L, T)
        samples = sample(x, rows, columns, weights)  # (N, L, T, C)
        kernel = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # (T * C, channels out)
        return (samples.flatten(2) @ kernel).transpose(1, 2).unflatten(2, cells)  # (N, channels out, h, w)


def regular_places(kernel: int, stride: int, like: Tensor) -> Tensor:
    """Return where an ordinary convolution samples: y and x of each tap for each cell of `like`, (T, 2, h, w)."""
    height, width = like.shape[2:]
    taps = torch.arange(kernel, device=like.device)[:, None] - kernel // 2
    rows = taps + torch.arange(height, device=like.device) * stride  # (kernel, h)
    columns = taps + torch.arange(width, device=like.device) * stride  # (kernel, w)
    full = (kernel, kernel, height, width)
    places = [rows[:, None, :, None].expand(full), columns[None, :, None, :].expand(full)]
    return torch.stack(places, dim=2).flatten(0, 1)


def sample(maps: Tensor, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Return `maps` (N, C, H, W) at y and x (N, L, T), bilinearly, times `weights` (N, L, T): (N, L, T, C).

    Pixels have their centres at whole numbers. Outside the map all is 0, also for the interpolation at its border.
    """
    images, channels, height, width = maps.shape
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)  # (N * H * W, C)
    image = torch.arange(images, device=maps.device)[:, None, None]
    y0, down = _before(y, height)
    x0, right = _before(x, width)
    total = maps.new_zeros(())
    for row, row_share in ((y0, 1 - down), (y0 + 1, down)):
        for column, column_share in ((x0, 1 - right), (x0 + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = (image * height + row.clamp(0, height - 1)) * width + column.clamp(0, width - 1)
            share = (row_share * column_share * weights).masked_fill(~inside, 0.0).to(maps.dtype)
            total = total + table.index_select(0, index.flatten()).view(*index.shape, -1) * share[..., None]
    return total


def _before(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the pixel before each position (int64), -1 to size - 1, and the share of the pixel after it.

    What lies a whole pixel outside or further, NaN included, comes back as pixel -2, which no interpolation reads.
    """
    near = (position > -1) & (position < size)
    position = position.masked_fill(~near, -2.0)
    before = position.floor()
    return before.long(), position - before
