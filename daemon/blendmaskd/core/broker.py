"""Broker: queue, leases, windows, deadlines, retries, drain. Pure: events and `now` in, actions out.

The sentence that all of this defends: **every accepted job gets exactly one answer while the daemon lives.**

Where a job is:

=========  ===========================================================================================
waiting    in `_waiting`
suspect    in `_suspects`: workers died with its image; it is leased again alone, to an empty worker
leased     in one worker's `leases`
answered   nowhere
=========  ===========================================================================================

A lease outlives its job when the job is answered early (deadline, cancel, client gone): its `job` is then None, it
still fills its worker's window, and what the worker says of it later is dropped. So a worker's leases are exactly
those that it was sent and has not ended yet.

When a worker dies, every image that it held is a suspect: what a worker says of what it has started may not arrive any
more, and a decoder crashes before anything starts. A suspect is leased alone, to another device if one is free, and is
cleared by a result. `max_attempts` deaths name it for sure: it is given up, and so is every job with the same image,
wherever it is, and whichever comes within `suspects.KEEP_S`. So an image costs `max_attempts` workers, however many
clients send it, how often, and whether they wait for the answer; only several devices that have it at the same moment
can all die of it. Its neighbours lose nothing. The deaths that it is to blame for do not count against the devices
(`holds_suspect`, `Acquit`).

Clients share. They take turns (`jobs.Waiting`). None may have more than `SHARE` times as many waiting as places are
free, so whoever comes next finds room. A job whose client has nothing on a device goes ahead of those whose client has
several there: it may take one place beyond a worker's window, and its worker runs it next. So a client with one job at
a time is served at nearly the pace of an idle daemon, however many jobs the others have.

Durable jobs are those of one client, `DURABLE`, which is `blendmaskd.core.durable` and never leaves: it gives them in
when there is room, owns their answers, hears of what it must not forget (`SendWorker.durable`, `Losses`), and is given
back what ends here without an answer (`Returned`).

Whatever ends a job, or refuses one, is one action, `Answered` or `Dropped`: who counts these has counted every outcome.

No socket, clock, process, thread or logger belongs in here.
"""
from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence

import msgspec

from blendmaskd.core.jobs import Account, Job, Step, Waiting, What
from blendmaskd.core.regions import Memory, Regions
from blendmaskd.core.suspects import KEEP_S, Death, Identity, Read, Suspects, Suspicion
from blendmaskd.protocol import (
    Cancel,
    CloseRegion,
    Code,
    Failed,
    FailedLease,
    Finished,
    Frames,
    Image,
    Lease,
    Result,
    Revoke,
    Started,
    Stop,
    Submit,
    ToWorker,
)

DURABLE = b""  # the one identity that no peer can have, whatever it claims: a ROUTER makes one up for it then
DURABLE_DEADLINE_S = 86400.0

SHORTEST_RETRY_S = 0.05
LONGEST_RETRY_S = 30.0
SHARE = 7  # of the queue one client alone can fill 7 of 8 parts, two 7 of 15 each


class Answered(msgspec.Struct, frozen=True):
    """A job's one answer, or why it was refused: for the client that submitted it, or `DURABLE`."""

    owner: bytes
    answer: Result | Failed
    payload: Frames = ()


class Dropped(msgspec.Struct, frozen=True):
    """A job ends without an answer: nobody waits for one, or who does is told apart."""

    job: str
    code: Code


class SendWorker(msgspec.Struct, frozen=True):
    """Send this to a worker."""

    worker: str
    message: ToWorker
    payload: Frames = ()
    durable: str = ""  # the durable job that is leased by this


class Losses(msgspec.Struct, frozen=True):
    """Workers died with this durable job."""

    job: str
    attempts: int
    losses: int


class Returned(msgspec.Struct, frozen=True):
    """This durable job is not here any more, and has no answer."""

    job: str


class Evict(msgspec.Struct, frozen=True):
    """This worker hangs: end it. `exited` follows."""

    worker: str
    reason: str


class Acquit(msgspec.Struct, frozen=True):
    """An image, not this device, is to blame for a death that was counted against it."""

    device: str


Action = Answered | Dropped | SendWorker | Evict | Losses | Returned | Acquit


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
        return any(lease.alone for lease in self.leases.values())


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds, from settings."""

    max_jobs: int
    max_bytes: int
    max_image_bytes: int
    max_attempts: int
    deadline_s: float
    stall_s: float
    paths_allowed: bool = False
    shared_memory_bytes: int = 0
    max_jobs_per_client: float = math.inf  # unanswered, waiting or leased
    max_bytes_per_client: float = math.inf


class Broker:
    """See the module. `check()` states the invariants; tests call it after every step.

    `read` gives bytes that lie in shared memory: an image is looked at only to see whether workers died with it.
    """

    def __init__(self, limits: Limits, read: Read | None = None) -> None:
        self.limits = limits
        self.regions = Regions(limits.shared_memory_bytes)
        self.remembered = Suspects(read) if read else Suspects()
        self.served_per_s = 0.0  # told by the shell; only for the retry hint
        self.tracing = False  # told by the shell: whether `steps` get every change of a job's state, or only failures
        self.steps: list[Step] = []  # until the shell takes them
        self._seq = itertools.count(1)
        self._waiting = Waiting()
        self._suspects: deque[Job] = deque()
        self._clients: dict[bytes, Account] = {}
        self._workers: dict[str, Worker] = {}
        self._deadlines: list[tuple[float, int, Job]] = []
        self._draining = False
        self._available = True

    # -- what the shell may ask -------------------------------------------------------------------------------------

    @property
    def waiting_jobs(self) -> int:
        return len(self._waiting) + len(self._suspects)

    @property
    def waiting_bytes(self) -> int:
        return self._waiting.payload_bytes + sum(job.payload_bytes for job in self._suspects)

    @property
    def unanswered(self) -> int:
        return sum(len(account.jobs) for account in self._clients.values())

    @property
    def leased(self) -> int:
        return sum(len(worker.leases) for worker in self._workers.values())

    def holds_suspect(self, worker: str) -> bool:
        """Whether this worker's death says something of an image rather than of the worker."""
        holder = self._workers.get(worker)
        if holder is None or not holder.alone:
            return False
        [lease] = holder.leases.values()
        suspicion = self._suspicion(lease)
        if suspicion is None:
            return False
        return suspicion.attempts > 0 or holder.served or suspicion.devices != {holder.device}

    def last_heard(self, worker: str) -> float | None:
        return self._workers[worker].heard if worker in self._workers else None

    # -- clients ----------------------------------------------------------------------------------------------------

    def submit(self, client: bytes, message: Submit, payload: Frames, now: float) -> list[Action]:
        """Accept a job, or answer at once why not."""
        if message.job in self._jobs_of(client):
            return []  # its one answer is still to come
        job = self._job(client, message, payload, now, self.limits.deadline_s)
        refusal = self._refusal(job, now)
        if refusal is not None:
            if self.tracing:
                self._tell("refused", job, code=refusal.code, reason=refusal.reason)
            return [Answered(client, refusal)]
        self._add(job)
        self._put(job)
        return self._assign(now) or self._lease_ahead(job, now)

    def adopt(
        self, message: Submit, payload: Frames, accepted: float, now: float, attempts: int = 0, losses: int = 0
    ) -> list[Action]:
        """Take on a durable job. It was `accepted`, and what it may not exceed was checked, when it came."""
        job = self._job(DURABLE, message, payload, accepted, DURABLE_DEADLINE_S)
        job.attempts, job.losses = attempts, losses
        job.suspicion = self.remembered.find(job.image, payload, now)
        if losses:
            found = job.suspicion or Suspicion(self.remembered.identify(job.image, payload))
            job.suspicion = found = self.remembered.keep(found, now)
            found.attempts = max(found.attempts, attempts)
            if attempts >= self.limits.max_attempts:
                found.given_up = found.given_up or f"it was on a worker that died {attempts} times"
        self._add(job)
        self._put(job)
        self._recognise()
        if job.suspicion and job.suspicion.given_up:
            return self._answer_all(job.suspicion, job.suspicion.reason(now))
        return self._assign(now)

    def withdraw(self, name: str, now: float) -> list[Action]:
        """A durable job that is here is not wanted any more."""
        return self._remove(self._jobs_of(DURABLE)[name]) + self._assign(now)

    @property
    def room(self) -> int:
        """How many more durable jobs it takes to keep the workers busy, without filling the queue with them."""
        wanted = min(2 * sum(w.window for w in self._workers.values() if not w.retiring), self.limits.max_jobs // 2)
        serving = self._available and not self._draining
        return max(wanted - len(self._jobs_of(DURABLE)), 0) if serving else 0

    def given_up(self, name: str, image: Image, payload: Frames, now: float) -> Failed | None:
        """Why this image is not tried any more: it was given up lately."""
        suspicion = self.remembered.find(image, payload, now)
        if suspicion is None or not suspicion.given_up:
            return None
        return refused(name, Code.WORKER_LOST, suspicion.reason(now))

    def forget_suspects(self, now: float) -> list[Action]:
        """What workers died with may go well by new settings and weights."""
        for suspicion in self.remembered:
            self._clear(suspicion)
        return self._assign(now)

    def unfit(self, name: str, image: Image, size: int) -> Failed | None:
        """Why this image of `size` bytes cannot be a job now, however much room there is."""
        if size > self.limits.max_image_bytes:
            return refused(name, Code.TOO_LARGE, f"{size} bytes: an image has at most {self.limits.max_image_bytes}")
        if image.kind == "path" and not self.limits.paths_allowed:
            return refused(name, Code.BAD_REQUEST, "images by path are disabled: paths.roots is not set")
        complaint = self.regions.complaint(image.place) if image.place else None
        if complaint:
            return refused(name, Code.BAD_REQUEST, complaint)
        if self._draining:
            return refused(name, Code.DRAINING, "the daemon is stopping", LONGEST_RETRY_S)
        return None

    def cancel(self, client: bytes, message: Cancel, now: float) -> list[Action]:
        job = self._jobs_of(client).get(message.job)
        if job is None:
            return []
        return self._fail(job, Code.CANCELLED, "cancelled by its client") + self._assign(now)

    def client_gone(self, client: bytes, now: float) -> list[Action]:
        """Nobody waits for this client's jobs any more."""
        actions: list[Action] = []
        for job in list(self._jobs_of(client).values()):
            if self.tracing:
                self._tell("dropped", job, code=Code.CANCELLED, reason="its client has left")
            actions += [Dropped(job.name, Code.CANCELLED), *self._remove(job)]
        return actions + self._assign(now)

    def has_jobs(self, client: bytes) -> bool:
        """Whether this client waits for an answer."""
        return client in self._clients

    def shut_out(self, client: bytes, reason: str, now: float) -> list[Action]:
        """This client may not be here any more: its jobs end, and it is told so."""
        jobs = list(self._jobs_of(client).values())
        actions = [action for job in jobs for action in self._fail(job, Code.UNAUTHORISED, reason)]
        return actions + self._assign(now)

    def open_region(self, name: str, memory: Memory) -> list[Action]:
        """Images may lie in this memory from now on. Raises `RegionError` when they may not."""
        self.regions.add(name, memory)
        return [SendWorker(worker, self.regions.opening(name)) for worker in self._workers]

    def end_region(self, name: str) -> list[Action]:
        """A region is gone: nobody may keep its memory. Jobs that lie in it are answered when they are read."""
        for lease in [lease for worker in self._workers.values() for lease in worker.leases.values()]:
            if lease.job and lease.job.image.place and lease.job.image.place.region == name:
                lease.identity = self._identity(lease)  # while it can be had
        self.regions.remove(name)
        return [SendWorker(worker, CloseRegion(region=name)) for worker in self._workers]

    # -- workers ----------------------------------------------------------------------------------------------------

    def ready(self, worker: str, device: str, window: int, now: float) -> list[Action]:
        """A new worker may be given leases."""
        if worker in self._workers:
            return []
        self._workers[worker] = Worker(worker, device, window, progress=now, heard=now)
        return [*(SendWorker(worker, opening) for opening in self.regions), *self._assign(now)]

    def set_window(self, worker: str, window: int, now: float) -> list[Action]:
        """How many leases a worker wants to hold from now on; those that it has beyond a smaller window run out."""
        holder = self._workers.get(worker)
        if holder is None or holder.window == window:
            return []
        holder.window = window
        return self._assign(now)

    def heard(self, worker: str, now: float) -> None:
        """A worker gave a sign of life."""
        if worker in self._workers:
            self._workers[worker].heard = now

    def forgive(self, seconds: float, now: float) -> None:
        """The daemon itself did nothing for so long, and perhaps no worker did: that is no silence of theirs."""
        for worker in self._workers.values():
            worker.heard = min(worker.heard + seconds, now)
            worker.progress = min(worker.progress + seconds, now)

    def started(self, worker: str, message: Started, now: float) -> list[Action]:
        holder = self._workers.get(worker)
        if holder is None:
            return []
        holder.progress = holder.heard = now
        for number in message.leases:
            lease = holder.leases.get(number)
            if lease is not None:
                if self.tracing and lease.job and not lease.started:  # a lone one may be told of twice
                    self._tell("started", lease.job)
                lease.started = True
        return []

    def finished(self, worker: str, message: Finished, payload: Frames, now: float) -> list[Action]:
        lease = self._end_lease(worker, message.lease, now)
        if lease is None:
            return []
        self._workers[worker].served = True
        self._clear(self._suspicion(lease))
        job = lease.job
        if job is None:
            return self._after_lease(worker, now)
        device = self._workers[worker].device
        timings = {**message.timings, "queue": job.leased_at - job.accepted}
        total = now - job.accepted
        timings |= {"send": max(total - sum(timings.values()), 0.0), "total": total}
        result = Result(job=job.name, width=message.width, height=message.height, device=device, timings=timings)
        if self.tracing:
            self._tell("answered", job, code="ok")
        self._remove(job)
        return [Answered(job.client, result, payload), *self._after_lease(worker, now)]

    def failed(self, worker: str, message: FailedLease, now: float) -> list[Action]:
        lease = self._end_lease(worker, message.lease, now)
        answer = self._fail(lease.job, message.code, message.reason) if lease and lease.job else []
        return answer + self._after_lease(worker, now)

    def retire(self, worker: str) -> list[Action]:
        """No new leases for this worker; it is told to stop when those that it holds have ended."""
        if worker not in self._workers:
            return []
        self._workers[worker].retiring = True
        return self._stop_if_empty(self._workers[worker])

    def exited(self, worker: str, now: float, reason: str) -> list[Action]:
        """A worker has exited: its jobs are tried again alone, or answered when their image is given up."""
        counts = not self.holds_suspect(worker)
        holder = self._workers.pop(worker, None)
        if holder is None:
            return []
        suspicions = self._suspect(holder, Death(holder.device, holder.served, counts), now)
        actions: list[Action] = []
        for lease in reversed(holder.leases.values()):
            job = lease.job
            if job is None:
                continue
            job.attempts += lease.started or lease.alone or len(holder.leases) == 1
            job.losses += 1
            if self.tracing:
                self._tell("suspected", job, reason=reason)
            job.worker, job.lease = None, 0
            self._clients[job.client].end_lease(job)
            if job.client == DURABLE:
                actions.append(Losses(job.name, job.attempts, job.losses))
            self._suspects.appendleft(job)
        self._recognise()
        for suspicion in suspicions:
            if suspicion.guilty(self.limits.max_attempts):
                actions += self._give_up_image(suspicion, reason)
        return actions + self._assign(now)

    # -- time and state ---------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Action]:
        """Answer what is overdue; name workers that hang."""
        actions: list[Action] = []
        while self._deadlines and (self._deadlines[0][2].answered or self._deadlines[0][0] <= now):
            job = heapq.heappop(self._deadlines)[2]
            if not job.answered:
                where = "in the queue" if job.worker is None else f"on {self._workers[job.worker].device}"
                actions += self._fail(job, Code.TIMEOUT, f"not done {now - job.accepted:.1f} s after it came, {where}")
        for worker in self._workers.values():
            if now >= self._stall_deadline(worker):
                worker.evicted = worker.retiring = True
                silent = now - worker.heard >= self.limits.stall_s
                what = "no sign of life" if silent else "leases held, none ended"
                actions.append(Evict(worker.name, f"{what} for {self.limits.stall_s:g} s"))
        return actions + self._assign(now)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        while self._deadlines and self._deadlines[0][2].answered:
            heapq.heappop(self._deadlines)
        times = [self._deadlines[0][0]] if self._deadlines else []
        times += [self._stall_deadline(worker) for worker in self._workers.values() if not worker.evicted]
        return min(times, default=None)

    def drain(self) -> None:
        """Accept nothing more; what was accepted is still answered."""
        self._draining = True

    def end_drain(self) -> list[Action]:
        """The time to finish is over: answer what is left."""
        return self._give_up(Code.DRAINING, "the daemon is stopping")

    def set_available(self, available: bool) -> list[Action]:
        """Whether any device can serve now or after a restart. When none can, nothing waits for one."""
        self._available = available
        if available:
            return []
        return self._give_up(Code.UNAVAILABLE, _NO_DEVICE)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _jobs(self) -> Iterator[Job]:
        for account in self._clients.values():
            yield from account.jobs.values()

    def _jobs_of(self, client: bytes) -> dict[str, Job]:
        account = self._clients.get(client)
        return {} if account is None else account.jobs

    def _refusal(self, job: Job, now: float) -> Failed | None:
        refuse = functools.partial(refused, job.name)
        size = job.payload_bytes
        unfit = self.unfit(job.name, job.image, size)
        if unfit:
            return unfit
        job.suspicion = self.remembered.find(job.image, job.payload, now)
        if job.suspicion and job.suspicion.given_up:
            return refuse(Code.WORKER_LOST, job.suspicion.reason(now))
        if not self._available:
            return refuse(Code.UNAVAILABLE, _NO_DEVICE, LONGEST_RETRY_S)
        if self.waiting_jobs >= self.limits.max_jobs:
            return refuse(Code.BUSY, f"{self.waiting_jobs} jobs are waiting", self._retry_after_s())
        if self.waiting_bytes + size > self.limits.max_bytes:
            return refuse(Code.BUSY, f"{self.waiting_bytes} bytes are waiting", self._retry_after_s())
        greed = self._greed(job)
        return refuse(Code.BUSY, f"this client has {greed}", self._retry_after_s()) if greed else None

    def _greed(self, job: Job) -> str:
        """What of its client's is too much for one client; empty: nothing."""
        account, limits = self._clients.get(job.client), self.limits
        if account is None:
            return ""
        if account.waiting >= SHARE * (limits.max_jobs - self.waiting_jobs):
            return f"{account.waiting} jobs waiting: the last places are reserved for others"
        if account.waiting and account.waiting_bytes >= SHARE * (limits.max_bytes - self.waiting_bytes):
            return f"{account.waiting_bytes} bytes waiting: the last are for others"
        if len(account.jobs) >= limits.max_jobs_per_client:
            return f"{len(account.jobs)} jobs unanswered, as many as one client may"
        if account.bytes + job.payload_bytes > limits.max_bytes_per_client:
            return f"{account.bytes} bytes unanswered: one client may have {limits.max_bytes_per_client}"
        return ""

    def _retry_after_s(self) -> float:
        """When about half of the queue will be gone."""
        if not self.served_per_s:
            return 1.0
        return min(max(self.waiting_jobs / self.served_per_s / 2, SHORTEST_RETRY_S), LONGEST_RETRY_S)

    def _job(self, client: bytes, message: Submit, payload: Frames, accepted: float, deadline_s: float) -> Job:
        return Job(
            seq=next(self._seq),
            client=client,
            name=message.job,
            image=message.image,
            options=message.options,
            payload=payload,
            priority=message.priority,
            accepted=accepted,
            deadline=accepted + (message.deadline_s or deadline_s),
        )

    def _add(self, job: Job) -> None:
        self._clients.setdefault(job.client, Account()).add(job)
        self._push_deadline(job)
        if self.tracing:
            self._tell("accepted", job)

    def _put(self, job: Job) -> None:
        """Where it waits."""
        if job.suspect:
            self._suspects.append(job)
        else:
            self._waiting.put(job)

    def _identity(self, lease: HeldLease) -> Identity | None:
        """What the image of this lease is known by."""
        if lease.identity is None and lease.job is not None:
            known = lease.job.suspicion
            return known.identity if known else self.remembered.identify(lease.job.image, lease.job.payload)
        return lease.identity

    def _suspicion(self, lease: HeldLease) -> Suspicion | None:
        """What is remembered of its image. No image is looked at for this: what comes and matches was told so."""
        if lease.job is not None:
            return lease.job.suspicion
        return self.remembered.by_identity(lease.identity) if lease.identity else None

    def _suspect(self, holder: Worker, death: Death, now: float) -> list[Suspicion]:
        """Suspect all images that this dead worker held; each once."""
        held: dict[Suspicion, bool] = {}  # whether it was surely under way
        for lease in holder.leases.values():
            suspicion = self.remembered.keep(self._suspicion(lease) or Suspicion(self._identity(lease)), now)
            if lease.job is not None:
                lease.job.suspicion = suspicion
            held[suspicion] = held.get(suspicion, False) or lease.started or lease.alone
        for suspicion, under_way in held.items():
            suspicion.deaths.append(death)
            suspicion.attempts += under_way or len(held) == 1
        return list(held)

    def _recognise(self) -> None:
        """Jobs with an image that is suspected by now are suspects, wherever they are."""
        for job in [job for job in self._jobs() if not job.suspect]:
            job.suspicion = self.remembered.known(job.image, job.payload)
            if job.suspect and job.worker is None:
                self._waiting.take(job)
                self._suspects.append(job)

    def _clear(self, suspicion: Suspicion | None) -> None:
        """A worker has lived through this image."""
        if suspicion is None:
            return
        self.remembered.clear(suspicion)
        for job in [job for job in self._jobs() if job.suspicion is suspicion]:
            job.suspicion, job.attempts, job.losses = None, 0, 0
        for job in [job for job in reversed(self._suspects) if not job.suspect]:
            self._suspects.remove(job)
            self._waiting.put(job, first=True)

    def _give_up_image(self, suspicion: Suspicion, reason: str) -> list[Action]:
        """It has cost enough workers: answer all jobs with it, and say which devices are not to blame."""
        suspicion.given_up = f"{reason}; it was on a worker that died {suspicion.losses} times"
        text = (f"{reason}; this image was on a worker that died {suspicion.losses} times: it is given up, and may be "
                f"tried again in {KEEP_S:g} s")  # fmt: skip
        acquitted = [death for death in suspicion.deaths if death.counts and suspicion.proven]
        for death in acquitted:
            death.counts = False
        return [*(Acquit(death.device) for death in acquitted), *self._answer_all(suspicion, text)]

    def _answer_all(self, suspicion: Suspicion, reason: str) -> list[Action]:
        """All jobs with this image, wherever they are."""
        jobs = [job for job in self._jobs() if job.suspicion is suspicion]
        return [action for job in jobs for action in self._fail(job, Code.WORKER_LOST, reason)]

    def _give_up(self, code: Code, reason: str) -> list[Action]:
        """Answer all that is here, but for what the spool has."""
        actions: list[Action] = []
        for job in list(self._jobs()):
            if job.client == DURABLE:
                if self.tracing:
                    self._tell("dropped", job, reason="it stays in the spool")
                actions += [*self._remove(job), Returned(job.name)]
            else:
                actions += self._fail(job, code, reason)
        return actions

    def _push_deadline(self, job: Job) -> None:
        heapq.heappush(self._deadlines, (job.deadline, job.seq, job))
        if len(self._deadlines) > 2 * self.unanswered + 64:  # answered jobs must not pile up behind a far deadline
            self._deadlines = [entry for entry in self._deadlines if not entry[2].answered]
            heapq.heapify(self._deadlines)

    def _stall_deadline(self, worker: Worker) -> float:
        if worker.evicted:
            return math.inf
        oldest = min(worker.progress, worker.heard) if worker.leases else worker.heard
        return oldest + self.limits.stall_s

    def _end_lease(self, worker: str, number: int, now: float) -> HeldLease | None:
        holder = self._workers.get(worker)
        if holder is None:
            return None
        holder.progress = holder.heard = now
        return holder.leases.pop(number, None)

    def _after_lease(self, worker: str, now: float) -> list[Action]:
        holder = self._workers.get(worker)
        return ([] if holder is None else self._stop_if_empty(holder)) + self._assign(now)

    def _stop_if_empty(self, worker: Worker) -> list[Action]:
        return [SendWorker(worker.name, Stop())] if worker.retiring and not worker.leases else []

    def _fail(self, job: Job, code: Code, reason: str) -> list[Action]:
        self._tell("failed", job, code=code, reason=reason)
        retry = self._retry_after_s() if code.retryable else None
        return [Answered(job.client, refused(job.name, code, reason, retry)), *self._remove(job)]

    def _tell(self, what: What, job: Job, code: str = "", reason: str = "") -> None:
        self.steps.append(
            Step(what, job.name, job.client, job.accepted, job.worker or "", job.lease, code=code, reason=reason)
        )

    def _remove(self, job: Job) -> list[Action]:
        """Take an answered job out of wherever it is; its worker is told if it still has it."""
        account = self._clients[job.client]
        account.remove(job)
        if not account.jobs:
            del self._clients[job.client]
        job.answered = True
        actions: list[Action] = []
        if job.worker is None:
            if job in self._suspects:
                self._suspects.remove(job)
            else:
                self._waiting.take(job)
        else:
            account.end_lease(job)
            lease = self._workers[job.worker].leases.get(job.lease)
            if lease is not None:
                lease.identity, lease.job = self._identity(lease), None  # its worker may still die of it
                actions.append(SendWorker(job.worker, Revoke(lease=job.lease)))
        job.payload = ()
        return actions

    def _assign(self, now: float) -> list[Action]:
        if not self._waiting and not self._suspects:
            return []
        actions: list[Action] = []
        open_workers = [worker for worker in self._workers.values() if not worker.retiring and not worker.alone]
        while (suspects := self._untried()) and (empty := [w for w in open_workers if not w.leases]):
            suspect, worker = _elsewhere(suspects, empty)
            self._suspects.remove(suspect)
            open_workers.remove(worker)
            actions.append(self._lease(suspect, worker, now))
        if suspects and open_workers:
            open_workers.remove(min(open_workers, key=_load))  # is left to empty, for the next suspect
        while self._waiting:
            free = [worker for worker in open_workers if len(worker.leases) < worker.window]
            if not free:
                break
            actions.append(self._lease(self._waiting.next(), min(free, key=_load), now))
        return actions

    def _untried(self) -> list[Job]:
        """Suspects whose image no worker has: two that try one image could both die of it."""
        if not self._suspects:
            return []
        leases = [lease for worker in self._workers.values() for lease in worker.leases.values()]
        tried = [self._suspicion(lease) for lease in leases]
        return [job for job in self._suspects if job.suspicion not in tried]

    def _lease_ahead(self, job: Job, now: float) -> list[Action]:
        """Give this job, which waits, the one place beyond a window, if it goes ahead of what is there."""
        if self._suspects or job.priority < 0:
            return []
        open_workers = [worker for worker in self._workers.values() if not worker.retiring and not worker.alone]
        room = [w for w in open_workers if len(w.leases) == w.window and self._goes_ahead(job, w)]
        return [self._lease(self._waiting.take(job), min(room, key=_load), now)] if room else []

    def _goes_ahead(self, job: Job, worker: Worker) -> bool:
        """Whether its client has nothing on a device, while another has several jobs on this one."""
        if self._clients[job.client].leases or job.priority < 0:
            return False
        held = Counter(lease.job.client for lease in worker.leases.values() if lease.job)
        return max(held.values(), default=0) > 1

    def _lease(self, job: Job, worker: Worker, now: float) -> Action:
        number = next(self._seq)
        assert len(worker.leases) <= worker.window, "a window is overfull"
        ahead = self._goes_ahead(job, worker)
        self._clients[job.client].lease(job)
        if not worker.leases:
            worker.progress = now
        worker.leases[number] = HeldLease(job, alone=job.suspect)
        job.worker, job.lease, job.leased_at = worker.name, number, now
        if self.tracing:
            self._tell("leased", job)
        lease = Lease(
            lease=number, image=job.image, options=job.options, deadline=job.deadline, alone=job.suspect, ahead=ahead
        )
        return SendWorker(worker.name, lease, job.payload, job.name if job.client == DURABLE else "")

    def check(self) -> None:
        """Raise AssertionError when an invariant does not hold."""
        self._waiting.check()
        waiting = list(self._waiting)
        leased = [lease.job for worker in self._workers.values() for lease in worker.leases.values() if lease.job]
        everywhere = [*waiting, *self._suspects, *leased]
        assert len(everywhere) == len(set(everywhere)), "a job is in two places"
        assert set(everywhere) == set(self._jobs()), "an unanswered job is nowhere, or an answered one somewhere"
        assert not any(job.answered for job in everywhere), "an answered job is still held"
        assert all(account.jobs for account in self._clients.values()), "an empty account is kept"
        for account in self._clients.values():
            account.check()
        assert not any(job.suspect or job.worker for job in waiting), "a suspect waits among the others"
        assert all(job.suspect for job in self._suspects), "an innocent job is suspected"
        assert all(job.attempts < self.limits.max_attempts for job in everywhere), "attempts are miscounted"
        self.remembered.check()
        assert not any(job.suspicion and job.suspicion.given_up for job in everywhere), "what is given up is tried"
        known = [self.remembered.known(job.image, job.payload) for job in everywhere if not job.suspect]
        assert not any(known), "a suspect is taken for another image"
        for worker in self._workers.values():
            assert not worker.alone or len(worker.leases) == 1, "a suspect has company"
            for number, lease in worker.leases.items():
                assert lease.job is None or (lease.job.worker, lease.job.lease) == (worker.name, number)
        live = {entry[2] for entry in self._deadlines if not entry[2].answered}
        assert live == set(everywhere), "a job has no deadline"
        open_workers = [w for w in self._workers.values() if not w.retiring and not w.alone]
        suspects = self._untried()
        assert not (suspects and any(not w.leases for w in open_workers)), "a suspect waits beside an idle worker"
        free = [w for w in open_workers if len(w.leases) < w.window]
        assert not waiting or len(free) <= bool(suspects), "a job waits although a window is free"
        trials = [self._suspicion(lease) for w in self._workers.values() for lease in w.leases.values() if lease.alone]
        known_trials = [id(trial) for trial in trials if trial]
        assert len(known_trials) == len(set(known_trials)), "an image is tried twice at once"


_NO_DEVICE = "no device can serve: all slots have failed; see the daemon's log, fix the cause, then reload"


def refused(job: str, code: Code, reason: str, retry_after_s: float | None = None) -> Failed:
    """A failure as a job's answer."""
    return Failed(job=job, code=code, reason=reason, retry_after_s=retry_after_s)


def _elsewhere(suspects: Sequence[Job], workers: Sequence[Worker]) -> tuple[Job, Worker]:
    """The first suspect and a device that its image has not cost a worker yet; the first of all where there is none."""
    pairs = [(job, worker) for job in suspects for worker in workers]
    return next((pair for pair in pairs if pair[1].device not in _devices(pair[0])), pairs[0])


def _devices(job: Job) -> set[str]:
    """On which workers died with its image."""
    return job.suspicion.devices if job.suspicion else set()


def _load(worker: Worker) -> float:
    return len(worker.leases) / worker.window
