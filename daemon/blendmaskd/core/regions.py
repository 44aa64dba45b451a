"""Regions of shared memory: which are open, what may be one. Pure; `blendmaskd.shell.shared_memory` does the rest.

A region counts in full, although its pages take memory only when its client writes to them: the bound holds whatever
the clients do. No process gets more than a share, and no user more than seven times what is left for others.
"""
from __future__ import annotations

import fcntl
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from blendmaskd.protocol import OpenRegion, Place, RegionError

MOST_REGIONS = 256  # each is two descriptors of the daemon's and a mapping in each worker
SHARES = 4  # of all bytes and all regions a process has at most one part in so many
SHARE = 7  # of all bytes the processes of one user have at most so many times what is left
PAGE = mmap.PAGESIZE  # 64 KiB on some ARM64 hosts


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory file that a client handed over, as the kernel describes it."""

    descriptor: int  # the daemon's
    inode: int
    bytes: int
    seals: int
    page_bytes: int
    pid: int  # of its client; 0: of another namespace
    uid: int = 0


def _bytes(regions: Iterable[Memory]) -> int:
    return sum(memory.bytes for memory in regions)


class Regions:
    """All regions that are open, by name. `max_bytes` bounds their sum; 0: there are none."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._regions: dict[str, Memory] = {}

    def __len__(self) -> int:
        return len(self._regions)

    def __iter__(self) -> Iterator[OpenRegion]:
        """What a worker must know of each."""
        for name in self._regions:
            yield self.opening(name)

    @property
    def bytes(self) -> int:
        """Of all that are open."""
        return _bytes(self._regions.values())

    def opening(self, name: str) -> OpenRegion:
        memory = self._regions[name]
        return OpenRegion(region=name, descriptor=memory.descriptor, inode=memory.inode, bytes=memory.bytes)

    def add(self, name: str, memory: Memory) -> None:
        """Open a region. Raises `RegionError` when this memory cannot be one."""
        if not self.max_bytes:
            raise RegionError("shared memory is off (shared_memory_bytes: 0)")
        if not memory.seals & fcntl.F_SEAL_SHRINK:
            raise RegionError("the memory is not sealed against shrinking (F_SEAL_SHRINK): workers could not map it")
        if memory.page_bytes != PAGE:
            raise RegionError("huge pages: reading where none is left would kill a worker")
        if memory.bytes < 1:
            raise RegionError("the memory has no bytes")
        siblings = [other for other in self._regions.values() if memory.pid and other.pid == memory.pid]
        if len(self) >= MOST_REGIONS or len(siblings) >= MOST_REGIONS // SHARES:
            raise RegionError(f"all {MOST_REGIONS} regions are in use, or this process has {MOST_REGIONS // SHARES}")
        left = max(min(self._left_for(memory.uid), self.max_bytes // SHARES - _bytes(siblings)), 0)
        if memory.bytes > left:
            raise RegionError(f"{memory.bytes} bytes: {left} are left for a region (shared_memory_bytes)", left)
        self._regions[name] = memory

    def _left_for(self, user: int) -> int:
        """Bytes, of which something stays for the others."""
        own = _bytes(other for other in self._regions.values() if other.uid == user)
        return (SHARE * (self.max_bytes - self.bytes) - own) // (SHARE + 1)

    def remove(self, name: str) -> None:
        del self._regions[name]

    def complaint(self, place: Place) -> str | None:
        """Why an image cannot lie there; None: it can."""
        if (region := self._regions.get(place.region)) is None:
            return f"region {place.region!r} does not exist, or has ended"
        if place.offset + place.bytes > region.bytes:
            return f"{place.bytes} bytes at {place.offset}: the region has {region.bytes}"
        return None
