"""Regions of shared memory: whose each is, and how many bytes are left for whom. Pure; `daemon/shared_memory.py` has
the files.

A region is granted in full when it is opened, although its pages take memory only when they are written to: the bound
holds whatever the clients do. No client gets more than a share, so that one cannot take all.
"""
from __future__ import annotations

from dataclasses import dataclass

from daemon.protocol import Place

MOST_REGIONS = 256  # each is a file that the daemon and the workers hold open
MOST_OF_A_CLIENT = 4  # one in use, and those that it replaced, until their jobs are answered
SHARES = 4  # of all bytes a client gets at most one part in so many
PAGE = 4096


class RegionError(RuntimeError):
    """Shared memory that cannot be had, or read; the text says why."""


@dataclass(frozen=True, slots=True)
class Region:
    """What a client was granted."""

    client: bytes
    size: int  # bytes


class Regions:
    """All regions that are open, by name. `max_bytes` bounds their sum; 0: none are granted."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._regions: dict[str, Region] = {}

    def __len__(self) -> int:
        return len(self._regions)

    @property
    def granted(self) -> int:
        """Bytes, of all regions."""
        return sum(region.size for region in self._regions.values())

    def of(self, client: bytes) -> list[str]:
        """The names of a client's regions."""
        return [name for name, region in self._regions.items() if region.client == client]

    def grant(self, client: bytes, wanted: int) -> int:
        """How many bytes, whole pages, a new region of this client has. Raises `RegionError` when it gets none."""
        if not self.max_bytes:
            raise RegionError("shared memory is off (shared_memory_bytes: 0)")
        own = [self._regions[name].size for name in self.of(client)]
        if len(own) >= MOST_OF_A_CLIENT:
            raise RegionError(f"a client has at most {MOST_OF_A_CLIENT} regions")
        left = min(self.max_bytes - self.granted, self.max_bytes // SHARES - sum(own))
        size = min(-(-wanted // PAGE), left // PAGE) * PAGE
        if size <= 0 or len(self) >= MOST_REGIONS:
            raise RegionError("no shared memory is left (shared_memory_bytes)")
        return size

    def add(self, name: str, client: bytes, size: int) -> None:
        self._regions[name] = Region(client, size)

    def remove(self, name: str) -> None:
        self._regions.pop(name, None)

    def complaint(self, client: bytes, place: Place) -> str | None:
        """Why a client's image cannot lie there; None: it can."""
        region = self._regions.get(place.region)
        if region is None or region.client != client:  # in the same words: names are secrets
            return f"region {place.region!r}: this client has none of that name, or has it no more"
        if place.offset + place.bytes > region.size:
            return f"{place.bytes} bytes at {place.offset}: the region has {region.size}"
        return None
