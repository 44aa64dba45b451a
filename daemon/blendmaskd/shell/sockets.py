"""What the daemon owns of the host: its sockets, the locks beside them, the pages.

Opened on entry, given back on exit; `StartError` says what to do when one cannot be had. Nothing is decided here, but
one thing: what an ipc endpoint makes is never open to others than its owner and group, whatever the umask; the umask
may narrow it further, and the mode of the folder guards it again.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import operator
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from blendmaskd.endpoints import ipc_path
from blendmaskd.keys import KeyFileError, Pair, read_pair
from blendmaskd.protocol import MEMORY_SUFFIX, SURE_BYTES
from blendmaskd.settings import Settings
from blendmaskd.shell import descriptors, threads
from blendmaskd.shell.addresses import unbound
from blendmaskd.shell.admission.access import FROM_AFAR, FROM_HERE, AllowedKeys
from blendmaskd.shell.admission.gate import Gate
from blendmaskd.shell.endpoint_files import EndpointFiles, EndpointTaken, obstacle
from blendmaskd.shell.pages import Pages
from blendmaskd.shell.shared_memory import SharedMemory

LINGER_MS = 2000  # for the last answers on their way to their clients
NOT_FOR_OTHERS = 0o007
NOBLOCK = int(zmq.NOBLOCK)  # a flag that is no plain number costs as much as receiving a frame
AND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
WORKERS_SOCKET = "workers.sock"
BACKLOG = 100  # local connections that wait to be accepted
MESSAGES_PER_TURN = 64  # of each socket, so that a flood on one does not starve the others
MOST_FRAMES = 16  # of a client's message; no right one has more than four, with its sender's identity
TURN_S = 0.02  # after which no more are read in a turn: some cost milliseconds each
FRAMES_READ_AWAY = 16384  # in a turn, some 20 ms, of a message that has more
LAST_S = 0.1  # for the last messages of the dead, which are there within a millisecond; the loop waits
_more = operator.attrgetter("more")


class StartError(RuntimeError):
    """The daemon cannot start; the text says what to do."""


class Sockets:
    """`workers` is a ROUTER, `clients` are those of local ones and, where they may connect, of remote ones.

    `gate` watches over the clients' connections; `allowed` are the keys that may connect by tcp, None where no keys
    are needed.

    `no_memory` says why there is no shared memory, where there is none although there is an ipc endpoint.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._most_files = _make_room()
        self._folder = private_folder()
        self._kinds = ("ipc", "tcp") if any(map(_is_tcp, settings.endpoints.clients)) else ("ipc",)
        # workers, local and remote clients: what one of these sends keeps no thread of the others busy. Without remote
        # ones a second thread would only cost a tenth more CPU
        self._threads = 3 if "tcp" in self._kinds else 1
        self._context = zmq.Context(io_threads=self._threads)
        self._files: list[EndpointFiles] = []
        self.workers_endpoint = f"ipc://{self._folder.name}/{WORKERS_SOCKET}"
        self.pages: Pages | None = None
        self.shared_memory = SharedMemory()
        self.no_memory = ""
        self._gate: Gate | None = None
        self.allowed: AllowedKeys | None = None

    def __enter__(self) -> Sockets:
        try:
            self.workers = self._router(-1)
            self.workers.set(zmq.SNDHWM, 0)  # at a mark a lease would be lost; what a worker may hold is bounded
            endpoints = self._settings.endpoints.clients
            most_bytes = self._settings.limits.max_image_bytes * 2 + SURE_BYTES
            self.clients = [
                Clients(self._router(most_bytes, place), kind) for place, kind in enumerate(self._kinds, start=1)
            ]
            keys = self._keys() if "tcp" in self._kinds else None
            self.gate = self._gate = self._make_gate()
            self.gate.refresh()
            paths = [ipc_path(each) for each in endpoints if not _is_tcp(each)]
            for path in paths:  # before anything is touched
                if taken := obstacle(path):
                    raise _taken(taken)
            with _umask(NOT_FOR_OTHERS):
                for path in paths:
                    self._bind(path)
                _listen(self.workers_endpoint, self.workers.bind)
            for endpoint in filter(_is_tcp, endpoints):
                _listen(endpoint, functools.partial(self.gate.bind, keys=keys))
            if self._settings.endpoints.metrics:
                self.pages = _pages(self._settings.endpoints.metrics, self._settings.http.url)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.pages:
            self.pages.close()
        self.shared_memory.close()
        self._context.destroy(linger=LINGER_MS)
        if self._gate:
            self._gate.end()
        for files in self._files:
            files.close()
        self._folder.cleanup()

    def _router(self, max_message_bytes: int, thread: int = 0) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.set(zmq.AFFINITY, 1 << thread % self._threads)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.ROUTER_HANDOVER, 1)  # a client that reconnects gets the answers to what it sent before
        router.set(zmq.MAXMSGSIZE, max_message_bytes)
        return router

    def _make_gate(self) -> Gate:
        most = descriptors.most_connections(self._most_files)
        self.shared_memory.most_regions = descriptors.most_regions(self._most_files)
        routers = {clients.kind: clients.router for clients in self.clients}
        return Gate(self._context, routers, self.allowed, most, min(self._settings.limits.max_connections, most))

    def _bind(self, path: str) -> None:
        try:
            files = EndpointFiles(path)
            self._files.append(files)
            self._listen_for_memory(files, f"{path}{MEMORY_SUFFIX}")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
                listener.bind(path)
                files.made(path)
                listener.listen(BACKLOG)
                self.gate.bind_local(listener)
        except EndpointTaken as taken:
            raise _taken(taken) from None
        except (OSError, zmq.ZMQError) as error:
            reason = error.strerror or error
            raise StartError(f"cannot use {path}: {reason}; choose another endpoints.clients") from None

    def _listen_for_memory(self, files: EndpointFiles, path: str) -> None:
        try:
            self.shared_memory.listen(path)
            files.made(path)
        except OSError as error:
            self.no_memory = f"{path}: {error}"

    def missing(self) -> list[str]:
        """Files of ours that others have removed or replaced: nobody can connect there any more."""
        workers = ipc_path(self.workers_endpoint)
        missing = [path for files in self._files for path in files.missing()]
        return missing if os.path.exists(workers) else [*missing, workers]

    def _keys(self) -> Pair | None:
        """The daemon's own, where tcp endpoints have keys; then `allowed` is known too."""
        if not self._settings.curve.server_key or not self._settings.curve.client_keys:
            return None
        try:
            keys = read_pair(self._settings.curve.server_key)
        except KeyFileError as error:
            raise StartError(f"curve.server_key: {error}") from None
        self.allowed = AllowedKeys(self._settings.curve.client_keys)
        if not os.path.isdir(self.allowed.folder):
            folder = self.allowed.folder
            raise StartError(f"curve.client_keys: {folder}: no such folder; create it with `blendmaskd-keys server`")
        return keys


def _make_room() -> int:
    """The soft limit of open files, raised now as far as clients may need. ZeroMQ aborts where its sockets find none,
    or where it may start no thread.

    Raises `StartError`.
    """
    if complaint := threads.shortage(threads.startable()):
        raise StartError(f"{complaint}; {threads.REMEDY}")
    files, most = descriptors.limits()
    if complaint := descriptors.shortage(most):
        raise StartError(f"{complaint}; {descriptors.REMEDY}")
    descriptors.make_room(files)
    return files


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder of this run alone, for the workers' socket: in systemd's RUNTIME_DIRECTORY, or where temporary files go.

    Raises `StartError` when none can be made, or its name leaves no room for a socket's.
    """
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]  # of a unit with several: the first
    variable = "RUNTIME_DIRECTORY" if runtime else "TMPDIR"
    try:
        place = os.path.abspath(runtime or tempfile.gettempdir())  # an endpoint is a path from the root
        folder = tempfile.TemporaryDirectory(prefix="blendmaskd-", dir=place)
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


def _is_tcp(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def _taken(reason: object) -> StartError:
    return StartError(f"endpoints.clients: {reason}: stop or move it, or choose another endpoint")


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
    except (OSError, zmq.ZMQError) as error:
        raise StartError(f"cannot listen on {endpoint}: {unbound(error)}") from None


class Clients:
    """The socket of all clients of a kind, `ipc` or `tcp`: what those of one kind send does not hold up the other.

    No message makes more than `MOST_FRAMES` objects here, whatever it has. ZeroMQ has no bound on the frames of a
    message, and no way to drop one but to read it. So what is left of a longer one is read away, a part in each turn,
    and nothing else of this socket comes meanwhile.
    """

    def __init__(self, router: zmq.Socket[bytes], kind: str) -> None:
        self.router = router
        self.kind = kind
        self.behind = False  # messages were left to be read
        self._prefix = FROM_AFAR if kind == "tcp" else FROM_HERE
        self._unfinished = False

    def name(self, frame: zmq.Frame) -> bytes:
        """The client with this identity, as the rest of the daemon knows it."""
        return self._prefix + frame.bytes

    def receive(self) -> Iterator[list[zmq.Frame]]:
        """Those that are here, a bounded number. The last frame of one that is too long says that there are `more`."""
        until = time.monotonic() + TURN_S
        self.behind = True
        for _ in range(MESSAGES_PER_TURN):
            if time.monotonic() >= until:
                return
            if self._unfinished:
                self._read_away()
            if self._unfinished:
                return
            try:
                frames = [self.router.recv(NOBLOCK, copy=False)]
            except zmq.Again:
                self.behind = False
                return
            while frames[-1].more and len(frames) < MOST_FRAMES:
                frames.append(self.router.recv(NOBLOCK, copy=False))
            self._unfinished = frames[-1].more
            yield frames

    def _read_away(self) -> None:
        """Without a line of Python for each frame, which would take three times as long."""
        frames = map(self.router.recv, itertools.repeat(NOBLOCK, FRAMES_READ_AWAY), itertools.repeat(False))
        self._unfinished = all(map(_more, frames))


def receive(router: zmq.Socket[bytes], most: int = MESSAGES_PER_TURN) -> Iterator[list[zmq.Frame]]:
    """The messages that are here, at most so many."""
    for _ in range(most):
        try:
            frames = [router.recv(NOBLOCK, copy=False)]
        except zmq.Again:  # asking before costs half as much, but each time
            return
        while frames[-1].more:  # the frame knows; `recv_multipart` asks the socket, which costs as much as receiving
            frames.append(router.recv(NOBLOCK, copy=False))
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
    """Send a message without waiting; its payload, and a frame of ZeroMQ's own, is not copied.

    Returns 0, EHOSTUNREACH for a peer that has left, or EAGAIN for one that does not read.
    """
    head, payload = (to, *frames[:2]), frames[2:]
    try:
        for frame in head[:-1]:
            router.send(frame, AND_MORE)
        router.send(head[-1], AND_MORE if payload else NOBLOCK, copy=not isinstance(head[-1], zmq.Frame))
        for place, frame in enumerate(payload, start=1):
            router.send(frame, AND_MORE if place < len(payload) else NOBLOCK, copy=False)
    except zmq.ZMQError as error:
        if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
            raise
        return error.errno
    return 0


def send_to_client(sockets: Sequence[Clients], client: bytes, frames: Sequence[Any]) -> int:
    """As `send`, by the socket of its kind."""
    if client.startswith(FROM_AFAR):
        return send(sockets[-1].router, client.removeprefix(FROM_AFAR), frames)
    return send(sockets[0].router, client.removeprefix(FROM_HERE), frames)


def _pages(endpoint: str, front: str) -> Pages:
    try:
        return Pages(endpoint, front=front)
    except OSError as error:
        raise StartError(f"endpoints.metrics: cannot listen on {endpoint}: {unbound(error)}") from None
