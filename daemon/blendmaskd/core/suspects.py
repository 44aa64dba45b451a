"""Images that workers died with: which are suspected, and which were given up. Pure.

An image is known by what it is, not by its job, so it does not help it to come again under another name: by its bytes,
and raw pixels by their layout too; by path, by the path. Who submits it, how it travels and its options do not matter.

A worker's death makes every image that it held a suspect. A result clears an image. One that was on
`max_attempts` workers that died is given up. All of this is forgotten `KEEP_S` after it was last heard of, or when
there is too much of it.

To hash each image that comes would cost more than to pass it on. So an image is hashed only if one of those remembered
has its length and layout, and then the same bytes in a few places. While there are none this costs nothing.

`read` gives bytes that lie in shared memory.
"""
from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import posixpath
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from blendmaskd.protocol import Frames, Image, Place, RegionError

KEEP_S = 600.0
MOST = 1024  # remembered at once: what a few hundred deaths can leave
SAMPLES, SAMPLE_BYTES = 8, 64  # of an image, spread over it

Read = Callable[[Place, int, int], Any]  # place, start, end: these bytes of it; raises RegionError
_Size = tuple[Any, ...]


class Identity(msgspec.Struct, frozen=True):
    """What tells an image from others."""

    size: _Size  # layout and length
    samples: bytes
    digest: bytes


class Death(msgspec.Struct, eq=False):
    """Of a worker that held a suspect."""

    device: str
    served: bool  # it had finished an image before
    counts: bool  # against its device, as far as is known


class Suspicion(msgspec.Struct, eq=False):
    """An image that workers died with."""

    identity: Identity | None  # None: its bytes cannot be read any more
    until: float = 0.0
    attempts: int = 0  # deaths that it was known to be under way in
    deaths: list[Death] = []
    given_up: str = ""  # how the last of them ended, when it was given up

    @property
    def devices(self) -> set[str]:
        return {death.device for death in self.deaths}

    def guilty(self, max_attempts: int) -> bool:
        """Whether it is to be given up. One that was never known to be under way needs two deaths to name it."""
        return self.attempts >= max_attempts or self.losses >= max(max_attempts, 2)

    @property
    def losses(self) -> int:
        return len(self.deaths)

    def reason(self, now: float) -> str:
        """Why it is not tried, once it was given up."""
        left_s = math.ceil(max(self.until - now, 0.0))
        return f"this image was given up: {self.given_up}; it may be retried in {left_s} s"

    @property
    def proven(self) -> bool:
        """Whether the devices work, so that it must be the image: they did before, or it died on more than one."""
        return len(self.devices) > 1 or any(death.served for death in self.deaths)


def _unreadable(place: Place, start: int, end: int) -> Any:
    raise RegionError(f"region {place.region!r}: nobody can read it here")


class Suspects:
    def __init__(self, read: Read = _unreadable) -> None:
        self._read = read
        self._suspicions: OrderedDict[bytes, Suspicion] = OrderedDict()  # by digest, in the order of `until`
        self._sizes: Counter[_Size] = Counter()
        self._samples: Counter[tuple[_Size, bytes]] = Counter()

    def __iter__(self) -> Iterator[Suspicion]:
        yield from list(self._suspicions.values())

    def find(self, image: Image, payload: Frames, now: float) -> Suspicion | None:
        """What is remembered of this image."""
        if not self._suspicions:
            return None
        self._expire(now)
        return self.known(image, payload)

    def known(self, image: Image, payload: Frames) -> Suspicion | None:
        """As `find`, without a look at the time."""
        if not self._suspicions:
            return None
        size, read = _size(image, payload), self._reader(image, payload)
        if size not in self._sizes:
            return None
        with contextlib.suppress(RegionError):
            if (size, _sample(size, read)) in self._samples:
                return self._suspicions.get(_digest(size, read))
        return None

    def by_identity(self, identity: Identity) -> Suspicion | None:
        """What is remembered of the image that is known by this."""
        return self._suspicions.get(identity.digest)

    def identify(self, image: Image, payload: Frames) -> Identity | None:
        """What to know this image by later; None: it cannot be read."""
        size, read = _size(image, payload), self._reader(image, payload)
        with contextlib.suppress(RegionError):
            return Identity(size, _sample(size, read), _digest(size, read))
        return None

    def keep(self, suspicion: Suspicion, now: float) -> Suspicion:
        """Remember it for `KEEP_S` from now on; what there is of this image already is returned instead."""
        self._expire(now)
        if (identity := suspicion.identity) is None:
            return suspicion
        if identity.digest not in self._suspicions:
            self._suspicions[identity.digest] = suspicion
            self._sizes[identity.size] += 1
            self._samples[identity.size, identity.samples] += 1
        suspicion = self._suspicions[identity.digest]
        suspicion.until = now + KEEP_S
        self._suspicions.move_to_end(identity.digest)
        while len(self._suspicions) > MOST:
            self.clear(next(iter(self._suspicions.values())))
        return suspicion

    def clear(self, suspicion: Suspicion) -> None:
        identity = suspicion.identity
        if identity is None or self._suspicions.get(identity.digest) is not suspicion:
            return
        del self._suspicions[identity.digest]
        self._sizes -= Counter([identity.size])  # which leaves no zeros
        self._samples -= Counter([(identity.size, identity.samples)])

    def _expire(self, now: float) -> None:
        while self._suspicions and (oldest := next(iter(self._suspicions.values()))).until <= now:
            self.clear(oldest)

    def _reader(self, image: Image, payload: Frames) -> Callable[[int, int], Any]:
        """Gives the image's bytes from a start to an end; raises `RegionError`."""
        if image.place:
            return functools.partial(self._read, image.place)
        frame: Any = payload[0] if payload else b""
        view = memoryview(frame)
        return lambda start, end: view[start:end]

    def check(self) -> None:
        identities = [s.identity for s in self._suspicions.values() if s.identity]
        assert Counter(each.size for each in identities) == self._sizes, "sizes are miscounted"
        assert Counter((each.size, each.samples) for each in identities) == self._samples, "samples are miscounted"
        assert len(identities) == len(self._suspicions) <= MOST, "too much is remembered"
        times = [suspicion.until for suspicion in self._suspicions.values()]
        assert times == sorted(times), "what is to be forgotten first does not come first"


def _size(image: Image, payload: Frames) -> _Size:
    """Of what kind and layout an image is, and last how many bytes it has."""
    length = image.place.bytes if image.place else sum(len(frame) for frame in payload)
    match image.kind:
        case "path":
            return "path", posixpath.normpath(image.path or ""), 0
        case "raw":
            return "raw", image.shape, image.dtype, image.order, length
    return "encoded", length


def _sample(size: _Size, read: Callable[[int, int], Any]) -> bytes:
    length = size[-1]
    step = max(length - SAMPLE_BYTES, 0) // (SAMPLES - 1)
    starts = range(0, SAMPLES * step, step) if step else range(1)
    return b"".join([read(start, min(start + SAMPLE_BYTES, length)) for start in starts])


def _digest(size: _Size, read: Callable[[int, int], Any]) -> bytes:
    digest = hashlib.sha256(repr(size).encode())
    digest.update(read(0, size[-1]))
    return digest.digest()
