"""The console commands that need the extra ``serve``, and those that only a checkout's scripts have."""
from __future__ import annotations

from functools import partial

from blendmaskd.extras import run

accelerator_check = partial(run, "accelerator_check", "blendmaskd_workers.evaluation.accelerator.program")
export_onnx = partial(run, "export_onnx", "blendmaskd_workers.programs.export_onnx")
inference = partial(run, "blendmaskd-inference", "blendmaskd_workers.programs.inference")
train = partial(run, "blendmaskd-train", "blendmaskd_workers.training.program")
benchmark = partial(run, "blendmaskd-benchmark", "blendmaskd_workers.benchmark.program")
benchmark_host = partial(run, "benchmark_host", "blendmaskd_workers.benchmark.host")
benchmark_masks = partial(run, "benchmark_masks", "blendmaskd_workers.programs.benchmark_masks")
benchmark_network = partial(run, "benchmark_network", "blendmaskd_workers.programs.benchmark_network")
eval_performance = partial(run, "eval_performance", "blendmaskd_workers.evaluation.performance")
eval_precision = partial(run, "eval_precision", "blendmaskd_workers.evaluation.precision")
random_weights = partial(run, "random_weights", "blendmaskd_workers.programs.random_weights")
segment_dataset = partial(run, "segment_dataset", "blendmaskd_workers.cluster.program")
