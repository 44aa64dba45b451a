"""Which jobs are refused, and why: bounds, given-up images, no device, too much for one client. Pure."""
from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec

from blendmaskd.core.actions import refused
from blendmaskd.core.jobs import Job, Jobs
from blendmaskd.core.leases import Worker
from blendmaskd.core.regions import Regions
from blendmaskd.core.suspects import Suspects
from blendmaskd.protocol import Code, Failed, Frames, Image

SHORTEST_RETRY_S = 0.05
LONGEST_RETRY_S = 30.0
UNKNOWN_RETRY_S = 1.0  # while nothing is known of how fast jobs are served
LATEST = 1 / 16  # what the last lease counts for in the mean of them
SHARE = 7  # of the queue one client alone can fill 7 of 8 parts, two 7 of 15 each
USERS_SHARE = 63  # all clients of a user together: what is left for one that comes next is for other users' too
MOST_JOBS_OF_A_CLIENT = "the maximum for one client (queue.max_jobs_per_client)"
NO_DEVICE = "no device can serve: all slots have failed; see the daemon's log, fix the cause, then reload"


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


class Refusals:
    """The shell sets `limits`."""

    def __init__(
        self, limits: Limits, jobs: Jobs, workers: Mapping[str, Worker], regions: Regions, remembered: Suspects
    ) -> None:
        self.limits = limits
        self.draining = False
        self.available = True  # some device serves, or will
        self._lease_s = 0.0  # how long the last leases took
        self._jobs = jobs
        self._workers = workers
        self._regions = regions
        self._remembered = remembered

    def unfit(self, name: str, image: Image, size: int) -> Failed | None:
        """Why this image of `size` bytes cannot be a job now, however much room there is."""
        if size > self.limits.max_image_bytes:
            most = f"{self.limits.max_image_bytes} (limits.max_image_bytes)"
            return refused(name, Code.TOO_LARGE, f"{size} bytes, the limit is {most}")
        if image.kind == "path" and not self.limits.paths_allowed:
            return refused(name, Code.BAD_REQUEST, "images by path are disabled: paths.roots is not set")
        if image.place and (complaint := self._regions.complaint(image.place)):
            return refused(name, Code.BAD_REQUEST, complaint)
        if self.draining:
            return refused(name, Code.DRAINING, "the daemon is stopping", LONGEST_RETRY_S)
        return None

    def given_up(self, name: str, image: Image, payload: Frames, now: float) -> Failed | None:
        """Why this image is not tried any more: it was given up lately."""
        if (suspicion := self._remembered.find(image, payload, now)) and suspicion.given_up:
            return refused(name, Code.WORKER_LOST, suspicion.reason(now))
        return None

    def refusal(self, job: Job, now: float) -> Failed | None:
        """Why this job is not accepted."""
        size = job.payload_bytes
        if unfit := self.unfit(job.name, job.image, size):
            return unfit
        job.suspicion = self._remembered.find(job.image, job.payload, now)
        if job.suspicion and job.suspicion.given_up:
            return refused(job.name, Code.WORKER_LOST, job.suspicion.reason(now))
        if not self.available:
            return refused(job.name, Code.UNAVAILABLE, NO_DEVICE, LONGEST_RETRY_S)
        jobs, waiting_bytes = self._jobs.waiting_jobs, self._jobs.waiting_bytes
        if jobs >= self.limits.max_jobs:
            return refused(job.name, Code.BUSY, f"{jobs} jobs are waiting", self.retry_after_s())
        if waiting_bytes + size > self.limits.max_bytes:
            return refused(job.name, Code.BUSY, f"{waiting_bytes} bytes are waiting", self.retry_after_s())
        greed = self._greed(job, self.limits.max_jobs - jobs, self.limits.max_bytes - waiting_bytes)
        return refused(job.name, Code.BUSY, greed, self.retry_after_s()) if greed else None

    def _greed(self, job: Job, places: int, free_bytes: int) -> str:
        """What of its client's, or of its user's clients', is too much for one; empty: nothing."""
        limits, account, user = self.limits, self._jobs.account(job.client), self._jobs.of_user(job.user)
        all_of = "all clients of this user have"
        for whose, share, tally in (("this client has", SHARE, account), (all_of, USERS_SHARE, user)):
            if not tally.waiting:
                continue
            if tally.waiting >= share * places:
                return f"{whose} {tally.waiting} jobs waiting: the last places are reserved for others"
            if tally.waiting_bytes >= share * free_bytes:
                return f"{whose} {tally.waiting_bytes} bytes waiting: the last ones are reserved for others"
        if account.count >= limits.max_jobs_per_client:
            return f"this client has {account.count} unanswered jobs, {MOST_JOBS_OF_A_CLIENT}"
        if account.count and account.bytes + job.payload_bytes > limits.max_bytes_per_client:
            most = f"{limits.max_bytes_per_client} (queue.max_bytes_per_client)"
            return f"this client has {account.bytes} unanswered bytes, the maximum for one client is {most}"
        return ""

    def served(self, lease_s: float) -> None:
        """A lease has ended with a result, after so many seconds."""
        self._lease_s += (lease_s - self._lease_s) * (LATEST if self._lease_s else 1)

    def retry_after_s(self) -> float:
        """When about half of the queue will be gone, by Little's law; idle times say nothing of that."""
        leased = sum(len(worker.leases) for worker in self._workers.values())
        if not leased or not self._lease_s:
            return UNKNOWN_RETRY_S
        return min(max(self._jobs.waiting_jobs * self._lease_s / leased / 2, SHORTEST_RETRY_S), LONGEST_RETRY_S)
