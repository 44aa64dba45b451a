import os
from pathlib import Path
from typing import Any

import pytest

from blendmaskd.programs import readings
from blendmaskd.programs.readings import Reading, Readings, parse_npu_readings

SAMPLES = Path(__file__).resolve().parents[1] / "data" / "npu-smi"


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


def test_temperature_power_and_health_of_each_chip() -> None:
    found = parse_npu_readings(sample("info_910B3_8npu"))
    assert len(found) == 8
    assert found[0, 0] == Reading(43.0, 101.8, "OK")
    assert found[7, 0] == Reading(44.0, 98.2, "OK")


def test_processes_are_no_chips() -> None:
    found = parse_npu_readings(sample("info_910A_8npu_procs"))
    assert list(found) == [(npu, 0) for npu in range(8)]
    assert found[3, 0] == Reading(44.0, 69.6, "OK")


@pytest.mark.parametrize("name", ["info_A3_Ascend910_dualdie_excerpt", "info_A3_Ascend910_dualdie_v25_excerpt"])
def test_the_second_chip_of_a_card_tells_no_power(name: str) -> None:
    found = parse_npu_readings(sample(name))
    assert found[0, 0].power_w is not None
    assert found[0, 1].power_w is None
    assert all(reading.temperature_c for reading in found.values())


@pytest.mark.parametrize("text", ["", "npu-smi: command failed", "| 0 | OK |", "| 0     910B3 | OK | - - |"])
def test_what_is_not_understood_is_left_out(text: str) -> None:
    assert parse_npu_readings(text) == {}


def device(name: str, host_id: str | None) -> dict[str, Any]:
    return {"device": name, "wanted": {"env": {} if host_id is None else {"ASCEND_RT_VISIBLE_DEVICES": host_id}}}


def test_devices_are_found_by_what_the_host_calls_them(wait_until: Any) -> None:
    answers = {"-m": sample("info_m_910B3_mcu"), "info": sample("info_910B3_8npu")}
    with Readings(ask=lambda argv, _: answers[argv[-1]]) as asked:
        wait_until(lambda: asked.latest)
        found = asked.of(device("npu:0", "1"))  # the daemon sees the host's second one only
        assert found == Reading(39.0, 92.0, "OK")
        assert asked.of(device("npu:0", "7")) is None  # no such row in this map
        assert asked.of(device("cuda:0", "1")) is None
        assert asked.of(device("npu:1", None)) is None
        assert asked.of(device("npu:1", "0")) == Reading(43.0, 101.8, "OK")
        assert asked.of({"device": "npu:1", "wanted": {}}) == Reading(43.0, 101.8, "OK")  # its worker is down


def test_without_a_map_chips_count_in_their_order(wait_until: Any) -> None:
    with Readings(ask=lambda argv, _: "" if argv[-1] == "-m" else sample("info_910B3_8npu")) as asked:
        wait_until(lambda: asked.latest)
        assert asked.of(device("npu:1", "4")) == Reading(45.0, 98.6, "OK")


def test_an_npu_smi_that_fails_later_leaves_nothing_old_behind(
    wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "EACH_S", 0.01)
    answers = [sample("info_m_910B3_mcu"), sample("info_910B3_8npu")]
    with Readings(ask=lambda *_: answers.pop(0) if answers else "") as asked:
        wait_until(lambda: not answers and not asked.latest)


def test_it_is_the_program_on_the_path_that_is_asked(
    tmp_path: Path, wait_until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "npu-smi"
    program.write_text(f"#!/bin/sh\n[ \"$2\" = -m ] && exec cat {SAMPLES}/info_m_910B3_mcu.txt\n"
                       f"exec cat {SAMPLES}/info_910B3_8npu.txt\n")  # fmt: skip
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Readings() as asked:
        wait_until(lambda: asked.latest)
        assert asked.of(device("npu:0", "0")) == Reading(43.0, 101.8, "OK")
