"""The real torch_npu under a worker's launch plan and `blendmaskd_workers.devices`, over a stand-in for CANN
(cann_stub.c).

Without CANN an installed torch_npu breaks `import torch`, so its wheel is unpacked into a folder of its own. The
stand-in computes nothing: what is shown is that every name and variable exists, that set-up runs to its end, that
bytes reach the device and come back, and on which CPUs torch_npu's threads run.
"""
from __future__ import annotations

import ast
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from blendmaskd import discovery, settings, topology
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan, Preload
from blendmaskd.shell import launch
from blendmaskd_workers.devices import GRAPHS
from blendmaskd_workers.evaluation import operators
from checkout import ROOT, SOURCES

pytestmark = pytest.mark.slow

VERSION = "2.13.0"
SOURCES_OF_EVALUATION = ROOT / "workers" / "blendmaskd_workers" / "evaluation"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blendmaskd-tests"

PROBE = """
import dataclasses, json, os, sys
import torch
import msgspec
from blendmaskd import assignment
from blendmaskd.wanted import differences
from blendmaskd_workers import devices, process

told = assignment.read(os.environ)
device = devices.open_device(told.local_device, told.settings.model.precision)
image = torch.arange(12.0).reshape(3, 4)
on_device = device.upload(image)
staged = device.stage(image)
device.synchronize()
npu, options = torch.npu, sys.modules["torch_npu"]._C._npu_getOption
actual = process.observe(told.wanted, device)
print(json.dumps({
    "device": str(on_device.device),
    "copied": torch.equal(on_device.cpu(), image),
    "staged": torch.equal(staged.take().cpu(), image),
    "missing": [name for name in NAMES if not hasattr(npu, name)],
    "hf32": [npu.conv.allow_hf32, npu.matmul.allow_hf32],
    "precision_mode": options("ACL_PRECISION_MODE").decode(),
    "jit_compile": options("jitCompile").decode(),
    "memory": dataclasses.asdict(device.memory()),
    "arithmetic": device.arithmetic(),
    "actual": msgspec.to_builtins(actual),
    "threads": process.thread_masks(),
    "differences": differences(told.wanted, actual, ()),
}))
"""


@pytest.fixture(scope="module")
def torch_npu() -> Path:
    """The folder of the unpacked wheel, kept between runs."""
    if not torch.__version__.startswith("2.13."):
        pytest.skip(f"torch_npu {VERSION} needs torch 2.13, this is {torch.__version__}")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    folder = CACHE / f"torch_npu-{VERSION}-{tag}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            wheel = _download(Path(scratch))
            unpacked = Path(scratch) / "unpacked"
            zipfile.ZipFile(wheel).extractall(unpacked)
            unpacked.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder), f"torch_npu=={VERSION}"]
    pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"needs the torch_npu {VERSION} wheel for this platform: {reason}")
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def cann(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of libraries under the names of CANN's."""
    if not shutil.which("gcc"):
        pytest.skip("needs gcc to build the stand-in for CANN")
    folder = tmp_path_factory.mktemp("cann")
    stub = ROOT / "tests" / "cann_stub.c"
    for name in ("ascendcl", "acl_op_compiler", "hccl"):
        _compile(folder / f"lib{name}.so", stub)
    for name in ("ge_runner", "graph", "acl_tdt_channel"):
        _compile(folder / f"lib{name}.so", Path(os.devnull))
    return folder


def _compile(library: Path, source: Path) -> None:
    subprocess.run(["gcc", "-shared", "-fPIC", "-x", "c", "-o", str(library), str(source)], check=True)


@pytest.fixture(scope="module")
def two_cpus() -> tuple[int, int]:
    cpus = discovery.available_cpus()
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    return cpus[0], cpus[1]


class Launcher:
    """Starts a worker's process as the daemon does, with PROBE in the place of the worker."""

    def __init__(self, torch_npu: Path, cann: Path) -> None:
        self.worker_env = {
            "PYTHONPATH": f"{torch_npu}:{SOURCES}",
            "LD_LIBRARY_PATH": f"{cann}:{torch_npu}/torch_npu/lib",
        }

    def plan(self, cpus: tuple[int, ...], **tree: Any) -> LaunchPlan:
        extra = tree.pop("worker_env", {})
        tuned = settings.from_tree({"devices": ["npu:1"], "worker_env": self.worker_env | extra, **tree})
        arguments = ("-c", f"NAMES = {_api_names()!r}\n{PROBE}")
        basis = Basis(tuned, {"npu:1": cpus}, launch.resolve_preload("auto"), cpus, math.inf)
        return launch_plan.plan("npu:1", basis, os.environ, arguments=arguments)

    def probe(self, plan: LaunchPlan) -> dict[str, Any]:
        process = launch.launch(plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def launcher(torch_npu: Path, cann: Path) -> Launcher:
    return Launcher(torch_npu, cann)


def _api_names() -> list[str]:
    """The attributes of torch.npu that workers/blendmaskd_workers/devices.py uses, read from its source."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / "workers" / "blendmaskd_workers" / "devices.py").read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="api") | ast.Attribute(attr="api"), attr=name):
                names.add(name)
            case ast.Call(func=ast.Name(id="getattr"), args=[ast.Attribute(attr="api"), ast.Constant(value=name), *_]):
                names.add(name)
    return sorted(names | {GRAPHS["npu"]})


def _own_threads(found: dict[str, Any]) -> dict[str, str]:
    """torch_npu's threads, by name, and the CPUs each runs on."""
    own = {name.partition("/")[0]: cpus for name, cpus in found["threads"].items()}
    return {name: own[name] for name in ("acl_thread", "release_thread")}


def test_set_up_runs_to_its_end_and_threads_inherit_the_slots_cpus(
    launcher: Launcher, two_cpus: tuple[int, int]
) -> None:
    found = launcher.probe(launcher.plan(two_cpus[1:]))

    cpu = str(two_cpus[1])
    assert found["missing"] == []
    assert (found["device"], found["copied"], found["staged"]) == ("npu:0", True, True)
    assert found["hf32"] == [False, False]
    assert found["precision_mode"] == "must_keep_origin_dtype"
    assert found["jit_compile"] == "disable"
    assert set(found["arithmetic"]) == {"conv_hf32", "matmul_hf32", "internal_formats", "precision_mode"}
    assert found["arithmetic"]["conv_hf32"] == found["arithmetic"]["matmul_hf32"] == "off"
    assert found["arithmetic"]["precision_mode"] == "must_keep_origin_dtype"
    assert found["memory"]["total"] == 32 << 30
    assert 0 < found["memory"]["used"] <= found["memory"]["peak"]
    assert found["actual"]["task_queue"] == 2
    assert found["actual"]["device_name"] == "Ascend910B3"
    assert found["actual"]["env"]["ASCEND_RT_VISIBLE_DEVICES"] == "1"
    assert set(found["threads"].values()) == {cpu}
    assert _own_threads(found) == {"acl_thread": cpu, "release_thread": cpu}
    assert found["differences"] == []


def test_hf32_and_a_blocked_task_queue(launcher: Launcher, two_cpus: tuple[int, int]) -> None:
    blocking = {"ASCEND_LAUNCH_BLOCKING": "1"}
    plan = launcher.plan(two_cpus[:1], model={"precision": "hf32"}, worker_env=blocking)
    found = launcher.probe(plan)

    assert found["hf32"] == [True, True]
    assert found["arithmetic"]["conv_hf32"] == "on"
    assert "turns the task queue off" in plan.warnings[0]
    assert found["differences"] == ["task_queue: wanted 2, is 0"]


def test_float32_is_kept_on_a_910a(launcher: Launcher, two_cpus: tuple[int, int]) -> None:
    plan = launcher.plan(two_cpus[:1], runtime={"task_queue": 0}, worker_env={"STUB_SOC": "Ascend910A"})
    found = launcher.probe(plan)

    assert (found["actual"]["device_name"], found["actual"]["task_queue"]) == ("Ascend910A", 0)
    assert (found["hf32"], found["precision_mode"]) == ([False, False], "must_keep_origin_dtype")


def test_affinity_conf_is_completed_and_binds_within_the_slot(launcher: Launcher, two_cpus: tuple[int, int]) -> None:
    second = two_cpus[1]
    plan = launcher.plan((second,), runtime={"cpu_affinity_conf": "1"})
    assert plan.environment["CPU_AFFINITY_CONF"] == f"1,npu0:{second}"
    found = launcher.probe(plan)

    assert _own_threads(found) == {"acl_thread": str(second), "release_thread": str(second)}
    assert found["differences"] == []
    assert plan.warnings == ()


def test_affinity_conf_narrows_torch_npus_threads(launcher: Launcher, two_cpus: tuple[int, int]) -> None:
    first, second = two_cpus
    plan = launcher.plan(two_cpus, runtime={"cpu_affinity_conf": f"1,npu0:{first},npu1:{second}"})
    found = launcher.probe(plan)

    assert _own_threads(found) == {"acl_thread": str(second), "release_thread": str(second)}
    assert found["actual"]["cpus"] == topology.format_cpus(two_cpus)
    assert found["differences"] == []
    assert plan.warnings == ()


def test_a_conflicting_affinity_conf_is_skipped_as_the_plan_warns(
    launcher: Launcher, two_cpus: tuple[int, int]
) -> None:
    first, second = two_cpus
    plan = launcher.plan((first,), runtime={"cpu_affinity_conf": f"1,npu1:{second}"})
    found = launcher.probe(plan)

    assert "will bind nothing" in plan.warnings[0]
    assert _own_threads(found) == {"acl_thread": str(first), "release_thread": str(first)}


def test_a_forced_affinity_conf_leaves_the_slots_cpus_and_is_reported(
    launcher: Launcher, two_cpus: tuple[int, int]
) -> None:
    first, second = two_cpus
    plan = launcher.plan((first,), runtime={"cpu_affinity_conf": f"1,force:1,npu1:{second}"})
    found = launcher.probe(plan)

    assert f"CPUs {second}, outside the slot's {first}" in plan.warnings[0]
    assert _own_threads(found) == {"acl_thread": str(second), "release_thread": str(second)}
    assert any("acl_thread" in difference for difference in found["differences"])


def test_torch_npus_profiler_has_the_names_and_columns_that_operators_are_recorded_by(torch_npu: Path) -> None:
    profiler = torch_npu / "torch_npu" / "profiler"
    exported = (profiler / "__init__.py").read_text()
    recording = (SOURCES_OF_EVALUATION / "recording.py").read_text()
    used = set(re.findall(r"profiler\.(\w+)\b", recording.partition("def _torch_npu")[2]))
    assert used == {"profile", "ProfilerActivity", "tensorboard_trace_handler", "_ExperimentalConfig", "ProfilerLevel"}
    assert all(name in exported for name in used)
    headers = (profiler / "analysis" / "prof_common_func" / "_csv_headers.py").read_text()
    for column in (operators.NAME, operators.TYPE, operators.CORE, operators.DURATION):
        assert f'"{column}"' in headers


def test_torch_npu_reads_every_variable_that_the_plan_sets(torch_npu: Path) -> None:
    tuned = settings.from_tree({"devices": ["npu:0"], "runtime": {"cpu_affinity_conf": "1"}})
    base = {"STATE_DIRECTORY": "/var/lib/blendmaskd", "LOGS_DIRECTORY": "/var/log/blendmaskd"}
    off = Preload(None, "off")
    on_npu, on_cpu = (
        set(launch_plan.plan(device, Basis(tuned, {}, off, (0,), math.inf), base).assignment.wanted.env)
        for device in ("npu:0", "cpu:0")
    )
    names = on_npu - on_cpu - {"ASCEND_PROCESS_LOG_PATH"}  # which is CANN's
    assert {"TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "PYTORCH_NPU_ALLOC_CONF", "ACL_OP_COMPILER_CACHE_DIR"} <= names

    library = (torch_npu / "torch_npu/lib/libtorch_npu.so").read_bytes()
    assert [name for name in names if name.encode() not in library] == []
    assert b"expandable_segments" in library
    assert "ASCEND_RT_VISIBLE_DEVICES" in (torch_npu / "torch_npu/npu/__init__.py").read_text()
