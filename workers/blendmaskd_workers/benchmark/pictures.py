"""Pictures: what the jobs of a load ask for, encoded once before it begins.

A synthetic picture is smooth with a little noise, so that its JPEG is about as large as a photograph's. Files are sent
as paths that the daemon reads itself, or decoded here and sent in another encoding.
"""
from __future__ import annotations

import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from blendmaskd import protocol
from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels
from blendmaskd.programs.errors import UsageError
from blendmaskd.settings import Limits
from blendmaskd_workers.engines import timed

Encoding = Literal["raw", "jpeg", "png", "path"]
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Picture:
    """One image, as its jobs describe it."""

    image: protocol.Image
    payload: bytes | None  # None: the daemon reads it by its path
    checksum: int  # as the timed engine answers

    def pixels(self) -> Pixels:
        """HxWx3 uint8 BGR, as the worker will see them."""
        payload = Path(self.image.path or "").read_bytes() if self.payload is None else self.payload
        if self.image.kind == "raw":
            return np.frombuffer(payload, np.uint8).reshape(self.image.shape or ())
        return images.bgr(images.decode(payload, Limits()))


def synthetic(size: tuple[int, int], encoding: Encoding) -> Picture:
    """The same picture for the same size (height, width)."""
    height, width = size
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (max(height // 32, 2), max(width // 32, 2), 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.int16)
    pixels = (smooth + rng.integers(-6, 7, smooth.shape, np.int16)).clip(0, 255).astype(np.uint8)
    return _encoded(pixels, encoding)


def from_file(path: Path, encoding: Encoding) -> Picture:
    """Raises `UsageError` for a file that cannot be read or is no image."""
    try:
        pixels = images.bgr(images.decode(path.read_bytes(), Limits()))
    except (ImageError, OSError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if encoding != "path":
        return _encoded(pixels, encoding)
    return _picture(protocol.Image(kind="path", path=os.path.abspath(path)), None)


def _encoded(pixels: Pixels, encoding: Encoding) -> Picture:
    if encoding == "raw":
        height, width, _ = pixels.shape
        return _picture(protocol.Image(kind="raw", shape=(height, width, 3)), pixels.tobytes())
    file = io.BytesIO()
    rgb = Image.fromarray(np.ascontiguousarray(pixels[:, :, ::-1]))
    rgb.save(file, encoding, **({"quality": JPEG_QUALITY} if encoding == "jpeg" else {}))
    return _picture(protocol.Image(kind="encoded"), file.getvalue())


def _picture(image: protocol.Image, payload: bytes | None) -> Picture:
    unchecked = Picture(image, payload, 0)
    return replace(unchecked, checksum=timed.checksum(unchecked.pixels()))
