"""Durable jobs without an answer in the spool: their states, the lines they wait in, and who is owed what. Pure."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import Enum

import msgspec

from blendmaskd.core import spool_messages as spool
from blendmaskd.core.jobs import Pending, Waiting
from blendmaskd.protocol import Frames


class State(Enum):
    """See the table in `blendmaskd.core.durable`."""

    STORING = "storing"
    SPOOLED = "spooled"
    LOADING = "loading"
    QUEUED = "queued"
    ANSWERED = "answered"


class Job(Pending, eq=False, kw_only=True):
    """A durable job whose answer is not in the spool yet. Its owner is `client`, and `user`."""

    state: State
    loads: int = 0  # that failed
    leased: bool = False  # as the spool knows it
    submitters: dict[bytes, None] = msgspec.field(default_factory=dict)  # are owed `Accepted`
    waiters: dict[bytes, None] = msgspec.field(default_factory=dict)  # are owed its answer
    answer: tuple[spool.Answer, Frames] | None = None


def job_of(stored: spool.Stored, accepted: float, state: State) -> Job:
    """What the spool has, or is to have."""
    return Job(
        seq=stored.seq,
        client=stored.owner,
        user=stored.owner,
        name=stored.name,
        payload_bytes=stored.size,
        priority=stored.priority,
        accepted=accepted,
        state=state,
    )


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
        self.lined_up: Waiting[Job] = Waiting()  # those that are SPOOLED
        self._owned: dict[bytes, Owned] = {}  # by owner
        self._owed: dict[bytes, dict[int, dict[bytes, None]]] = {}  # where each client waits, by id

    def __iter__(self) -> Iterator[Job]:
        yield from self.by_name.values()

    def __len__(self) -> int:
        return len(self.by_name)

    def owned(self, owner: bytes) -> Owned:
        return self._owned.get(owner, Owned())

    def owed(self, client: bytes) -> bool:
        """Whether this client waits for a message."""
        return client in self._owed

    def add(self, job: Job) -> None:
        self.by_name[job.name] = self.by_seq[job.seq] = job
        own = self._owned.setdefault(job.client, Owned())
        own.jobs, own.bytes = own.jobs + 1, own.bytes + job.payload_bytes
        self._count(job, 1)

    def remove(self, job: Job) -> None:
        del self.by_name[job.name]
        del self.by_seq[job.seq]
        self._count(job, -1)
        own = self._owned[job.client]
        own.jobs, own.bytes = own.jobs - 1, own.bytes - job.payload_bytes
        if not own.jobs:
            del self._owned[job.client]
        if job.state is State.SPOOLED:
            self.lined_up.take(job)

    def move(self, job: Job, state: State) -> None:
        self._count(job, -1)
        job.state = state
        self._count(job, 1)

    def _count(self, job: Job, by: int) -> None:
        self.states[job.state] += by
        if job.state is State.STORING:
            self.storing_bytes += by * job.payload_bytes
            self._owned[job.client].storing += by
            self._owned[job.client].storing_bytes += by * job.payload_bytes

    def line_up(self, job: Job, first: bool = False) -> None:
        self.move(job, State.SPOOLED)
        self.lined_up.put(job, first)

    def owe(self, owed: dict[bytes, None], client: bytes) -> None:
        owed[client] = None
        self._owed.setdefault(client, {})[id(owed)] = owed

    def settle(self, owed: dict[bytes, None], client: bytes) -> None:
        if client in owed:
            del owed[client], self._owed[client][id(owed)]
            if not self._owed[client]:
                del self._owed[client]

    def settle_client(self, client: bytes) -> None:
        """It waits for nothing any more, at the cost of what it waited for, however many jobs there are."""
        for owed in self._owed.pop(client, {}).values():
            del owed[client]

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
        assert {job.seq for job in self} == self.by_seq.keys(), "a job has one name of two"
        self.lined_up.check()
        lined = [job.seq for job in self.lined_up]
        assert len(lined) == len(set(lined)), "a job is in a line twice"
        spooled = {job.seq for job in self if job.state is State.SPOOLED}
        assert set(lined) == spooled, "a job is lost, or in a line and elsewhere"
        assert +self.states == Counter(job.state for job in self), "states are miscounted"
        storing = sum(job.payload_bytes for job in self if job.state is State.STORING)
        assert self.storing_bytes == storing, "bytes are miscounted"
        for owner in {job.client for job in self} | self._owned.keys():
            jobs = [job for job in self if job.client == owner]
            on_the_way = [job.payload_bytes for job in jobs if job.state is State.STORING]
            counted = Owned(len(jobs), sum(job.payload_bytes for job in jobs), len(on_the_way), sum(on_the_way))
            assert self._owned[owner] == counted, "what an owner has is miscounted"
        owed = {(client, id(where)) for job in self for where in (job.submitters, job.waiters) for client in where}
        kept = {(client, where) for client, places in self._owed.items() for where in places}
        assert owed == kept, "what is owed is told wrongly"
        assert all(self._owed.values()), "a client is owed nothing, and kept"
        for job in self:
            assert not job.submitters or job.state is State.STORING, "a job is in the spool and not accepted"
            assert (job.answer is None) == (job.state is not State.ANSWERED), "an answer is nowhere"
