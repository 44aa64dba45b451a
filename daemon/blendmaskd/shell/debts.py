"""Debts: the bytes that were sent to clients and are still here, because nobody reads them.

ZeroMQ keeps up to a thousand messages for a peer that does not read, and tells neither how many there are nor how large
they are. But it tells when it has let go of a frame that it was to send without a copy, and messages to one peer go in
their order. So one frame in each `MARK_BYTES` is marked, and what was sent up to it counts until that one is gone.
"""
from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import zmq

MARK_BYTES = 64 << 10
MESSAGE_BYTES = 512  # that ZeroMQ and Python take for a message beside its bytes
BUSY_BYTES = 32 << 20  # owed to one client: then it is given nothing more that it asks for
MOST_BYTES = 64 << 20  # the answers to what was accepted before come on top of that, up to here
MOST_OF_ALL_BYTES = 256 << 20  # owed to all clients together


class Mark(NamedTuple):
    """A frame on its way, and what was sent up to it since the mark before."""

    sent: float
    bytes: int
    tracker: zmq.MessageTracker


class Debt(msgspec.Struct):
    """What one client has not read."""

    bytes: int = 0
    unmarked: int = 0  # of these
    marks: deque[Mark] = msgspec.field(default_factory=deque)


class Debts:
    """By client. `bytes` is the sum as it was when each of them was asked for last."""

    def __init__(self) -> None:
        self.bytes = 0
        self._debts: defaultdict[bytes, Debt] = defaultdict(Debt)
        _marked(b"")  # what watches marks has its thread and descriptors from the start

    def of(self, client: bytes) -> int:
        """What this client has not read, in bytes: at most `MARK_BYTES` too many."""
        if (debt := self._debts.get(client)) is None:
            return 0
        while debt.marks and debt.marks[0].tracker.done:
            paid = debt.marks.popleft().bytes
            debt.bytes -= paid
            self.bytes -= paid
        return debt.bytes

    def add(self, client: bytes, frames: Sequence[Any]) -> Sequence[Any]:
        """These frames are about to be sent to this client. Returns them, perhaps with a mark."""
        size = sum(map(len, frames)) + MESSAGE_BYTES
        debt = self._debts[client]
        debt.bytes += size
        debt.unmarked += size
        self.bytes += size
        if debt.unmarked < MARK_BYTES:
            return frames
        marked = _marked(memoryview(frames[-1]))
        debt.marks.append(Mark(time.monotonic(), debt.unmarked, marked.tracker))
        debt.unmarked = 0
        return [*frames[:-1], marked]

    def forget(self, client: bytes) -> None:
        """It has left, and ZeroMQ drops what it has for it."""
        debt = self._debts.pop(client, None)
        self.bytes -= debt.bytes if debt else 0

    def keep(self, connected: Callable[[bytes], bool]) -> None:
        """Forget whoever is not connected any more."""
        for client in [client for client in self._debts if not connected(client)]:
            self.forget(client)

    def longest(self) -> bytes | None:
        """Who has not read for the longest time, when it is too much for all together."""
        if self.bytes <= MOST_OF_ALL_BYTES:
            return None
        owing = [client for client in self._debts if self.of(client) and self._debts[client].marks]
        if self.bytes <= MOST_OF_ALL_BYTES or not owing:
            return None
        return min(owing, key=lambda client: self._debts[client].marks[0].sent)


def _marked(frame: bytes | memoryview) -> zmq.Frame:
    return zmq.Frame(frame, track=True, copy=False, copy_threshold=0)
