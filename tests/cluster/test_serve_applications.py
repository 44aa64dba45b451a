"""Serve applications of their own settings on a real cluster of two nodes: placement, answers, limits, lost nodes."""
from __future__ import annotations

import io
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from blendmaskd.shell import launch
from blendmaskd.wanted import HIDDEN
from blendmaskd_workers.engines import timed
from checkout import ROOT, SOURCES

pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings: Ray's and its libraries' own

PICTURES = sorted((ROOT / "configs" / "demo" / "images").iterdir())
TIMED = {"devices": ["npu:0"], "engine": "timed", "timed": {"latency_ms": {"1": 20}}}
DEMO = {
    "engine": "native",
    "model": {
        "config": str(ROOT / "configs" / "demo" / "demo.yaml"),
        "weights": str(ROOT / "configs" / "demo" / "model_final.pth"),
    },
    "warm_up": [[256, 320]],
    "runtime": {"threads": 1},
}


@pytest.mark.skipif(not launch.resolve_preload("auto").path, reason="needs tcmalloc (Debian: libtcmalloc-minimal4)")
def test_what_the_daemon_applies_at_spawn_reaches_a_replica_and_is_verified_there(deploy) -> None:
    """The allocator is there from the start of the process, the CPU set before torch has made threads."""
    app = deploy({
        **TIMED,
        "runtime": {"task_queue": 1, "threads": 1, "preload": "required", "cpus": {"npu:0": "0"}},
        "worker_env": {"OF_THE_TEST": "here"},
    }, replicas=1)  # fmt: skip
    [device] = app.stats()["devices"]
    assert device["differences"] == []
    actual = device["actual"]
    assert (actual["cpus"], actual["thread_cpus"], actual["task_queue"], actual["threads"]) == ("0", {}, 1, 1)
    assert "tcmalloc" in actual["preload"]
    assert actual["env"]["OF_THE_TEST"] == HIDDEN, "it is there, and shown to nobody"
    assert actual["env"]["ASCEND_RT_VISIBLE_DEVICES"] == "0"


def test_answers_are_the_daemons(deploy, daemon) -> None:
    """The demo model, on CPUs, one thread in both."""
    app = deploy({**DEMO, "devices": ["cpu:0"]}, replicas=2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda path: app.answered(path.read_bytes(), "score_threshold=0.3"), PICTURES))
    assert {answer["node"] for answer in found} == {"a", "b"}
    devices = app.stats()["devices"]
    assert [device["differences"] for device in devices] == [[], []], "torch's threads are where they should be, too"
    assert {device["actual"]["device_name"] for device in devices} == {"cpu"}
    served = daemon(**{**DEMO, "devices": ["cpu:0"]})
    for path, answer in zip(PICTURES, found):
        wanted = served.client.segment(path, score_threshold=0.3)
        assert answer["detections"] == wanted.detections
        assert (answer["width"], answer["height"]) == (wanted.width, wanted.height)
    assert sum(len(answer["detections"]) for answer in found) >= 6


def test_over_the_limit_it_is_busy_at_once(deploy, photograph) -> None:
    app = deploy({**TIMED, "timed": {"latency_ms": {"1": 1500}}, "batch": 1, "queue": {"max_jobs": 2}}, replicas=1)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: app.segment(photograph), range(8)))
    outcomes = [reply.tree.get("code", "answered") for reply in replies]
    assert "answered" in outcomes
    assert "busy" in outcomes
    assert set(outcomes) <= {"answered", "busy"}
    [busy, *_] = [reply for reply in replies if reply.status == 503]
    assert busy.tree["retry_after_s"] == 1.0
    assert busy.headers["retry-after"] == "1"


def test_a_worker_is_killed_under_load_and_no_client_notices(deploy, photograph) -> None:
    """The front gives its images to the other."""
    app = deploy({**TIMED, "timed": {"latency_ms": {"1": 100}}, "batch": 1}, replicas=2, fronts=1)
    victim = app.stats()["devices"][0]["pid"]
    done: list[int] = []

    def segment(number: int) -> int:
        status = app.segment(photograph).status
        done.append(number)
        if len(done) == 10:
            os.kill(victim, signal.SIGKILL)
        return status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(segment, range(40))) == [200] * 40


def test_an_image_that_ends_workers_is_given_up_and_costs_no_more_of_them(deploy, wait_until) -> None:
    folder = ROOT / "tests" / "cluster" / "poison"
    path = f"{folder}:{ROOT / 'tests'}:{SOURCES}"
    app = deploy({**TIMED, "batch": 1, "worker_env": {"PYTHONPATH": path}}, replicas=2, fronts=1)

    def pids() -> set[int]:
        return {device["pid"] for device in app.stats()["devices"]}

    buffer = io.BytesIO()
    Image.fromarray(np.zeros((32, 12, 3), np.uint8)).save(buffer, "PNG")  # of the width that ends a worker
    before = wait_until(lambda: len(pids()) == 2 and pids(), 30)
    reply = app.segment(buffer.getvalue())
    assert (reply.status, reply.tree["code"]) == (502, "worker-lost")
    assert "retry_after_s" not in reply.tree
    after = wait_until(lambda: len(pids()) == 2 and pids().isdisjoint(before) and pids(), 60)
    for _ in range(5):
        reply = app.segment(buffer.getvalue(), "score_threshold=0.5")
        assert (reply.status, reply.tree["code"]) == (502, "worker-lost")
        assert "was given up: lost 2 workers" in reply.tree["detail"]
    assert app.answered(_png(1))["detections"]
    assert pids() == after


def test_one_node_is_killed_in_mid_run_and_every_image_is_answered(cluster, deploy) -> None:
    cluster.add("c")
    app = deploy({**TIMED, "timed": {"latency_ms": {"1": 100}}, "batch": 1})
    images = [_png(number) for number in range(60)]
    answered: list[int] = []

    def segment(number: int) -> dict:
        answer = app.answered(images[number])
        answered.append(number)
        if len(answered) == 15:
            cluster.kill("c")
        return answer

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(segment, range(60)))
    for number, answer in enumerate(found):
        assert answer["detections"][0]["checksum"] == timed.checksum(_pixels(number))
    assert {answer["node"] for answer in found} == {"a", "b", "c"}


def _pixels(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (32, 24, 3), np.uint8)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_pixels(number)[:, :, ::-1]).save(buffer, "PNG")
    return buffer.getvalue()
