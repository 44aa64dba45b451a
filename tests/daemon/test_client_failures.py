"""What both clients make of refusals, silence and daemons that die: retries, timeouts, one answer a job."""
import asyncio
import contextlib
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import zmq
from clients import SLOW_MS, Peer, answered, checksum, gather, in_thread, outcomes, pixels, with_client
from curve import free_port

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, JobFailed
from blendmaskd.protocol import Code

# -- time -------------------------------------------------------------------------------------------------------------


def test_a_deadline_that_passes_is_a_timeout_and_not_tried_again(slow_daemon: Any) -> None:
    before = outcomes(slow_daemon).get("timeout", 0)
    start = time.monotonic()
    with pytest.raises(JobFailed, match=r"timeout: the deadline passed .* on cpu:0") as failed:
        slow_daemon.client.segment(pixels(0), deadline_s=0.05)
    assert failed.value.code is Code.TIMEOUT
    assert time.monotonic() - start < SLOW_MS / 1000
    next(slow_daemon.client.map([pixels(1)]))
    assert outcomes(slow_daemon).get("timeout", 0) <= before + 1


def test_the_daemon_s_timeout_comes_before_the_client_gives_up(slow_daemon: Any) -> None:
    impatient = slow_daemon.connect(timeout_s=0.2)
    with pytest.raises(JobFailed) as failed:
        impatient.segment(pixels(0))
    assert failed.value.code is Code.TIMEOUT


def test_silence_is_a_timeout_error_after_which_the_job_is_cancelled(peer: Peer) -> None:
    with Client(peer.endpoint, timeout_s=0.2) as client:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"no answer from {peer.endpoint} within 0.2 s"):
            client.segment(b"x")
        assert 0.2 <= time.monotonic() - start < 2
        submitted, cancelled = peer.receive(), peer.receive()
        assert isinstance(submitted, protocol.Submit)
        assert submitted.deadline_s == pytest.approx(0.1)
        assert cancelled == protocol.Cancel(job=submitted.job)
        with pytest.raises(TimeoutError):
            client.stats()


def test_what_a_fetch_that_gave_up_left_behind_is_no_answer_to_the_next(peer: Peer) -> None:
    name = "x" * 32
    with Client(peer.endpoint, timeout_s=0.2) as client:
        with pytest.raises(TimeoutError):
            client.fetch(name)
        assert [peer.receive(), peer.receive()] == [protocol.Fetch(job=name), protocol.Cancel(job=name)]
        for call in (lambda: client.fetch(name), lambda: client.forget(name)):
            peer.send(protocol.Accepted(job=name))
            with pytest.raises(TimeoutError):
                call()
        peer.send(protocol.Accepted(job=name))
        assert client.fetch(name, wait=False) is None


def test_nobody_there_is_a_timeout_error(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/nobody", timeout_s=0.1) as client:
        with pytest.raises(TimeoutError):
            client.segment(b"x")
        with pytest.raises(TimeoutError):
            list(client.map([b"x"] * 2000, window=1500, on_error="return"))


@pytest.mark.parametrize("code", [Code.BUSY, Code.UNAVAILABLE, Code.DRAINING])
def test_what_may_succeed_later_is_tried_again_after_the_hint(peer: Peer, code: Code) -> None:
    with Client(peer.endpoint, timeout_s=10) as client:
        result = in_thread(lambda: client.segment(b"x"))
        first = peer.receive()
        refused = time.monotonic()
        peer.refuse(first.job, code, retry_after_s=0.3)
        assert peer.receive() == first
        assert 0.3 <= time.monotonic() - refused < 2
        peer.finish(first.job)
        assert result().detections == []


@pytest.mark.parametrize(
    "code",
    [Code.BAD_REQUEST, Code.BAD_IMAGE, Code.TOO_LARGE, Code.TIMEOUT, Code.CANCELLED, Code.WORKER_LOST,
     Code.ENGINE_FAILED, Code.UNAUTHORISED],
)  # fmt: skip
def test_what_cannot_succeed_later_is_not_tried_again(peer: Peer, code: Code) -> None:
    with Client(peer.endpoint, timeout_s=10) as client:
        result = in_thread(lambda: client.segment(b"x"))
        peer.refuse(peer.receive().job, code, retry_after_s=0.01)
        with pytest.raises(JobFailed, match=f"{code}: because"):
            result()


def test_retries_end_with_their_number_and_with_the_timeout(peer: Peer) -> None:
    with Client(peer.endpoint, timeout_s=10, retries=2) as client:
        result = in_thread(lambda: client.segment(b"x"))
        for _ in range(3):
            peer.refuse(peer.receive().job, Code.BUSY, retry_after_s=0.01)
        with pytest.raises(JobFailed, match="busy"):
            result()
    with Client(peer.endpoint, timeout_s=5) as client:
        start = time.monotonic()
        result = in_thread(lambda: client.segment(b"x"))
        peer.refuse(peer.receive().job, Code.UNAVAILABLE, retry_after_s=30)
        with pytest.raises(JobFailed, match="unavailable: because"):  # and no mute wait until the timeout
            result()
        assert time.monotonic() - start < 4


def test_more_than_a_small_queue_takes_is_served_in_the_end(daemon: Any) -> None:
    running = daemon(queue={"max_jobs": 1}, timed={"latency_ms": {1: 10}})
    client = running.connect(retries=1000)
    results = list(client.map([pixels(number) for number in range(24)], window=12))
    assert [answered(result) for result in results] == [checksum(pixels(number)) for number in range(24)]
    stats = client.stats()
    while stats["answered"] < 24:
        stats = client.stats()
    assert stats["failures"].keys() == {"busy"}
    assert sum(device["images"] for device in stats["devices"]) <= 24


# -- one answer -------------------------------------------------------------------------------------------------------


def test_a_job_that_is_submitted_twice_runs_once_and_is_answered_once(slow_daemon: Any, wait_until: Any) -> None:
    wait_until(lambda: slow_daemon.client.stats()["leased"] == 0)
    before = slow_daemon.client.stats()
    socket = slow_daemon.dealer()

    def send(job: str) -> None:
        socket.send_multipart(
            protocol.encode(protocol.Submit(job=job, image=protocol.Image(kind="raw", shape=(2, 2, 3))), [bytes(12)])
        )

    def answer() -> str:
        return protocol.decode(socket.recv_multipart(), protocol.TO_CLIENT)[0].job

    for job in ("one", "one", "two", "one", "two", "three"):
        send(job)
    assert sorted(answer() for _ in range(3)) == ["one", "three", "two"]
    wait_until(lambda: slow_daemon.client.stats()["leased"] == 0)  # so what would have run twice has done so
    send("one")  # answered long ago: a new job of that name
    assert answer() == "one"

    def new_images() -> int:
        count: int = slow_daemon.client.stats()["devices"][0]["images"] - before["devices"][0]["images"]
        return count

    assert wait_until(lambda: new_images() >= 4 and new_images()) == 4
    assert slow_daemon.client.stats()["answered"] == before["answered"] + 4
    with pytest.raises(zmq.Again):
        socket.recv_multipart(zmq.NOBLOCK)


def test_jobs_of_a_daemon_that_is_killed_are_answered_by_the_next_one(daemon: Any, wait_until: Any) -> None:
    running = daemon(timed={"latency_ms": {1: 100}})
    images = [pixels(number) for number in range(16)]
    client = running.connect()
    seen: list[Any] = []
    mapped = in_thread(lambda: [seen.append(result) or result for result in client.map(images, window=12)])
    mapped_async = in_thread(lambda: asyncio.run(gather(running.endpoint, images)))
    wait_until(lambda: len(seen) >= 2)
    running.kill()
    assert len(seen) < 16
    wait_until(lambda: not running.processes())
    running.start()
    wanted = [checksum(image) for image in images]
    assert [answered(result) for result in mapped()] == wanted
    assert [answered(result) for result in mapped_async()] == wanted


# -- asyncio ----------------------------------------------------------------------------------------------------------


def test_async_silence_is_a_timeout_error_after_which_the_job_is_cancelled(peer: Peer) -> None:
    async def work(client: AsyncClient) -> None:
        with pytest.raises(TimeoutError, match=rf"no answer from {peer.endpoint} within 0.2 s"):
            await client.segment(b"x")

    with_client(peer.endpoint, work, timeout_s=0.2)
    submitted, cancelled = peer.receive(), peer.receive()
    assert cancelled == protocol.Cancel(job=submitted.job)


def test_async_busy_is_tried_again_after_the_hint(peer: Peer) -> None:
    result = in_thread(lambda: asyncio.run(gather(peer.endpoint, [b"x"])))
    first = peer.receive()
    refused = time.monotonic()
    peer.refuse(first.job, Code.BUSY, retry_after_s=0.3)
    assert peer.receive() == first
    assert 0.3 <= time.monotonic() - refused < 2
    peer.finish(first.job)
    assert result()[0].device == "npu:0"


def test_a_lost_answer_to_stats_does_not_mislead_the_next(peer: Peer) -> None:
    async def work(client: AsyncClient) -> Any:
        with pytest.raises(TimeoutError):
            await client.stats()
        return await client.stats()

    result = in_thread(lambda: with_client(peer.endpoint, work, timeout_s=0.5))
    assert peer.receive() == protocol.GetStats()
    assert peer.receive() == protocol.GetStats()
    peer.send(protocol.Stats(stats={"seq": 2}))
    assert result() == {"seq": 2}


def test_a_task_that_dies_ends_what_waits_with_its_error(peer: Peer) -> None:
    async def work(client: AsyncClient) -> None:
        waiting = [asyncio.create_task(client.segment(b"x")), asyncio.create_task(client.stats())]
        for _ in waiting:
            await asyncio.to_thread(peer.receive)
        peer.socket.send_multipart([peer.client, b"nonsense"])
        for task in waiting:
            with pytest.raises(protocol.ProtocolError):
                await asyncio.wait_for(task, 5)
        with pytest.raises(RuntimeError, match="this client has failed: ProtocolError"):
            await client.segment(b"x")

    with_client(peer.endpoint, work)


# -- a path that goes silent ------------------------------------------------------------------------------------------


class Relay:
    """A path to a daemon by TCP. `swallow` makes it silent: what is sent vanishes and no end is told, as when a NAT
    forgets a connection; new connections work.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._silent: set[socket.socket] = set()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                ends = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._port))
                self._open += ends
                for pair in (ends, ends[::-1]):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source not in self._silent:
                    target.sendall(data)

    def swallow(self) -> None:
        self._silent.update(self._open)

    def close(self) -> None:
        for each in (self._listener, *self._open):
            each.close()


@pytest.mark.slow
def test_a_path_that_goes_silent_is_given_up_and_the_job_sent_again(daemon: Any) -> None:
    port = free_port()
    daemon(insecure_tcp=True, endpoints={"clients": [f"tcp://127.0.0.1:{port}"], "metrics": None})
    relay = Relay(port)

    async def work(client: AsyncClient) -> None:
        await client.segment(pixels(1))
        relay.swallow()
        assert answered(await client.segment(pixels(2))) == checksum(pixels(2))

    with contextlib.closing(relay), Client(relay.endpoint, timeout_s=60) as client:
        client.segment(pixels(1))
        relay.swallow()
        start = time.monotonic()
        assert answered(client.segment(pixels(2))) == checksum(pixels(2))
        assert time.monotonic() - start < 40
        with_client(relay.endpoint, work, timeout_s=60.0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize("modes", [(0o755, 0o600), (0o700, 0o777)])
def test_a_socket_that_is_for_others_is_told_from_a_daemon_that_is_not_there(modes: tuple[int, int]) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        path = f"{folder}/client.sock"
        listening.bind(path)
        for each, mode in zip((folder, path), modes):
            os.chmod(each, mode)
        with Client(f"ipc://{path}") as client:
            assert client.hint == ""
            os.seteuid(65534)
            try:
                assert "is it in the socket's group?" in client.hint
            finally:
                os.seteuid(0)
