"""Images: a job's payload as a photograph, upright, 8 bits a channel: the network's input before resizing.

An encoded one stays as its decoder left it, Pillow's, in RGB; a raw one stays where it lies. `rgb` and `bgr` give
either in one form, for a copy, which nobody pays for who only needs it small.

Pixels are those of detectron2's ``read_image(format="BGR")`` where that reads an image right: first frame, upright by
its EXIF orientation, RGB by Pillow's conversion, channels reversed. docs/client.md says what becomes of what; which
formats are read decides `blendmaskd.images.pixel_formats`. This is the only decoder: of workers, programs, overlays,
training.

Rules: what comes in is untrusted. Its size is checked from the header before a pixel is decoded, and what else it may
cost by `blendmaskd.images.bombs`; whatever is wrong with it leaves as an `ImageError`, the only exception here.
Arrays may be read-only views: copy before writing. Must never fetch anything, and never open a file that does not lie
below a root that the settings allow.
"""
from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from blendmaskd.images import bombs, pixel_formats
from blendmaskd.images.pixel_formats import Depth, UnreadFormat
from blendmaskd.protocol import Code
from blendmaskd.settings import Limits

MOST_SIDE = 65_535  # pixels, as a JPEG's; resizing a longer strip takes more memory than all of its pixels
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

OWN_LIMITS = Limits(max_image_bytes=1 << 31, max_image_pixels=500_000_000)  # of programs: the images are their user's

# EXIF orientation to what turns the image upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) BGR
Photograph = Image.Image | Pixels  # of mode RGB
Payload = bytes | bytearray | memoryview

# `Limits` decides here what is too large. Pillow's own bound would warn below it, or refuse in other words.
Image.MAX_IMAGE_PIXELS = None


class ImageError(ValueError):
    """An image that cannot be segmented: `code` is bad-image, too-large or bad-request, `reason` says what is wrong."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def decode(payload: Payload, limits: Limits) -> Image.Image:
    """An encoded image (JPEG, PNG, WebP, BMP or TIFF), decoded, of mode RGB.

    Raises `ImageError`: too-large over either limit and for bombs, else bad-image, which names a pixel format that is
    not read.
    """
    encoded = memoryview(payload).cast("B")
    _check_bytes(len(encoded), limits)
    if len(encoded) == 0:
        raise ImageError(Code.BAD_IMAGE, "the image is empty (0 bytes)")
    try:
        whole = bytes(encoded)  # a client may change its shared memory: no decoder may see that after it has checked it
        if (canvas := bombs.canvas(whole)) is not None:
            _check_pixels(*canvas, limits)
        depth = pixel_formats.check(whole)
        with Image.open(bombs.as_file(whole), formats=FORMATS) as image:
            _check_pixels(image.height, image.width, limits)
            bombs.check(image, whole, limits.max_image_pixels)
            pixel_formats.check_opened(image, whole)
            return _upright(image, depth)
    except ImageError:
        raise
    except bombs.Bomb as bomb:
        raise ImageError(Code.TOO_LARGE, str(bomb)) from None
    except UnreadFormat as unread:
        raise ImageError(Code.BAD_IMAGE, str(unread)) from None
    except UnidentifiedImageError:
        start = encoded[:8].hex(" ")
        reason = f"not a JPEG, PNG, WebP, BMP or TIFF image, or its header is damaged (it starts with {start})"
        raise ImageError(Code.BAD_IMAGE, reason) from None
    except Exception as error:  # decoders raise whatever their parsing runs into, struct.error and SyntaxError included
        raise ImageError(Code.BAD_IMAGE, f"cannot be decoded: {_why(error)}") from error


def _why(error: Exception) -> str:
    text = str(error)
    if text.startswith("decoder error"):  # all that Pillow says of a TIFF which libtiff cannot read to its end
        return "its pixels are damaged or cut off"
    return text or type(error).__name__


def read(path: str | os.PathLike[str]) -> Image.Image:
    """A file of the user's own, as `decode` gives it. Raises `ImageError`, and OSError."""
    with open(path, "rb") as file:
        return decode(file.read(), OWN_LIMITS)


def from_raw(payload: Payload, shape: Iterable[Any], dtype: str, order: str, limits: Limits) -> Photograph:
    """The photograph that a raw array of `shape` (height, width, 3) is, rows from the top, no padding.

    For `order` ``bgr`` a view of the payload; ``rgb`` is copied. Raises `ImageError`: too-large over either limit,
    bad-request for an unknown order, else bad-image.
    """
    if order not in ("bgr", "rgb"):
        raise ImageError(Code.BAD_REQUEST, f"order {order!r}: expected bgr or rgb")
    if dtype != "uint8":
        raise ImageError(Code.BAD_IMAGE, f"dtype {dtype!r}: expected uint8")
    height, width = _height_width(tuple(shape))
    _check_pixels(height, width, limits)
    found = memoryview(payload).nbytes
    _check_bytes(found, limits)
    if found != height * width * 3:
        reason = f"shape ({height}, {width}, 3) of uint8: expected {height * width * 3} bytes, found {found}"
        raise ImageError(Code.BAD_IMAGE, reason)
    pixels = np.frombuffer(payload, np.uint8).reshape(height, width, 3)
    return pixels if order == "bgr" else Image.fromarray(pixels)


def bgr(photograph: Photograph) -> Pixels:
    """HxWx3 uint8 BGR, perhaps read-only; a copy, or the array itself."""
    if isinstance(photograph, Image.Image):
        pixels = np.frombuffer(photograph.tobytes("raw", "BGR"), np.uint8)
        return pixels.reshape(photograph.height, photograph.width, 3)
    return photograph


def rgb(photograph: Photograph) -> Image.Image:
    """An image of mode RGB that nothing else changes: a copy, or the image itself."""
    if isinstance(photograph, Image.Image):
        return photograph
    return Image.fromarray(np.ascontiguousarray(photograph[:, :, ::-1]))


def read_path(path: str, roots: Iterable[str | os.PathLike[str]], limits: Limits) -> bytes:
    """The bytes of a file on the server that lies, links resolved, below one of `roots` (settings: `paths.roots`).

    Raises `ImageError`: bad-request when it does not (in the same words whether it exists or not), is missing, not a
    regular file or not readable; too-large over the limit on bytes.
    """
    allowed = [os.path.abspath(root) for root in roots]
    allowed += [os.path.realpath(root) for root in allowed]
    resolved = os.path.realpath(path) if _is_plain(path) and _below(path, allowed) else ""
    if not _below(resolved, allowed):
        raise ImageError(Code.BAD_REQUEST, "the path is not below a root that the settings allow (paths.roots)")
    try:
        return _read_regular(resolved, allowed, limits)
    except OSError as error:
        raise ImageError(Code.BAD_REQUEST, f"{path}: {error.strerror}") from None


def _read_regular(resolved: str, allowed: list[str], limits: Limits) -> bytes:
    # Without O_NONBLOCK, opening a FIFO waits for somebody to write to it.
    descriptor = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        # A folder of the path may have become a link since it was resolved.
        if not stat.S_ISREG(found.st_mode) or not _below(os.path.realpath(f"/proc/self/fd/{descriptor}"), allowed):
            raise ImageError(Code.BAD_REQUEST, f"{resolved}: not a regular file")
        _check_bytes(found.st_size, limits)
        with open(descriptor, "rb", closefd=False) as file:
            payload = file.read(limits.max_image_bytes + 1)  # it may have grown
    finally:
        os.close(descriptor)
    _check_bytes(len(payload), limits)
    return payload


def _upright(image: Image.Image, depth: Depth) -> Image.Image:
    image.load()  # before the orientation is read: a TIFF turns itself upright here
    if image.mode.startswith("I;16"):
        upper = (np.asarray(image) >> (depth.bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - upper if depth.white_is_zero else upper)
    upright = _UPRIGHT.get(_orientation(image))
    if upright is not None:
        image = image.transpose(upright)
    image.info.pop("transparency", None)  # Pillow warns that it gets lost
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF: the pixels are good, and detectron2 shows them as they are
        return 1
    return found if isinstance(found, int) else 1


def _height_width(shape: tuple[Any, ...]) -> tuple[int, int]:
    plain = len(shape) == 3 and {*map(type, shape)} == {int}
    if not plain or shape[2] != 3 or shape[0] < 1 or shape[1] < 1:
        raise ImageError(Code.BAD_IMAGE, f"shape {list(shape)}: expected [height, width, 3]")
    return shape[0], shape[1]


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_image_bytes:
        reason = f"{count} bytes are over the limit of {limits.max_image_bytes} (limits.max_image_bytes)"
        raise ImageError(Code.TOO_LARGE, reason)


def _check_pixels(height: int, width: int, limits: Limits) -> None:
    if max(height, width) > MOST_SIDE:
        raise ImageError(Code.TOO_LARGE, f"{width}x{height} pixels: no side may be longer than {MOST_SIDE}")
    if height * width > limits.max_image_pixels:
        reason = f"{width}x{height} pixels are over the limit of {limits.max_image_pixels} (limits.max_image_pixels)"
        raise ImageError(Code.TOO_LARGE, reason)


def _is_plain(path: str) -> bool:
    """Absolute, and without the `..` that would let a client ask which links exist outside the roots."""
    return os.path.isabs(path) and "\0" not in path and ".." not in path.split("/")


def _below(path: str, roots: Iterable[str]) -> bool:
    return any(path.startswith(root.rstrip("/") + "/") for root in roots)
