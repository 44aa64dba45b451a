"""Images that are ready for the device, and which of them run next."""
from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from blendmaskd import protocol
from blendmaskd_workers.batching import Batching

FULL = -math.inf  # how long a batch waits that needs no more
POLL_S = 0.001  # how often it is asked whether the device is free


@dataclass(slots=True, eq=False)
class Item:
    """A lease on its way through the worker."""

    lease: protocol.Lease
    payload: Sequence[Any]
    received: float
    prepared: Any = None
    ready_at: float = 0.0  # when it was prepared
    lone: bool = False  # not reported as started, because it is the only one
    revoked: bool = False
    preview: Image.Image | None = None  # to be drawn once its results are known
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> tuple[tuple[int, int], bool] | None:
        """What those that run in one batch agree in; None: it runs alone."""
        return None if self.lease.alone or self.prepared is None else (self.prepared.padded_size, self.lease.ahead)


class ReadyQueue:
    """Images that are ready for the device, in the order of their arrival here; a lone one may be unprepared.

    Those that go ahead are run first, in batches of their own: company would make them wait for its share of the time.
    An incomplete batch waits until its oldest image has been ready for `max_wait_s`, unless `lonely` says that no
    partner is to be expected.
    """

    def __init__(self, batching: Batching, max_wait_s: float, lonely: Callable[[], bool]) -> None:
        self._batching = batching
        self._max_wait_s = max_wait_s
        self._lonely = lonely
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()

    def put(self, item: Item) -> None:
        with self._changed:
            place = sum(other.lease.ahead for other in self._items) if item.lease.ahead else len(self._items)
            self._items.insert(place, item)
            self._changed.notify()

    def take(self) -> list[Item]:
        """Wait for the next batch: the oldest image and those of its padded size, as many as pay."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            while True:
                batch, left = self._due()
                if left <= 0:
                    return self._remove(batch)
                self._changed.wait(left)

    def take_ahead(self, at_work_until: float, is_free: Callable[[], bool], others: Callable[[], bool]) -> list[Item]:
        """The next batch to launch while the device is at work: one that is full, or what is there when it is free.

        The device is at work till then, by time.monotonic, and perhaps longer. From then on, nothing is waited for
        unless there are `others` that may come before it is free.
        """
        with self._changed:
            while True:
                batch, wait_s = self._due() if self._items else ([], math.inf)
                if wait_s == FULL:
                    return self._remove(batch)
                left_s = at_work_until - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                elif is_free():
                    return self._remove(batch if wait_s <= 0 else [])
                elif self._items or others():
                    self._changed.wait(POLL_S)
                else:
                    return []

    def _due(self) -> tuple[list[Item], float]:
        """The next batch, and for how many seconds it is better to wait for more."""
        batch, missing = self._matching()
        if not missing:
            return batch, FULL
        return batch, 0.0 if self._lonely() else batch[0].ready_at + self._max_wait_s - time.monotonic()

    def _remove(self, batch: list[Item]) -> list[Item]:
        for item in batch:
            self._items.remove(item)
        return batch

    def _matching(self) -> tuple[list[Item], bool]:
        """What may run now, and whether it would pay to have more."""
        kind = self._items[0].kind
        if kind is None:
            return [self._items[0]], False
        size, ahead = kind
        alike = [item for item in self._items if item.kind == kind]
        more_pay = not ahead and len(alike) < self._batching.target(size)
        return alike[: self._batching.choose(size, len(alike))], more_pay
