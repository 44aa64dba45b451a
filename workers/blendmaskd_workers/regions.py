"""Regions of shared memory, as a worker has them: mapped from the daemon's descriptors, to be read where they are.

A client may change its pixels meanwhile, and harms its own answer; it cannot take the memory away, which is sealed (see
`blendmaskd.shell.shared_memory`). Must never write, and never follow a name that a client chose.
"""
from __future__ import annotations

import mmap
import os

from blendmaskd.protocol import OpenRegion, Place, RegionError


class Regions:
    """What is open. `open` and `close` are the main thread's, `view` is for any thread."""

    def __init__(self, daemon_pid: int) -> None:
        self._daemon_pid = daemon_pid
        self._open: dict[str, mmap.mmap | str] = {}  # or why it could not be mapped

    def open(self, message: OpenRegion) -> None:
        """The daemon has a new region."""
        try:
            self._open[message.region] = _map(f"/proc/{self._daemon_pid}/fd/{message.descriptor}", message)
        except OSError as error:
            self._open[message.region] = str(error)

    def close(self, region: str) -> None:
        """It has ended. Unmapped when nobody looks at it any more."""
        self._open.pop(region, None)

    def view(self, place: Place) -> memoryview:
        """What lies there. Raises `RegionError`."""
        found = self._open.get(place.region, "it has ended")
        if isinstance(found, str):
            raise RegionError(f"region {place.region}: {found}")
        return memoryview(found)[place.offset : place.offset + place.bytes]


def _map(path: str, message: OpenRegion) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino != message.inode:
            raise FileNotFoundError("it has ended")  # and the descriptor is another file's
        return mmap.mmap(descriptor, message.bytes, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
