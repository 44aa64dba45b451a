"""Feature pyramid (Lin et al., arXiv:1612.03144) with FCOS's two coarse levels: res3..res5 in, p3..p7 out.

Axes: N images, C channels, H x W the padded image (multiples of 32). Level k has stride 2^k; p6 and p7 round up.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class CoarseLevels(nn.Module):
    """p6 from p5 and p7 from p6. p6 itself leaves without ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, p5: Tensor) -> tuple[Tensor, Tensor]:
        p6 = self.p6(p5)  # (N, C, ceil(H/64), ceil(W/64))
        return p6, self.p7(F.relu(p6))


class Fpn(nn.Module):
    """The whole backbone: bottom-up network, lateral and output convolutions, coarse levels."""

    def __init__(self, bottom_up: nn.Module, channels_in: Sequence[int], channels: int) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.fpn_lateral3, self.fpn_lateral4, self.fpn_lateral5 = (nn.Conv2d(c, channels, 1) for c in channels_in)
        self.fpn_output3, self.fpn_output4, self.fpn_output5 = (
            nn.Conv2d(channels, channels, 3, padding=1) for _ in channels_in)
        self.top_block = CoarseLevels(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        res3, res4, res5 = self.bottom_up(images)
        top5 = self.fpn_lateral5(res5)
        top4 = self.fpn_lateral4(res4) + F.interpolate(top5, scale_factor=2.0, mode="nearest")
        top3 = self.fpn_lateral3(res3) + F.interpolate(top4, scale_factor=2.0, mode="nearest")
        p3, p4, p5 = self.fpn_output3(top3), self.fpn_output4(top4), self.fpn_output5(top5)
        return [p3, p4, p5, *self.top_block(p5)]  # each (N, C, H/2^k, W/2^k), k = 3..7
