"""The evaluation programs' logs to the letter: people compare them, line by line, with the logs of other runs."""
from __future__ import annotations

import copy
from typing import Any

from blendmaskd_workers.evaluation import logs

_TENSOR = {
    "name": "p3", "shape": [1, 256, 8, 12], "abs_mean": 1e-6, "abs_max": 2e-5, "rel_mean": 3e-6, "rel_max": 4e-3,
    "p50": 1e-7, "p90": 2e-7, "p99": 3e-7, "cosine": 0.75, "rmse_over_std": 0.5, "scale_bias": -0.25,
    "over": 1, "of": 8,
}  # fmt: skip
_MODULE = {
    "name": "backbone.bottom_up", "tensors": 3, "abs_mean": 1e-6, "abs_max": 2e-5, "rel_mean": 3e-6, "rel_max": 4e-3,
    "cosine": 1.0, "rmse_over_std": 0.0, "scale_bias": 0.0, "over": 0, "of": 0,
}  # fmt: skip
PRECISION: dict[str, Any] = {
    "run": {"config": "R_50.yaml", "reference": "cpu", "device": "npu:0", "seed": 0},
    "scenes": [{
        "scene": "shapes", "size": "64x96", "network_input": "96x128",
        "losses": [{"name": "loss_fcos_cls", "reference": 0.5, "device": 0.25, "abs_diff": 0.25, "rel_diff": 0.5,
                    "over": 1, "of": 1}],
        "mean_rel_diff": 0.5, "max_rel_diff": 0.75,
        "tensors": [_TENSOR],
        "detections": {"reference": 3, "device": 2, "matched": 1, "box_diff_px": 0.5, "score_diff": 1e-3,
                       "iou_mean": 0.875, "iou_min": 0.75},
        "double_benchmark": [{"name": "p3", "rmse": 2.5, "rel_mean": 1.25, "rel_max": 8.0, "small": 1.0,
                              "over": ["rmse"]}],
        "ladder": [{"name": "fp16", "levels": [7.5, 8.25], "rmse_over_std": 1e-3, "scale_bias": -1e-5,
                    "max_rel_diff": 2e-4}],
    }],
    "trace": {"modules": [_MODULE], "first": None, "worst": "mask_head"},
    "ladder": {"convolutions": [{"name": "stem", "nearest": "fp16", "explained_percent": 99.5, "size": "bf16",
                                  "factor": 1.0}],
               "verdict": "fp16 in all 1 convolutions"},
    "warnings": ["loss_mask is near ln 2"],
    "failures": ["shapes: loss_fcos_cls: 50% off"],
}  # fmt: skip
PRECISION_LOG = """\
============================================================
Precision evaluation
============================================================
config: R_50.yaml
reference: cpu
device: npu:0
seed: 0

============================================================
Training losses: shapes (64x96, network input 96x128)
============================================================
[loss_fcos_cls] CPU=0.500000 NPU=0.250000
  abs_diff=2.500e-01 rel_diff=5.000e-01
  >1% rel error: 1/1 (100.00%)
Overall Training losses: mean_rel_diff=5.000e-01 max_rel_diff=7.500e-01

============================================================
Features and head outputs: shapes
============================================================
[p3] shape=[1, 256, 8, 12]
  abs_diff mean/max: 1.000e-06/2.000e-05
  rel_diff mean/max (|cpu|>1e-3): 3.000e-06/4.000e-03
  rel_diff p50/p90/p99: 1.000e-07/2.000e-07/3.000e-07
  cosine=0.750000 rmse/std=5.000e-01 scale_bias=-2.500e-01
  >1% rel error (masked): 1/8 (12.50%)

============================================================
Boxes and masks: shapes
============================================================
detections: CPU=3 NPU=2 matched=1
  max diff of matched: box 5.000e-01 px, score 1.000e-03
  mask IoU of matched mean/min: 0.875000/0.750000

============================================================
Double benchmark, NPU's errors over CPU's: shapes
============================================================
[p3] rmse=2.50 mean_rel=1.25 max_rel=8.00 small_values=1.00 | over: rmse

============================================================
Ladder, what convolutions in other arithmetics differ by: shapes
============================================================
[fp16] >1% rel error, p3 to the last: 7.50/8.25%
  rmse/std=1.000e-03 scale_bias=-1.000e-05 losses max_rel_diff=2.000e-04

============================================================
Trace: each module of the device on the reference's input
============================================================
[backbone.bottom_up] tensors=3
  abs_diff mean/max: 1.000e-06/2.000e-05
  rel_diff mean/max (|cpu|>1e-3): 3.000e-06/4.000e-03
  cosine=1.000000 rmse/std=0.000e+00 scale_bias=+0.000e+00
  >1% rel error (masked): 0/0 (0.00%)
First module over the bar: none
Worst module: mask_head

============================================================
Ladder: the arithmetic nearest to each convolution's errors on the reference's input
============================================================
[stem] fp16: explains 99.50% of the squared errors, as large as bf16, factor 1.000000
Nearest: fp16 in all 1 convolutions

============================================================
Result
============================================================
WARNING: loss_mask is near ln 2
FAILED: shapes: loss_fcos_cls: 50% off
"""

_FAILED = "npu:0: out of memory"
PERFORMANCE: dict[str, Any] = {
    "run": {"engine": "native", "devices": "npu:0 npu:1", "iterations": 2},
    "latency": [{
        "device": "npu:0", "model": "Ascend910B3", "cpus": "0-3", "avg_ms": 11.5, "median_ms": 11.25, "std_ms": 0.5,
        "min_ms": 11.0, "max_ms": 12.0, "fps": 88.89, "cv_percent": 4.35, "stable": True, "latencies_ms": [11.0, 12.0],
    }],
    "speedups": [{"kind": "NPU", "device": "npu:0", "speedup": 12.5}],
    "batches": [{"batch": 1, "median_ms": 11.25, "fps": 88.89}, {"batch": 2, "median_ms": 20.0, "fps": 100.0},
                {"batch": 16, "failed": _FAILED}],
    "best_batch": 2,
    "dtypes": [{"dtype": "fp32", "median_ms": 11.25, "fps": 88.89, "gain_percent": 0.0, "base": "fp32"},
               {"dtype": "fp16", "failed": _FAILED}],
    "profile": {
        "batches": [{"batch": 2, "ms": 40.0, "calls": 430.0}, {"batch": 4, "ms": 120.0, "calls": 431.0}],
        "operators": [{"operator": "Conv2D", "core": "AI_CORE", "excess_ms": 36.0, "cells": [
            {"batch": 2, "ms": 30.0, "calls": 71.0, "share_percent": 75.0},
            {"batch": 4, "ms": 96.0, "calls": 71.0, "share_percent": 80.0}]}],
        "excess_ms": 40.0,
    },
    "together": {
        "devices": [{"device": "npu:1", "avg_ms": 11.5, "median_ms": 11.25, "fps": 88.89, "cpus": "4-7"}],
        "single": "npu:0", "single_fps": 88.89, "combined_fps": 175.0, "speedup": 1.97,
    },
    "runtime_options": [
        {"options": "none", "median_ms": 12.0, "fps": 83.33, "gain_percent": 0.0, "base": "none", "cpus": "0-7",
         "task_queue": "1", "preload": "none"},
        {"options": "tcmalloc", "skipped": "runtime.preload is off"},
    ],
}  # fmt: skip
PERFORMANCE_LOG = """\
============================================================
Performance evaluation
============================================================
engine: native
devices: npu:0 npu:1
iterations: 2

============================================================
Latency, batch 1
============================================================
[npu:0] Ascend910B3, CPUs 0-3
  Avg latency: 11.50 ms
  Median latency: 11.25 ms
  Std latency: 0.50 ms
  Min latency: 11.00 ms
  Max latency: 12.00 ms
  FPS: 88.89
  Coefficient of variation: 4.35% (bar 5%: stable)
  Latencies (ms): 11.00 12.00
NPU vs CPU speedup: 12.50x (npu:0)

============================================================
Batch sizes
============================================================
batch= 1: 11.25ms | throughput=88.89 imgs/s
batch= 2: 20.00ms | throughput=100.00 imgs/s | best
batch=16: failed: npu:0: out of memory

============================================================
Data types
============================================================
fp32: 11.25ms | FPS=88.89 | +0.00% against fp32
fp16: failed: npu:0: out of memory

============================================================
Operators, the longest first, and their excess
============================================================
Conv2D (AI_CORE): batch 2: 30.00 ms, 75.00%, 71.00 calls | batch 4: 96.00 ms, 80.00%, 71.00 calls | excess +36.00 ms
batch 2: 40.00 ms in 430.00 calls of operators
batch 4: 120.00 ms in 431.00 calls of operators
Excess of all: +40.00 ms

============================================================
Devices together, batch 1 each
============================================================
npu:1: avg=11.50ms, FPS=88.89, median=11.25ms, CPUs 4-7
Single FPS: 88.89 (npu:0 alone)
Combined FPS: 175.00
Speedup vs single: 1.97x

============================================================
Runtime options, batch 1
============================================================
none: 12.00ms | FPS=83.33 | +0.00% against none | CPUs 0-7, task queue 1, preload none
tcmalloc: not measured: runtime.preload is off
"""


def test_the_log_of_the_precision_program() -> None:
    assert logs.write_precision(PRECISION) == PRECISION_LOG


def test_a_device_that_agrees_has_passed() -> None:
    log = logs.write_precision({**PRECISION, "failures": [], "warnings": [], "trace": None})
    assert log.endswith(f"{'=' * 60}\nResult\n{'=' * 60}\nPASSED\n")
    assert "Trace" not in log


def test_the_log_of_the_performance_program() -> None:
    assert logs.write_performance(PERFORMANCE) == PERFORMANCE_LOG


def test_what_was_not_measured_has_no_section() -> None:
    report = copy.deepcopy(PERFORMANCE) | {
        "batches": [], "dtypes": [], "profile": None, "together": None, "runtime_options": []}
    report["latency"][0]["stable"] = False
    log = logs.write_performance(report)
    assert log.endswith("NPU vs CPU speedup: 12.50x (npu:0)\n")
    assert "(bar 5%: unstable)" in log
