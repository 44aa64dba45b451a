"""Jobs, and the order in which they wait. Pure; the broker decides what becomes of them."""
from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Generic, Literal, TypeVar

import msgspec

from blendmaskd.core.suspects import Suspicion
from blendmaskd.protocol import Frames, Image, Options, Submit

What = Literal["accepted", "refused", "leased", "started", "suspected", "answered", "failed", "dropped"]


class Pending(msgspec.Struct, eq=False, kw_only=True):
    """One image to segment, as long as it has no answer: what is known of it here and in the spool."""

    seq: int
    client: bytes
    user: bytes  # who runs the client
    name: str
    payload_bytes: int  # of the image, wherever it is
    priority: int
    accepted: float
    attempts: int = 0  # times it was started on a worker that died
    losses: int = 0  # times it was leased to a worker that died


class Job(Pending, eq=False, kw_only=True):
    """One that waits for a worker here, or is leased."""

    image: Image
    options: Options
    payload: Frames
    deadline: float
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

    def add(self, job: Job, by: int = 1) -> None:
        self.count += by
        self.bytes += by * job.payload_bytes

    def lease(self, job: Job, by: int = 1) -> None:
        self.leases += by
        self.leased_bytes += by * job.payload_bytes

    def check(self, jobs: Sequence[Job]) -> None:
        leased = [job for job in jobs if job.worker is not None]
        assert (self.count, self.leases) == (len(jobs), len(leased)), "jobs are miscounted"
        assert self.bytes == sum(job.payload_bytes for job in jobs), "bytes are miscounted"
        assert self.leased_bytes == sum(job.payload_bytes for job in leased), "leased bytes are miscounted"


class Account(Tally, eq=False):
    """A client's unanswered jobs."""

    jobs: dict[str, Job] = {}


NO_JOBS = Account()  # what nobody has: only to be read
J = TypeVar("J", bound=Pending)
_Line = dict[int, OrderedDict[int, J]]  # of one client. Priority: seq: job; no queue is empty


class Waiting(Generic[J]):
    """Jobs that wait, for a worker or in the spool: users take turns, and the clients of each, whatever those have.

    A client's own jobs go by priority and then by arrival. Only those below 0 know of others: they yield to every job
    of a higher priority, so a client can step back but not push in.
    """

    def __init__(self) -> None:
        # priority, at most 0: users in turn: clients in turn; none is empty
        self._levels: defaultdict[int, OrderedDict[bytes, OrderedDict[bytes, _Line[J]]]] = defaultdict(OrderedDict)
        self._jobs = 0
        self.payload_bytes = 0

    def __len__(self) -> int:
        return self._jobs

    def __iter__(self) -> Iterator[J]:
        for level in self._levels.values():
            for clients in level.values():
                for line in clients.values():
                    for queue in line.values():
                        yield from queue.values()

    def put(self, job: J, first: bool = False) -> None:
        """Last of its client and priority; or first, and its client and user too: it was there before."""
        level = self._levels[min(job.priority, 0)]
        clients = level.setdefault(job.user, OrderedDict())
        queue = clients.setdefault(job.client, {}).setdefault(job.priority, OrderedDict())
        queue[job.seq] = job
        if first:
            queue.move_to_end(job.seq, last=False)
            clients.move_to_end(job.client, last=False)
            level.move_to_end(job.user, last=False)
        self._jobs += 1
        self.payload_bytes += job.payload_bytes

    def next(self) -> J:
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

    def take(self, job: J) -> J:
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
        self.waiting: Waiting[Job] = Waiting()
        self.suspects: deque[Job] = deque()
        self._accounts: defaultdict[bytes, Account] = defaultdict(Account)
        self._users: defaultdict[bytes, Tally] = defaultdict(Tally)
        self._count = 0
        self._deadlines: list[tuple[float, int, Job]] = []

    def __iter__(self) -> Iterator[Job]:
        for account in self._accounts.values():
            yield from account.jobs.values()

    def __len__(self) -> int:
        return self._count

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
        return self._accounts.get(client, NO_JOBS)

    def of_user(self, user: bytes) -> Tally:
        """What all clients of this user have here."""
        return self._users.get(user, NO_JOBS)

    def lease(self, job: Job) -> None:
        """It is counted as leased from now on."""
        self._accounts[job.client].lease(job)
        self._users[job.user].lease(job)

    def end_lease(self, job: Job) -> None:
        self._accounts[job.client].lease(job, -1)
        self._users[job.user].lease(job, -1)

    def add(self, job: Job, waits: bool = True) -> None:
        """It has no answer yet. One that does not wait is to be leased now."""
        account = self._accounts[job.client]
        account.jobs[job.name] = job
        account.add(job)
        self._users[job.user].add(job)
        self._count += 1
        heapq.heappush(self._deadlines, (job.deadline, job.seq, job))
        if len(self._deadlines) > 2 * self._count + 64:  # answered jobs must not pile up behind a far deadline
            self._deadlines = [entry for entry in self._deadlines if not entry[2].answered]
            heapq.heapify(self._deadlines)
        if waits:
            self._wait(job)

    def _wait(self, job: Job) -> None:
        if job.suspect:
            self.suspects.append(job)
        else:
            self.waiting.put(job)

    def remove(self, job: Job) -> None:
        """It has its answer."""
        account, user = self._accounts[job.client], self._users[job.user]
        if job.worker is not None:
            self.end_lease(job)
        elif job in self.suspects:
            self.suspects.remove(job)
        else:
            self.waiting.take(job)
        del account.jobs[job.name]
        self._count -= 1
        account.add(job, -1)
        user.add(job, -1)
        if not account.count:
            del self._accounts[job.client]
        if not user.count:
            del self._users[job.user]
        job.answered = True

    def pop_overdue(self, now: float) -> Job | None:
        """The next that is overdue. It must be answered."""
        deadline = self.next_deadline()
        return heapq.heappop(self._deadlines)[2] if deadline is not None and deadline <= now else None

    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][2].answered:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def check(self) -> None:
        self.waiting.check()
        leased = [job for job in self if job.worker is not None]
        everywhere = [*self.waiting, *self.suspects, *leased]
        assert len(everywhere) == len(set(everywhere)), "a job is in two places"
        assert len(everywhere) == self._count, "jobs are miscounted"
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
