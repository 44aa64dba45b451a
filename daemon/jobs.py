"""Jobs, and the order in which they wait. Pure; the broker decides what becomes of them."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from daemon.protocol import Frames, Image, Options

UNSTARTED_LOSSES = 3


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

    @property
    def suspect(self) -> bool:
        return self.attempts > 0 or self.losses >= UNSTARTED_LOSSES

    @property
    def payload_bytes(self) -> int:
        return sum(len(frame) for frame in self.payload) + (self.image.place.bytes if self.image.place else 0)


class Waiting:
    """Jobs that wait for any worker, by priority and then by arrival."""

    def __init__(self) -> None:
        self._queues: dict[int, OrderedDict[int, Job]] = {}  # priority: seq: job; no queue is empty
        self.payload_bytes = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Job]:
        for queue in self._queues.values():
            yield from queue.values()

    def put(self, job: Job, first: bool = False) -> None:
        """Last of its priority, or first: it was there before."""
        queue = self._queues.setdefault(job.priority, OrderedDict())
        queue[job.seq] = job
        if first:
            queue.move_to_end(job.seq, last=False)
        self.payload_bytes += job.payload_bytes

    def first(self) -> Job:
        return next(iter(self._queues[max(self._queues)].values()))

    def take(self, job: Job) -> Job:
        """Out of here, from wherever it stands."""
        queue = self._queues[job.priority]
        del queue[job.seq]
        if not queue:
            del self._queues[job.priority]
        self.payload_bytes -= job.payload_bytes
        return job

    def check(self) -> None:
        assert self.payload_bytes == sum(job.payload_bytes for job in self), "bytes are miscounted"
        assert all(self._queues.values()), "an empty queue is kept"
