"""Jobs, and the order in which they wait. Pure; the broker decides what becomes of them."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

import msgspec

from blendmaskd.core.suspects import Suspicion
from blendmaskd.protocol import Frames, Image, Options

What = Literal["accepted", "refused", "leased", "started", "suspected", "answered", "failed", "dropped"]


class Job(msgspec.Struct, eq=False):
    """One image to segment, as long as it has no answer."""

    seq: int
    client: bytes
    name: str
    image: Image
    options: Options
    payload: Frames
    priority: int
    accepted: float
    deadline: float
    attempts: int = 0  # times it was started on a worker that died
    losses: int = 0  # times it was leased to a worker that died
    worker: str | None = None  # the holder of its lease
    lease: int = 0
    leased_at: float = 0.0
    answered: bool = False
    suspicion: Suspicion | None = None  # of its image

    @property
    def suspect(self) -> bool:
        return self.suspicion is not None

    @property
    def payload_bytes(self) -> int:
        return sum(len(frame) for frame in self.payload) + (self.image.place.bytes if self.image.place else 0)


class Step(msgspec.Struct, frozen=True):
    """A change of a job's state, for those who follow it."""

    what: What
    job: str
    client: bytes
    accepted: float  # when the job came
    worker: str = ""
    lease: int = 0
    code: str = ""  # refused, failed: why; answered: ok
    reason: str = ""


class Account(msgspec.Struct, eq=False):
    """A client's unanswered jobs: those that wait, suspects among them, and those that are leased."""

    jobs: dict[str, Job] = {}
    bytes: int = 0
    leases: int = 0
    leased_bytes: int = 0

    @property
    def waiting(self) -> int:
        return len(self.jobs) - self.leases

    @property
    def waiting_bytes(self) -> int:
        return self.bytes - self.leased_bytes

    def add(self, job: Job) -> None:
        self.jobs[job.name] = job
        self.bytes += job.payload_bytes

    def remove(self, job: Job) -> None:
        del self.jobs[job.name]
        self.bytes -= job.payload_bytes

    def lease(self, job: Job) -> None:
        self.leases += 1
        self.leased_bytes += job.payload_bytes

    def end_lease(self, job: Job) -> None:
        self.leases -= 1
        self.leased_bytes -= job.payload_bytes

    def check(self) -> None:
        leased = [job for job in self.jobs.values() if job.worker is not None]
        assert self.leases == len(leased), "leases are miscounted"
        assert self.bytes == sum(job.payload_bytes for job in self.jobs.values()), "bytes are miscounted"
        assert self.leased_bytes == sum(job.payload_bytes for job in leased), "leased bytes are miscounted"


_Line = dict[int, OrderedDict[int, Job]]  # of one client. Priority: seq: job; no queue is empty


class Waiting:
    """Jobs that wait for any worker: clients take turns, whatever each has waiting.

    A client's own jobs go by priority and then by arrival. Only those below 0 know of others: they yield to every job
    of a higher priority, so a client can step back but not push in.
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[bytes, _Line]] = {}  # priority, at most 0: clients in turn; none is empty
        self._jobs = 0
        self.payload_bytes = 0

    def __len__(self) -> int:
        return self._jobs

    def __iter__(self) -> Iterator[Job]:
        for level in self._levels.values():
            for line in level.values():
                for queue in line.values():
                    yield from queue.values()

    def put(self, job: Job, first: bool = False) -> None:
        """Last of its client and priority; or first, and its client too: it was there before."""
        level = self._levels.setdefault(min(job.priority, 0), OrderedDict())
        queue = level.setdefault(job.client, {}).setdefault(job.priority, OrderedDict())
        queue[job.seq] = job
        if first:
            queue.move_to_end(job.seq, last=False)
            level.move_to_end(job.client, last=False)
        self._jobs += 1
        self.payload_bytes += job.payload_bytes

    def next(self) -> Job:
        """Take out the job whose turn it is; its client's next turn comes after all others'."""
        level = self._levels[max(self._levels)]
        client, line = next(iter(level.items()))
        job = self.take(next(iter(line[max(line)].values())))
        if client in level:
            level.move_to_end(client)
        return job

    def take(self, job: Job) -> Job:
        """Out of here, from wherever it stands."""
        level = self._levels[min(job.priority, 0)]
        line = level[job.client]
        del line[job.priority][job.seq]
        if not line[job.priority]:
            del line[job.priority]
        if not line:
            del level[job.client]
        if not level:
            del self._levels[min(job.priority, 0)]
        self._jobs -= 1
        self.payload_bytes -= job.payload_bytes
        return job

    def check(self) -> None:
        jobs = list(self)
        assert self._jobs == len(jobs), "jobs are miscounted"
        assert self.payload_bytes == sum(job.payload_bytes for job in jobs), "bytes are miscounted"
        lines = [line for level in self._levels.values() for line in level.values()]
        assert all(self._levels.values()), "an empty level is kept"
        assert all(line and all(line.values()) for line in lines), "an empty queue is kept"
