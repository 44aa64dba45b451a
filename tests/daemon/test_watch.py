from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from blendmaskd.programs.readings import Reading
from blendmaskd.programs.watch import View, sparkline


def device(name: str, **more: Any) -> dict[str, Any]:
    effect = {"cpus": "0-3", "threads": 4, "task_queue": 2, "preload": "/lib/libtcmalloc.so", "env": {}}
    found = {
        "device": name, "state": "ready", "reason": "", "generation": 1, "pid": 4711, "fps": 49.1, "images": 12345,
        "busy_share": 0.5, "restarts": 0, "memory_bytes": 3 << 30, "device_memory_bytes": 0,
        "wanted": dict(effect), "actual": {**effect, "thread_cpus": {}},
    }  # fmt: skip
    return {**found, **more}


def snapshot(**more: Any) -> dict[str, Any]:
    found = {
        "seq": 17, "combined_fps": 98.17, "degraded": False, "draining": False, "serving": 2, "leased": 4,
        "queue": {"jobs": 3, "bytes": 5 << 20, "max_jobs": 256, "max_bytes": 1 << 30}, "answered": 1234, "failures": {},
        "latency": {"count": 900, "p50": 0.0417, "p99": 0.25, "stages": {"queue": 0.002, "device": 0.039}},
        "recent_failures": [], "devices": [device("npu:0"), device("npu:1", fps=49.07)],
    }  # fmt: skip
    return {**found, **more}


class Measured:
    """What npu-smi said, of the first device only."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def of(self, device: dict[str, Any]) -> Reading | None:
        return self.reading if device["device"] == "npu:0" else None


def shown(view: View, width: int = 160) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


def view_of(found: dict[str, Any], readings: Any = None, note: str = "") -> View:
    view = View(readings)
    view.update(found, note)
    return view


def test_everything_of_a_snapshot_is_there() -> None:
    text = shown(view_of(snapshot()))
    head, totals = text.splitlines()[:2]
    assert head.split()[:3] == ["98.17", "FPS", "ok"]
    assert totals == ("latency p50 41.7 ms p99 250 ms · 3 of 256 waiting (5 MiB) · 4 leased · 1234 answered · "
                      "no failures · seq 17")  # fmt: skip
    for name, fps in (("npu:0", "49.10"), ("npu:1", "49.07")):
        (row,) = [line for line in text.splitlines() if line.split()[:1] == [name]]
        for cell in ("ready", fps, "50%", "━━━━━━━━", "3.0 GiB", "0-3", "libtcmalloc.so", "12345", "4711"):
            assert cell in row
    assert "an image's time  queue 2.00 ms · device 39.0 ms" in text
    assert "temp" not in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"degraded": True, "serving": 1}, "degraded, 1 of 2"),
        ({"degraded": True, "serving": 0}, "not serving"),
        ({"draining": True}, "draining"),
    ],
)
def test_what_is_wrong_is_in_the_first_line(more: dict[str, Any], words: str) -> None:
    assert words in shown(view_of(snapshot(**more))).splitlines()[0]


def test_a_device_that_is_down_or_not_where_it_should_be_says_why() -> None:
    down = device("npu:0", state="backoff", reason="killed by SIGKILL", pid=None, actual={}, wanted={}, restarts=3)
    moved = device("npu:1")
    moved["actual"]["cpus"] = "0-7"
    text = shown(view_of(snapshot(devices=[down, moved])))
    assert "npu:0 backoff: killed by SIGKILL" in text
    assert "0-7, wanted 0-3" in text


def test_recent_failures_are_told_newest_first() -> None:
    failures = [{"time": 1.0, "job": f"job-{n}", "code": "bad-image", "reason": "no JPEG"} for n in range(9)]
    text = shown(view_of(snapshot(failures={"bad-image": 9}, recent_failures=failures)))
    assert [word for word in text.split() if word.startswith("job-")] == ["job-0", "job-1", "job-2", "job-3"]
    assert "9 bad-image" in text


def test_npu_smi_s_readings_are_columns_where_there_are_any() -> None:
    text = shown(view_of(snapshot(), Measured(Reading(43.0, None, "Alarm"))))
    row, other = (next(line for line in text.splitlines() if line.split()[:1] == [name]) for name in ("npu:0", "npu:1"))
    assert "43 °C" in row
    assert "Alarm" in row
    assert "°C" not in other


@pytest.mark.parametrize("width", [250, 120, 80, 60, 40, 24])
def test_no_line_is_wider_than_the_terminal_and_the_devices_stay(width: int) -> None:
    view = view_of(snapshot(), Measured(Reading(43.0, 101.8, "OK")))
    for _ in range(300):
        view.update(snapshot())
    text = shown(view, width)
    assert max(map(len, text.splitlines())) <= width
    assert "98.17 FPS" in text
    for name, fps in (("npu:0", "49.10"), ("npu:1", "49.07")):
        assert any(name in line and fps in line for line in text.splitlines())


def test_the_history_is_a_sparkline_with_gaps_where_nobody_answered() -> None:
    view = View()
    for fps, note in ((0.0, ""), (50.0, ""), (50.0, "no answer"), (100.0, "")):
        view.update(snapshot(combined_fps=fps), note)
    assert shown(view).splitlines()[0].endswith("▁▄ █")
    view.update(snapshot(), "no answer from ipc:///x within 3 s")
    assert "no answer from ipc:///x within 3 s; showing the last figures" in shown(view)


@pytest.mark.parametrize(
    ("values", "width", "bars"),
    [([], 5, ""), ([0.0, 0.0], 5, "▁▁"), ([1.0, 8.0], 5, "▁█"), ([8.0, 1.0, 4.0], 2, "▂█"), ([None], 5, " "),
     ([1.0], 0, ""), ([1.0], -3, "")],
)  # fmt: skip
def test_sparkline(values: list[float | None], width: int, bars: str) -> None:
    assert sparkline(values, width) == bars
