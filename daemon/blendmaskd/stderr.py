"""Log lines to stderr, without ever waiting for whoever reads them: a reader that stops must not stop a loop.

What does not fit is kept, up to a bound, and goes out before the next line; lines beyond that are counted, and the
number is told when there is room again. A full disk or a reader that has gone costs lines, and nothing else.

Python's stderr cannot be made not to wait: its mode belongs to everybody who has it, the shell among them. So a pipe or
a terminal is opened once more, for this process alone; a socket is told with each message; files make nobody wait.
"""
from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import stat
import time
from collections.abc import Callable

STDERR = 2
MOST_UNSENT = 1 << 16  # bytes
LAST_S = 1.0  # for what is left at the end


class Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._ends = contextlib.ExitStack()
        self._write = self._writer()
        self._unsent = bytearray()
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        self._send()
        if len(self._unsent) > MOST_UNSENT:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._put(logging.makeLogRecord({"name": record.name, "levelno": logging.WARNING, "levelname": "WARNING",
                                             "msg": f"{lost} lines before this one are lost: stderr took no more"}))
        self._put(record)
        self._send()

    def flush(self) -> None:
        """Called as the process ends: what is left has so long."""
        deadline = time.monotonic() + LAST_S
        with self.lock or contextlib.nullcontext():
            while self._unsent and (left := deadline - time.monotonic()) > 0:
                _wait_for_room(left)
                self._send()

    def close(self) -> None:
        self._ends.close()
        super().close()

    def _put(self, record: logging.LogRecord) -> None:
        try:
            self._unsent += f"{self.format(record)}\n".encode(errors="backslashreplace")
        except Exception:
            self.handleError(record)  # of a line's arguments

    def _send(self) -> None:
        try:
            while self._unsent:
                del self._unsent[: self._write(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._lost += 1
            self._unsent.clear()

    def _writer(self) -> Callable[[bytearray], int]:
        """Writes some of what it is given, at least a byte; raises BlockingIOError rather than wait."""
        try:
            mode = os.fstat(STDERR).st_mode
        except OSError:
            return len
        if stat.S_ISSOCK(mode):
            duplicate = self._ends.enter_context(socket.socket(fileno=os.dup(STDERR)))
            return lambda data: duplicate.send(data, socket.MSG_DONTWAIT)
        if stat.S_ISREG(mode):
            return lambda data: os.write(STDERR, data)
        try:
            own = os.open(f"/proc/self/fd/{STDERR}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:  # of another user, say
            return _write_where_there_is_room
        self._ends.callback(os.close, own)
        return lambda data: os.write(own, data)


def _wait_for_room(seconds: float) -> bool:
    poll = select.poll()
    poll.register(STDERR, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def _write_where_there_is_room(data: bytearray) -> int:
    """It waits after all where another process takes the room meanwhile."""
    if not _wait_for_room(0.0):
        raise BlockingIOError
    return os.write(STDERR, data[: select.PIPE_BUF])
