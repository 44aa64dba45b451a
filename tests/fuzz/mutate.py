"""Damaged bytes: a few random changes of the kinds that break parsers. Never longer than `MOST_BYTES`."""
from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

MOST_BYTES = 1 << 18
EDGES = (
    0, 1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 32767, 32768,
    65534, 65535, 65536, (1 << 24) - 1, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1,
    1 << 63, (1 << 64) - 1,
)

Change = Callable[[Random, bytearray], None]


def mutate(random: Random, data: bytes, most: int = 6) -> bytes:
    """`data` after 1 to `most` changes."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        random.choice(_CHANGES)(random, changed)
    return bytes(changed[:MOST_BYTES])


def number(random: Random, bits: int) -> int:
    """Unsigned, of so many bits, more often than not at an edge."""
    edge = random.choice(EDGES) if random.random() < 0.7 else random.getrandbits(bits)
    return edge & ((1 << bits) - 1)


def _span(random: Random, data: bytearray, most: int = 64) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(start + random.randint(1, most), len(data))


def _flip(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(random: Random, data: bytearray) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, random.randrange(256)))


def _set_number(random: Random, data: bytearray) -> None:
    code, bits = random.choice((("H", 16), ("I", 32), ("Q", 64)))
    packed = struct.pack(random.choice("<>") + code, number(random, bits))
    if len(data) >= len(packed):
        start = random.randrange(len(data) - len(packed) + 1)
        data[start : start + len(packed)] = packed


def _insert(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data) + 1)
    data[start:start] = random.choice((random.randbytes(random.randint(1, 16)), bytes(8), b"\xff" * 8))


def _delete(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    del data[start:end]


def _repeat(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    data[start:start] = data[start:end] * random.choice((1, 1, 2, 100))


def _move(random: Random, data: bytearray) -> None:
    start, end = _span(random, data)
    part = data[start:end]
    del data[start:end]
    to = random.randrange(len(data) + 1)
    data[to:to] = part


def _cut(random: Random, data: bytearray) -> None:
    del data[random.randrange(len(data) + 1) :]


_CHANGES: tuple[Change, ...] = (
    _flip, _flip, _set, _set, _set_number, _set_number, _insert, _delete, _repeat, _move, _cut,
)
