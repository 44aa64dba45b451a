"""Both clients against a running daemon; where a peer has to misbehave, against a bare socket."""
import asyncio
import contextlib
import gc
import io
import itertools
import os
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zmq
from curve import free_port
from PIL import Image

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, JobFailed, Segmentation, ServerPath
from blendmaskd.protocol import FROM_CLIENT, Code

Pixels = npt.NDArray[np.uint8]
SLOW_MS = 250


@pytest.fixture(scope="module")
def slow_daemon(start_daemons: Any) -> Any:
    """One device, a quarter of a second an image: what is submitted can still be waiting."""
    return start_daemons(devices=["cpu:0"], timed={"latency_ms": {1: SLOW_MS}})


@pytest.fixture
def peer(tmp_path: Path) -> Iterator["Peer"]:
    with zmq.Context.instance().socket(zmq.ROUTER) as socket:
        yield Peer(socket, f"ipc://{tmp_path}/p")


class Peer:
    """The other end, as the test wants it to be."""

    def __init__(self, socket: zmq.Socket[Any], endpoint: str) -> None:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVTIMEO, 10_000)
        socket.bind(endpoint)
        self.socket = socket
        self.endpoint = endpoint

    def receive(self) -> Any:
        """The next message."""
        self.client, *frames = self.socket.recv_multipart()
        return protocol.decode(frames, FROM_CLIENT)[0]

    def send(self, message: Any, payload: tuple[bytes, ...] = ()) -> None:
        """An answer to whoever spoke last."""
        self.socket.send_multipart([self.client, *protocol.encode(message, payload)])

    def refuse(self, job: str, code: Code, retry_after_s: float | None = None) -> None:
        self.send(protocol.Failed(job=job, code=code, reason="because", retry_after_s=retry_after_s))

    def finish(self, job: str) -> None:
        self.send(protocol.Result(job=job, width=1, height=1, device="npu:0", timings={}), (b"\x90",))


def pixels(number: int, height: int = 6, width: int = 8) -> Pixels:
    """An image that differs from every other number's."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def checksum(image: Pixels) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


def answered(result: Any) -> int:
    """The checksum in a result of the timed engine."""
    assert isinstance(result, Segmentation), result
    number: int = result.detections[0]["checksum"]
    return number


def encoded(image: Pixels, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[:, :, ::-1]).save(file, form)
    return file.getvalue()


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run it beside the test; call what is returned for its value or its exception."""
    values: list[Any] = []

    def keep() -> None:
        try:
            values.append(work())
        except Exception as error:
            values.append(error)

    thread = threading.Thread(target=keep)
    thread.start()

    def value() -> Any:
        thread.join(30)
        assert values, "it still runs"
        if isinstance(values[0], Exception):
            raise values[0]
        return values[0]

    return value


def outcomes(daemon: Any) -> dict[str, int]:
    stats = daemon.client.stats()
    return {"answered": stats["answered"], **stats["failures"]}


# -- images and options -----------------------------------------------------------------------------------------------


def test_an_array_bytes_and_a_file_give_the_same_answer(shared_daemon: Any, tmp_path: Path) -> None:
    image = pixels(1, 20, 30)
    file = tmp_path / "image.png"
    file.write_bytes(encoded(image, "PNG"))
    for source in (image, file.read_bytes(), bytearray(file.read_bytes()), file, str(file)):
        result = shared_daemon.client.segment(source)
        assert (result.width, result.height) == (30, 20)
        assert answered(result) == checksum(image)
        assert result.device in ("cpu:0", "cpu:1")
        assert result.timings["total"] >= result.timings["device"] >= 0.005


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[::2, ::3],
        lambda image: image[::-1],
        lambda image: image[:, ::-1],
        lambda image: image[:, :, ::-1],
        lambda image: np.asfortranarray(image),
        lambda image: image.transpose(1, 0, 2),
        lambda image: np.broadcast_to(image[:1], image.shape),
        lambda image: image[3:9, 2:7],
    ],
    ids=["steps", "flipped", "mirrored", "other channel order", "columns first", "transposed", "broadcast", "window"],
)
def test_an_array_that_is_not_contiguous_arrives_as_it_looks(
    shared_daemon: Any, view: Callable[[Pixels], Pixels]
) -> None:
    image = view(pixels(2, 12, 12))
    result = shared_daemon.client.segment(image)
    assert (result.height, result.width) == image.shape[:2]
    assert answered(result) == checksum(image)


def test_options_reach_the_engine(shared_daemon: Any) -> None:
    segment = shared_daemon.client.segment
    (detection,) = segment(pixels(1)).detections
    assert detection["segmentation"]["size"] == [6, 8]
    assert "segmentation" not in segment(pixels(1), mask_format="none").detections[0]
    assert isinstance(segment(pixels(1), mask_format="polygon").detections[0]["segmentation"], list)
    assert segment(pixels(1), max_detections=0).detections == []
    assert segment(pixels(1), score_threshold=1.0, priority=9, deadline_s=5).detections
    with pytest.raises(TypeError, match="softness"):
        segment(pixels(1), softness=1)
    with pytest.raises(JobFailed, match=r"bad-request: submit: .*score_threshold") as refused:
        segment(pixels(1), score_threshold=2.0)
    assert refused.value.code is Code.BAD_REQUEST


def test_what_is_no_image_is_refused_here(shared_daemon: Any, tmp_path: Path) -> None:
    for thing in (None, 7, [[1, 2, 3]], np.zeros((4, 4), np.uint8)):
        with pytest.raises(TypeError):
            shared_daemon.client.segment(thing)
    with pytest.raises(FileNotFoundError):
        shared_daemon.client.segment(tmp_path / "missing.jpg")


def test_a_path_on_the_server_is_off_unless_a_root_allows_it(shared_daemon: Any) -> None:
    with pytest.raises(JobFailed, match=r"bad-request: images by path are disabled: paths\.roots"):
        shared_daemon.client.segment(ServerPath("/etc/passwd"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + size) + chunk(b"IDAT" + zlib.compress(b"")) + chunk(b"IEND")


BAD: dict[str, tuple[Any, str]] = {
    "truncated JPEG": (encoded(pixels(1, 200, 300), "JPEG")[:4000], "bad-image: cannot be decoded: .*truncated"),
    "truncated PNG": (encoded(pixels(1, 200, 300), "PNG")[:4000], "bad-image: cannot be decoded: .*truncated"),
    "0 bytes": (b"", "bad-image: the image is empty"),
    "not an image": (b"#!/bin/sh\necho hello\n", "bad-image: not a JPEG, PNG, WebP, BMP or TIFF"),
    "a GIF": (encoded(pixels(1), "GIF"), "bad-image: not a JPEG, PNG, WebP, BMP or TIFF"),
    "60000x60000 header": (png_header(60000, 60000), "too-large: 60000x60000 pixels are over the limit of 50000000"),
    "four channels": (np.zeros((4, 4, 4), np.uint8), r"bad-image: shape \[4, 4, 4\]: expected \[height, width, 3\]"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), r"bad-image: shape \[0, 4, 3\]"),
    "floats": (np.zeros((4, 4, 3), np.float32), "bad-image: dtype 'float32': expected uint8"),
    "signed": (np.zeros((4, 4, 3), np.int8), "bad-image: dtype 'int8': expected uint8"),
}


@pytest.mark.parametrize(("image", "reason"), BAD.values(), ids=BAD)
def test_a_bad_image_is_answered_with_a_reason_and_costs_the_worker_nothing(
    shared_daemon: Any, image: Any, reason: str
) -> None:
    before = shared_daemon.pids()
    for _ in range(2):  # one for each worker
        with pytest.raises(JobFailed, match=reason) as failed:
            shared_daemon.client.segment(image)
        assert failed.value.code in (Code.BAD_IMAGE, Code.TOO_LARGE)
        assert answered(shared_daemon.client.segment(pixels(5))) == checksum(pixels(5))
    assert shared_daemon.pids() == before


def test_a_raw_image_whose_bytes_do_not_fit_its_shape_is_bad(shared_daemon: Any) -> None:
    socket = shared_daemon.dealer()
    image = protocol.Image(kind="raw", shape=(4, 4, 3))
    socket.send_multipart(protocol.encode(protocol.Submit(job="short", image=image), [bytes(47)]))
    message, _ = protocol.decode(socket.recv_multipart(), protocol.TO_CLIENT)
    assert message == protocol.Failed(
        job="short", code=Code.BAD_IMAGE, reason="shape (4, 4, 3) of uint8: expected 48 bytes, found 47"
    )


# -- many -------------------------------------------------------------------------------------------------------------


def test_map_keeps_the_window_full_and_the_order(shared_daemon: Any) -> None:
    taken = itertools.count(1)
    at_work = []
    last = 0

    def images() -> Iterator[Pixels]:
        nonlocal last
        for number in range(60):
            last = next(taken)
            yield pixels(number)

    for place, result in enumerate(shared_daemon.client.map(images(), window=7)):
        assert answered(result) == checksum(pixels(place))
        at_work.append(last - place)
    assert place == 59
    assert at_work[:50] == [7] * 50
    assert max(at_work) == 7


def test_map_uses_both_devices(shared_daemon: Any) -> None:
    results = list(shared_daemon.client.map([pixels(0)] * 20))
    assert {result.device for result in results} == {"cpu:0", "cpu:1"}


def test_map_returns_failures_in_their_place_or_raises_the_first(shared_daemon: Any, tmp_path: Path) -> None:
    images = [pixels(0), b"no image", tmp_path / "missing.png", pixels(3), tmp_path, b"", pixels(6)]
    results = list(shared_daemon.client.map(images, on_error="return", window=3))
    failed = {place: result for place, result in enumerate(results) if isinstance(result, JobFailed)}
    assert {place: result.code for place, result in failed.items()} == dict.fromkeys((1, 2, 4, 5), Code.BAD_IMAGE)
    assert failed[2].reason == "cannot be read: No such file or directory"
    assert failed[4].reason == "cannot be read: Is a directory"
    for place in (0, 3, 6):
        assert answered(results[place]) == checksum(images[place])
    raising = shared_daemon.client.map(images, window=3)
    assert answered(next(raising)) == checksum(images[0])
    with pytest.raises(JobFailed, match="bad-image"):
        next(raising)
    raising = shared_daemon.client.map([images[0], images[2]])
    assert answered(next(raising)) == checksum(images[0])
    with pytest.raises(FileNotFoundError):
        next(raising)


def test_an_unfinished_map_cancels_what_is_in_flight(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon)
    results = slow_daemon.client.map([pixels(number) for number in range(10)], window=6)
    assert answered(next(results)) == checksum(pixels(0))
    results.close()

    def new(outcome: str) -> int:
        return outcomes(slow_daemon).get(outcome, 0) - before.get(outcome, 0)

    wait_until(lambda: new("answered") + new("cancelled") == 6)
    assert new("cancelled") > 0


def test_a_window_of_nothing_and_an_endpoint_that_is_none_are_refused(shared_daemon: Any) -> None:
    with pytest.raises(ValueError, match="window = 0"):
        next(shared_daemon.client.map([pixels(0)], window=0))
    with pytest.raises(ValueError, match="on_error = 'retrun'"):
        next(shared_daemon.client.map([pixels(0)], on_error="retrun"))
    for endpoint in ("nonsense", "/run/x.sock", "http://localhost:1", "tcp://localhost"):
        with pytest.raises(ValueError, match=f"{endpoint}: .*expected ipc:///PATH or tcp://HOST:PORT"):
            Client(endpoint)

        async def connect() -> None:
            async with AsyncClient(endpoint):  # noqa: B023
                pass

        with pytest.raises(ValueError, match=endpoint):
            asyncio.run(connect())


def test_stats_are_the_latest_snapshot(shared_daemon: Any, wait_until: Any) -> None:
    old = shared_daemon.client.stats()["seq"]
    before = wait_until(lambda: (stats := shared_daemon.client.stats())["seq"] > old and stats)  # has all answers
    assert [device["device"] for device in before["devices"]] == ["cpu:0", "cpu:1"]
    shared_daemon.client.segment(pixels(0))
    wait_until(lambda: shared_daemon.client.stats()["answered"] == before["answered"] + 1)
    assert shared_daemon.client.stats()["seq"] > before["seq"]


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


async def gather(endpoint: str, images: list[Any]) -> list[Segmentation]:
    async with AsyncClient(endpoint, timeout_s=20) as client:
        return await asyncio.gather(*(client.segment(image) for image in images))


def with_client(endpoint: str, work: Callable[[AsyncClient], Awaitable[Any]], timeout_s: float = 20.0) -> Any:
    async def run() -> Any:
        async with AsyncClient(endpoint, timeout_s=timeout_s) as client, asyncio.timeout(60):
            return await work(client)

    return asyncio.run(run())


def test_many_tasks_share_an_async_client(shared_daemon: Any) -> None:
    images = [pixels(number) for number in range(30)]
    results = asyncio.run(gather(shared_daemon.endpoint, images))
    assert [answered(result) for result in results] == [checksum(image) for image in images]


def test_async_map_keeps_the_order_and_raises_the_first_failure(shared_daemon: Any) -> None:
    async def work(client: AsyncClient) -> None:
        images = [pixels(number) for number in range(30)]
        results = [answered(result) async for result in client.map(images, window=5, mask_format="none")]
        assert results == [checksum(image) for image in images]
        assert (await client.stats())["window_s"] == 10
        with pytest.raises(JobFailed, match="bad-image"):
            [result async for result in client.map([pixels(0), b"no image", pixels(2)], window=2)]
        with pytest.raises(ValueError, match="window = 0"):
            [result async for result in client.map([pixels(0)], window=0)]
        assert answered(await client.segment(pixels(9))) == checksum(pixels(9))

    with_client(shared_daemon.endpoint, work)


def test_cancelling_a_task_cancels_its_job(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon).get("cancelled", 0)

    async def work(client: AsyncClient) -> None:
        tasks = [asyncio.create_task(client.segment(pixels(number))) for number in range(5)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks[3:]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert [answered(result) for result in done[:3]] == [checksum(pixels(number)) for number in range(3)]
        assert [type(result) for result in done[3:]] == [asyncio.CancelledError] * 2
        # While the client lives: closing it would cancel them too.
        await asyncio.to_thread(
            wait_until, lambda: outcomes(slow_daemon).get("cancelled", 0) == before + 2
        )

    with_client(slow_daemon.endpoint, work)


def test_an_answer_to_a_task_that_was_cancelled_in_the_same_turn_is_dropped(peer: Peer) -> None:
    async def work(client: AsyncClient) -> None:
        task = asyncio.create_task(client.segment(b"x"))
        submitted = await asyncio.to_thread(peer.receive)
        task.cancel()  # its future is cancelled now, the task runs later
        client._tell(client._exchange.jobs[submitted.job])  # what the reading task does with an answer
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(peer.receive) == protocol.Cancel(job=submitted.job)

    with_client(peer.endpoint, work)


def test_a_closed_async_client_tells_those_who_wait(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon).get("cancelled", 0)

    async def run() -> list[Any]:
        async with AsyncClient(slow_daemon.endpoint) as client:
            tasks = [asyncio.create_task(client.segment(pixels(number))) for number in range(6)]
            await tasks[0]
        async with asyncio.timeout(5):
            return await asyncio.gather(*tasks, return_exceptions=True)

    failed = [result for result in asyncio.run(run()) if not isinstance(result, Segmentation)]
    assert {str(failure) for failure in failed} == {"cancelled: the client was closed"}
    wait_until(lambda: outcomes(slow_daemon).get("cancelled", 0) == before + len(failed))


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


# -- what callers get wrong -------------------------------------------------------------------------------------------

# What cannot be sent, or would be refused: by name, the call.
WRONG: dict[str, Callable[[Any], Any]] = {
    "an int beyond 64 bits": lambda client: client.segment(pixels(0), priority=10**30),
    "an object": lambda client: client.segment(pixels(0), score_threshold=object()),
    "a complex number": lambda client: client.segment(pixels(0), score_threshold=1j),
    "text for a number": lambda client: client.segment(pixels(0), deadline_s="5"),
    "not a number": lambda client: client.segment(pixels(0), deadline_s=float("nan")),
    "infinity": lambda client: client.segment(pixels(0), deadline_s=np.inf),
    "a numpy truth": lambda client: client.segment(pixels(0), max_detections=np.bool_(True)),
    "an array": lambda client: client.segment(pixels(0), score_threshold=np.zeros(2)),
    "None for a choice": lambda client: client.segment(pixels(0), mask_format=None),
    "an unknown option": lambda client: client.segment(pixels(0), softness=1),
    "objects": lambda client: client.segment(np.zeros((4, 4, 3), object)),
    "dates": lambda client: client.segment(np.zeros((4, 4, 3), "datetime64[s]")),
    "surrogates": lambda client: client.segment(ServerPath("/caf\udce9.jpg")),
    "a path of bytes": lambda client: client.segment(ServerPath(b"/x.jpg")),  # type: ignore[arg-type]
    "a long path": lambda client: client.segment(ServerPath("/" + "x" * 5000)),
    "a long name": lambda client: client.submit(pixels(0), job="x" * 200),
    "a short name": lambda client: client.submit(pixels(0), job="x"),
    "a name that is no text": lambda client: client.submit(pixels(0), job=b"x" * 40),
    "a number as a name": lambda client: client.fetch(5),
    "no name": lambda client: client.forget(None),
}
REFUSED = (JobFailed, TypeError, ValueError, OverflowError)


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_a_wrong_argument_raises_in_its_call_and_nowhere_else(shared_daemon: Any, call: Callable[[Any], Any]) -> None:
    async def work(client: AsyncClient) -> None:
        others = asyncio.create_task(client.segment(pixels(1)))
        with pytest.raises(REFUSED):
            await asyncio.wait_for(call(client), 5)
        assert answered(await others) == checksum(pixels(1))
        assert answered(await client.segment(pixels(2))) == checksum(pixels(2))

    with_client(shared_daemon.endpoint, work)
    with shared_daemon.connect(timeout_s=5) as client:
        with pytest.raises(REFUSED):
            call(client)
        assert answered(client.segment(pixels(3))) == checksum(pixels(3))


def test_numbers_and_texts_of_other_libraries_are_numbers_and_texts(shared_daemon: Any) -> None:
    options = {"score_threshold": np.float32(0.25), "max_detections": np.int64(0), "priority": np.int8(-1),
               "deadline_s": np.float64(5), "mask_format": np.array(["none"])[0]}  # fmt: skip
    assert shared_daemon.client.segment(pixels(0), **options).detections == []
    assert with_client(shared_daemon.endpoint, lambda client: client.segment(pixels(0), **options)).detections == []
    with Client(shared_daemon.endpoint, timeout_s=np.float32(5), retries=np.int64(2)) as client:
        assert answered(client.segment(pixels(0))) == checksum(pixels(0))


@pytest.mark.parametrize(
    "options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"timeout_s": "x"}, {"retries": 1.5}]
)
def test_a_client_that_cannot_be_is_refused_where_it_is_made(options: dict[str, Any]) -> None:
    for make in (Client, AsyncClient):
        with pytest.raises((ValueError, TypeError)):
            make("ipc:///x", **options)


@pytest.mark.parametrize("view", [lambda data: memoryview(data)[::2], lambda data: memoryview(data[::2]).cast("b")])
def test_views_of_bytes_arrive_as_they_look(shared_daemon: Any, view: Any) -> None:
    data = bytearray(encoded(pixels(1, 20, 30), "PNG"))
    spread = bytearray(2 * len(data))
    spread[::2] = data
    assert answered(shared_daemon.client.segment(view(spread))) == checksum(pixels(1, 20, 30))


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


LARGE = np.zeros((1000, 1500, 3), np.uint8)


@pytest.mark.parametrize("transport", ["auto", "socket", "shared"])
def test_an_image_over_the_limit_fails_alone_and_at_once(daemon: Any, transport: Any) -> None:
    """Its frame would be twice what ZeroMQ reads, and cost the connection."""
    running = daemon(devices=["cpu:0"], limits={"max_image_bytes": 1 << 20})
    reason = r"too-large: 4500000 bytes: an image has at most 1048576 \(limits.max_image_bytes\)"

    async def work(client: AsyncClient) -> None:
        large = asyncio.create_task(client.segment(LARGE))
        assert answered(await asyncio.wait_for(client.segment(pixels(1)), 5)) == checksum(pixels(1))
        with pytest.raises(JobFailed, match=reason):
            await asyncio.wait_for(large, 5)

    with_client(running.endpoint, work)
    client = running.connect(transport=transport)
    found = list(client.map([pixels(1), LARGE, pixels(2), LARGE, pixels(3)], on_error="return"))
    assert [str(each).partition(":")[0] for each in found if isinstance(each, JobFailed)] == ["too-large"] * 2
    assert [answered(found[place]) for place in (0, 2, 4)] == [checksum(pixels(number)) for number in (1, 2, 3)]
    assert "gone" not in running.log


def test_the_limits_are_asked_again_of_a_daemon_that_was_restarted(daemon: Any) -> None:
    running = daemon(devices=["cpu:0"], limits={"max_image_bytes": 1 << 20})
    client = running.client
    with pytest.raises(JobFailed, match="too-large"):
        client.segment(LARGE)
    running.kill()
    running.rewrite(limits={"max_image_bytes": 8 << 20})
    running.start()
    running.wait_ready()
    assert client.segment(LARGE).width == 1500


def test_a_daemon_that_knows_no_limits_gets_the_image(peer: Peer) -> None:
    with Client(peer.endpoint, timeout_s=10, transport="socket") as client:
        result = in_thread(lambda: client.segment(LARGE))
        assert peer.receive() == protocol.GetLimits()
        peer.refuse("", Code.BAD_REQUEST)
        peer.finish(peer.receive().job)
        assert result().device == "npu:0"


# -- whose a client is ------------------------------------------------------------------------------------------------


def test_after_a_fork_the_child_is_told_and_the_parent_is_not_harmed(shared_daemon: Any) -> None:
    client = shared_daemon.connect()
    large = pixels(1, 200, 300)
    before = answered(client.segment(large))
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        said = []
        for call in (lambda: client.segment(large), client.stats, client.close, client.close):
            try:
                said.append(str(call()))
            except BaseException as error:
                said.append(repr(error))
        os.write(writing, "\n".join(said).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read().split("\n")
    os.waitpid(pid, 0)
    assert [f"belongs to process {os.getpid()}" in each for each in said] == [True, True, False, False]
    assert said[2:] == ["None", "None"]
    for _ in range(3):
        assert answered(client.segment(large)) == before


def test_a_closed_client_says_so_and_is_closed_again_quietly(shared_daemon: Any) -> None:
    client = Client(shared_daemon.endpoint)
    results = client.map([pixels(0)] * 5)
    next(results)
    client.close()
    client.close()
    for call in (lambda: client.segment(pixels(0)), client.stats, lambda: next(results)):
        with pytest.raises(RuntimeError, match="this client is closed"):
            call()


def test_another_thread_is_told(slow_daemon: Any, wait_until: Any) -> None:
    client = slow_daemon.connect()
    result = in_thread(lambda: client.segment(pixels(1)))
    wait_until(lambda: client._exchange.jobs)
    for call in (lambda: client.segment(pixels(2)), client.stats, client.close, lambda: list(client.map([pixels(2)]))):
        with pytest.raises(RuntimeError, match="used by another thread"):
            call()
    assert answered(result()) == checksum(pixels(1))
    assert answered(client.segment(pixels(2))) == checksum(pixels(2))  # one after the other they may


def test_an_async_client_is_of_one_loop_and_of_its_block(shared_daemon: Any) -> None:
    client = AsyncClient(shared_daemon.endpoint)

    async def use() -> None:
        for call in (client.segment(pixels(0)), client.stats(), client.fetch("x" * 40)):
            with pytest.raises(RuntimeError, match=reason):
                await asyncio.wait_for(call, 5)
        with pytest.raises(RuntimeError, match=reason):
            [each async for each in client.map([pixels(0)])]

    async def enter_and_use() -> None:
        nonlocal reason
        async with client:
            with pytest.raises(RuntimeError, match="in use already"):
                await client.__aenter__()
            reason = "another event loop"
            await asyncio.to_thread(asyncio.run, use())
            assert answered(await client.segment(pixels(0))) == checksum(pixels(0))
        reason = "closed"
        await use()

    reason = "not connected"
    asyncio.run(use())
    asyncio.run(enter_and_use())


def test_a_forgotten_client_gives_back_what_it_held(shared_daemon: Any) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    def forget() -> None:
        assert Client(shared_daemon.endpoint).segment(pixels(1, 200, 300)).width == 300

    forget()  # what pyzmq keeps for all
    gc.collect()
    before = held()
    for _ in range(5):
        forget()
    gc.collect()
    assert held() == before



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
