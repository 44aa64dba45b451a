"""Images through shared memory: the same answers as by socket, for those who may, and nothing left behind."""
from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
from curve import free_port
from memory_files import MB, Bare, checksums, expected, held, jpeg, memory_file, pixels, sizes, taken

from blendmaskd.client.blocking import AsyncClient, Client, Segmentation, SharedMemoryError
from blendmaskd.client.places import PLACES
from checkout import ROOT

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")

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
    clients = [f"ipc://{tmp_path}/s", f"tcp://127.0.0.1:{free_port()}"]
    server = daemon(endpoints={"clients": clients, "metrics": None}, insecure_tcp=True)
    server.connect(transport="shared").segment(pixels(0))
    assert len(sizes(server)) == 1
    server.endpoint = clients[1]
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.connect().map(images))) == expected(images)
    assert len(sizes(server)) == 1


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
