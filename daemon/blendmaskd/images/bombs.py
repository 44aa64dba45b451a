"""Bombs: small images that cost far more than their pixels to open or to decode. Each is refused before it goes off.

The bound on pixels holds what a picture takes; these hold what its file may ask for besides. Each was measured with a
file below the bound on bytes, at Pillow 13 (`tests/daemon/test_bombs.py` has them, small):

================  ==================================================================  =========================
in                what it does                                                        bound
================  ==================================================================  =========================
any               millions of tiny pieces, each a step in Python: 44 s, 0.6 GB        `MOST_READS`
JPEG              its EXIF in hundreds of segments, joined one by one: 27 s           `MOST_EXIF_SEGMENTS`
JPEG              thousands of scans of 70 bytes, each over all pixels: hours         `MOST_PASSES`
BMP               run lengths, expanded in Python with its interpreter lock: 5 s      `MOST_RUN_LENGTH_PIXELS`
TIFF, any EXIF    millions of numbers that become Python objects: 30 s, 2 GB          `MOST_NUMBER_BYTES`
TIFF              tiles larger than the picture, decoded in full: 2 GB, hours         pixels, in whole tiles
TIFF              65,000 strips that share one megabyte of deflate: hours             together, bytes of the file
WebP              a canvas that is cleared, twice, as soon as the file is opened: 2 GB  `canvas`, before that
================  ==================================================================  =========================

Not bounded here: the code tables of a lossless WebP, 65,536 times five, of which the file says nothing before it is
decoded: 0.3 GB in 290 KB of file, 0.8 GB at most. What others bound is left to them: Pillow, from version 13 on, text
and ICC chunks that inflate and directories whose entries overlap; libtiff the scans of each JPEG in a TIFF, at 100.
Must never decode a pixel.
"""
from __future__ import annotations

import io
import itertools
import re
import struct
from typing import IO

from PIL import BmpImagePlugin, Image, TiffImagePlugin

MOST_READS = 500_000  # by Pillow's Python code, about a second; a PNG's chunk takes four, a run length of a BMP two
MOST_EXIF_SEGMENTS = 100  # of 64 KB
MOST_PASSES = 50  # over as many pixels as the settings allow; a progressive JPEG usually has ten scans
MOST_RUN_LENGTH_PIXELS = 4_000_000  # about half a second
MOST_NUMBER_BYTES = 512 << 10  # in one directory; 65536 strips, twice what the tallest usual file has

# All that libjpeg takes for the start of a scan, wherever it comes upon it: the length must fit the components.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_EXIF = re.compile(rb"\xff\xe1..Exif\0\0", re.DOTALL)
_OPAQUE = (1, 2, 7)  # types of a directory's entries that stay bytes, or become one text: byte, ascii, undefined
_SIZES = {"TileWidth": 322, "TileLength": 323}
_LENGTHS = {"StripByteCounts": 279, "TileByteCounts": 325}
_PIECES = {"StripOffsets": 273, "TileOffsets": 324, **_LENGTHS}
_UNSIGNED = (3, 4, 16)  # types of a directory's entries: SHORT, LONG, LONG8


class Bomb(ValueError):
    """Decoding this would cost more than the limits allow; the text says what."""


def as_file(encoded: bytes) -> io.BytesIO:
    """An encoded image for `Image.open`, whose `read` raises `Bomb` too. Raises `Bomb`."""
    if encoded.startswith(b"\xff\xd8") and _has_more(_EXIF, encoded, MOST_EXIF_SEGMENTS):
        raise Bomb(f"more than {MOST_EXIF_SEGMENTS} segments of EXIF data")
    return _Reader(encoded)


def _has_more(pattern: re.Pattern[bytes], encoded: bytes, most: int) -> bool:
    """Whether it is there more often; all that is found would take ten times the file."""
    return next(itertools.islice(pattern.finditer(encoded), most, None), None) is not None


class _Reader(io.BytesIO):
    """Raises `Bomb` for who reads it in too many pieces."""

    def __init__(self, encoded: bytes) -> None:
        super().__init__(encoded)
        self._reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
            raise Bomb(f"it has more than {MOST_READS} pieces (chunks, segments or run lengths)")
        return super().read(size)


class _Directory(TiffImagePlugin.ImageFileDirectory_v2):
    """A directory of a TIFF or of EXIF data; numbers beyond a sensible amount are dropped like damaged ones."""

    def load(self, fp: IO[bytes]) -> None:
        super().load(fp)
        left = MOST_NUMBER_BYTES
        for tag, data in list(self._tagdata.items()):
            left -= 0 if self.tagtype[tag] in _OPAQUE else len(data)
            if left < 0:
                del self._tagdata[tag]


# Pillow reads such directories in many places, EXIF already while it opens a file. This is the one that all share.
TiffImagePlugin.ImageFileDirectory_v2 = _Directory  # type: ignore[misc]


def canvas(encoded: bytes) -> tuple[int, int] | None:
    """Height and width that a WebP's decoder would make room for; None for what is none."""
    if encoded[:4] != b"RIFF" or encoded[8:12] != b"WEBP" or len(encoded) < 30:
        return None
    match encoded[12:16]:  # the decoder takes no other chunk for the first
        case b"VP8X":
            width, height = (1 + int.from_bytes(encoded[place : place + 3], "little") for place in (24, 27))
        case b"VP8L":
            bits = int.from_bytes(encoded[21:25], "little")
            width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            width, height = (int.from_bytes(encoded[place : place + 2], "little") & 0x3FFF for place in (26, 28))
        case _:
            return None
    return height, width


def directory(encoded: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The first one of a TIFF, as Pillow will read it. Raises `Bomb`, and whatever a damaged header runs into."""
    file = as_file(encoded)
    found = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if 43 in encoded[2:4] else 8))
    file.seek(found.next)
    found.load(file)
    return found


def check(image: Image.Image, encoded: bytes, max_pixels: int) -> None:
    """Before an opened image is decoded: raises `Bomb`, or ValueError for a TIFF that its readers may read differently.

    Its height and width must have been checked.
    """
    most = MOST_PASSES * max_pixels // (image.width * image.height)
    if image.format in ("JPEG", "MPO") and _has_more(_SCAN, encoded, most):
        raise Bomb(f"over {most} scans of {image.width}x{image.height} pixels are {MOST_PASSES} times the limit")
    run_lengths = isinstance(image, BmpImagePlugin.BmpImageFile) and image.tile[0][0] == "bmp_rle"
    if run_lengths and image.width * image.height > MOST_RUN_LENGTH_PIXELS:
        raise Bomb(f"{image.width}x{image.height} pixels in run lengths: at most {MOST_RUN_LENGTH_PIXELS}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, encoded, max_pixels)


def _check_tiff(image: TiffImagePlugin.TiffImageFile, encoded: bytes, max_pixels: int) -> None:
    """Tiles as Pillow understands them are checked; so libtiff, which decodes, must understand them alike."""
    directory = image.tag_v2
    written = tags(encoded, directory)
    for name, tag in {**_SIZES, **_PIECES}.items():
        if written.count(tag) > 1:
            raise ValueError(f"{name} is there more than once")
        if tag in written and (tag not in directory or directory.tagtype[tag] not in _UNSIGNED):
            raise ValueError(f"{name} is damaged, or has too many values")
    if any(tag in directory for tag in _SIZES.values()):
        _check_tiles(directory, max_pixels)
    _check_pieces(directory, len(encoded))


def _check_tiles(directory: TiffImagePlugin.ImageFileDirectory_v2, max_pixels: int) -> None:
    sides = []
    for side_tag, tile_tag in ((256, 322), (257, 323)):
        side, tile = directory[side_tag], directory.get(tile_tag)
        if not isinstance(tile, int) or tile < 1:
            raise ValueError("the size of its tiles is damaged")
        sides.append(-(-side // tile) * tile)
    if sides[0] * sides[1] > max_pixels:
        raise Bomb(f"{sides[0]}x{sides[1]} pixels in whole tiles are over the limit of {max_pixels}")


def _check_pieces(directory: TiffImagePlugin.ImageFileDirectory_v2, most: int) -> None:
    """Strips and tiles may lie over each other, and each is decompressed: no byte of the file may count twice."""
    lengths = [directory.get(tag, ()) for tag in _LENGTHS.values()]
    together = sum(sum(each) if isinstance(each, tuple) else each for each in lengths)
    if together > most:
        raise ValueError(f"its strips or tiles are {together} bytes in a file of {most}: shared, or cut off")


def tags(encoded: bytes, directory: TiffImagePlugin.ImageFileDirectory_v2) -> list[int]:
    """All that its first directory names, in the file's order, readable or not."""
    order = ">" if directory.prefix == b"MM" else "<"
    count, size = ("Q", 20) if 43 in encoded[2:4] else ("H", 12)
    [entries] = struct.unpack_from(order + count, encoded, directory.offset)
    start = directory.offset + struct.calcsize(order + count)
    return [struct.unpack_from(order + "H", encoded, place)[0] for place in range(start, start + entries * size, size)]
