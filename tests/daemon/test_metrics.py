import contextlib
import re
import signal
import socket
import threading
from collections.abc import Iterator
from http import HTTPStatus
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from blendmaskd.client.blocking import Client
from blendmaskd.core.metrics import health, render
from blendmaskd.core.stats import Stats
from blendmaskd.protocol import STAGE_BOUNDS_S, Code, Report

IMAGE = np.zeros((8, 8, 3), np.uint8)
STATUS = re.compile(r"^STATUS=([\d.]+) FPS = (.*), (\d+) waiting, seq (\d+)", re.MULTILINE)


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by name and the one label's value (empty: no label)."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "le"}
            name = f"{sample.name}<={sample.labels['le']}" if "le" in sample.labels else sample.name
            found[name, next(iter(labels.values()), "")] = sample.value
    return found


def example(*states: str, **more: Any) -> dict[str, Any]:
    """A snapshot of devices in these states, npu:0 with 1 image in 1 s, npu:1 with 2, …"""
    stats = Stats(10.0)
    slots = []
    for number, state in enumerate(states):
        report = Report(start=0.0, end=1.0, images=number + 1, busy_s=0.25, memory_bytes=100, device_memory_bytes=7,
                        shapes=[], window=2)  # fmt: skip
        stats.report(f"npu:{number}", report)
        slots.append({"device": f"npu:{number}", "state": state, "restarts": number, "reason": "",
                      "actual": {"model": f"m{number}"}})  # fmt: skip
    stats.answered({"device": 0.03, "total": 99.0})
    totals = {
        "queue": {"jobs": 5, "bytes": 600, "max_jobs": 50, "max_bytes": 6000}, "leased": 4, "draining": False,
        "regions": {"count": 2, "bytes": 8192}, "started": 123.5,
        "answered": 3, "failures": {"busy": 2, "worker-lost": 1},
    }  # fmt: skip
    return stats.snapshot(1.0, 0.0, slots, **{**totals, **more})


def test_a_spool_has_metrics_where_there_is_one() -> None:
    spool = {"jobs": 3, "answers": 4, "bytes": 5000, "max_bytes": 6000, "trouble": "disk full"}
    found = samples(render(example("ready", spool=spool)).decode())
    wanted = {"jobs": 3, "answers": 4, "bytes": 5000, "bytes_limit": 6000, "trouble": 1}
    assert {name: found[f"blendmaskd_spool_{name}", ""] for name in wanted} == wanted
    assert not [name for name, _ in samples(render(example("ready", spool=None)).decode()) if "spool" in name]


# -- pages ------------------------------------------------------------------------------------------------------------


def test_metrics_have_the_documented_names_and_the_snapshot_s_values() -> None:
    found = samples(render(example("ready", "backoff")).decode())
    assert found["blendmaskd_snapshot_seq", ""] == 1
    assert found["blendmaskd_combined_fps", ""] == 3.0
    assert found["blendmaskd_queue_jobs", ""] == 5
    assert found["blendmaskd_queue_bytes", ""] == 600
    assert found["blendmaskd_queue_jobs_limit", ""] == 50
    assert found["blendmaskd_queue_bytes_limit", ""] == 6000
    assert found["blendmaskd_leased_jobs", ""] == 4
    assert found["blendmaskd_regions", ""] == 2
    assert found["blendmaskd_region_bytes", ""] == 8192
    assert found["blendmaskd_draining", ""] == 0
    assert found["blendmaskd_start_time_seconds", ""] == 123.5
    for number in (0, 1):
        device = f"npu:{number}"
        assert found["blendmaskd_device_fps", device] == number + 1
        assert found["blendmaskd_images_total", device] == number + 1
        assert found["blendmaskd_device_busy_share", device] == 0.25
        assert found["blendmaskd_device_busy_seconds_total", device] == 0.25
        assert found["blendmaskd_worker_restarts_total", device] == number
        assert found["blendmaskd_worker_up", device] == 1 - number
        assert found["blendmaskd_worker_memory_bytes", device] == 100
        assert found["blendmaskd_device_memory_bytes", device] == 7
    assert found["blendmaskd_models", ""] == 1, "of ready devices"
    assert samples(render(example("ready", "ready")).decode())["blendmaskd_models", ""] == 2
    assert found["blendmaskd_device_model", "npu:0"] == 1
    outcomes = {label: value for (name, label), value in found.items() if name == "blendmaskd_jobs_total"}
    assert outcomes == {**dict.fromkeys(Code, 0.0), "answered": 3, "busy": 2, "worker-lost": 1}


def test_stages_are_a_histogram() -> None:
    found = samples(render(example("ready")).decode())
    counts = {name: value for (name, label), value in found.items() if label == "device" and "<=" in name}
    wanted = {f"blendmaskd_stage_seconds_bucket<={bound}": float(bound >= 0.03) for bound in STAGE_BOUNDS_S}
    assert counts == {**wanted, "blendmaskd_stage_seconds_bucket<=+Inf": 1.0}
    assert found["blendmaskd_stage_seconds_bucket<=30.0", "total"] == 0
    assert found["blendmaskd_stage_seconds_count", "total"] == 1
    assert found["blendmaskd_stage_seconds_sum", "device"] == pytest.approx(0.03)


OK, DOWN = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE


@pytest.mark.parametrize(
    ("states", "draining", "healthz", "readyz", "text"),
    [
        (["ready", "ready"], False, OK, OK, "ok\n"),
        (["ready", "silent"], False, OK, OK, "degraded\n"),
        (["failed", "ready"], False, OK, OK, "degraded\n"),
        (["starting", "backoff"], False, OK, DOWN, "no device is up yet\n"),
        (["silent", "silent"], False, OK, DOWN, "no device is up yet\n"),
        (["failed", "failed"], False, DOWN, DOWN, "all devices have failed\n"),
        (["ready", "ready"], True, OK, DOWN, "draining\n"),
        (["ready", "stopping"], True, OK, DOWN, "draining\n"),
        (["failed", "ended"], True, OK, DOWN, "draining\n"),
    ],
)
def test_health(states: list[str], draining: bool, healthz: HTTPStatus, readyz: HTTPStatus, text: str) -> None:
    snapshot = example(*states, draining=draining)
    assert health(snapshot, 1.0)[:2] == (healthz, readyz)
    body = health(snapshot, 1.0)[2]
    assert body.startswith(text)
    assert "seq 1" in body


# -- a running daemon -------------------------------------------------------------------------------------------------


Fps = tuple[float, dict[str, float]]  # combined, and each device's


class Notifications:
    """What systemd would be told."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)
        self.received: list[str] = []

    def read(self) -> list[str]:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.received.append(self._socket.recv(65536).decode())
        return self.received

    def fps(self) -> dict[int, Fps]:
        """By sequence number."""
        found = {}
        for match in filter(None, map(STATUS.search, self.read())):
            parts = (part.rsplit(" ", 1) for part in match[2].split(" + "))
            found[int(match[4])] = float(match[1]), {device: float(fps) for device, fps in parts}
        return found

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def notifications(tmp_path: Path) -> Iterator[Notifications]:
    made = Notifications(tmp_path / "n")
    yield made
    made.close()


@contextlib.contextmanager
def load(endpoint: str) -> Iterator[None]:
    """Keep the daemon busy."""
    stop = threading.Event()

    def work() -> None:
        with Client(endpoint) as client:
            for _ in client.map(takewhile(lambda _: not stop.is_set(), repeat(IMAGE)), window=8):
                pass

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_three_fps_places_agree_exactly_at_equal_sequence_numbers(
    notifications: Notifications, daemon: Any, wait_until: Any
) -> None:
    running = daemon(environment={"NOTIFY_SOCKET": notifications.address})
    stats: dict[int, Fps] = {}
    metrics: dict[int, Fps] = {}

    def collect() -> bool:
        snapshot = running.client.stats()
        devices = {device["device"]: device["fps"] for device in snapshot["devices"]}
        stats[snapshot["seq"]] = snapshot["combined_fps"], devices
        found = samples(running.get("/metrics")[1])
        devices = {label: value for (name, label), value in found.items() if name == "blendmaskd_device_fps"}
        metrics[int(found["blendmaskd_snapshot_seq", ""])] = found["blendmaskd_combined_fps", ""], devices
        everywhere = stats.keys() & metrics.keys() & notifications.fps().keys()
        return sum(stats[seq][0] > 0 for seq in everywhere) >= 4

    with load(running.endpoint):
        wait_until(collect, 20)
    for seq in stats.keys() & metrics.keys() & notifications.fps().keys():
        combined, devices = stats[seq]
        assert metrics[seq] == notifications.fps()[seq] == (combined, devices)
        assert combined == round(sum(devices.values()), 2)
        assert set(devices) == {"cpu:0", "cpu:1"}


def test_systemd_is_told_ready_once_and_fed_each_second(
    notifications: Notifications, daemon: Any, wait_until: Any
) -> None:
    running = daemon(environment={"NOTIFY_SOCKET": notifications.address})
    wait_until(lambda: sum("WATCHDOG=1" in text for text in notifications.read()) >= 3)
    assert sum("READY=1" in text.split("\n") for text in notifications.received) == 1
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(10) == 0
    assert [text for text in notifications.read() if text == "STOPPING=1"] == ["STOPPING=1"]
    assert notifications.received[-1] == "STATUS=stopped"


@pytest.mark.slow
def test_health_pages_of_a_daemon_whose_workers_hang_and_die(daemon: Any, wait_until: Any) -> None:
    running = daemon(restarts={"give_up_after": 1, "stop_s": 2})

    def send(device: str, number: signal.Signals) -> None:
        psutil.Process(running.pids()[device]).send_signal(number)

    def state() -> tuple[int, int, str]:
        """Status of /healthz and /readyz, and what both say."""
        healthz, text = running.get("/healthz")
        readyz, _ = running.get("/readyz")
        return healthz, readyz, text.split("\n")[0]

    assert state() == (200, 200, "ok")
    send("cpu:0", signal.SIGSTOP)
    wait_until(lambda: running.states() == {"cpu:0": "silent", "cpu:1": "ready"})
    assert state() == (200, 200, "degraded")
    assert "degraded: cpu:0 silent" in running.get("/readyz")[1]
    assert samples(running.get("/metrics")[1])["blendmaskd_worker_up", "cpu:0"] == 0
    send("cpu:1", signal.SIGSTOP)
    wait_until(lambda: set(running.states().values()) == {"silent"})
    assert state() == (200, 503, "no device is up yet")
    for device in ("cpu:0", "cpu:1"):
        send(device, signal.SIGCONT)
    wait_until(lambda: state() == (200, 200, "ok"))
    send("cpu:0", signal.SIGKILL)
    wait_until(lambda: running.states()["cpu:0"] == "failed")
    assert state() == (200, 200, "degraded")
    send("cpu:1", signal.SIGKILL)
    wait_until(lambda: running.states()["cpu:1"] == "failed")
    assert state() == (503, 503, "all devices have failed")
