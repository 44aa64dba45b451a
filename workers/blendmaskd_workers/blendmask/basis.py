"""Basis module (BlendMask, Chen et al., arXiv:2001.00309, section 3.1): p3..p5 in, K score maps at stride 4 out.

Axes: N images, K bases, C channels, H x W the padded image. Module names and indices are AdelaiDet's ProtoNet.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.config import Config


def conv_block(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution, batch norm, ReLU. In inference the paper's SyncBN is plain batch norm."""
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


class BasisModule(nn.Module):
    """The bases that all instances of an image share. They have no activation.

    `seg_head` exists only in networks trained with the auxiliary semantic loss; inference never runs it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels_in, channels = config.fpn_channels, config.basis_channels
        self.refine = nn.ModuleList(conv_block(channels_in, channels) for _ in ("p3", "p4", "p5"))
        self.tower = nn.Sequential(
            *(conv_block(channels, channels) for _ in range(config.basis_convs)),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            conv_block(channels, channels),
            nn.Conv2d(channels, config.num_bases, 1),
        )
        if config.semantic_classes is not None:
            self.seg_head = nn.Sequential(
                *conv_block(channels_in, channels), *conv_block(channels, channels),
                nn.Conv2d(channels, config.semantic_classes + 1, 1),
            )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return bases (N, K, H/4, W/4) from p3, p4, p5."""
        x = self.refine[0](features[0])  # (N, C, H/8, W/8)
        for refine, feature in zip(self.refine[1:], features[1:]):
            x = x + F.interpolate(refine(feature), size=x.shape[2:], mode="bilinear", align_corners=False)
        return self.tower(x)
