"""Shared memory for local clients: regions, files on /dev/shm that clients write images to and workers read.

The daemon makes a region's file at a client's request and tells the client its path (`protocol.Region`); the client
divides it into *places*, one for each image in flight. Rules that keep everybody alive and nothing behind:

- **Workers copy** what they need by pread, and never map the file: a client that truncates or rewrites its region under
  a worker gets a clear answer to that job. A mapped file would kill the worker with SIGBUS, or change between the
  check of an image and its decoding. The copy costs a fraction of what the socket does.
- **A region ends with its client.** The client holds a POSIX lock on the file, which the kernel drops when it closes
  the file or dies; once a second the daemon tries all locks. Ending means: unlinked, and workers close it.
- **A folder ends with its daemon.** It is removed when the daemon stops; what a killed one left is swept by the next,
  which knows by a lock on the folder that nobody lives there.
- **Who may connect may read and write.** A file's mode is that of the clients' ipc sockets: their `w` bits as `rw`. The
  folder cannot be listed, and the names are 128 random bits, so a client knows only its own.

No mmap belongs in here, and no path that a client named. Not `multiprocessing.shared_memory`, whose resource tracker
unlinks at exit what a process has only attached to.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from daemon.protocol import GRACE_S, Place
from daemon.regions import RegionError

PARENT = "/dev/shm"
PREFIX = "blendmaskd-"


@dataclass(slots=True)
class _File:
    descriptor: int
    size: int
    lock_by: float  # until then its client may not have locked it yet


class SharedMemory:
    """The daemon's folder of regions. Where there can be none, `folder` is empty and `problem` says why."""

    def __init__(self, sockets: Iterable[str]) -> None:
        """`sockets` are the paths of the ipc sockets that clients connect to."""
        self._sockets = list(sockets)
        self._files: dict[str, _File] = {}
        self.folder = self.problem = ""
        try:
            sweep()
            self.folder, self._lock = _make_folder()
        except OSError as error:
            self.problem = f"{PARENT}: {error.strerror}"

    def create(self, size: int, now: float) -> tuple[str, str]:
        """A new region of `size` bytes: its name and path. Raises `RegionError`."""
        if not self.folder:
            raise RegionError(self.problem)
        name = secrets.token_hex(16)
        path = f"{self.folder}/{name}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._files[name] = _File(descriptor, size, now + GRACE_S)
            os.ftruncate(descriptor, size)
            os.fchmod(descriptor, _mode(self._sockets))
        except OSError as error:
            self.remove(name)
            raise RegionError(f"{path}: {error.strerror}") from None
        return name, path

    def remove(self, name: str) -> None:
        """End a region. Its memory is free when nobody has it open any more."""
        file = self._files.pop(name, None)
        if file is not None:
            with contextlib.suppress(FileNotFoundError):  # a logout may clear /dev/shm (logind's RemoveIPC)
                os.unlink(f"{self.folder}/{name}")
            os.close(file.descriptor)

    def abandoned(self, now: float) -> list[str]:
        """The regions whose clients have gone, never came, or do not keep to the size."""
        return [name for name, file in self._files.items() if _is_abandoned(file, now)]

    def close(self) -> None:
        for name in list(self._files):
            self.remove(name)
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)


class Reader:
    """A worker's way to regions: by name, below the daemon's folder. Keeps them open. For any thread."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._open: dict[str, _Descriptor] = {}

    def read(self, place: Place) -> bytes:
        """A copy of what lies there. Raises `RegionError` when the region has ended or has lost bytes."""
        file = self._open.get(place.region) or self._open_region(place.region)
        try:
            found = os.pread(file.number, place.bytes, place.offset)
        except OSError as error:
            raise RegionError(f"region {place.region}: {error.strerror}") from None
        if len(found) != place.bytes:
            raise RegionError(f"region {place.region} was truncated: {len(found)} bytes where {place.bytes} should be")
        return found

    def close(self, region: str) -> None:
        """It has ended. A read that is under way keeps it open until it is done."""
        self._open.pop(region, None)

    def _open_region(self, name: str) -> _Descriptor:
        try:
            number = os.open(f"{self._folder}/{name}", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise RegionError(f"region {name} has ended: {error.strerror}") from None
        file = self._open[name] = _Descriptor(number)
        if os.fstat(number).st_nlink == 0:  # it ended just now; the word to close it may have come before this
            self.close(name)
        return file


class _Descriptor:
    """Closed when the last who uses it has let go, so that its number is not another file's under a reader."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def sweep() -> None:
    """Remove the folders that killed daemons of this user left."""
    for path in Path(PARENT).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another's, or another daemon was quicker
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _make_folder() -> tuple[str, int]:
    """A folder, and the descriptor that holds its lock for as long as this daemon lives."""
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=PARENT)
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # another daemon sweeps it before it is locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.chmod(folder, 0o711)
            except OSError:
                os.close(lock)
                raise
            return folder, lock


def _mode(sockets: Iterable[str]) -> int:
    """Who may connect to one of the sockets (its `w` bits) may read and write; the owner always may."""
    writers = 0o200
    for path in sockets:
        with contextlib.suppress(OSError):
            writers |= stat.S_IMODE(os.stat(path).st_mode) & 0o222
    return writers | writers << 1


def _is_abandoned(file: _File, now: float) -> bool:
    if os.fstat(file.descriptor).st_size != file.size:
        return True
    try:
        fcntl.lockf(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
    except OSError:  # EAGAIN or EACCES: it is held
        file.lock_by = now  # from now on its freedom means that the client has gone
        return False
    fcntl.lockf(file.descriptor, fcntl.LOCK_UN, 1)
    return now > file.lock_by
