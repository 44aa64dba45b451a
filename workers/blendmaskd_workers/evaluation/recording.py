"""Records what a device's operators take, by torch's profiler, or torch_npu's on an NPU."""
from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from blendmaskd_workers.devices import Device
from blendmaskd_workers.evaluation.operators import Operator, read_kernel_details, summed

TABLE = "kernel_details.csv"


def record(device: Device, compute: Callable[[], Any], runs: int) -> list[Operator]:
    """The operators of one `compute`, as the mean of so many, the longest first. Raises RuntimeError."""
    recorder = _torch_npu if device.torch_device.type == "npu" else _torch

    def repeat() -> None:
        for _ in range(runs):
            compute()
        device.synchronize()

    return [Operator(one.name, one.core, one.calls / runs, one.ms / runs) for one in recorder(device, repeat)]


def _torch(device: Device, compute: Callable[[], None]) -> list[Operator]:
    """Each operator's own time: on the CPU without those that it calls, on a device that of the kernels it launches."""
    kind = device.torch_device.type
    activities = [torch.profiler.ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        compute()
    events: Any = profile.key_averages()
    own = "self_cpu_time_total" if kind == "cpu" else "self_device_time_total"
    called = [one for one in events if one.device_type.name == "CPU"]  # kernels are their operators' already
    operators = [Operator(one.key, kind, one.count, getattr(one, own) / 1000) for one in called]
    return summed(one for one in operators if one.ms > 0)


def _torch_npu(_: Device, compute: Callable[[], None]) -> list[Operator]:
    """What torch_npu writes when its profiler stops; level 1 names the types of operators."""
    profiler = importlib.import_module("torch_npu.profiler")
    with tempfile.TemporaryDirectory(prefix="eval-performance-") as folder:
        with profiler.profile(
            activities=[profiler.ProfilerActivity.NPU],
            on_trace_ready=profiler.tensorboard_trace_handler(folder),
            experimental_config=profiler._ExperimentalConfig(profiler_level=profiler.ProfilerLevel.Level1),
        ):
            compute()
        tables = sorted(Path(folder).rglob(TABLE))
        if not tables:
            raise RuntimeError(f"torch_npu's profiler has written no {TABLE}; what it says of that is above")
        return summed(one for table in tables for one in read_kernel_details(table.read_text(encoding="utf-8")))
