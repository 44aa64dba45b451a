"""How a worker process is to be started on a device. Pure.

`plan` decides everything before the process exists: argv, the whole environment, CPU set, preloaded allocator;
`blendmaskd.shell.launch` does it. The worker reads its `Assignment` back, and compares what it finds with what was
wanted (`blendmaskd.wanted`).

Device numbers are those of `blendmaskd.topology`. The worker sees one device, as index 0 (`Assignment.local_device`).
"""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from blendmaskd.assignment import ASSIGNMENT, Assignment
from blendmaskd.settings import Settings
from blendmaskd.topology import VISIBLE_DEVICES, Cpus, format_cpus, parse_cpus, visible_id
from blendmaskd.wanted import Wanted, number

TCMALLOC_PACKAGES = "Debian: libtcmalloc-minimal4 or libgoogle-perftools4; openEuler: gperftools-libs"
LOCAL = {"npu": "npu:0", "cuda": "cuda:0", "cpu": "cpu"}  # a worker's device, by kind, as the worker sees it
NOT_INHERITED = {
    "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES",  # the daemon's own
    "CPU_AFFINITY_CONF", ASSIGNMENT,
}  # fmt: skip
AFFINITY_ITEM = re.compile(r"(mode:)?[012]|npu\d+:\d+(-\d+)?|(force|npu_affine|lazy_bind|bind_irq):[01]")
SYNC_SHARE = 0.75  # of `restarts.stall_s`: how long a stream or device is waited for
FINE_BINDING_CPUS = 5  # below, torch_npu lets all of its threads share the range


@dataclass(frozen=True, slots=True)
class Preload:
    """The allocator library that workers get by LD_PRELOAD, or why they get none."""

    path: str | None
    reason: str = ""  # empty when there is a path


@dataclass(frozen=True, slots=True)
class Basis:
    """What workers are started by: the settings, and what they come to on this host."""

    settings: Settings
    cpus: Mapping[str, Cpus]  # of each device
    preload: Preload
    available: Cpus  # all that there are, for a device that has none of its own
    quota: float  # CPUs' time that all workers together may use; infinite without a limit
    near: Mapping[str, Cpus] = field(default_factory=dict)  # the CPUs near each device, where the host tells


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All that a start needs, and what stats show next to it."""

    assignment: Assignment
    argv: tuple[str, ...]
    environment: Mapping[str, str]  # the whole of it
    cpus: Cpus
    preload: Preload
    warnings: tuple[str, ...]  # for the log: settings that will not do what they say


def plan(
    device: str,
    basis: Basis,
    base_environment: Mapping[str, str],
    *,
    generation: int = 0,
    endpoint: str = "",
    token: str = "",
    arguments: Sequence[str] = ("-m", "blendmaskd_workers"),
) -> LaunchPlan:
    """The launch plan of a slot's next worker.

    `arguments` are what Python runs; the worker's identity is added for `ps` to show. Raises `HostError` for a device
    that `base_environment` hides.
    """
    settings = basis.settings
    cpus = basis.cpus.get(device) or basis.available
    own, warnings = _own_variables(device, basis, cpus, base_environment)
    preload, variables = _with_preload(basis.preload, base_environment, settings.worker_env)
    own |= variables | settings.worker_env
    wanted = Wanted(
        cpus=format_cpus(cpus),
        threads=number(own, "OMP_NUM_THREADS"),
        task_queue=number(own, "TASK_QUEUE_ENABLE"),
        preload=preload.path,
        env=dict(sorted(own.items())),
    )
    assignment = Assignment(device, LOCAL[_kind(device)], generation, endpoint, token, os.getpid(), settings, wanted)
    inherited = {name: value for name, value in base_environment.items() if name not in NOT_INHERITED}
    if "PYTHONPATH" in inherited:  # an empty entry, as set_env.sh leaves one, is the working directory
        inherited["PYTHONPATH"] = ":".join(filter(None, inherited["PYTHONPATH"].split(":")))
    return LaunchPlan(
        assignment=assignment,
        argv=(sys.executable, "-P", *arguments, assignment.identity),  # imports nothing from the working directory
        environment={**inherited, **own, ASSIGNMENT: msgspec.json.encode(assignment).decode()},
        cpus=cpus,
        preload=preload,
        warnings=tuple(warnings),
    )


def affinity_conf(conf: str, device: str, cpus: Cpus, cpu_count: int) -> tuple[str, list[str]]:
    """CPU_AFFINITY_CONF for one slot's worker, with warnings where torch_npu would not do what it seems to say.

    In the settings ``npuN:A-B`` names slots (npu:N); the worker sees its device as npu0, so its own ranges are renamed
    and the others left out. Without a range torch_npu would take all `cpu_count` CPUs of the host and, as these are
    not all in the slot's mask, silently bind nothing: the slot's CPUs are filled in.
    """
    items = [item.strip() for item in conf.split(",") if item.strip()]
    slot = device.replace(":", "")
    ranges = [item.partition(":")[2] for item in items if item.startswith(f"{slot}:")]
    options = [item for item in items if not re.match(r"npu\d+:", item)]
    warnings = [f"{item!r} is not understood" for item in items if not AFFINITY_ITEM.fullmatch(item)]
    mode = next((int(item[-1]) for item in options if re.fullmatch(r"(mode:)?[012]", item)), 0)
    if not mode:
        warnings.append("binds nothing without mode 1 or 2")
    if "npu_affine:1" in options:
        warnings.append("npu_affine:1 asks for the CPUs of the host's first card, whichever the worker's is; drop it")
    elif mode and not ranges and cpus != tuple(range(cpu_count)):
        ranges = format_cpus(cpus).split(",")
    bound = {cpu for text in ranges for cpu in parse_cpus(text)}
    outside = format_cpus(bound.difference(cpus))
    if outside and "force:1" in options:
        warnings.append(f"force:1 takes torch_npu's threads to CPUs {outside}, outside the slot's {format_cpus(cpus)}")
    elif outside:
        warnings.append(f"CPUs {outside} are outside the slot's {format_cpus(cpus)}: torch_npu will bind nothing")
    if mode == 2 and len(bound or cpus) < FINE_BINDING_CPUS:
        warnings.append(f"mode 2 needs {FINE_BINDING_CPUS} CPUs, with {len(bound or cpus)} it does what mode 1 does")
    value = ",".join([*options, *(f"npu0:{text}" for text in ranges)])
    return value, [f"{device}: cpu_affinity_conf {conf!r}: {warning}" for warning in warnings]


def _own_variables(device: str, basis: Basis, cpus: Cpus, base: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The variables that the plan sets by itself, and warnings."""
    settings = basis.settings
    share = max(int(min(basis.quota / len(settings.devices), len(cpus))), 1)
    threads = str(share if settings.runtime.threads == "auto" else settings.runtime.threads)
    own = {
        # An installed torch_npu that cannot load would break `import torch`; blendmaskd_workers.devices imports it
        # and explains.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONFAULTHANDLER": "1",  # a stalled worker is ended with SIGABRT and shows its stacks
        **_visible(device, base),
    }
    if _kind(device) != "npu":
        return own, []
    variables, warnings = _npu_variables(device, settings, cpus, base)
    return own | variables, warnings


def _visible(device: str, base: Mapping[str, str]) -> dict[str, str]:
    """The slot's device as the only visible one of its kind, all devices of other kinds hidden."""
    visible = dict.fromkeys(VISIBLE_DEVICES.values(), "")
    kind = _kind(device)
    if kind == "cpu":
        return visible
    visible[VISIBLE_DEVICES[kind]] = visible_id(device, base)
    if kind == "cuda" and VISIBLE_DEVICES[kind] not in base:
        visible["CUDA_DEVICE_ORDER"] = base.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's, not fastest first
    return visible


def _npu_variables(
    device: str, settings: Settings, cpus: Cpus, base: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    most = 1 if settings.model.graphs else 2  # torch_npu records no graph at level 2
    own = {"TASK_QUEUE_ENABLE": str(min(settings.runtime.task_queue, most))}
    warnings: list[str] = []
    if settings.runtime.cpu_affinity_conf:
        conf = settings.runtime.cpu_affinity_conf
        own["CPU_AFFINITY_CONF"], warnings = affinity_conf(conf, device, cpus, os.cpu_count() or 1)
    elif "CPU_AFFINITY_CONF" in base:
        warnings.append(f"{device}: CPU_AFFINITY_CONF of the daemon is not passed on: set runtime.cpu_affinity_conf")
    given = {**base, **settings.worker_env}
    if given.get("ASCEND_LAUNCH_BLOCKING", "0") != "0" and settings.runtime.task_queue:
        warnings.append(f"{device}: ASCEND_LAUNCH_BLOCKING turns the task queue off")
    if "PYTORCH_NPU_ALLOC_CONF" not in given and "PYTORCH_ALLOC_CONF" not in given:  # both at once are an error
        own["PYTORCH_NPU_ALLOC_CONF"] = "expandable_segments:True"  # image shapes vary; else memory fragments
    defaults = _npu_defaults(device, settings, base)
    return own | {name: value for name, value in defaults.items() if name not in base}, warnings


def _npu_defaults(device: str, settings: Settings, base: Mapping[str, str]) -> dict[str, str]:
    """Variables of torch_npu and CANN that the daemon's own environment may have otherwise."""
    found = {}
    if (patience := int(settings.restarts.stall_s * SYNC_SHARE)) > 0:
        found["ACL_DEVICE_SYNC_TIMEOUT"] = str(patience)  # seconds; then an error says what hangs
    if state := base.get("STATE_DIRECTORY", "").split(":")[0]:  # in the unit all else is read-only
        found["ACL_OP_COMPILER_CACHE_DIR"] = f"{state}/atc_data"
        found["ASCEND_WORK_PATH"] = f"{state}/ascend_work/{device.replace(':', '')}"
    elif home := base.get("HOME"):
        found["ASCEND_WORK_PATH"] = f"{home}/.cache/blendmaskd/ascend_work/{device.replace(':', '')}"
    if logs := base.get("LOGS_DIRECTORY", "").split(":")[0]:
        found["ASCEND_PROCESS_LOG_PATH"] = f"{logs}/ascend"
    return found


def _with_preload(
    preload: Preload, base: Mapping[str, str], worker_env: Mapping[str, str]
) -> tuple[Preload, dict[str, str]]:
    """The library that a worker really gets, and LD_PRELOAD: ours behind what was there."""
    if "LD_PRELOAD" in worker_env:
        return Preload(None, "worker_env sets LD_PRELOAD"), {}
    present = [entry for entry in re.split(r"[:\s]+", base.get("LD_PRELOAD", "")) if entry]
    if other := next((entry for entry in present if "malloc" in entry), None):
        return Preload(None, f"LD_PRELOAD already names {other}"), {}
    if preload.path is None:
        return preload, {}
    return preload, {"LD_PRELOAD": ":".join([*present, preload.path])}


def _kind(device: str) -> str:
    return device.partition(":")[0]
