"""The normalisations of backbones and of the FCOS head that PyTorch has not, or has under another name.

Rules: in inference, and in training on one process, SyncBN is plain batch norm. Nothing here may depend on where a
norm is used.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-5  # PyTorch's own, and the reference's

Norm = Callable[[int], nn.Module]  # from the number of channels


class FrozenBatchNorm(nn.Module):
    """Batch norm whose scale, shift and statistics are constants: buffers, never trained, never updated."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:  # as the reference: F.batch_norm would keep x for gradients of its constants
            scale = self.weight * (self.running_var + EPSILON).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale[:, None, None] + shift[:, None, None]
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPSILON)


class NaiveGroupNorm(nn.GroupNorm):
    """Group norm by the variance's other formula, E[x^2] - E[x]^2, which rounds differently."""

    def forward(self, input: Tensor) -> Tensor:
        wide = torch.promote_types(input.dtype, torch.float32)
        grouped = input.to(wide).reshape(input.shape[0], self.num_groups, -1)  # (N, groups, C / groups * H * W)
        mean = grouped.mean(dim=2, keepdim=True)
        variance = (grouped**2).mean(dim=2, keepdim=True) - mean**2
        normed = ((grouped - mean) / torch.sqrt(variance + self.eps)).view_as(input)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)


BACKBONE_NORMS: Mapping[str, Norm] = {"FrozenBN": FrozenBatchNorm, "BN": nn.BatchNorm2d, "SyncBN": nn.BatchNorm2d}
