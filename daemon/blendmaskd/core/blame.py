"""Whose fault a worker's death is: of the images that it held, or its device's. Pure.

When a worker dies, every image that it held is a suspect: what a worker says of what it has started may not arrive any
more, and a decoder crashes before anything starts. A suspect is leased alone, to another device if one is free, and is
cleared by a result. `max_attempts` deaths name it for sure: it is given up, and so is every job with the same image,
wherever it is, and whichever comes within `suspects.KEEP_S`. So an image costs `max_attempts` workers, however many
clients send it, how often, and whether they wait for the answer; only several devices that have it at the same moment
can all die of it. Its neighbours lose nothing. The deaths that it is to blame for do not count against the devices
(`holds_suspect`, `Acquit`).

`suspects` remembers the images; here are the jobs and leases that have them.
"""
from __future__ import annotations

from blendmaskd.core.jobs import Job, Jobs
from blendmaskd.core.leases import HeldLease, Worker
from blendmaskd.core.suspects import Death, Identity, Suspects, Suspicion


class Blame:
    def __init__(self, jobs: Jobs, remembered: Suspects) -> None:
        self.remembered = remembered
        self._jobs = jobs

    def identity(self, lease: HeldLease) -> Identity | None:
        """What the image of this lease is known by."""
        if lease.identity is None and lease.job is not None:
            known = lease.job.suspicion
            return known.identity if known else self.remembered.identify(lease.job.image, lease.job.payload)
        return lease.identity

    def suspicion(self, lease: HeldLease) -> Suspicion | None:
        """What is remembered of its image. No image is looked at for this: what comes and matches was told so."""
        if lease.job is not None:
            return lease.job.suspicion
        return self.remembered.by_identity(lease.identity) if lease.identity else None

    def holds_suspect(self, worker: Worker) -> bool:
        """Whether this worker's death says something of an image rather than of the worker."""
        if not worker.alone:
            return False
        [lease] = worker.leases.values()
        if (suspicion := self.suspicion(lease)) is None:
            return False
        return suspicion.attempts > 0 or worker.served or suspicion.devices != {worker.device}

    def suspect(self, dead: Worker, counts: bool, now: float) -> list[Suspicion]:
        """Suspect all images that this dead worker held; each once. `counts`: against its device."""
        under_way: dict[Suspicion, bool] = {}  # surely
        for lease in dead.leases.values():
            suspicion = self.remembered.keep(self.suspicion(lease) or Suspicion(self.identity(lease)), now)
            if lease.job is not None:
                lease.job.suspicion = suspicion
            under_way[suspicion] = under_way.get(suspicion, False) or lease.started or lease.alone
        death = Death(dead.device, dead.served, counts)
        for suspicion, surely in under_way.items():
            suspicion.deaths.append(death)
            suspicion.attempts += surely or len(under_way) == 1
        return list(under_way)

    def charge(self, job: Job, attempts: int, max_attempts: int, now: float) -> None:
        """Count the workers that died with this job under way before it came here."""
        suspicion = job.suspicion or Suspicion(self.remembered.identify(job.image, job.payload))
        job.suspicion = suspicion = self.remembered.keep(suspicion, now)
        suspicion.attempts = max(suspicion.attempts, attempts)
        if attempts >= max_attempts:
            suspicion.given_up = suspicion.given_up or f"it was on a worker that died {attempts} times"

    def recognise(self) -> None:
        """Jobs with an image that is suspected by now are suspects, wherever they are."""
        for job in [job for job in self._jobs if not job.suspect]:
            job.suspicion = self.remembered.known(job.image, job.payload)
            if job.suspect and job.worker is None:
                self._jobs.waiting.take(job)
                self._jobs.suspects.append(job)

    def clear(self, suspicion: Suspicion | None) -> None:
        """A worker has lived through this image."""
        if suspicion is None:
            return
        self.remembered.clear(suspicion)
        for job in self.jobs_with(suspicion):
            job.suspicion, job.attempts, job.losses = None, 0, 0
        for job in [job for job in reversed(self._jobs.suspects) if not job.suspect]:
            self._jobs.suspects.remove(job)
            self._jobs.waiting.put(job, first=True)

    def jobs_with(self, suspicion: Suspicion) -> list[Job]:
        """All jobs with this image, wherever they are."""
        return [job for job in self._jobs if job.suspicion is suspicion]

    def check(self) -> None:
        self.remembered.check()
        assert not any(job.suspicion and job.suspicion.given_up for job in self._jobs), "what is given up is tried"
        known = [self.remembered.known(job.image, job.payload) for job in self._jobs if not job.suspect]
        assert not any(known), "a suspect is taken for another image"
