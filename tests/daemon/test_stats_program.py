"""The stats program as people run it, and its tables."""
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from blendmaskd.core.stats import Histogram
from blendmaskd.programs.tables import quantile, tables
from blendmaskd.protocol import STAGE_BOUNDS_S

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "stats.py"
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd="/", env=ENVIRONMENT, capture_output=True, text=True, timeout=30
    )
    return process.returncode, process.stdout, process.stderr


@pytest.fixture
def snapshot(shared_daemon: Any) -> Any:
    for _ in shared_daemon.client.map([np.zeros((8, 8, 3), np.uint8)] * 10):
        pass
    found = shared_daemon.client.stats()
    while not found["stages"]["total"]["count"]:
        found = shared_daemon.client.stats()
    return found


def shown(snapshot: Any, width: int = 160, colour: bool = False) -> str:
    with Console(width=width, force_terminal=colour, color_system="standard" if colour else None) as console:
        with console.capture() as capture:
            console.print(tables(snapshot))
        return capture.get()


def row(text: str, device: str, after: str) -> list[str]:
    """The cells of a device below a headline that has the word `after`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if after in line)
    return next(line.split() for line in lines[start:] if line.split()[:1] == [device])


# -- the program ------------------------------------------------------------------------------------------------------


def test_the_tables_show_every_device(shared_daemon: Any, snapshot: Any) -> None:
    code, out, err = run(shared_daemon.endpoint)
    assert (code, err) == (0, "")
    for device in snapshot["devices"]:
        cells = row(out, device["device"], "FPS")
        assert cells[1] == "ready"
        assert cells[-1] == str(device["pid"])
    assert "combined" in out
    assert "answered" in out
    assert [line.split()[0] for line in out.splitlines() if re.search(r"\d m?s$", line.rstrip())] == [
        "queue", "decode", "wait", "device", "finish", "send", "total"
    ]  # fmt: skip
    assert max(map(len, out.splitlines())) <= 80


def test_json_is_one_line_and_the_snapshot(shared_daemon: Any, snapshot: Any) -> None:
    code, out, _ = run(shared_daemon.endpoint, "--json")
    found = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    assert found["seq"] >= snapshot["seq"]
    assert found.keys() == snapshot.keys()
    assert {"seq", "window_s", "combined_fps", "queue", "devices", "failures"} <= found.keys()
    assert {"device", "slot", "generation", "pid", "state", "fps", "images", "busy_share", "restarts", "wanted",
            "actual"} <= found["devices"][0].keys()  # fmt: skip
    assert found["devices"][0]["wanted"].keys() >= {"cpus", "task_queue", "preload", "env"}


def test_watch_shows_each_second_until_ctrl_c(shared_daemon: Any) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), shared_daemon.endpoint, "--json", "--watch"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    seen = [json.loads(process.stdout.readline())["seq"] for _ in range(3)]
    assert all(0 < later - earlier <= 3 for earlier, later in pairwise(seen))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
def test_watch_on_a_terminal_redraws_and_waits_for_a_daemon_that_is_gone(daemon: Any, wait_until: Any) -> None:
    running = daemon(devices=["cpu:0"])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), running.endpoint, "--watch"],
        stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    text = ""

    def says(words: str) -> bool:
        nonlocal text
        with contextlib.suppress(BlockingIOError):
            text += os.read(ours, 1 << 16).decode(errors="replace")
        return words in text

    try:
        wait_until(lambda: says("\x1b[?1049h") and says("ready"))  # the terminal's other screen
        running.kill()
        wait_until(lambda: says("no answer from"))
        running.start()
        running.wait_ready()
        text = ""
        wait_until(lambda: says("ready"))
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert says("\x1b[?1049l")  # and what was there before is back
    finally:
        process.kill()
        assert process.stderr is not None
        with process.stderr as stderr:
            assert stderr.read() == b""
        os.close(ours)


def test_no_daemon_is_said_soon(tmp_path: Path) -> None:
    start = time.monotonic()
    code, out, err = run(f"ipc://{tmp_path}/nobody")
    assert (code, out) == (3, "")
    assert err == f"stats: no answer from ipc://{tmp_path}/nobody within 3 s: is the daemon running there?\n"
    assert time.monotonic() - start < 10


def test_an_endpoint_that_is_none_is_refused() -> None:
    code, _, err = run("nonsense")
    assert code == 2
    assert err.startswith("stats: nonsense: ")


# -- tables -----------------------------------------------------------------------------------------------------------


def test_what_did_not_take_effect_is_red_and_said_in_words(snapshot: Any) -> None:
    for device in snapshot["devices"]:
        device["wanted"] = {"cpus": "4", "threads": 1, "task_queue": 1, "preload": "/x/lib.so", "env": {"A": "1"}}
        device["actual"] = {**device["wanted"], "env": {"A": "1"}, "thread_cpus": {}}
    assert "wanted" not in shown(snapshot)
    wanted, actual = (snapshot["devices"][1][key] for key in ("wanted", "actual"))
    wanted |= {"cpus": "0-7", "task_queue": 2, "preload": "/usr/lib/libtcmalloc.so.4"}
    wanted["env"]["TASK_QUEUE"] = "2"
    actual |= {"cpus": "0-3", "task_queue": None, "preload": None, "thread_cpus": {"acl_thread/7": "9"}}
    text = shown(snapshot)
    assert "0-3, wanted 0-7" in text
    assert "-, wanted libtcmalloc.so.4" in text
    assert "-, wanted 2" in text
    for note in ("task_queue: wanted 2, is None", "CPUs 4-7 of 0-7 are not used",
                 "thread acl_thread/7 runs on CPUs 9, outside 0-7", "TASK_QUEUE: wanted '2', is None"):  # fmt: skip
        assert f"cpu:1 {note}" in text
    assert "\x1b[1;31m0-3, wanted 0-7" in shown(snapshot, colour=True)
    assert row(text, "cpu:0", "preload")[1:] == ["4", "lib.so", "1", "-"]


def test_models_that_differ_are_said(snapshot: Any) -> None:
    for device, model in zip(snapshot["devices"], ("aa", "aa")):
        device["actual"] = {**device["wanted"], "thread_cpus": {}, "model": model}
    assert "different models" not in shown(snapshot)
    assert row(shown(snapshot), "cpu:1", "preload")[-1] == "aa"
    snapshot["devices"][1]["actual"]["model"] = "bb"
    assert "different models are served: aa, bb; reload, unless one is under way" in shown(snapshot)


def test_a_device_that_is_down_says_why(snapshot: Any) -> None:
    snapshot["devices"][0] |= {"state": "backoff", "reason": "killed by SIGKILL", "pid": None, "actual": {}}
    snapshot |= {"degraded": True, "serving": 1}
    text = shown(snapshot)
    assert "degraded" in text
    assert "cpu:0 backoff: killed by SIGKILL" in text
    assert row(text, "cpu:0", "FPS")[1] == "backoff"
    assert "not serving" in " ".join(shown(snapshot | {"serving": 0}).split())  # a line may be wrapped there


def test_queue_answers_and_failures_are_in_the_headline(snapshot: Any) -> None:
    snapshot |= {"combined_fps": 98.17, "queue": {"jobs": 3, "bytes": 5 << 20}, "leased": 4, "answered": 1234}
    snapshot |= {"failures": {"worker-lost": 1, "busy": 20}, "seq": 17}
    assert shown(snapshot).splitlines()[0] == (
        "combined 98.17 FPS over 10 s · 3 waiting (5 MiB), 4 leased · 1234 answered · 20 busy, 1 worker-lost · seq 17"
    )
    assert "no failures" in shown(snapshot | {"failures": {}})


def test_memory_on_the_device_is_shown_beside_the_host_s(snapshot: Any) -> None:
    snapshot["devices"][0] |= {"memory_bytes": 3 << 30, "device_memory_bytes": 700 << 20}
    assert "3.0 GiB + 700 MiB on device" in shown(snapshot)


def test_nothing_measured_yet_shows_no_stages(snapshot: Any) -> None:
    for histogram in snapshot["stages"].values():
        histogram |= {"buckets": [0] * 16, "count": 0, "sum": 0.0}
    assert "p99" not in shown(snapshot)


@pytest.mark.parametrize(
    ("seconds", "share", "estimate"),
    [
        ([0.02] * 4, 0.5, 0.0175),  # half way between 0.01 and 0.025
        ([0.02] * 4, 1.0, 0.025),
        ([0.0001], 0.5, 0.00025),
        ([0.02] * 99 + [4.0], 0.5, 0.01 + 0.015 * 50 / 99),
        ([0.02] * 99 + [4.0], 0.995, 3.75),
        ([0.02, 31.0], 0.99, None),
    ],
)
def test_a_quantile_is_estimated_as_prometheus_does(seconds: list[float], share: float, estimate: float | None) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.observe(value)
    found = quantile(histogram.as_dict()["buckets"], share)
    assert found == (None if estimate is None else pytest.approx(estimate))


@given(st.lists(st.floats(0, STAGE_BOUNDS_S[-1]), min_size=1, max_size=60), st.floats(0.01, 1))
def test_a_quantile_is_at_most_a_bucket_away(seconds: list[float], share: float) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.observe(value)
    exact = float(np.quantile(seconds, share, method="inverted_cdf"))
    found = quantile(histogram.as_dict()["buckets"], share)
    assert found is not None
    above = next(bound for bound in STAGE_BOUNDS_S if exact <= bound)
    below = max((bound for bound in STAGE_BOUNDS_S if bound < above), default=0.0)
    assert below - 1e-9 <= found <= above + 1e-9
