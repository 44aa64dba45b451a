"""The daemon follows the health of its NPUs: by what npu-smi prints, with a stand-in that prints recorded output."""
from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blendmaskd import settings
from blendmaskd.client.blocking import Client
from blendmaskd.shell import npu_health
from blendmaskd.shell.npu_health import NpuHealth
from checkout import ROOT, SOURCES

SAMPLES = ROOT / "tests" / "data" / "npu-smi"
GOLDEN = ROOT / "tests" / "golden"
TOOL = """#!/bin/sh
case "$*" in
    info) cat "$0.info" ;;
    "info -m") cat "$0.map" ;;
    "info -t ecc -i "*) cat "$0.ecc" ;;
    "info -t health -i "*) cat "$0.health" ;;
esac
"""


class NpuSmi:
    """A stand-in on the PATH of a host with NPUs 0 and 1 of the samples."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "npu-smi"
        self.environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
        self.becomes(TOOL)
        self.write("map", (SAMPLES / "info_m_910B3_mcu.txt").read_text())
        errors = "HBM Single Bit Error Count               : "
        self.write("ecc", (SAMPLES / "ecc_910.txt").read_text().replace(f"{errors}0", f"{errors}12"))
        self.write("health", (SAMPLES / "health_ok_910A.txt").read_text().replace(": NA", ": 0x80E01801", 1))
        self.says()

    def write(self, what: str, text: str) -> None:
        """At once, so that it is never read half-written."""
        new = self.program.with_suffix(".new")
        new.write_text(text)
        new.rename(f"{self.program}.{what}")

    def becomes(self, script: str) -> None:
        """Another file, as the one before may be running."""
        new = self.program.with_suffix(".new")
        new.write_text(script)
        new.chmod(0o755)
        new.rename(self.program)

    def says(self, **health: str) -> None:
        """``npu0="Alarm"``; of others OK."""
        text = (SAMPLES / "info_910B3_8npu.txt").read_text()
        for npu, word in health.items():
            row = f"| {npu.removeprefix('npu')}     910B3               | "
            assert row in text
            text = text.replace(f"{row}OK     ", f"{row}{word:7}")
        self.write("info", text)


@pytest.fixture
def npu_smi(tmp_path: Path) -> NpuSmi:
    return NpuSmi(tmp_path)


def test_what_npu_smi_says_is_read_by_device(npu_smi: NpuSmi) -> None:
    npu_smi.says(npu1="Alarm")
    readings = npu_health.ask(["npu:0", "npu:1", "npu:7"], npu_smi.environment)
    assert {device: (reading.health, reading.error) for device, reading in readings.items()} == {
        "npu:0": ("OK", ""), "npu:1": ("Alarm", "0x80E01801"),
    }  # fmt: skip
    one = readings["npu:1"]
    assert (one.temperature_c, one.single_bit_errors, one.double_bit_errors, one.host_id) == (39, 12, 0, "1")
    visible = npu_smi.environment | {"ASCEND_RT_VISIBLE_DEVICES": "1"}
    assert npu_health.ask(["npu:0", "npu:1"], visible)["npu:0"].host_id == "1"


@pytest.mark.parametrize("text", ["", "dcmi module initialize failed. ret is -8005\n", "|" * 100])
def test_what_npu_smi_does_not_say_is_no_reading(npu_smi: NpuSmi, text: str) -> None:
    npu_smi.write("info", text)
    assert npu_health.ask(["npu:0"], npu_smi.environment) == {}
    assert npu_health.ask(["npu:0"], {"PATH": "/nowhere"}) == {}


def test_nobody_waits_for_npu_smi(
    npu_smi: NpuSmi, wait_until: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs, is killed after its time, and says later what it has to say."""
    caplog.set_level("INFO")
    npu_smi.becomes("#!/bin/sh\nexec sleep 60\n")
    health = NpuHealth(npu_smi.environment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("blendmaskd.discovery.TOOL_TIMEOUT_S", 0.1)
        health.watch(["npu:0", "cpu:1"], 0.05)
        assert health.take() == {}
        wait_until(lambda: health.take() or "does not answer" in caplog.text)
        npu_smi.becomes(TOOL)
        assert wait_until(health.take).keys() == {"npu:0"}
    health.watch([], 0)


class Load:
    """A client that always has images on their way, and notes what it gets for them."""

    def __init__(self, server: Any, image: Any, window: int) -> None:
        self.answered = 0
        self._over = threading.Event()
        self._arguments = server.endpoint, itertools.repeat(image), window
        self._outcome = ThreadPoolExecutor(1).submit(self._work)

    def _work(self) -> None:
        endpoint, images, window = self._arguments
        with Client(endpoint, timeout_s=60.0) as client:
            for _ in client.map(itertools.takewhile(lambda _: not self._over.is_set(), images), window=window):
                self.answered += 1

    def end(self) -> None:
        """Raises what any image was refused for, or lost by."""
        self._over.set()
        self._outcome.result(60)


def follow(server: Any, npu_smi: NpuSmi, wait_until: Callable[..., Any], image: Any, window: int) -> None:
    """Under load: npu:1 is ill, npu-smi is silent, it comes back, both are ill. No job is lost."""

    def states() -> list[str]:
        return [device["state"] for device in server.devices().values()]

    wait_until(lambda: server.devices()["npu:0"]["card"].get("health") == "OK", 30)
    load = Load(server, image, window)
    wait_until(lambda: load.answered, 30)
    npu_smi.says(npu1="Alarm")
    wait_until(lambda: states() == ["ready", "resting"], 30)
    snapshot = server.client.stats()
    assert (snapshot["degraded"], snapshot["serving"]) == (True, 1)
    assert server.devices()["npu:1"]["reason"] == "health Alarm"
    metrics = server.get("/metrics")[1]
    for line in (
        'blendmaskd_npu_health{device="npu:1"} 2.0', 'npu_chip_info_health_status{id="1"} 0.0',
        'npu_chip_info_temperature{id="0"} 43.0', 'blendmaskd_npu_temperature_celsius{device="npu:0"} 43.0',
        'npu_chip_info_hbm_ecc_single_bit_error_cnt{id="0"} 12.0', 'blendmaskd_worker_up{device="npu:1"} 0.0',
    ):  # fmt: skip
        assert line in metrics
    npu_smi.write("info", "dcmi module initialize failed. ret is -8005\n")
    wait_until(lambda: "npu-smi does not answer" in server.log, 30)
    assert states() == ["ready", "resting"]
    npu_smi.says()
    wait_until(lambda: states() == ["ready", "ready"], 60)
    wait_until(lambda: not server.client.stats()["degraded"])
    npu_smi.says(npu0="Critical", npu1="Critical")
    wait_until(lambda: sorted(states()) == ["ready", "resting"], 30)
    wait_until(lambda: "health Critical" in server.get("/readyz")[1])
    assert server.get("/readyz")[0] == 200
    npu_smi.says(npu0="Warning", npu1="Warning")
    wait_until(lambda: states() == ["ready", "ready"], 60)
    load.end()
    snapshot = server.client.stats()
    assert load.answered > 0
    assert not snapshot["failures"]
    assert [device["restarts"] for device in snapshot["devices"]] == [0, 0]
    assert "slot=npu:1" in next(line for line in server.log.splitlines() if "health Alarm: 0x80E01801" in line)


@pytest.mark.slow
def test_a_slot_rests_while_its_card_is_ill_and_nothing_is_lost(
    daemon: Callable[..., Any], npu_smi: NpuSmi, wait_until: Callable[..., Any]
) -> None:
    server = daemon(devices=["npu:0", "npu:1"], npu_health_s=0.1, environment=npu_smi.environment)
    follow(server, npu_smi, wait_until, np.zeros((8, 8, 3), np.uint8), window=8)


@pytest.mark.slow
def test_a_slot_comes_back_when_npu_smi_is_not_asked_any_more(
    daemon: Callable[..., Any], npu_smi: NpuSmi, wait_until: Callable[..., Any]
) -> None:
    server = daemon(devices=["npu:0", "npu:1"], npu_health_s=0.1, environment=npu_smi.environment)
    npu_smi.says(npu1="Alarm")
    wait_until(lambda: server.states()["npu:1"] == "resting")
    server.rewrite(npu_health_s=0)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.states()["npu:1"] == "ready")
    assert server.devices()["npu:1"]["card"] == {}


@pytest.mark.slow
def test_an_emulated_npu_rests_while_its_card_is_ill_and_nothing_is_lost(
    daemon: Callable[..., Any], npu_smi: NpuSmi, wait_until: Callable[..., Any], tmp_path: Path
) -> None:
    import torch  # which takes seconds

    from blendmaskd_workers import blendmask

    weights = tmp_path / "weights.pth"
    network = blendmask.build(blendmask.load_config(GOLDEN / "small_R18.yaml"))
    torch.save({"model": blendmask.random_weights(network)}, weights)
    server = daemon(
        devices=["npu:0", "npu:1"], npu_health_s=0.5, environment=npu_smi.environment, engine="native",
        model={"config": str(GOLDEN / "small_R18.yaml"), "weights": str(weights)}, warm_up=[[64, 96]],
        runtime={"threads": 1}, worker_env={"PYTHONPATH": f"{ROOT / 'tests' / 'emulated'}:{SOURCES}"},
    )  # fmt: skip
    follow(server, npu_smi, wait_until, np.zeros((64, 96, 3), np.uint8), window=4)


def test_npu_smi_is_not_asked_where_that_is_not_wanted(npu_smi: NpuSmi) -> None:
    for devices, every_s in ((["npu:0"], 0), (["cpu:0", "cuda:1"], 1.0)):
        health = NpuHealth(npu_smi.environment)
        health.watch(devices, every_s)
        assert not health._thread.is_alive()
    assert settings.from_tree({"npu_health_s": 0}).npu_health_s == 0
