"""A network for inference made from a trained one: the same answers, but for rounding, with less work.

Batch norms with constant statistics vanish into the convolutions before them; where a tower has one for each level, it
gets a convolution for each level. Group norms stay: they depend on the image. The top layer is run only where it is
read, sigmoids for all levels at once. Weights may change their type and their order in memory. What comes out is
rounded otherwise than in the trained network, which is the one to serve where that matters. Rules: the trained network
stays as it is; parameters here have other names than a checkpoint's, so weights are loaded before. Must know nothing
of devices.
"""

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from blendmaskd_workers.blendmask import dla
from blendmaskd_workers.blendmask.backbone import NormedConv, NormedDeformableConv
from blendmaskd_workers.blendmask.deformable import DeformableConv
from blendmaskd_workers.blendmask.fcos import Tower
from blendmaskd_workers.blendmask.model import BlendMask
from blendmaskd_workers.blendmask.norms import EPSILON, FrozenBatchNorm

Conv = nn.Conv2d | DeformableConv
BatchNorm = nn.BatchNorm2d | FrozenBatchNorm


def for_inference(network: BlendMask, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> BlendMask:
    """Return a copy of `network`, which is in evaluation mode, for inference only.

    `dtype` is that of its convolutions and norms; what chooses, places and blends stays in float32. `channels_last`
    stores weights, and with them all maps, with the channels innermost: CPUs and tensor cores convolve them faster.
    """
    optimised = copy.deepcopy(network).requires_grad_(False)
    optimised.attends_everywhere = False
    optimised.proposal_generator.squashes_levels_apart = False
    for module in list(optimised.modules()):
        if isinstance(module, Tower):
            _fold_tower(module)
        for conv, parent, name in _normed(module):
            _fold(conv, getattr(parent, name))
            setattr(parent, name, nn.Identity())
    optimised.to(dtype)
    optimised.top_layer.to(torch.float32)
    optimised.proposal_generator.fcos_head.scales.to(torch.float32)  # a factor's rounding would move every box alike
    return optimised.to(memory_format=torch.channels_last) if channels_last else optimised  # type: ignore[call-overload]


def _normed(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str]]:
    """Yield the convolutions of `module` itself that a batch norm follows, and where that norm is: parent and name."""
    match module:
        case NormedConv() | NormedDeformableConv():
            yield module, module, "norm"
        case dla.Block():
            yield module.conv1, module, "bn1"
            yield module.conv2, module, "bn2"
        case dla.Root():
            yield module.conv, module, "bn"
        case nn.Sequential():
            for place, (conv, norm) in enumerate(pairwise(module)):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm):
                    yield conv, module, str(place + 1)


def _fold_tower(tower: Tower) -> None:
    """Give a tower with a batch norm for each level a convolution for each level."""
    for place, (conv, norms) in enumerate(pairwise(list(tower))):
        if isinstance(norms, nn.ModuleList):
            convs = nn.ModuleList(copy.deepcopy(conv) for _ in norms)
            for of_level, norm in zip(convs, norms):
                _fold(of_level, norm)
            tower[place], tower[place + 1] = convs, nn.Identity()


def _fold(conv: nn.Module, norm: nn.Module) -> None:
    """Scale and shift what `conv` gives as `norm` would, in float64 up to the last rounding."""
    assert isinstance(conv, Conv), conv
    assert isinstance(norm, BatchNorm), norm
    assert norm.running_var is not None  # of an nn.BatchNorm2d that keeps statistics
    assert norm.running_mean is not None
    epsilon = norm.eps if isinstance(norm, nn.BatchNorm2d) else EPSILON
    scale = norm.weight.double() / (norm.running_var.double() + epsilon).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double()
    shift = norm.bias.double() + (bias - norm.running_mean.double()) * scale
    conv.weight = _constant(conv.weight.double() * scale[:, None, None, None], like=conv.weight)
    conv.bias = _constant(shift, like=conv.weight)


def _constant(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
