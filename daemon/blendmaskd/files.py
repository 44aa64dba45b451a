"""Files that are written whole or not at all: a reader never sees half of one, whatever dies meanwhile. And files that
are read where nobody may be kept waiting.
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_OPTIONAL = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # the first two of Unix, the last of Windows
READING = sum((getattr(os, name, 0) for name in _OPTIONAL), os.O_RDONLY)
LONGEST_NAME = 100  # bytes; most file systems take 255, some fewer


@contextmanager
def whole(path: Path, *, over: bool = True, mark: str = "") -> Iterator[Path]:
    """A path beside `path` to write to: that file takes its place after the block, or is removed if the block raises.

    Without `over` a file that is there already stays: raises FileExistsError. `mark` tells those apart who write the
    same file at once, by default the process. Where a lock keeps others off, a fixed one is better: the next run then
    writes over what a killed one left.
    """
    if os.path.exists(path) and not (path.is_file() or path.is_dir()):  # such as /dev/null, which root would replace
        raise FileExistsError(errno.EEXIST, "exists, and is no regular file", str(path))
    name = os.fsencode(path.name)  # a digest stands for one to which nothing may be added on some disks
    short = path.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()
    beside = path.with_name(f".{short}.{mark or os.getpid()}")
    try:
        yield beside
        if over:
            beside.replace(path)
        else:
            path.hardlink_to(beside)
    finally:
        beside.unlink(missing_ok=True)


def open_file(path: str | os.PathLike[str]) -> int:
    """A descriptor for reading. Raises OSError, also for what is no file: opening a pipe may take for ever."""
    descriptor = os.open(path, READING)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "not a file", os.fspath(path))


def write_json(path: Path, tree: Any) -> None:
    """Write it whole or not at all: a reader never sees half a file. Floats keep all their digits."""
    with whole(path) as beside:
        beside.write_text(json.dumps(tree), encoding="utf-8")


def text_of(path: Path) -> str:
    r"""A path as text that every encoding of Unicode has: bytes of a name that are no UTF-8 are written as ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
