"""From a photograph to network input, as detectron2's DefaultPredictor does it: resize, normalise, pad.

`prepare` is host work and leaves bytes, a quarter of what `collate` makes of them where the network lives.

Axes: H x W pixels, N images. The network's pixels are those of the resized image; padding is bottom and right.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from blendmaskd_workers.blendmask.config import SIZE_DIVISOR, Config

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # Pillow's, which is only read here

Photograph = Image.Image | npt.NDArray[np.uint8]  # of mode RGB, or (H, W, 3) BGR


@dataclass(frozen=True)
class Prepared:
    """One image, ready to be batched."""

    tensor: Tensor  # (3, h, w) uint8 on the CPU, in the network's order of channels
    image_size: tuple[int, int]  # height, width of the photograph
    net_size: tuple[int, int]  # h, w after resizing
    padded_size: tuple[int, int]  # H, W once padded by itself: batch together only images in which these agree


def prepare(photograph: Photograph, config: Config, fast: bool = False) -> Prepared:
    """Resize a photograph. Safe to call from several threads.

    As detectron2 does, by Pillow; `fast`: by torch, with which up to four of a thousand of a photograph's
    values are off by one (of noise one in a hundred, and hardly any by two).

    Raises ValueError for an image of another mode, an array of another kind, or one without pixels.
    """
    image, bands = _as_pillows(photograph)
    image_size = image.height, image.width
    height, width = resized_size(*image_size, config)
    if fast and image.size != (width, height):
        image = _resized_by_torch(image, height, width)
    elif image.size != (width, height):  # Pillow would copy it
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    planes = bytearray().join(image.tobytes("raw", bands[channel]) for channel in config.channel_order)
    return Prepared(
        tensor=torch.frombuffer(planes, dtype=torch.uint8).view(3, height, width),
        image_size=image_size,
        net_size=(height, width),
        padded_size=(_padded(height), _padded(width)),
    )


def _as_pillows(photograph: Photograph) -> tuple[Image.Image, dict[str, str]]:
    """An image of Pillow's, and what it takes each channel for: turning them is cheaper when it is small."""
    if isinstance(photograph, Image.Image):
        if photograph.mode != "RGB":
            raise ValueError(f"expected an image of mode RGB, got {photograph.mode}")
        return photograph, {"R": "R", "G": "G", "B": "B"}
    array = photograph
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise ValueError(f"expected a uint8 image (H, W, 3) in BGR, got {array.dtype} {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array)), {"R": "B", "G": "G", "B": "R"}


def _resized_by_torch(image: Image.Image, height: int, width: int) -> Image.Image:
    pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)[None]
    small = functional.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
    return Image.fromarray(np.ascontiguousarray(small[0].permute(1, 2, 0).numpy()))


def resized_size(height: int, width: int, config: Config) -> tuple[int, int]:
    """Return height and width after the shorter side became `min_size` or, if that is less, the longer `max_size`.

    Sides never vanish: where the reference would round a side of an extreme strip to 0 and fail, it is 1 pixel.
    """
    scale = config.min_size / min(height, width)
    if height < width:
        new_height, new_width = float(config.min_size), scale * width
    else:
        new_height, new_width = scale * height, float(config.min_size)
    longer = max(new_height, new_width)
    if longer > config.max_size:
        shrink = config.max_size / longer
        new_height, new_width = new_height * shrink, new_width * shrink
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def collate(images: Sequence[Tensor], config: Config) -> Tensor:
    """Return prepared images (3, h, w) uint8 as one float32 tensor (N, 3, H, W), where they are.

    They are normalised, then padded with zeros to the largest and to multiples of 32. Where the images' padded sizes
    differ, their results depend on each other (GroupNorm sees the padding), exactly as in the reference: a server
    batches only images whose `padded_size` is equal.
    """
    height, width = (_padded(max(image.shape[axis] for image in images)) for axis in (1, 2))
    mean, std = (_per_channel(values, images[0].device) for values in (config.pixel_mean, config.pixel_std))
    batch = torch.zeros(len(images), 3, height, width, device=images[0].device)
    for image, place in zip(images, batch):
        torch.sub(image, mean, out=place[:, : image.shape[1], : image.shape[2]])
    return batch.div_(std)


@functools.cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def _padded(side: int) -> int:
    return -(-side // SIZE_DIVISOR) * SIZE_DIVISOR
