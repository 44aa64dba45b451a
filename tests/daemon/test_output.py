"""Programs whose output cannot be written: quiet into a pipe that was closed, one line about a full disk."""
from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blendmaskd import extras
from blendmaskd.programs import submit
from checkout import ROOT

PROGRAMS = ("stats", "submit", "keys", "evaluate_coco", "serve")
CHECK = ["check", "--devices", "cpu:0", "--set", "engine=timed", "--set", "endpoints.metrics=null"]


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.fixture
def full_disk() -> Iterator[int]:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def run(program: str, words: list[str], stdout: int, stderr: int = subprocess.PIPE) -> tuple[int, str]:
    """Exit code, and what it says on stderr."""
    code = f"import sys; from blendmaskd.commands import {program}; sys.exit({program}())"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=buffered, stdout=stdout, stderr=stderr, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr or ""


def calls(daemon: Any) -> list[tuple[str, list[str]]]:
    stats = [("stats", [daemon.endpoint, *words]) for words in ([], ["--json"], ["--watch"], ["--watch", "--json"])]
    return [*stats, ("serve", CHECK), ("serve", [*CHECK, "--json"])]


def test_into_a_closed_pipe_they_end_quietly(shared_daemon: Any, closed_pipe: int) -> None:
    for program, words in calls(shared_daemon):
        assert run(program, words, closed_pipe) == (1, ""), (program, words)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_that_nobody_can_read_is_no_error_of_python(program: str, closed_pipe: int, full_disk: int) -> None:
    assert run(program, ["--help"], closed_pipe)[1] == ""
    assert "Exception ignored" not in run(program, ["--help"], full_disk)[1]  # argparse itself says nothing


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_the_paragraphs_of_a_help_fit_the_terminal_and_examples_stand(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        submit.main(["--help"])
    printed, text = capsys.readouterr().out, submit.__doc__ or ""
    prose = [line for line in printed.splitlines() if not line.startswith(" ")]
    assert max(map(len, prose)) <= columns
    assert all(example in printed for example in re.findall(r"(?m)^    python .*", text))
    assert (text.rstrip("\n").rpartition("\n\n")[2] in printed) == (columns > 120)


def test_on_a_full_disk_they_end_with_its_reason(shared_daemon: Any, full_disk: int) -> None:
    for program, words in calls(shared_daemon):
        code, said = run(program, words, full_disk)
        assert (code, said.count("\n")) == (4, 1), (program, words, said)
        assert said.endswith("cannot write its output: No space left on device\n")


def test_keys_are_kept_though_nobody_reads_of_them(closed_pipe: int, tmp_path: Any) -> None:
    assert run("keys", ["server", str(tmp_path)], closed_pipe) == (1, "")
    assert (tmp_path / "server.key_secret").exists()


def test_an_error_that_nobody_can_read_keeps_its_code(closed_pipe: int) -> None:
    assert run("stats", ["nonsense"], closed_pipe, stderr=closed_pipe)[0] == 2


@pytest.mark.parametrize("name", ["schl\u00fcssel", os.fsdecode(b"not \xff text")])
def test_names_that_a_terminal_cannot_show_are_escaped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii:strict")
    (tmp_path / name).mkdir()
    for words in (["server", str(tmp_path / name)], ["client", "alice", "--to", str(tmp_path / name)]):
        assert run("keys", words, subprocess.DEVNULL) == (0, "")


def test_an_interrupt_while_libraries_are_loaded_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loads_long.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    assert extras.run("program", "loads_long") == 130


def test_a_list_of_keys_on_a_full_disk_ends_with_its_reason(full_disk: int, tmp_path: Any) -> None:
    assert run("keys", ["server", str(tmp_path)], subprocess.DEVNULL)[0] == 0
    for number in range(300):  # more than is kept until the end
        (tmp_path / f"{number}.key").hardlink_to(tmp_path / "server.key")
    said = "blendmaskd-keys: cannot write its output: No space left on device\n"
    assert run("keys", ["list", str(tmp_path)], full_disk) == (4, said)
