"""ResNet with frozen batch norm (He et al., Deep Residual Learning, arXiv:1512.03385): images in, res3..res5 out.

Axes: N images, H x W the padded image. Module names are AdelaiDet's, so that its checkpoints load unchanged.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPSILON = 1e-5
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # res2..res5
STEM_CHANNELS = 64


class FrozenBatchNorm(nn.Module):
    """Batch norm whose scale, shift and statistics are constants: buffers, never trained, never updated."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=NORM_EPSILON)


class NormedConv(nn.Conv2d):
    """A convolution without bias, padded to keep the size, followed by its frozen norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = FrozenBatchNorm(channels_out)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class Stem(nn.Module):
    """The first convolution and pooling: stride 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, channels, 7, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.conv1(images))  # (N, 64, H/2, W/2)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # (N, 64, H/4, W/4)


class Block(nn.Module):
    """A residual block: its convolutions, plus the input, projected where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.shortcut = NormedConv(channels_in, channels_out, 1, stride) if channels_in != channels_out else None

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(self.residual(x) + shortcut)


class BasicBlock(Block):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__(channels_in, channels_out, stride)
        self.conv1 = NormedConv(channels_in, channels_out, 3, stride)
        self.conv2 = NormedConv(channels_out, channels_out, 3)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class BottleneckBlock(Block):
    """1x1, 3x3, 1x1 convolutions (ResNet-50 and deeper); `stride_in_1x1` puts the stride into the first."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, stride_in_1x1: bool) -> None:
        super().__init__(channels_in, channels_out, stride)
        width = channels_out // 4
        self.conv1 = NormedConv(channels_in, width, 1, stride if stride_in_1x1 else 1)
        self.conv2 = NormedConv(width, width, 3, 1 if stride_in_1x1 else stride)
        self.conv3 = NormedConv(width, channels_out, 1)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class ResNet(nn.Module):
    """`forward` returns res3, res4, res5 at strides 8, 16, 32, with the channels listed in `channels`."""

    def __init__(self, depth: int, stride_in_1x1: bool) -> None:
        super().__init__()
        bottleneck = depth >= 50
        width = 256 if bottleneck else 64
        self.channels = (2 * width, 4 * width, 8 * width)  # of res3, res4, res5
        self.stem = Stem(STEM_CHANNELS)

        def stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
            first = _block(channels_in, channels, stride, bottleneck, stride_in_1x1)
            return nn.Sequential(
                first, *(_block(channels, channels, 1, bottleneck, stride_in_1x1) for _ in range(blocks - 1)))

        blocks2, blocks3, blocks4, blocks5 = BLOCKS[depth]
        self.res2 = stage(blocks2, STEM_CHANNELS, width, stride=1)
        self.res3 = stage(blocks3, width, 2 * width, stride=2)
        self.res4 = stage(blocks4, 2 * width, 4 * width, stride=2)
        self.res5 = stage(blocks5, 4 * width, 8 * width, stride=2)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        res2 = self.res2(self.stem(images))  # (N, C, H/4, W/4)
        res3 = self.res3(res2)  # (N, 2C, H/8, W/8)
        res4 = self.res4(res3)  # (N, 4C, H/16, W/16)
        res5 = self.res5(res4)  # (N, 8C, H/32, W/32)
        return res3, res4, res5


def _block(channels_in: int, channels_out: int, stride: int, bottleneck: bool, stride_in_1x1: bool) -> Block:
    if bottleneck:
        return BottleneckBlock(channels_in, channels_out, stride, stride_in_1x1)
    return BasicBlock(channels_in, channels_out, stride)
