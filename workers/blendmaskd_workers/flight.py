"""A batch on its way through the device."""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from blendmaskd_workers.engines import Run
from blendmaskd_workers.ready import Item


@dataclass(slots=True)
class Flight:
    """A batch that the device was asked for."""

    batch: list[Item]
    run: Run
    completed: float = 0.0  # when all of the first visit was asked for

    @property
    def kind(self) -> tuple[tuple[int, int], int]:
        """What its time depends on: the images' padded size, and how many there are."""
        return self.batch[0].prepared.padded_size, len(self.batch)

    def complete(self) -> Flight:
        self.run.complete()
        self.completed = time.monotonic()
        return self

    def choose(self) -> Flight:
        self.run.choose()
        return self

    def through(self) -> list[Any]:
        """What is left of a run whose beginning is asked for, with no other beside it."""
        self.run.complete()
        self.run.choose()
        return self.collect()

    def collect(self) -> list[Any]:
        outputs = self.run.collect()
        if len(outputs) != len(self.batch):
            raise RuntimeError(f"the engine gave {len(outputs)} outputs for {len(self.batch)} images")
        return outputs
