"""Huawei's double benchmark: with float64 as the truth, how much larger are a device's errors than a CPU's in float32?

Two programs that sum in different orders never agree to the last bit, so a fixed threshold is too strict for one tensor
and too lax for another. The errors of a sound float32 are the measure instead. Figures and limits are those of
msprobe, Huawei's precision tool: Ascend/mstt on gitee and gitcode, debug/accuracy_tools/msprobe,
api_accuracy_checker/precision_standard/standard_config.py and benchmark_compare.py (thresholds that are errors there: a
ratio over 2, of the largest relative error over 10), and compare/algorithm.py. Its fifth figure, the balance of errors
above and below, is not taken: `comparison.Difference.scale_bias` says more.
"""
from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

LIMITS = {"rmse": 2.0, "rel_mean": 2.0, "rel_max": 10.0, "small": 2.0}
SMALL = 1e-6  # of a float32 value; it has no relative error that counts
SMALL_ERROR = 1e-9  # that a small value may have
WITHOUT_ERROR = 10000.0  # the ratio where only the device has errors


def errors(truth: Tensor, values: Tensor) -> dict[str, float]:
    """RMSE, mean and largest relative error of the values that are not small, and the share of small ones that are off.

    A value that is not finite makes them infinite.
    """
    right, found = (tensor.detach().double().flatten().cpu().numpy() for tensor in (truth, values))
    absolute = np.abs(found - right)
    absolute[~np.isfinite(absolute)] = np.inf
    small = np.abs(right) <= SMALL
    large = absolute[~small]
    relative = large / np.abs(right[~small])
    return {
        "rmse": float(np.sqrt(np.square(large).sum() / max(large.size, 1))),
        "rel_mean": float(relative.sum() / max(large.size, 1)),
        "rel_max": float(relative.max(initial=0)),
        "small": float((absolute[small] > SMALL_ERROR).sum() / max(int(small.sum()), 1)),
    }


def compare(truth: Tensor, reference: Tensor, device: Tensor) -> dict[str, Any]:
    """The device's errors over the reference's, by the names of `LIMITS`, and which of them are ``over``."""
    base, found = errors(truth, reference), errors(truth, device)
    ratios = {name: _ratio(found[name], base[name]) for name in LIMITS}
    return {**ratios, "over": [name for name, limit in LIMITS.items() if ratios[name] > limit]}


def _ratio(device: float, reference: float) -> float:
    if not np.isfinite(device):
        return np.inf
    if reference == 0:
        return 1.0 if device == 0 else WITHOUT_ERROR
    return device / reference
