"""What the journals of runs share: lines that outlive the process, the lock on a run, and whether an image was changed.

Each line is given to the kernel at once, so that it outlives this process, and to the disk once a second, so that a
power failure costs the last second.
"""
from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from blendmaskd.programs.errors import OutputError, UsageError

SYNC_S = 1.0

Stamp = tuple[int, int] | None  # bytes and mtime in ns, see `stamp`


def stamp(path: Path) -> Stamp:
    """Tells whether a file was changed; None for one that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


class Lines:
    """A file to append lines to, by any thread. Everything raises `OutputError` where it cannot be written."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._synced = time.monotonic()
        with self._reported():
            flags |= os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self.fd = os.open(path, flags, 0o666)

    def write(self, line: bytes) -> None:
        left = memoryview(line + b"\n")
        with self._lock, self._reported():
            while left:
                left = left[os.write(self.fd, left) :]
            if time.monotonic() - self._synced >= SYNC_S:
                self.sync()

    def sync(self) -> None:
        """Give what was written to the disk."""
        self._synced = time.monotonic()
        with self._reported():
            try:
                getattr(os, "fdatasync", os.fsync)(self.fd)  # not everywhere
            except OSError as error:
                if error.errno != errno.EINVAL:  # no file on a disk
                    raise

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None


def read(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file and where each begins, but for a torn last one."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


def lock(fd: int, folder: Path, flag: str) -> None:
    """Hold `folder` until `fd` is closed. Raises `UsageError` where another run holds it; `flag` is what named it."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"another run is writing to {folder}/: wait for it, or choose another {flag}") from None
    except (OSError, ModuleNotFoundError):
        pass  # a file system, or a platform, without such locks
