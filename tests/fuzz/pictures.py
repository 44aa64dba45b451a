"""Images, malformed: good ones of every format and mode damaged as bytes and by what their formats are made of.

`PNG`, `JPEG`, `WebP`, `BMP` and `TIFF` are also built by hand here, so that each field can lie while the rest is right:
a check sum that fits lets a damaged chunk get further than any flipped bit.
"""
from __future__ import annotations

import functools
import io
import re
import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image

from fuzz import tiffs
from fuzz.mutate import mutate, number
from fuzz.tiffs import DEFLATE, LONG, LZW, PACKBITS, SHORT, Layout

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 16: 8}  # of a TIFF's entries
_MARKER = re.compile(rb"\xff[\xc0-\xfe]")
_PNG_KINDS = (
    b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"pHYs",
    b"acTL", b"fcTL", b"fdAT", b"cHRM", b"sRGB", b"prVt", b"\0\0\0\0",
)
_SEGMENTS = (0xC0, 0xC1, 0xC2, 0xC4, 0xC9, 0xCA, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE)
_BODIES = (b"MPF\0II*\0\x08\0\0\0", b"Adobe\0d\0\0\0\0\1", b"Photoshop 3.0\0008BIM",
           b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')  # fmt: skip
_TAGS = (
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 282, 284, 292, 317, 320, 322, 323, 324, 325,
    330, 332, 338, 339, 347, 512, 513, 514, 519, 529, 530, 531, 532, 700, 33432, 34377, 34665, 34675, 34853,
    40965, 45056, 50838,
)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int,
    height: int,
    rows: bytes,
    *,
    depth: int = 8,
    colour: int = 2,
    before: bytes = b"",
    after: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """`rows`: compressed. `before` and `after`: more chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    palette = chunk(b"PLTE", bytes(range(256)) * 3) if colour == 3 else b""
    whole = [chunk(b"IHDR", header), palette, before, chunk(b"IDAT", rows), after, chunk(b"IEND", b"")]
    return SIGNATURE + b"".join(whole)


def bmp(width: int, height: int, data: bytes, *, bits: int = 8, compression: int = 0) -> bytes:
    palette = b"".join(bytes([grey, grey, grey, 0]) for grey in range(1 << bits)) if bits <= 8 else b""
    start = 14 + 40 + len(palette)
    file = struct.pack("<2sIHHI", b"BM", start + len(data), 0, 0, start)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
    return file + info + palette + data


@functools.cache
def good() -> tuple[bytes, ...]:
    """Good images of every format, in every mode and compression that they have; the same on every machine."""
    pixels = np.random.default_rng(5).integers(0, 256, (24, 18, 4), np.uint8)
    colours = Image.fromarray(pixels[:, :, :3])
    transparent = Image.fromarray(pixels)
    grey = Image.fromarray(pixels[:, :, 0])
    deep = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257)
    palette = colours.quantize(16)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.5
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    extras = {"exif": exif, "icc_profile": bytes(300)}
    found = [saved(image, "PNG") for image in (colours, transparent, grey, deep, palette, grey.convert("1"))]
    found += [saved(Image.merge("LA", [grey, grey]), "PNG", **extras), saved(palette, "PNG", transparency=bytes(16))]
    found += [saved(colours, "PNG", save_all=True, append_images=[colours.rotate(90)], default_image=True)]
    rows = zlib.compress(bytes(20_000))
    found += [
        png(18, 24, rows, depth=depth, colour=colour, interlace=1)
        for depth, colour in ((8, 2), (16, 6), (1, 0), (4, 3), (16, 4))
    ]
    found += [
        saved(image, "JPEG", progressive=progressive, **extras)
        for image in (colours, grey, colours.convert("CMYK"))
        for progressive in (False, True)
    ]
    found += [saved(colours, "JPEG", subsampling=2, restart_marker_blocks=1, comment=b"hello")]
    found += [saved(colours, "MPO", save_all=True, append_images=[grey.convert("RGB")])]
    found += [
        saved(transparent, "WEBP", lossless=True, **extras),
        saved(colours, "WEBP"),
        saved(transparent, "WEBP"),
    ]
    found += [saved(colours, "WEBP", save_all=True, append_images=[colours.rotate(90)], duration=10)]
    found += [saved(image, "BMP") for image in (colours, transparent, grey, palette, grey.convert("1"))]
    found += [
        bmp(18, 24, (b"\x12\x07" + b"\0\0") * 24 + b"\0\1", compression=1),
        bmp(18, 24, (b"\x12\x17" + b"\0\4\x12\x34" + b"\0\2\2\1\0\0") * 9, bits=4, compression=2),
    ]
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate", "lzma", "zstd", "jpeg"):
        found += [saved(image, "TIFF", compression=compression) for image in (colours, grey)]
    found += [
        saved(grey.convert("1"), "TIFF", compression=each) for each in ("group3", "group4", "tiff_ccitt", "packbits")
    ]
    found += [saved(image, "TIFF", compression="tiff_lzw", **extras) for image in (deep, palette, transparent)]
    modes = ("CMYK", "YCbCr", "LAB", "F", "I")
    found += [saved(colours.convert(mode), "TIFF", icc_profile=None) for mode in modes]  # LAB's says the hour
    found += [saved(colours, "TIFF", save_all=True, append_images=[grey]), saved(colours, "TIFF", big_tiff=True)]
    found += [tiled(order, big) for order in "<>" for big in (False, True)]
    found += [tiffs.write(pixels[:, :, :count].astype(np.int64), layout) for count, layout in _LAYOUTS]
    return tuple(found)


_LAYOUTS = (  # and how many samples a pixel has
    *((1, Layout(bits=bits, photometric=0, order=order)) for bits in (1, 4, 12, 16) for order in "<>"),
    *((3, Layout(bits=bits, photometric=2, planar=2, compression=LZW, tile=16)) for bits in (8, 16)),
    (4, Layout(bits=16, photometric=2, extra=(1,), predictor=2, compression=DEFLATE)),
    (4, Layout(photometric=5, planar=2, compression=PACKBITS)),
    (3, Layout(photometric=6, more={530: (SHORT, (1, 1))})),
    (1, Layout(bits=4, photometric=3, fill_order=2, more={320: (SHORT, tuple(range(0, 48 * 1300, 1300)))})),
    (3, Layout(bits=32, photometric=2, kind=3)),
)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def tiled(order: str = "<", big: bool = False) -> bytes:
    """A TIFF in four deflated tiles of 16x16."""
    short = {258: 8, 259: DEFLATE, 262: 1, 277: 1, 284: 1, 322: 16, 323: 16}
    fields = {256: (LONG, (18,)), 257: (LONG, (24,)), **{tag: (SHORT, (value,)) for tag, value in short.items()}}
    return tiffs.assemble(fields, [zlib.compress(bytes(range(256)))] * 4, order, big)


def damaged(random: Random) -> bytes:
    """An image, most often malformed, of less than 0.3 MB."""
    whole = random.choice(good())
    if random.random() < 0.4:
        return mutate(random, whole)
    change = next(change for start, change in _SURGERY.items() if whole.startswith(start))
    changed = change(random, whole)
    return mutate(random, changed, 2) if random.random() < 0.2 else changed


def _chunks(random: Random, whole: bytes) -> bytes:
    """PNG: chunks changed, moved, repeated, left out, with check sums that fit."""
    parts: list[tuple[bytes, bytes]] = []
    place = len(SIGNATURE)
    while place + 8 <= len(whole):
        [length] = struct.unpack_from(">I", whole, place)
        parts.append((whole[place + 4 : place + 8], whole[place + 8 : place + 8 + length]))
        place += 12 + length
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(parts)) if parts else 0
        match random.randrange(6) if parts else 5:
            case 0 | 1:
                parts[at] = (parts[at][0], _changed_body(random, *parts[at]))
            case 2:
                parts.insert(random.randrange(len(parts) + 1), parts[at])
            case 3:
                parts.insert(random.randrange(len(parts)), parts.pop(at))
            case 4:
                del parts[at]
            case 5:
                body = random.choice((b"", random.randbytes(13), b"a\0\0" + zlib.compress(bytes(5000)), bytes(26)))
                parts.insert(at, (random.choice(_PNG_KINDS), body))
    return SIGNATURE + b"".join(chunk(kind, body) for kind, body in parts)


def _changed_body(random: Random, kind: bytes, body: bytes) -> bytes:
    if kind == b"IHDR" and len(body) == 13 and random.random() < 0.7:
        width, height = (random.choice((0, 1, 18, 24, 2000, number(random, 32))) for _ in range(2))
        return struct.pack(">II", width, height) + bytes(random.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(5))
    if kind == b"IDAT" and random.random() < 0.5:
        return zlib.compress(mutate(random, bytes(range(256)) * random.randint(1, 8)))
    return mutate(random, body, 3)


def _segments(random: Random, whole: bytes) -> bytes:
    """JPEG: segments changed, moved, repeated, left out, with lengths that fit or lie."""
    cuts = [match.start() for match in _MARKER.finditer(whole)]
    parts = [whole[start:end] for start, end in zip(cuts, [*cuts[1:], len(whole)])]
    for _ in range(random.randint(1, 3)):
        at = random.randrange(1, len(parts)) if len(parts) > 1 else 0
        match random.randrange(6):
            case 0 | 1:
                parts[at] = parts[at][:4] + mutate(random, parts[at][4:], 3)
            case 2:
                parts[at:at] = [parts[at]] * random.choice((1, 2, 50))
            case 3:
                parts.insert(random.randrange(len(parts)), parts.pop(at))
            case 4 if len(parts) > 2:
                del parts[at]
            case _:
                kind = random.choice(_SEGMENTS)
                body = random.choice((b"Exif\0\0" + whole[:60], *_BODIES, random.randbytes(20)))
                length = random.choice((len(body) + 2, number(random, 16)))
                parts.insert(at, struct.pack(">BBH", 0xFF, kind, length) + body)
    return b"".join(parts)


def _riff(random: Random, whole: bytes) -> bytes:
    """WebP: chunks changed, moved, repeated, left out, with lengths that fit or lie."""
    parts: list[bytes] = []
    place = 12
    while place + 8 <= len(whole):
        [length] = struct.unpack_from("<I", whole, place + 4)
        parts.append(whole[place : place + 8 + length + length % 2])
        place += 8 + length + length % 2
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(parts)) if parts else 0
        match random.randrange(5) if parts else 4:
            case 0:
                parts[at] = parts[at][:8] + mutate(random, parts[at][8:], 3)
            case 1:
                parts[at] = parts[at][:4] + struct.pack("<I", number(random, 32)) + parts[at][8:]
            case 2:
                parts.insert(random.randrange(len(parts) + 1), parts[at])
            case 3:
                del parts[at]
            case 4:
                sides = struct.pack("<I", number(random, 24))[:3] + struct.pack("<I", random.choice((0, 17, 23)))[:3]
                flags = bytes([random.choice((0, 2, 4, 8, 16, 32, 62)), 0, 0, 0])
                parts.insert(0, b"VP8X" + struct.pack("<I", 10) + flags + sides)
    body = b"WEBP" + b"".join(parts)
    length = len(body) if random.random() < 0.9 else number(random, 32)
    return b"RIFF" + struct.pack("<I", length) + body


def _bmp_header(random: Random, whole: bytes) -> bytes:
    """BMP: fields of its header, each with the numbers that matter for it."""
    changed = bytearray(whole)
    fields = (
        (2, "<I"), (10, "<I"), (14, "<I"), (18, "<i"), (22, "<i"), (26, "<H"), (28, "<H"), (30, "<I"),
        (34, "<I"), (46, "<I"),
    )
    for _ in range(random.randint(1, 3)):
        place, code = random.choice(fields)
        choices = (0, 1, 2, 3, 4, 8, 12, 16, 18, 24, 32, 40, 54, 64, 108, 124, 1078, 2000, number(random, 31), -24)
        value = random.choice(choices) if code == "<i" else abs(random.choice(choices))
        struct.pack_into(code, changed, place, value & 0xFFFF if code == "<H" else value)
    return bytes(changed)


def _entries(random: Random, whole: bytes) -> bytes:
    """TIFF: entries of its first directory changed, repeated, added."""
    changed = bytearray(whole)
    order = "<" if whole.startswith(b"II") else ">"
    big = 43 in whole[2:4]
    start = struct.unpack_from(order + ("Q" if big else "I"), whole, 8 if big else 4)[0]
    count = struct.unpack_from(order + ("Q" if big else "H"), whole, start)[0]
    size, room = (20, "Q") if big else (12, "I")
    for _ in range(random.randint(1, 4)):
        place = start + (8 if big else 2) + size * random.randrange(count)
        tag, kind, values, value = struct.unpack_from(order + "HH" + room + room, changed, place)
        match random.randrange(6):
            case 0 | 1:
                value = random.choice((0, 1, 2, 3, 7, 8, 16, 17, 64, 2000, 65535, number(random, 32)))
            case 2:
                kind = random.choice((*TYPE_BYTES, 0, 13, 17, 18, 255))
            case 3:
                values = random.choice((0, 1, 2, 3, 100, number(random, 32)))
            case 4:
                tag = random.choice(_TAGS)
            case 5:
                tag, kind, values = random.choice(_TAGS), random.choice((3, 4, 5, 7)), random.choice((1, 1, 4, 100))
                value = random.choice((0, 8, start, number(random, 16)))
        if order == ">" and kind == 3 and values == 1 and value < 65536:
            value <<= 48 if big else 16
        struct.pack_into(order + "HH" + room + room, changed, place, tag, kind, values, value)
    if random.random() < 0.1:
        struct.pack_into(order + ("Q" if big else "H"), changed, start, random.choice((0, 1, count + 1, 60_000)))
    return bytes(changed)


_SURGERY: dict[bytes, Callable[[Random, bytes], bytes]] = {  # by how a file begins
    SIGNATURE[:4]: _chunks, b"\xff\xd8": _segments, b"RIFF": _riff, b"BM": _bmp_header,
    b"II": _entries, b"MM": _entries,
}  # fmt: skip
