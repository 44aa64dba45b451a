"""SIGTERM and SIGHUP on real processes under load: a drain answers all, a reload that goes wrong changes nothing."""
from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from raw_load import LONG_S, QUICK_RESTARTS, Load, answer, picture, submission

from blendmaskd.client.blocking import Client, JobFailed
from blendmaskd.protocol import Cancel, Code, encode
from blendmaskd_workers import blendmask
from chaos.poison import worker_env
from checkout import ROOT

SMALL = ROOT / "tests" / "golden" / "small_R18.yaml"


def test_sigterm_under_load_answers_what_was_accepted(daemon, loaded, wait_until) -> None:
    server = daemon(drain_s=30)
    load = loaded(server)
    wait_until(lambda: load.answered > 50, LONG_S)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: load.failures, LONG_S)
    load.stop.set()
    assert server.process.wait(LONG_S) == 0
    load.end()
    assert {failure.code for failure in load.failures} == {Code.DRAINING}
    assert server.processes() == []


@pytest.mark.slow
def test_a_drain_that_takes_too_long_answers_draining(daemon, loaded, wait_until) -> None:
    server = daemon(drain_s=0.5, timed={"latency_ms": {1: 4000}}, restarts={**QUICK_RESTARTS, "stop_s": 1})
    load = loaded(server)
    wait_until(lambda: server.client.stats().get("leased"), LONG_S)
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: load.failures, LONG_S)
    load.stop.set()
    assert server.process.wait(LONG_S) == 0
    load.end()
    assert {failure.code for failure in load.failures} == {Code.DRAINING}


@pytest.mark.slow
def test_a_drain_ends_a_reload_that_is_under_way(daemon, wait_until) -> None:
    """A worker is still busy, with a job that nobody waits for, when the check of the new settings would end."""
    server = daemon(timed={"latency_ms": {1: 2000}})
    with contextlib.closing(server.dealer()) as dealer:
        dealer.send_multipart(submission("1", picture()))
        wait_until(lambda: server.client.stats()["leased"] == 1)
        dealer.send_multipart(encode(Cancel(job="1")))
        assert answer(dealer.recv_multipart()).code is Code.CANCELLED
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "checking settings" in server.log)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LONG_S) == 0
    assert "reload: accepted" not in server.log


@pytest.mark.slow
def test_a_reload_that_no_device_can_boot_by_is_undone(scene, wait_until, tmp_path) -> None:
    """The check ran on the CPU, and found nothing; one device is missed for a while, whoever asks again."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    for device in ("cpu:0", "cpu:1"):
        (bad / device).write_text("78")
    with scene(worker_env=worker_env(good), restarts=QUICK_RESTARTS) as here:
        before = here.server.pids()
        here.server.rewrite(worker_env=worker_env(bad))
        for time in (1, 2):
            here.server.process.send_signal(signal.SIGHUP)
            undone = "reload undone, the previous settings are restored: cpu:0: cannot boot"
            wait_until(lambda undone=undone, time=time: here.server.log.count(undone) == time, LONG_S)
            wait_until(lambda: set(here.server.states().values()) == {"ready"}, LONG_S)
        assert here.server.pids()["cpu:1"] == before["cpu:1"]
        here.server.rewrite(worker_env=worker_env(good))
        here.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: set(here.server.pids().values()).isdisjoint([*before.values(), None]), LONG_S)
        here.server.wait_ready()
    assert here.load.failures == []


@pytest.mark.slow
def test_when_no_device_can_boot_any_more_a_reload_ends_no_daemon(daemon, wait_until, tmp_path) -> None:
    """Neither by the new settings nor by those before."""
    server = daemon(devices=["cpu:0"], worker_env=worker_env(tmp_path), restarts=QUICK_RESTARTS)
    (tmp_path / "cpu:0").write_text("78")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload: no worker can be started" in server.log, LONG_S)
    assert "reload undone" in server.log
    with Client(server.endpoint, timeout_s=20) as client, pytest.raises(JobFailed) as failed:
        client.segment(picture())
    assert failed.value.code is Code.UNAVAILABLE
    (tmp_path / "cpu:0").unlink()
    server.process.send_signal(signal.SIGHUP)
    server.wait_ready()
    assert server.client.segment(picture()).width


@pytest.mark.slow
def test_a_device_that_a_reload_takes_out_is_not_missed(daemon, wait_until) -> None:
    server = daemon()
    server.settings_file.write_text(yaml.safe_dump({**server.settings, "devices": ["cpu:0"]}))
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "ready: 1 of 1 devices" in server.log, LONG_S)
    wait_until(lambda: server.get("/readyz")[1].startswith("ok"))
    assert set(server.devices()) == {"cpu:0"}


def test_sighup_under_load_replaces_workers_one_at_a_time(scene, wait_until) -> None:
    with scene() as here:
        before = here.server.pids()
        here.server.rewrite(timed={"latency_ms": {1: 3}})
        here.server.process.send_signal(signal.SIGHUP)
        serving = set()

        def replaced() -> bool:
            snapshot = here.server.client.stats()
            serving.add(snapshot["serving"])
            pids = {device["pid"] for device in snapshot["devices"]}
            return snapshot["serving"] == 2 and pids.isdisjoint(before.values())

        wait_until(replaced, LONG_S)
    assert here.load.failures == []
    assert 0 not in serving


@pytest.mark.slow
def test_a_reload_with_corrupt_weights_keeps_the_old_ones_serving(daemon, wait_until, tmp_path) -> None:
    """The native engine: the file is cut short in place while it serves, then mended."""
    weights = tmp_path / "small.pth"
    network = blendmask.build(blendmask.load_config(SMALL))
    torch.save({"model": blendmask.random_weights(network)}, weights)
    server = daemon(engine="native", model={"config": str(SMALL), "weights": str(weights)}, warm_up=[[64, 64]],
                    runtime={"threads": 1}, batch=1)  # fmt: skip
    pids, good = server.pids(), weights.read_bytes()
    expected = server.client.segment(picture()).detections
    load = Load(server.endpoint, in_flight=1, checked=False)
    load.start()
    try:
        weights.write_bytes(good[: len(good) // 2])
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reload refused, nothing changed" in server.log, LONG_S)
        assert str(weights) in server.log
        assert server.pids() == pids
        assert server.client.segment(picture()).detections == expected
        weights.write_bytes(good)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: set(server.pids().values()).isdisjoint([*pids.values(), None]), LONG_S)
        server.wait_ready()
        load.end()
    finally:
        load.stop.set()
        load.join()
    assert load.failures == []
    assert server.client.segment(picture()).detections == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bacth": 2}, "bacth: unknown key"),
        ({"engine": "native", "model": {"weights": "/nowhere.pth"}}, "/nowhere.pth"),
        ({"runtime": {"preload": "/nowhere.so"}}, "/nowhere.so"),
        ({"endpoints": {"clients": ["ipc:///tmp/other.sock"]}}, "a change needs a restart"),
        ({"limits": {"max_image_bytes": 1 << 31}}, "limits.max_image_bytes: a higher one needs a restart"),
    ],
    ids=["unknown key", "no weights", "no library", "endpoints", "a limit of ZeroMQ's"],
)
def test_a_bad_reload_changes_nothing(scene, wait_until, settings, complaint) -> None:
    with scene() as here:
        before, good = here.server.pids(), here.server.settings_file.read_text()
        here.server.settings_file.write_text(yaml.safe_dump({**here.server.settings, **settings}))
        here.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "reload refused, nothing changed" in here.server.log, LONG_S)
        assert complaint in here.server.log
        assert here.server.pids() == before
        here.server.settings_file.write_text(good)
    assert here.load.failures == []


@pytest.fixture
def loaded() -> Iterator[Callable[[Any], Load]]:
    """Starts a load on a daemon that will end; stops it in any case."""
    loads: list[Load] = []

    def start(server: Any) -> Load:
        loads.append(Load(server.endpoint))
        loads[-1].start()
        return loads[-1]

    yield start
    for load in loads:
        load.stop.set()
        load.join()
