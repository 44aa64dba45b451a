"""Two emulated "npu" devices that compute on the CPU, for tests only.

`install` registers them with torch's PrivateUse1 hooks as torch.npu, with the names that `blendmaskd_workers.devices`
uses. A tensor on npu:i is a wrapper whose metadata says so and whose data is a CPU tensor, its twin: every operator
is run on the twins and its results wrapped again, so results equal the CPU's bit for bit. As on the real device,
operators refuse tensors of two devices, each thread has its own current device, and ASCEND_RT_VISIBLE_DEVICES
renumbers the physical devices; `torch.npu.get_device_name` tells the physical one.

`host_waits` counts what makes a host wait for a real NPU: copies to the host, scalars read, outputs whose shape
depends on data. Non-blocking copies complete late: only when somebody waits for their stream, or for an event that was
recorded after them. Till then what they write holds NaN, of bytes `UNARRIVED` (but for uploads in the default stream,
which order the device's own work), and what they read must not change: that is looked at when they complete. An event
says once that it has not passed before it does. A graph replays the operators that ran while it was recorded, into the
same tensors; as in torch_npu, none is recorded at level 2 of the task queue, nor with internal formats. EMULATED_CHIP
names the chip: one without float32 rounds the values of topk to float16, and refuses to divide int64, which the real
one does on a CPU of its own. Not emulated: speed, memory (figures are 0), storage aliases between host and device,
operators that change a tensor's own shape in place, streams otherwise. Once installed in a process it stays.
"""
from __future__ import annotations

import os
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from blendmaskd import ascend

PHYSICAL_DEVICES = 2
MEMORY_BYTES = 32 << 30
UNARRIVED = 111  # of bytes that are on their way

aten = torch.ops.aten
host_waits: Counter[str] = Counter()  # operator to count; clear it before what is to be measured
kept_for_streams: list[torch.Tensor] = []  # what record_stream was called on

_current = threading.local()
_composite: dict[Any, bool] = {}
_libraries: list[torch.library.Library] = []  # registrations end when these are freed

_FACTORIES = [
    "empty.memory_format", "empty_strided", "full", "zeros", "ones", "eye", "linspace", "scalar_tensor", "arange",
    "arange.start", "arange.start_step", "rand", "randn", "randint", "randint.low", "tril_indices", "triu_indices",
]  # fmt: skip
_LOWER_PRECISION = ["conv2d", "convolution", "linear", "matmul", "bmm", "addmm", "mm"]
_COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_HOST_INDICES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # indices may be on the host
_DIVISIONS = {aten.div, aten.floor_divide, aten.remainder, aten.fmod}
_DATA_DEPENDENT = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.equal.default,
}


class NpuTensor(torch.Tensor):
    """A tensor on an emulated device."""

    __slots__ = ("twin",)
    twin: torch.Tensor  # on the CPU

    @staticmethod
    def __new__(cls, twin: torch.Tensor, index: int) -> NpuTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            twin.size(),
            strides=twin.stride(),
            storage_offset=twin.storage_offset(),
            dtype=twin.dtype,
            layout=twin.layout,
            device=torch.device("npu", index),
        )
        tensor.twin = twin
        return tensor

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.twin.numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        kept_for_streams.append(self)

    def tolist(self) -> Any:  # torch refuses it for subclasses
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.twin!r}"[:-1] + f", device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Inference tensors come here with composite operators (aten.to, aten.linear) that are not yet taken apart.
        if func not in _composite:
            _composite[func] = torch._C._dispatch_has_kernel_for_dispatch_key(
                func.name(), "CompositeImplicitAutograd"
            )
        if _composite[func]:
            # torch's own kernel: func.decompose() would prefer decompositions in Python, which round differently
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


def install() -> types.ModuleType:
    """Register the emulated devices as torch.npu, once."""
    if hasattr(torch, "npu"):
        return torch.npu
    backend_registration._setup_privateuseone_for_python_backend("npu", backend_module=_api())
    operators = torch.library.Library("aten", "IMPL")
    for name in _FACTORIES:
        operators.impl(name, _factory(_operator(name)), "PrivateUse1")
    operators.impl("_copy_from", _copy_from, "PrivateUse1")
    fallback = torch.library.Library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _LOWER_PRECISION:
        operators.impl(name, _lower_precision(_operator(name)), "AutocastPrivateUse1")
    _libraries.extend((operators, fallback))
    # torch lets no Python backend have an allocator of pinned memory
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()
    torch.empty = _unpinned(torch.empty)
    return torch.npu


def _unpinned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


def physical_devices() -> list[int]:
    """The physical device of each index, by torch_npu's rules: ascending digits, or none at all."""
    text = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return list(range(PHYSICAL_DEVICES))
    if not set(text) <= set("0123456789,"):
        raise RuntimeError(f"ASCEND_RT_VISIBLE_DEVICES={text}: expected digits and commas")
    visible = [int(part) for part in text.split(",") if part]
    if visible != sorted(set(visible)):
        return []
    return [device for device in visible if device < PHYSICAL_DEVICES]


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the twins; results are on the device of its arguments.

    For an operator in place or with out= torch itself hands back the tensor that it was given.
    """
    flat, spec = tree_flatten((args, kwargs))
    device = _common_device(func, flat)
    _count_waits(func, flat, kwargs)
    twin_args, twin_kwargs = tree_unflatten([_to_twin(item) for item in flat], spec)
    if func is aten.copy_.default and isinstance(flat[0], NpuTensor) != isinstance(flat[1], NpuTensor):
        return _copy_from(flat[1], flat[0], len(flat) > 2 and flat[2])
    result = _compute(func, twin_args, twin_kwargs)
    index = _result_index(func, flat, kwargs, device)
    if recording := getattr(_current, "graph", None):
        recording.record(func, twin_args, twin_kwargs, result)

    return result if index is None else tree_map_only(torch.Tensor, lambda twin: _wrap(twin, index), result)


def _compute(func: Any, args: Any, kwargs: Any) -> Any:
    if ascend.multiplies_float32(_chip()):
        return func(*args, **kwargs)
    if func.overloadpacket in _DIVISIONS and args[0].dtype == torch.int64:
        raise RuntimeError(f"{func.name()} of int64 runs on the AI CPU of this chip")
    if func is aten.topk.default:
        values, indices = func(args[0].half(), *args[1:], **kwargs)
        return values.to(args[0].dtype), indices
    return func(*args, **kwargs)


def _chip() -> str:
    return os.environ.get("EMULATED_CHIP", "Ascend910")


def _common_device(func: Any, flat: list[Any]) -> torch.device | None:
    """The device that the tensors share; scalars on the host go anywhere."""
    device = None
    for item in flat:
        if not isinstance(item, torch.Tensor):
            continue
        if item.device.type == "cpu" and (item.dim() == 0 or func in _COPIES or func in _HOST_INDICES):
            continue
        if device is None:
            device = item.device
        elif item.device != device and func not in _COPIES:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" {device} and {item.device}!"
            )
    return device


def _result_index(func: Any, flat: list[Any], kwargs: Any, device: torch.device | None) -> int | None:
    """The index of the npu device that results are on; None: on the host."""
    target = kwargs.get("device")
    if target is not None:
        return _index(target) if torch.device(target).type == "npu" else None
    if func is aten.copy_.default:
        device = flat[0].device
    if device is None:
        return _current_device()
    return device.index if device.type == "npu" else None


def _count_waits(func: Any, flat: list[Any], kwargs: Any) -> None:
    if func in _DATA_DEPENDENT or (func in _HOST_INDICES and _has_mask(flat[1:])):
        _wait(func.name())
    source = flat[1] if func is aten.copy_.default else flat[0]
    target = flat[0].device if func is aten.copy_.default else kwargs.get("device")
    if func is aten.copy_.default and len(flat) > 2 and flat[2]:
        return
    if func in _COPIES and isinstance(source, NpuTensor) and target is not None and torch.device(target).type == "cpu":
        _wait("copy to host")


def _wait(why: str) -> None:
    if hasattr(_current, "graph"):
        raise RuntimeError(f"{why} is not permitted while a graph is recorded")
    host_waits[why] += 1


def _has_mask(flat: list[Any]) -> bool:
    return any(isinstance(item, torch.Tensor) and item.dtype in (torch.bool, torch.uint8) for item in flat)


def _to_twin(item: Any) -> Any:
    if isinstance(item, NpuTensor):
        return item.twin
    if isinstance(item, torch.device) and item.type == "npu":
        return torch.device("cpu")
    return item


def _wrap(twin: torch.Tensor, index: int) -> NpuTensor:
    if torch.is_inference_mode_enabled() and not twin.is_inference():  # a view of a normal tensor stays a normal one
        with torch.inference_mode(False):
            return NpuTensor(twin, index)
    return NpuTensor(twin, index)


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _factory(operator: Any) -> Callable[..., Any]:
    """These reach the PrivateUse1 key without any npu tensor among their arguments."""
    return lambda *args, **kwargs: _run(operator, args, kwargs)


def _lower_precision(operator: Any) -> Callable[..., Any]:
    """What autocast does to float32 arguments of an operator that gains from half precision."""

    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("npu")

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.dtype == torch.float32 else tensor

        with torch.amp.autocast("npu", enabled=False):
            args, kwargs = tree_map_only(torch.Tensor, cast, (args, kwargs))
            return operator(*args, **kwargs)

    return run


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    to, stream = _to_twin(target), _current_stream()
    from_host, to_host = not isinstance(source, NpuTensor), not isinstance(target, NpuTensor)
    if not non_blocking or from_host == to_host:
        to.copy_(_to_twin(source))
        return target
    copy = LateCopy(source, to)
    if to_host or stream.aside:
        to.fill_(torch.nan if to.is_floating_point() else UNARRIVED)
    else:
        to.copy_(source)
    stream.late.append(copy)
    return target


class LateCopy:
    """A copy between host and device that is under way."""

    def __init__(self, source: torch.Tensor, to: torch.Tensor) -> None:
        self.read = source if not isinstance(source, NpuTensor) else None  # of the host, which must leave it alone
        self.value = _to_twin(source).clone()
        self.to = to
        self.done = False

    def complete(self) -> None:
        if not self.done:
            self.done = True
            if self.read is not None and not torch.equal(self.read.nan_to_num(), self.value.nan_to_num()):
                raise RuntimeError("the host wrote what a copy to the device still read")
            with torch.inference_mode(self.to.is_inference()):
                self.to.copy_(self.value)


def _current_device() -> int:
    return getattr(_current, "index", 0)


def _index(device: Any) -> int:
    """The index that a device argument means; RuntimeError where there is no such device."""
    if device is None:
        return _current_device()
    index = device if isinstance(device, int) else torch.device(device).index
    if index is None:
        return _current_device()
    count = len(physical_devices())
    if not 0 <= index < count:
        raise RuntimeError(f"invalid npu device ordinal {index}: {count} devices")
    return index


def _current_stream(device: Any = None) -> Stream:
    if not hasattr(_current, "stream"):
        _current.stream = Stream(device, aside=False)
    return _current.stream


class Event:
    """A point in a stream's work; here all work but copies is done at once."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.time = 0.0
        self.before: tuple[LateCopy, ...] = ()
        self.asked = False

    def record(self, stream: Stream | None = None) -> None:
        self.time = time.perf_counter()
        self.before = tuple((stream or _current_stream()).late)

    def synchronize(self) -> None:
        for copy in self.before:
            copy.complete()

    def wait(self, stream: Any = None) -> None:
        self.synchronize()

    def query(self) -> bool:
        if self.asked:
            self.synchronize()
        self.asked = True
        return all(copy.done for copy in self.before)

    def elapsed_time(self, end: Event) -> float:
        if not all(copy.done for copy in (*self.before, *end.before)):
            raise RuntimeError("both events must have completed before their time is read")
        return (end.time - self.time) * 1e3


class Stream:
    """A queue of work that is empty but for copies."""

    def __init__(self, device: Any = None, priority: int = 0, aside: bool = True) -> None:
        self.device = torch.device("npu", _index(device))
        self.aside = aside
        self.late: deque[LateCopy] = deque(maxlen=64)

    def synchronize(self) -> None:
        while self.late:
            self.late.popleft().complete()

    def wait_stream(self, stream: Stream) -> None:
        stream.synchronize()

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def query(self) -> bool:
        return not self.late

    def __enter__(self) -> Stream:
        self.outer, _current.stream = _current_stream(), self
        return self

    def __exit__(self, *_: Any) -> None:
        _current.stream = self.outer


class Graph:
    """What ran while it was recorded, to be run again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take in a call on twins."""
        self.calls.append((func, args, kwargs, result))

    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = _compute(func, args, kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                old.copy_(new)


class Recording:
    """``with torch.npu.graph(graph):``"""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        if torch.npu.get_task_queue_enable() == 2:
            raise RuntimeError("Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture")
        if torch.npu.config.allow_internal_format:
            raise RuntimeError("please try to set torch.npu.config.allow_internal_format = False")
        _current.graph = self.graph

    def __exit__(self, *_: Any) -> None:
        del _current.graph


class CurrentDevice:
    """``with torch.npu.device(1):``"""

    def __init__(self, device: Any) -> None:
        self.index = _index(device)

    def __enter__(self) -> None:
        self.before, _current.index = _current_device(), self.index

    def __exit__(self, *_: Any) -> None:
        _current.index = self.before


def _api() -> types.ModuleType:
    """What torch.npu offers: torch_npu's names."""
    options = {"TASK_QUEUE_ENABLE": int(os.environ.get("TASK_QUEUE_ENABLE", "1"))}

    def set_device(device: Any) -> None:
        _current.index = _index(device)

    def get_device_name(device: Any = None) -> str:
        return f"{_chip()}-emulated physical {physical_devices()[_index(device)]}"

    api = types.ModuleType("torch.npu")
    api.__dict__.update(
        is_available=lambda: bool(physical_devices()),
        is_initialized=lambda: True,
        init=lambda: None,
        _is_in_bad_fork=lambda: False,
        manual_seed=lambda seed: None,
        manual_seed_all=lambda seed: None,
        device_count=lambda: len(physical_devices()),
        current_device=_current_device,
        set_device=set_device,
        device=CurrentDevice,
        synchronize=lambda device=None: None,
        Event=Event,
        Stream=Stream,
        current_stream=_current_stream,
        default_stream=lambda device=None: Stream(device, aside=False),
        NPUGraph=Graph,
        graph=Recording,
        stream=lambda stream: stream,
        get_device_name=get_device_name,
        mem_get_info=lambda device=None: (MEMORY_BYTES, MEMORY_BYTES),
        memory_allocated=lambda device=None: 0,
        max_memory_allocated=lambda device=None: 0,
        memory_reserved=lambda device=None: 0,
        empty_cache=lambda: None,
        set_compile_mode=lambda jit_compile=False: options.update(jit_compile=jit_compile),
        set_option=options.update,
        get_task_queue_enable=lambda: options["TASK_QUEUE_ENABLE"],
        set_task_queue_enable=lambda level: options.update(TASK_QUEUE_ENABLE=level),
        conv=types.SimpleNamespace(allow_hf32=True),
        matmul=types.SimpleNamespace(allow_hf32=False),
        config=types.SimpleNamespace(allow_internal_format=True),
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16, torch.float32],
    )
    return api
