"""Launch plans."""
from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from blendmaskd import assignment, settings
from blendmaskd.assignment import ASSIGNMENT, AssignmentError
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan, Preload
from blendmaskd.topology import HostError
from blendmaskd.wanted import Wanted

NONE = Preload(None, "runtime.preload is off")


def make_plan(
    device: str = "npu:1",
    cpus: tuple[int, ...] = (4, 5, 6),
    base: Mapping[str, str] | None = None,
    preload: Preload = NONE,
    arguments: tuple[str, ...] = ("-m", "blendmaskd_workers"),
    quota: float = math.inf,
    **tree: Any,
) -> LaunchPlan:
    tuned = settings.from_tree({"devices": [device], **tree})
    return launch_plan.plan(
        device,
        Basis(tuned, {device: cpus}, preload, cpus, quota),
        base or {},
        generation=3,
        endpoint="ipc:///run/workers",
        token="secret",
        arguments=arguments,
    )


# ---------------------------------------------------------------------------------------------------- the plan


def test_an_npu_slot_sees_one_card_and_its_settings() -> None:
    plan = make_plan("npu:1", base={"PATH": "/bin", "LANG": "C"}, runtime={"task_queue": 1})
    told = plan.environment[ASSIGNMENT]
    assert dict(plan.environment) == {
        "PATH": "/bin",
        "LANG": "C",
        "ASCEND_RT_VISIBLE_DEVICES": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TASK_QUEUE_ENABLE": "1",
        "ACL_DEVICE_SYNC_TIMEOUT": "45",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "3",
        "MKL_NUM_THREADS": "3",
        "PYTHONFAULTHANDLER": "1",
        ASSIGNMENT: told,
    }
    assert plan.argv == (sys.executable, "-P", "-m", "blendmaskd_workers", "npu:1.3")
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
    with pytest.raises(HostError, match="npu:1: not visible, ASCEND_RT_VISIBLE_DEVICES=4"):
        make_plan("npu:1", base={"ASCEND_RT_VISIBLE_DEVICES": "4"})


@pytest.mark.parametrize(("device", "local"), [("npu:1", "npu:0"), ("cuda:3", "cuda:0"), ("cpu:1", "cpu")])
def test_a_worker_is_told_its_assignment(device: str, local: str) -> None:
    plan = make_plan(device, deadline_s=7.5, worker_env={"A": "b"})
    told = assignment.read(plan.environment)
    assert (told.device, told.local_device, told.generation) == (device, local, 3)
    assert (told.identity, told.endpoint, told.token) == (f"{device}.3", "ipc:///run/workers", "secret")
    assert told.settings == settings.from_tree({"devices": [device], "deadline_s": 7.5, "worker_env": {"A": "b"}})
    assert told == plan.assignment
    assert told.daemon_pid == os.getpid()


@pytest.mark.parametrize("environment", [{}, {ASSIGNMENT: "{"}, {ASSIGNMENT: "{}"}])
def test_a_worker_that_the_daemon_did_not_start_is_told_so(environment: dict[str, str]) -> None:
    with pytest.raises(AssignmentError, match=ASSIGNMENT):
        assignment.read(environment)


def test_what_is_wanted_is_for_the_stats() -> None:
    wanted = make_plan("npu:1", worker_env={"ASCEND_GLOBAL_LOG_LEVEL": "3"}).assignment.wanted
    assert wanted == Wanted(cpus="4-6", threads=3, task_queue=2, preload=None, env=wanted.env)
    assert wanted.env["ASCEND_GLOBAL_LOG_LEVEL"] == "3"
    assert ASSIGNMENT not in wanted.env
    assert b"secret" not in msgspec.json.encode(wanted)
    assert make_plan("cpu:0").assignment.wanted.task_queue is None


@pytest.mark.parametrize(("quota", "threads"), [(0.5, "1"), (4.0, "2"), (100.0, "3")])
def test_a_quota_is_shared_out_among_the_slots(quota: float, threads: str) -> None:
    assert make_plan(devices=["npu:0", "npu:1"], quota=quota).environment["OMP_NUM_THREADS"] == threads


def test_threads_are_the_settings_or_one_per_cpu() -> None:
    assert make_plan(runtime={"threads": 8}).environment["OMP_NUM_THREADS"] == "8"
    assert make_plan(cpus=(0,)).environment["MKL_NUM_THREADS"] == "1"


def test_worker_env_comes_last() -> None:
    plan = make_plan(worker_env={"TASK_QUEUE_ENABLE": "0", "OMP_NUM_THREADS": "9", "PATH": "/x"}, base={"PATH": "/y"})
    assert (plan.assignment.wanted.task_queue, plan.assignment.wanted.threads, plan.environment["PATH"]) == (0, 9, "/x")


def test_caches_and_logs_go_where_the_unit_may_write() -> None:
    base = {"STATE_DIRECTORY": "/var/lib/blendmaskd:/var/lib/other", "LOGS_DIRECTORY": "/var/log/blendmaskd"}
    environment = make_plan(base=base).environment
    assert environment["ACL_OP_COMPILER_CACHE_DIR"] == "/var/lib/blendmaskd/atc_data"
    assert environment["ASCEND_PROCESS_LOG_PATH"] == "/var/log/blendmaskd/ascend"
    assert environment["ASCEND_WORK_PATH"] == "/var/lib/blendmaskd/ascend_work/npu1"
    assert make_plan("npu:0", base=base).environment["ASCEND_WORK_PATH"] == "/var/lib/blendmaskd/ascend_work/npu0"
    given = {"ASCEND_PROCESS_LOG_PATH": "/mine", "ASCEND_WORK_PATH": "/mine too"}
    assert given.items() <= make_plan(base=base | given).environment.items()
    assert "ACL_OP_COMPILER_CACHE_DIR" not in make_plan().environment
    of_a = make_plan(base={"HOME": "/home/a"}).environment
    assert of_a["ASCEND_WORK_PATH"] == "/home/a/.cache/blendmaskd/ascend_work/npu1"
    assert "ASCEND_WORK_PATH" not in make_plan("cpu:0", base=base).environment


@pytest.mark.parametrize(("stall_s", "patience"), [(60, "45"), (10, "7"), (1.5, "1"), (1, None)])
def test_a_stream_is_waited_for_less_long_than_a_stalled_worker(stall_s: float, patience: str | None) -> None:
    environment = make_plan(restarts={"stall_s": stall_s}).environment
    assert environment.get("ACL_DEVICE_SYNC_TIMEOUT") == patience
    assert make_plan(base={"ACL_DEVICE_SYNC_TIMEOUT": "3"}).environment["ACL_DEVICE_SYNC_TIMEOUT"] == "3"


def test_graphs_are_recorded_at_a_level_of_the_task_queue_that_allows_it() -> None:
    levels = [
        make_plan(model={"graphs": graphs}, runtime={"task_queue": level}).environment["TASK_QUEUE_ENABLE"]
        for graphs in (False, True)
        for level in (0, 1, 2)
    ]
    assert levels == ["0", "1", "2", "0", "1", "1"]


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
    found, warnings = launch_plan.affinity_conf(conf, "npu:1", (2, 3, 8), cpu_count=16)
    assert found == value
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]


def test_affinity_conf_needs_no_range_where_the_slot_has_every_cpu() -> None:
    assert launch_plan.affinity_conf("1", "npu:0", tuple(range(8)), cpu_count=8) == ("1", [])


def test_fine_binding_with_enough_cpus_is_no_warning() -> None:
    assert launch_plan.affinity_conf("2", "npu:0", tuple(range(8)), cpu_count=16) == ("2,npu0:0-7", [])


def test_a_blocking_launch_is_warned_of() -> None:
    assert "turns the task queue off" in make_plan(base={"ASCEND_LAUNCH_BLOCKING": "1"}).warnings[0]
    assert make_plan(base={"ASCEND_LAUNCH_BLOCKING": "1"}, runtime={"task_queue": 0}).warnings == ()


# ---------------------------------------------------------------------------------------------------- preload


@pytest.mark.parametrize(
    ("base", "preloaded"),
    [("", "/t.so"), ("/a.so", "/a.so:/t.so"), ("/a.so /b.so", "/a.so:/b.so:/t.so")],
)
def test_other_preloads_are_kept(base: str, preloaded: str) -> None:
    plan = make_plan(preload=Preload("/t.so"), base={"LD_PRELOAD": base})
    assert plan.environment["LD_PRELOAD"] == preloaded
    assert (plan.preload, plan.assignment.wanted.preload) == (Preload("/t.so"), "/t.so")


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


def test_no_second_allocator_is_preloaded() -> None:
    plan = make_plan(preload=Preload("/t.so"), base={"LD_PRELOAD": "/opt/libjemalloc.so.2"})
    assert plan.environment["LD_PRELOAD"] == "/opt/libjemalloc.so.2"
    assert plan.preload == Preload(None, "LD_PRELOAD already names /opt/libjemalloc.so.2")
    plan = make_plan(preload=Preload("/t.so"), worker_env={"LD_PRELOAD": "/x.so"})
    assert (plan.environment["LD_PRELOAD"], plan.preload.path, plan.assignment.wanted.preload) == ("/x.so", None, None)


def test_a_device_without_cpus_of_its_own_has_all() -> None:
    plan = launch_plan.plan("cpu:0", Basis(settings.Settings(), {"npu:0": (1,)}, NONE, (0, 1, 2), math.inf), {})
    assert plan.cpus == (0, 1, 2)
