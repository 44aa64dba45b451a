"""Processes that do a section's work, each with a time that it may take; what it has told is kept however it ends.

A device can take a process along (a driver's abort, an error that stays in its context, a hang), so none is opened
where the report is. A child tells rows, a line of JSON each; what it prints otherwise goes into the log.
"""
from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

END_S = 10.0  # for a child to end by itself: the benchmark stops its daemon
ATTEMPTS = 2  # of a child that dies before it has told anything: drivers have hiccups
HANGS_S = 60.0  # who is not ready then; before, there was not enough time
CHUNK = 1 << 16
TIME_IS_UP = "the time was up"  # why a row was skipped

Row = dict[str, Any]
Tell = Callable[..., None]  # tells a row
Start = Callable[..., subprocess.Popen[bytes]]  # with options of `subprocess.Popen`


class ChildError(RuntimeError):
    """A child that ended badly or was too slow; the text says how. `row`: the same, as ``failed`` or ``skipped``."""

    def __init__(self, reason: str, kind: str = "failed") -> None:
        super().__init__(reason)
        self.row: Row = {kind: reason}


def program(argv: Sequence[str], environment: Mapping[str, str]) -> Start:
    """Python with these arguments."""
    return lambda **popen: subprocess.Popen([sys.executable, *argv], env=environment, **popen)


def rows(start: Start, seconds: float, log: Path) -> Iterator[Row]:
    """What a child tells within `seconds`; it is started once more if it dies before that. Raises `ChildError`."""
    deadline = time.monotonic() + seconds
    for attempt in range(1, ATTEMPTS + 1):
        told = False
        try:
            for line in lines(start, deadline, log):
                told = True
                yield json.loads(line)
            return
        except ChildError:
            if told or attempt == ATTEMPTS or time.monotonic() >= deadline:
                raise


def lines(start: Start, deadline: float, log: Path) -> Iterator[bytes]:
    """The lines of a child's output until it ends; it is ended at the deadline. Raises `ChildError`."""
    begun = time.monotonic()
    with log.open("ab") as errors:
        place = errors.seek(0, os.SEEK_END)
        process = start(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            yield from _read(process, deadline)
            process.wait(max(deadline - time.monotonic(), 0))
        except (TimeoutError, subprocess.TimeoutExpired):
            took_s = time.monotonic() - begun
            raise ChildError(f"not ready within {took_s:.0f} s", "failed" if took_s > HANGS_S else "skipped") from None
        finally:
            end(process)
    if process.returncode:
        raise ChildError(f"{_last_line(log, place)} ({_ending(process.returncode)})")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a child that runs, and what it has left behind in its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


@contextlib.contextmanager
def telling() -> Iterator[Tell]:
    """In a child: tells a row of these names and values. What libraries print does not come between the rows."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        yield lambda **row: print(json.dumps(row), file=out)


def _read(process: subprocess.Popen[bytes], deadline: float) -> Iterator[bytes]:
    assert process.stdout is not None
    started = b""
    while chunk := _chunk(process.stdout.fileno(), deadline):
        *whole, started = (started + chunk).split(b"\n")
        yield from whole


def _chunk(descriptor: int, deadline: float) -> bytes:
    if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
        raise TimeoutError
    return os.read(descriptor, CHUNK)


def _last_line(log: Path, place: int) -> str:
    with log.open("rb") as file:
        file.seek(place)
        said = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")


def _ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
