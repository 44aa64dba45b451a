"""ResNet (He et al., Deep Residual Learning, arXiv:1512.03385): images in, res3..res5 out.

Axes: N images, H x W the padded image. Module names are AdelaiDet's, so that its checkpoints load unchanged. Sums and
ReLUs overwrite what a norm gave out, which nothing else reads: new memory would cost more than the arithmetic.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.config import Config
from blendmaskd_workers.blendmask.deformable import DeformableConv
from blendmaskd_workers.blendmask.norms import Norm

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # res2..res5


class NormedConv(nn.Conv2d):
    """A convolution without bias, padded to keep the size, followed by its norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, norm: Norm, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = norm(channels_out)

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


class NormedDeformableConv(DeformableConv):
    """A deformable convolution followed by its norm."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, norm: Norm, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride)
        self.norm = norm(channels_out)

    def forward(self, x: Tensor, geometry: Tensor) -> Tensor:
        return self.norm(super().forward(x, geometry))


class Stem(nn.Module):
    """The first convolution and pooling: stride 4."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = NormedConv(3, channels, 7, norm, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu_(self.conv1(images))  # (N, 64, H/2, W/2)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)  # (N, 64, H/4, W/4)


class Block(nn.Module):
    """A residual block: its convolutions, plus the input, projected where the channels change."""

    def __init__(self, channels_in: int, channels_out: int, norm: Norm, stride: int) -> None:
        super().__init__()
        changes = channels_in != channels_out
        self.shortcut = NormedConv(channels_in, channels_out, 1, norm, stride) if changes else None

    def residual(self, x: Tensor) -> Tensor:
        """Return a tensor that is nobody else's."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu_(self.residual(x).add_(shortcut))


class BasicBlock(Block):
    """Two 3x3 convolutions (ResNet-18 and -34)."""

    def __init__(self, channels_in: int, channels_out: int, norm: Norm, stride: int) -> None:
        super().__init__(channels_in, channels_out, norm, stride)
        self.conv1 = NormedConv(channels_in, channels_out, 3, norm, stride)
        self.conv2 = NormedConv(channels_out, channels_out, 3, norm)

    def residual(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class BottleneckBlock(Block):
    """1x1, 3x3, 1x1 convolutions (ResNet-50 and deeper); `stride_in_1x1` puts the stride into the first.

    Where the 3x3 convolution is deformable, `conv2_offset` says where it samples.
    """

    def __init__(self, channels_in: int, channels_out: int, norm: Norm, stride: int, width: int,
                 stride_in_1x1: bool, deform: bool) -> None:
        super().__init__(channels_in, channels_out, norm, stride)
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = NormedConv(channels_in, width, 1, norm, stride1)
        self.conv2_offset = nn.Conv2d(width, 3 * 3 * 3, 3, stride=stride2, padding=1) if deform else None
        self.conv2 = (NormedDeformableConv if deform else NormedConv)(width, width, 3, norm, stride2)
        self.conv3 = NormedConv(width, channels_out, 1, norm)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        x = self.conv2(x) if self.conv2_offset is None else self.conv2(x, self.conv2_offset(x))
        return self.conv3(F.relu_(x))


class ResNet(nn.Module):
    """`forward`, which is `begin` and `complete`, returns res3, res4, res5 at strides 8, 16, 32, of `channels` each."""

    def __init__(self, config: Config, norm: Norm) -> None:
        super().__init__()
        res2, res3, res4, res5 = (config.res2_channels * factor for factor in (1, 2, 4, 8))
        self.channels = (res3, res4, res5)
        self.stem = Stem(config.stem_channels, norm)

        def block(channels_in: int, channels: int, stride: int, deform: bool) -> Block:
            if config.depth < 50:
                return BasicBlock(channels_in, channels, norm, stride)
            width = config.res2_width * channels // res2
            return BottleneckBlock(channels_in, channels, norm, stride, width, config.stride_in_1x1, deform)

        def stage(index: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
            blocks = range(BLOCKS[config.depth][index])
            deforms = [config.deformable[index] and i % config.deformable_interval == 0 for i in blocks]
            first = block(channels_in, channels, stride, deforms[0])
            return nn.Sequential(first, *(block(channels, channels, 1, deform) for deform in deforms[1:]))

        self.res2 = stage(0, config.stem_channels, res2, stride=1)
        self.res3 = stage(1, res2, res3, stride=2)
        self.res4 = stage(2, res3, res4, stride=2)
        self.res5 = stage(3, res4, res5, stride=2)

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return self.complete(self.begin(images))

    def begin(self, images: Tensor) -> Tensor:
        """Return res3 (N, 2C, H/8, W/8)."""
        return self.res3(self.res2(self.stem(images)))

    def complete(self, res3: Tensor) -> Sequence[Tensor]:
        res4 = self.res4(res3)  # (N, 4C, H/16, W/16)
        return res3, res4, self.res5(res4)  # (N, 8C, H/32, W/32)
