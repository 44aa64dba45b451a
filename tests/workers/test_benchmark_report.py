"""The benchmark's rows, medians, ratios and tables."""
from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from blendmaskd.protocol import IDLE
from blendmaskd_workers.benchmark import measure, report


def row(variant: str, round: int, fps: float, load: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "variant": variant, "round": round, "load": load or {"clients": 8}, "images": 100, "fps": fps, "jobs": 100,
        "p50_ms": 1000 / fps, "p90_ms": 20.0, "p99_ms": 30.0, "max_ms": 40.0, "failures": {}, "wrong": 0,
        "late_sends": 0, "latest_send_ms": 0.0, "checked": 100, "answer_bytes": 99, "generator_share": 0.1,
        "cpu_s_per_1000": {"broker": 1.0, "workers": 2.0, "generator": 0.5},
        "memory_mb": {"kind": "pss", "broker": 20.0, "workers": 70.0}, **more,
    }  # fmt: skip


def snapshot(images: int, busy: float, decoded: int, decode_s: float) -> dict[str, Any]:
    return {
        "devices": [{"device": "cpu:0", "images": images, "busy_seconds": busy,
                     "idle_seconds": dict.fromkeys(IDLE, busy / 3)},
                    {"device": "cpu:1", "images": 0, "busy_seconds": 0.0, "idle_seconds": dict.fromkeys(IDLE, 0.0)}],
        "stages": {"decode": {"count": decoded, "sum": decode_s}, "finish": {"count": 5, "sum": 1.0}},
    }  # fmt: skip


def test_what_the_daemon_says_of_itself_is_told_per_image() -> None:
    found = measure.by_the_stats(snapshot(10, 1.0, 10, 1.0), snapshot(60, 2.5, 20, 1.02), fps=40.0)
    assert found["busy_ms_per_image"] == pytest.approx(30)  # 1.5 s for 50 images
    assert found["of_device_time"] == pytest.approx(40 * 0.03 / 2)
    assert found["idle_share"] == dict.fromkeys(IDLE, pytest.approx(40 * 0.01 / 2))
    assert found["stages_ms"] == {"decode": pytest.approx(2)}  # finish had nothing new
    assert "of_device_time" not in measure.by_the_stats(snapshot(10, 1.0, 0, 0.0), snapshot(10, 1.0, 0, 0.0), fps=40.0)


def test_a_device_that_does_two_things_at_once_is_told() -> None:
    assert report.remarks(row("a", 1, 90.0, of_device_time=1.01)) == []
    assert report.remarks(row("a", 1, 90.0, of_device_time=1.05, images=199)) == [], "too few to know"
    [said] = report.remarks(row("a", 1, 90.0, of_device_time=1.05, images=200))
    assert "their visits overlapped" in said


def test_medians_are_by_variant_and_load_and_failures_add_up() -> None:
    rows = [row("a", 1, 90.0, failures={"busy": 1}), row("a", 2, 80.0, failures={"busy": 2}, wrong=1),
            row("a", 3, 70.0), row("a", 1, 10.0, {"rate": 10.0}), row("b", 1, 5.0)]  # fmt: skip
    first, second, third = report.medians(rows)
    assert (first["fps"], first["failures"], first["wrong"], first["round"]) == (80.0, {"busy": 3}, 1, "median")
    assert first["cpu_s_per_1000"] == {"broker": 1.0, "workers": 2.0, "generator": 0.5}
    assert (second["load"], second["fps"]) == ({"rate": 10.0}, 10.0)
    assert third["variant"] == "b"


def test_a_ratio_is_of_pairs_of_the_same_round_and_load() -> None:
    rows = [row("a", 1, 50.0), row("b", 1, 100.0), row("a", 2, 50.0), row("b", 2, 150.0), row("a", 3, 10.0),
            row("b", 3, 10.0)]  # fmt: skip
    [found] = report.ratios(rows, "b", "a")
    assert found["fps"] == {"pairs": [2.0, 3.0, 1.0], "median": 2.0}
    assert found["p50_ms"]["pairs"] == [pytest.approx(0.5), pytest.approx(1 / 3), pytest.approx(1)]
    assert found["server_cpu"]["median"] == found["broker_cpu"]["median"] == 1.0
    assert report.ratio_text(found).startswith("b / a, 8 clients: images/s 2.000 (2.000, 3.000, 1.000); p50 0.500")


def test_variants_that_differ_in_their_load_are_compared_too() -> None:
    rows = [row("clients=1", 1, 50.0, {"clients": 1}), row("clients=2", 1, 100.0, {"clients": 2})]
    [found] = report.ratios(rows, "clients=2", "clients=1")
    assert (found["load"], found["fps"]["median"]) == ("2 clients / 1 client", 2.0)


def test_what_is_not_known_has_no_ratio() -> None:
    rows = [row("a", 1, 50.0), row("b", 1, 50.0, cpu_s_per_1000={"generator": 1.0}, p50_ms=math.nan)]
    [found] = report.ratios(rows, "b", "a")
    assert found["server_cpu"] == found["p50_ms"] == {"pairs": [], "median": None}
    assert "server CPU" not in report.ratio_text(found)


def test_markdown_has_a_row_for_each_round_and_the_median() -> None:
    rows = [row("a", 1, 90.0, utilisation=0.98, limit_fps=91.8, limit_devices=2), row("a", 2, 80.0, utilisation=0.9)]
    lines = report.markdown(rows, []).splitlines()
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {lines[0].count("|")}
    assert "98.00%" in lines[2]
    assert "**85.00**" in lines[4]


def test_remarks_name_what_a_reader_must_know() -> None:
    bad = row("a", 1, 90.0, failures={"busy": 3}, wrong=2, late_sends=50, latest_send_ms=12.0)
    assert report.remarks(bad) == ["3 busy", "2 WRONG ANSWERS", "50.0% of sends late, at most 12.0 ms"]
    assert report.remarks(row("a", 1, 90.0)) == []


def test_tables_leave_out_what_is_not_known() -> None:
    output = io.StringIO()
    rows = [row("a", 1, 90.0, memory_mb={"kind": "pss"}, stages_ms={"decode": 1.25})]
    Console(file=output, width=160).print(*report.tables(report.medians(rows)))
    assert "90.00" in output.getvalue()
    assert "1.25" in output.getvalue()
    assert "of the limit" not in output.getvalue()
    assert "MB" not in output.getvalue().replace("MB: pss", "")


def test_json_has_no_nan() -> None:
    tree = report.plain({"a": [math.nan, 1.0, (math.inf, {"b": math.nan})], "c": "nan"})
    assert json.loads(json.dumps(tree, allow_nan=False)) == {"a": [None, 1.0, [None, {"b": None}]], "c": "nan"}
