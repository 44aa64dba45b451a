"""A loop's connection to its own process: leases come from a method call, answers go to futures.

It stands where `blendmaskd_workers.channel.Channel` stands in a worker of the daemon. Each lease that `submit` makes
ends exactly once: with an `Answer`, with a `protocol.Failed`, or, when the loop is gone, with `WorkerLost`.

As the broker does with a suspect, an image that is to be alone is given to the loop when that holds nothing, and no
other until it has ended: whatever it does to the process, it does to itself.
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

from blendmaskd import protocol
from blendmaskd.protocol import Failed, Image, Options


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


@dataclass(slots=True, eq=False)
class Pending:
    lease: protocol.Lease
    payload: tuple[bytes, ...]
    future: Future[Answer | Failed]
    on_start: Callable[[], object]
    since: float | None = None  # the loop holds it


class LocalChannel:
    """`on_report` is called each second, in the loop's thread; `on_end` with each image's future when it is done."""

    def __init__(
        self, node: str, device: str, on_report: Callable[[protocol.Report], None],
        on_end: Callable[[Future[Answer | Failed]], object] = lambda _: None,
    ) -> None:  # fmt: skip
        self.ready: Future[protocol.Ready] = Future()
        self._node = node
        self._device = device
        self._on_report = on_report
        self._on_end = on_end
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()  # for the next four
        self._pending: dict[int, Pending] = {}
        self._waiting: deque[Pending] = deque()  # those that the loop does not hold yet, in order
        self.closed: str | None = None  # why no more leases are taken
        self._last_end = time.monotonic()
        self._inbox: deque[tuple[protocol.ToWorker, tuple[bytes, ...]]] = deque()
        self._woken = threading.Event()

    # -- the owner's side, any thread -------------------------------------------------------------------------------

    def submit(
        self,
        image: Image,
        payload: bytes | None,
        options: Options,
        deadline_s: float,
        *,
        alone: bool = False,
        on_start: Callable[[], object] = lambda: None,
    ) -> Future[Answer | Failed]:
        """Give the loop an image; cancelling the future revokes the lease. Raises `WorkerLost` if the loop is gone.

        `on_start` is called, in any thread, when the loop gets it.
        """
        number = next(self._numbers)
        deadline = time.monotonic() + deadline_s
        lease = protocol.Lease(lease=number, image=image, options=options, deadline=deadline, alone=alone)
        pending = Pending(lease, () if payload is None else (payload,), Future(), on_start)
        with self._lock:
            if self.closed is not None:
                raise WorkerLost(self.closed)
            self._pending[number] = pending
            self._waiting.append(pending)
            self._hand_out()
        pending.future.add_done_callback(self._on_end)
        pending.future.add_done_callback(lambda done: self._revoke(pending) if done.cancelled() else None)
        return pending.future

    def stop(self) -> None:
        self._tell(protocol.Stop())

    def close(self, reason: str) -> None:
        """The loop has ended: what it held is lost."""
        with self._lock:
            self.closed = reason
            left, self._pending = list(self._pending.values()), {}
            self._waiting.clear()
        for pending in left:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(WorkerLost(reason))
        if not self.ready.done():
            self.ready.set_exception(WorkerLost(reason))

    def held(self) -> int:
        """Leases that have no answer yet."""
        return len(self._pending)

    def stalled_s(self) -> float:
        """For how long leases were held and none ended; 0 when none is held."""
        with self._lock:
            since = [pending.since for pending in self._pending.values() if pending.since is not None]
            oldest = min(since, default=None)
            return 0.0 if oldest is None else time.monotonic() - max(oldest, self._last_end)

    def _hand_out(self) -> None:
        """Give the loop what it may hold now. Under the lock."""
        held = [pending.lease for pending in self._pending.values() if pending.since is not None]
        alone = any(lease.alone for lease in held)
        while self._waiting and not alone and not (held and self._waiting[0].lease.alone):
            pending = self._waiting.popleft()
            pending.since = time.monotonic()
            pending.on_start()
            held.append(pending.lease)
            alone = pending.lease.alone
            self._tell(pending.lease, pending.payload)

    def _revoke(self, pending: Pending) -> None:
        with self._lock:
            if pending in self._waiting:
                self._waiting.remove(pending)
                self._pending.pop(pending.lease.lease, None)
                self._hand_out()
                return
        self._tell(protocol.Revoke(lease=pending.lease.lease))

    def _tell(self, message: protocol.ToWorker, payload: tuple[bytes, ...] = ()) -> None:
        self._inbox.append((message, payload))
        self._woken.set()

    # -- the loop's side, see `blendmaskd_workers.channel.Connection` --------------------------------------------------

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
            self._hand_out()
        if pending is not None and pending.future.set_running_or_notify_cancel():
            pending.future.set_result(outcome)
