"""Faults on real processes under load: every accepted job gets exactly one answer, and service goes on."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from daemon import protocol
from daemon.client import Client, JobFailed
from daemon.protocol import TO_CLIENT, Code, Failed, Image, Result, Submit

ROOT = Path(__file__).resolve().parents[2]
FAULTY = {"worker_env": {"PYTHONPATH": f"{Path(__file__).parent / 'faulty_engine'}:{ROOT}"}}
CRASHES_DECODING, KILLS, RAISES, HANGS = 11, 12, 13, 14  # widths that the faulty engine knows
IN_FLIGHT = 8


def picture(width: int = 64, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (48, width, 3), np.uint8)


class Load(threading.Thread):
    """A raw client that keeps jobs in flight, each of another image, and keeps account of every answer."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.stop = threading.Event()
        self.answers: Counter[str] = Counter()
        self.failures: list[Failed] = []
        self.wrong: list[str] = []
        self.sums: dict[str, int] = {}
        self.unanswered: set[str] = set()

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as self.socket:
            self.socket.linger = 0
            self.socket.connect(self.endpoint)
            while not self.stop.is_set() or self.unanswered:
                while len(self.unanswered) < IN_FLIGHT and not self.stop.is_set():
                    self.submit()
                if not self.socket.poll(20_000):
                    return  # what is unanswered stays so, and fails the test
                self.receive()
            while self.socket.poll(100):  # a duplicate would come right behind
                self.receive()

    def submit(self) -> None:
        name = str(len(self.sums))
        pixels = picture(seed=len(self.sums))
        self.sums[name] = zlib.crc32(pixels.data)
        self.unanswered.add(name)
        message = Submit(job=name, image=Image(kind="raw", shape=pixels.shape))
        self.socket.send_multipart(protocol.encode(message, [pixels.tobytes()]))

    def receive(self) -> None:
        message: protocol.ToClient
        message, payload = protocol.decode(self.socket.recv_multipart(), TO_CLIENT)
        assert isinstance(message, Result | Failed)
        self.answers[message.job] += 1
        self.unanswered.discard(message.job)
        if isinstance(message, Failed):
            self.failures.append(message)
        elif msgpack.unpackb(payload[0])[0]["checksum"] != self.sums[message.job]:
            self.wrong.append(message.job)

    def end(self) -> None:
        """Stop submitting; wait for what is owed; check it."""
        self.stop.set()
        self.join(60)
        assert not self.is_alive()
        assert not self.unanswered
        assert not self.wrong
        assert set(self.answers.values()) == {1}
        assert self.answers.keys() == self.sums.keys()


@pytest.fixture
def loaded():
    """Starts a load on a daemon; stops it at the end in any case."""
    loads: list[Load] = []

    def start(daemon: Any) -> Load:
        loads.append(Load(daemon.endpoint))
        loads[-1].start()
        return loads[-1]

    yield start
    for load in loads:
        load.stop.set()
        load.join(60)


def test_kill_9_of_either_worker_under_load(daemon, loaded, wait_until) -> None:
    server = daemon(max_attempts=3)
    load = loaded(server)
    for device in ("cpu:0", "cpu:1"):
        before = server.pids()
        answered = sum(load.answers.values())
        wait_until(lambda answered=answered: sum(load.answers.values()) > answered + 50)
        os.kill(before[device], signal.SIGKILL)
        wait_until(lambda before=before: server.pids() != before and set(server.states().values()) == {"ready"})
        images = server.devices()[device]["images"]
        wait_until(lambda device=device, images=images: server.devices()[device]["images"] > images + 20)
    load.end()
    assert load.failures == []
    assert {name: d["restarts"] for name, d in server.devices().items()} == {"cpu:0": 1, "cpu:1": 1}


def test_kill_9_of_the_daemon_leaves_no_worker(daemon, wait_until) -> None:
    server = daemon()
    assert len(server.processes()) == 3
    server.kill()
    wait_until(lambda: server.processes() == [])


@pytest.mark.parametrize("width", [CRASHES_DECODING, KILLS], ids=["in the decoder", "on the device"])
def test_a_poison_image_fails_alone_and_by_name(daemon, loaded, width) -> None:
    server = daemon(**FAULTY)
    load = loaded(server)
    with Client(server.endpoint, retries=0, timeout_s=30) as client, pytest.raises(JobFailed) as failed:
        client.segment(picture(width))
    load.end()
    assert failed.value.code is Code.WORKER_LOST
    assert "killed by SIG" in failed.value.reason
    assert load.failures == []
    server.wait_ready()


def test_an_engine_that_raises_fails_that_image_only(daemon, loaded, wait_until) -> None:
    server = daemon(**FAULTY, batch=2, timed={"latency_ms": {1: 5, 2: 8}})
    pids = server.pids()
    load = loaded(server)
    wait_until(lambda: sum(load.answers.values()) > 20)
    with Client(server.endpoint, timeout_s=30) as client, pytest.raises(JobFailed, match="not to the engine's taste"):
        client.segment(picture(RAISES))
    load.end()
    assert load.failures == []
    assert server.pids() == pids


@pytest.mark.parametrize("latency_ms", [5, 0], ids=["on the device's thread", "on the main thread"])
def test_an_engine_that_only_raises_is_started_anew(daemon, wait_until, latency_ms) -> None:
    server = daemon(**FAULTY, devices=["cpu:0"], timed={"latency_ms": {1: latency_ms}})
    pid = server.pids()["cpu:0"]
    for _ in range(3):
        assert server.client.segment(picture()).detections
    for _ in range(3):
        with pytest.raises(JobFailed, match="not to the engine's taste"):
            server.client.segment(picture(RAISES))
    wait_until(lambda: server.pids()["cpu:0"] not in (pid, None))
    server.wait_ready()
    assert server.client.segment(picture()).detections


def test_a_hung_worker_is_aborted_with_its_stacks(daemon, loaded) -> None:
    server = daemon(**FAULTY, restarts={"first_delay_s": 0.05, "stall_s": 1.5, "stop_s": 1})
    load = loaded(server)
    with Client(server.endpoint, retries=0, timeout_s=30) as client, pytest.raises(JobFailed) as failed:
        client.segment(picture(HANGS))
    load.end()
    assert failed.value.code is Code.WORKER_LOST
    assert load.failures == []
    assert "in faulty_segment" in server.log, "no stack dump"


def test_a_stopped_worker_is_silent_then_replaced(daemon, loaded, wait_until) -> None:
    server = daemon(restarts={"first_delay_s": 0.05, "stall_s": 5, "stop_s": 0.5})
    load = loaded(server)
    pids = server.pids()
    os.kill(pids["cpu:1"], signal.SIGSTOP)
    wait_until(lambda: server.states()["cpu:1"] == "silent")
    assert server.get("/readyz")[1].startswith("degraded")
    wait_until(lambda: server.pids()["cpu:1"] not in (pids["cpu:1"], None), 20)
    server.wait_ready()
    load.end()
    assert load.failures == []


def test_sigterm_under_load_answers_what_was_accepted(daemon, loaded, wait_until) -> None:
    server = daemon()
    load = loaded(server)
    wait_until(lambda: sum(load.answers.values()) > 50)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: load.failures, 10)
    load.stop.set()
    assert server.process.wait(20) == 0
    load.end()
    assert {failure.code for failure in load.failures} == {Code.DRAINING}


def test_sighup_under_load_replaces_workers_one_at_a_time(daemon, loaded, wait_until) -> None:
    server = daemon()
    load = loaded(server)
    before = server.pids()
    server.rewrite(timed={"latency_ms": {1: 3}})
    server.process.send_signal(signal.SIGHUP)
    serving = set()

    def replaced() -> bool:
        snapshot = server.client.stats()
        serving.add(snapshot["serving"])
        pids = {device["pid"] for device in snapshot["devices"]}
        return snapshot["serving"] == 2 and pids.isdisjoint(before.values())

    wait_until(replaced, 20)
    load.end()
    assert load.failures == []
    assert 0 not in serving
    assert server.client.segment(picture()).timings["device"] < 0.005


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bacth": 2}, "bacth: unknown key"),
        ({"engine": "native", "model": {"weights": "/nowhere.pth"}}, "/nowhere.pth"),
        ({"runtime": {"preload": "/nowhere.so"}}, "/nowhere.so"),
        ({"endpoints": {"clients": ["ipc:///tmp/other.sock"]}}, "a change needs a restart"),
    ],
    ids=["unknown key", "no weights", "no library", "endpoints"],
)
def test_a_bad_reload_changes_nothing(daemon, wait_until, settings, complaint) -> None:
    server = daemon()
    before = server.pids()
    server.rewrite(**settings)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload refused, nothing changed" in server.log, 30)
    assert complaint in server.log
    assert server.pids() == before
    assert server.client.segment(picture()).detections


def test_a_flood_is_answered_busy_at_once_and_costs_nobody_else(daemon) -> None:
    server = daemon(queue={"max_jobs": 8}, timed={"latency_ms": {1: 50}})
    answers: Counter[str] = Counter()
    pixels = picture().tobytes()
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(server.endpoint)
        for number in range(600):
            message = Submit(job=str(number), image=Image(kind="raw", shape=(48, 64, 3)))
            socket.send_multipart(protocol.encode(message, [pixels]))
        for _ in range(600):
            assert socket.poll(20_000)
            message: protocol.ToClient
            message, _ = protocol.decode(socket.recv_multipart(), TO_CLIENT)
            answers[message.code if isinstance(message, Failed) else "answered"] += 1
            assert not isinstance(message, Failed) or message.retry_after_s
    assert answers.keys() == {Code.BUSY, "answered"}
    assert answers["answered"] >= 12, "two windows and the queue"
    assert server.client.stats()["queue"] == {"jobs": 0, "bytes": 0}


def test_jobs_of_a_client_that_left_are_cancelled(daemon, wait_until) -> None:
    server = daemon(timed={"latency_ms": {1: 100}})
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.connect(server.endpoint)
        for number in range(40):
            message = Submit(job=str(number), image=Image(kind="raw", shape=(48, 64, 3)))
            socket.send_multipart(protocol.encode(message, [picture().tobytes()]))
        wait_until(lambda: server.client.stats()["queue"]["jobs"] > 10)
    wait_until(lambda: server.client.stats()["failures"].get("cancelled", 0) > 20, 5)
    assert server.client.segment(picture()).timings["queue"] < 1.0


def test_a_second_daemon_does_not_take_the_socket_over(daemon) -> None:
    server = daemon()
    second = subprocess.run(
        [sys.executable, "-m", "daemon", "--settings", server.settings_file], cwd=ROOT, capture_output=True, text=True
    )
    assert second.returncode == 78
    assert "another daemon serves" in second.stderr
    assert server.client.segment(picture()).detections


def test_no_worker_can_boot_the_daemon_says_why_and_ends(daemon) -> None:
    server = daemon(wait=False, engine="native", model={"weights": "/nowhere.pth"})
    assert server.process.wait(60) == 1
    assert "/nowhere.pth" in server.log
    assert "no worker can be started" in server.log
