"""Signals: none that was ignored or blocked where the daemon was started, none lost, one stop however it comes."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from blendmaskd.client.blocking import Client, JobFailed
from checkout import ROOT

PICTURE = np.zeros((32, 32, 3), np.uint8)
LONG_S = 60.0


@pytest.fixture
def careless(daemon: Any) -> Callable[..., Any]:
    """A daemon whose parent ignores SIGCHLD and blocks what stops and reloads."""

    def start(**settings: Any) -> Any:
        before = signal.getsignal(signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        try:
            server = daemon(wait=False, **settings)
        finally:
            signal.signal(signal.SIGCHLD, before)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
        server.wait_ready()
        return server

    return start


def test_what_the_parent_ignored_or_blocked_is_reset(careless: Any, wait_until: Any) -> None:
    server = careless(devices=["cpu:0"])
    server.rewrite(timed={"outputs": "/nowhere.npz"})
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload refused, nothing changed: timed.outputs" in server.log, LONG_S)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(LONG_S) == 0


def test_streams_that_are_closed_are_not_given_to_the_next_file(daemon: Any) -> None:
    code = "import os, sys; os.closerange(0, 3); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    server = daemon()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(LONG_S)
    argv = [sys.executable, "-c", code, "-m", "blendmaskd", "--settings", server.settings_file]
    server.process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "TMPDIR": str(server.folder)})
    server.wait_ready()
    process = psutil.Process(server.process.pid)
    for each in (process, *process.children()):
        assert [os.readlink(f"/proc/{each.pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3


def stop_in_the_midst(server: Any, numbers: tuple[signal.Signals, signal.Signals], wait_until: Any) -> list[str]:
    """The codes of four jobs, some of them under way, when a stop comes as these two signals."""
    codes = []
    with Client(server.endpoint, timeout_s=LONG_S, retries=0) as client:

        def run() -> None:
            for answer in client.map([PICTURE] * 4, window=4, on_error="return"):
                codes.append(answer.code.value if isinstance(answer, JobFailed) else "answered")

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: server.client.stats()["leased"] > 0)
        server.process.send_signal(numbers[0])
        wait_until(lambda: "draining" in server.log)
        server.process.send_signal(numbers[1])
        wait_until(lambda: f"{numbers[1].name}: taken for the same stop" in server.log)
        thread.join(LONG_S)
    return codes


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_one_stop_that_comes_as_two_signals_drops_nothing(daemon: Any, wait_until: Any, again: signal.Signals) -> None:
    server = daemon(timed={"latency_ms": {1: 1200}}, batch=1)
    assert stop_in_the_midst(server, (signal.SIGTERM, again), wait_until) == ["answered"] * 4
    assert server.process.wait(LONG_S) == 0


def test_another_stop_later_does_not_wait(daemon: Any, wait_until: Any) -> None:
    server = daemon(timed={"latency_ms": {1: 60_000}}, drain_s=60, restarts={"stop_s": 0.5})
    with Client(server.endpoint, timeout_s=LONG_S, retries=0) as client:
        failed: list[JobFailed] = []

        def run() -> None:
            with pytest.raises(JobFailed) as caught:
                client.segment(PICTURE)
            failed.append(caught.value)

        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: server.client.stats()["leased"] == 1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining, 1 jobs to finish" in server.log)
        asked = time.monotonic()
        wait_until(lambda: time.monotonic() - asked > 1.1)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "SIGTERM again: not waiting" in server.log)
        thread.join(LONG_S)
    assert failed[0].code.value == "draining"
    assert server.process.wait(LONG_S / 2) == 0, "nor for the worker"


def test_a_reload_that_is_asked_for_during_another_one_follows_it(daemon: Any, wait_until: Any) -> None:
    server = daemon(devices=["cpu:0"])
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "checking settings" in server.log)
    server.rewrite(timed={"latency_ms": {1: 7}})
    for _ in range(300):  # more than a pipe of signals holds: they are one
        server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: server.log.count("reload: accepted") == 2, LONG_S)
    wait_until(lambda: server.client.segment(PICTURE).timings["device"] >= 0.007, LONG_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_during_the_start_ends_quietly(daemon: Any, wait_until: Any, number: signal.Signals) -> None:
    server = daemon(wait=False)

    def handled() -> bool:
        """SIGHUP's handler is the last to be set, and Python has none of its own."""
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        return bool(int(status["SigCgt"], 16) & 1 << signal.SIGHUP - 1)

    wait_until(handled)
    server.process.send_signal(number)
    assert server.process.wait(LONG_S) == 0
    assert "Traceback" not in server.log
