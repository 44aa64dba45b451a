"""Growth: does what a process holds grow while it works? Pure: samples in, a line through them out.

What it holds for a moment, such as the images of a flood, comes and goes by tens of MB, and a line through all samples
rises or falls with where in the run the floods are. What is never given back is there in quiet moments too: the line is
through the least of each `WINDOW_S`.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_MB_PER_MIN = 1.0
WINDOW_S = 20.0
NOISE_MB = 4.0  # a rise that allocators and page caches make in a short run; after 4 minutes the slope decides


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one process: the line of least squares through the least samples of its windows."""

    seconds: float  # that the samples span
    mb_per_min: float

    @property
    def rise_mb(self) -> float:
        """Along the line."""
        return self.mb_per_min * self.seconds / 60

    @property
    def grows(self) -> bool:
        return self.mb_per_min > MOST_MB_PER_MIN and self.rise_mb > NOISE_MB


def of(samples: Sequence[tuple[float, float]], warm_up_s: float) -> Growth | None:
    """From (time in seconds, MB), ascending; those of the first `warm_up_s` are not counted. None: too few are left."""
    begin = samples[0][0] + warm_up_s
    kept = [(time, mb) for time, mb in samples if time >= begin]
    windows = itertools.groupby(kept, lambda sample: (sample[0] - begin) // WINDOW_S)
    least = [min(window, key=lambda sample: sample[1]) for _, window in windows]
    if len(least) < 3:
        return None
    times, values = np.array(least).T
    slope = float(np.polyfit(times - times[0], values, 1)[0]) * 60
    return Growth(float(times[-1] - times[0]), slope)
