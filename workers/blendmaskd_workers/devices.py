"""A device, opened and set up for inference, in float32 unless told otherwise; the only module that calls device APIs.

`open_device` takes a device as this process sees it (``npu:0``, ``cuda:0``, ``cpu``), `Device` is what the rest of a
worker needs of it. Device APIs keep the current device per thread: every thread that computes calls `Device.use` once.
Network code stays free of device names; it follows its tensors.
"""
from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor

from blendmaskd import ascend
from blendmaskd.probe import Cause

Precision = Literal["fp32", "hf32", "bf16", "fp16", "native", "auto"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")
CPU_BF16 = frozenset({"avx512_bf16", "amx_bf16"})  # its flags of CPUs that multiply bfloat16
BF16_SHARE = 0.8  # of float32's time that bfloat16 may take to be chosen: it costs accuracy
CONVOLUTIONS = ((64, 64, 3, 100), (1024, 256, 1, 50), (256, 256, 3, 25))  # R_50's: channels in, out, kernel, side
ROUNDS = 5
NPU_OPTIONS = {"internal_formats": "ALLOW_INTERNAL_FORMAT", "precision_mode": "ACL_PRECISION_MODE"}
GRAPHS = {"cuda": "CUDAGraph", "npu": "NPUGraph"}
WORK_PATH = "ASCEND_WORK_PATH"  # where CANN's compiler writes; the working directory otherwise

T = TypeVar("T")


class DeviceError(RuntimeError):
    """A device that cannot be used; the text says what is missing, `cause` what kind of thing that is."""

    def __init__(self, text: str, cause: Cause | None = None) -> None:
        super().__init__(text)
        self.cause = cause


class UnsupportedError(DeviceError):
    """Something that this kind of device never does."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory figures in bytes: of this process's tensors on the device, or of all of this process on a CPU."""

    used: int
    peak: int
    total: int
    taken: int  # of the whole device, by all processes and with what allocators and graphs keep


@dataclass(frozen=True, slots=True)
class Staged:
    """A tensor on its way to the device, sent by one thread for another."""

    tensor: Tensor
    arrived: Any = None  # an event; None where there is nothing to wait for
    api: Any = None

    def take(self) -> Tensor:
        """The tensor; what the calling thread's stream does from now on waits until it is there. May be repeated."""
        if self.arrived is not None:
            stream = self.api.current_stream(self.tensor.device)
            stream.wait_event(self.arrived)
            self.tensor.record_stream(stream)  # its memory belongs to the stream of the copy
        return self.tensor


@dataclass(frozen=True, slots=True)
class Moment:
    """A point in what a device does. On a CPU it has passed when it is made."""

    event: Any = None
    time: float = 0.0  # time.perf_counter, where there is no event

    def passed(self) -> bool:
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def since(self, earlier: Moment) -> float:
        """Seconds between the two, by the device's clock; both have passed."""
        if self.event is None:
            return self.time - earlier.time
        return float(earlier.event.elapsed_time(self.event)) / 1000


@dataclass(frozen=True, slots=True)
class Fetched:
    """A tensor on its way to the host."""

    tensor: Tensor
    arrived: Moment

    def take(self) -> Tensor:
        """Wait until it is there."""
        self.arrived.wait()
        return self.tensor


class Device:
    """The CPU, and what npu and cuda share with it."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32, why: str | None = None) -> None:
        self.torch_device = device
        self.dtype = dtype  # that a network should compute in
        self.why = why  # it computes in this one, where that was not asked for
        self.overlaps = device.type != "cpu"  # it works on while the host does something else
        # Convolutions like the channels innermost on a CPU and on CUDA's tensor cores; an NPU has formats of its own.
        self.channels_last = device.type == "cpu" or (device.type == "cuda" and dtype != torch.float32)

    def use(self) -> None:
        """Make this the calling thread's current device."""

    def upload(self, tensor: Tensor) -> Tensor:
        """A host tensor on the device. The copy may still be under way: later work of this thread waits for it."""
        return tensor

    def stage(self, tensor: Tensor) -> Staged:
        """Send a host tensor to the device beside what it computes, from any thread."""
        return Staged(tensor)

    def fetch(self, tensor: Tensor) -> Fetched:
        """Send a tensor of the device to the host once this thread's work so far is done, without waiting for it."""
        return Fetched(tensor, self.moment())

    def moment(self) -> Moment:
        """When all that this thread has asked of the device will be done."""
        return Moment(time=time.perf_counter())

    def graph(self, compute: Callable[[Tensor], T], example: Tensor) -> Callable[[Tensor], T]:
        """`compute` for inputs like `example`, which is on the device, as one launch. Raises `UnsupportedError`.

        Nothing in `compute` may depend on values. Each call overwrites the result of the one before.
        """
        raise UnsupportedError(f"{self.torch_device}: graphs need an npu or cuda device")

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""

    def memory(self) -> Memory:
        """Memory in use now and at most so far, and all there is."""
        used = psutil.Process().memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        whole = psutil.virtual_memory()
        return Memory(used, max(used, peak), whole.total, whole.total - whole.available)

    def held_bytes(self) -> int:
        """Bytes held on the device; 0 where that is the host's memory."""
        return 0

    def effects(self) -> dict[str, Any]:
        """What took effect by the libraries' own account, of the fields of `blendmaskd.wanted.Actual`."""
        queue = self.task_queue()
        return {
            "threads": torch.get_num_threads(),
            "device_name": self.name(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dtype_reason": self.why,
            **({} if queue is None else {"task_queue": queue}),
        }

    def name(self) -> str:
        """The device's model, such as ``Ascend910B3``."""
        return "cpu"

    def arithmetic(self) -> dict[str, str]:
        """The switches that decide how float32 is multiplied, as the libraries have them, by name."""
        return {}

    def multiplies_bf16(self) -> bool | None:
        """Whether it computes in bfloat16 by itself; None where it does not tell."""
        return cpu_multiplies_bf16()

    def task_queue(self) -> int | None:
        """The task queue's level that torch_npu really uses; None where there is none."""
        return None


class Accelerator(Device):
    """An npu or cuda device: torch.npu and torch.cuda share the names used here."""

    def __init__(self, device: torch.device, dtype: torch.dtype, api: Any) -> None:
        super().__init__(device, dtype)
        self.api = api
        self._uploads = api.Stream(device)

    def use(self) -> None:
        self.api.set_device(self.torch_device)

    def upload(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.torch_device, non_blocking=True)  # torch keeps pinned memory for the next

    def stage(self, tensor: Tensor) -> Staged:
        self.use()
        arrived = self.api.Event()
        with self.api.stream(self._uploads):
            on_device = self.upload(tensor)
            arrived.record(self._uploads)
        return Staged(on_device, arrived, self.api)

    def fetch(self, tensor: Tensor) -> Fetched:
        # torch keeps pinned memory for the next copy, and gives none away that a copy still writes
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return Fetched(on_host.copy_(tensor, non_blocking=True), self.moment())

    def moment(self) -> Moment:
        event = self.api.Event(enable_timing=True, blocking=True)  # who waits for it leaves the CPU to others
        event.record(self.api.current_stream(self.torch_device))
        return Moment(event)

    def graph(self, compute: Callable[[Tensor], T], example: Tensor) -> Callable[[Tensor], T]:
        if not ascend.multiplies_float32(self.name()):
            text = f"{self.torch_device}: {self.name()} compiles its convolutions, which no graph can record"
            raise UnsupportedError(text)
        if self.task_queue() == 2:  # at which torch_npu records none; workers with graphs are started at 1
            self.api.set_task_queue_enable(1)
        place = example.clone()
        beside = self.api.Stream(self.torch_device)
        beside.wait_stream(self.api.current_stream(self.torch_device))
        with self.api.stream(beside):
            compute(place)  # what libraries do at their first call must not be recorded
        self.synchronize()
        graph = getattr(self.api, GRAPHS[self.torch_device.type])()
        with self.api.graph(graph):
            result = compute(place)

        def replay(tensor: Tensor) -> T:
            place.copy_(tensor)
            graph.replay()
            return result

        return replay

    def synchronize(self) -> None:
        self.api.synchronize(self.torch_device)

    def memory(self) -> Memory:
        free, total = self.api.mem_get_info(self.torch_device)
        return Memory(self.held_bytes(), self.api.max_memory_allocated(self.torch_device), total, total - free)

    def held_bytes(self) -> int:
        return int(self.api.memory_allocated(self.torch_device))

    def name(self) -> str:
        return str(self.api.get_device_name(self.torch_device))

    def arithmetic(self) -> dict[str, str]:
        if self.torch_device.type == "cuda":
            return {"tf32": _switch(torch.backends.cudnn.allow_tf32)}
        told = {"conv_hf32": _switch(self.api.conv.allow_hf32), "matmul_hf32": _switch(self.api.matmul.allow_hf32)}
        backend = getattr(sys.modules.get("torch_npu"), "_C", None)  # has no public reader
        if backend is None:
            return told
        options = {name: backend._npu_getOption(option) for name, option in NPU_OPTIONS.items()}
        return told | {name: value.decode() if value else "not set" for name, value in options.items()}

    def multiplies_bf16(self) -> bool | None:
        ask = getattr(self.api, "is_bf16_supported", None)
        return bool(ask()) if ask else None

    def task_queue(self) -> int | None:
        read = getattr(self.api, "get_task_queue_enable", None)  # torch_npu 2.9.0 and others cannot tell
        return int(read()) if read else None


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a device did: its beginning and end, and when what it did before had ended."""

    before: Moment
    begin: Moment
    end: Moment


class Timeline:
    """What one thread asks of a device, in the order in which it is done."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._last: Moment | None = None

    @contextmanager
    def part(self, parts: list[Part]) -> Iterator[None]:
        """Append to `parts` what is asked for within."""
        begin = self.device.moment()
        yield
        end = self.device.moment()
        parts.append(Part(self._last or begin, begin, end))
        self._last = end


def open_device(name: str, precision: Precision = "fp32") -> Device:
    """The device, ready to compute in the calling thread: set, without per-shape compilation, with its arithmetic.

    `name` is a kind with an index or without: ``npu:1``, ``cuda``, ``cpu``. ``fp32`` rounds nothing below float32;
    ``hf32`` allows HF32 on an NPU and TF32 on CUDA; ``bf16`` and ``fp16`` ask for networks of that type. ``native`` is
    what the device's library does by itself with float32: on NPUs without it float16 inside of convolutions and matrix
    products, elsewhere HF32 or TF32 in convolutions, and float32 on a CPU. ``auto`` is ``native`` on those NPUs,
    ``bf16`` on a CPU whose convolutions are clearly faster in it, else ``fp32``; where the CPU multiplies bfloat16 that
    is measured, in some 0.3 s. Raises `DeviceError` where there is no such device, and `UnsupportedError` where it has
    no arithmetic for a precision.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return Device(torch.device("cpu"), *_cpu_dtype(precision))
    api = _load_npu() if kind == "npu" else torch.cuda
    count = api.device_count() if api.is_available() else 0
    number = int(index or 0)
    if number >= count:
        raise DeviceError(f"{name}: {count} {kind} devices are visible to this process", Cause.NOT_VISIBLE)
    device = Accelerator(torch.device(kind, number), HALF.get(precision, torch.float32), api)
    device.use()
    if kind == "npu":
        device.why = _set_up_npu(api, f"{name}: {device.name()}", device.name(), precision)
    else:
        _set_up_cuda(precision)
    return device


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has AVX512-BF16 or AMX; others take longer in bfloat16, and so do some of these."""
    return not CPU_BF16.isdisjoint(CPUINFO.read_text(encoding="utf-8", errors="replace").split())


@torch.inference_mode()
def bf16_share() -> float:
    """The time that this CPU takes for convolutions in bfloat16, in terms of float32.

    The two take turns, so that other load meets both, and the least time of each convolution counts. On one thread:
    several wait for each other, and where others use the CPUs too, for longer than they compute.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [_operands(*shape, dtype) for shape in CONVOLUTIONS for dtype in (torch.float32, torch.bfloat16)]
    rounds = [[_convolution_s(*case) for case in cases] for _ in range(ROUNDS)]
    torch.set_num_threads(threads)
    least: list[float] = [min(seconds) for seconds in zip(*rounds)]
    return sum(least[1::2]) / sum(least[::2])


def _convolution_s(image: Tensor, weight: Tensor) -> float:
    begin = time.perf_counter()
    torch.conv2d(image, weight, padding=weight.shape[2] // 2)
    return time.perf_counter() - begin


def _operands(before: int, after: int, kernel: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    image, weight = torch.ones(1, before, side, side), torch.ones(after, before, kernel, kernel)
    return image.to(dtype, memory_format=torch.channels_last), weight.to(dtype, memory_format=torch.channels_last)


def _cpu_dtype(precision: Precision) -> tuple[torch.dtype, str | None]:
    """What a network should compute in, and why if that was not asked for."""
    if precision == "fp16":
        raise UnsupportedError("cpu: float16 is some forty times slower than float32 here; fp32, or auto, are for CPUs",
                               Cause.PRECISION)  # fmt: skip
    if precision not in ("bf16", "auto"):
        return torch.float32, None
    if cpu_multiplies_bf16():
        return (torch.bfloat16, None) if precision == "bf16" else _faster()
    if precision == "auto":
        return torch.float32, "neither AVX512-BF16 nor AMX"
    raise UnsupportedError("cpu: has neither AVX512-BF16 nor AMX, and would be slower in bfloat16 than in float32; "
                           "fp32, or auto, are for such CPUs", Cause.PRECISION)  # fmt: skip


def _faster() -> tuple[torch.dtype, str]:
    share = bf16_share()
    reason = f"convolutions in bfloat16 take {share:.2f} of the time in float32, {BF16_SHARE:g} is the most for it"
    return (torch.bfloat16 if share <= BF16_SHARE else torch.float32), reason


def _load_npu() -> Any:
    """torch.npu, which torch_npu registers at import; workers start with torch's automatic import off."""
    if not hasattr(torch, "npu"):
        _make_work_path()
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # torch_npu raises bare ones for CANN's paths
            if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
                raise DeviceError("npu: torch_npu is not installed", Cause.NO_TORCH_NPU) from None
            reason = (str(error).splitlines() or [type(error).__name__])[0]  # then come its codes, and advice
            text = f"npu: torch_npu cannot be loaded; is CANN's set_env.sh sourced? {reason}"
            raise DeviceError(text, Cause.NO_CANN) from error
    extended: Any = torch
    return extended.npu


def _make_work_path() -> None:
    try:
        if WORK_PATH not in os.environ:
            os.environ[WORK_PATH] = str(Path.home() / ".cache/blendmaskd/ascend_work/programs")
        os.makedirs(os.environ[WORK_PATH], exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        where = f"{WORK_PATH}={os.environ.get(WORK_PATH, '')}: {getattr(error, 'strerror', None) or error}"
        raise DeviceError(f"npu: {where}: set it to a folder that this user may write to") from error


def _set_up_npu(api: Any, where: str, chip: str, precision: Precision) -> str | None:
    """Returns why it is this arithmetic where that was not asked for."""
    api.set_compile_mode(jit_compile=False)  # an Ascend 910A would compile every operator for every image shape
    if not ascend.multiplies_float32(chip):
        if precision in ("fp32", "hf32", "bf16"):
            raise UnsupportedError(f"{where} multiplies float16 alone, no float32, HF32 or bfloat16: set "
                                   "model.precision to native (float16 inside of convolutions and matrix products, "
                                   "float32 around them), fp16 or auto", Cause.PRECISION)  # fmt: skip
        api.set_option({"ACL_PRECISION_MODE": "allow_fp32_to_fp16"})
        return f"native: {chip} multiplies float16 alone" if precision == "auto" else None
    api.config.allow_internal_format = False  # torch_npu to 2.9.0 would compile convolutions for each shape
    api.conv.allow_hf32 = precision in ("hf32", "native")  # on by torch_npu's own default
    api.matmul.allow_hf32 = precision == "hf32"
    api.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})
    return None


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _set_up_cuda(precision: Precision) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "hf32"
    torch.backends.cudnn.allow_tf32 = precision in ("hf32", "native")  # on by torch's own default
