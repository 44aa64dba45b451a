"""Peers that do what no library does, by ZeroMQ's protocol (rfc.zeromq.org/spec/23), and a polite client beside."""
from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import psutil

from blendmaskd import Client

IMAGE = np.zeros((48, 64, 3), np.uint8)
LONGEST_S = 1.0  # that a polite client may wait for an answer beside any attack
MOST_BYTES = 512 << 20  # that the daemon may take beside what it has when idle


def greeting(mechanism: bytes = b"NULL") -> bytes:
    return b"\xff" + bytes(7) + b"\1\x7f\3\0" + mechanism.ljust(20, b"\0") + bytes(32)


def head(size: int, *, more: bool = False, command: bool = False) -> bytes:
    """Of a frame of so many bytes."""
    flags = more | (4 if command else 0)
    return bytes([flags, size]) if size < 256 else bytes([flags | 2]) + size.to_bytes(8, "big")


def message(*frames: bytes) -> bytes:
    last = len(frames) - 1
    return b"".join(head(len(frame), more=place < last) + frame for place, frame in enumerate(frames))


def connect(endpoint: str, receive_bytes: int = 0) -> socket.socket:
    """A DEALER at an ipc endpoint, after its handshake. `receive_bytes`: of its buffer in the kernel.

    ZeroMQ closes some connections that come just after another has ended, so it may take several.
    """
    for _ in range(100):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(30)
        if receive_bytes:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        try:
            peer.connect(endpoint.removeprefix("ipc://"))
            _shake_hands(peer)
        except OSError:
            peer.close()
        else:
            return peer
    raise AssertionError("no connection")


def _shake_hands(peer: socket.socket) -> None:
    peer.sendall(greeting())
    if len(peer.recv(64, socket.MSG_WAITALL)) < 64:
        raise ConnectionResetError
    ready = b"\5READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", os.urandom(16))
    peer.sendall(head(len(ready), command=True) + ready)
    size = peer.recv(2, socket.MSG_WAITALL)
    if not size or not peer.recv(size[1], socket.MSG_WAITALL):  # its own READY
        raise ConnectionResetError


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


def is_closed(peer: socket.socket) -> bool:
    """Whether the other side has closed it; reads what there is."""
    peer.settimeout(0.05)
    try:
        while peer.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def send_all(peer: socket.socket, parts: Iterable[bytes]) -> None:
    """Until the other side closes it."""
    try:
        for part in parts:
            peer.sendall(part)
    except (BrokenPipeError, ConnectionResetError):
        pass


def read_all(peer: socket.socket) -> None:
    """Until either side closes it."""
    with contextlib.suppress(OSError):
        while peer.recv(1 << 16):
            pass


class Polite:
    """A client that has one image segmented after the other, as long as the block lasts.

    At its end no answer may have taken longer than `LONGEST_S`, and the daemon no more than `MOST_BYTES` more memory
    than at its beginning.
    """

    def __init__(self, running: Any, client: Client | None = None) -> None:
        self._client = client or running.connect()
        self._process = psutil.Process(running.process.pid)
        self._ended = threading.Event()
        self._trouble: Exception | None = None
        self.longest_s = 0.0
        self.answers = 0

    def _run(self) -> None:
        try:
            while not self._ended.wait(0.02):
                self.most_bytes = max(self.most_bytes, self._process.memory_info().rss)
                begun = time.monotonic()
                self._client.segment(IMAGE)
                self.longest_s = max(self.longest_s, time.monotonic() - begun)
                self.answers += 1
        except Exception as error:
            self._trouble = error

    def __enter__(self) -> Polite:
        self._client.segment(IMAGE)
        self.idle_bytes = self.most_bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        enough, deadline = self.answers + 5, time.monotonic() + 20  # after all of the attack
        while kind is None and self.answers < enough and self._thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._ended.set()
        self._thread.join()
        if kind is not None:
            return
        assert self._trouble is None, self._trouble
        assert self.answers >= enough
        assert self.longest_s < LONGEST_S
        assert self.most_bytes - self.idle_bytes < MOST_BYTES
