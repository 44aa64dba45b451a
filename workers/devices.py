"""A device, opened and set up for exact inference; the only module that calls device APIs.

`open_device` takes a device as this process sees it (``npu:0``, ``cuda:0``, ``cpu``), `Device` is what the rest of a
worker needs of it, `actual` tells what took effect in the process. Device APIs keep the current device per thread:
every thread that computes calls `Device.use` once. Network code stays free of device names; it follows its tensors.
"""
from __future__ import annotations

import importlib
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from daemon import spawn

Precision = Literal["fp32", "hf32"]


class DeviceError(RuntimeError):
    """A device that cannot be used; the text says what is missing."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory figures in bytes: the device's own, or this process's on a CPU."""

    used: int
    peak: int
    total: int


class Device:
    """The CPU, and what npu and cuda share with it."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    def use(self) -> None:
        """Make this the calling thread's current device."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device. The copy may still be under way: later work of this thread waits for it."""
        return tensor

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    def memory(self) -> Memory:
        """Memory in use now and at most so far, and all there is."""
        used = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Memory(used, max(used, peak), psutil.virtual_memory().total)

    def name(self) -> str:
        """The device's model, such as ``Ascend910B3``."""
        return "cpu"

    def task_queue(self) -> int | None:
        """The task queue's level that torch_npu really uses; None where there is none."""
        return None


class Accelerator(Device):
    """An npu or cuda device: torch.npu and torch.cuda share the names used here."""

    def __init__(self, device: torch.device, api: Any) -> None:
        super().__init__(device)
        self.api = api

    def use(self) -> None:
        self.api.set_device(self.torch_device)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)

    def synchronize(self) -> None:
        self.api.synchronize(self.torch_device)

    def memory(self) -> Memory:
        device = self.torch_device
        _, total = self.api.mem_get_info(device)
        return Memory(self.api.memory_allocated(device), self.api.max_memory_allocated(device), total)

    def name(self) -> str:
        return str(self.api.get_device_name(self.torch_device))

    def task_queue(self) -> int | None:
        read = getattr(self.api, "get_task_queue_enable", None)  # torch_npu before 2.13 cannot tell
        return int(read()) if read else None


def open_device(name: str, precision: Precision = "fp32") -> Device:
    """The device, ready to compute in the calling thread: set, without per-shape compilation, with its arithmetic.

    `name` is a kind with an index or without: ``npu:1``, ``cuda``, ``cpu``. ``fp32`` rounds nothing below float32;
    ``hf32`` allows HF32 on an NPU and TF32 on CUDA. Raises `DeviceError` where there is no such device.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device(torch.device("cpu"))
    api = _load_npu() if kind == "npu" else torch.cuda
    count = api.device_count() if api.is_available() else 0
    number = int(index or 0)
    if number >= count:
        raise DeviceError(f"{name}: {count} {kind} devices are visible to this process")
    device = Accelerator(torch.device(kind, number), api)
    device.use()
    if kind == "npu":
        _set_up_npu(api, precision)
    else:
        _set_up_cuda(precision)
    return device


def actual(wanted: Mapping[str, Any], device: Device) -> dict[str, Any]:
    """What took effect in this process, by the libraries' own account where they give one; see `spawn.observe`."""
    observed = spawn.observe(wanted) | {"threads": torch.get_num_threads(), "device_name": device.name()}
    queue = device.task_queue()
    return observed if queue is None else observed | {"task_queue": queue}


def _load_npu() -> Any:
    """torch.npu, which torch_npu registers at import; workers start with torch's automatic import off."""
    if not hasattr(torch, "npu"):
        try:
            importlib.import_module("torch_npu")
        except (ImportError, OSError, RuntimeError) as error:  # mostly: CANN's libraries are not found
            if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
                raise DeviceError("npu: torch_npu is not installed") from None
            raise DeviceError(f"npu: torch_npu cannot be loaded; is CANN's set_env.sh sourced? {error}") from error
    extended: Any = torch
    return extended.npu


def _set_up_npu(api: Any, precision: Precision) -> None:
    exact = precision == "fp32"
    api.set_compile_mode(jit_compile=False)  # an Ascend 910A would compile every operator for every image shape
    api.conv.allow_hf32 = not exact  # torch_npu's own default is on
    api.matmul.allow_hf32 = not exact
    if exact:  # the default of 910B and later; on a 910A allow_hf32=False alone would select float16
        api.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})


def _set_up_cuda(precision: Precision) -> None:
    allow = precision == "hf32"
    torch.backends.cuda.matmul.allow_tf32 = allow
    torch.backends.cudnn.allow_tf32 = allow  # torch's own default is on
