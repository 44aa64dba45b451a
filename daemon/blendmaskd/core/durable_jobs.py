"""Durable jobs without an answer in the spool: their states, the lines they wait in, and who is owed what. Pure."""
from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from enum import Enum

import msgspec

from blendmaskd.core import spool_messages as spool
from blendmaskd.protocol import Frames


class State(Enum):
    """See the table in `blendmaskd.core.durable`."""

    STORING = "storing"
    SPOOLED = "spooled"
    LOADING = "loading"
    QUEUED = "queued"
    ANSWERED = "answered"


class Job(msgspec.Struct, eq=False):
    """A durable job whose answer is not in the spool yet."""

    seq: int
    name: str
    owner: bytes
    priority: int
    size: int
    accepted: float
    state: State
    attempts: int = 0
    losses: int = 0
    loads: int = 0  # that failed
    leased: bool = False  # as the spool knows it
    submitters: dict[bytes, None] = {}  # are owed `Accepted`
    waiters: dict[bytes, None] = {}  # are owed its answer
    answer: tuple[spool.Answer, Frames] | None = None


class Owned(msgspec.Struct):
    """What one owner has here."""

    jobs: int = 0
    bytes: int = 0
    storing: int = 0  # of the jobs
    storing_bytes: int = 0


class Jobs:
    """All of them, by name and by `seq`. `blendmaskd.core.durable` decides what becomes of them."""

    def __init__(self) -> None:
        self.by_name: dict[str, Job] = {}
        self.by_seq: dict[int, Job] = {}
        self.states: Counter[State] = Counter()
        self.storing_bytes = 0
        # level (priority, at most 0): owners in turn: priority: jobs; none is empty
        self._lines: dict[int, OrderedDict[bytes, dict[int, deque[Job]]]] = {}
        self._owned: dict[bytes, Owned] = {}  # by owner
        self._owed: Counter[bytes] = Counter()  # how many messages each client waits for

    def __iter__(self) -> Iterator[Job]:
        yield from self.by_name.values()

    def __len__(self) -> int:
        return len(self.by_name)

    def owned(self, owner: bytes) -> Owned:
        return self._owned.get(owner, Owned())

    def owed(self, client: bytes) -> bool:
        return client in self._owed

    @property
    def lined_up(self) -> bool:
        return bool(self._lines)

    def add(self, job: Job) -> None:
        self.by_name[job.name] = self.by_seq[job.seq] = job
        own = self._owned.setdefault(job.owner, Owned())
        own.jobs, own.bytes = own.jobs + 1, own.bytes + job.size
        self._count(job, 1)

    def remove(self, job: Job) -> None:
        del self.by_name[job.name]
        del self.by_seq[job.seq]
        self._count(job, -1)
        own = self._owned[job.owner]
        own.jobs, own.bytes = own.jobs - 1, own.bytes - job.size
        if not own.jobs:
            del self._owned[job.owner]
        if job.state is State.SPOOLED:
            self._lines[min(job.priority, 0)][job.owner][job.priority].remove(job)
            self._tidy(job)

    def move(self, job: Job, state: State) -> None:
        self._count(job, -1)
        job.state = state
        self._count(job, 1)

    def _count(self, job: Job, by: int) -> None:
        self.states[job.state] += by
        if job.state is State.STORING:
            self.storing_bytes += by * job.size
            self._owned[job.owner].storing += by
            self._owned[job.owner].storing_bytes += by * job.size

    def line_up(self, job: Job, first: bool = False) -> None:
        self.move(job, State.SPOOLED)
        owners = self._lines.setdefault(min(job.priority, 0), OrderedDict())
        line = owners.setdefault(job.owner, {}).setdefault(job.priority, deque())
        line.appendleft(job) if first else line.append(job)

    def next(self) -> Job:
        """Out of the line: the next owner's first of its highest priority. Below 0 it yields to all others."""
        owners = self._lines[max(self._lines)]
        owner, lines = next(iter(owners.items()))
        job = lines[max(lines)].popleft()
        owners.move_to_end(owner)
        self._tidy(job)
        return job

    def _tidy(self, job: Job) -> None:
        owners = self._lines[min(job.priority, 0)]
        lines = owners[job.owner]
        if not lines[job.priority]:
            del lines[job.priority]
        if not lines:
            del owners[job.owner]
        if not owners:
            del self._lines[min(job.priority, 0)]

    def owe(self, owed: dict[bytes, None], client: bytes) -> None:
        if client not in owed:
            owed[client] = None
            self._owed[client] += 1

    def settle(self, owed: dict[bytes, None], client: bytes) -> None:
        if client in owed:
            del owed[client]
            self._owed[client] -= 1
            if not self._owed[client]:
                del self._owed[client]

    def settle_all(self, owed: dict[bytes, None]) -> list[bytes]:
        """All of them, who are owed nothing any more."""
        clients = list(owed)
        for client in clients:
            self.settle(owed, client)
        return clients

    def settle_job(self, job: Job) -> list[bytes]:
        """Whoever waits for anything of this job, and is owed nothing any more."""
        return list(dict.fromkeys(self.settle_all(job.submitters) + self.settle_all(job.waiters)))

    def check(self) -> None:
        """Raise AssertionError when an invariant does not hold."""
        assert {job.seq for job in self} == self.by_seq.keys(), "a job has one name of two"
        lines = [line for owners in self._lines.values() for own in owners.values() for line in own.values()]
        lined = [job for line in lines for job in line]
        assert len(lined) == len({job.seq for job in lined}), "a job is in a line twice"
        spooled = {job.seq for job in self if job.state is State.SPOOLED}
        assert {job.seq for job in lined} == spooled, "a job is lost, or in a line and elsewhere"
        kept = [*self._lines.values(), *(own for owners in self._lines.values() for own in owners.values()), *lines]
        assert all(kept), "an empty line is kept"
        assert +self.states == Counter(job.state for job in self), "states are miscounted"
        storing = sum(job.size for job in self if job.state is State.STORING)
        assert self.storing_bytes == storing, "bytes are miscounted"
        for owner in {job.owner for job in self} | self._owned.keys():
            jobs = [job for job in self if job.owner == owner]
            on_the_way = [job.size for job in jobs if job.state is State.STORING]
            counted = Owned(len(jobs), sum(job.size for job in jobs), len(on_the_way), sum(on_the_way))
            assert self._owned[owner] == counted, "what an owner has is miscounted"
        owed = Counter(client for job in self for client in [*job.submitters, *job.waiters])
        assert owed == self._owed, "what is owed is miscounted"
        for job in self:
            assert not job.submitters or job.state is State.STORING, "a job is in the spool and not accepted"
            assert (job.answer is None) == (job.state is not State.ANSWERED), "an answer is nowhere"
