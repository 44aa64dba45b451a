"""What is thrown at a running daemon, and what must come of it.

``daemon``: messages at the clients' socket. Each is answered as the wire's specification says, or dropped by it: what
cannot be read gets one `failed` with `bad-request`; a job gets exactly one answer while it is unanswered; nothing is
said of a `cancel`; what is no ZeroMQ at all loses its connection. ``memory``: descriptors, and what is none, at the
socket for shared memory; then places in it, hostile ones, and memory that changes while it is read. ``pages``: requests
at the metrics port.

Each feeds one input; `settle` waits for what is owed.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import tempfile
import time
from collections import Counter
from random import Random
from typing import Any

import msgpack
import zmq

from blendmaskd import protocol
from blendmaskd.protocol import MAGIC, MEMORY_SUFFIX, Code, Failed, Fetch, Forget, Image, Place, ProtocolError, Submit
from blendmaskd.shell.sockets import MOST_FRAMES
from fuzz import headers, pictures
from fuzz.front import Front
from fuzz.live import Stranger, Target, first_said
from fuzz.mutate import EDGES, mutate
from fuzz.rules import LIMITS, BrokenRuleError

OWED_S = 60.0  # in which all is answered
MOST_OWED = 200  # messages, before answers are waited for
READ_S = 20.0  # in which a connection is answered or closed
# Codes that no message may get out of the daemon, whatever it says.
_NEVER = {Code.ENGINE_FAILED, Code.WORKER_LOST, Code.UNAVAILABLE, Code.DRAINING}


class Messages(Stranger):
    """At the clients' socket. `outcomes` counts the answers by code."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.close()  # the first input opens one
        self._sent = 0
        self._jobs = 0
        self._may: Counter[str] = Counter()  # by job, answers that may still come: one for each message, perhaps later
        self._begin()

    def _begin(self) -> None:
        self._refused: Counter[str] = Counter()  # by job, what must be answered
        self._submitted: Counter[str] = Counter()
        self._answered: Counter[str] = Counter()
        self._stats = 0

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def feed(self, random: Random) -> str:
        if random.random() < 0.01:
            return self._no_zeromq(random)
        self._connect(random)
        frames = self._frames(random) or [b""]  # pyzmq sends no message of no frames
        if len(frames) >= MOST_FRAMES or any(len(frame) > protocol.SURE_BYTES for frame in frames[:2]):
            return self._excessive(frames)
        self._expect(frames)
        self._socket.send_multipart(frames)
        self._sent += 1
        if self._sent >= MOST_OWED:
            self.settle()
        return ""

    def _excessive(self, frames: list[bytes]) -> str:
        """It costs its connection, so what is owed there comes before."""
        self.settle()
        monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.send_multipart(frames)
        if not monitor.poll(int(OWED_S * 1000)):
            raise BrokenRuleError(f"a message of frames of {[len(frame) for frame in frames[:20]]} bytes was taken")
        self._socket.disable_monitor()
        self._socket.close(linger=0)
        return "excessive: cut off"

    def settle(self) -> None:
        """All that is owed has come."""
        if self._socket.closed:
            return
        self._socket.send_multipart(protocol.encode(protocol.GetStats()))
        self._stats += 1
        deadline = time.monotonic() + OWED_S
        while self._owed():
            if not self._socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                raise BrokenRuleError(f"not answered within {OWED_S:g} s: {self._owed()!r:.500}")
            self._receive()
        while self._socket.poll(0):
            self._receive()
        self._sent = 0
        self._begin()

    def _connect(self, random: Random) -> None:
        """Now and then a new connection, some with a name of their own."""
        if not self._socket.closed and (self._sent or random.random() < 0.7):
            return
        self._socket.close(linger=0)
        self._socket = self._context.socket(zmq.DEALER)
        if random.random() < 0.3:
            self._socket.set(zmq.IDENTITY, b"x" + random.randbytes(random.choice((0, 1, 30, 254))))
        self._socket.connect(self._target.host.endpoint)

    def _frames(self, random: Random) -> list[bytes]:
        kind = random.random()
        if kind < 0.6:
            return headers.frames(random, headers.SIDES[0] if random.random() < 0.8 else random.choice(headers.SIDES))
        if kind < 0.9:
            self._jobs += 1
            image = random.choice((Image(kind="encoded"), _raw_image(random)))
            submit = Submit(job=f"good-{self._jobs}", image=image, options=headers.options(random))
            return protocol.encode(submit, [pictures.damaged(random)])
        count = random.choice((0, 1, 2, 3, 100, 10_000)) if kind < 0.95 else 3
        frames = [random.choice((b"", MAGIC, b"x")) for _ in range(count)]
        if kind >= 0.98:
            frames.append(bytes(random.choice((LIMITS.max_image_bytes, LIMITS.max_image_bytes + 1, 1 << 20))))
        return frames

    def _expect(self, frames: list[bytes]) -> None:
        """What must come of it, by the specification."""
        try:
            message, _ = protocol.decode(frames, protocol.FROM_CLIENT)
        except ProtocolError as error:
            self._refused[error.job] += 1
            self._may[error.job] += 1
            return
        match message:
            case Submit(durable=False):
                self._submitted[message.job] += 1
                self._may[message.job] += 1
            case Submit() | Fetch() | Forget():
                self._may[message.job] += 1
            case protocol.GetStats():
                self._stats += 1

    def _owed(self) -> dict[str, int]:
        """Jobs that have fewer answers than they must; a repeated name may have one for all that came in time."""
        names = {*self._refused, *self._submitted}
        missing = {job: self._refused[job] + (self._submitted[job] > 0) - self._answered[job] for job in names}
        owed = {job: count for job, count in missing.items() if count > 0}
        return {**owed, "stats": self._stats} if self._stats else owed

    def _receive(self) -> None:
        message, _ = protocol.decode(self._socket.recv_multipart(), protocol.TO_CLIENT)
        if isinstance(message, protocol.Stats):
            self._stats -= 1
            self.outcomes["stats"] += 1
            return
        assert not isinstance(message, protocol.Limits), "nobody has asked"
        self._answered[message.job] += 1
        self._may[message.job] -= 1
        if self._may[message.job] < 0:
            raise BrokenRuleError(f"job {message.job!r}: more answers than messages, the last is {message}")
        self.outcomes[_outcome(message)] += 1

    def _no_zeromq(self, random: Random) -> str:
        """Bytes at the bare socket, with and without a greeting before them."""
        greeting = (
            b"\xff" + bytes(8) + b"\x7f\3" + bytes([random.choice((0, 1))]) + b"NULL".ljust(20, b"\0") + bytes(32)
        )
        name = random.randbytes(random.choice((0, 5, 255)))
        properties = b"\x0bSocket-Type\0\0\0\6DEALER\x08Identity" + struct.pack(">I", len(name)) + name
        ready = b"\4" + bytes([6 + len(properties) & 255]) + b"\5READY" + properties
        giant = b"\2" + struct.pack(">Q", random.choice((3 << 20, 1 << 40, (1 << 64) - 1)))
        said = random.choice(
            (random.randbytes(100), greeting, greeting + ready, greeting + ready + giant, b"GET / HTTP/1.1\r\n\r\n")
        )
        said = mutate(random, said) if random.random() < 0.6 else said + random.randbytes(random.randrange(200))
        with socket.socket(socket.AF_UNIX) as stranger, contextlib.suppress(OSError):
            stranger.settimeout(READ_S)
            stranger.connect(self._target.path)
            stranger.send(said)
            if random.random() < 0.2:
                stranger.recv(64)
        return "no ZeroMQ: dropped"


class Descriptors(Stranger):
    """At the socket for shared memory, and with what comes of it."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._jobs = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(target.host.endpoint)

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)
        self._hang_up()

    def feed(self, random: Random) -> str:
        kind = random.random()
        if kind < 0.15:
            return self._silent(random)
        with self._connected() as stranger:
            if kind < 0.5:
                return self._garbage(random, stranger)
            size = random.choice((0, 1, 4096, 40_000, 1 << 20, (64 << 20) + 1, 1 << 44))
            memory = _memory(random, size)
            try:
                answer = _handed_over(stranger, [memory])
                if "region" not in answer:
                    return "memory refused"
                self._use(random, memory, size, answer["region"])
                if random.random() < 0.3:
                    stranger.send(b"more")
            finally:
                os.close(memory)
        return "memory used"

    def _connected(self) -> socket.socket:
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stranger.settimeout(READ_S)
        deadline = time.monotonic() + READ_S
        while stranger.connect_ex(self._target.path + MEMORY_SUFFIX):
            if time.monotonic() > deadline:
                raise BrokenRuleError("the socket for shared memory takes no connection")
            time.sleep(0.001)
        return stranger

    def _silent(self, random: Random) -> str:
        """Connections that say nothing, or hang up half way."""
        for _ in range(random.choice((1, 1, 1, 40))):
            self._stay(self._connected(), 20)
            if random.random() < 0.5:
                self._staying[-1].shutdown(random.choice((socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR)))
        return "silent: dropped"

    def _garbage(self, random: Random, stranger: socket.socket) -> str:
        message = random.choice((MAGIC, MAGIC, b"", b"x", MAGIC * 2, random.randbytes(random.choice((1, 16, 60_000)))))
        with contextlib.ExitStack() as ours:
            descriptors = [self._descriptor(random, ours) for _ in range(random.choice((0, 1, 1, 1, 2, 30, 253)))]
            answer = _handed_over(stranger, descriptors, message)
        if "region" in answer and (message != MAGIC or len(descriptors) != 1):
            raise BrokenRuleError(f"{message!r:.40} with {len(descriptors)} descriptors was taken")
        return "taken" if "region" in answer else "refused"

    def _descriptor(self, random: Random, ours: contextlib.ExitStack) -> int:
        """Of anything that a process may have."""
        match random.randrange(8):
            case 0:
                reader, writer = os.pipe()
                ours.callback(os.close, reader)
                found = writer
            case 1:
                found = os.open("/", os.O_RDONLY)
            case 2:
                pair = socket.socketpair()
                ours.callback(pair[0].close)
                found = pair[1].detach()
            case 3:
                found = os.open(random.choice(("/dev/zero", "/dev/null", "/proc/self/maps")), os.O_RDONLY)
            case 4:
                with tempfile.TemporaryFile() as file:
                    found = os.dup(file.fileno())
            case 5:
                found = os.eventfd(0)
            case 6:
                found = os.pidfd_open(os.getpid())
            case _:
                found = _memory(random, random.choice((0, 4096)))
        ours.callback(os.close, found)
        return found

    def _use(self, random: Random, memory: int, size: int, region: str) -> None:
        """Jobs in this memory, some beyond it, some that change while they are read."""
        payload = pictures.damaged(random)[:size]
        with contextlib.suppress(OSError):  # sealed against writing, perhaps
            os.pwrite(memory, payload, 0)
        names = set()
        for _ in range(random.randint(1, 3)):
            self._jobs += 1
            names.add(f"{self._jobs}")
            place = _place(random, region, size, len(payload))
            image = _raw_image(random, place) if random.random() < 0.3 else Image(kind="encoded", place=place)
            self._socket.send_multipart(protocol.encode(Submit(job=f"{self._jobs}", image=image)))
        deadline = time.monotonic() + OWED_S
        while names:
            with contextlib.suppress(OSError):
                os.pwrite(memory, random.randbytes(16), random.randrange(max(len(payload), 1)))
            if self._socket.poll(1):
                message, _ = protocol.decode(self._socket.recv_multipart(), protocol.TO_CLIENT)
                assert not isinstance(message, protocol.Stats | protocol.Limits)
                names.remove(message.job)
                self.outcomes[f"place: {_outcome(message)}"] += 1
            elif time.monotonic() > deadline:
                raise BrokenRuleError(f"jobs {names} in shared memory were not answered")


class Requests(Stranger):
    def feed(self, random: Random) -> str:
        stranger = socket.create_connection(("127.0.0.1", self._target.port), READ_S)
        if random.random() < 0.1:  # slow: it says a part, and stays
            self._stay(stranger, 50)
            stranger.send(b"GET /metrics HTT")
            return "slow"
        with stranger, contextlib.suppress(OSError):
            stranger.sendall(_request(random))
            stranger.shutdown(socket.SHUT_WR)
            status = _status(stranger)
            if status.startswith("500"):
                raise BrokenRuleError(status)
            return status
        return "closed"

    def settle(self) -> None:
        self._hang_up()
        with socket.create_connection(("127.0.0.1", self._target.port), READ_S) as good:
            good.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            if (status := _status(good)) != "200":
                raise BrokenRuleError(f"/healthz: {status}")


STRANGERS: dict[str, type[Stranger]] = {"daemon": Messages, "memory": Descriptors, "pages": Requests, "http": Front}


def _outcome(message: protocol.Result | protocol.Accepted | protocol.Forgotten | Failed) -> str:
    """An answer to a job in a word. Raises `BrokenRuleError` for a code that no message may get."""
    if not isinstance(message, Failed):
        return type(message).__name__.lower()
    if message.code in _NEVER:
        raise BrokenRuleError(f"job {message.job!r}: {message.code}: {message.reason}")
    return message.code.value


def _raw_image(random: Random, place: Place | None = None) -> Image:
    height, width = (random.choice((0, 1, 2, 6, 100, -1, 1 << 31, (1 << 63) - 1)) for _ in range(2))
    dtype = random.choice(("uint8", "uint8", "float32", "\0", "O"))
    return Image(kind="raw", shape=(height, width, random.choice((3, 3, 3, 4, 0))), dtype=dtype, place=place)


def _place(random: Random, region: str, size: int, written: int) -> Place:
    region = region if random.random() < 0.9 else random.choice(("", "0" * 32, region[:-1], region.upper()))
    if random.random() < 0.5:
        return Place(region=region, offset=0, bytes=written)
    offset, length = (random.choice((*EDGES[:-2], size, size - 1, size + 1)) for _ in range(2))
    return Place(region=region, offset=max(offset, 0), bytes=max(length, 0))


def _memory(random: Random, size: int) -> int:
    """A memory file with some seals."""
    descriptor = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    seals = (
        fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        fcntl.F_SEAL_GROW, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE, 0,
    )
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, random.choice(seals))
    return descriptor


def _handed_over(stranger: socket.socket, descriptors: list[int], message: bytes = MAGIC) -> dict[str, Any]:
    """What comes back; empty when the connection was closed."""
    try:
        socket.send_fds(stranger, [message], descriptors)
        said = stranger.recv(4096)
    except ConnectionError:
        return {}
    except TimeoutError:
        raise BrokenRuleError(f"{message!r:.40} with {len(descriptors)} descriptors: no answer") from None
    answer: dict[str, Any] = msgpack.unpackb(said) if said else {}
    return answer


def _request(random: Random) -> bytes:
    path = random.choice(
        (b"/metrics", b"/", b"/healthz", b"/stats.json", b"/last.jpg", b"/../etc/passwd", b"/%00", b"*", b"//x")
    )
    method = random.choice((b"GET", b"GET", b"GET", b"POST", b"HEAD", b"OPTIONS", b"\0", b"G" * 70_000))
    version = random.choice((b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9.9", b"HTTP/x", b""))
    host = random.choice((b"localhost", b"127.0.0.1", b"evil.example", b"[::1", b"a" * 66_000, b"\xff\0"))
    more = random.choice(
        (b"", b"X: y\r\n" * 200, b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b": \r\n")
    )
    whole = method + b" " + path + b" " + version + b"\r\nHost: " + host + b"\r\n" + more + b"\r\n"
    return mutate(random, whole) if random.random() < 0.5 else whole


def _status(stranger: socket.socket) -> str:
    """The number in the status line, or that there was none."""
    said = first_said(stranger)
    if not said:
        return "closed"
    return said.split()[1].decode(errors="replace") if said.startswith(b"HTTP/") else "a page of HTTP/0.9"
