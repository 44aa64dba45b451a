"""What the daemon owns of the host: its sockets, the locks beside them, the metrics page, the signals' pipe, shared
memory.

Opened on entry, given back on exit; `StartError` says what to do when one cannot be had. Nothing is decided here.
"""
from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import zmq

from daemon.metrics import MetricsServer
from daemon.settings import Settings
from daemon.shared_memory import SharedMemory

LINGER_MS = 2000  # for the last answers on their way to their clients
MESSAGES_PER_TURN = 64  # of each socket, so that a flood on one does not starve the others


class StartError(RuntimeError):
    """The daemon cannot start; the text says what to do."""


class Sockets:
    """`clients` and `workers` are ROUTERs, `signals` reads the numbers of SIGTERM, SIGINT and SIGHUP."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._context = zmq.Context()
        self._locks: list[IO[str]] = []
        self._handlers: dict[int, Any] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="blendmaskd-", dir=os.environ.get("RUNTIME_DIRECTORY"))
        self.workers_endpoint = f"ipc://{self._folder.name}/workers.sock"
        self.metrics: MetricsServer | None = None
        self.shared_memory: SharedMemory | None = None  # local clients', of whom there are none without an ipc endpoint

    def __enter__(self) -> Sockets:
        try:
            self.clients = self._router(self._settings.limits.max_image_bytes * 2 + (1 << 20))
            self.workers = self._router(-1)
            for endpoint in self._settings.endpoints.clients:
                self._bind(self.clients, endpoint)
            self._bind(self.workers, self.workers_endpoint)
            if self._settings.endpoints.metrics:
                self.metrics = _metrics(self._settings.endpoints.metrics)
            sockets = [endpoint.removeprefix("ipc://") for endpoint in self._settings.endpoints.clients
                       if endpoint.startswith("ipc://")]  # fmt: skip
            if sockets:
                self.shared_memory = SharedMemory(sockets)
            self._catch_signals()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            signal.set_wakeup_fd(-1)
            self.signals.close()
            self._wakeup.close()
        if self.metrics:
            self.metrics.close()
        if self.shared_memory:
            self.shared_memory.close()
        self._context.destroy(linger=LINGER_MS)
        for endpoint in self._settings.endpoints.clients:
            if self._locks and endpoint.startswith("ipc://"):
                Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)
        for lock in self._locks:
            lock.close()
        self._folder.cleanup()

    def _router(self, max_message_bytes: int) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects gets the answers to what it sent before
        router.set(zmq.MAXMSGSIZE, max_message_bytes)
        return router

    def _bind(self, router: zmq.Socket[bytes], endpoint: str) -> None:
        if endpoint.startswith("ipc://"):
            self._lock(Path(endpoint.removeprefix("ipc://")))
        try:
            router.bind(endpoint)
        except zmq.ZMQError as error:
            raise StartError(f"cannot listen on {endpoint}: {error}") from None

    def _lock(self, path: Path) -> None:
        """ZeroMQ takes over a socket path in use without a word: a lock beside it keeps a second daemon off."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{path}.lock", "w")  # noqa: SIM115
        except OSError as error:
            raise StartError(f"cannot use {path}: {error.strerror}; choose another endpoints.clients") from None
        self._locks.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._locks.remove(lock)
            lock.close()
            raise StartError(f"another daemon serves {path}; stop it first, or choose another endpoint") from None

    def _catch_signals(self) -> None:
        self.signals, self._wakeup = socket.socketpair()
        self.signals.setblocking(False)
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._handlers[number] = signal.signal(number, lambda *_: None)


def is_local(frame: zmq.Frame) -> bool:
    """Whether a message came by ipc. libzmq says ``name:uid:gid:pid`` of such a peer, and the address of one by tcp."""
    try:
        return re.fullmatch(r"[^:]*:\d+:\d+:\d+", str(frame.get("Peer-Address"))) is not None
    except zmq.ZMQError:  # a libzmq that cannot tell
        return False


def receive(router: zmq.Socket[bytes]) -> Iterator[list[zmq.Frame]]:
    """The messages that are here, at most `MESSAGES_PER_TURN`."""
    for _ in range(MESSAGES_PER_TURN):
        if not int(router.get(zmq.EVENTS)) & zmq.POLLIN:  # a third of what an exception costs
            return
        yield router.recv_multipart(zmq.NOBLOCK, copy=False)


def send(router: zmq.Socket[bytes], to: bytes, frames: Sequence[Any]) -> None:
    """Send a message without waiting; its payload is not copied.

    Raises ZMQError: EHOSTUNREACH for a peer that has left, EAGAIN for one that does not read.
    """
    head, payload = (to, *frames[:2]), frames[2:]
    for frame in head[:-1]:
        router.send(frame, zmq.NOBLOCK | zmq.SNDMORE)
    router.send(head[-1], zmq.NOBLOCK | (zmq.SNDMORE if payload else 0))
    for place, frame in enumerate(payload, start=1):
        router.send(frame, zmq.NOBLOCK | (zmq.SNDMORE if place < len(payload) else 0), copy=False)


def _metrics(endpoint: str) -> MetricsServer:
    try:
        return MetricsServer(endpoint)
    except OSError as error:
        raise StartError(f"endpoints.metrics: cannot listen on {endpoint}: {error.strerror}") from None
