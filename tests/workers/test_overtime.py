"""No image keeps a worker for ever: what takes too much of a CPU is ended with its worker, and then given up."""
from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from blendmaskd.client.blocking import JobFailed
from blendmaskd.protocol import Code
from blendmaskd.settings import Limits
from blendmaskd_workers.loop import QUICK_S
from blendmaskd_workers.overtime import Overtime
from fuzz.bombs import scans

WIDE = Limits(max_image_pixels=160_000_000)


def test_what_counts_is_the_time_of_the_images_own_thread() -> None:
    overtime = Overtime()
    begun, end = threading.Event(), threading.Event()

    def idle() -> None:
        overtime.begin(1)
        begun.set()
        end.wait(10)
        overtime.end(1)

    thread = threading.Thread(target=idle)
    thread.start()
    begun.wait(10)
    overtime.begin(2)
    while not overtime.over(0.05):
        pass
    assert overtime.over(0.05) == [2]
    overtime.end(2)
    assert overtime.over(-1.0) == [1], "all that are at an image"
    end.set()
    thread.join()
    assert overtime.over(-1.0) == []


@pytest.fixture
def costly() -> bytes:
    """Some seconds of libjpeg's, in 50 KB."""
    return scans(4000, 400)


def test_it_makes_no_difference_that_the_main_thread_is_at_it(daemon, costly) -> None:
    limits = {"max_image_pixels": WIDE.max_image_pixels, "max_decode_s": 0.3}
    server = daemon(devices=["cpu:0"], limits=limits, timed={"latency_ms": {1: 0}, "blend_ms": {1: 0}}, max_attempts=1)
    while server.client.segment(np.zeros((8, 8, 3), np.uint8)).timings["total"] > QUICK_S:
        pass  # then the next lone image is the main thread's
    with pytest.raises(JobFailed, match=r"took too much of a CPU \(limits\.max_decode_s\)") as failed:
        server.client.segment(costly)
    assert failed.value.code is Code.WORKER_LOST
    server.wait_ready()


def test_an_image_that_takes_too_long_costs_two_workers_and_its_neighbours_nothing(daemon, costly, wait_until) -> None:
    limits = {"max_image_pixels": WIDE.max_image_pixels, "max_decode_s": 0.3}
    server = daemon(devices=["cpu:0"], limits=limits, restarts={"first_delay_s": 0.05})
    enough = threading.Event()
    outcomes: list[object] = []

    def neighbour() -> None:
        pictures = itertools.repeat(np.zeros((8, 8, 3), np.uint8))
        for answer in server.connect().map(pictures, window=4, on_error="return"):
            outcomes.append(answer)
            if enough.is_set():
                return

    thread = threading.Thread(target=neighbour)
    thread.start()
    try:
        with pytest.raises(JobFailed, match=r"took too much of a CPU \(limits\.max_decode_s\); this image") as failed:
            server.client.segment(costly)
        assert failed.value.code is Code.WORKER_LOST
        with pytest.raises(JobFailed, match="this image was given up"):
            server.client.segment(costly)
        wait_until(lambda: server.devices()["cpu:0"]["generation"] == 3)
        wait_until(lambda: server.states() == {"cpu:0": "ready"})
    finally:
        enough.set()
        thread.join()
    assert outcomes
    assert not [each for each in outcomes if isinstance(each, JobFailed)]
