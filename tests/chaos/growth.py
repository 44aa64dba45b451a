"""Growth: does what a process holds grow while it works? Pure: samples in, a line through them out."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_MB_PER_MIN = 1.0
NOISE_MB = 4.0  # a rise that allocators and page caches make in a short run; after 4 minutes the slope decides


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one process: the line of least squares through its samples."""

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
    kept = [(time, mb) for time, mb in samples if time >= samples[0][0] + warm_up_s]
    if len(kept) < 3:
        return None
    times, values = np.array(kept).T
    slope = float(np.polyfit(times - times[0], values, 1)[0]) * 60
    return Growth(float(times[-1] - times[0]), slope)
