"""Workers that are ready, and the leases that each holds. Pure."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import msgspec

from blendmaskd.core.jobs import Job
from blendmaskd.core.suspects import Identity


class HeldLease(msgspec.Struct, eq=False):
    """What a worker was sent and has not ended."""

    job: Job | None  # None: answered early
    alone: bool = False  # nothing may keep it company: it was a suspect
    started: bool = False
    identity: Identity | None = None  # of its image, once its job was answered early


class Worker(msgspec.Struct, eq=False):
    """A worker that is ready."""

    name: str
    device: str
    window: int
    progress: float  # when it last ended or started a lease, or went from idle to busy
    heard: float  # when it last said anything
    leases: dict[int, HeldLease] = {}
    retiring: bool = False  # gets no new leases
    evicted: bool = False  # hangs, and is being ended
    served: bool = False  # has finished an image

    @property
    def alone(self) -> bool:
        """Nothing may keep what it holds company."""
        return len(self.leases) == 1 and next(iter(self.leases.values())).alone

    @property
    def load(self) -> float:
        return len(self.leases) / self.window

    def stall_deadline(self, stall_s: float) -> float:
        """When it counts as hanging."""
        if self.evicted:
            return math.inf
        oldest = min(self.progress, self.heard) if self.leases else self.heard
        return oldest + stall_s


def held(workers: Iterable[Worker]) -> Iterator[HeldLease]:
    for worker in workers:
        yield from worker.leases.values()
