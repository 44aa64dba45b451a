"""Frames and headers: valid messages of every kind damaged, and what msgpack can say that no client would."""
from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

import msgpack

from blendmaskd import protocol
from blendmaskd.protocol import MAGIC, Code, Image, Kinds, Options, Place
from blendmaskd.wanted import Actual
from fuzz.mutate import EDGES, mutate, number

_IMAGES = (
    Image(kind="encoded"),
    Image(kind="raw", shape=(1, 2, 3), order="rgb"),
    Image(kind="path", path="/data/a.jpg"),
    Image(kind="encoded", place=Place(region="0a1b", offset=4096, bytes=3)),
)
_OPTIONS = Options(score_threshold=0.5, max_detections=9, mask_format="none")
_DURABLE = "0123456789abcdef" * 2
_FROM_CLIENT: tuple[protocol.Message, ...] = (
    *(protocol.Submit(job="job", image=each, options=_OPTIONS, deadline_s=60.0, priority=3) for each in _IMAGES),
    protocol.Submit(job=_DURABLE, image=_IMAGES[0], durable=True),
    protocol.Fetch(job=_DURABLE, wait=False),
    protocol.Forget(job=_DURABLE),
    protocol.Cancel(job="job"),
    protocol.GetStats(),
)
_ACTUAL = Actual(cpus="0-3", threads=2, task_queue=None, preload=None, env={}, thread_cpus={"a/7": "1"})
_FROM_WORKER: tuple[protocol.Message, ...] = (
    protocol.Ready(token="t", pid=7, window=2, actual=_ACTUAL),
    protocol.Started(leases=[1, 2]),
    protocol.Preview(),
    protocol.Finished(lease=1, width=2, height=1, timings={"decode": 0.5}),
    protocol.FailedLease(lease=1, code=Code.BAD_IMAGE, reason="empty"),
    protocol.Report(
        start=1.0, end=2.0, images=3, busy_s=0.5, memory_bytes=4, device_memory_bytes=0,
        shapes=[(1, 2, 3, 0.5), (2, 2, 3, None)], window=4,
    ),
)
_TO_WORKER: tuple[protocol.Message, ...] = (
    protocol.Lease(lease=1, image=_IMAGES[0], options=Options(), deadline=5.5),
    protocol.Revoke(lease=1),
    protocol.OpenRegion(region="r", descriptor=7, inode=1 << 40, bytes=4096),
    protocol.CloseRegion(region="r"),
    protocol.Stop(),
)
_TO_CLIENT: tuple[protocol.Message, ...] = (
    protocol.Result(job="a", width=2, height=1, device="npu:0", timings={"total": 0.5}),
    protocol.Accepted(job="a"),
    protocol.Forgotten(job="a"),
    protocol.Failed(job="a", code=Code.BUSY, reason="full", retry_after_s=0.5),
    protocol.Stats(stats={"seq": 1, "devices": [{"fps": 0.25}]}),
)
_KINDS: dict[str, tuple[Kinds[Any], tuple[protocol.Message, ...]]] = {
    "from client": (protocol.FROM_CLIENT, _FROM_CLIENT),
    "from worker": (protocol.FROM_WORKER, _FROM_WORKER),
    "to worker": (protocol.TO_WORKER, _TO_WORKER),
    "to client": (protocol.TO_CLIENT, _TO_CLIENT),
}
SIDES = tuple(_KINDS)
_TEXTS = (
    "", "a", "job", "submit", "\0", "..", "/", "é" * 64, "x" * 127, "x" * 128, "x" * 129, "x" * 70_000,
    "\U0001f40d", "nan",
)
_NAMES = (
    "type", "job", "image", "kind", "shape", "dtype", "order", "path", "place", "region", "offset", "bytes",
    "options", "score_threshold", "max_detections", "mask_format", "deadline_s", "priority", "lease", "leases",
    "timings",
)
_LIARS = (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")  # list, map, str, bin, ext: the four bytes behind are its length


def frames(random: Random, side: str) -> list[bytes]:
    """A message of this side of the wire, most often malformed."""
    head = header(random, side)
    payload = [random.randbytes(random.choice((0, 1, 6, 100))) for _ in range(random.choice((0, 0, 1, 1, 1, 2, 30)))]
    magic = (
        MAGIC if random.random() < 0.95 else random.choice((b"", b"BMD2", b"BMD", MAGIC + b"\0", random.randbytes(4)))
    )
    whole = [magic, head, *payload]
    if random.random() < 0.04:
        random.shuffle(whole)
    return whole[: random.randrange(3)] if random.random() < 0.02 else whole


def header(random: Random, side: str) -> bytes:
    return random.choice(_WAYS)(random, protocol.encode(random.choice(_KINDS[side][1]))[1])


def options(random: Random) -> Options:
    """Good ones, at their edges."""
    most = random.choice((None, 0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1))
    return Options(score_threshold=random.choice((0.0, 1e-320, 0.5, 1.0)), max_detections=most)


def kinds(side: str) -> Kinds[Any]:
    return _KINDS[side][0]


def value(random: Random, depth: int = 0) -> Any:
    """Anything that msgpack can carry."""
    kind = random.randrange(10 if depth < 3 else 8)
    match kind:
        case 0:
            return random.choice((None, True, False))
        case 1:
            return random.choice((-1, 1)) * (random.choice(EDGES) >> 1)
        case 2:
            return number(random, 64)
        case 3:
            return random.choice((0.0, -0.0, 1e-320, 0.5, 1.0, 1e308, float("nan"), float("inf"), float("-inf"), -1.0))
        case 4 | 5:
            return random.choice(_TEXTS)
        case 6:
            return random.randbytes(random.choice((0, 1, 8, 300)))
        case 7:
            return msgpack.ExtType(random.randrange(128), random.randbytes(random.choice((0, 1, 4, 8, 12))))
        case 8:
            return [value(random, depth + 1) for _ in range(random.randrange(5))]
    return {random.choice(_NAMES): value(random, depth + 1) for _ in range(random.randrange(5))}


def _fields(random: Random, head: bytes) -> bytes:
    """Fields changed, left out, renamed, added, here or one level down."""
    fields = msgpack.unpackb(head)
    for _ in range(random.randint(1, 3)):
        inner = [fields, *(found for found in fields.values() if isinstance(found, dict) and found)]
        place = random.choice(inner)
        name = random.choice(list(place) or ["type"])
        match random.randrange(4):
            case 0 | 1:
                place[name] = value(random)
            case 2:
                place.pop(name, None)
            case 3:
                place[random.choice(_NAMES)] = value(random)
    packed: bytes = msgpack.packb(fields)
    return packed


def _anything(random: Random, _: bytes) -> bytes:
    packed: bytes = msgpack.packb(value(random))
    return packed if random.random() < 0.8 else random.randbytes(random.randrange(60))


def _deep(random: Random, head: bytes) -> bytes:
    inside = random.choice((b"\xc0", head, b""))
    return random.choice((b"\x91", b"\x81\xa1a", b"\xdd\0\0\0\1")) * random.choice((2, 100, 600, 1100, 9000)) + inside


def _lies(random: Random, head: bytes) -> bytes:
    """A length that is not there."""
    place = random.randrange(len(head))
    return (
        head[:place]
        + random.choice(_LIARS)
        + struct.pack(">I", number(random, 32))
        + head[place + random.randrange(2) :]
    )


def _twice(random: Random, head: bytes) -> bytes:
    """A map that says a thing twice, or has other keys than text."""
    fields = msgpack.unpackb(head)
    pairs = [(msgpack.packb(name), msgpack.packb(found)) for name, found in fields.items()]
    key = random.choice((pairs[0][0], msgpack.packb(value(random, 3)), b"\xa2\xff\xfe", b"\x80", b"\x90"))
    pairs.insert(random.randrange(len(pairs) + 1), (key, msgpack.packb(value(random, 2))))
    return bytes([0x80 + len(pairs)]) + b"".join(key + found for key, found in pairs)


def _long(random: Random, head: bytes) -> bytes:
    fields = msgpack.unpackb(head)
    size = protocol.MAX_HEADER_BYTES + random.choice((-200, -64, -1, 0, 1, 1 << 20))
    packed: bytes = msgpack.packb({**fields, "filler": "x" * size})
    return packed


_WAYS: tuple[Callable[[Random, bytes], bytes], ...] = (
    mutate, mutate, mutate, _fields, _fields, _fields, _fields, _anything, _deep, _lies, _lies, _twice, _long,
)
