"""Initial weights of a network that is trained from scratch, AdelaiDet's. Inference never imports this."""

import math

from torch import nn

from blendmaskd_workers.blendmask.backbone import BottleneckBlock
from blendmaskd_workers.blendmask.deformable import DeformableConv
from blendmaskd_workers.blendmask.model import BlendMask

HEAD_SPREAD = 0.01


def initialise(model: BlendMask, prior: float) -> None:
    """Draw all weights of `model` anew from PyTorch's global generator.

    `prior` is the probability that every class has at every location in the beginning (arXiv:1708.02002, section
    4.1). Norms, the last basis convolution and the semantic head keep what PyTorch gave them.
    """
    for conv in _convolutions(model.backbone):
        nn.init.kaiming_uniform_(conv.weight, a=1)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
    for part in model.backbone.bottom_up.modules():
        if isinstance(part, nn.Conv2d | DeformableConv):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    for part in model.backbone.bottom_up.modules():
        if isinstance(part, BottleneckBlock) and part.conv2_offset:  # samples where an ordinary one does, at first
            nn.init.zeros_(part.conv2_offset.weight)
    for conv in [*_convolutions(model.proposal_generator), model.top_layer]:
        nn.init.normal_(conv.weight, std=HEAD_SPREAD)
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)
    bias = model.proposal_generator.fcos_head.cls_logits.bias
    assert bias is not None
    nn.init.constant_(bias, -math.log((1 - prior) / prior))
    for conv in [*_convolutions(model.basis_module.refine), *_convolutions(model.basis_module.tower)[:-1]]:
        nn.init.kaiming_uniform_(conv.weight, a=1)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]
