"""Deformable convolution against an ordinary one and against the paper's sum, one term at a time."""

import math

import numpy as np
import pytest
import torch

from blendmaskd_workers.blendmask.deformable import DeformableConv

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def convolution(channels_in: int, channels_out: int, stride: int = 1) -> DeformableConv:
    conv = DeformableConv(channels_in, channels_out, 3, stride)
    conv.weight.data = random(channels_out, channels_in, 3, 3)
    return conv


@pytest.mark.parametrize("stride", [1, 2])
def test_without_offsets_it_is_half_of_an_ordinary_convolution(stride):
    conv, x = convolution(5, 6, stride), random(2, 5, 7, 10)
    ordinary = torch.nn.functional.conv2d(x, conv.weight, stride=stride, padding=1)
    found = conv(x, torch.zeros(2, 27, *ordinary.shape[2:]))  # the sigmoid of 0 is one half
    torch.testing.assert_close(found, ordinary / 2, rtol=1e-5, atol=1e-5)


def test_whole_offsets_move_the_map_down_and_right():
    conv, x = convolution(3, 4), random(1, 3, 9, 9)
    geometry = torch.zeros(1, 27, 9, 9)
    geometry[:, 0:18:2], geometry[:, 1:18:2] = 2, 1  # every tap two pixels down, one to the right
    found, still = conv(x, geometry), conv(x, torch.zeros(1, 27, 9, 9))
    torch.testing.assert_close(found[:, :, 1:6, 1:7], still[:, :, 3:8, 2:8])


def one_output(x, kernel, geometry, i: int, j: int, stride: int) -> np.ndarray:
    """Equation 1 of the paper for one image and cell, in float64."""
    total = np.zeros(len(kernel))
    for tap in range(9):
        y = i * stride - 1 + tap // 3 + geometry[2 * tap, i, j]
        column = j * stride - 1 + tap % 3 + geometry[2 * tap + 1, i, j]
        modulation = 1 / (1 + math.exp(-geometry[18 + tap, i, j]))
        total += kernel[:, :, tap // 3, tap % 3] @ bilinear(x, y, column) * modulation
    return total


def bilinear(x, y: float, column: float) -> np.ndarray:
    total = np.zeros(len(x))
    for row in range(x.shape[1]):
        for place in range(x.shape[2]):
            total += x[:, row, place] * max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(column - place))
    return total


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize(("stride", "spread"), [(1, 0.5), (1, 4.0), (2, 2.0)])
def test_it_is_the_papers_sum(stride, spread, dtype, tolerance):
    """Also where it samples across the border, and far outside."""
    conv, x = convolution(3, 4, stride).to(dtype), random(2, 3, 5, 6).to(dtype)
    cells = (math.ceil(5 / stride), math.ceil(6 / stride))
    geometry = random(2, 27, *cells).to(dtype) * spread
    found = conv(x, geometry).detach().numpy()
    maps, kernel, places = (t.detach().double().numpy() for t in (x, conv.weight, geometry))
    for image in range(2):
        for i in range(cells[0]):
            for j in range(cells[1]):
                expected = one_output(maps[image], kernel, places[image], i, j, stride)
                np.testing.assert_allclose(found[image, :, i, j], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("offset", [-1.0, 5.0, -1e30, 1e30, math.inf, math.nan])
def test_a_pixel_or_more_outside_is_zero(offset):
    conv, x = convolution(1, 1), torch.ones(1, 1, 5, 5)
    geometry = torch.zeros(1, 27, 5, 5)
    geometry[:, 8] = offset  # the centre tap's vertical offset
    outermost = conv(x, geometry)[0, 0, 0 if offset < 0 else -1, 2]
    kernel = conv.weight[0, 0].clone()
    kernel[1, 1] = 0
    rows = kernel[1:] if offset < 0 else kernel[:2]
    torch.testing.assert_close(outermost, rows.sum() / 2)


def test_gradients_are_those_of_small_steps():
    """Also of the offsets, which do not cross a pixel."""
    conv, x = convolution(2, 1).double(), random(1, 2, 2, 2).double().requires_grad_()
    geometry = (torch.rand(1, 27, 2, 2, generator=GENERATOR) * 0.6 + 0.2).double().requires_grad_()
    assert torch.autograd.gradcheck(conv, (x, geometry))
