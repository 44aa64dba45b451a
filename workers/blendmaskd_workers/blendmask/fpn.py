"""Feature pyramid (Lin et al., arXiv:1612.03144) with FCOS's coarse levels: strides 8 to 32 in, p3 to p5, p6 or p7 out.

Axes: N images, C channels, H x W the padded image (multiples of 32). Level k has stride 2^k; p6 and p7 round up.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.backbone import ResNet
from blendmaskd_workers.blendmask.config import Config
from blendmaskd_workers.blendmask.dla import Dla34


class CoarseLevels(nn.Module):
    """`count` levels beyond p5: p6 from p5, p7 from p6. p6 itself leaves without ReLU."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        for level in range(6, 6 + count):
            self.add_module(f"p{level}", nn.Conv2d(channels, channels, 3, stride=2, padding=1))

    def forward(self, p5: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for conv in self.children():
            levels.append(conv(F.relu(levels[-1]) if levels else p5))  # (N, C, ceil(H/2^k), ceil(W/2^k))
        return levels


class Fpn(nn.Module):
    """The whole backbone: bottom-up network, lateral and output convolutions, coarse levels.

    `forward` does what `begin` and `complete` do one after the other.
    """

    def __init__(self, config: Config, bottom_up: Dla34 | ResNet) -> None:
        super().__init__()
        channels = config.fpn_channels
        self.bottom_up = bottom_up
        self.fpn_lateral3, self.fpn_lateral4, self.fpn_lateral5 = (
            nn.Conv2d(channels_in, channels, 1) for channels_in in bottom_up.channels)
        self.fpn_output3, self.fpn_output4, self.fpn_output5 = (
            nn.Conv2d(channels, channels, 3, padding=1) for _ in bottom_up.channels)
        self.top_block = CoarseLevels(channels, len(config.strides) - 3)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self._pyramid(*self.bottom_up(images))

    def begin(self, images: Tensor) -> Tensor:
        """Return c3, what the bottom-up network gives at stride 8."""
        return self.bottom_up.begin(images)

    def complete(self, c3: Tensor) -> list[Tensor]:
        return self._pyramid(*self.bottom_up.complete(c3))

    def _pyramid(self, c3: Tensor, c4: Tensor, c5: Tensor) -> list[Tensor]:
        top5 = self.fpn_lateral5(c5)
        top4 = self.fpn_lateral4(c4) + F.interpolate(top5, scale_factor=2.0, mode="nearest")
        top3 = self.fpn_lateral3(c3) + F.interpolate(top4, scale_factor=2.0, mode="nearest")
        p3, p4, p5 = self.fpn_output3(top3), self.fpn_output4(top4), self.fpn_output5(top5)
        return [p3, p4, p5, *self.top_block(p5)]  # each (N, C, H/2^k, W/2^k), k = 3, 4, ...
