"""Overtime: no image may keep a thread for ever.

Decoders are native code, which nothing interrupts, and a file can be made for one to take hours. So it is counted how
much of a CPU each image takes of the thread that decodes it, and what takes too much is ended with its process: of a
CPU, because a host that is busy or stands still says nothing of an image. Who counts needs the interpreter lock. Of a
decoder that keeps it, the daemon knows by the worker's silence (`restarts.stall_s`).
"""
from __future__ import annotations

import threading
import time


class Overtime:
    """The images that threads are at, each known by its lease. For any thread.

    A thread's clock costs a system call, so it is read for who is looked at, and not for each image: what an image took
    before it was looked at first does not count.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clocks: dict[int, int] = {}  # of the threads
        self._first: dict[int, float] = {}  # what they showed when they were looked at first

    def begin(self, lease: int) -> None:
        """This thread is at this lease's image from now on, and only at it."""
        with self._lock:
            self._clocks[lease] = time.pthread_getcpuclockid(threading.get_ident())

    def end(self, lease: int) -> None:
        """It is not any more."""
        with self._lock:
            del self._clocks[lease]

    def over(self, most_s: float) -> list[int]:
        """The leases whose images have taken more of a CPU since this was asked first. One thread asks."""
        with self._lock:
            now = {lease: time.clock_gettime(clock) for lease, clock in self._clocks.items()}
        self._first = {lease: self._first.get(lease, seconds) for lease, seconds in now.items()}
        return [lease for lease, seconds in now.items() if seconds - self._first[lease] > most_s]
