"""Ctrl-C, SIGTERM and the end of the terminal, at a place that is fit for them."""
from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")

STOPS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]  # no SIGHUP on Windows


class Interruptible:
    """Within it `STOPS` raise KeyboardInterrupt only in what `wait` runs; what comes elsewhere is kept for the next.

    So none can land between the parts of a step, such as an answer's result and its overlay. For main threads. A SIGHUP
    that the parent ignores, as nohup does, stays ignored.
    """

    def __init__(self) -> None:
        self._waiting = self._interrupted = False

    def __enter__(self) -> Self:
        hears = [n for n in STOPS if n.name != "SIGHUP" or signal.getsignal(n) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._on_signal) for number in hears}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait(self, run: Callable[[], T]) -> T:
        """What `run` returns, unless Ctrl-C comes or has come."""
        self._waiting = True
        try:
            if self._interrupted:
                raise KeyboardInterrupt
            return run()
        finally:
            self._waiting = False

    def _on_signal(self, *_: object) -> None:
        self._interrupted = True
        if self._waiting:
            raise KeyboardInterrupt
