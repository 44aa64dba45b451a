"""Places in shared memory: how a client on the daemon's host hands images over without sending them.

A region (see `daemon/shared_memory.py`) is divided into equal places; an image is copied into a free one, and the place
is free again when its job has its last answer. The place that was freed last is used first, so only as many pages take
memory as images are in flight at once. For a larger image a new region with larger places takes the old one's part;
the old one is closed when its last place is free, which is all that it takes to give it back.

What cannot go by shared memory goes by socket: nothing here fails a job, unless the client demands shared memory.

A forked child inherits the open file, though not the lock, and keeps its memory until it ends or executes another
program. Touches files, but no socket and no clock.
"""
from __future__ import annotations

import fcntl
import math
import mmap
import os
import stat
from collections import deque
from typing import Any

from daemon import protocol

SMALLEST_BYTES = 64 << 10  # below, the socket is as good
PLACES = 32  # in a region: as many images as a client commonly has in flight
ASK_AGAIN_S = 10.0  # after a refusal
ASK_ANEW_S = 1.0  # after a region that the daemon has ended


class SharedMemoryError(RuntimeError):
    """A client that demands shared memory cannot have it; the text says why."""


class Region:
    """A region of ours: locked, so that the daemon knows we live, and mapped."""

    def __init__(self, message: protocol.Region, place_bytes: int, owner: int) -> None:
        """Raises OSError or ValueError when the file is not there or not what the daemon of `owner` would make."""
        self.name = message.region
        self.place_bytes = place_bytes
        self._file = open(message.path, "r+b", buffering=0, opener=_no_link)  # noqa: SIM115
        try:
            self._check(message, owner)
            self._map = mmap.mmap(self._file.fileno(), message.bytes)
        except BaseException:
            self._file.close()
            raise
        self._places = message.bytes // place_bytes
        self._free = list(reversed(range(self._places)))
        self._allocated = [0] * self._places  # bytes of each that surely have memory

    @property
    def used(self) -> int:
        return self._places - len(self._free)

    @property
    def full(self) -> bool:
        return not self._free

    def put(self, view: memoryview) -> protocol.Place:
        """Copy an image into a free place. Raises OSError when /dev/shm is full."""
        number = self._free[-1]
        offset = number * self.place_bytes
        if self._allocated[number] < len(view):  # writing where there is no memory to be had would be SIGBUS
            os.posix_fallocate(self._file.fileno(), offset, len(view))
            self._allocated[number] = len(view)
        self._map[offset : offset + len(view)] = view
        self._free.pop()
        return protocol.Place(region=self.name, offset=offset, bytes=len(view))

    def give_back(self, place: protocol.Place) -> None:
        self._free.append(place.offset // self.place_bytes)

    def close(self) -> None:
        self._map.close()
        self._file.close()

    def _check(self, message: protocol.Region, owner: int) -> None:
        """A hostile daemon must not make us write to another file of ours. Lock what is right."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1)
        found = os.fstat(self._file.fileno())
        right = stat.S_ISREG(found.st_mode) and found.st_uid == owner
        if not right or found.st_nlink != 1:  # 0: the daemon ended it, because the lock came too late
            raise OSError(f"{message.path} is not, or no longer, a region of the daemon's")


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


class Places:
    """A client's shared memory. `required`: images never go by socket because there is none."""

    def __init__(self, socket: str, required: bool) -> None:
        """`socket` is the path of the daemon's ipc socket, whose owner must own the regions too."""
        self.required = required
        self.problem = ""  # why there is no region, as far as known
        self._socket = socket
        self._region: Region | None = None
        self._old: dict[str, Region] = {}  # retired, with jobs unanswered
        self._wanted = 0  # places of how many bytes are to be asked for; 0: none are
        self._asked: deque[int] = deque()  # and were, without an answer so far
        self._ask_from = 0.0

    def next_request(self) -> float:
        """When `request` has something to ask."""
        return self._ask_from if self._wanted else math.inf

    def request(self, now: float) -> protocol.OpenRegion | None:
        """What is to be asked of the daemon now."""
        if not self._wanted or now < self._ask_from:
            return None
        self._asked.append(self._wanted)
        self._wanted = 0
        return protocol.OpenRegion(bytes=PLACES * self._asked[-1])

    def put(self, payload: Any) -> protocol.Place | None:
        """Copy an image in. None: there is no place for it, now or, when `problem` says why, at all."""
        view = memoryview(payload)
        if view.nbytes < (1 if self.required else SMALLEST_BYTES) or not view.c_contiguous:
            return None
        if self._region is None or view.nbytes > self._region.place_bytes:
            self._want(view.nbytes)
            return None
        if self._region.full:
            return None
        try:
            place = self._region.put(view.cast("B"))
        except OSError as error:
            self.problem = f"/dev/shm: {error.strerror}"
            return None
        self.problem = ""
        return place

    def _want(self, nbytes: int) -> None:
        if nbytes > max([self._wanted, *self._asked]):
            self._wanted = max(1 << (nbytes - 1).bit_length(), SMALLEST_BYTES)

    def opened(self, message: protocol.Region, now: float) -> None:
        """The daemon's answer to the request."""
        if not self._asked:
            return  # of before we were connected anew; nobody locks it, so it ends
        place_bytes = self._asked.popleft()
        if message.bytes < place_bytes:
            self._refuse(f"the daemon grants {message.bytes} bytes, an image needs {place_bytes}", now)
            return
        try:
            region = Region(message, place_bytes, os.stat(self._socket).st_uid)
        except (OSError, ValueError) as error:
            self._refuse(str(error), now)
            return
        self.retire()
        self._region = region
        self.problem = ""

    def refused(self, reason: str, now: float) -> None:
        """The daemon's other answer."""
        if self._asked:
            self._asked.popleft()
        self._refuse(reason, now)

    def _refuse(self, reason: str, now: float) -> None:
        self._ask_from = now + ASK_AGAIN_S
        self.problem = reason

    def give_back(self, place: protocol.Place) -> None:
        """Its job is done with."""
        region = self._region
        if region is None or region.name != place.region:
            region = self._old[place.region]
        region.give_back(place)
        self._close_unused()

    def retire(self) -> None:
        """The region gets no more images: it is too small, or the daemon has ended it, or is another one now."""
        if self._region is not None:
            self._old[self._region.name] = self._region
            self._region = None
        self._close_unused()

    def doubt(self, place: protocol.Place, now: float) -> None:
        """A job that lies there was refused: the daemon may have ended that region."""
        if self._region is not None and self._region.name == place.region:
            self.retire()
            self._ask_from = now + ASK_ANEW_S

    def reconnected(self) -> None:
        """Whoever is at the other end now may not know of our region, and of what was asked."""
        self.retire()
        self._wanted = 0
        self._asked.clear()
        self._ask_from = 0.0
        self.problem = ""

    def close(self) -> None:
        self.retire()
        for region in self._old.values():
            region.close()
        self._old.clear()

    def _close_unused(self) -> None:
        for name in [name for name, region in self._old.items() if not region.used]:
            self._old.pop(name).close()
