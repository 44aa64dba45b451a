"""Starts in odd places: they serve, or end with code 78 and one line, and `blendmaskd check` says the same."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.check import program
from blendmaskd.check.finding import Finding
from blendmaskd.probe import Probe, among, in_a_line
from blendmaskd.settings import Settings
from blendmaskd.shell.sockets import private_folder
from checkout import ROOT

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs `blendmaskd ARGUMENT`, with the timed engine, in an environment; a daemon is to end by itself."""

    def run(
        *arguments: str, environment: Mapping[str, str] | None = None, before: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        argv = [*before, sys.executable, "-m", "blendmaskd", *arguments, "--devices", "cpu:0"]
        for override in ("engine=timed", "endpoints.metrics=null", f"endpoints.clients=[ipc://{tmp_path}/c.sock]"):
            argv += ["--set", override]
        env = {**os.environ, **(environment or {})}
        return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(("variable", "value", "reason"), [
    ("RUNTIME_DIRECTORY", "/nowhere", "No such file or directory: '/nowhere"),
    ("RUNTIME_DIRECTORY", "/dev/null:/tmp", "Not a directory"),
    ("RUNTIME_DIRECTORY", "{long}", "at most 107 are possible; set RUNTIME_DIRECTORY to a shorter one"),
    ("TMPDIR", "{long}", "at most 107 are possible; set TMPDIR to a shorter one"),
])  # fmt: skip
def test_a_place_without_room_for_the_workers_socket_is_named(
    run: Run, tmp_path: Path, variable: str, value: str, reason: str
) -> None:
    long = tmp_path / ("of a batch system" * 6)
    long.mkdir()
    environment = {variable: value.format(long=long)}
    refused = run(environment=environment)
    assert refused.returncode == EXIT_CANNOT_BOOT
    [line] = refused.stderr.splitlines()
    assert line.startswith("blendmaskd: ")
    assert reason in line
    checked = run("check", environment=environment)
    assert checked.returncode == 1
    assert f"error    files        {line.removeprefix('blendmaskd: ')[:20]}" in checked.stdout
    assert checked.stderr == ""
    assert list(long.iterdir()) == []


@pytest.mark.parametrize("variable", ["RUNTIME_DIRECTORY", "TMPDIR"])
def test_a_relative_place_is_found_from_everywhere(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
        monkeypatch.setenv(variable, ".")
        monkeypatch.setattr(tempfile, "tempdir", None)
        with private_folder() as private:
            assert os.path.dirname(private) == os.path.realpath(folder)


def test_too_few_descriptors_are_told_before_zeromq_aborts(run: Run) -> None:
    few = ["sh", "-c", 'ulimit -n 20; exec "$@"', "sh"]
    refused = run(before=few)
    assert refused.returncode == EXIT_CANNOT_BOOT
    reason = "at most 20 files may be open, at least 64 are needed"
    assert refused.stderr == f"blendmaskd: {reason}; raise the hard limit (ulimit -Hn, LimitNOFILE=)\n"
    assert f"error    limits       {reason}" in run("check", before=few).stdout


def test_too_few_threads_are_told_before_zeromq_aborts(run: Run) -> None:
    few = ["bash", "-c", 'ulimit -s 1000000 -v 8000000; exec "$@"', "bash"]  # each thread reserves its stack
    refused = run(before=few, environment={"OMP_NUM_THREADS": "1"})
    assert refused.returncode == EXIT_CANNOT_BOOT
    assert re.fullmatch(
        r"blendmaskd: at most [3-9] threads can be started, at least 16 are needed; raise .*\n", refused.stderr
    )


def test_a_soft_limit_is_raised_before_it_is_met(daemon) -> None:
    assert daemon(files=8).client.stats()["serving"] == 2


def test_of_several_runtime_directories_the_first_is_used(daemon) -> None:
    with tempfile.TemporaryDirectory(prefix="bmd-") as first, tempfile.TemporaryDirectory(prefix="bmd-") as second:
        server = daemon(environment={"RUNTIME_DIRECTORY": f"{first}:{second}"})
        assert [each.name for each in Path(first).glob("*/workers.sock")] == ["workers.sock"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert list(Path(first).iterdir()) == []


def test_a_user_without_a_name_can_check(run: Run) -> None:
    """As in a container, where only the number of its user is known."""
    unnamed = ["unshare", "--user", "--map-user=65532", "--map-group=65532"]
    if subprocess.run([*unnamed, "true"], capture_output=True).returncode:
        pytest.skip("needs a user namespace")
    checked = run("check", before=unnamed)
    assert checked.stderr == ""
    assert "0 errors" in checked.stdout


def test_what_was_found_is_found_among_what_libraries_print() -> None:
    probe = Probe(name="Ascend910B3", bf16=True)
    assert among(f"[INFO] driver{in_a_line(probe)}[INFO] blendmaskd-probe {{}}, bye") == probe
    assert "did not say what it found, but '[INFO] driver'" in among("[INFO] driver").error


def test_a_library_that_prints_as_it_is_loaded_changes_no_finding(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(1, b'[INFO] RUNTIME: driver log')")
    paths = [f"{tmp_path}", *filter(None, [os.environ.get("PYTHONPATH")])]
    argv = [sys.executable, "-m", "blendmaskd", "check", "--devices", "cpu:0"]
    for override in ("model.config=configs/demo/demo.yaml", "model.weights=configs/demo/model_final.pth",
                     "endpoints.metrics=null", f"endpoints.clients=[ipc://{tmp_path}/c.sock]"):  # fmt: skip
        argv += ["--set", override]
    environment = {**os.environ, "PYTHONPATH": ":".join(paths)}
    checked = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert "0 errors" in checked.stdout
    assert checked.stderr == ""


def test_a_check_that_fails_in_an_unforeseen_way_is_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unforeseen(*_: object) -> list[Finding]:
        raise KeyError("of a host that nobody has seen")

    monkeypatch.setattr(program, "examine", unforeseen)
    assert program.main(lambda: Settings(engine="timed"), as_json=False) == 1
    assert "KeyError: 'of a host that nobody has seen'" in capsys.readouterr().out


def test_process_1_reaps_what_others_leave_behind(daemon, wait_until) -> None:
    """A subreaper is given orphans as process 1 is."""
    code = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER, kept over exec
for _ in range(3):
    if os.fork() == 0:
        if os.fork() == 0:
            sys.stdin.read(1)  # until the daemon is up
        os._exit(0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
    server = daemon()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)
    argv = [sys.executable, "-c", code, "-m", "blendmaskd", "--settings", server.settings_file]
    environment = {**os.environ, "TMPDIR": str(server.folder)}
    server.process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdin=subprocess.PIPE)
    server.wait_ready()
    assert server.process.stdin is not None
    server.process.stdin.close()
    own = psutil.Process(server.process.pid)
    wait_until(lambda: len(own.children()) == len(server.pids()))
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
