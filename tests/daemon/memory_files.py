"""Images for shared memory, the memory files that they lie in, and a client that hands them over by hand."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import socket
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import clients
import msgpack
import zmq
from clients import Pixels
from PIL import Image as PillowImage

from blendmaskd import protocol
from blendmaskd.protocol import MAGIC, MEMORY_SUFFIX, TO_CLIENT, Code, Failed, Image, Place, Submit
from blendmaskd_workers.engines import timed

MB = 1 << 20
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def pixels(number: int, height: int = 200, width: int = 300) -> Pixels:
    """As `clients.pixels`, of 180 kB: large enough to go through shared memory."""
    return clients.pixels(number, height, width)


def memory_file(size: int, seals: int = SEALS, flags: int = 0) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def memory_of(pid: int) -> list[os.stat_result]:
    """The memory files that a process has open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith("/memfd:"):
                found.append(link.stat())
    return found


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels(number)).save(file, "JPEG", quality=95)
    return file.getvalue()


def checksums(answers: list[Any]) -> list[int]:
    return [answer.detections[0]["checksum"] for answer in answers]


def expected(images: list[Pixels]) -> list[int]:
    return [timed.checksum(image) for image in images]


def held(daemon: Any) -> list[str]:
    """What a daemon and its workers have of shared memory: descriptors and mappings."""
    found = []
    for process in daemon.processes():
        found += [f"{process.pid} has {file.st_ino}" for file in memory_of(process.pid)]
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        found += [f"{process.pid} maps {line}" for line in maps if "/memfd:" in line]
    return found


def descriptors(daemon: Any) -> list[str]:
    """What it has open."""
    found = []
    for link in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(link.readlink()))
    return found


def sizes(daemon: Any) -> list[int]:
    """Of its regions, in bytes."""
    return sorted(file.st_size for file in memory_of(daemon.process.pid))


def taken(daemon: Any) -> int:
    """Bytes of memory that its regions take."""
    return sum(file.st_blocks * 512 for file in memory_of(daemon.process.pid))


class Bare:
    """A client by hand."""

    def __init__(self, daemon: Any) -> None:
        self.daemon = daemon
        self.path = daemon.endpoint.removeprefix("ipc://") + MEMORY_SUFFIX
        self.connections: list[socket.socket] = []

    @cached_property
    def socket(self) -> zmq.Socket[Any]:
        socket: zmq.Socket[Any] = self.daemon.dealer()
        return socket

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connections.append(connection)
        connection.settimeout(10)
        deadline = time.monotonic() + 10
        while connection.connect_ex(self.path) == errno.EAGAIN:  # as many as the kernel queues are queued
            assert time.monotonic() < deadline
        return connection

    def hand_over(self, *descriptors: int, message: bytes = MAGIC) -> dict[str, Any]:
        """The daemon's answer."""
        connection = self.connect()
        socket.send_fds(connection, [message], descriptors)
        answer: dict[str, Any] = msgpack.unpackb(connection.recv(4096))
        return answer

    def open_region(self, size: int) -> tuple[str, int]:
        """Its name, and a descriptor."""
        descriptor = memory_file(size)
        answer = self.hand_over(descriptor)
        assert len(answer.get("region", "")) == 32, answer
        return answer["region"], descriptor

    def submit(self, place: Place, job: str = "1", **image: Any) -> None:
        described = Image(**{"kind": "encoded", **image}, place=place)
        self.socket.send_multipart(protocol.encode(Submit(job=job, image=described)))

    def receive(self) -> Any:
        return protocol.decode(self.socket.recv_multipart(), TO_CLIENT)[0]

    def answer(self, place: Place, **image: Any) -> Any:
        self.submit(place, **image)
        return self.receive()

    def refusal(self, place: Place, **image: Any) -> tuple[Code, str]:
        answer = self.answer(place, **image)
        assert isinstance(answer, Failed), answer
        return answer.code, answer.reason

    def close(self) -> None:
        for opened in [*self.connections, *([self.socket] if "socket" in vars(self) else [])]:
            opened.close()
