"""Overtime: no image may keep a thread for ever.

Decoders are native code, which nothing interrupts, and a file can be made for one to take hours. So it is counted how
much of a CPU each image takes of the thread that decodes it, and what takes too much is ended with its process: of a
CPU, because a host that is busy or stands still says nothing of an image. Who counts needs the interpreter lock. Of a
decoder that keeps it, the daemon knows by the worker's silence (`restarts.stall_s`).
"""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Overtime:
    """What threads have spent on images that they are at, each known by its lease. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: dict[int, tuple[int, float]] = {}  # the clock of its thread, and what that showed

    @contextmanager
    def counted(self, lease: int) -> Iterator[None]:
        """This thread is at this lease's image meanwhile, and only at it."""
        clock = time.pthread_getcpuclockid(threading.get_ident())
        with self._lock:
            self._begun[lease] = clock, time.clock_gettime(clock)
        try:
            yield
        finally:
            with self._lock:
                del self._begun[lease]

    def over(self, most_s: float) -> list[int]:
        """The leases whose images have taken more of a CPU."""
        with self._lock:
            spent = {lease: time.clock_gettime(clock) - start for lease, (clock, start) in self._begun.items()}
        return [lease for lease, seconds in spent.items() if seconds > most_s]
