"""Jobs, and the order in which they wait. Pure; the broker decides what becomes of them."""
from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from blendmaskd.core.suspects import Suspicion
from blendmaskd.protocol import Frames, Image, Options, Submit

What = Literal["accepted", "refused", "leased", "started", "suspected", "answered", "failed", "dropped"]


class Job(msgspec.Struct, eq=False):
    """One image to segment, as long as it has no answer."""

    seq: int
    client: bytes
    user: bytes  # who runs the client
    name: str
    image: Image
    options: Options
    payload: Frames
    payload_bytes: int  # of the image, wherever it is
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


def job_of(seq: int, client: bytes, message: Submit, payload: Frames, accepted: float, deadline_s: float) -> Job:
    """What is accepted by this message, with its own deadline or this one."""
    placed = message.image.place
    return Job(
        seq=seq,
        client=client,
        user=client,
        name=message.job,
        image=message.image,
        options=message.options,
        payload=payload,
        payload_bytes=sum(map(len, payload)) + (placed.bytes if placed else 0),
        priority=message.priority,
        accepted=accepted,
        deadline=accepted + (message.deadline_s or deadline_s),
    )


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


class Tally(msgspec.Struct, eq=False):
    """How many unanswered jobs somebody has: those that wait, suspects among them, and those that are leased."""

    count: int = 0
    bytes: int = 0
    leases: int = 0
    leased_bytes: int = 0

    @property
    def waiting(self) -> int:
        return self.count - self.leases

    @property
    def waiting_bytes(self) -> int:
        return self.bytes - self.leased_bytes

    def add(self, job: Job) -> None:
        self.count += 1
        self.bytes += job.payload_bytes

    def remove(self, job: Job) -> None:
        self.count -= 1
        self.bytes -= job.payload_bytes

    def lease(self, job: Job) -> None:
        self.leases += 1
        self.leased_bytes += job.payload_bytes

    def end_lease(self, job: Job) -> None:
        self.leases -= 1
        self.leased_bytes -= job.payload_bytes

    def check(self, jobs: Sequence[Job]) -> None:
        leased = [job for job in jobs if job.worker is not None]
        assert (self.count, self.leases) == (len(jobs), len(leased)), "jobs are miscounted"
        assert self.bytes == sum(job.payload_bytes for job in jobs), "bytes are miscounted"
        assert self.leased_bytes == sum(job.payload_bytes for job in leased), "leased bytes are miscounted"


class Account(Tally, eq=False):
    """A client's unanswered jobs."""

    jobs: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        self.jobs[job.name] = job
        Tally.add(self, job)

    def remove(self, job: Job) -> None:
        del self.jobs[job.name]
        Tally.remove(self, job)


NOTHING = Account()  # what nobody has: only to be read

_Line = dict[int, OrderedDict[int, Job]]  # of one client. Priority: seq: job; no queue is empty


class Waiting:
    """Jobs that wait for any worker: users take turns, and the clients of each, whatever these have waiting.

    A client's own jobs go by priority and then by arrival. Only those below 0 know of others: they yield to every job
    of a higher priority, so a client can step back but not push in.
    """

    def __init__(self) -> None:
        # priority, at most 0: users in turn: clients in turn; none is empty
        self._levels: dict[int, OrderedDict[bytes, OrderedDict[bytes, _Line]]] = {}
        self._jobs = 0
        self.payload_bytes = 0

    def __len__(self) -> int:
        return self._jobs

    def __iter__(self) -> Iterator[Job]:
        for level in self._levels.values():
            for clients in level.values():
                for line in clients.values():
                    for queue in line.values():
                        yield from queue.values()

    def put(self, job: Job, first: bool = False) -> None:
        """Last of its client and priority; or first, and its client and user too: it was there before."""
        level = self._levels.setdefault(min(job.priority, 0), OrderedDict())
        clients = level.setdefault(job.user, OrderedDict())
        queue = clients.setdefault(job.client, {}).setdefault(job.priority, OrderedDict())
        queue[job.seq] = job
        if first:
            queue.move_to_end(job.seq, last=False)
            clients.move_to_end(job.client, last=False)
            level.move_to_end(job.user, last=False)
        self._jobs += 1
        self.payload_bytes += job.payload_bytes

    def next(self) -> Job:
        """Take out the job whose turn it is; its user's next turn comes after all others', and so does its client's."""
        level = self._levels[max(self._levels)]
        user, clients = next(iter(level.items()))
        client, line = next(iter(clients.items()))
        job = self.take(next(iter(line[max(line)].values())))
        if client in clients:
            clients.move_to_end(client)
        if user in level:
            level.move_to_end(user)
        return job

    def take(self, job: Job) -> Job:
        """Out of here, from wherever it stands."""
        level = self._levels[min(job.priority, 0)]
        clients = level[job.user]
        line = clients[job.client]
        del line[job.priority][job.seq]
        if not line[job.priority]:
            del line[job.priority]
        if not line:
            del clients[job.client]
        if not clients:
            del level[job.user]
        if not level:
            del self._levels[min(job.priority, 0)]
        self._jobs -= 1
        self.payload_bytes -= job.payload_bytes
        return job

    def check(self) -> None:
        jobs = list(self)
        assert self._jobs == len(jobs), "jobs are miscounted"
        assert self.payload_bytes == sum(job.payload_bytes for job in jobs), "bytes are miscounted"
        users = [clients for level in self._levels.values() for clients in level.values()]
        lines = [line for clients in users for line in clients.values()]
        assert all(self._levels.values()), "an empty level is kept"
        assert all(users), "a user without a client is kept"
        assert all(line and all(line.values()) for line in lines), "an empty queue is kept"


class Jobs:
    """All that have no answer: whose they are, where those without a worker wait, and when each is overdue."""

    def __init__(self) -> None:
        self.waiting = Waiting()
        self.suspects: deque[Job] = deque()
        self._accounts: dict[bytes, Account] = {}
        self._users: dict[bytes, Tally] = {}
        self._deadlines: list[tuple[float, int, Job]] = []

    def __iter__(self) -> Iterator[Job]:
        for account in self._accounts.values():
            yield from account.jobs.values()

    def __len__(self) -> int:
        return sum(len(account.jobs) for account in self._accounts.values())

    @property
    def waiting_jobs(self) -> int:
        return len(self.waiting) + len(self.suspects)

    @property
    def waiting_bytes(self) -> int:
        return self.waiting.payload_bytes + sum(job.payload_bytes for job in self.suspects)

    def has(self, client: bytes) -> bool:
        """Whether this client waits for an answer."""
        return client in self._accounts

    def account(self, client: bytes) -> Account:
        """What this client has here; an empty one is nowhere."""
        return self._accounts.get(client, NOTHING)

    def of_user(self, user: bytes) -> Tally:
        """What all clients of this user have here."""
        return self._users.get(user, NOTHING)

    def lease(self, job: Job) -> None:
        """It is counted as leased from now on."""
        self._accounts[job.client].lease(job)
        self._users[job.user].lease(job)

    def end_lease(self, job: Job) -> None:
        self._accounts[job.client].end_lease(job)
        self._users[job.user].end_lease(job)

    def add(self, job: Job) -> None:
        self._accounts.setdefault(job.client, Account()).add(job)
        self._users.setdefault(job.user, Tally()).add(job)
        heapq.heappush(self._deadlines, (job.deadline, job.seq, job))
        if len(self._deadlines) > 2 * len(self) + 64:  # answered jobs must not pile up behind a far deadline
            self._deadlines = [entry for entry in self._deadlines if not entry[2].answered]
            heapq.heapify(self._deadlines)
        if job.suspect:
            self.suspects.append(job)
        else:
            self.waiting.put(job)

    def remove(self, job: Job) -> None:
        """It has its answer."""
        account, user = self._accounts[job.client], self._users[job.user]
        if job.worker is not None:
            self.end_lease(job)
        account.remove(job)
        user.remove(job)
        if not account.count:
            del self._accounts[job.client]
        if not user.count:
            del self._users[job.user]
        job.answered = True
        if job.worker is not None:
            return
        if job in self.suspects:
            self.suspects.remove(job)
        else:
            self.waiting.take(job)

    def pop_overdue(self, now: float) -> Job | None:
        """The next that is overdue. It must be answered."""
        deadline = self.next_deadline()
        return heapq.heappop(self._deadlines)[2] if deadline is not None and deadline <= now else None

    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][2].answered:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def check(self) -> None:
        """Raise AssertionError when an invariant does not hold."""
        self.waiting.check()
        leased = [job for job in self if job.worker is not None]
        everywhere = [*self.waiting, *self.suspects, *leased]
        assert len(everywhere) == len(set(everywhere)), "a job is in two places"
        assert set(everywhere) == set(self), "an unanswered job is nowhere, or an answered one somewhere"
        assert not any(job.answered for job in everywhere), "an answered job is still held"
        for account in self._accounts.values():
            assert account.jobs, "an empty account is kept"
            account.check(list(account.jobs.values()))
        assert self._users.keys() == {job.user for job in self}, "a user without jobs is kept"
        for user, tally in self._users.items():
            tally.check([job for job in self if job.user == user])
        assert not any(job.suspect or job.worker for job in self.waiting), "a suspect waits among the others"
        assert all(job.suspect for job in self.suspects), "an innocent job is suspected"
        live = {entry[2] for entry in self._deadlines if not entry[2].answered}
        assert live == set(everywhere), "a job has no deadline"
