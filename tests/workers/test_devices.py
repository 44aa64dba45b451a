"""Opening a device and telling what took effect. npu: test_torch_npu_contract.py and test_emulated_npu.py."""
from __future__ import annotations

import importlib.util
import math
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch

from blendmaskd import settings
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, Preload
from blendmaskd.probe import Cause
from blendmaskd.shell import launch
from blendmaskd.wanted import Actual, differences
from blendmaskd_workers import devices, process
from blendmaskd_workers.devices import DeviceError
from checkout import ROOT, SOURCES

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def restored_precision() -> Iterator[None]:
    """TF32 switches are the process's."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cpu:1"])
def test_the_cpu_is_one_device_whatever_its_slot(name: str) -> None:
    device = devices.open_device(name)
    device.use()
    image = torch.arange(6.0)
    assert device.upload(image) is image
    device.synchronize()
    assert (str(device.torch_device), device.name(), device.task_queue()) == ("cpu", "cpu", None)


def cpu_with(flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu sse2 {flags}\nbugs\t\t:\n")
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("precision", "plain", "able"),
    [
        ("fp32", torch.float32, torch.float32),
        ("hf32", torch.float32, torch.float32),
        ("auto", torch.float32, torch.bfloat16),
        ("bf16", "has neither AVX512-BF16 nor AMX", torch.bfloat16),
        ("fp16", "some forty times slower", "some forty times slower"),
    ],
)
def test_what_a_cpu_computes_in(
    precision: devices.Precision, plain: Any, able: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for flags, wanted in {"avx512f": plain, "avx512f avx512_bf16": able, "amx_tile amx_bf16": able}.items():
        cpu_with(flags, monkeypatch, tmp_path)
        if isinstance(wanted, str):
            with pytest.raises(devices.UnsupportedError, match=wanted) as refused:
                devices.open_device("cpu:0", precision)
            assert refused.value.cause is Cause.PRECISION
        else:
            monkeypatch.setattr(devices, "bf16_share", lambda: devices.BF16_SHARE)
            assert devices.open_device("cpu:0", precision).dtype == wanted


@pytest.mark.parametrize(
    ("flags", "share", "dtype", "reason"),
    [
        ("avx512f", 0.1, "float32", "neither AVX512-BF16 nor AMX"),
        ("avx512_bf16", 1.93, "float32", "convolutions in bfloat16 take 1.93 of the time in float32"),
        ("avx512_bf16", 0.81, "float32", "convolutions in bfloat16 take 0.81 of the time in float32"),
        ("amx_bf16", 0.5, "bfloat16", "convolutions in bfloat16 take 0.50 of the time in float32"),
    ],
)
def test_auto_is_the_faster_one_by_a_margin_and_says_why(
    flags: str, share: float, dtype: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu_with(flags, monkeypatch, tmp_path)
    monkeypatch.setattr(devices, "bf16_share", lambda: share)
    effects = devices.open_device("cpu", "auto").effects()
    assert effects["dtype"] == dtype
    assert reason in effects["dtype_reason"]
    assert devices.open_device("cpu", "fp32").effects()["dtype_reason"] is None


@pytest.mark.skipif(not devices.cpu_multiplies_bf16(), reason="needs a CPU with AVX512-BF16 or AMX")
@pytest.mark.parametrize(("instructions", "dtype"), [("AVX512_CORE", "float32"), ("DEFAULT", None)])
def test_auto_goes_by_what_convolutions_take(instructions: str, dtype: str | None) -> None:
    """A oneDNN that may not use this CPU's bfloat16 is slower in it, as on CPUs whose bfloat16 is slow."""
    opener = (
        "import torch; from blendmaskd_workers import devices; before = torch.get_num_threads();"
        "device = devices.open_device('cpu', 'auto'); assert torch.get_num_threads() == before;"
        "print(device.effects()['dtype'], device.why)"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "2"}
    environment["ONEDNN_MAX_CPU_ISA"] = instructions
    answer = subprocess.run([sys.executable, "-c", opener], env=environment, capture_output=True, text=True, check=True)
    found, _, reason = answer.stdout.partition(" ")
    share = float(re.search(r"take ([0-9.]+) of", reason)[1])  # type: ignore[index]
    assert found == ("bfloat16" if share <= devices.BF16_SHARE else "float32")
    assert dtype is None or found == dtype


def test_this_cpus_own_description_can_be_read() -> None:
    assert devices.cpu_multiplies_bf16() in (True, False)
    assert devices.open_device("cpu", "auto").dtype in (torch.float32, torch.bfloat16)


def test_memory_of_the_cpu_is_this_process() -> None:
    device = devices.open_device("cpu")
    before = device.memory()
    with mmap.mmap(-1, 64 << 20) as block:  # from the kernel: an allocator may hand out what it already has
        block.write(b"1" * len(block))
        after = device.memory()
        assert after.used - before.used > 0.9 * len(block)
        assert after.used <= after.peak <= after.total == psutil.virtual_memory().total
    freed = device.memory()
    assert freed.used < before.used + 0.5 * (64 << 20)
    assert freed.peak > before.used + 0.9 * (64 << 20)


def test_a_cuda_device_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(DeviceError, match=f"cuda:{count}: {count} cuda devices are visible to this process") as refused:
        devices.open_device(f"cuda:{count}")
    assert refused.value.cause is Cause.NOT_VISIBLE


@pytest.mark.skipif(importlib.util.find_spec("torch_npu") is not None, reason="needs a host without torch_npu")
def test_an_npu_without_torch_npu_is_refused() -> None:
    with pytest.raises(DeviceError, match="torch_npu is not installed") as refused:
        devices.open_device("npu:0")
    assert refused.value.cause is Cause.NO_TORCH_NPU


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ImportError('libhccl.so: cannot open shared object file')", "libhccl.so: cannot open"),
        ("import a_module_that_it_needs", "No module named 'a_module_that_it_needs'"),
        ("raise Exception('ASCEND_HOME_PATH : /a does not exist.\\n[ERROR] 2026 ERR00008 PTA resource not found')",
         "ASCEND_HOME_PATH : /a does not exist.\n"),
    ],
)
def test_an_npu_whose_torch_npu_cannot_load_is_explained(tmp_path: Path, program: str, reason: str) -> None:
    (tmp_path / "torch_npu.py").write_text(program)
    opener = (
        "from blendmaskd_workers import devices\n"
        "try: devices.open_device('npu:0')\nexcept devices.DeviceError as e: print(e.cause, e)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{SOURCES}", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    answer = subprocess.run([sys.executable, "-c", opener], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("no-cann ")
    assert "is CANN's set_env.sh sourced?" in answer.stdout
    assert reason in answer.stdout


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("hf32", True)])
def test_cuda_rounds_to_tf32_only_when_asked(
    precision: devices.Precision, allowed: bool, restored_precision: None
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not allowed
    devices._set_up_cuda(precision)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (allowed, allowed)


def test_actual_is_what_the_libraries_say(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    tuned = settings.from_tree({"devices": ["cpu:0"], "runtime": {"threads": 1}})
    wanted = launch_plan.plan("cpu:0", Basis(tuned, {}, Preload(None, "off"), cpus, math.inf), {}).assignment.wanted
    for name, value in wanted.env.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        actual = process.observe(wanted, devices.open_device("cpu"))
        assert actual.device_name == "cpu"
        assert differences(wanted, actual, ()) == []
        assert msgspec.json.decode(msgspec.json.encode(actual), type=Actual) == actual
        torch.set_num_threads(2)
        actual = process.observe(wanted, devices.open_device("cpu"))
        assert differences(wanted, actual, ()) == ["threads: wanted 1, is 2"]
    finally:
        torch.set_num_threads(threads)


def test_a_cpu_workers_process_has_what_its_plan_wants() -> None:
    """Torch in a real process: one thread per CPU of the slot, all of its threads on these."""
    cpu = max(os.sched_getaffinity(0))
    probe = (
        "import os, msgspec, torch; from blendmaskd import assignment; from blendmaskd_workers import devices, process;"
        "told = assignment.read(os.environ); torch.ones(300, 300) @ torch.ones(300, 300);"
        "actual = process.observe(told.wanted, devices.open_device(told.local_device));"
        "print(msgspec.json.encode(actual).decode())"
    )
    basis = launch.basis(settings.from_tree({"devices": ["cpu:1"], "runtime": {"cpus": {"cpu:1": str(cpu)}}}))
    plan = launch_plan.plan("cpu:1", basis, os.environ, arguments=("-c", probe))
    running = launch.launch(plan, stdout=subprocess.PIPE, cwd=ROOT)
    output, _ = running.communicate(timeout=60)
    actual = msgspec.json.decode(output, type=Actual)
    assert differences(plan.assignment.wanted, actual, ()) == []
    assert (actual.cpus, actual.threads) == (str(cpu), 1)


@needs_cuda
def test_a_cuda_device_works(restored_precision: None) -> None:
    device = devices.open_device("cuda:0")
    device.use()
    image = torch.arange(1 << 20, dtype=torch.float32)
    on_device = device.upload(image)
    device.synchronize()
    assert on_device.device == device.torch_device
    assert torch.equal(on_device.cpu(), image)
    memory = device.memory()
    assert image.nbytes <= memory.used <= memory.peak <= memory.total
    assert device.name() == torch.cuda.get_device_name(0)


def test_where_cann_may_not_write_it_is_said_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ASCEND_WORK_PATH", "/proc/nowhere")
    with pytest.raises(DeviceError, match=r"ASCEND_WORK_PATH=/proc/nowhere: .*: set it to a folder"):
        devices._make_work_path()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # as in a container that is given any number
    monkeypatch.setenv("ASCEND_WORK_PATH", str(tmp_path / "work"))
    devices._make_work_path()
    assert (tmp_path / "work").is_dir()
    monkeypatch.delenv("ASCEND_WORK_PATH")
    with pytest.raises(DeviceError, match=r"home directory.*: set it to a folder"):
        devices._make_work_path()
