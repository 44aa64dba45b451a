"""DLA-34 (Yu et al., Deep Layer Aggregation, arXiv:1707.06484): images in, level3..level5 out.

Axes: N images, H x W the padded image. Level k has stride 2^k. Module names are those of the paper's own program,
which AdelaiDet kept, so that its checkpoints load unchanged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.norms import Norm

CHANNELS = (16, 32, 64, 128, 256, 512)  # of level0..level5


def conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded to keep the size."""
    return nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)


def conv_block(channels_in: int, channels_out: int, kernel: int, stride: int, norm: Norm) -> nn.Sequential:
    """Convolution, norm, ReLU."""
    return nn.Sequential(conv(channels_in, channels_out, kernel, stride), norm(channels_out), nn.ReLU(inplace=True))


class Block(nn.Module):
    """Two 3x3 convolutions plus a shortcut that the tree provides."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = conv(channels_in, channels, 3, stride)
        self.bn1 = norm(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = norm(channels)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return F.relu_(self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x))))).add_(shortcut))


class Root(nn.Module):
    """Aggregation: a 1x1 convolution over everything that meets here."""

    def __init__(self, channels_in: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = conv(channels_in, channels, 1)
        self.bn = norm(channels)

    def forward(self, *branches: Tensor) -> Tensor:
        return F.relu_(self.bn(self.conv(torch.cat(branches, dim=1))))


def projection(channels_in: int, channels: int, norm: Norm) -> nn.Module:
    """Bring a shortcut to the channels of what it is added to."""
    if channels_in == channels:
        return nn.Identity()
    return nn.Sequential(conv(channels_in, channels, 1), norm(channels))


class Tree(nn.Module):
    """Two blocks and the root that joins them, with `extra` channels from further up if the caller has such."""

    def __init__(self, channels_in: int, channels: int, stride: int, extra: int, norm: Norm) -> None:
        super().__init__()
        self.stride = stride
        self.project = projection(channels_in, channels, norm)
        self.tree1 = Block(channels_in, channels, stride, norm)
        self.tree2 = Block(channels, channels, 1, norm)
        self.root = Root(2 * channels + extra, channels, norm)

    def forward(self, x: Tensor, *extra: Tensor) -> Tensor:
        first = self.tree1(x, self.project(F.max_pool2d(x, self.stride)))
        second = self.tree2(first, first)
        return self.root(second, first, *extra)


class DeepTree(nn.Module):
    """Two trees at stride 2; the root of the second also sees the halved input and the first tree.

    `project` takes no part: the reference computes it and throws it away, and its checkpoints have its weights.
    """

    def __init__(self, channels_in: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.project = projection(channels_in, channels, norm)
        self.tree1 = Tree(channels_in, channels, 2, 0, norm)
        self.tree2 = Tree(channels, channels, 1, channels_in + channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        first = self.tree1(x)
        return self.tree2(first, F.max_pool2d(x, 2), first)


class Dla34(nn.Module):
    """`forward` returns level3, level4, level5 at strides 8, 16, 32, with the channels listed in `channels`."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        c0, c1, c2, c3, c4, c5 = CHANNELS
        self.channels = (c3, c4, c5)
        self.base_layer = conv_block(3, c0, 7, 1, norm)
        self.level0 = conv_block(c0, c0, 3, 1, norm)
        self.level1 = conv_block(c0, c1, 3, 2, norm)
        self.level2 = Tree(c1, c2, 2, 0, norm)
        self.level3 = DeepTree(c2, c3, norm)
        self.level4 = DeepTree(c3, c4, norm)
        self.level5 = Tree(c4, c5, 2, c4, norm)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.complete(self.begin(images))

    def begin(self, images: Tensor) -> Tensor:
        """Return level 3 (N, 128, H/8, W/8)."""
        level1 = self.level1(self.level0(self.base_layer(images)))  # (N, 32, H/2, W/2)
        return self.level3(self.level2(level1))  # level 2 is (N, 64, H/4, W/4)

    def complete(self, level3: Tensor) -> Sequence[Tensor]:
        level4 = self.level4(level3)  # (N, 256, H/16, W/16)
        return level3, level4, self.level5(level4, F.max_pool2d(level4, 2))  # (N, 512, H/32, W/32)
