"""The benchmark's generator against daemons, and against peers that answer what a daemon never would."""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgpack
import numpy as np
import pytest
import zmq
from PIL import Image

from blendmaskd import protocol
from blendmaskd.programs.errors import UsageError
from blendmaskd.protocol import FROM_CLIENT, Code, Failed, Options, Result, Submit, ToClient
from blendmaskd_workers.benchmark import pictures
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.load import FAILED_PAUSE_S, ClosedLoop, OpenLoop
from blendmaskd_workers.benchmark.load_socket import Sending
from blendmaskd_workers.benchmark.pictures import Picture

RAW = pictures.synthetic((32, 48), "raw")
SOCKET = Sending("socket", Options(), deadline_s=10.0, places=1)

Answer = Callable[[Submit], tuple[ToClient, list[bytes]] | None]


class MakePeer(Protocol):
    def __call__(self, answer: Answer) -> str: ...


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[MakePeer]:
    """Serves an endpoint as a function says; it answers nothing where that returns None."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def serve(endpoint: str, answer: Answer, ready: threading.Event) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
            socket.set(zmq.LINGER, 0)
            socket.bind(endpoint)
            ready.set()
            while not stop.is_set():
                if socket.poll(20):
                    client, *frames = socket.recv_multipart()
                    message, _ = protocol.decode(frames, FROM_CLIENT)
                    assert isinstance(message, Submit)
                    told = answer(message)
                    if told is not None:
                        socket.send_multipart([client, *protocol.encode(*told)])

    def make(answer: Answer) -> str:
        endpoint, ready = f"ipc://{tmp_path}/peer{len(threads)}", threading.Event()
        threads.append(threading.Thread(target=serve, args=(endpoint, answer, ready)))
        threads[-1].start()
        assert ready.wait(10)
        return endpoint

    yield make
    stop.set()
    for thread in threads:
        thread.join(10)


def result(message: Submit, checksum: int) -> tuple[ToClient, list[bytes]]:
    answer = Result(job=message.job, width=48, height=32, device="cpu:0", timings={})
    return answer, [msgpack.packb([{"checksum": checksum}])]


def load_closed(generator: Generator, clients: int, jobs: int) -> None:
    """Until so many jobs have ended, and those that are then in flight."""
    generator.begin(ClosedLoop(clients, time.monotonic()))
    deadline = time.monotonic() + 20
    while len(generator.samples) < jobs:
        assert time.monotonic() < deadline
        generator.run(0.02)
    generator.drain()


@pytest.mark.parametrize("transport", ["socket", "shared"])
@pytest.mark.parametrize("encoding", ["raw", "jpeg", "png"])
def test_a_daemon_answers_each_image_with_its_checksum(shared_daemon: Any, transport: Any, encoding: Any) -> None:
    sent = [pictures.synthetic(size, encoding) for size in ((64, 96), (96, 64))]
    sending = Sending(transport, Options(mask_format="none"), deadline_s=10.0, places=1)
    shared_daemon.wait_ready()
    with Generator(shared_daemon.endpoint, sent, 2, sending) as generator:
        load_closed(generator, 2, jobs=6)
    assert generator.by_shared_memory is (transport == "shared")
    assert not [sample for sample in generator.samples if sample.code or sample.wrong]
    assert generator.checked == len(generator.samples)


@pytest.mark.slow
def test_shared_memory_with_all_places_taken_holds_jobs_back_and_loses_none(shared_daemon: Any) -> None:
    shared_daemon.wait_ready()
    sending = Sending("shared", Options(), deadline_s=10.0, places=2)
    with Generator(shared_daemon.endpoint, [RAW], 1, sending) as generator:
        generator.begin(OpenLoop(2000.0, 1, time.monotonic(), seed=0))
        generator.run(0.1)
        generator.drain()
    assert len(generator.samples) > 100
    assert not [sample for sample in generator.samples if sample.code or sample.wrong]
    assert max(sample.answered - sample.intended for sample in generator.samples) > 0.1  # what was held has waited


def test_shared_memory_that_cannot_be_had_is_said(tmp_path: Path) -> None:
    sending = Sending("shared", Options(), deadline_s=0.1, places=1)
    with pytest.raises(UsageError, match="needs the daemon on this host"), Generator(
        "tcp://127.0.0.1:9", [RAW], 1, sending
    ):
        pass
    with pytest.raises(UsageError, match="--transport shared"), Generator(f"ipc://{tmp_path}/none", [RAW], 1, sending):
        pass


def test_stats_come_while_the_load_goes_on(shared_daemon: Any) -> None:
    shared_daemon.wait_ready()
    with Generator(shared_daemon.endpoint, [RAW], 2, SOCKET) as generator:
        generator.begin(ClosedLoop(2, time.monotonic()))
        generator.run(0.05)
        assert {device["state"] for device in generator.stats()["devices"]} == {"ready"}
        generator.run(0.05)
        generator.drain()
    assert not [sample for sample in generator.samples if sample.code]


def test_another_images_answer_is_wrong(peer: MakePeer) -> None:
    endpoint = peer(lambda message: result(message, RAW.checksum + (int(message.job) % 3 == 0)))
    with Generator(endpoint, [RAW], 1, SOCKET) as generator:
        load_closed(generator, 1, jobs=4)
    wrong = [sample.wrong for sample in generator.samples]
    assert wrong == [number % 3 == 0 for number in range(1, len(wrong) + 1)]


def test_the_answer_to_one_image_is_wrong_for_another(peer: MakePeer) -> None:
    other = Picture(RAW.image, RAW.payload, RAW.checksum + 1)
    endpoint = peer(lambda message: result(message, RAW.checksum))
    with Generator(endpoint, [RAW, other], 1, SOCKET) as generator:
        load_closed(generator, 1, jobs=4)
    wrong = [sample.wrong for sample in generator.samples]
    assert wrong == [number % 2 == 1 for number in range(1, len(wrong) + 1)]  # picture 1 first


def test_a_failure_is_a_failure(peer: MakePeer) -> None:
    endpoint = peer(lambda message: (Failed(job=message.job, code=Code.BUSY, reason="full", retry_after_s=0.0), []))
    with Generator(endpoint, [RAW], 1, SOCKET) as generator:
        begun = time.monotonic()
        load_closed(generator, 1, jobs=3)
    assert {sample.code for sample in generator.samples} == {"busy"}
    assert time.monotonic() - begun >= 2 * FAILED_PAUSE_S  # and does not become a flood of jobs


def test_what_is_never_answered_has_failed(peer: MakePeer) -> None:
    sending = Sending("socket", Options(), deadline_s=0.1, places=1)
    with Generator(peer(lambda _: None), [RAW], 2, sending) as generator:
        generator.begin(ClosedLoop(2, time.monotonic()))
        generator.run(0.05)
        generator.drain()
    assert [sample.code for sample in generator.samples] == ["no-answer"] * 2


def test_an_open_loop_counts_the_wait_behind_a_server_that_stands_still(peer: MakePeer) -> None:
    def slow_once(message: Submit) -> tuple[ToClient, list[bytes]]:
        if int(message.job) == 1:
            time.sleep(0.3)
        return result(message, RAW.checksum)

    with Generator(peer(slow_once), [RAW], 1, SOCKET) as generator:
        generator.begin(OpenLoop(200.0, 1, time.monotonic(), seed=0))
        generator.run(0.3)
        generator.drain()
    waits = sorted(sample.answered - sample.intended for sample in generator.samples)
    assert waits[-1] > 0.29
    assert waits[len(waits) // 2] > 0.1  # not only the job that hit the pause: all that came during it


def test_a_picture_is_what_the_worker_decodes(tmp_path: Path) -> None:
    for encoding in ("jpeg", "png"):
        made = pictures.synthetic((40, 60), encoding)  # type: ignore[arg-type]
        assert made.payload is not None
        (tmp_path / f"picture.{encoding}").write_bytes(made.payload)
        loaded = pictures.from_file(tmp_path / f"picture.{encoding}", "path")
        assert (loaded.checksum, loaded.payload) == (made.checksum, None)
        assert loaded.pixels().shape == (40, 60, 3)
        as_raw = pictures.from_file(tmp_path / f"picture.{encoding}", "raw")
        assert as_raw.checksum == made.checksum
        assert np.array_equal(as_raw.pixels(), made.pixels())


def test_a_synthetic_jpeg_is_as_large_as_a_photographs() -> None:
    made = pictures.synthetic((800, 800), "jpeg")
    assert made.payload is not None
    assert 60_000 < len(made.payload) < 400_000
    assert Image.fromarray(made.pixels()).size == (800, 800)


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        pictures.from_file(tmp_path / "notes.txt", "path")
