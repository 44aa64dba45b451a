"""Log lines where nobody reads them, for a while or for good."""
from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from checkout import ROOT

TALKER = """
import logging, os, sys
from blendmaskd import logs, settings, stderr
if "refused" in sys.argv:
    def refused(*_): raise PermissionError
    os.open = refused
logs.configure(settings.Log())
log = logging.getLogger("blendmaskd")
for number in range(3000):
    log.info("line %d of many, about nothing in particular", number)
print("done", flush=True)
sys.stdin.readline()
log.info("the last")
logging.shutdown()
"""
LINE = re.compile(r"\S+Z (INFO line (\d+) of many, about nothing in particular|"
                  r"WARNING (\d+) lines before this one are lost: stderr took no more|INFO the last)")  # fmt: skip


@pytest.fixture(params=["pipe", "socket", "refused"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int, str]]:
    """A stderr, who reads it, and how it is opened."""
    with contextlib.ExitStack() as closing:
        if request.param == "socket":
            reads, writes = (end.detach() for end in socket.socketpair())
        else:
            reads, writes = os.pipe()
        closing.callback(os.close, reads)
        yield reads, writes, request.param


def test_lines_that_nobody_reads_make_nobody_wait_and_are_counted(ends: tuple[int, int, str], wait_until: Any) -> None:
    reads, writes, how = ends
    with subprocess.Popen([sys.executable, "-c", TALKER, how], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=writes) as talker:  # fmt: skip
        os.close(writes)
        assert talker.stdout is not None
        assert talker.stdin is not None
        os.set_blocking(talker.stdout.fileno(), False)
        try:
            wait_until(lambda: talker.stdout.read() == b"done\n")  # it wrote more than anything holds
        except AssertionError:
            talker.kill()
            raise
        os.set_blocking(reads, False)
        text = b""
        with contextlib.suppress(BlockingIOError):  # what came so far
            while more := os.read(reads, 1 << 16):
                text += more
        os.set_blocking(reads, True)
        talker.stdin.write(b"\n")
        talker.stdin.flush()
        while more := os.read(reads, 1 << 16):
            text += more
    lines = [LINE.fullmatch(line) for line in text.decode().splitlines()]
    assert all(lines), "a line is torn"
    numbers = [int(line[2]) for line in lines if line and line[2]]
    lost = sum(int(line[3]) for line in lines if line and line[3])
    assert numbers == list(range(len(numbers))), "the first ones, in order"
    assert 0 < lost == 3000 - len(numbers)
    assert lines[-1] is not None
    assert lines[-1][1] == "INFO the last"


def test_a_daemon_whose_log_nobody_reads_serves_and_stops(daemon: Any) -> None:
    server = daemon(log={"jobs": True})
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    argv = [sys.executable, "-m", "blendmaskd", "--settings", server.settings_file]
    environment = {**os.environ, "TMPDIR": str(server.folder)}
    server.process = subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=writes)
    os.close(writes)
    server.wait_ready()
    assert len(list(server.client.map([np.zeros((32, 32, 3), np.uint8)] * 300))) == 300
    assert server.get("/readyz")[0] == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    os.close(reads)


@pytest.mark.parametrize("place", ["/dev/full", "closed"])
def test_a_stderr_that_takes_nothing_changes_no_exit_code(place: str) -> None:
    redirection = "2>&-" if place == "closed" else f"2>{place}"
    argv = f"{sys.executable} -m blendmaskd --settings /nowhere.yaml {redirection}"
    assert subprocess.run(["sh", "-c", argv], cwd=ROOT).returncode == 78
