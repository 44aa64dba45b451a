"""What a worker tells of itself each second: when that is due, and how long the device was busy meanwhile."""
from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from blendmaskd.protocol import IDLE
from blendmaskd_workers.engines import Times

REPORT_S = 1.0


class Busy:
    """How long the device was busy: entered while it is waited for, or told; read by the main thread at any time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None
        self._seconds = 0.0
        self._told: deque[Times] = deque()

    def __enter__(self) -> None:
        with self._lock:
            self._since = time.monotonic()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            assert self._since is not None
            self._seconds += time.monotonic() - self._since
            self._since = None

    def add(self, times: Times) -> None:
        """By the device's own clock."""
        self._told.append(times)

    def take(self, now: float) -> tuple[float, dict[str, float]]:
        """Seconds busy, and idle by reason, since the last call."""
        with self._lock:
            if self._since is not None and now > self._since:
                self._seconds += now - self._since
                self._since = now
            seconds, self._seconds = self._seconds, 0.0
        told = [self._told.popleft() for _ in range(len(self._told))]
        idle_s = {reason: max(sum(times.idle_s[reason] for times in told), 0.0) for reason in IDLE}
        return seconds + sum(times.busy_s for times in told), idle_s


class Reporter:
    """Calls `report(start, end)` once per second, with adjoining bounds."""

    def __init__(self, report: Callable[[float, float], None]) -> None:
        self._report = report
        self._start = time.monotonic()

    def due_ms(self) -> int:
        return max(0, int((self._start + REPORT_S - time.monotonic()) * 1000) + 1)

    def report_if_due(self) -> None:
        now = time.monotonic()
        if now - self._start >= REPORT_S:
            self._report(self._start, now)
            self._start = now
