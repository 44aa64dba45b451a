"""Images through shared memory: the same answers as by socket, nobody harmed by a bad client, nothing left behind."""
from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import psutil
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from daemon import protocol, regions, shared_memory
from daemon.client import AsyncClient, Client, JobFailed, Segmentation, SharedMemoryError
from daemon.places import PLACES, SMALLEST_BYTES
from daemon.protocol import FROM_CLIENT, TO_CLIENT, Code, Failed, Image, NoRegion, OpenRegion, Place, Region, Submit
from daemon.regions import RegionError, Regions
from daemon.shared_memory import Reader, SharedMemory

ROOT = Path(__file__).resolve().parents[2]
MB = 1 << 20
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")

Pixels = npt.NDArray[np.uint8]


def pixels(number: int, height: int = 200, width: int = 300) -> Pixels:
    """An image that differs from every other number's; 180 kB."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels(number)).save(file, "JPEG", quality=95)
    return file.getvalue()


def checksums(answers: list[Any]) -> list[int]:
    return [answer.detections[0]["checksum"] for answer in answers]


def expected(images: list[Pixels]) -> list[int]:
    return [zlib.crc32(image.data) for image in images]


def folder(daemon: Any) -> Path:
    """Where a running daemon has its regions: it holds that folder open."""
    return next(path for path in _open_in_shm(daemon.process.pid) if path.parent == Path(shared_memory.PARENT))


def _open_in_shm(pid: int) -> list[Path]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(link.readlink())
    return [path for path in found if path.is_relative_to(shared_memory.PARENT)]


def files(daemon: Any) -> list[Path]:
    return list(folder(daemon).iterdir())


def memory(daemon: Any) -> int:
    """Bytes that its regions take."""
    return sum(path.stat().st_blocks * 512 for path in files(daemon))


def regions_open(daemon: Any) -> list[Path]:
    """By the daemon and its workers, deleted ones too."""
    return [path for process in daemon.processes() for path in _open_in_shm(process.pid) if path != folder(daemon)]


class Bare:
    """A client by hand."""

    def __init__(self, daemon: Any) -> None:
        self.socket = daemon.dealer()
        self.files: list[io.FileIO] = []

    def open_region(self, size: int) -> Region:
        region = self.ask(size)
        assert isinstance(region, Region), region
        self.files.append(io.FileIO(region.path, "r+"))
        fcntl.lockf(self.files[-1], fcntl.LOCK_EX, 1)
        return region

    def ask(self, size: int) -> Region | NoRegion:
        self.socket.send_multipart(protocol.encode(OpenRegion(bytes=size)))
        return self.receive()

    def submit(self, place: Place, job: str = "1", **image: Any) -> None:
        described = Image(**{"kind": "encoded", **image}, place=place)
        self.socket.send_multipart(protocol.encode(Submit(job=job, image=described)))

    def receive(self) -> Any:
        return protocol.decode(self.socket.recv_multipart(), TO_CLIENT)[0]

    def answer(self, place: Place, **image: Any) -> Any:
        self.submit(place, **image)
        return self.receive()

    def close(self) -> None:
        for file in self.files:
            file.close()

    def refusal(self, place: Place, **image: Any) -> tuple[Code, str]:
        answer = self.answer(place, **image)
        assert isinstance(answer, Failed), answer
        return answer.code, answer.reason


@pytest.fixture
def bare(shared_daemon: Any) -> Iterator[Bare]:
    with contextlib.closing(Bare(shared_daemon)) as client:
        yield client


@pytest.fixture(scope="module")
def fast_daemon(start_daemons: Any) -> Any:
    return start_daemons(timed={"latency_ms": {1: 1}}, shared_memory_bytes=256 * MB)


@pytest.fixture
def server(fast_daemon: Any, wait_until: Any) -> Any:
    """A daemon that these tests share; it has no region when a test begins."""
    wait_until(lambda: files(fast_daemon) == [], 15)
    return fast_daemon


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
        assert files(server) == []
        images = [pixels(number) for number in range(40)]
        assert checksums(list(client.map(images, window=4))) == expected(images)
        assert len(files(server)) == 1
        # Places are used again, and only those that were used take memory.
        assert 180_000 <= memory(server) <= 4 * (180_000 + 4096)
    wait_until(lambda: files(server) == [] and regions_open(server) == [])


def test_an_async_client_goes_through_shared_memory_too(server: Any) -> None:
    images = [pixels(number) for number in range(60)]

    async def run(transport: Any) -> list[Segmentation]:
        async with AsyncClient(server.endpoint, timeout_s=20, transport=transport) as client:
            answers = await asyncio.gather(*(client.segment(image) for image in images))
            answers += await asyncio.gather(*(client.segment(image) for image in images))
            assert memory(server) >= 10 * 180_000
            return answers

    assert checksums(asyncio.run(run("auto"))) == expected(images) * 2
    assert checksums(asyncio.run(run("shared"))) == expected(images) * 2  # more at once than there are places


def test_larger_images_get_a_larger_region_and_the_old_one_goes(server: Any, wait_until: Any) -> None:
    images = [pixels(number, 200 * (1 + number % 4), 300) for number in range(24)]
    with Client(server.endpoint, timeout_s=20, transport="shared") as client:
        assert checksums(list(client.map(images, window=6))) == expected(images)
        wait_until(lambda: [path.stat().st_size for path in files(server)] == [PLACES * MB])  # for images of 720 kB
        assert checksums(list(client.map(images, window=6))) == expected(images)


def test_shared_is_refused_where_it_cannot_be(daemon: Any) -> None:
    with pytest.raises(ValueError, match=r"tcp://localhost:1: transport 'shared' needs the daemon on this host"):
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
    assert files(server) == []


def test_a_client_by_tcp_gets_none(daemon: Any) -> None:
    port = _free_port()
    server = daemon(endpoints={"clients": [f"tcp://127.0.0.1:{port}"], "metrics": None})
    assert isinstance(Bare(server).ask(MB), NoRegion)
    assert _open_in_shm(server.process.pid) == []
    images = [pixels(number) for number in range(8)]
    assert checksums(list(server.client.map(images))) == expected(images)


def test_beside_an_ipc_endpoint_a_client_by_tcp_gets_none_either(daemon: Any, tmp_path: Path) -> None:
    port = _free_port()
    clients = [f"ipc://{tmp_path}/s", f"tcp://127.0.0.1:{port}"]
    server = daemon(endpoints={"clients": clients, "metrics": None})
    assert isinstance(Bare(server).ask(MB), Region)
    server.endpoint = clients[1]
    assert Bare(server).ask(MB) == NoRegion(reason="shared memory is for clients on this host, by an ipc endpoint")


def _free_port() -> int:
    with zmq.Context.instance().socket(zmq.ROUTER) as socket:
        return socket.bind_to_random_port("tcp://127.0.0.1")


def test_a_reload_switches_it_on_and_off(daemon: Any, wait_until: Any) -> None:
    server = daemon(shared_memory_bytes=0)
    client = Bare(server)
    assert isinstance(client.ask(MB), NoRegion)
    server.rewrite(shared_memory_bytes=8 * MB)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: isinstance(client.ask(MB), Region), 20)


# -- what a bad client can do -----------------------------------------------------------------------------------------


def test_a_truncated_region_is_a_refusal_and_the_workers_live(shared_daemon: Any, bare: Bare) -> None:
    pids = shared_daemon.pids()
    region = bare.open_region(MB)
    image = pixels(1)
    bare.files[0].write(image.data)
    place = Place(region=region.region, offset=0, bytes=image.nbytes)
    assert bare.answer(place, kind="raw", shape=image.shape).width == 300
    os.truncate(region.path, 1000)
    code, reason = bare.refusal(place, kind="raw", shape=image.shape)
    assert code is Code.BAD_REQUEST
    assert "1000 bytes where 180000 should be" in reason or "has it no more" in reason
    assert shared_daemon.pids() == pids
    assert shared_daemon.client.segment(image).width == 300


def test_truncating_and_rewriting_under_the_workers_harms_nobody_else(server: Any) -> None:
    pids = server.pids()
    client = Bare(server)
    encoded = jpeg(1)
    stop = threading.Event()
    region = client.open_region(MB)

    def rewrite() -> None:
        while not stop.is_set():
            os.truncate(region.path, 100)
            os.truncate(region.path, region.bytes)
            os.pwrite(client.files[0].fileno(), encoded, 0)

    thread = threading.Thread(target=rewrite)
    thread.start()
    answers = [client.answer(Place(region=region.region, offset=0, bytes=len(encoded))) for _ in range(200)]
    stop.set()
    thread.join()
    client.close()
    failures = {answer.code for answer in answers if isinstance(answer, Failed)}
    assert failures
    assert failures <= {Code.BAD_IMAGE, Code.BAD_REQUEST}
    assert server.pids() == pids
    assert server.connect(transport="socket").segment(encoded).width == 300


def test_a_region_that_its_client_enlarges_is_ended(server: Any, wait_until: Any) -> None:
    with contextlib.closing(Bare(server)) as client:
        region = client.open_region(4096)
        os.truncate(region.path, 64 * MB)
        wait_until(lambda: files(server) == [])


def test_another_clients_region_is_unknown(shared_daemon: Any, bare: Bare) -> None:
    region = bare.open_region(MB)
    place = Place(region=region.region, offset=0, bytes=10)
    code, reason = Bare(shared_daemon).refusal(place)
    assert code is Code.BAD_REQUEST
    assert reason == f"region {region.region!r}: this client has none of that name, or has it no more"
    assert bare.refusal(place)[0] is Code.BAD_IMAGE  # the owner's zeros are no image


@pytest.mark.parametrize("name", ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "none"])
def test_a_region_is_no_path(bare: Bare, name: str) -> None:
    bare.open_region(4096)
    code, reason = bare.refusal(Place(region=name, offset=0, bytes=10))
    assert code is Code.BAD_REQUEST
    assert "none of that name" in reason


@pytest.mark.parametrize(("offset", "count"), [(0, MB + 1), (MB, 1), (2**63, 1), (2**64 - 1, 2**64 - 1), (1, MB)])
def test_a_place_outside_the_region_is_refused(bare: Bare, offset: int, count: int) -> None:
    region = bare.open_region(MB)
    code, reason = bare.refusal(Place(region=region.region, offset=offset, bytes=count))
    assert code in (Code.BAD_REQUEST, Code.TOO_LARGE)
    assert code is Code.TOO_LARGE or reason == f"{count} bytes at {offset}: the region has {MB}"


def test_lies_about_the_size_are_answered_as_by_socket(bare: Bare) -> None:
    region = bare.open_region(MB)
    place = Place(region=region.region, offset=0, bytes=1000)
    assert bare.refusal(place, kind="raw", shape=(200, 300, 3)) == (
        Code.BAD_IMAGE, "shape (200, 300, 3) of uint8: expected 180000 bytes, found 1000"
    )  # fmt: skip
    assert bare.refusal(Place(region=region.region, offset=MB, bytes=0)) == (
        Code.BAD_IMAGE, "the image is empty (0 bytes)"
    )  # fmt: skip


def test_bounds_on_bytes_hold_as_by_socket(daemon: Any, wait_until: Any) -> None:
    server = daemon(
        devices=["cpu:0"], timed={"latency_ms": {1: 300}}, limits={"max_image_bytes": 200_000},
        queue={"max_bytes": 400_000},
    )  # fmt: skip
    client = Bare(server)
    region = client.open_region(MB)
    assert client.refusal(Place(region=region.region, offset=0, bytes=200_001))[0] is Code.TOO_LARGE
    for job in range(5):  # one runs, one is at the worker, two wait
        client.submit(Place(region=region.region, offset=0, bytes=180_000), str(job), kind="raw", shape=(200, 300, 3))
    answers = [client.receive() for _ in range(5)]
    assert [answer.code for answer in answers if isinstance(answer, Failed)] == [Code.BUSY]
    client.close()


def test_one_client_gets_a_share_and_all_together_the_limit(daemon: Any) -> None:
    server = daemon(shared_memory_bytes=16 * MB)
    clients = [Bare(server) for _ in range(6)]
    granted = [client.ask(64 * MB) for client in clients]
    assert [getattr(region, "bytes", 0) for region in granted] == [4 * MB] * 4 + [0, 0]
    assert isinstance(clients[0].ask(4096), NoRegion)


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("socket_mode", "mode"), [(0o755, 0o600), (0o775, 0o660), (0o770, 0o660), (0o777, 0o666)])
def test_who_may_connect_may_read_and_write(tmp_path: Path, socket_mode: int, mode: int) -> None:
    (tmp_path / "socket").touch()
    (tmp_path / "socket").chmod(socket_mode)
    with contextlib.closing(SharedMemory([str(tmp_path / "socket"), f"{tmp_path}/gone"])) as memory:
        _, path = memory.create(4096, 0.0)
        assert stat.S_IMODE(os.stat(path).st_mode) == mode
        assert stat.S_IMODE(os.stat(memory.folder).st_mode) == 0o711


@as_root
def test_another_user_cannot_open_a_region_but_a_member_of_the_group_can(tmp_path: Path) -> None:
    (tmp_path / "socket").touch()
    (tmp_path / "socket").chmod(0o770)
    with contextlib.closing(SharedMemory([str(tmp_path / "socket")])) as memory:
        _, path = memory.create(4096, 0.0)
        os.chown(path, 0, 61001)  # as if the daemon ran with this group
        assert _opens_as_nobody(path, 61001) == "opened"
        assert _opens_as_nobody(path, 61002) == "PermissionError"
        assert _opens_as_nobody(memory.folder, 61001) == "PermissionError", "names must not be listed"


def _opens_as_nobody(path: str, group: int) -> str:
    code = (
        f"import os; os.setgroups([{group}]); os.setgid(65534); os.setuid(65534)\n"
        f"try: os.open({path!r}, os.O_RDONLY if os.path.isdir({path!r}) else os.O_RDWR); print('opened')\n"
        "except OSError as error: print(type(error).__name__)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@as_root
def test_a_client_that_cannot_open_its_region_uses_the_socket(daemon: Any) -> None:
    server = daemon()
    server.folder.chmod(0o755)
    (server.folder / "client.sock").chmod(0o700)
    client = server.connect()
    client.segment(pixels(0, 1, 1))  # connected
    images = [pixels(number) for number in range(8)]
    os.seteuid(65534)
    try:
        assert checksums(list(client.map(images))) == expected(images)
    finally:
        os.seteuid(0)
    with pytest.raises(SharedMemoryError, match="Permission denied"):
        _as_nobody(server)


def _as_nobody(server: Any) -> None:
    client = server.connect(transport="shared")
    client.stats()
    os.seteuid(65534)
    try:
        client.segment(pixels(0))
    finally:
        os.seteuid(0)


# -- deaths -----------------------------------------------------------------------------------------------------------

CLIENT = """
import sys, numpy
from daemon.client import Client
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
        assert memory(server) > 0
        client.kill()
    wait_until(lambda: files(server) == [] and regions_open(server) == [], 15)
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


def test_a_daemon_killed_is_swept_by_the_next_and_its_jobs_are_sent_again(daemon: Any, wait_until: Any) -> None:
    server = daemon(timed={"latency_ms": {1: 20}})
    client = server.connect(transport="shared")
    images = [pixels(number) for number in range(100)]
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: [seen.append(answer) for answer in client.map(images, window=12)])
    thread.start()
    wait_until(lambda: len(seen) > 4)
    old = folder(server)
    server.kill()
    assert len(seen) < 80
    assert list(old.iterdir())
    wait_until(lambda: not server.processes())
    server.start()
    thread.join(60)
    assert checksums(seen) == expected(images)
    assert not old.exists()
    assert memory(server) > 0, "the client went back to shared memory"


def test_a_stopped_daemon_leaves_no_folder(daemon: Any) -> None:
    server = daemon()
    server.connect(transport="shared").segment(pixels(0))
    left = folder(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    assert not left.exists()


def test_a_new_daemon_leaves_the_folders_of_living_ones(daemon: Any, shared_daemon: Any) -> None:
    daemon()
    assert folder(shared_daemon).exists()


# -- when /dev/shm is not as it should be -----------------------------------------------------------------------------

SMALL = """
import sys, numpy
sys.path.insert(0, "tests")
import conftest
with conftest._daemons() as make:
    server = make()
    images = [numpy.full((200, 300, 3), n, numpy.uint8) for n in range(40)]
    for transport in ("auto", "shared"):
        client = server.connect(transport=transport)
        try:
            print(transport, len(list(client.map(images, window=16))))
        except Exception as error:
            print(transport, error)
    print(server.log)
"""


def _in_own_shm(mount: str) -> str:
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]  # so that nothing outlives it
    if os.geteuid() != 0 or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount (CAP_SYS_ADMIN)")
    done = subprocess.run(
        [*unshare, "bash", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, SMALL],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_when_dev_shm_is_full_images_go_by_socket() -> None:
    printed = _in_own_shm("mount -t tmpfs -o size=1m tmpfs /dev/shm")
    assert "auto 40" in printed
    assert "shared shared memory is required: /dev/shm: No space left on device" in printed


def test_without_dev_shm_images_go_by_socket_and_the_log_says_so() -> None:
    printed = _in_own_shm("mount -t tmpfs -o ro tmpfs /dev/shm")
    assert "no shared memory, images come by socket: /dev/shm: Read-only file system" in printed
    assert "auto 40" in printed
    assert "shared shared memory is required: /dev/shm: Read-only file system" in printed


# -- the client against a bare socket ---------------------------------------------------------------------------------


class Peer:
    """The other end, which grants a region and then does as the test wants."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/p"
        self.bind()
        self.memory = SharedMemory([f"{folder}/p"])

    def bind(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVTIMEO, 10_000)
        self.socket.bind(self.endpoint)

    def bind_again(self) -> None:
        """As a daemon that was started anew."""
        self.socket.close()
        self.bind()

    def receive(self) -> tuple[Any, list[bytes]]:
        self.client, *frames = self.socket.recv_multipart()
        return protocol.decode(frames, FROM_CLIENT)

    def send(self, message: Any, *payload: bytes) -> None:
        self.socket.send_multipart([self.client, *protocol.encode(message, payload)])

    def finish(self, job: str) -> None:
        self.send(protocol.Result(job=job, width=1, height=1, device="npu:0", timings={}), b"\x90")

    def grant(self) -> Region:
        request = self.receive()[0]
        assert isinstance(request, OpenRegion), request
        name, path = self.memory.create(request.bytes, 0.0)
        region = Region(region=name, path=path, bytes=request.bytes)
        self.send(region)
        return region

    def close(self) -> None:
        self.socket.close()
        self.memory.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with contextlib.closing(Peer(tmp_path)) as other:
        yield other


@contextlib.contextmanager
def segmenting(peer: Peer, *images: Any, transport: Any = "shared") -> Iterator[list[Any]]:
    """A client segments images meanwhile, one by one; the answers, or the first error, are in the list afterwards."""
    answers: list[Any] = []

    def work() -> None:
        with Client(peer.endpoint, timeout_s=10, transport=transport) as client:
            try:
                for image in images:
                    answers.append(client.segment(image))
            except Exception as error:
                answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield answers
    finally:
        thread.join(20)


def test_a_bad_request_is_tried_once_by_socket_before_it_counts(peer: Peer) -> None:
    image = pixels(1)
    with segmenting(peer, image) as answers:
        region = peer.grant()
        placed, payload = peer.receive()
        assert placed.image.place == Place(region=region.region, offset=0, bytes=image.nbytes)
        assert payload == []
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="it has ended"))
        again, payload = peer.receive()
        assert (again.job, again.image.place, payload) == (placed.job, None, [image.tobytes()])
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="really"))
    assert isinstance(answers[0], JobFailed)
    assert answers[0].reason == "really"


def test_a_region_lost_is_not_used_again(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        peer.grant()
        placed, _ = peer.receive()
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="it has ended"))
        assert peer.receive()[1]
        peer.finish(placed.job)
    assert answers[0].width == 1
    assert len(_regions_open_here(peer.memory)) == 1, "by the client too, when it has no use for it any more"


def _regions_open_here(memory: SharedMemory) -> list[Path]:
    return [path for path in _open_in_shm(os.getpid()) if path.parent == Path(memory.folder)]


def test_a_retry_finds_the_image_where_it_was(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        peer.grant()
        placed, _ = peer.receive()
        peer.send(Failed(job=placed.job, code=Code.BUSY, reason="full", retry_after_s=0.01))
        assert peer.receive() == (placed, [])
        peer.finish(placed.job)
    assert answers[0].width == 1


def test_until_the_region_comes_images_go_by_socket(peer: Peer) -> None:
    with segmenting(peer, pixels(1), transport="auto") as answers:
        submitted, payload = peer.receive()
        assert submitted.image.place is None
        assert payload == [pixels(1).tobytes()]
        assert peer.receive()[0] == OpenRegion(bytes=PLACES << 18)
        peer.finish(submitted.job)
    assert answers[0].width == 1


def _write_region(path: Path, size: int = PLACES << 18) -> Path:
    path.write_bytes(b"\0" * size)
    return path


def _link(path: Path) -> Path:
    path.symlink_to(_write_region(path.with_suffix(".target")))
    return path


def _hard_link(path: Path) -> Path:
    path.with_suffix(".twice").hardlink_to(_write_region(path))
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _of_another(path: Path) -> Path:
    if os.geteuid():
        pytest.skip("needs root, to give a file away")
    os.chown(_write_region(path), 65534, -1)
    return path


@pytest.mark.parametrize(
    "make",
    [_link, _hard_link, _folder, _of_another, lambda path: _write_region(path, 4 * MB), lambda path: path],
    ids=["a link", "of two names", "a folder", "of another user", "of another size", "missing"],
)
def test_a_file_that_is_no_region_is_not_written_to(peer: Peer, tmp_path: Path, make: Any) -> None:
    path = make(tmp_path / "file")
    with segmenting(peer, pixels(1)) as answers:
        assert isinstance(peer.receive()[0], OpenRegion)
        peer.send(Region(region="r", path=str(path), bytes=PLACES << 18))
    assert isinstance(answers[0], SharedMemoryError)
    assert not path.is_file() or not path.read_bytes().strip(b"\0")


def test_a_file_that_is_a_region_is_written_to(peer: Peer, tmp_path: Path) -> None:
    """Or the test before could not fail."""
    path = _write_region(tmp_path / "file")
    with segmenting(peer, pixels(1)):
        assert isinstance(peer.receive()[0], OpenRegion)
        peer.send(Region(region="r", path=str(path), bytes=PLACES << 18))
        peer.finish(peer.receive()[0].job)
    assert path.read_bytes()[:180_000] == pixels(1).tobytes()


def test_after_a_new_connection_images_are_sent_again_by_socket(peer: Peer) -> None:
    with segmenting(peer, pixels(1), pixels(2)) as answers:
        peer.grant()
        placed, _ = peer.receive()
        peer.bind_again()
        again, payload = peer.receive()
        assert (again.job, payload) == (placed.job, [pixels(1).tobytes()])
        peer.finish(placed.job)
        region = peer.grant()  # the old one means nothing to whoever is there now
        placed, _ = peer.receive()
        assert placed.image.place == Place(region=region.region, offset=0, bytes=180_000)
        peer.finish(placed.job)
    assert [answer.width for answer in answers] == [1, 1]


def test_too_little_is_as_good_as_none(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        assert isinstance(peer.receive()[0], OpenRegion)
        name, path = peer.memory.create(4096, 0.0)
        peer.send(Region(region=name, path=path, bytes=4096))
    assert "the daemon grants 4096 bytes, an image needs 262144" in str(answers[0])


# -- the daemon's and the worker's parts ------------------------------------------------------------------------------

SIZES = st.integers(1, 40 * MB)


@given(st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"d", b"e"]), SIZES, st.booleans()), max_size=60))
def test_grants_never_exceed_their_bounds(steps: list[tuple[bytes, int, bool]]) -> None:
    table = Regions(64 * MB)
    for number, (client, wanted, remove) in enumerate(steps):
        if remove:
            for name in table.of(client)[:1]:
                table.remove(name)
            continue
        own = sum(table._regions[name].size for name in table.of(client))
        try:
            size = table.grant(client, wanted)
        except RegionError:
            assert len(table.of(client)) == regions.MOST_OF_A_CLIENT or own == 16 * MB or table.granted == 64 * MB
            continue
        assert 0 < size < wanted + regions.PAGE
        assert size % regions.PAGE == 0
        table.add(str(number), client, size)
        assert own + size <= 16 * MB
        assert table.granted <= 64 * MB


def test_there_is_an_end_to_the_number_of_regions() -> None:
    table = Regions(1 << 40)
    for number in range(regions.MOST_REGIONS):
        client = str(number).encode()
        table.add(str(number), client, table.grant(client, 1))
    with pytest.raises(RegionError, match="no shared memory is left"):
        table.grant(b"one more", 1)


@pytest.fixture
def memory_of_ours() -> Iterator[SharedMemory]:
    with contextlib.closing(SharedMemory([])) as memory:
        yield memory


def test_a_region_that_is_not_locked_in_time_is_abandoned(memory_of_ours: SharedMemory) -> None:
    name, _ = memory_of_ours.create(4096, 100.0)
    assert memory_of_ours.abandoned(100.0 + protocol.GRACE_S) == []
    assert memory_of_ours.abandoned(100.1 + protocol.GRACE_S) == [name]


def test_a_region_that_is_locked_is_not_until_it_is_free(memory_of_ours: SharedMemory) -> None:
    name, path = memory_of_ours.create(4096, 0.0)
    code = "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, 2, 1); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert memory_of_ours.abandoned(1.0) == []
        assert memory_of_ours.abandoned(1e6) == []
        other.kill()
        other.wait()
    assert memory_of_ours.abandoned(1e6 + 1) == [name]


def test_a_reader_sees_what_is_there_now_and_lets_go_of_what_has_ended(memory_of_ours: SharedMemory) -> None:
    name, path = memory_of_ours.create(4096, 0.0)
    reader = Reader(memory_of_ours.folder)
    place = Place(region=name, offset=100, bytes=3)
    assert reader.read(place) == b"\0\0\0"
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"abc")
    assert reader.read(place) == b"abc"
    memory_of_ours.remove(name)
    assert reader.read(place) == b"abc"  # until it is told
    reader.close(name)
    assert not [path for path in _open_in_shm(os.getpid()) if name in path.name]
    with pytest.raises(RegionError, match="has ended"):
        reader.read(place)
    reader.close("never opened")


def test_a_reader_follows_no_link(memory_of_ours: SharedMemory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    os.symlink(tmp_path / "secret", f"{memory_of_ours.folder}/name")
    with pytest.raises(RegionError):
        Reader(memory_of_ours.folder).read(Place(region="name", offset=0, bytes=6))


def test_folders_of_the_dead_are_swept_and_those_of_the_living_are_not(memory_of_ours: SharedMemory) -> None:
    code = """
import os, sys
from daemon.shared_memory import SharedMemory
memory = SharedMemory([])
memory.create(4096, 0.0)
print(memory.folder, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = Path(other.stdout.readline().strip())
        shared_memory.sweep()
        assert left.exists()
        other.kill()
        other.wait()
        assert left.exists()
    shared_memory.sweep()
    assert not left.exists()
    assert Path(memory_of_ours.folder).exists()


def test_looking_after_hundreds_of_regions_is_cheap(memory_of_ours: SharedMemory) -> None:
    for _ in range(regions.MOST_REGIONS):
        memory_of_ours.create(4096, 0.0)
    start = time.process_time()
    assert memory_of_ours.abandoned(1.0) == []  # still in their time of grace
    assert time.process_time() - start < 0.02


def test_a_folder_that_somebody_removed_is_a_refusal(memory_of_ours: SharedMemory) -> None:
    name, _ = memory_of_ours.create(4096, 0.0)
    subprocess.run(["rm", "-r", memory_of_ours.folder], check=True)
    with pytest.raises(RegionError, match="No such file"):
        memory_of_ours.create(4096, 0.0)
    memory_of_ours.remove(name)


def test_small_images_are_not_worth_a_place() -> None:
    assert SMALLEST_BYTES == 1 << 16
    assert psutil.Process().num_fds() < 500  # nothing above has leaked
