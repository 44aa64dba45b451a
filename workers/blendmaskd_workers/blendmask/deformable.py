"""Modulated deformable convolution (Zhu et al., Deformable ConvNets v2, arXiv:1811.11168, equation 1).

Axes: N images, C channels in, H x W the input map, T taps of the kernel (row by row), L output cells.
Plain tensor operations with fixed shapes, so that it runs on every device; the reference has a kernel for CUDA only.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)  # of a norm that was folded in, see `optimise`
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor, geometry: Tensor) -> Tensor:
        images, _, *cells = geometry.shape
        taps = self.kernel**2
        geometry = geometry.to(torch.promote_types(geometry.dtype, torch.float32))  # half has no room for fractions
        offsets = geometry[:, : 2 * taps].reshape(images, taps, 2, *cells)
        places = regular_places(self.kernel, self.stride, cells, x.device) + offsets
        rows, columns = places.flatten(3).transpose(1, 3).unbind(2)  # (N, L, T) each
        weights = geometry[:, 2 * taps:].sigmoid().flatten(2).transpose(1, 2)  # (N, L, T)
        samples = sample(x, rows, columns, weights)  # (N, L, T, C)
        kernel = self.weight.permute(0, 2, 3, 1).flatten(1)  # (channels out, T * C)
        convolved = F.linear(samples.flatten(2), kernel, self.bias)  # (N, L, channels out)
        return convolved.transpose(1, 2).reshape(images, -1, *cells)  # (N, channels out, h, w)


def regular_places(kernel: int, stride: int, cells: Sequence[int], device: torch.device) -> Tensor:
    """Return where an ordinary convolution samples: y and x of each tap for each of h x w cells, (T, 2, h, w)."""
    taps = torch.arange(kernel, device=device)[:, None] - kernel // 2
    rows, columns = (taps + torch.arange(count, device=device) * stride for count in cells)  # (kernel, h or w)
    full = (kernel, kernel, *cells)
    places = [rows[:, None, :, None].expand(full), columns[None, :, None, :].expand(full)]
    return torch.stack(places, dim=2).flatten(0, 1)


def sample(maps: Tensor, y: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """Return `maps` (N, C, H, W) at y and x (N, L, T), bilinearly, times `weights` (N, L, T): (N, L, T, C).

    Pixels have their centres at whole numbers. Outside the map all is 0, also for the interpolation at its border.
    """
    images, channels, height, width = maps.shape
    rows, row_shares = _neighbours(y, height)
    columns, column_shares = _neighbours(x, width)
    image = torch.arange(images, device=maps.device)[:, None, None, None, None]
    index = (image * height + rows[..., :, None]) * width + columns[..., None, :]  # (N, L, T, 2, 2)
    shares = row_shares[..., :, None] * column_shares[..., None, :] * weights[..., None, None]
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)  # (N * H * W, C)
    index, shares = index.view(-1, 4), shares.view(-1, 4).to(maps)
    if isinstance(images, Tensor):  # traced for ONNX, which would go through the bags one by one
        corners = zip(index.unbind(1), shares.unsqueeze(2).unbind(1))
        samples = functools.reduce(torch.add, [F.embedding(place, table) * share for place, share in corners])
    else:
        samples = F.embedding_bag(index, table, mode="sum", per_sample_weights=shares)
    return samples.view(*y.shape, channels)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the pixels before and after each position, (..., 2) int64, and their shares, (..., 2).

    A pixel outside has no share, nor has anything at a position that is not finite; indices are always valid.
    """
    before = position.floor()
    after_share = position - before
    pixels = torch.stack([before, before + 1], dim=-1)
    shares = torch.stack([1 - after_share, after_share], dim=-1)
    outside = ~((pixels >= 0) & (pixels < size))
    return pixels.masked_fill(outside, 0.0).long(), shares.masked_fill(outside, 0.0)
