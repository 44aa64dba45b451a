"""Images for shared memory, and the memory files that they lie in."""
from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

Pixels = npt.NDArray[np.uint8]


def pixels(number: int, height: int = 200, width: int = 300) -> Pixels:
    """An image that differs from every other number's; 180 kB."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def memory_file(size: int, seals: int = SEALS, flags: int = 0) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | flags)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def memory_of(pid: int) -> list[os.stat_result]:
    """The memory files that a process has open."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith("/memfd:"):
                found.append(link.stat())
    return found
