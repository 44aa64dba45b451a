"""Broker: queue, leases, windows, deadlines, retries, drain. Pure: events and `now` in, actions out.

The sentence that all of this defends: **every accepted job gets exactly one answer while the daemon lives.**

Where a job is:

=========  ===========================================================================================
waiting    in `Jobs.waiting`
suspect    in `Jobs.suspects`: workers died with its image; it is leased again alone, to an empty worker
leased     in one worker's `leases`
answered   nowhere
=========  ===========================================================================================

A lease outlives its job when the job is answered early (deadline, cancel, client gone): its `job` is then None, it
still fills its worker's window, and what the worker says of it later is dropped. So a worker's leases are exactly
those that it was sent and has not ended yet.

`refusals` says what is not accepted, `turns` which job goes to which worker, `blame` which image a worker died of.

Durable jobs are those of one client, `DURABLE`, which is `blendmaskd.core.durable` and never leaves: it gives them in
when there is room, owns their answers, hears of what it must not forget (`SendWorker.durable`, `Losses`), and is given
back what ends here without an answer (`Returned`).

Whatever ends a job, or refuses one, is one action, `Answered` or `Dropped`: who counts these has counted every outcome.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable

import msgspec

from blendmaskd import protocol
from blendmaskd.core.actions import DURABLE, Acquit, Action, Answered, Dropped, Evict, Losses, Returned, SendWorker
from blendmaskd.core.blame import Blame
from blendmaskd.core.jobs import Job, Jobs, Step, What, job_of
from blendmaskd.core.leases import HeldLease, Worker, held
from blendmaskd.core.refusals import NO_DEVICE, Limits, Refusals
from blendmaskd.core.regions import Memory, Regions
from blendmaskd.core.suspects import KEEP_S, Read, Suspects, Suspicion
from blendmaskd.core.turns import Turns
from blendmaskd.protocol import Code, Failed, Frames, Result, Submit

DURABLE_DEADLINE_S = 86400.0  # where its client names none


class Broker:
    """See the module. `check()` states the invariants; tests call it after every step.

    `read` gives bytes that lie in shared memory: an image is looked at only to see whether workers died with it.
    """

    def __init__(self, limits: Limits, read: Read | None = None) -> None:
        self.regions = Regions(limits.shared_memory_bytes)
        self.tracing = False  # told by the shell: whether `steps` get every change of a job's state, or only failures
        self.steps: list[Step] = []  # until the shell takes them
        self._seq = itertools.count(1)
        self.jobs = Jobs()
        self._workers: dict[str, Worker] = {}
        self._blame = Blame(self.jobs, Suspects(read) if read else Suspects())
        self._turns = Turns(self.jobs, self._workers, self._blame)
        self.refusals = Refusals(limits, self.jobs, self._workers, self.regions, self._blame.remembered)

    @property
    def limits(self) -> Limits:
        return self.refusals.limits

    # -- what the shell may ask -------------------------------------------------------------------------------------

    @property
    def unanswered(self) -> int:
        return len(self.jobs)

    @property
    def leased(self) -> int:
        return sum(len(worker.leases) for worker in self._workers.values())

    def holds_suspect(self, worker: str) -> bool:
        """Whether this worker's death says something of an image rather than of the worker."""
        return worker in self._workers and self._blame.holds_suspect(self._workers[worker])

    def last_heard(self, worker: str) -> float | None:
        return self._workers[worker].heard if worker in self._workers else None

    # -- clients ----------------------------------------------------------------------------------------------------

    def submit(self, client: bytes, message: Submit, payload: Frames, now: float, user: bytes = b"") -> list[Action]:
        """Accept a job, or answer at once why not. `user` runs the client; empty: nobody but it."""
        if message.job in self.jobs.account(client).jobs:
            return []  # its one answer is still to come
        job = job_of(next(self._seq), client, message, payload, now, self.limits.deadline_s)
        job.user = user or client
        if refusal := self.refusals.refusal(job, now):
            if self.tracing:
                self._tell("refused", job, code=refusal.code, reason=refusal.reason)
            return [Answered(client, refusal)]
        if worker := self._turns.at_once(job):
            self._add(job, waits=False)
            return [self._lease(job, worker, now)]
        self._add(job)
        return self._assign(now) or [self._lease(*turn, now) for turn in self._turns.ahead(job)]

    def adopt(
        self, message: Submit, payload: Frames, accepted: float, now: float, attempts: int = 0, losses: int = 0
    ) -> list[Action]:
        """Take on a durable job. It was `accepted`, and what it may not exceed was checked, when it came."""
        message = msgspec.structs.replace(message, priority=min(message.priority, 0))  # in its owner's turn as it comes
        job = job_of(next(self._seq), DURABLE, message, payload, accepted, DURABLE_DEADLINE_S)
        job.attempts, job.losses = attempts, losses
        job.suspicion = self._blame.remembered.find(job.image, payload, now)
        if losses:
            self._blame.charge(job, attempts, self.limits.max_attempts, now)
        self._add(job)
        self._blame.recognise()
        if job.suspicion and job.suspicion.given_up:
            return self._fail_all(self._blame.jobs_with(job.suspicion), Code.WORKER_LOST, job.suspicion.reason(now))
        return self._assign(now)

    def withdraw(self, name: str, now: float) -> list[Action]:
        """A durable job that is here is not wanted any more."""
        return self._remove(self.jobs.account(DURABLE).jobs[name]) + self._assign(now)

    @property
    def room(self) -> int:
        """How many more durable jobs it takes to keep the workers busy, without filling the queue with them."""
        wanted = min(2 * sum(w.window for w in self._workers.values() if not w.retiring), self.limits.max_jobs // 2)
        serving = self.refusals.available and not self.refusals.draining
        return max(wanted - len(self.jobs.account(DURABLE).jobs), 0) if serving else 0

    def forget_suspects(self, now: float) -> list[Action]:
        """What workers died with may go well by new settings and weights."""
        for suspicion in self._blame.remembered:
            self._blame.clear(suspicion)
        return self._assign(now)

    def cancel(self, client: bytes, message: protocol.Cancel, now: float) -> list[Action]:
        if (job := self.jobs.account(client).jobs.get(message.job)) is None:
            return []
        return self._fail(job, Code.CANCELLED, "cancelled by its client") + self._assign(now)

    def client_gone(self, client: bytes, now: float) -> list[Action]:
        """Nobody waits for this client's jobs any more."""
        actions: list[Action] = []
        for job in list(self.jobs.account(client).jobs.values()):
            if self.tracing:
                self._tell("dropped", job, code=Code.CANCELLED, reason="its client has left")
            actions += [Dropped(job.name, Code.CANCELLED), *self._remove(job)]
        return actions + self._assign(now)

    def shut_out(self, client: bytes, reason: str, now: float) -> list[Action]:
        """This client may not be here any more: its jobs end, and it is told so."""
        jobs = list(self.jobs.account(client).jobs.values())
        return self._fail_all(jobs, Code.UNAUTHORISED, reason) + self._assign(now)

    def open_region(self, name: str, memory: Memory) -> list[Action]:
        """Images may lie in this memory from now on. Raises `RegionError` when they may not."""
        self.regions.add(name, memory)
        return [SendWorker(worker, self.regions.opening(name)) for worker in self._workers]

    def end_region(self, name: str) -> list[Action]:
        """A region is gone: nobody may keep its memory. Jobs that lie in it are answered when they are read."""
        for lease in held(self._workers.values()):
            if lease.job and lease.job.image.place and lease.job.image.place.region == name:
                lease.identity = self._blame.identity(lease)  # while it can be had
        self.regions.remove(name)
        return [SendWorker(worker, protocol.CloseRegion(region=name)) for worker in self._workers]

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

    def started(self, worker: str, message: protocol.Started, now: float) -> list[Action]:
        holder = self._workers.get(worker)
        if holder is None:
            return []
        holder.progress = holder.heard = now
        for number in message.leases:
            if lease := holder.leases.get(number):
                if self.tracing and lease.job and not lease.started:  # a lone one may be told of twice
                    self._tell("started", lease.job)
                lease.started = True
        return []

    def finished(self, worker: str, message: protocol.Finished, payload: Frames, now: float) -> list[Action]:
        lease = self._end_lease(worker, message.lease, now)
        if lease is None:
            return []
        self._workers[worker].served = True
        self._blame.clear(self._blame.suspicion(lease))
        job = lease.job
        if job is None:
            return self._after_lease(worker, now)
        self.refusals.served(now - job.leased_at)
        device = self._workers[worker].device
        timings = {**message.timings, "queue": job.leased_at - job.accepted}
        total = now - job.accepted
        timings |= {"send": max(total - sum(timings.values()), 0.0), "total": total}
        result = Result(job=job.name, width=message.width, height=message.height, device=device, timings=timings)
        if self.tracing:
            self._tell("answered", job, code="ok")
        self._remove(job)
        return [Answered(job.client, result, payload), *self._after_lease(worker, now)]

    def failed(self, worker: str, message: protocol.FailedLease, now: float) -> list[Action]:
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
        suspicions = self._blame.suspect(holder, counts, now)
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
            self.jobs.end_lease(job)
            if job.client == DURABLE:
                actions.append(Losses(job.name, job.attempts, job.losses))
            self.jobs.suspects.appendleft(job)
        self._blame.recognise()
        for suspicion in suspicions:
            if suspicion.guilty(self.limits.max_attempts):
                actions += self._give_up_image(suspicion, reason)
        return actions + self._assign(now)

    # -- time and state ---------------------------------------------------------------------------------------------

    def expire(self, now: float) -> list[Action]:
        """Answer what is overdue; name workers that hang."""
        actions: list[Action] = []
        while (job := self.jobs.pop_overdue(now)) is not None:
            where = "in the queue" if job.worker is None else f"on {self._workers[job.worker].device}"
            text = f"the deadline passed {job.deadline - job.accepted:g} s after it arrived, {where}"
            actions += self._fail(job, Code.TIMEOUT, text)
        for worker in self._workers.values():
            if now >= worker.stall_deadline(self.limits.stall_s):
                worker.evicted = worker.retiring = True
                silent = now - worker.heard >= self.limits.stall_s
                what = "no sign of life" if silent else "no lease has ended"
                actions.append(Evict(worker.name, f"{what} for {self.limits.stall_s:g} s"))
        return actions + self._assign(now)

    def next_deadline(self) -> float | None:
        """When `expire` has something to do next."""
        times = [worker.stall_deadline(self.limits.stall_s) for worker in self._workers.values() if not worker.evicted]
        due = self.jobs.next_deadline()
        return min(times if due is None else [*times, due], default=None)

    def drain(self) -> None:
        """Accept nothing more; what was accepted is still answered."""
        self.refusals.draining = True

    def end_drain(self) -> list[Action]:
        """The time to finish is over: answer what is left."""
        return self._give_up(Code.DRAINING, "the daemon is stopping")

    def set_available(self, available: bool) -> list[Action]:
        """Whether any device can serve now or after a restart. When none can, nothing waits for one."""
        self.refusals.available = available
        if available:
            return []
        return self._give_up(Code.UNAVAILABLE, NO_DEVICE)

    def _add(self, job: Job, waits: bool = True) -> None:
        self.jobs.add(job, waits)
        if self.tracing:
            self._tell("accepted", job)

    def _give_up_image(self, suspicion: Suspicion, reason: str) -> list[Action]:
        """It has cost enough workers: answer all jobs with it, and say which devices are not to blame."""
        suspicion.given_up = f"{reason}; it was on a worker that died {suspicion.losses} times"
        text = (f"{reason}; this image was on a worker that died {suspicion.losses} times: it is given up, and may be "
                f"retried in {KEEP_S:g} s")  # fmt: skip
        acquitted = [death for death in suspicion.deaths if death.counts and suspicion.proven]
        for death in acquitted:
            death.counts = False
        failed = self._fail_all(self._blame.jobs_with(suspicion), Code.WORKER_LOST, text)
        return [*(Acquit(death.device) for death in acquitted), *failed]

    def _give_up(self, code: Code, reason: str) -> list[Action]:
        """Answer all that is here, but for what the spool has."""
        actions: list[Action] = []
        for job in list(self.jobs):
            if job.client == DURABLE:
                if self.tracing:
                    self._tell("dropped", job, reason="it stays in the spool")
                actions += [*self._remove(job), Returned(job.name)]
            else:
                actions += self._fail(job, code, reason)
        return actions

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
        return [SendWorker(worker.name, protocol.Stop())] if worker.retiring and not worker.leases else []

    def _fail_all(self, jobs: Iterable[Job], code: Code, reason: str) -> list[Action]:
        return [action for job in jobs for action in self._fail(job, code, reason)]

    def _fail(self, job: Job, code: Code, reason: str) -> list[Action]:
        self._tell("failed", job, code=code, reason=reason)
        retry = self.refusals.retry_after_s() if code.retryable else None
        failed = Failed(job=job.name, code=code, reason=reason, retry_after_s=retry)
        return [Answered(job.client, failed), *self._remove(job)]

    def _tell(self, what: What, job: Job, code: str = "", reason: str = "") -> None:
        self.steps.append(Step(what, job.name, job.client, job.accepted, job.worker or "", job.lease, code, reason))

    def _remove(self, job: Job) -> list[Action]:
        """Take an answered job out of wherever it is; its worker is told if it still has it."""
        self.jobs.remove(job)
        actions: list[Action] = []
        if job.worker is not None and (lease := self._workers[job.worker].leases.get(job.lease)):
            lease.identity, lease.job = self._blame.identity(lease), None  # its worker may still die of it
            actions.append(SendWorker(job.worker, protocol.Revoke(lease=job.lease)))
        job.payload = ()
        return actions

    def _assign(self, now: float) -> list[Action]:
        return [self._lease(*turn, now) for turn in self._turns.next()]

    def _lease(self, job: Job, worker: Worker, now: float) -> Action:
        number = next(self._seq)
        assert len(worker.leases) <= worker.window, "a window is overfull"
        ahead = self._turns.goes_ahead(job, worker)
        self.jobs.lease(job)
        if not worker.leases:
            worker.progress = now
        worker.leases[number] = HeldLease(job, alone=job.suspect)
        job.worker, job.lease, job.leased_at = worker.name, number, now
        if self.tracing:
            self._tell("leased", job)
        lease = protocol.Lease(
            lease=number, image=job.image, options=job.options, deadline=job.deadline, alone=job.suspect, ahead=ahead
        )
        return SendWorker(worker.name, lease, job.payload, job.name if job.client == DURABLE else "")

    def check(self) -> None:
        self.jobs.check()
        self._blame.check()
        self._turns.check()
        assert all(job.attempts < self.limits.max_attempts for job in self.jobs), "attempts are miscounted"
        leased = {lease.job for lease in held(self._workers.values()) if lease.job}
        assert leased == {job for job in self.jobs if job.worker is not None}, "a leased job is nowhere"
        for worker in self._workers.values():
            for number, lease in worker.leases.items():
                assert lease.job is None or (lease.job.worker, lease.job.lease) == (worker.name, number)
