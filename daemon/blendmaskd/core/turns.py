"""Which waiting job goes to which worker. Pure; the broker leases them.

Clients share. They take turns (`jobs.Waiting`). None may have more than `refusals.SHARE` times as many waiting as
places are free, so whoever comes next finds room. A job whose client has nothing on a device goes ahead of those whose
client has several there: it may take one place beyond a worker's window, and its worker runs it next. So a client with
one job at a time is served at nearly the pace of an idle daemon, however many jobs the others have.

The same holds among users, who run clients, so that nobody gets more by being many clients: they take turns before
their clients do, and one that has nothing on a device goes ahead of one that has several jobs there.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter

from blendmaskd.core.blame import Blame
from blendmaskd.core.jobs import Job, Jobs
from blendmaskd.core.leases import Worker, held


class Turns:
    def __init__(self, jobs: Jobs, workers: dict[str, Worker], blame: Blame) -> None:
        self._jobs = jobs
        self._workers = workers
        self._blame = blame

    def at_once(self, job: Job) -> Worker | None:
        """Who serves this job, which has come just now, where none waits and so nobody has a turn before it."""
        return None if job.suspect or self._jobs.waiting_jobs else _most_free(self._open())

    def next(self) -> Iterator[tuple[Job, Worker]]:
        """Who is served now. Each is out of where it waited, and must be leased before the next is asked for."""
        if not self._jobs.waiting_jobs:
            return
        open_workers = self._open()
        if self._jobs.suspects:
            yield from self._suspects(open_workers)
        while self._jobs.waiting and (worker := _most_free(open_workers)):
            yield self._jobs.waiting.next(), worker

    def _suspects(self, open_workers: list[Worker]) -> Iterator[tuple[Job, Worker]]:
        """Takes the workers that are theirs, or are to be, out of `open_workers`."""
        while (suspects := self._untried()) and (empty := [w for w in open_workers if not w.leases]):
            suspect, worker = _elsewhere(suspects, empty)
            self._jobs.suspects.remove(suspect)
            open_workers.remove(worker)
            yield suspect, worker
        if suspects and open_workers:
            open_workers.remove(min(open_workers, key=_load))  # is left to empty, for the next suspect

    def ahead(self, job: Job) -> Iterator[tuple[Job, Worker]]:
        """The same for this job, which waits: the one place beyond a window, if it goes ahead of what is there."""
        if self._jobs.suspects or job.priority < 0:
            return
        room = [w for w in self._open() if len(w.leases) == w.window and self.goes_ahead(job, w)]
        if room:
            yield self._jobs.waiting.take(job), min(room, key=_load)

    def goes_ahead(self, job: Job, worker: Worker) -> bool:
        """Whether its client, or its user, has nothing on a device, while another has several jobs on this one."""
        if len(worker.leases) < 2 or self._jobs.account(job.client).leases or job.priority < 0:
            return False
        jobs = [lease.job for lease in worker.leases.values() if lease.job]
        if _several([other.client for other in jobs]):
            return True
        return not self._jobs.of_user(job.user).leases and _several([other.user for other in jobs])

    def _open(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if not worker.retiring and not worker.alone]

    def _untried(self) -> list[Job]:
        """Suspects whose image no worker has: two that try one image could both die of it."""
        tried = [self._blame.suspicion(lease) for lease in held(self._workers.values())]
        return [job for job in self._jobs.suspects if job.suspicion not in tried]

    def check(self) -> None:
        for worker in self._workers.values():
            assert len(worker.leases) <= 1 or not any(lease.alone for lease in worker.leases.values()), (
                "a suspect has company"
            )
        open_workers, suspects = self._open(), self._untried()
        assert not (suspects and any(not w.leases for w in open_workers)), "a suspect waits beside an idle worker"
        free = [w for w in open_workers if len(w.leases) < w.window]
        assert not self._jobs.waiting or len(free) <= bool(suspects), "a job waits although a window is free"
        trials = [self._blame.suspicion(lease) for lease in held(self._workers.values()) if lease.alone]
        known_trials = [id(trial) for trial in trials if trial]
        assert len(known_trials) == len(set(known_trials)), "an image is tried twice at once"


_load = attrgetter("load")


def _most_free(workers: Sequence[Worker]) -> Worker | None:
    """One that has room in its window."""
    return min((worker for worker in workers if len(worker.leases) < worker.window), key=_load, default=None)


def _several(whose: Sequence[object]) -> bool:
    return len(set(whose)) < len(whose)


def _elsewhere(suspects: Sequence[Job], workers: Sequence[Worker]) -> tuple[Job, Worker]:
    """The first suspect and a device that its image has not cost a worker yet; the first of all where there is none."""
    pairs = [(job, worker) for job in suspects for worker in workers]
    known = {job: job.suspicion.devices if job.suspicion else set() for job in suspects}
    return next((pair for pair in pairs if pair[1].device not in known[pair[0]]), pairs[0])
