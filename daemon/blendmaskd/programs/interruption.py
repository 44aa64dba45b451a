"""Ctrl-C at a place that is fit for it."""
from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")


class Interruptible:
    """Within it Ctrl-C raises KeyboardInterrupt only in what `wait` runs; what comes elsewhere is kept for the next.

    So it cannot land between the parts of a step, such as an answer's result and its overlay. For main threads.
    """

    def __init__(self) -> None:
        self._waiting = self._interrupted = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

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
