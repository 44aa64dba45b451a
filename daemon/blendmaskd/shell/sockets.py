"""What the daemon owns of the host: its sockets, the locks beside them, the pages.

Opened on entry, given back on exit; `StartError` says what to do when one cannot be had. Nothing is decided here, but
one thing: what an ipc endpoint makes is never open to others than its owner and group, whatever the umask; the umask
may narrow it further, and the mode of the folder guards it again.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import ipaddress
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import zmq

from blendmaskd.keys import KeyFileError, read_pair
from blendmaskd.protocol import MEMORY_SUFFIX
from blendmaskd.settings import Settings
from blendmaskd.shell.admission.access import AllowedKeys
from blendmaskd.shell.admission.departures import Departures
from blendmaskd.shell.admission.gate import Gate
from blendmaskd.shell.pages import Pages
from blendmaskd.shell.shared_memory import SharedMemory

LINGER_MS = 2000  # for the last answers on their way to their clients
NOT_FOR_OTHERS = 0o007
WORKERS_SOCKET = "workers.sock"
MESSAGES_PER_TURN = 64  # of each socket, so that a flood on one does not starve the others
LAST_S = 0.1  # for the last messages of the dead, which are there within a millisecond; the loop waits


class StartError(RuntimeError):
    """The daemon cannot start; the text says what to do."""


class Sockets:
    """`clients` and `workers` are ROUTERs.

    `gate` watches over tcp:// endpoints, and is None without; `allowed` are the keys that may connect there, None
    where no keys are needed.

    `departures` tells of clients that left, and is None with a gate, which has the socket's only monitor.

    `no_memory` says why there is no shared memory, where there is none although there is an ipc endpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = private_folder()
        self._context = zmq.Context()
        self._locks: dict[str, IO[str]] = {}  # by path
        self.workers_endpoint = f"ipc://{self._folder.name}/{WORKERS_SOCKET}"
        self.pages: Pages | None = None
        self.shared_memory = SharedMemory()
        self.no_memory = ""
        self.gate: Gate | None = None
        self.departures: Departures | None = None
        self.allowed: AllowedKeys | None = None

    def __enter__(self) -> Sockets:
        try:
            self.clients = self._router(self._settings.limits.max_image_bytes * 2 + (1 << 20))
            self.workers = self._router(-1)
            self.workers.set(zmq.SNDHWM, 0)  # at a mark a lease would be lost; what a worker may hold is bounded
            endpoints = self._settings.endpoints.clients
            if not any(map(_is_tcp, endpoints)):
                self.departures = Departures(self._context, self.clients)
            with _umask(NOT_FOR_OTHERS):
                for endpoint in (each for each in endpoints if not _is_tcp(each)):
                    self._bind(self.clients, endpoint)
                self._bind(self.workers, self.workers_endpoint)
            self._bind_tcp([each for each in endpoints if _is_tcp(each)])  # last: it changes the socket's options
            if self._settings.endpoints.metrics:
                self.pages = _pages(self._settings.endpoints.metrics)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.pages:
            self.pages.close()
        self.shared_memory.close()
        self._context.destroy(linger=LINGER_MS)
        if self.gate:
            self.gate.end()
        for path, lock in self._locks.items():
            _unlink(path)
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
            path = endpoint.removeprefix("ipc://")
            self._lock(path)
            _unlink(path)
            try:
                self.shared_memory.listen(f"{path}{MEMORY_SUFFIX}")
            except OSError as error:
                self.no_memory = f"{path}{MEMORY_SUFFIX}: {error}"
        _listen(endpoint, router.bind)

    def _bind_tcp(self, endpoints: Sequence[str]) -> None:
        if not endpoints:
            return
        keys = None
        if self._settings.curve.server_key and self._settings.curve.client_keys:
            try:
                keys = read_pair(self._settings.curve.server_key)
            except KeyFileError as error:
                raise StartError(f"curve.server_key: {error}") from None
            self.allowed = AllowedKeys(self._settings.curve.client_keys)
            if not self.allowed.folder.is_dir():
                folder = self.allowed.folder
                remedy = "create it with `blendmaskd-keys server`"
                raise StartError(f"curve.client_keys: {folder}: no such folder; {remedy}")
        self.gate = Gate(self._context, self.clients, self.allowed, self._settings.limits.max_connections)
        self.gate.refresh()
        for endpoint in endpoints:
            _listen(endpoint, functools.partial(self.gate.bind, keys=keys))

    def _lock(self, path: str) -> None:
        """ZeroMQ takes over a socket path in use without a word: a lock beside it keeps a second daemon off."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            lock = open(f"{path}.lock", "w")  # noqa: SIM115
        except OSError as error:
            raise StartError(f"cannot use {path}: {error.strerror}; choose another endpoints.clients") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise StartError(f"another daemon serves {path}; stop it first, or choose another endpoint") from None
        self._locks[path] = lock


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this run alone, for the workers' socket: in systemd's RUNTIME_DIRECTORY, or where temporary files go.

    Raises `StartError` when none can be made, or its name leaves no room for a socket's.
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]  # of a unit with several: the first
    variable = "RUNTIME_DIRECTORY" if runtime else "TMPDIR"
    try:
        folder = tempfile.TemporaryDirectory(prefix="blendmaskd-", dir=runtime or None)
    except OSError as error:
        raise StartError(
            f"no folder for the workers' socket: {error}; set {variable} to a folder that this user can write"
        ) from None
    size = len(os.fsencode(f"{folder.name}/{WORKERS_SOCKET}"))
    if size > zmq.IPC_PATH_MAX_LEN:
        folder.cleanup()
        raise StartError(
            f"{variable}={runtime or tempfile.gettempdir()}: too long, the workers' socket there would have a path of "
            f"{size} bytes, at most {zmq.IPC_PATH_MAX_LEN} are possible; set {variable} to a shorter one"
        )
    return folder


def is_loopback(endpoint: str | None) -> bool:
    """Whether HOST:PORT is this host's alone; so is None, which is not listened to."""
    if endpoint is None:
        return True
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


@contextlib.contextmanager
def _umask(bits: int) -> Iterator[None]:
    """Take these permissions away from new files, beside those that are taken away already."""
    before = os.umask(0o777)
    os.umask(before | bits)
    try:
        yield
    finally:
        os.umask(before)


def _listen(endpoint: str, bind: Callable[[str], object]) -> None:
    try:
        bind(endpoint)
    except zmq.ZMQError as error:
        raise StartError(f"cannot listen on {endpoint}: {error}") from None


def _unlink(path: str) -> None:
    """In this order: where an ipc socket is without the other one, its daemon has no shared memory."""
    for socket_path in (path, f"{path}{MEMORY_SUFFIX}"):
        with contextlib.suppress(OSError):  # who listens there next says what is wrong
            os.unlink(socket_path)


def receive(router: zmq.Socket[bytes], most: int = MESSAGES_PER_TURN) -> Iterator[list[zmq.Frame]]:
    """The messages that are here, at most so many."""
    for _ in range(most):
        if not int(router.get(zmq.EVENTS)) & zmq.POLLIN:  # a third of what an exception costs
            return
        frames = [router.recv(zmq.NOBLOCK, copy=False)]
        while frames[-1].more:  # the frame knows; `recv_multipart` asks the socket, which costs as much as receiving
            frames.append(router.recv(zmq.NOBLOCK, copy=False))
        yield frames


def receive_last(router: zmq.Socket[bytes], peer: bytes) -> Iterator[list[zmq.Frame]]:
    """All messages that are left of a peer whose process has exited, among those of others.

    ZeroMQ's thread may still have some to take in. It says that a connection has ended after all that came by it, so
    what was there when the peer became unreachable is all. A process that the peer left behind may hold the connection
    open: after `LAST_S` no more is waited for.
    """
    deadline = time.monotonic() + LAST_S
    while not send(router, peer, [b""]) and time.monotonic() < deadline:
        yield from receive(router)
        router.poll(1)  # ms
    yield from receive(router, sys.maxsize)


def send(router: zmq.Socket[bytes], to: bytes, frames: Sequence[Any]) -> int:
    """Send a message without waiting; its payload is not copied.

    Returns 0, EHOSTUNREACH for a peer that has left, or EAGAIN for one that does not read.
    """
    head, payload = (to, *frames[:2]), frames[2:]
    try:
        for frame in head[:-1]:
            router.send(frame, zmq.NOBLOCK | zmq.SNDMORE)
        router.send(head[-1], zmq.NOBLOCK | (zmq.SNDMORE if payload else 0))
        for place, frame in enumerate(payload, start=1):
            router.send(frame, zmq.NOBLOCK | (zmq.SNDMORE if place < len(payload) else 0), copy=False)
    except zmq.ZMQError as error:
        if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
            raise
        return error.errno
    return 0


def _pages(endpoint: str) -> Pages:
    try:
        return Pages(endpoint)
    except OSError as error:
        raise StartError(f"endpoints.metrics: cannot listen on {endpoint}: {error.strerror}") from None
