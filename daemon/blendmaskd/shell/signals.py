"""Signals and standard streams: nothing of them is left to what started the daemon.

A parent's ignored and blocked signals are inherited, and closed streams too: a job runner that ignores SIGCHLD hides
how children end, one that blocks SIGTERM makes a daemon that cannot be stopped, and a closed stderr gives its number to
the next file that is opened, into which a library then writes what it has to say.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
from typing import Any

STOPS = (signal.SIGTERM, signal.SIGINT)
CAUGHT = (*STOPS, signal.SIGHUP)
IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}


def reset() -> None:
    """As if nothing had been inherited: every signal has its default and is let through, streams 0 to 2 are open."""
    for number in signal.valid_signals() - IGNORED_BY_PYTHON:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for stream in range(3):
        try:
            fcntl.fcntl(stream, fcntl.F_GETFD)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


class Signals:
    """What came of SIGTERM, SIGINT and SIGHUP since the last `take`; `fileno()` becomes readable with them.

    Until `serving`, a stop ends the process at once, as SystemExit: there is nothing to finish. As process 1 too, for
    which the kernel does nothing by default. A SIGHUP during the start is kept.
    """

    def __init__(self) -> None:
        self.serving = False
        self._came: dict[int, None] = {}
        self._wakes, self._wakeup = socket.socketpair()

    def __enter__(self) -> Signals:
        for end in (self._wakes, self._wakeup):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_signal) for number in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._wakes.close()
        self._wakeup.close()

    def fileno(self) -> int:
        return self._wakes.fileno()

    def take(self) -> list[signal.Signals]:
        """Each once, however often it came: the pipe only wakes, and may be full."""
        with contextlib.suppress(BlockingIOError):
            self._wakes.recv(1 << 16)
        came, self._came = self._came, {}
        return [signal.Signals(number) for number in came]

    def _on_signal(self, number: int, frame: Any) -> None:
        if number in STOPS and not self.serving:
            raise SystemExit(0)
        self._came[number] = None
