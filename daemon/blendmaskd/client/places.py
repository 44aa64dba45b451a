"""Places in shared memory: how a client on the daemon's host hands images over without sending them.

A region is memory of the client's (see `blendmaskd.protocol`), divided into equal places; an image is copied into a
free one, and the place is free again when its job has its last answer. The place that was freed last is used first,
so only as many pages take memory as images are in flight at once. For a larger image, a new region with larger places
takes the old one's part; the old one is given back when its last place is free.

What cannot go by shared memory goes by socket: nothing here fails a job, unless the client demands shared memory.

Nothing here waits: the daemon's answer makes `Places.fileno` readable. No clock. Only Linux has what this takes, as
`SUPPORTED` says; elsewhere this module can be imported, and no more.
"""
from __future__ import annotations

import errno
import math
import mmap
import os
import select
import socket
from typing import Any

import msgpack

from blendmaskd.protocol import MAGIC, MEMORY_SUFFIX, Place

SUPPORTED = hasattr(os, "memfd_create") and hasattr(select, "epoll") and hasattr(socket, "SOCK_SEQPACKET")
SMALLEST_BYTES = 64 << 10  # below, the socket is as good
PLACES = 32  # in a region: as many images as a client commonly has in flight
AGAIN_S = 10.0  # after a refusal
ANEW_S = 1.0  # after a region that workers cannot read
ABSENT = (errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE, errno.EAGAIN)
ABSENT_S = 0.1  # after no daemon was there


class Region:
    """Memory of ours that the daemon and its workers may read. Use `place`s of it when it has a `name`."""

    def __init__(self, place_bytes: int, places: int) -> None:
        """Raises OSError."""
        import fcntl  # not everywhere

        self.name = ""
        self.place_bytes = place_bytes
        self._places = places
        self._free = list(reversed(range(places)))
        self._allocated = [0] * places  # bytes of each that surely have memory
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._memory = os.memfd_create("blendmaskd", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            os.ftruncate(self._memory, places * place_bytes)
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._map = mmap.mmap(self._memory, places * place_bytes)
        except OSError:
            os.close(self._memory)
            self.socket.close()
            raise

    def offer(self, path: str) -> None:
        """Hand it over to the daemon whose ipc socket has this path. Raises OSError."""
        try:
            self.socket.connect(f"{path}{MEMORY_SUFFIX}")
            socket.send_fds(self.socket, [MAGIC], [self._memory])
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), f"{path}{MEMORY_SUFFIX}") from None

    def answer(self) -> dict[str, Any]:
        """What the daemon says to the offer. Raises OSError for nothing yet, or nothing any more."""
        message = self.socket.recv(4096)
        if not message:
            raise ConnectionResetError(errno.ECONNRESET, "the daemon has closed the connection")
        answer: dict[str, Any] = msgpack.unpackb(message)
        self.name = answer.get("region", "")
        return answer

    @property
    def used(self) -> int:
        return self._places - len(self._free)

    @property
    def full(self) -> bool:
        return not self._free

    def put(self, view: memoryview) -> Place:
        """Copy an image into a free place. Raises OSError when there is no memory."""
        number = self._free[-1]
        offset = number * self.place_bytes
        if self._allocated[number] < len(view):  # writing where there is no memory to be had would be SIGBUS
            os.posix_fallocate(self._memory, offset, len(view))
            self._allocated[number] = len(view)
        self._map[offset : offset + len(view)] = view
        self._free.pop()
        return Place(region=self.name, offset=offset, bytes=len(view))

    def give_back(self, place: Place) -> None:
        self._free.append(place.offset // self.place_bytes)

    def close(self) -> None:
        self._map.close()
        os.close(self._memory)
        self.socket.close()


class Places:
    """A client's shared memory. `required`: images never go by socket because there is none.

    `problem` says why there is no region, as far as that is known; `again_at` is when it pays to `put` again.
    """

    def __init__(self, path: str, required: bool) -> None:
        """`path` is that of the daemon's ipc socket."""
        self.required = required
        self.problem = ""
        self.again_at = math.inf
        self._path = path
        self._events = select.epoll()
        self._regions: dict[str, Region] = {}  # by name: the one in use, and retired ones with jobs unanswered
        self._region: Region | None = None  # the one in use
        self._offered: Region | None = None  # not answered yet
        self._offer_from = 0.0

    def fileno(self) -> int:
        """A descriptor that is readable when `receive` has something to do."""
        return self._events.fileno()

    def put(self, payload: Any, now: float) -> Place | None:
        """Copy an image in. None: there is no place for it, now or, when `problem` says why, at all."""
        view = memoryview(payload)
        if view.nbytes < (1 if self.required else SMALLEST_BYTES) or not view.c_contiguous:
            return None
        self.again_at = math.inf
        if self._region is None or view.nbytes > self._region.place_bytes:
            if self._offered is None:
                self._offer(max(1 << (view.nbytes - 1).bit_length(), SMALLEST_BYTES), PLACES, now)
            return None
        if self._region.full:
            return None
        try:
            place = self._region.put(view.cast("B"))
        except OSError as error:
            self.problem = f"no memory: {error.strerror}"
            return None
        self.problem = ""
        return place

    def receive(self, now: float) -> None:
        """Take in what the daemon says: of what was offered, or that it has gone."""
        for number, _ in self._events.poll(0):
            if self._offered is not None and number == self._offered.socket.fileno():
                self._answered(self._offered, now)
            elif self._region is not None and number == self._region.socket.fileno():
                self._retire()

    def give_back(self, place: Place) -> None:
        self._regions[place.region].give_back(place)
        self._close_unused()

    def doubt(self, place: Place, now: float) -> None:
        """A job that lies there was refused: the workers may be unable to read that region."""
        if self._region is not None and self._region.name == place.region:
            self._retire()
            self._offer_from = now + ANEW_S

    def close(self) -> None:
        self._withdraw()
        self._retire()
        for region in self._regions.values():
            region.close()
        self._regions.clear()

    def _offer(self, place_bytes: int, places: int, now: float) -> None:
        if now < self._offer_from:
            self.again_at = self._offer_from
            return
        there = os.path.exists(self._path)
        try:
            self._offered = Region(place_bytes, places)
            self._events.register(self._offered.socket, select.EPOLLIN)
            self._offered.offer(self._path)
        except OSError as error:
            self._failed(error, there and os.path.exists(self._path), now)

    def _answered(self, region: Region, now: float) -> None:
        try:
            answer = region.answer()
        except OSError as error:
            self._failed(error, True, now)
            return
        if region.name:
            self._retire()
            self._region = self._regions[region.name] = region
            self._offered, self.problem = None, ""
            return
        self._withdraw()
        places = answer.get("left", 0) // region.place_bytes
        if places:
            self._offer(region.place_bytes, places, now)
        else:
            self.problem, self._offer_from = answer.get("reason", "refused"), now + AGAIN_S

    def _failed(self, error: OSError, there: bool, now: float) -> None:
        """`there`: the daemon's ipc socket was, before and after; `shell.endpoint_files` tells their order."""
        self._withdraw()
        if error.errno in ABSENT or (error.errno == errno.ENOENT and not there):
            self.problem, self._offer_from = "", now + ABSENT_S  # no daemon is there; as ZeroMQ does, wait for one
        else:
            self.problem, self._offer_from = f"{self._path}{MEMORY_SUFFIX}: {error.strerror}", now + AGAIN_S
        self.again_at = self._offer_from

    def _withdraw(self) -> None:
        if self._offered is not None:
            self._events.unregister(self._offered.socket)
            self._offered.close()
            self._offered = None

    def _retire(self) -> None:
        """The region gets no more images: it is too small, or the daemon has ended it."""
        if self._region is not None:
            self._events.unregister(self._region.socket)
            self._region = None
        self._close_unused()

    def _close_unused(self) -> None:
        unused = [name for name, region in self._regions.items() if region is not self._region and not region.used]
        for name in unused:
            self._regions.pop(name).close()
