"""A loop's connection to its own process: leases come from a method call, answers go to futures.

It stands where `workers.channel.Channel` stands in a worker of the daemon. Each lease that `submit` makes ends exactly
once: with an `Answer`, with a `protocol.Failed`, or, when the loop is gone, with `WorkerLost`.
"""
from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

import msgspec

from daemon import protocol
from daemon.protocol import Failed, Image, Options


class WorkerLost(RuntimeError):
    """The worker ended before it answered; the image may be tried elsewhere."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an image; as `protocol.Result`, with its node."""

    width: int
    height: int
    node: str
    device: str
    timings: dict[str, float]
    detections: bytes  # msgpack list of COCO results


@dataclass(slots=True)
class Pending:
    """A lease that the loop holds."""

    future: Future[Answer | Failed]
    since: float


class LocalChannel:
    """`on_report` is called each second, in the loop's thread."""

    def __init__(self, node: str, device: str, on_report: Callable[[protocol.Report], None]) -> None:
        self.ready: Future[protocol.Ready] = Future()
        self._node = node
        self._device = device
        self._on_report = on_report
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # for the next three
        self._pending: dict[int, Pending] = {}
        self._closed: str | None = None  # why
        self._last_end = time.monotonic()
        self._inbox: deque[tuple[protocol.ToWorker, tuple[bytes, ...]]] = deque()
        self._woken = threading.Event()

    # -- the owner's side, any thread -------------------------------------------------------------------------------

    def submit(
        self, image: Image, payload: bytes | None, options: Options, deadline_s: float, *, alone: bool = False
    ) -> Future[Answer | Failed]:
        """Give the loop an image; cancelling the future revokes the lease. Raises `WorkerLost` if the loop is gone."""
        number = next(self._numbers)
        now = time.monotonic()
        lease = protocol.Lease(lease=number, image=image, options=options, deadline=now + deadline_s, alone=alone)
        future: Future[Answer | Failed] = Future()
        with self._lock:
            if self._closed is not None:
                raise WorkerLost(self._closed)
            self._pending[number] = Pending(future, now)
        future.add_done_callback(lambda done: self._tell(protocol.Revoke(lease=number)) if done.cancelled() else None)
        self._tell(lease, () if payload is None else (payload,))
        return future

    def stop(self) -> None:
        """Ask the loop to end."""
        self._tell(protocol.Stop())

    def close(self, reason: str) -> None:
        """The loop has ended: what it held is lost."""
        with self._lock:
            self._closed = reason
            left, self._pending = list(self._pending.values()), {}
        for pending in left:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(WorkerLost(reason))
        if not self.ready.done():
            self.ready.set_exception(WorkerLost(reason))

    @property
    def closed(self) -> str | None:
        """Why no more leases are taken; None while they are."""
        return self._closed

    def held(self) -> int:
        """Leases that have no answer yet."""
        return len(self._pending)

    def stalled_s(self) -> float:
        """For how long leases were held and none ended; 0 when none is held."""
        with self._lock:
            oldest = min((pending.since for pending in self._pending.values()), default=None)
            return 0.0 if oldest is None else time.monotonic() - max(oldest, self._last_end)

    def _tell(self, message: protocol.ToWorker, payload: tuple[bytes, ...] = ()) -> None:
        self._inbox.append((message, payload))
        self._woken.set()

    # -- the loop's side, see `workers.channel.Connection` ------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def send(self, message: protocol.FromWorker, payload: Sequence[bytes] = ()) -> None:
        match message:
            case protocol.Finished():
                self._end(message.lease, Answer(
                    width=message.width, height=message.height, node=self._node, device=self._device,
                    timings=message.timings, detections=payload[0],
                ))  # fmt: skip
            case protocol.FailedLease():
                self._end(message.lease, Failed(job="", code=message.code, reason=message.reason))
            case protocol.Report():
                self._on_report(message)
            case protocol.Ready():
                self.ready.set_result(message)

    def wake(self) -> None:
        self._woken.set()

    def wait(self, timeout_ms: int) -> None:
        self._woken.wait(timeout_ms / 1000)
        self._woken.clear()

    def receive(self) -> Iterator[tuple[protocol.ToWorker, Sequence[bytes]]]:
        while self._inbox:
            yield self._inbox.popleft()

    def _end(self, lease: int, outcome: Answer | Failed) -> None:
        with self._lock:
            pending = self._pending.pop(lease, None)
            self._last_end = time.monotonic()
        if pending is not None and pending.future.set_running_or_notify_cancel():
            pending.future.set_result(outcome)
