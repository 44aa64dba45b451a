"""The worker's loop: how batches form, what busy means, and what a real worker does with late and unwanted leases."""
from __future__ import annotations

import io
import math
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zmq
from PIL import Image as PillowImage

from blendmaskd import protocol, settings
from blendmaskd.client.blocking import JobFailed, ServerPath
from blendmaskd.protocol import IDLE, TO_CLIENT, Cancel, Code, Image, Lease, Options, Submit
from blendmaskd_workers.batching import Batching
from blendmaskd_workers.engines import Times
from blendmaskd_workers.process import host_threads
from blendmaskd_workers.ready import Item, ReadyQueue
from blendmaskd_workers.reports import Busy


def item(name: int, size: tuple[int, int] = (64, 64), ready_at: float = 0.0, **fields: bool) -> Item:
    lease = Lease(lease=name, image=Image(kind="encoded"), options=Options(), deadline=0.0, **fields)
    return Item(lease, (), 0.0, prepared=SimpleNamespace(padded_size=size), ready_at=ready_at)


def gather(batch: int, max_wait_s: float = 0.0, lonely: bool = False) -> ReadyQueue:
    return ReadyQueue(Batching(batch), max_wait_s, lambda: lonely)


def take(prepared: ReadyQueue) -> list[int]:
    return [each.lease.lease for each in prepared.take()]


def test_a_batch_is_the_oldest_image_and_those_of_its_size() -> None:
    prepared = gather(2)
    for each in [item(1), item(2, (64, 96)), item(3), item(4), item(5, (64, 96))]:
        prepared.put(each)
    assert [take(prepared) for _ in range(3)] == [[1, 3], [2, 5], [4]]


def test_a_suspect_is_never_batched() -> None:
    prepared = gather(3)
    for each in [item(1), item(2, alone=True), item(3), item(4)]:
        prepared.put(each)
    assert [take(prepared) for _ in range(2)] == [[1, 3, 4], [2]]


def test_what_goes_ahead_is_run_next_and_in_company_of_its_kind_only() -> None:
    prepared = gather(2, 30.0)
    for each in [item(1), item(2), item(3, ahead=True), item(4), item(5, ahead=True), item(6, ahead=True)]:
        prepared.put(each)
    assert [take(prepared) for _ in range(3)] == [[3, 5], [6], [1, 2]]


def test_an_incomplete_batch_waits_for_a_partner_but_not_longer_than_allowed() -> None:
    prepared = gather(2, 30.0)
    prepared.put(item(1, ready_at=time.monotonic()))
    taken: list[list[int]] = []
    taker = threading.Thread(target=lambda: taken.append(take(prepared)))
    taker.start()
    prepared.put(item(2, ready_at=time.monotonic()))
    taker.join(10)
    assert taken == [[1, 2]]

    hurried = gather(2, 0.05)
    start = time.monotonic()
    hurried.put(item(1, ready_at=start))
    assert take(hurried) == [1]
    assert time.monotonic() - start >= 0.05


def test_with_one_lonely_client_nobody_waits_for_a_partner() -> None:
    prepared = gather(2, 30.0, lonely=True)
    prepared.put(item(1, ready_at=time.monotonic()))
    assert take(prepared) == [1]


def test_a_lone_image_that_is_not_prepared_yet_is_taken_alone() -> None:
    prepared = gather(2, 30.0)
    unprepared = item(1)
    unprepared.prepared = None
    for each in [unprepared, item(2), item(3)]:
        prepared.put(each)
    assert [take(prepared) for _ in range(2)] == [[1], [2, 3]]


def test_busy_counts_the_run_that_is_under_way_and_nothing_twice() -> None:
    busy = Busy()
    start = time.monotonic()
    with busy:
        middle = time.monotonic()
        first, _ = busy.take(middle)
    end = time.monotonic()
    second, _ = busy.take(end)
    assert 0 <= first <= middle - start
    assert first + second <= end - start
    assert busy.take(time.monotonic()) == (0.0, dict.fromkeys(IDLE, 0.0))


def test_busy_takes_a_devices_own_word() -> None:
    busy = Busy()
    for _ in range(2):
        busy.add(Times(0.125, 0.25, {"input": 0.5, "launches": -0.125, "selection": 0.0}))
    assert busy.take(time.monotonic()) == (0.5, {"input": 1.0, "launches": 0.0, "selection": 0.0})
    assert busy.take(time.monotonic())[0] == 0.0


@pytest.fixture
def picture() -> np.ndarray:
    return np.zeros((8, 8, 3), np.uint8)


def test_a_deadline_is_looked_at_right_before_the_device(daemon, picture) -> None:
    server = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 300}})
    answers = list(server.client.map([picture] * 4, on_error="return", deadline_s=0.45))
    outcomes = [each.code if isinstance(each, JobFailed) else "answered" for each in answers]
    assert outcomes[0] == "answered"
    assert set(outcomes[1:]) == {Code.TIMEOUT}
    assert server.client.segment(picture).detections
    assert server.devices()["cpu:0"]["images"] <= 3, "an image was run for nobody"


def test_a_revoked_lease_is_not_run(daemon, wait_until, picture) -> None:
    server = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 300}})
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(server.endpoint)
        for name in ("runs", "runs too", "is cancelled"):  # the second may be launched during the first
            image = Image(kind="raw", shape=picture.shape)
            socket.send_multipart(protocol.encode(Submit(job=name, image=image), [picture.tobytes()]))
            if name == "is cancelled":
                socket.send_multipart(protocol.encode(Cancel(job=name)))
        answers = []
        while len(answers) < 3:
            assert socket.poll(10_000)
            answers.append(protocol.decode(socket.recv_multipart(), TO_CLIENT)[0])
    assert [answer.job for answer in answers] == ["is cancelled", "runs", "runs too"]
    assert answers[0].code is Code.CANCELLED
    seq = server.client.stats()["seq"]
    wait_until(lambda: server.client.stats()["seq"] >= seq + 2)
    assert server.devices()["cpu:0"]["images"] == 2
    assert server.devices()["cpu:0"]["busy_seconds"] < 0.8


def test_a_path_below_an_allowed_root_is_read_by_the_worker_and_no_other(daemon, tmp_path) -> None:
    (tmp_path / "allowed").mkdir()
    photograph = Path(__file__).parents[1] / "golden" / "images" / "chelsea.png"
    inside = shutil.copy(photograph, tmp_path / "allowed")
    outside = shutil.copy(photograph, tmp_path)
    (tmp_path / "allowed" / "link.png").symlink_to(outside)
    server = daemon(paths={"roots": [str(tmp_path / "allowed")]})
    answer = server.client.segment(ServerPath(str(inside)))
    assert (answer.width, answer.height) == (451, 300)
    for path in (outside, str(tmp_path / "allowed" / "link.png"), "/etc/passwd"):
        with pytest.raises(JobFailed, match="bad-request: the path is not below a root"):
            server.client.segment(ServerPath(str(path)))


@pytest.mark.parametrize(("setting", "cpus", "quota", "threads"), [
    ("auto", 24, math.inf, 24), ("auto", 1, math.inf, 2), ("auto", 24, 12.5, 6), ("auto", 24, 1.0, 2),
    ("auto", 192, math.inf, 64), ("1", 24, math.inf, 1), ("40", 24, 12.0, 40),
], ids=["a mask", "one CPU", "a quota", "a small quota", "a large host", "one", "a number"])
def test_as_many_host_threads_as_the_slot_has_cpus(setting: str, cpus: int, quota: float, threads: int) -> None:
    chosen = settings.load(None, None, ["devices=[cpu:0, cpu:1]", f"runtime.host_threads={setting}"])
    assert host_threads(chosen, cpus, quota) == threads


def test_where_images_cost_more_than_the_device_takes_more_of_them_are_leased(daemon, wait_until) -> None:
    server = daemon(devices=["cpu:0"], batch=1, timed={"latency_ms": {1: 1}}, runtime={"host_threads": 5})
    large = np.zeros((1500, 1500, 3), np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(large).save(file, "JPEG")
    enough = threading.Event()

    def load() -> None:
        for _ in server.connect().map(iter(lambda: enough.is_set() or file.getvalue(), True), window=16):
            pass

    thread = threading.Thread(target=load)
    thread.start()
    try:
        wait_until(lambda: server.client.stats()["leased"] >= 3 + 5)
    finally:
        enough.set()
        thread.join()
