"""How these tests run: by scripts/test.sh and in tiers; what children inherit; how a run ends that is stopped."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkout import ROOT, SOURCES

TESTS = Path(__file__).resolve().parent
SCRIPT = ROOT / "scripts" / "test.sh"
MASKS = "test_detections_and_masks_agree_in_the_photograph"
VARIANTS = ["R_50_1x", "R_101_3x", "R_101_dcni3_5x", "550_R_50_3x", "DLA_34_syncbn_4x", "RT_R_50_4x_syncbn_shtw",
            "RT_R_50_4x_bn-head_syncbn_shtw", "small_R18_scale", "small_R18_naivegn"]  # fmt: skip
DEFAULT_TIER = {
    "the cores": ["daemon/test_broker.py", "daemon/test_broker_shares.py", "daemon/test_broker_suspects.py",
                  "daemon/test_stats.py", "daemon/test_supervisor.py", "daemon/test_topology.py",
                  "workers/test_batching.py"],
    "their state machines": ["daemon/test_broker_machine.py::TestBroker", "daemon/test_daemon_machine.py::TestDaemon",
                             "daemon/test_durable_machine.py::TestDurable",
                             "daemon/test_supervisor.py::TestSupervisor"],
    "the wire's bytes": ["daemon/test_protocol.py"],
    "clients": ["daemon/test_async_client.py", "daemon/test_client_failures.py", "daemon/test_client_images.py",
                "daemon/test_client_map.py", "daemon/test_submit.py"],
    "images and masks": ["daemon/test_images.py", "workers/test_masks.py", "workers/test_results.py"],
    "a golden of each variant": [f"blendmask/test_golden.py::{MASKS}[{network}" for network in VARIANTS],
    "kill -9, reload and drain": ["faults/test_faults.py::test_kill_9_of_either_worker",
                                  "faults/test_stop_and_reload.py::test_sighup_under_load_replaces_workers_one_at_a_time",
                                  "faults/test_stop_and_reload.py::test_sigterm_under_load_answers_what_was_accepted"],
    "the quickstart": ["test_quickstart.py"],
    "the documents' examples": ["daemon/test_documentation.py::test_the_readmes_raw_client_runs_as_it_stands",
                                "daemon/test_documentation.py::test_commands_that_are_said_to_run_do"],
}  # fmt: skip


def nested(folder: Path, test: str, **options: Any) -> subprocess.Popen[str]:
    """pytest on this test alone, with the conftest.py of these tests, in a folder of its own."""
    (folder / "test_nested.py").write_text(test)
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}:{SOURCES}", "PYTEST_ADDOPTS": ""}
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", os.devnull, "--rootdir", "."]
    return subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, **options)


def ignore_and_block_all() -> None:
    """As the worst of starters does."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())


SHOWING = """
import subprocess

def test_it():
    subprocess.run(["grep", "^Sig[BI]", "/proc/self/status"])
    assert False, "to show it"
"""


def test_children_have_default_signals_however_the_tests_were_started(tmp_path: Path) -> None:
    output, _ = nested(tmp_path, SHOWING, preexec_fn=ignore_and_block_all).communicate(timeout=60)
    assert dict(re.findall(r"(Sig\w+):\s+(\w+)", output)) == {"SigBlk": "0" * 16, "SigIgn": "0" * 16}, output


WAITING = """
import pathlib, signal

def test_it(daemon):
    running = daemon(devices=["cpu:0"])
    pathlib.Path("pids").write_text(" ".join(str(process.pid) for process in running.processes()))
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_run_that_is_ended_leaves_no_process(tmp_path: Path, wait_until: Any, number: signal.Signals) -> None:
    running = nested(tmp_path, WAITING)
    pids = tmp_path / "pids"
    wait_until(lambda: running.poll() is not None or (pids.exists() and pids.read_text()), 60)
    running.send_signal(number)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == pytest.ExitCode.INTERRUPTED, output
    assert [pid for pid in pids.read_text().split() if psutil.pid_exists(int(pid))] == []


def test_the_default_tier_has_some_of_everything() -> None:
    [chosen] = re.findall(r'-m "(.+)"', SCRIPT.read_text())
    wanted = [test for tests in DEFAULT_TIER.values() for test in tests]
    files = sorted({str(TESTS / test.partition("::")[0]) for test in wanted})
    argv = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-m", chosen, *files]
    done = subprocess.run(argv, cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [test for test in wanted if f"\ntests/{test}" not in f"\n{done.stdout}"] == []
