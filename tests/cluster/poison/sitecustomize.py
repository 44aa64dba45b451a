"""Lets the timed engine kill its process on an image 12 pixels wide, in workers that have this folder on PYTHONPATH."""
from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from blendmaskd_workers.engines.timed import TimedEngine, TimedInput, TimedRun
from chaos.poison import Poison

launch = TimedEngine.launch


def deadly_launch(self: TimedEngine, batch: Sequence[TimedInput]) -> TimedRun:
    if any(item.image_size[1] == Poison.KILLS for item in batch):
        os.kill(os.getpid(), signal.SIGKILL)
    return launch(self, batch)


TimedEngine.launch = deadly_launch
