"""Lets the timed engine kill its process on an image 12 pixels wide, in workers that have this folder on PYTHONPATH."""
from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from blendmaskd_workers.engines.timed import TimedEngine, TimedInput
from chaos.poison import Poison

segment = TimedEngine.segment


def deadly_segment(self: TimedEngine, batch: Sequence[TimedInput]) -> list[int]:
    if any(item.image_size[1] == Poison.KILLS for item in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return segment(self, batch)


TimedEngine.segment = deadly_segment
