"""What a worker tells of itself each second: when that is due, and how long the device was busy meanwhile."""
from __future__ import annotations

import threading
import time
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
        self._idle_s = dict.fromkeys(IDLE, 0.0)

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
        with self._lock:
            self._seconds += times.busy_s
            for reason, seconds in times.idle_s.items():
                self._idle_s[reason] += seconds

    def take_idle(self) -> dict[str, float]:
        """Seconds by reason since the last call."""
        with self._lock:
            idle_s, self._idle_s = self._idle_s, dict.fromkeys(IDLE, 0.0)
            return {reason: max(seconds, 0.0) for reason, seconds in idle_s.items()}

    def take(self, now: float) -> float:
        """Seconds since the last call."""
        with self._lock:
            if self._since is not None and now > self._since:
                self._seconds += now - self._since
                self._since = now
            seconds, self._seconds = self._seconds, 0.0
            return seconds


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
