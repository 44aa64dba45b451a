"""Shared memory as the daemon gets it: clients hand over memory files on a socket beside each ipc socket.

`protocol` specifies the exchange. Rules that keep everybody alive and nothing behind:

- **The memory is the client's.** It is charged to the client, and gone when the last who has it open closes it: there
  is no file to leave behind, whoever dies.
- **It is sealed against shrinking**, so that workers can map it: reading a file that was truncated would kill them.
  What is no memory file is refused before anything is asked of it that its file system could delay.
- **A region ends with its connection**, which the kernel closes when the client dies.
- **Who may connect to the ipc socket may connect here**: the same folder, the same umask. The name of a region is 128
  random bits, and whoever knows it may name it.
- **Nobody is waited for.** Closing what a peer has sent may take as long as the peer likes (a socket that lingers, a
  file of a slow file system), so a thread does it; when that has too much to do, nothing more is taken in.

What may become a region is decided in `blendmaskd.core.regions`.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec

from blendmaskd.core.regions import MOST_REGIONS, Memory
from blendmaskd.protocol import MAGIC, RegionError

MOST_UNANSWERED = 32  # connections; for one more, the oldest of them is closed
ANSWER_BY_S = 3.0  # that a client may take to send its memory
MOST_CLOSING = 64  # connections and descriptors that wait to be closed
MOST_SENT = 253  # descriptors that the kernel lets pass with one message; what is not received, it closes at once
ACCEPT_AT_ONCE = 64
LISTEN = select.EPOLLIN | select.EPOLLET  # when descriptors run out, the loop must not turn in circles


class Peer(msgspec.Struct, eq=False):
    """A client's connection, open as long as its region is."""

    socket: socket.socket
    pid: int
    uid: int
    silent_until: float
    descriptors: list[int]
    region: str = ""


class Offered(msgspec.Struct, frozen=True):
    """A client hands over memory: `accept` or `refuse` it."""

    peer: Peer
    memory: Memory


class Ended(msgspec.Struct, frozen=True):
    """The client of this region has closed it, or died."""

    region: str


class SharedMemory:
    """Listens at `listen`'s paths. `fileno()` is readable when `receive` has something to tell."""

    def __init__(self) -> None:
        self.most_regions = MOST_REGIONS
        self._events = select.epoll()  # one descriptor for the daemon's poller, however many clients there are
        self._listeners: dict[int, socket.socket] = {}
        self._peers: dict[int, Peer] = {}
        self._closing: queue.SimpleQueue[socket.socket | int | None] = queue.SimpleQueue()
        threading.Thread(target=_close, args=(self._closing,), name="close", daemon=True).start()

    def fileno(self) -> int:
        return self._events.fileno()

    def listen(self, path: str) -> None:
        """Raises OSError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._listeners[listener.fileno()] = listener
        listener.bind(path)
        listener.listen()
        self._events.register(listener, LISTEN)

    def receive(self, now: float) -> Iterator[Offered | Ended]:
        """What has happened."""
        for number, _ in self._events.poll(0):
            if number in self._listeners:
                self._take_in(self._listeners[number], now)
            elif number in self._peers:
                yield from self._read(self._peers[number])

    def expire(self, now: float) -> None:
        """Close what has been silent for too long; to be called each second."""
        for peer in [peer for peer in self._peers.values() if not peer.region and now >= peer.silent_until]:
            self._drop(peer)
        for listener in self._listeners.values():
            self._take_in(listener, now)

    def accept(self, offered: Offered, name: str) -> None:
        """It is a region now, of this name."""
        offered.peer.region = name
        self._answer(offered.peer, region=name)

    def refuse(self, offered: Offered, error: RegionError) -> None:
        self._answer(offered.peer, reason=str(error), left=error.left)
        self._drop(offered.peer)

    def close(self) -> None:
        for listener in self._listeners.values():
            listener.close()
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._closing.put(None)
        self._events.close()

    def _take_in(self, listener: socket.socket, now: float) -> None:
        if self._is_full():
            return
        with contextlib.suppress(OSError):  # none is left, or no descriptor is
            for _ in range(ACCEPT_AT_ONCE):
                accepted, _ = listener.accept()
                accepted.setblocking(False)
                unanswered = [peer for peer in self._peers.values() if not peer.region]
                if len(unanswered) >= MOST_UNANSWERED:
                    self._drop(unanswered[0])
                pid, uid, _ = struct.unpack("iII", accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                self._peers[accepted.fileno()] = Peer(accepted, pid, uid, now + ANSWER_BY_S, [])
                self._events.register(accepted, select.EPOLLIN)
            self._events.modify(listener, LISTEN)  # there may be more: tell it again

    def _read(self, peer: Peer) -> Iterator[Offered | Ended]:
        if peer.region:  # it has said all that it may: it is gone, or breaks the rules
            yield Ended(peer.region)  # which may read from it a last time
        if peer.region or self._is_full():
            self._drop(peer)
            return
        try:
            message, peer.descriptors, _, _ = socket.recv_fds(peer.socket, 16, MOST_SENT, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            message = b""
        try:
            if message != MAGIC or len(peer.descriptors) != 1:
                raise RegionError(f"expected {MAGIC.decode()} with one descriptor")
            if sum(bool(other.region) for other in self._peers.values()) >= self.most_regions:
                raise RegionError(f"{self.most_regions} regions are open, and the daemon has no descriptors for more")
            memory = _examine(peer)
        except RegionError as error:
            self._answer(peer, reason=str(error), left=0)
            self._drop(peer)
        else:
            yield Offered(peer, memory)

    def _answer(self, peer: Peer, **fields: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which its connection will tell
            peer.socket.send(msgpack.packb(fields))

    def _is_full(self) -> bool:
        return self._closing.qsize() >= MOST_CLOSING

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.socket.fileno()]
        self._events.unregister(peer.socket)
        self._closing.put(peer.socket)
        for descriptor in peer.descriptors:
            if peer.region:  # it is memory: at once, whatever else waits
                os.close(descriptor)
            else:
                self._closing.put(descriptor)


def _close(closing: queue.SimpleQueue[socket.socket | int | None]) -> None:
    while (found := closing.get()) is not None:
        if isinstance(found, int):
            _close_at_once(found)
        else:
            _close_unread(found)


def _close_unread(connection: socket.socket) -> None:
    """With what its peer has sent besides, which the kernel would close in its own way."""
    with connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
        more = True
        while more:
            message, descriptors, _, _ = socket.recv_fds(connection, 16, MOST_SENT, socket.MSG_CMSG_CLOEXEC)
            for descriptor in descriptors:
                _close_at_once(descriptor)
            more = bool(message or descriptors)


def _close_at_once(descriptor: int) -> None:
    """A socket may have been told to linger until its peer reads what was sent."""
    try:
        found = socket.socket(fileno=descriptor)
    except OSError:  # it is none
        os.close(descriptor)
        return
    with found, contextlib.suppress(OSError):
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


def _examine(peer: Peer) -> Memory:
    [descriptor] = peer.descriptors
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise RegionError("the descriptor is not a memory file's (memfd_create)") from None
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
        raise RegionError("the descriptor is for writing alone: images could not be read from it")
    found = os.fstat(descriptor)
    page = os.fstatvfs(descriptor).f_bsize
    return Memory(descriptor, found.st_ino, found.st_size, seals, page, peer.pid, peer.uid)
