"""The worker's loop behind a channel of its own process: the timed engine, no Ray."""
from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import msgpack
import numpy as np
import pytest

from blendmaskd import settings
from blendmaskd.assignment import Assignment
from blendmaskd.protocol import Code, Failed, Image, Options, Report
from blendmaskd.wanted import Wanted
from blendmaskd_workers import engines
from blendmaskd_workers.cluster.channel import Answer, LocalChannel, Pending, WorkerLost
from blendmaskd_workers.engines import timed
from blendmaskd_workers.loop import Loop

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
RAW = Image(kind="raw", shape=PICTURE.shape)


class Worker:
    def __init__(self, **changed: Any) -> None:
        tree = {"devices": ["cpu:0"], "engine": "timed", "timed": {"latency_ms": {1: 5}}, "batch": 1, **changed}
        loaded = settings.from_tree(tree)
        self.reports: list[Report] = []
        self.engine = engines.make(loaded, "cpu")
        self.channel = LocalChannel("here", "cpu:0", self.reports.append)
        wanted = Wanted(cpus="0", threads=None, task_queue=None, preload=None, env={})
        assignment = Assignment("cpu:0", "cpu", 0, "", "", os.getpid(), loaded, wanted)
        self._loop = Loop(assignment, self.engine, engines.batching(loaded), self.channel)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.channel.close(f"ended with {self._loop.run()}")

    def end(self) -> None:
        self.channel.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()


@pytest.fixture
def worker() -> Iterator[Worker]:
    running = Worker()
    yield running
    running.end()


def test_every_lease_ends_with_its_own_images_answer(worker) -> None:
    pictures = [PICTURE + np.uint8(number) for number in range(20)]
    futures = [worker.channel.submit(RAW, picture.tobytes(), Options(), 30) for picture in pictures]
    for picture, future in zip(pictures, futures):
        answer = future.result(20)
        assert isinstance(answer, Answer)
        assert (answer.width, answer.height, answer.node, answer.device) == (6, 4, "here", "cpu:0")
        [detection] = msgpack.unpackb(answer.detections)
        assert detection["checksum"] == timed.checksum(picture)
    assert worker.channel.held() == 0
    assert worker.channel.stalled_s() == 0


def test_a_bad_image_is_a_failure_and_no_exception(worker) -> None:
    found = worker.channel.submit(Image(kind="encoded"), b"no image", Options(), 30).result(20)
    assert isinstance(found, Failed)
    assert found.code == Code.BAD_IMAGE


def test_a_deadline_passes_and_a_cancelled_image_is_not_run(wait_until) -> None:
    worker = Worker(timed={"latency_ms": {1: 300}})
    running = worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30)
    next_one = worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30)  # may begin while that runs
    late = worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 0.05)
    unwanted = worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30)
    assert unwanted.cancel()
    assert isinstance(running.result(20), Answer)
    assert isinstance(next_one.result(20), Answer)
    assert late.result(20) == Failed(job="", code=Code.TIMEOUT, reason="the deadline passed before it was done")
    with pytest.raises(CancelledError):
        unwanted.result(20)
    wait_until(lambda: worker.channel.held() == 0)
    wait_until(lambda: sum(report.images for report in worker.reports) == 2)
    worker.end()


def test_what_a_loop_that_has_ended_held_is_lost() -> None:
    worker = Worker(timed={"latency_ms": {1: 2000}})
    futures = [worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30) for _ in range(3)]
    worker.end()
    lost = [future for future in futures if isinstance(future.exception(10), WorkerLost)]
    assert len(lost) >= 2  # the first may have come to its end
    with pytest.raises(WorkerLost, match="ended with 0"):
        worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30)
    assert worker.channel.closed == "ended with 0"


def test_a_worker_whose_device_does_not_come_back_is_seen(wait_until) -> None:
    worker = Worker(timed={"latency_ms": {1: 1000}})
    future = worker.channel.submit(RAW, PICTURE.tobytes(), Options(), 30)
    since = time.monotonic()
    wait_until(lambda: worker.channel.stalled_s() > 0.2)
    assert worker.channel.stalled_s() <= time.monotonic() - since + 0.5
    future.result(20)
    worker.end()


def given(channel: LocalChannel) -> list[Pending]:
    """The leases that the loop has."""
    return [pending for pending in list(channel._pending.values()) if pending.since is not None]


def test_an_image_that_is_to_be_alone_is_given_to_an_empty_loop_and_no_other_until_it_has_ended(wait_until) -> None:
    worker = Worker(timed={"latency_ms": {1: 50}}, batch=1)
    order: list[str] = []

    def submit(name: str, *, alone: bool = False) -> Future:
        return worker.channel.submit(
            RAW, PICTURE.tobytes(), Options(), 30, alone=alone,
            on_start=lambda: order.append(f"{name} of {len(given(worker.channel))}"),
        )  # fmt: skip

    first, suspect, unwanted, last = submit("1"), submit("2", alone=True), submit("3", alone=True), submit("4")
    assert order == ["1 of 1"]
    assert unwanted.cancel()
    assert worker.channel.held() == 3
    for future in (first, suspect, last):
        assert isinstance(future.result(20), Answer)
    assert order == ["1 of 1", "2 of 1", "4 of 1"]
    assert worker.channel.held() == 0
    worker.end()
