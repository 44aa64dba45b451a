"""Small files that ask for much, each as large as some limits let it be; see `blendmaskd.images.bombs` for what holds
them.

`make(name, limits)` builds one. Those in `REFUSED` must be refused; the others cost no more than their pixels.
"""
from __future__ import annotations

import lzma
import random
import re
import struct
import zlib
from collections.abc import Callable
from functools import partial

from PIL import Image

from blendmaskd.images.decoding import MOST_SIDE
from blendmaskd.settings import Limits
from fuzz.pictures import bmp, chunk, png, saved
from fuzz.tiffs import DEFLATE, LONG, LZMA, LZW, NONE, PACKBITS, SHORT, Entry, Fields, assemble, lay_out, tiff

_CLEARS = int("100000000" * 8, 2).to_bytes(9)  # of LZW, in codes of nine bits


def make(name: str, limits: Limits) -> bytes:
    return {**REFUSED, **COSTLY}[name](limits)


def deflated(count: int) -> bytes:
    """So many zeros."""
    compressor = zlib.compressobj(9)
    block = bytes(1 << 20)
    parts = [compressor.compress(block[: min(count - start, 1 << 20)]) for start in range(0, count, 1 << 20)]
    return b"".join(parts) + compressor.flush()


def _side(limits: Limits) -> int:
    """Of a square just below the limit on pixels."""
    return int(limits.max_image_pixels**0.5)


def _noise(count: int) -> bytes:
    return random.Random(3).randbytes(count)


def _inflating(kind: bytes, limits: Limits) -> bytes:
    return chunk(kind, b"a\0\0" + deflated(20 * limits.max_image_bytes))


def _texts(_: Limits) -> bytes:
    """As much as Pillow allows, 64 MiB in texts of 1 MiB."""
    text = deflated((1 << 20) - 9)
    return _small(before=b"".join(chunk(b"zTXt", b"a%d\0\0" % number + text) for number in range(63)))


def _small(**extras: bytes) -> bytes:
    return png(10, 10, deflated(310), **extras)  # type: ignore[arg-type]


def _full(depth: int, colour: int, samples: int, interlace: int, limits: Limits) -> bytes:
    side = _side(limits)
    rows = deflated(side * (1 + side * samples * depth // 8) + interlace * 16 * side)
    return png(side, side, rows, depth=depth, colour=colour, interlace=interlace)


def _empty(kind: bytes, limits: Limits) -> bytes:
    return chunk(kind, b"") * (limits.max_image_bytes // 13)


def _runs(pair: bytes, limits: Limits) -> bytes:
    return bmp(2000, 2000, pair * (limits.max_image_bytes // 2 - 1000), compression=1)


def _lines(limits: Limits) -> bytes:
    height = limits.max_image_pixels // MOST_SIDE
    return bmp(MOST_SIDE, height, b"\1\1\0\0" * height, compression=1)


def _nibbles(limits: Limits) -> bytes:
    side = _side(limits)
    row = b"\xff\1" * (side // 255) + b"\0\0"
    return bmp(side, side, row * side + b"\0\1", bits=4, compression=2)


def _delta(limits: Limits) -> bytes:
    return bmp(MOST_SIDE, limits.max_image_pixels // MOST_SIDE, b"\0\2\1\xff" * 8, compression=1)


def scans(side: int, most: int) -> bytes:
    """A grey JPEG of black, with so many scans over all of it."""
    whole = saved(Image.new("L", (side, side)), "JPEG", progressive=True)
    starts = [match.start() for match in re.finditer(rb"\xff\xda", whole)]
    return whole[:-2] + whole[starts[-1] : -2] * (most - len(starts)) + b"\xff\xd9"


def _exif_segments(limits: Limits) -> bytes:
    whole = saved(Image.new("RGB", (16, 16)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 5008) + b"Exif\0\0" + bytes(5000)
    return whole[:2] + segment * (limits.max_image_bytes // 5100) + whole[2:]


def _grey(width: int, height: int, compression: int, tile: tuple[int, int] | None = None) -> Fields:
    """The fields of a grey TIFF in tiles of this width and height, or in strips of a row."""
    pieces = {278: 1} if tile is None else {322: tile[0], 323: tile[1]}
    fields = {256: width, 257: height, 258: 8, 259: compression, 262: 1, **pieces}
    return {tag: (LONG, (value,)) for tag, value in fields.items()}


def _tile(limits: Limits) -> bytes:
    side = min(2 * _side(limits), 30_000)
    return assemble(_grey(100, 100, DEFLATE, (side, side)), [deflated(side * side)])


def _tiles(_: Limits) -> bytes:
    """A strip one pixel wide, in tiles 65520 wide that all lie at one place."""
    data, count = deflated(65520 * 16), 4000
    return lay_out(_grey(1, 16 * count, DEFLATE, (65520, 16)), [0] * count, [len(data)] * count, data)


def _strips(compression: int, data: bytes, limits: Limits) -> bytes:
    """A strip for each row of each colour, all at one place, and named last: what follows them would be dropped too."""
    rows = min(limits.max_image_bytes // 30, limits.max_image_pixels // 4, MOST_SIDE)
    lengths = struct.pack("<I", len(data)) * 3 * rows
    entries: list[Entry] = [
        (256, 4, 1, 4), (257, 4, 1, rows), (258, 3, 3, struct.pack("<3H", 8, 8, 8)), (262, 3, 1, 2), (277, 3, 1, 3),
        (284, 3, 1, 2), (259, 3, 1, compression), (278, 4, 1, 1), (279, 4, 3 * rows, lengths),
    ]
    start = len(tiff([*entries, (273, 4, 3 * rows, lengths)]))
    return tiff([*entries, (273, 4, 3 * rows, struct.pack("<I", start) * 3 * rows)], data)


def _shared_strips(limits: Limits) -> bytes:
    """Strips of a row, all at one place: half of the file, in which libtiff turns each byte before it inflates one."""
    count, data = 8000, deflated(1).ljust(limits.max_image_bytes // 2, b"\0")
    fields = {**_grey(1, count, DEFLATE), 266: (SHORT, (2,))}
    return lay_out(fields, [0] * count, [len(data)] * count, data)


def _shared_tiles(limits: Limits) -> bytes:
    """Tiles of 16x16, each a byte further on in one piece of LZW that goes nowhere: clear, clear, clear."""
    count = min(limits.max_image_pixels // 1000, 4000)
    data = _CLEARS * (limits.max_image_bytes // 2 // len(_CLEARS))
    lengths = [len(data) - 9 * count] * count
    return lay_out(_grey(16, 16 * count, LZW, (16, 16)), range(0, 9 * count, 9), lengths, data)


def _many_strips(compression: int, row: bytes, limits: Limits) -> bytes:
    """As many strips as a picture may have, each with bytes of its own."""
    count = min(65_000, limits.max_image_pixels // 8)
    return assemble(_grey(8, count, compression), [row] * count)


def _depths(limits: Limits) -> bytes:
    count = limits.max_image_bytes // 2 - 1000
    return tiff([*_one_pixel(), (258, 3, count, _noise(2 * count))])


def _resolutions(limits: Limits) -> bytes:
    count = limits.max_image_bytes // 8 - 1000
    return tiff([*_one_pixel(), (258, 3, 1, 8), (282, 5, count, _noise(8 * count))])


def _one_pixel() -> list[Entry]:
    return [(256, 4, 1, 1), (257, 4, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]


def _deep_directory(limits: Limits) -> bytes:
    """A TIFF whose EXIF directory has all the numbers."""
    count = limits.max_image_bytes // 8 - 1000
    entries = [*_one_pixel(), (258, 3, 1, 8), (34665, 4, 1, 0)]
    start = len(tiff(entries))
    entries[-1] = (34665, 4, 1, start)
    inside = struct.pack("<HHHIII", 1, 33434, 5, count, start + 2 + 12 + 4, 0)
    return tiff(entries, inside + _noise(8 * count))


def _overlapping(limits: Limits) -> bytes:
    """A directory of a thousand entries that all lie at one place."""
    size = limits.max_image_bytes // 2
    entries: list[Entry] = [(40000 + number, 7, size, 0) for number in range(1000)]
    start = len(tiff(entries))
    return tiff([(tag, kind, count, start) for tag, kind, count, _ in entries], bytes(size))


def _orientations(limits: Limits) -> bytes:
    count = limits.max_image_bytes // 8 - 1000
    return _small(before=chunk(b"eXIf", tiff([(0x0112, 5, count, _noise(8 * count))])))


def _big_directory(limits: Limits) -> bytes:
    count = limits.max_image_bytes // 20 - 1000
    entry = struct.pack("<HHQQ", 40000, 4, 1, 0)
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, count) + entry * count + bytes(8)


def _canvas(_: Limits) -> bytes:
    """A WebP of 16 pixels on a canvas of the largest size that there is."""
    picture = saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True)
    place = bytes(6) + b"\x0f\0\0" * 2 + bytes(4) + picture[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<II", 10, 2) + b"\xfe\x3f\0" * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += b"ANMF" + struct.pack("<I", len(place)) + place
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _frames(form: str, limits: Limits) -> bytes:
    """Many pictures in one file, of which the first is read."""
    first = Image.frombytes("L", (64, 64), _noise(64 * 64)).convert("RGB")
    others = [first.rotate(90 * number) for number in range(min(limits.max_image_bytes // (1 << 14), 500))]
    return saved(first, form, save_all=True, append_images=others)


REFUSED: dict[str, Callable[[Limits], bytes]] = {
    "png-text-inflates": lambda limits: _small(before=_inflating(b"zTXt", limits)),
    "png-text-behind-inflates": lambda limits: _small(after=_inflating(b"zTXt", limits)),
    "png-profile-inflates": lambda limits: _small(before=_inflating(b"iCCP", limits)),
    "png-many-chunks": lambda limits: _small(before=_empty(b"prVt", limits)),
    "png-many-chunks-behind": lambda limits: _small(after=_empty(b"prVt", limits)),
    "png-many-data-chunks": lambda limits: png(10, 10, b"", after=_empty(b"IDAT", limits)),
    "png-strip": lambda limits: png(limits.max_image_pixels, 1, deflated(3 * limits.max_image_pixels + 1)),
    "png-giant": lambda _: png(1 << 31, 1 << 31, b""),
    "jpeg-padding": lambda limits: b"\xff\xd8" + b"\xff" * (limits.max_image_bytes - 2),
    "jpeg-scans": lambda limits: scans(_side(limits), limits.max_image_bytes // 1000),
    "jpeg-exif-segments": _exif_segments,
    "bmp-runs": partial(_runs, b"\1\1"),
    "bmp-line-ends": partial(_runs, b"\0\0"),
    "bmp-giant": lambda _: bmp(2**31 - 1, -(2**31 - 1), b"", bits=24),
    "tiff-tile": _tile,
    "tiff-tiles": _tiles,
    "tiff-strips": partial(_strips, NONE, bytes(4)),
    "tiff-deflated-strips": partial(_strips, DEFLATE, deflated(4)),
    "tiff-shared-strips": _shared_strips,
    "tiff-shared-tiles": _shared_tiles,
    "tiff-big-directory": _big_directory,
    "webp-canvas": _canvas,
}
COSTLY: dict[str, Callable[[Limits], bytes]] = {
    "png-8-bit": partial(_full, 8, 2, 3, 0),
    "png-16-bit": partial(_full, 16, 6, 4, 0),
    "png-16-bit-interlaced": partial(_full, 16, 6, 4, 1),
    "png-palette": partial(_full, 8, 3, 1, 0),
    "png-data-inflates": lambda limits: png(10, 10, deflated(20 * limits.max_image_bytes)),
    "png-63-texts": _texts,
    "png-orientations": _orientations,
    "bmp-lines": _lines,
    "bmp-nibbles": _nibbles,
    "bmp-delta": _delta,
    "bmp-without-data": lambda limits: bmp(MOST_SIDE, limits.max_image_pixels // MOST_SIDE, b""),
    "tiff-depths": _depths,
    "tiff-resolutions": _resolutions,
    "tiff-deep-directory": _deep_directory,
    "tiff-many-strips-deflate": partial(_many_strips, DEFLATE, deflated(8)),
    "tiff-many-strips-lzma": partial(_many_strips, LZMA, lzma.compress(bytes(8))),
    "tiff-many-strips-packbits": partial(_many_strips, PACKBITS, b"\xf9\0"),
    "tiff-pages": partial(_frames, "TIFF"),
    "mpo-pictures": partial(_frames, "MPO"),
    "png-frames": partial(_frames, "PNG"),
    "webp-frames": partial(_frames, "WEBP"),
    "tiff-overlapping": _overlapping,
}
