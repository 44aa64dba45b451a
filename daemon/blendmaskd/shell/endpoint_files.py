"""The files of an ipc endpoint: its socket, the one for shared memory (`MEMORY_SUFFIX`), and the lock beside them.

ZeroMQ takes a path over from whatever is there, a running daemon included. So the lock keeps a second daemon off, we
bind by ourselves, and only a socket to which nobody listens is removed: what else is there is not ours. A lock has no
bytes, so a file that has some is none.

Others may remove what we made while we run. A second daemon is kept off all the same: the kernel still lists the path
of each socket that is listened to.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

from blendmaskd.endpoints import LOCK_SUFFIX, SOCKET_PATH_BYTES
from blendmaskd.protocol import MEMORY_SUFFIX

LISTENS = 0x10000  # __SO_ACCEPTCON in /proc/net/unix

_KINDS = {
    stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


class EndpointTaken(Exception):
    """Something else is at an endpoint's path; the text names it."""


class EndpointFiles:
    """The endpoint is ours from here on. Raises `EndpointTaken`, then nothing was touched, and OSError."""

    def __init__(self, path: str) -> None:
        if taken := obstacle(path):
            raise EndpointTaken(taken)
        self._sockets = path, f"{path}{MEMORY_SUFFIX}"
        self._made: dict[str, tuple[int, int, int]] = {}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = f"{path}{LOCK_SUFFIX}"
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            self._take(path)
        except BaseException:
            os.close(self._lock)
            raise
        self.made(lock)

    def _take(self, path: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EndpointTaken(f"another daemon serves {path}") from None
        if taken := obstacle(path):  # asked again, now that no other daemon can come in between
            raise EndpointTaken(taken)
        _unlink(self._sockets)

    def made(self, path: str) -> None:
        """This file is one of ours."""
        self._made[path] = _identity(path)

    def missing(self) -> list[str]:
        """What others have removed or replaced since."""
        return [path for path, identity in self._made.items() if _identity(path) != identity]

    def close(self) -> None:
        missing = self.missing()
        _unlink(path for path in self._sockets if path in self._made and path not in missing)
        os.close(self._lock)


def obstacle(path: str) -> str:
    """Why a daemon may not have this path, whoever holds its lock; empty: it may. Touches nothing."""
    sockets = path, f"{path}{MEMORY_SUFFIX}"
    for name in sockets:
        if (kind := _kind(name)) not in ("", "a socket"):
            return f"{name} is {kind}, which is not the daemon's"
    lock = f"{path}{LOCK_SUFFIX}"
    if (kind := _kind(lock)) not in ("", "a file") or (kind and os.lstat(lock).st_size):
        return f"{lock} is {kind}, which is not the daemon's lock"
    used = next((f"{name}: {why}" for name in sockets if (why := _in_use(name))), "")
    return f"another daemon serves {path}" if used and is_locked(lock) else used


def is_locked(path: str) -> bool:
    """Whether a process holds this lock, of those that this user may read."""
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # what is no lock may be a pipe, and wait
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:  # of another kind where the file system has no locks
        return isinstance(error, BlockingIOError)
    finally:
        os.close(lock)
    return False


def _kind(path: str) -> str:
    """What is there; empty: nothing, or nothing that this user can see, and whoever uses it is told why."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return ""
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def _identity(path: str) -> tuple[int, int, int]:
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0, 0
    return found.st_dev, found.st_ino, stat.S_IFMT(found.st_mode)


def _unlink(paths: Iterable[str]) -> None:
    """In their order: where an ipc socket is without the other one, its daemon has no shared memory."""
    for path in paths:
        with contextlib.suppress(OSError):  # who listens there next says what is wrong
            os.unlink(path)


def _in_use(path: str) -> str:
    """Why a socket must stay; empty: nobody listens to it."""
    if _is_listed(path):
        return "another process listens there" + ("" if _kind(path) else ", although its socket was removed")
    if not _kind(path) or len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        return ""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as trial:
        number = trial.connect_ex(path)
    if number in (errno.ENOENT, errno.ECONNREFUSED):
        return ""
    return "a socket of another user" if number in (errno.EACCES, errno.EPERM) else "another process listens there"


def _is_listed(path: str) -> bool:
    """Whether the kernel knows of somebody who listens at this path, whatever has become of the file."""
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError), open("/proc/self/net/unix", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=7)
            if len(fields) < 8 or not fields[7].endswith(f"/{name}") or not int(fields[3], 16) & LISTENS:
                continue
            if os.path.realpath(os.path.dirname(fields[7])) == os.path.realpath(folder):
                return True
    return False
