"""TIFFs by hand, of every pixel format that the format can declare: samples in, a file out, right to the last bit."""
from __future__ import annotations

import itertools
import lzma
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

SHORT, LONG = 3, 4
NONE, LZW, DEFLATE, OLD_DEFLATE, PACKBITS, LZMA = 1, 5, 8, 32946, 32773, 34925
_CODES = {1: "B", SHORT: "H", LONG: "I", 11: "f"}
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

Entry = tuple[int, int, int, int | bytes]  # tag, type, count, value or what lies elsewhere
Field = tuple[int, tuple[float, ...]]  # type and values
Fields = Mapping[int, Field]  # by tag
Samples = npt.NDArray[Any]  # height, width, samples of a pixel


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples lie in the file, and what its directory calls them; numbers as in TIFF 6.0."""

    bits: int = 8
    photometric: int = 1
    kind: int = 1  # SampleFormat
    extra: tuple[int, ...] = ()
    planar: int = 1
    compression: int = NONE
    predictor: int = 1
    fill_order: int = 1
    order: str = "<"
    big: bool = False
    tile: int | None = None  # side; None: strips
    rows: int = 7  # of a strip
    more: Fields = field(default_factory=dict)
    without: tuple[int, ...] = ()


def write(samples: Samples, layout: Layout) -> bytes:
    height, width, count = samples.shape
    values: dict[int, tuple[int, ...]] = {
        256: (width,),
        257: (height,),
        258: (layout.bits,) * count,
        259: (layout.compression,),
        262: (layout.photometric,),
        266: (layout.fill_order,) * (layout.fill_order != 1),
        277: (count,),
        278: (layout.rows,) * (not layout.tile),
        284: (layout.planar,),
        317: (layout.predictor,) * (layout.predictor != 1),
        338: layout.extra,
        339: (layout.kind,) * count * (layout.kind != 1),
    }
    if layout.tile:
        values[322] = values[323] = (layout.tile,)
    fields = {**{tag: (SHORT, found) for tag, found in values.items() if found}, **layout.more}
    left = {tag: found for tag, found in fields.items() if tag not in layout.without}
    planes = [samples] if layout.planar == 1 else [samples[:, :, [plane]] for plane in range(count)]
    blocks = [_encoded(block, layout) for plane in planes for block in _blocks(plane, layout)]
    return assemble(left, blocks, layout.order, layout.big)


def assemble(fields: Fields, blocks: list[bytes], order: str = "<", big: bool = False) -> bytes:
    """A TIFF of one directory, with the blocks as its tiles if it has tiles, else as strips."""
    lengths = [len(block) for block in blocks]
    places = [end - length for end, length in zip(itertools.accumulate(lengths), lengths)]
    return lay_out(fields, places, lengths, b"".join(blocks), order, big)


def lay_out(
    fields: Fields, places: Iterable[int], lengths: Iterable[int], data: bytes, order: str = "<", big: bool = False
) -> bytes:
    """A TIFF whose tiles if it has tiles, else strips, lie at these places of `data`, wherever that is in the file."""
    offset, length = (324, 325) if 322 in fields else (273, 279)
    whole = {**fields, offset: (LONG, tuple(places)), length: (LONG, tuple(lengths))}
    begin = len(tiff(_listed(whole, order), b"", order, big))
    whole[offset] = (LONG, tuple(begin + place for place in whole[offset][1]))
    return tiff(_listed(whole, order), data, order, big)


def _listed(fields: Fields, order: str) -> list[Entry]:
    return [
        (tag, kind, len(values), struct.pack(f"{order}{len(values)}{_CODES[kind]}", *values))
        for tag, (kind, values) in sorted(fields.items())
    ]


def tiff(entries: Sequence[Entry], data: bytes = b"", order: str = "<", big: bool = False) -> bytes:
    """One directory, what its entries have elsewhere, then `data`; without data its length is where that begins."""
    head, entry, room, end = ("HHQ", "HHQ", 8, "Q") if big else ("I", "HHI", 4, "I")
    where = 24 + 20 * len(entries) + 8 if big else 10 + 12 * len(entries) + 4
    out = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    out += struct.pack(order + head, *((8, 0, 16) if big else (8,))) + struct.pack(order + "HQ"[big], len(entries))
    elsewhere = b""
    for tag, kind, count, value in entries:
        out += struct.pack(order + entry, tag, kind, count)
        if isinstance(value, bytes) and len(value) > room:
            out += struct.pack(order + end, where + len(elsewhere))
            elsewhere += value
        elif isinstance(value, bytes):
            out += value.ljust(room, b"\0")
        else:
            code = {1: "B", 3: "H", 16: "Q"}.get(kind, "I") if count == 1 else "I"
            out += struct.pack(order + code, value & ((1 << 8 * struct.calcsize(code)) - 1)).ljust(room, b"\0")[:room]
    return out + struct.pack(order + end, 0) + elsewhere + data


def _blocks(plane: Samples, layout: Layout) -> list[Samples]:
    if not layout.tile:
        return [plane[top : top + layout.rows] for top in range(0, len(plane), layout.rows)]
    side = layout.tile
    spare = [(0, -plane.shape[0] % side), (0, -plane.shape[1] % side), (0, 0)]
    whole = np.pad(plane, spare)
    return [
        whole[top : top + side, left : left + side]
        for top in range(0, whole.shape[0], side)
        for left in range(0, whole.shape[1], side)
    ]


def _encoded(block: Samples, layout: Layout) -> bytes:
    if layout.predictor == 2:
        block = np.diff(block, axis=1, prepend=0) % (1 << layout.bits)
    packed = _packed(block.reshape(len(block), -1), layout)
    compressed = _COMPRESS[layout.compression](packed)
    return compressed.translate(_REVERSED) if layout.fill_order == 2 else compressed


def _packed(rows: Samples, layout: Layout) -> bytes:
    """Each row from a byte of its own."""
    if layout.bits % 8 == 0 and layout.bits != 24:
        kind = {2: "i", 3: "f", 6: "c"}.get(layout.kind, "u")
        return rows.astype(f"{layout.order}{kind}{layout.bits // 8}").tobytes()
    each = rows.astype(np.int64)[:, :, None] >> np.arange(layout.bits - 1, -1, -1) & 1
    return np.packbits(each.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def _lzw(data: bytes) -> bytes:
    """All in codes of nine bits: the table is cleared before it needs more."""
    bits = "".join(("100000000" if place % 200 == 0 else "") + f"0{byte:08b}" for place, byte in enumerate(data))
    bits += "100000001"
    bits += "0" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8)


def _packbits(data: bytes) -> bytes:
    return b"".join(
        bytes([len(run) - 1]) + run for run in (data[place : place + 100] for place in range(0, len(data), 100))
    )


_COMPRESS: dict[int, Callable[[bytes], bytes]] = {
    NONE: bytes, LZW: _lzw, DEFLATE: zlib.compress, OLD_DEFLATE: zlib.compress, PACKBITS: _packbits,
    LZMA: lzma.compress,
}  # fmt: skip
