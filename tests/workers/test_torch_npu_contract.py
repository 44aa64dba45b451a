"""The real torch_npu under a worker's launch plan and `blendmaskd_workers.devices`, over a stand-in for CANN
(cann_stub.c).

Without CANN an installed torch_npu breaks `import torch`, so its wheel is unpacked into a folder of its own. The
stand-in computes nothing: what is shown is that every name and variable exists, that set-up runs to its end, that
bytes reach the device and come back, and on which CPUs torch_npu's threads run.
"""
from __future__ import annotations

import ast
import functools
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blendmaskd import discovery, probe, settings, topology
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


COMPUTE = """
import json, os, re, sys, tempfile
import torch
from blendmaskd_workers import devices

def compute(device):
    image = torch.zeros(1, 8, 16, 16, dtype=device.dtype, device=device.torch_device)
    weight, rows = image.new_zeros(8, 8, 3, 3), image[0, 0]
    device.synchronize()
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 2)
        raised = ""
        for work in (lambda: torch.conv2d(image, weight, padding=1), lambda: rows[None] @ rows[None]):
            try:
                work()
                device.synchronize()
            except RuntimeError as error:
                raised += str(error)
        os.dup2(stderr, 2)
        said.seek(0)
        pattern = r"STUB (?:(aclnn) (?:Convolution|Matmul|BatchMatMul) cubeMathType=|(aclop) Conv2D )(.+)"
        return {"asked": ["".join(a[:2]) + " " + a[2] for a in re.findall(pattern, said.read())], "raised": raised}

found, stderr = {}, os.dup(2)
for precision in ("fp32", "hf32", "bf16", "fp16", "native", "auto"):
    try:
        device = devices.open_device("npu:0", precision)
    except devices.UnsupportedError as error:
        found[precision] = {"refused": str(error)}
        continue
    option = sys.modules["torch_npu"]._C._npu_getOption
    told = {"why": device.why, "formats": option("ALLOW_INTERNAL_FORMAT").decode()}
    found[precision] = compute(device) | told | {"jit": option("jitCompile").decode()}
torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = False
torch.npu.set_option({"ACL_PRECISION_MODE": "must_keep_origin_dtype"})
for allow in (False, True):
    torch.npu.config.allow_internal_format = allow
    found[f"must keep, internal formats {allow}"] = compute(device)
print(json.dumps(found))
"""
RECORD = """
import json, os
import torch
from blendmaskd import assignment
from blendmaskd_workers import devices

told = assignment.read(os.environ)
device = devices.open_device(told.local_device, told.settings.model.precision)

def record(graph):
    try:
        graph()
    except RuntimeError as error:  # with graphs too: the stand-in has none
        return str(error)

def bare():
    with torch.npu.graph(torch.npu.NPUGraph()):
        pass

before = device.task_queue()
found = {"bare": record(bare), "ours": record(lambda: device.graph(lambda image: image, device.upload(torch.zeros(3))))}
print(json.dumps(found | {"levels": [before, device.task_queue()]}), flush=True)
os._exit(0)
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


def _download(folder: Path, version: str = VERSION) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--retries", "1", "--dest", str(folder), f"torch_npu=={version}"]
    pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if pip.returncode:
        reason = (pip.stderr.strip().splitlines() or ["pip failed"])[-1]
        pytest.skip(f"needs the torch_npu {version} wheel for this platform: {reason}")
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
    _compile(folder / "libopapi.so", ROOT / "tests" / "opapi_stub.c")
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

    def plan_for(self, chip: str, *program: str, task_queue: int, graphs: bool = False, **extra: str) -> LaunchPlan:
        """Another program than PROBE, on this chip."""
        variables = self.worker_env | {"STUB_SOC": chip} | extra
        tree = {"devices": ["npu:0"], "worker_env": variables, "model": {"graphs": graphs}}
        tuned = settings.from_tree(tree | {"runtime": {"task_queue": task_queue}})
        cpus = discovery.available_cpus()
        basis = Basis(tuned, {"npu:0": cpus}, Preload(None, "off"), cpus, math.inf)
        return launch_plan.plan("npu:0", basis, os.environ, arguments=program)

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


# What a chip's operators are asked for: cubeMathType of aclnn's, the precision mode of those that are compiled (aclop).
COMPILED = "aclop allow_fp32_to_fp16"
KEPT, HALF, HF32 = "aclnn 0", "aclnn 2", "aclnn 3"
WITHOUT_FLOAT32, WITH_FLOAT32 = ("Ascend910A", "Ascend310P3"), ("Ascend910B3", "Ascend910_9391")


@pytest.fixture(scope="module")
def asked(launcher: Launcher) -> Callable[[str], dict[str, Any]]:
    """By chip: what came of each precision there, in one process of the chip."""
    return functools.cache(lambda chip: launcher.probe(launcher.plan_for(chip, "-c", COMPUTE, task_queue=0)))


@pytest.mark.parametrize("chip", WITHOUT_FLOAT32)
def test_a_chip_without_float32_rounds_inside_of_its_products_or_refuses(
    asked: Callable[[str], dict[str, Any]], chip: str
) -> None:
    found = asked(chip)
    for precision in ("fp32", "hf32", "bf16"):
        assert f"npu:0: {chip} multiplies float16 alone" in found[precision]["refused"]
        assert "set model.precision to native" in found[precision]["refused"]
    for precision in ("native", "auto", "fp16"):
        assert (found[precision]["asked"], found[precision]["raised"]) == ([COMPILED, HALF], "")
        assert (found[precision]["formats"], found[precision]["jit"]) == ("", "disable")  # as torch_npu has them
    assert found["auto"]["why"] == f"native: {chip} multiplies float16 alone"
    # what the refusal spares: aclnn's error, or a precision mode that the compiler has not for convolutions
    spared = found["must keep, internal formats False"]
    assert spared["asked"] == [KEPT, KEPT]
    assert spared["raised"].count("161002") >= 2
    assert found["must keep, internal formats True"]["asked"] == ["aclop must_keep_origin_dtype", KEPT]


@pytest.mark.parametrize("chip", WITH_FLOAT32)
def test_a_chip_with_float32_rounds_as_it_was_asked_and_compiles_nothing(
    asked: Callable[[str], dict[str, Any]], chip: str
) -> None:
    found = asked(chip)
    wanted = {"fp32": [KEPT, KEPT], "auto": [KEPT, KEPT], "fp16": [KEPT, KEPT], "bf16": [KEPT, KEPT],
              "hf32": [HF32, HF32], "native": [HF32, KEPT]}  # fmt: skip
    assert {precision: found[precision]["asked"] for precision in wanted} == wanted
    assert {(found[precision]["formats"], found[precision]["jit"]) for precision in wanted} == {("disable", "disable")}
    assert found["auto"]["why"] is None
    # what internal formats, which torch_npu up to 2.9.0 allows by default, would come to
    assert found["must keep, internal formats True"]["asked"] == ["aclop must_keep_origin_dtype", KEPT]


@pytest.mark.parametrize("level", [2, 1])
def test_graphs_are_recorded_below_level_2_of_the_task_queue(launcher: Launcher, level: int) -> None:
    """Level 1 is the plan's own with graphs; a process that was started at 2 goes down before it records."""
    plan = launcher.plan_for("Ascend910B3", "-c", RECORD, task_queue=2, graphs=level == 1)
    found = launcher.probe(plan)
    assert found["levels"] == [level, 1]
    assert ("Do not support TASK_QUEUE_ENABLE = 2" in found["bare"]) == (level == 2)
    assert "TASK_QUEUE_ENABLE" not in found["ours"]


@pytest.mark.parametrize(
    ("chip", "variables", "name", "error"),
    [
        ("Ascend910B3", {}, "Ascend910B3", ""),
        ("Ascend910A", {}, "", "npu:0: Ascend910A multiplies float16 alone"),
        ("Ascend910B3", {"ASCEND_HOME_PATH": "/nowhere"}, "",
         "is CANN's set_env.sh sourced? ASCEND_HOME_PATH : /nowhere does not exist. Please run"),
    ],
)  # fmt: skip
def test_what_a_check_asks_of_it_is_answered_whatever_it_prints(
    launcher: Launcher, chip: str, variables: dict[str, str], name: str, error: str
) -> None:
    """It prints a warning to stdout where ASCEND_HOME_PATH is not set, and raises a bare Exception for a wrong one."""
    plan = launcher.plan_for(chip, "-m", "blendmaskd_workers", "--probe", task_queue=2, **variables)
    process = launch.launch(plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    printed, complaint = process.communicate(timeout=120)
    found = probe.among(printed)
    assert found.name == name, complaint
    assert error in found.error
    assert "ERR00008" not in found.error
    assert variables or "Warning: ASCEND_HOME_PATH environment variable is not set." in complaint


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
    names = on_npu - on_cpu - {"ASCEND_PROCESS_LOG_PATH", "ASCEND_WORK_PATH"}  # which are CANN's
    assert {"TASK_QUEUE_ENABLE", "CPU_AFFINITY_CONF", "PYTORCH_NPU_ALLOC_CONF", "ACL_OP_COMPILER_CACHE_DIR"} <= names

    library = (torch_npu / "torch_npu/lib/libtorch_npu.so").read_bytes()
    assert [name for name in names if name.encode() not in library] == []
    assert b"expandable_segments" in library
    assert b"aclrtSynchronizeEventWithTimeout" not in library, "ACL_DEVICE_SYNC_TIMEOUT would bound events too"
    assert "ASCEND_RT_VISIBLE_DEVICES" in (torch_npu / "torch_npu/npu/__init__.py").read_text()


OTHERS = {  # version: the torch that it asks for on x86; whether it knows TORCH_NPU_FALLBACK_CPU_DISABLE
    "2.9.0": ("==2.9.0+cpu", False),
    "2.9.0.post9": ("==2.9.0+cpu", True),
    "2.14.0": ("==2.14.0.*", True),
}


@pytest.mark.parametrize("version", OTHERS)
def test_other_wheels_have_the_names_that_we_use(version: str, tmp_path: Path) -> None:
    """By what they contain: they need another torch than this one."""
    CACHE.mkdir(parents=True, exist_ok=True)
    kept = list(CACHE.glob(f"torch_npu-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"))
    if not kept:
        kept.append(Path(shutil.move(_download(tmp_path, version), CACHE)))
    torch_wanted, knows_fallback = OTHERS[version]
    with zipfile.ZipFile(kept[0]) as wheel:
        library = wheel.read("torch_npu/lib/libtorch_npu.so")
        names = wheel.namelist()
        python = b"".join(wheel.read(name) for name in names if re.match(r"torch_npu/npu/.*\.py$", name)).decode()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode().replace(" ", "")
    for text in (
        "Do not support TASK_QUEUE_ENABLE = 2 during NPU graph capture", "ACL_DEVICE_SYNC_TIMEOUT",
        "ACL_PRECISION_MODE", "ALLOW_INTERNAL_FORMAT", "ACL_OP_COMPILER_CACHE_DIR", "expandable_segments",
        *(f"Ascend{chip}" for chip in ("910PremiumA", "910ProA", "910ProB", "910A", "310P1", "910B1", "910_9391")),
    ):  # fmt: skip
        assert text.encode() in library, text
    assert (b"TORCH_NPU_FALLBACK_CPU_DISABLE" in library) == knows_fallback
    missing = [name for name in _api_names() if name not in python]
    assert missing == (["get_task_queue_enable", "set_task_queue_enable"] if version == "2.9.0" else [])
    if platform.machine() == "x86_64":
        assert f"Requires-Dist:torch{torch_wanted}" in metadata
