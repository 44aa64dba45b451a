"""What a bad client can do with shared memory: harm itself."""
from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import psutil
import pytest
from memory_files import MB, Bare, checksums, descriptors, expected, jpeg, memory_file, pixels
from PIL import Image as PillowImage

from blendmaskd import protocol
from blendmaskd.client.blocking import Client
from blendmaskd.images import decoding as images
from blendmaskd.protocol import MAGIC, MEMORY_SUFFIX, Code, Failed, Image, Place, Submit
from blendmaskd.settings import Limits
from blendmaskd.shell import shared_memory
from blendmaskd.shell.shared_memory import SharedMemory


@pytest.fixture
def bare(shared_daemon: Any) -> Iterator[Bare]:
    with contextlib.closing(Bare(shared_daemon)) as client:
        yield client


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
    with contextlib.closing(Bare(server)) as client, lingering(600) as hand_over:
        for _ in range(2):
            connection = client.connect()
            server.process.send_signal(signal.SIGSTOP)
            hand_over(connection, *others)
            server.process.send_signal(signal.SIGCONT)
            assert reason in msgpack.unpackb(connection.recv(4096))["reason"]
            server.client.stats()  # long before ten minutes are over


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
        assert wait_until(lambda: has_region(client, own))  # while too much waits to be closed, it is turned away


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
