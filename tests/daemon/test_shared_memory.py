"""Images through shared memory: the same answers as by socket, nobody harmed by a bad client, nothing left behind."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import io
import mmap
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from memory_files import Pixels, memory_file, memory_of, pixels
from PIL import Image as PillowImage

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, Segmentation, SharedMemoryError
from blendmaskd.client.places import PLACES
from blendmaskd.images import decoding as images
from blendmaskd.protocol import MAGIC, MEMORY_SUFFIX, TO_CLIENT, Code, Failed, Image, Place, Submit
from blendmaskd.settings import Limits
from blendmaskd.shell import shared_memory
from blendmaskd.shell.shared_memory import SharedMemory
from blendmaskd_workers.engines import timed
from checkout import ROOT

MB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")


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


@pytest.fixture
def bare(shared_daemon: Any) -> Iterator[Bare]:
    with contextlib.closing(Bare(shared_daemon)) as client:
        yield client


@pytest.fixture(scope="module")
def fast_daemon(start_daemons: Any) -> Any:
    return start_daemons(timed={"latency_ms": {1: 1}}, shared_memory_bytes=256 * MB)


@pytest.fixture
def server(fast_daemon: Any, wait_until: Any) -> Iterator[Any]:
    """A daemon that these tests share; it has nothing of a region when a test begins, and no more when it has ended."""
    wait_until(lambda: held(fast_daemon) == [])
    fast_daemon.client.stats()  # connected
    before = descriptors(fast_daemon)
    yield fast_daemon
    wait_until(lambda: len(descriptors(fast_daemon)) <= len(before), 15)


# -- what a user sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pixels, jpeg])
def test_answers_are_those_of_the_socket(shared_daemon: Any, make: Any) -> None:
    images = [make(number) for number in range(20)]
    by_socket = list(shared_daemon.connect(transport="socket").map(images))
    shared = list(shared_daemon.connect(transport="shared").map(images))
    auto = list(shared_daemon.connect(transport="auto").map(images))
    wanted = [msgpack.packb(answer.detections) for answer in by_socket]
    assert [msgpack.packb(answer.detections) for answer in shared] == wanted
    assert [msgpack.packb(answer.detections) for answer in auto] == wanted
    assert len(set(wanted)) == 20


def test_by_default_large_images_go_through_shared_memory_and_small_ones_do_not(server: Any, wait_until: Any) -> None:
    with Client(server.endpoint, timeout_s=20) as client:
        list(client.map([pixels(number, 100, 200) for number in range(40)]))
        assert held(server) == []
        images = [pixels(number) for number in range(40)]
        assert checksums(list(client.map(images, window=4))) == expected(images)
        assert sizes(server) == [PLACES << 18]
        # Places are used again, and only those that were used take memory.
        assert 180_000 <= taken(server) <= 4 * (180_000 + 4096)
        assert any("maps" in line for line in held(server)), "or `held` would see nothing"
    wait_until(lambda: held(server) == [])


def test_an_async_client_goes_through_shared_memory_too(server: Any) -> None:
    images = [pixels(number) for number in range(60)]

    async def run(transport: Any) -> list[Segmentation]:
        async with AsyncClient(server.endpoint, timeout_s=20, transport=transport) as client:
            answers = await asyncio.gather(*(client.segment(image) for image in images))
            answers += await asyncio.gather(*(client.segment(image) for image in images))
            assert taken(server) >= 10 * 180_000
            return answers

    assert checksums(asyncio.run(run("auto"))) == expected(images) * 2
    assert checksums(asyncio.run(run("shared"))) == expected(images) * 2  # more at once than there are places


def test_an_async_client_may_be_entered_again(server: Any) -> None:
    async def run() -> None:
        client = AsyncClient(server.endpoint, timeout_s=20, transport="shared")
        for _ in range(2):
            async with client:
                assert checksums([await client.segment(pixels(0))]) == expected([pixels(0)])

    asyncio.run(run())


def test_larger_images_get_a_larger_region_and_the_old_one_goes(server: Any, wait_until: Any) -> None:
    images = [pixels(number, 200 * (1 + number % 4), 300) for number in range(24)]
    with Client(server.endpoint, timeout_s=20, transport="shared") as client:
        assert checksums(list(client.map(images, window=6))) == expected(images)
        wait_until(lambda: sizes(server) == [PLACES * MB])  # for images of 720 kB
        assert checksums(list(client.map(images, window=6))) == expected(images)


def test_where_less_is_left_there_are_fewer_places(daemon: Any) -> None:
    server = daemon(shared_memory_bytes=4 * 3 * MB)
    images = [pixels(number, 800) for number in range(12)]
    assert checksums(list(server.connect(transport="shared").map(images))) == expected(images)
    assert sizes(server) == [3 * MB]


def test_shared_is_refused_where_it_cannot_be(daemon: Any) -> None:
    with pytest.raises(ValueError, match=r"tcp://localhost:1: transport 'shared' needs a daemon on this host"):
        Client("tcp://localhost:1", transport="shared")
    with pytest.raises(ValueError, match="transport = 'shm': expected auto, socket, shared"):
        Client("ipc://x", transport="shm")  # type: ignore[arg-type]
    server = daemon(shared_memory_bytes=0)
    with pytest.raises(SharedMemoryError, match=r"required: shared memory is off \(shared_memory_bytes: 0\)"):
        server.connect(transport="shared").segment(pixels(0))

    async def run() -> None:
        async with AsyncClient(server.endpoint, timeout_s=10, transport="shared") as client:
            await client.segment(pixels(0))

    with pytest.raises(SharedMemoryError, match="required"):
        asyncio.run(run())
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.client.map(images))) == expected(images)
    assert held(server) == []


def test_a_daemon_that_knows_no_shared_memory_is_served_by_socket(daemon: Any) -> None:
    server = daemon()
    (server.folder / "client.sock.fd").unlink()
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.client.map(images))) == expected(images)
    with pytest.raises(SharedMemoryError, match=r"required: .*client\.sock\.fd: No such file or directory"):
        server.connect(transport="shared").segment(pixels(0))


def test_a_path_that_is_too_long_for_the_second_socket_is_said(daemon: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "x")
    server = daemon(endpoints={"clients": [f"ipc://{path.ljust(106, 'x')}"], "metrics": None})
    assert "no shared memory, images use the socket: " in server.log
    assert "AF_UNIX path too long" in server.log
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.client.map(images))) == expected(images)
    with pytest.raises(SharedMemoryError, match="AF_UNIX path too long"):
        server.connect(transport="shared").segment(pixels(0))


def test_a_client_by_tcp_uses_the_socket(daemon: Any, tmp_path: Path) -> None:
    clients = [f"ipc://{tmp_path}/s", f"tcp://127.0.0.1:{_free_port()}"]
    server = daemon(endpoints={"clients": clients, "metrics": None}, insecure_tcp=True)
    server.connect(transport="shared").segment(pixels(0))
    assert len(sizes(server)) == 1
    server.endpoint = clients[1]
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.connect().map(images))) == expected(images)
    assert len(sizes(server)) == 1


def _free_port() -> int:
    with zmq.Context.instance().socket(zmq.ROUTER) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def test_a_reload_switches_it_on(daemon: Any, wait_until: Any, own: Any) -> None:
    server = daemon(shared_memory_bytes=0)
    with contextlib.closing(Bare(server)) as client:
        assert client.hand_over(own(memory_file(MB)))["reason"] == "shared memory is off (shared_memory_bytes: 0)"
        server.rewrite(shared_memory_bytes=8 * MB)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "region" in client.hand_over(own(memory_file(MB))), 20)


def test_a_worker_that_starts_later_reads_regions_too(daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"])
    client = server.connect(transport="shared")
    client.segment(pixels(0))
    pid = server.pids()["cpu:0"]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.pids()["cpu:0"] not in (None, pid))
    assert checksums([client.segment(pixels(1))]) == expected([pixels(1)])
    assert len(sizes(server)) == 1
    assert server.client.stats()["failures"] == {}


# -- what a bad client can do -----------------------------------------------------------------------------------------


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _huge() -> int:
    try:
        return memory_file(2 * MB, flags=os.MFD_HUGETLB)
    except OSError:
        pytest.skip("this kernel has no huge pages")


def _opened(flags: int) -> int:
    descriptor = memory_file(MB)
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _opened(os.O_WRONLY), "the descriptor is for writing alone"),  # it ended the daemon that read it
        (lambda: _opened(os.O_PATH), "the descriptor is not a memory file's (memfd_create)"),
        (_pipe, "the descriptor is not a memory file's (memfd_create)"),
        (lambda: os.open("/", os.O_RDONLY), "the descriptor is not a memory file's (memfd_create)"),
        (lambda: os.open(__file__, os.O_RDONLY), "the descriptor is not a memory file's (memfd_create)"),
        (lambda: os.open("/dev/zero", os.O_RDWR), "the descriptor is not a memory file's (memfd_create)"),
        (lambda: os.open("/proc/self/exe", os.O_PATH), "the descriptor is not a memory file's (memfd_create)"),
        (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM).detach(), "the descriptor is not a memory file's"),
        (lambda: memory_file(MB, 0), "not sealed against shrinking"),
        (lambda: memory_file(MB, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL), "not sealed against shrinking"),
        (lambda: memory_file(0), "the memory has no bytes"),
        (lambda: memory_file(256 * MB + 4096), f"{256 * MB + 4096} bytes: "),
        (_huge, "huge pages"),
    ],
    ids=["writing", "memory's path", "pipe", "folder", "file", "device",
         "path", "socket", "unsealed", "shrinking", "empty", "large", "huge"],
)
def test_what_cannot_be_a_region_is_refused_and_let_go(
    shared_daemon: Any, bare: Bare, own: Any, wait_until: Any, make: Any, reason: str
) -> None:
    process = psutil.Process(shared_daemon.process.pid)
    shared_daemon.client.stats()
    before = process.num_fds()
    assert reason in bare.hand_over(own(make()))["reason"]
    assert bare.connections[0].recv(1) == b""
    wait_until(lambda: process.num_fds() <= before)


@pytest.mark.parametrize(
    ("message", "count"), [(MAGIC, 0), (MAGIC, 2), (MAGIC, 200), (b"BMD2", 1), (MAGIC + b"x", 1), (b"x" * 5000, 1)]
)
def test_what_breaks_the_rules_is_refused_and_let_go(
    shared_daemon: Any, bare: Bare, own: Any, wait_until: Any, message: bytes, count: int
) -> None:
    process = psutil.Process(shared_daemon.process.pid)
    shared_daemon.client.stats()
    before = process.num_fds()
    answer = bare.hand_over(*[own(memory_file(4096)) for _ in range(count)], message=message)
    assert answer["reason"] == "expected BMD1 with one descriptor"
    wait_until(lambda: process.num_fds() <= before)


def test_nothing_more_may_be_said_when_there_is_a_region(bare: Bare, own: Any) -> None:
    name, descriptor = bare.open_region(MB)
    own(descriptor)
    assert bare.refusal(Place(region=name, offset=0, bytes=10))[0] is Code.BAD_IMAGE
    socket.send_fds(bare.connections[0], [MAGIC], [descriptor])
    with contextlib.suppress(ConnectionResetError):
        assert bare.connections[0].recv(1) == b""
    assert bare.refusal(Place(region=name, offset=0, bytes=10))[0] is Code.BAD_REQUEST


def test_the_silent_are_closed_and_keep_nobody_out(server: Any, wait_until: Any) -> None:
    before = len(descriptors(server))
    with contextlib.closing(Bare(server)) as silent:
        for _ in range(300):
            silent.connect()
        wait_until(lambda: len(descriptors(server)) == before + shared_memory.MOST_UNANSWERED)
        images = [pixels(number) for number in range(8)]
        with Client(server.endpoint, 20, transport="shared") as client:
            assert checksums(list(client.map(images))) == expected(images)
        wait_until(lambda: len(descriptors(server)) <= before, shared_memory.ANSWER_BY_S + 5)


def test_regions_that_come_and_go_cost_a_slow_worker_no_lease(daemon: Any, own: Any) -> None:
    """The worker does not receive meanwhile: 2000 messages wait for it when its lease does."""
    server = daemon(devices=["cpu:0"], shared_memory_bytes=64 * MB)
    descriptor = own(memory_file(4096))
    (pid,) = server.pids().values()
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(1000):
            with contextlib.closing(Bare(server)) as client:
                assert "region" in client.hand_over(descriptor)
        waiting = Bare(server)
        waiting.socket.send_multipart(
            protocol.encode(Submit(job="1", image=Image(kind="raw", shape=(1, 1, 3)), deadline_s=30), [b"abc"])
        )
    finally:
        os.kill(pid, signal.SIGCONT)
    with contextlib.closing(waiting):
        assert waiting.receive().width == 1


@pytest.mark.parametrize(("before", "reason"), [(0, "not a memory file"), (1, "expected BMD1 with one descriptor")])
def test_descriptors_that_are_slow_to_close_do_not_stop_the_daemon(
    server: Any, own: Any, before: int, reason: str
) -> None:
    others = [own(memory_file(4096)) for _ in range(before)]
    with contextlib.closing(Bare(server)) as client, lingering() as hand_over:
        for _ in range(2):
            connection = client.connect()
            server.process.send_signal(signal.SIGSTOP)
            hand_over(connection, *others)
            server.process.send_signal(signal.SIGCONT)
            assert reason in msgpack.unpackb(connection.recv(4096))["reason"]
            start = time.monotonic()
            server.client.stats()
            assert time.monotonic() - start < 0.5


def test_while_too_much_waits_to_be_closed_nobody_is_taken_in(
    tmp_path: Path, own: Any, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    """As of files whose file system takes its time."""
    go_on = threading.Event()
    monkeypatch.setattr(shared_memory, "_close_at_once", lambda descriptor: go_on.wait() and os.close(descriptor))
    monkeypatch.setattr(shared_memory, "MOST_CLOSING", 2)
    there = SimpleNamespace(endpoint=f"ipc://{tmp_path}/p")
    memory = SharedMemory()
    memory.listen(f"{tmp_path}/p{MEMORY_SUFFIX}")
    with contextlib.closing(memory), contextlib.closing(Bare(there)) as client, lingering() as hand_over:
        for _ in range(2):
            hand_over(client.connect())
            wait_until(lambda: memory._closing.qsize() == 0)  # all but what is being closed
            assert list(memory.receive(0.0)) == []  # a connection
            assert list(memory.receive(0.0)) == []  # what it said, and it is dropped
        socket.send_fds(client.connect(), [MAGIC], [own(memory_file(4096))])
        for _ in range(2):
            assert list(memory.receive(0.0)) == []
        go_on.set()
        assert wait_until(lambda: memory.expire(0.0) or list(memory.receive(0.0)))


def test_sockets_that_linger_keep_no_other_client_out(server: Any, own: Any, wait_until: Any) -> None:
    with contextlib.closing(Bare(server)) as client, lingering(600) as hand_over:
        for _ in range(4):
            server.process.send_signal(signal.SIGSTOP)  # else we might be the last who closes one, and linger
            for _ in range(shared_memory.MOST_UNANSWERED // 2):
                hand_over(client.connect())
            server.process.send_signal(signal.SIGCONT)
        start = time.monotonic()
        assert wait_until(lambda: has_region(client, own))  # while too much waits to be closed, it is turned away
        assert time.monotonic() - start < 1.0


def has_region(client: Bare, own: Any) -> bool:
    try:
        own(client.open_region(MB)[1])
    except ValueError:  # closed without an answer
        return False
    return True


@contextlib.contextmanager
def lingering(seconds: int = 1) -> Iterator[Callable[..., None]]:
    """Hands over sockets, behind other descriptors, that take so many seconds to close: their peer does not read."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hand_over(connection: socket.socket, *others: int) -> None:
            with socket.create_connection(listener.getsockname()) as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
                slow.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        slow.send(b"x" * 65536)
                socket.send_fds(connection, [MAGIC], [*others, slow.fileno()])

        yield hand_over


def test_rewriting_and_punching_holes_under_the_workers_harms_nobody_else(server: Any, own: Any) -> None:
    pids = server.pids()
    stop = threading.Event()
    encoded = jpeg(1)
    with contextlib.closing(Bare(server)) as client:
        name, descriptor = client.open_region(MB)
        own(descriptor)

        def rewrite() -> None:
            while not stop.is_set():
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, 0)
                _punch(descriptor, MB)
                os.pwrite(descriptor, encoded, 0)

        thread = threading.Thread(target=rewrite)
        thread.start()
        kinds: list[dict[str, Any]] = [{}, {"kind": "raw", "shape": (100, len(encoded) // 300, 3)}]
        place = Place(region=name, offset=0, bytes=len(encoded) // 300 * 300)
        answers = [client.answer(place, **kinds[number % 2]) for number in range(200)]
        stop.set()
        thread.join()
    failures = {answer.code for answer in answers if isinstance(answer, Failed)}
    assert failures <= {Code.BAD_IMAGE}
    assert len([answer for answer in answers if not isinstance(answer, Failed)]) >= 100
    assert server.pids() == pids
    with Client(server.endpoint, 20, transport="socket") as other:
        assert other.segment(encoded).width == 300


def test_no_decoder_sees_bytes_change(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = bytearray(jpeg(1))
    expected = images.decode(payload, Limits())
    real = PillowImage.open

    def rewritten(file: Any, **options: Any) -> Any:
        payload[:] = bytes(len(payload))
        return real(file, **options)

    monkeypatch.setattr(images.Image, "open", rewritten)
    assert np.array_equal(images.decode(memoryview(payload), Limits()), expected)


def _punch(descriptor: int, size: int) -> None:
    """fallocate(2) with FALLOC_FL_PUNCH_HOLE, by way of madvise."""
    with mmap.mmap(descriptor, size) as view:
        view.madvise(mmap.MADV_REMOVE)


def test_pixels_never_written_are_black(bare: Bare, own: Any) -> None:
    name, descriptor = bare.open_region(MB)
    own(descriptor)
    assert bare.answer(Place(region=name, offset=0, bytes=180_000), kind="raw", shape=(200, 300, 3)).width == 300


def test_who_knows_a_regions_name_may_use_it(shared_daemon: Any, bare: Bare, own: Any) -> None:
    name, descriptor = bare.open_region(MB)
    own(descriptor)
    os.pwrite(descriptor, jpeg(1), 4096)
    place = Place(region=name, offset=4096, bytes=len(jpeg(1)))
    assert Bare(shared_daemon).answer(place).width == 300


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "none"])
def test_an_unknown_region_is_refused(bare: Bare, name: str) -> None:
    code, reason = bare.refusal(Place(region=name, offset=0, bytes=10))
    assert code is Code.BAD_REQUEST
    assert reason == f"region {name!r} does not exist, or has ended"


@pytest.mark.parametrize(("offset", "count"), [(0, MB + 1), (MB, 1), (2**63, 1), (2**64 - 1, 2**64 - 1), (1, MB)])
def test_a_place_outside_the_region_is_refused(bare: Bare, own: Any, offset: int, count: int) -> None:
    name, descriptor = bare.open_region(MB)
    own(descriptor)
    code, reason = bare.refusal(Place(region=name, offset=offset, bytes=count))
    assert code in (Code.BAD_REQUEST, Code.TOO_LARGE)
    assert code is Code.TOO_LARGE or reason == f"{count} bytes at {offset}: the region has {MB}"


def test_lies_about_the_size_are_answered_as_by_socket(bare: Bare, own: Any) -> None:
    name, descriptor = bare.open_region(MB)
    own(descriptor)
    assert bare.refusal(Place(region=name, offset=0, bytes=1000), kind="raw", shape=(200, 300, 3)) == (
        Code.BAD_IMAGE, "shape (200, 300, 3) of uint8: expected 180000 bytes, found 1000"
    )  # fmt: skip
    assert bare.refusal(Place(region=name, offset=MB, bytes=0)) == (
        Code.BAD_IMAGE, "the image is empty (0 bytes)"
    )  # fmt: skip


def test_bounds_on_bytes_hold_as_by_socket(daemon: Any, own: Any) -> None:
    server = daemon(
        devices=["cpu:0"], timed={"latency_ms": {1: 300}}, limits={"max_image_bytes": 200_000},
        queue={"max_bytes": 400_000},
    )  # fmt: skip
    with contextlib.closing(Bare(server)) as client:
        name, descriptor = client.open_region(MB)
        own(descriptor)
        assert client.refusal(Place(region=name, offset=0, bytes=200_001))[0] is Code.TOO_LARGE
        for job in range(6):  # one runs, two are at the worker, two wait
            client.submit(Place(region=name, offset=0, bytes=180_000), str(job), kind="raw", shape=(200, 300, 3))
        answers = [client.receive() for _ in range(6)]
    assert [answer.code for answer in answers if isinstance(answer, Failed)] == [Code.BUSY]


# -- who may ----------------------------------------------------------------------------------------------------------


def test_who_may_connect_to_the_one_socket_may_to_the_other(shared_daemon: Any) -> None:
    modes = [os.stat(shared_daemon.folder / name).st_mode for name in ("client.sock", "client.sock.fd")]
    assert modes[0] == modes[1]
    assert stat.S_ISSOCK(modes[0])


@as_root
def test_another_user_cannot_connect_and_uses_the_socket(daemon: Any) -> None:
    server = daemon()
    server.folder.chmod(0o755)
    (server.folder / "client.sock").chmod(0o777)
    images = [pixels(number) for number in range(8)]
    with _as_nobody():
        assert checksums(list(server.connect().map(images))) == expected(images)
        client = server.connect(transport="shared")
        with pytest.raises(SharedMemoryError, match="Permission denied"):
            client.segment(pixels(0))
    (server.folder / "client.sock.fd").chmod(0o777)
    with _as_nobody():
        assert checksums(list(server.connect(transport="shared").map(images))) == expected(images)


@contextlib.contextmanager
def _as_nobody() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# -- deaths -----------------------------------------------------------------------------------------------------------

CLIENT = """
import sys, numpy
from blendmaskd.client.blocking import Client
client = Client(sys.argv[1], transport="shared")
images = [numpy.full((200, 300, 3), n % 256, numpy.uint8) for n in range(int(sys.argv[2]))]
for answer in client.map(images): print(answer.width, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("images", [4, 2000], ids=["idle", "busy"])
def test_a_client_killed_leaves_nothing(server: Any, wait_until: Any, images: int) -> None:
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, server.endpoint, str(images)], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with client:
        assert client.stdout is not None
        for _ in range(4):
            assert client.stdout.readline() == b"300\n"
        assert taken(server) > 0
        client.kill()
    wait_until(lambda: held(server) == [])
    wait_until(lambda: server.client.stats()["leased"] == 0)
    server.wait_ready()


def test_a_worker_killed_costs_no_answer_and_none_comes_twice(daemon: Any, wait_until: Any) -> None:
    server = daemon(max_attempts=5)
    client = server.connect(transport="shared")
    images = [pixels(number) for number in range(400)]
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: [seen.append(answer) for answer in client.map(images)])
    before = server.pids()
    thread.start()
    wait_until(lambda: len(seen) > 20)
    os.kill(before["cpu:0"], signal.SIGKILL)
    thread.join(60)
    assert checksums(seen) == expected(images)
    wait_until(lambda: server.client.stats()["answered"] >= 400)
    assert server.client.stats()["answered"] == 400
    assert server.client.stats()["failures"] == {}
    server.wait_ready()
    assert server.pids()["cpu:0"] != before["cpu:0"]


def test_after_a_daemon_was_killed_jobs_are_sent_again_and_its_successor_gets_a_region(
    daemon: Any, wait_until: Any
) -> None:
    server = daemon(timed={"latency_ms": {1: 20}})
    client = server.connect(transport="shared")
    images = [pixels(number) for number in range(100)]
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: [seen.append(answer) for answer in client.map(images, window=12)])
    thread.start()
    wait_until(lambda: len(seen) > 4)
    server.kill()
    assert len(seen) < 80
    wait_until(lambda: not server.processes())
    server.start()
    thread.join(60)
    assert checksums(seen) == expected(images)
    assert taken(server) > 0, "the client went back to shared memory"


def test_a_stopped_daemon_leaves_no_socket(daemon: Any) -> None:
    server = daemon()
    server.connect(transport="shared").segment(pixels(0))
    assert (server.folder / "client.sock.fd").exists()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not list(server.folder.glob("client.sock*.fd"))
    assert not (server.folder / "client.sock").exists()


def test_a_second_daemon_leaves_the_sockets_of_the_first(shared_daemon: Any, daemon: Any) -> None:
    other = daemon(wait=False, endpoints={"clients": [f"ipc://{shared_daemon.folder}/2.sock", shared_daemon.endpoint]})
    other.process.wait(20)
    assert "another daemon serves" in other.log
    other.endpoint = shared_daemon.endpoint
    assert checksums([other.connect(transport="shared").segment(pixels(0))]) == expected([pixels(0)])


# -- the client against a bare socket ---------------------------------------------------------------------------------


def test_a_client_without_memory_uses_the_socket(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)  # no machine's memory is to be used up here
    images = [pixels(number) for number in range(40)]
    with Client(server.endpoint, 20) as client:
        assert checksums(list(client.map(images))) == expected(images)
    with Client(server.endpoint, 20, transport="shared") as client, pytest.raises(
        SharedMemoryError, match="required: no memory: No space left on device"
    ):
        client.segment(images[0])
