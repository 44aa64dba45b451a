"""Launch plans, and that real processes get what the plan says."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from blendmaskd import settings, spawn, topology
from blendmaskd.spawn import Preload, SpawnError

NONE = Preload(None, "runtime.preload is off")
OBSERVER = (
    "import json, os; from blendmaskd import spawn; told = spawn.assignment(os.environ);"
    "print(json.dumps([spawn.observe(told.wanted), spawn.differences(told.wanted, spawn.observe(told.wanted))]))"
)


def make_plan(
    device: str = "npu:1",
    cpus: tuple[int, ...] = (4, 5, 6),
    base: Mapping[str, str] | None = None,
    preload: Preload = NONE,
    arguments: tuple[str, ...] = ("-m", "blendmaskd_workers"),
    **tree: Any,
) -> spawn.LaunchPlan:
    tuned = settings.from_tree({"devices": [device], **tree})
    return spawn.plan(
        device,
        3,
        tuned,
        cpus,
        base_environment=base or {},
        endpoint="ipc:///run/workers",
        token="secret",
        preload=preload,
        arguments=arguments,
    )


# ---------------------------------------------------------------------------------------------------- the plan


def test_an_npu_slot_sees_one_card_and_its_settings() -> None:
    plan = make_plan("npu:1", base={"PATH": "/bin", "LANG": "C"}, runtime={"task_queue": 1})
    told = plan.environment[spawn.ASSIGNMENT]
    assert dict(plan.environment) == {
        "PATH": "/bin",
        "LANG": "C",
        "ASCEND_RT_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TASK_QUEUE_ENABLE": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "PYTHONFAULTHANDLER": "1",
        spawn.ASSIGNMENT: told,
    }
    assert plan.argv == (sys.executable, "-m", "blendmaskd_workers", "npu:1.3")
    assert "secret" not in " ".join(plan.argv)
    assert (plan.cpus, plan.warnings) == ((4, 5, 6), ())


def test_a_cuda_slot_sees_one_card_in_the_order_of_nvidia_smi() -> None:
    environment = make_plan("cuda:2").environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["ASCEND_RT_VISIBLE_DEVICES"] == ""
    assert "TASK_QUEUE_ENABLE" not in environment


def test_a_cpu_slot_sees_no_card() -> None:
    base = {"CUDA_VISIBLE_DEVICES": "0,1", "ASCEND_RT_VISIBLE_DEVICES": "0"}
    environment = make_plan("cpu:1", base=base).environment
    assert environment["CUDA_VISIBLE_DEVICES"] == environment["ASCEND_RT_VISIBLE_DEVICES"] == ""
    assert "TASK_QUEUE_ENABLE" not in environment


@pytest.mark.parametrize(
    ("device", "variable", "value", "visible"),
    [
        ("npu:1", "ASCEND_RT_VISIBLE_DEVICES", "4,6", "6"),
        ("npu:0", "ASCEND_RT_VISIBLE_DEVICES", "4,6", "4"),
        ("cuda:1", "CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b", "GPU-b"),
    ],
)
def test_an_index_counts_the_devices_that_the_daemon_sees(
    device: str, variable: str, value: str, visible: str
) -> None:
    environment = make_plan(device, base={variable: value}).environment
    assert environment[variable] == visible
    assert "CUDA_DEVICE_ORDER" not in environment


def test_a_device_that_the_daemon_does_not_see_is_refused() -> None:
    with pytest.raises(SpawnError, match="npu:1: not visible, ASCEND_RT_VISIBLE_DEVICES=4"):
        make_plan("npu:1", base={"ASCEND_RT_VISIBLE_DEVICES": "4"})


@pytest.mark.parametrize(("device", "local"), [("npu:1", "npu:0"), ("cuda:3", "cuda:0"), ("cpu:1", "cpu")])
def test_a_worker_is_told_its_assignment(device: str, local: str) -> None:
    plan = make_plan(device, deadline_s=7.5, worker_env={"A": "b"})
    told = spawn.assignment(plan.environment)
    assert (told.device, told.local_device, told.generation) == (device, local, 3)
    assert (told.identity, told.endpoint, told.token) == (f"{device}.3", "ipc:///run/workers", "secret")
    assert told.settings == settings.from_tree({"devices": [device], "deadline_s": 7.5, "worker_env": {"A": "b"}})
    assert told.wanted == plan.wanted
    assert told.daemon_pid == os.getpid()


@pytest.mark.parametrize("environment", [{}, {spawn.ASSIGNMENT: "{"}, {spawn.ASSIGNMENT: "{}"}])
def test_a_worker_that_the_daemon_did_not_start_is_told_so(environment: dict[str, str]) -> None:
    with pytest.raises(SpawnError, match=spawn.ASSIGNMENT):
        spawn.assignment(environment)


def test_what_is_wanted_is_for_the_stats() -> None:
    plan = make_plan("npu:1", worker_env={"ASCEND_GLOBAL_LOG_LEVEL": "3"})
    assert {name: value for name, value in plan.wanted.items() if name != "env"} == {
        "cpus": "4-6",
        "threads": 3,
        "task_queue": 2,
        "preload": None,
    }
    assert plan.wanted["env"]["ASCEND_GLOBAL_LOG_LEVEL"] == "3"
    assert spawn.ASSIGNMENT not in plan.wanted["env"]
    assert "secret" not in json.dumps(plan.wanted)
    assert make_plan("cpu:0").wanted["task_queue"] is None


@pytest.mark.parametrize(("quota", "threads"), [(0.5, "1"), (4.0, "2"), (100.0, "3")])
def test_a_quota_is_shared_out_among_the_slots(monkeypatch, quota, threads) -> None:
    monkeypatch.setattr(spawn, "cpu_quota", lambda: quota)
    assert make_plan(devices=["npu:0", "npu:1"]).environment["OMP_NUM_THREADS"] == threads


def test_threads_are_the_settings_or_one_per_cpu() -> None:
    assert make_plan(runtime={"threads": 8}).environment["OMP_NUM_THREADS"] == "8"
    assert make_plan(cpus=(0,)).environment["MKL_NUM_THREADS"] == "1"


def test_worker_env_comes_last() -> None:
    plan = make_plan(worker_env={"TASK_QUEUE_ENABLE": "0", "OMP_NUM_THREADS": "9", "PATH": "/x"}, base={"PATH": "/y"})
    assert (plan.wanted["task_queue"], plan.wanted["threads"], plan.environment["PATH"]) == (0, 9, "/x")


def test_caches_and_logs_go_where_the_unit_may_write() -> None:
    base = {"STATE_DIRECTORY": "/var/lib/blendmaskd:/var/lib/other", "LOGS_DIRECTORY": "/var/log/blendmaskd"}
    environment = make_plan(base=base).environment
    assert environment["ACL_OP_COMPILER_CACHE_DIR"] == "/var/lib/blendmaskd/atc_data"
    assert environment["ASCEND_PROCESS_LOG_PATH"] == "/var/log/blendmaskd/ascend"
    environment = make_plan(base={**base, "ASCEND_PROCESS_LOG_PATH": "/mine"}).environment
    assert environment["ASCEND_PROCESS_LOG_PATH"] == "/mine"
    assert "ACL_OP_COMPILER_CACHE_DIR" not in make_plan().environment


@pytest.mark.parametrize("variable", ["PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize("where", ["base", "worker_env"])
def test_a_given_allocator_configuration_is_kept_alone(variable: str, where: str) -> None:
    environment = make_plan(**{where: {variable: "max_split_size_mb:64"}}).environment  # type: ignore[arg-type]
    assert {name: value for name, value in environment.items() if name.endswith("ALLOC_CONF")} == {
        variable: "max_split_size_mb:64"
    }


def test_what_is_between_systemd_and_the_daemon_is_not_passed_on() -> None:
    base = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "2", "LISTEN_FDS": "1", "HOME": "/h"}
    assert not set(make_plan(base=base).environment) & (set(base) - {"HOME"})


def test_planning_leaves_this_process_alone() -> None:
    before, mask = dict(os.environ), os.sched_getaffinity(0)
    make_plan(base=os.environ, worker_env={"A": "b"})
    assert (dict(os.environ), os.sched_getaffinity(0)) == (before, mask)


# ---------------------------------------------------------------------------------------------------- CPU_AFFINITY_CONF


def test_affinity_conf_is_off_unless_asked_for() -> None:
    plan = make_plan(base={"CPU_AFFINITY_CONF": "1"})
    assert "CPU_AFFINITY_CONF" not in plan.environment
    assert "not passed on: set runtime.cpu_affinity_conf" in plan.warnings[0]
    assert "CPU_AFFINITY_CONF" not in make_plan("cpu:0", runtime={"cpu_affinity_conf": "1"}).environment
    assert make_plan(runtime={"cpu_affinity_conf": "1"}).environment["CPU_AFFINITY_CONF"] == "1,npu0:4-6"


@pytest.mark.parametrize(
    ("conf", "value", "warning"),
    [
        ("1", "1,npu0:2-3,npu0:8", None),
        ("mode:1", "mode:1,npu0:2-3,npu0:8", None),
        ("1,lazy_bind:0", "1,lazy_bind:0,npu0:2-3,npu0:8", None),
        ("1,npu0:10-11,npu1:2-3", "1,npu0:2-3", None),
        ("1,npu1:3", "1,npu0:3", None),
        ("2", "2,npu0:2-3,npu0:8", "mode 2 needs 5 CPUs, with 3"),
        ("1,npu1:2-5", "1,npu0:2-5", "CPUs 4-5 are outside the slot's 2-3,8: torch_npu will bind nothing"),
        ("1,npu1:4,force:1", "1,force:1,npu0:4", "force:1 takes torch_npu's threads to CPUs 4, outside"),
        ("1,npu1:2,force:1", "1,force:1,npu0:2", None),
        ("1,npu_affine:1", "1,npu_affine:1", "npu_affine:1 asks for the CPUs of the host's first card"),
        ("0", "0", "binds nothing without mode 1 or 2"),
        ("npu1:2", "npu0:2", "binds nothing without mode 1 or 2"),
        ("1,fore:1", "1,fore:1,npu0:2-3,npu0:8", "'fore:1' is not understood"),
    ],
)
def test_affinity_conf_is_made_the_workers_own(conf: str, value: str, warning: str | None) -> None:
    found, warnings = spawn.affinity_conf(conf, "npu:1", (2, 3, 8), cpu_count=16)
    assert found == value
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_affinity_conf_needs_no_range_where_the_slot_has_every_cpu() -> None:
    assert spawn.affinity_conf("1", "npu:0", tuple(range(8)), cpu_count=8) == ("1", [])


def test_fine_binding_with_enough_cpus_is_no_warning() -> None:
    assert spawn.affinity_conf("2", "npu:0", tuple(range(8)), cpu_count=16) == ("2,npu0:0-7", [])


def test_a_blocking_launch_is_warned_of() -> None:
    assert "turns the task queue off" in make_plan(base={"ASCEND_LAUNCH_BLOCKING": "1"}).warnings[0]
    assert make_plan(base={"ASCEND_LAUNCH_BLOCKING": "1"}, runtime={"task_queue": 0}).warnings == ()


# ---------------------------------------------------------------------------------------------------- preload


@pytest.fixture
def library() -> str:
    """A shared library of this machine that Python does not load by itself; it stands in for tcmalloc."""
    for folder in spawn.LIBRARY_FOLDERS:
        if (folder / "libmemusage.so").exists():
            return str(folder / "libmemusage.so")
    pytest.skip("needs libmemusage.so of glibc, to preload it")


def test_tcmalloc_is_found_by_name_for_this_machine(
    tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "_ldconfig", dict)
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "libtcmalloc.so.4").write_bytes(b"\x7fELF\x01\x01" + bytes(14))  # of another word size
    assert spawn.resolve_preload("auto", [empty, full]).path is None
    (full / "libtcmalloc_minimal.so.4").symlink_to(library)
    assert spawn.resolve_preload("auto", [empty, full]) == Preload(str(full / "libtcmalloc_minimal.so.4"))
    assert spawn.resolve_preload("required", [empty, full]).path == str(full / "libtcmalloc_minimal.so.4")
    (full / "libtcmalloc.so.4").unlink()
    (full / "libtcmalloc.so.4").symlink_to(library)
    assert spawn.resolve_preload("auto", [empty, full]).path == str(full / "libtcmalloc.so.4")


def test_ld_sos_cache_is_asked_first() -> None:
    listed = spawn._ldconfig()
    assert any(path.exists() for path in listed["libc.so.6"])


def test_a_missing_tcmalloc_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "_ldconfig", dict)
    assert "libtcmalloc-minimal4" in spawn.resolve_preload("auto", [tmp_path]).reason
    with pytest.raises(SpawnError, match=r"required.*libtcmalloc-minimal4.*gperftools-libs"):
        spawn.resolve_preload("required", [tmp_path])
    with pytest.raises(SpawnError, match=r"/nowhere/libtcmalloc\.so: no such library.*libtcmalloc-minimal4"):
        spawn.resolve_preload("/nowhere/libtcmalloc.so")
    assert spawn.resolve_preload("off") == NONE


def test_a_named_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lib.so").write_text("GROUP ( libtcmalloc.so.4 )")
    with pytest.raises(SpawnError, match="no such library for this machine"):
        spawn.resolve_preload(str(tmp_path / "lib.so"))


@pytest.mark.parametrize(
    ("base", "preloaded"),
    [("", "/t.so"), ("/a.so", "/a.so:/t.so"), ("/a.so /b.so", "/a.so:/b.so:/t.so")],
)
def test_other_preloads_are_kept(base: str, preloaded: str) -> None:
    plan = make_plan(preload=Preload("/t.so"), base={"LD_PRELOAD": base})
    assert plan.environment["LD_PRELOAD"] == preloaded
    assert (plan.preload, plan.wanted["preload"]) == (Preload("/t.so"), "/t.so")


def test_no_second_allocator_is_preloaded() -> None:
    plan = make_plan(preload=Preload("/t.so"), base={"LD_PRELOAD": "/opt/libjemalloc.so.2"})
    assert plan.environment["LD_PRELOAD"] == "/opt/libjemalloc.so.2"
    assert plan.preload == Preload(None, "LD_PRELOAD already names /opt/libjemalloc.so.2")
    plan = make_plan(preload=Preload("/t.so"), worker_env={"LD_PRELOAD": "/x.so"})
    assert (plan.environment["LD_PRELOAD"], plan.preload.path, plan.wanted["preload"]) == ("/x.so", None, None)


@pytest.mark.parametrize(
    ("base", "worker_env", "reason"),
    [
        ({}, {}, "tcmalloc is not installed"),
        ({"LD_PRELOAD": "/a.so"}, {}, "tcmalloc is not installed"),
        ({"LD_PRELOAD": "/opt/libjemalloc.so.2"}, {}, "LD_PRELOAD already names /opt/libjemalloc.so.2"),
        ({}, {"LD_PRELOAD": "/x.so"}, "worker_env sets LD_PRELOAD"),
        ({"LD_PRELOAD": "/opt/libjemalloc.so.2"}, {"LD_PRELOAD": ""}, "worker_env sets LD_PRELOAD"),
    ],
)
def test_another_allocator_is_told_of_where_there_is_no_tcmalloc_too(
    base: dict[str, str], worker_env: dict[str, str], reason: str
) -> None:
    plan = make_plan(preload=Preload(None, "tcmalloc is not installed"), base=base, worker_env=worker_env)
    assert plan.preload == Preload(None, reason)
    assert plan.environment.get("LD_PRELOAD") == {**base, **worker_env}.get("LD_PRELOAD")


# ---------------------------------------------------------------------------------------------------- real processes


@pytest.fixture
def one_cpu() -> int:
    return max(os.sched_getaffinity(0))


def observe(plan: spawn.LaunchPlan) -> tuple[dict[str, Any], list[str]]:
    process = spawn.launch(plan, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    actual, differences = json.loads(output)
    return actual, differences


def test_a_worker_has_what_its_plan_wants(one_cpu: int, library: str) -> None:
    before = os.sched_getaffinity(0)
    plan = make_plan(
        "npu:1", (one_cpu,), os.environ, Preload(library), ("-c", OBSERVER), worker_env={"SOME_VARIABLE": "x"}
    )
    actual, differences = observe(plan)
    assert differences == []
    assert actual["cpus"] == str(one_cpu)
    assert actual["preload"] == library
    assert actual["env"]["SOME_VARIABLE"] == "x"
    assert os.sched_getaffinity(0) == before


def test_a_worker_says_where_it_differs(one_cpu: int) -> None:
    spoilt = (
        "import os; os.environ['TASK_QUEUE_ENABLE'] = '0'; os.environ.pop('OMP_NUM_THREADS');"
        f"os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))});" + OBSERVER
    )
    plan = make_plan("npu:1", (one_cpu,), os.environ, NONE, ("-c", spoilt))
    _, differences = observe(plan)
    text = "\n".join(differences)
    assert "task_queue: wanted 2, is 0" in text
    assert "TASK_QUEUE_ENABLE: wanted '2', is '0'" in text
    assert "threads: wanted 1, is None" in text
    assert ("thread main runs on CPUs" in text) == (len(os.sched_getaffinity(0)) > 1)


def test_threads_with_a_mask_of_their_own_are_named() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("needs two CPUs")
    pinned = (
        "import os, threading; pinned, end = threading.Event(), threading.Event()\n"
        f"def run(): os.sched_setaffinity(0, [{cpus[0]}]); pinned.set(); end.wait(30)\n"
        f"threading.Thread(target=run).start(); pinned.wait(30)\n{OBSERVER}\nend.set()"
    )
    actual, differences = observe(make_plan("cpu:0", tuple(cpus), os.environ, NONE, ("-c", pinned)))
    assert (actual["cpus"], differences) == (topology.format_cpus(cpus), [])
    assert list(actual["thread_cpus"].values()) == [str(cpus[0])]


def test_a_library_that_was_not_preloaded_is_reported(one_cpu: int, library: str) -> None:
    plan = make_plan("cpu:0", (one_cpu,), os.environ, Preload(library), ("-c", OBSERVER))
    without = {name: value for name, value in plan.environment.items() if name != "LD_PRELOAD"}
    actual, differences = observe(dataclasses.replace(plan, environment=without))
    assert actual["preload"] is None
    assert f"preload: wanted {library}, is None" in differences


def test_narrower_is_as_wanted_only_with_affinity_conf() -> None:
    wanted: dict[str, Any] = {"cpus": "0-3", "threads": 4, "task_queue": None, "preload": None, "env": {}}
    actual = {**wanted, "cpus": "0-1", "thread_cpus": {"acl_thread/7": "2"}}
    assert spawn.differences(wanted, actual) == ["CPUs 2-3 of 0-3 are not used"]
    both = {"env": {"CPU_AFFINITY_CONF": "1"}}
    assert spawn.differences(wanted | both, actual | both) == []
    actual["thread_cpus"]["acl_thread/7"] = "3-4"
    assert spawn.differences(wanted | both, actual | both) == ["thread acl_thread/7 runs on CPUs 3-4, outside 0-3"]


def test_launching_from_a_thread_leaves_the_others_alone(one_cpu: int) -> None:
    """The starting thread's mask, not the process's, is what changes, and only for the start."""
    before = spawn.thread_masks()
    plan = make_plan("cpu:0", (one_cpu,), os.environ, NONE, ("-c", OBSERVER))
    seen: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: seen.append(observe(plan)[0]))
    thread.start()
    thread.join(30)
    assert seen[0]["cpus"] == str(one_cpu)
    assert before.items() <= spawn.thread_masks().items()  # the joined thread may still be ending


def test_cpus_that_do_not_exist_stop_the_launch() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(SpawnError, match="npu:1: cannot run on CPUs 900-901"):
        spawn.launch(make_plan("npu:1", (900, 901)))
    assert os.sched_getaffinity(0) == before


def test_a_program_that_cannot_be_started_leaves_the_mask(one_cpu: int) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(OSError, match="nowhere"):
        spawn.launch(dataclasses.replace(make_plan("cpu:0", (one_cpu,)), argv=("/nowhere",)))
    assert os.sched_getaffinity(0) == before


def test_every_thread_of_this_process_has_a_mask() -> None:
    masks = spawn.thread_masks()
    assert len(masks) == len(list(Path("/proc/self/task").iterdir()))
    assert topology.format_cpus(os.sched_getaffinity(0)) in masks.values()
