"""How a worker process is started on a device, and whether what was wanted took effect.

`plan` decides everything before the process exists: argv, the whole environment, CPU set, preloaded allocator.
`launch` does it, and is the only function here that changes anything. In the worker, `assignment` reads what the plan
says, `observe` looks at the process, `differences` compares the two. The environment of the calling process is never
edited, torch is never imported.

Device numbers are those of `blendmaskd.topology`. The worker sees one device, as index 0 (`Assignment.local_device`).
"""
from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd.discovery import cpu_quota
from blendmaskd.settings import Settings
from blendmaskd.topology import VISIBLE_DEVICES, Cpus, TopologyError, format_cpus, parse_cpus, visible_id

ASSIGNMENT = "BLENDMASKD_ASSIGNMENT"
TCMALLOC_NAMES = ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4", "libtcmalloc.so")
TCMALLOC_PACKAGES = "Debian: libtcmalloc-minimal4 or libgoogle-perftools4; openEuler: gperftools-libs"
LIBRARY_FOLDERS = tuple(
    Path(folder)
    for folder in (
        f"/usr/lib/{platform.machine()}-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib64",
        "/usr/local/lib",
    )
)
DAEMON_ONLY = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")
AFFINITY_ITEM = re.compile(r"(mode:)?[012]|npu\d+:\d+(-\d+)?|(force|npu_affine|lazy_bind|bind_irq):[01]")
FINE_BINDING_CPUS = 5  # below, torch_npu lets all of its threads share the range


class SpawnError(RuntimeError):
    """A worker that cannot be started as the settings demand; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Preload:
    """The allocator library that workers get by LD_PRELOAD, or why they get none."""

    path: str | None
    reason: str = ""  # empty when there is a path


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker process is told. It travels as JSON in one variable of its environment, out of sight of `ps`."""

    device: str  # the slot: npu:1
    local_device: str  # the same device as the worker sees it: npu:0, cuda:0 or cpu
    generation: int  # which life of the slot
    endpoint: str  # of the broker's socket for workers
    token: str  # proves to the broker that the daemon started this worker
    daemon_pid: int  # whose death ends the worker
    settings: Settings
    wanted: dict[str, Any]  # see `LaunchPlan.wanted`

    @property
    def identity(self) -> str:
        """``slot.generation``: never used twice while the daemon lives."""
        return f"{self.device}.{self.generation}"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """All that `launch` needs, and what stats show next to it."""

    device: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]  # the whole of it
    cpus: Cpus
    preload: Preload
    wanted: dict[str, Any]  # {cpus: "0-3", threads: n, task_queue: 0..2 or None, preload: path or None, env: {…}}
    warnings: tuple[str, ...]  # for the log: settings that will not do what they say


def plan(
    device: str,
    generation: int,
    settings: Settings,
    cpus: Cpus,
    *,
    base_environment: Mapping[str, str],
    endpoint: str,
    token: str,
    preload: Preload,
    arguments: Sequence[str] = ("-m", "blendmaskd_workers"),
) -> LaunchPlan:
    """The launch plan of a slot's next worker.

    `cpus` come from `topology.plan_cpus`, `preload` from `resolve_preload`; `arguments` are what Python runs, and
    the worker's identity is added for `ps` to show. Raises `SpawnError` for a device that `base_environment` hides.
    """
    own, warnings = _own_variables(device, settings, cpus, base_environment)
    preload, variables = _with_preload(preload, base_environment, settings.worker_env)
    own |= variables | settings.worker_env
    wanted = {
        "cpus": format_cpus(cpus),
        "threads": _number(own["OMP_NUM_THREADS"]),
        "task_queue": _number(own.get("TASK_QUEUE_ENABLE")),
        "preload": preload.path,
        "env": dict(sorted(own.items())),
    }
    local = {"npu": "npu:0", "cuda": "cuda:0", "cpu": "cpu"}[_kind(device)]
    assigned = Assignment(device, local, generation, endpoint, token, os.getpid(), settings, wanted)
    inherited = {name: value for name, value in base_environment.items() if name not in _dropped(base_environment)}
    return LaunchPlan(
        device=device,
        argv=(sys.executable, *arguments, assigned.identity),
        environment={**inherited, **own, ASSIGNMENT: msgspec.json.encode(assigned).decode()},
        cpus=cpus,
        preload=preload,
        wanted=wanted,
        warnings=tuple(warnings),
    )


def launch(plan: LaunchPlan, **popen: Any) -> subprocess.Popen[bytes]:
    """Start the planned process; it has its CPU set from before its first instruction.

    A child inherits the affinity of the thread that starts it, so this thread takes on the worker's CPUs for the
    milliseconds of the start. Nothing runs between fork and exec: that would be unsafe once the daemon has threads,
    and setting the mask later would miss the threads that a library makes as it is loaded.

    Raises `SpawnError` when the CPUs are gone, OSError when the program cannot be started.
    """
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, plan.cpus)
    except OSError as error:
        raise SpawnError(f"{plan.device}: cannot run on CPUs {format_cpus(plan.cpus)}: {error}") from None
    try:
        return subprocess.Popen(plan.argv, env=plan.environment, **popen)
    finally:
        os.sched_setaffinity(0, before)


def resolve_preload(choice: str, folders: Iterable[Path] = LIBRARY_FOLDERS) -> Preload:
    """The library that the setting `runtime.preload` means: ``auto``, ``required``, ``off`` or a path.

    ld.so only warns of a library that it cannot preload, so it is looked for here, first in ld.so's cache, then in
    `folders`. Raises `SpawnError` when a required or named library is missing.
    """
    if choice == "off":
        return Preload(None, "runtime.preload is off")
    if choice not in ("auto", "required"):
        if not _loadable(Path(choice)):
            raise SpawnError(f"runtime.preload = {choice}: no such library for this machine ({TCMALLOC_PACKAGES})")
        return Preload(choice)
    listed = _ldconfig()
    for name in TCMALLOC_NAMES:
        for path in (*listed.get(name, ()), *(folder / name for folder in folders)):
            if _loadable(path):
                return Preload(str(path))
    if choice == "required":
        raise SpawnError(f"runtime.preload = required: tcmalloc is not installed ({TCMALLOC_PACKAGES})")
    return Preload(None, f"tcmalloc is not installed ({TCMALLOC_PACKAGES})")


def assignment(environment: Mapping[str, str]) -> Assignment:
    """What the daemon told this worker. Raises `SpawnError` in a process that the daemon did not start."""
    try:
        return msgspec.json.decode(environment[ASSIGNMENT], type=Assignment)
    except KeyError:
        raise SpawnError(f"{ASSIGNMENT} is not set: workers are started by the daemon") from None
    except msgspec.MsgspecError as error:
        raise SpawnError(f"{ASSIGNMENT} is malformed: {error}") from None


def observe(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """What took effect in this process, in the form of `wanted`, and ``thread_cpus``: masks other than the main one's.

    ``threads`` and ``task_queue`` are what the environment says; `blendmaskd_workers.devices.actual` asks the
    libraries.
    """
    main = format_cpus(os.sched_getaffinity(os.getpid()))
    return {
        "cpus": main,
        "thread_cpus": {thread: mask for thread, mask in thread_masks().items() if mask != main},
        "threads": _number(os.environ.get("OMP_NUM_THREADS")),
        "task_queue": _number(os.environ.get("TASK_QUEUE_ENABLE")),
        "preload": wanted["preload"] if wanted["preload"] and _mapped(wanted["preload"]) else None,
        "env": {name: os.environ[name] for name in wanted["env"] if name in os.environ},
    }


def differences(wanted: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Where a worker's process is not what its plan wanted, a sentence each."""
    texts = [
        f"{name}: wanted {wanted[name]}, is {actual[name]}"
        for name in ("threads", "task_queue", "preload")
        if wanted[name] is not None and wanted[name] != actual[name]
    ]
    texts += [
        f"{name}: wanted {value!r}, is {actual['env'].get(name)!r}"
        for name, value in wanted["env"].items()
        if actual["env"].get(name) != value
    ]
    allowed = set(parse_cpus(wanted["cpus"]))
    texts += [
        f"thread {thread} runs on CPUs {mask}, outside {wanted['cpus']}"
        for thread, mask in {"main": actual["cpus"], **actual["thread_cpus"]}.items()
        if not allowed.issuperset(parse_cpus(mask))
    ]
    unused = format_cpus(allowed.difference(parse_cpus(actual["cpus"])))
    if unused and "CPU_AFFINITY_CONF" not in wanted["env"]:  # with it torch_npu narrows its threads on purpose
        texts.append(f"CPUs {unused} of {wanted['cpus']} are not used")
    return texts


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


def _own_variables(
    device: str, settings: Settings, cpus: Cpus, base: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The variables that the plan sets by itself, and warnings."""
    share = max(int(min(cpu_quota() / len(settings.devices), len(cpus))), 1)
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
    try:
        visible[VISIBLE_DEVICES[kind]] = visible_id(device, base)
    except TopologyError as error:
        raise SpawnError(str(error)) from None
    if kind == "cuda" and VISIBLE_DEVICES[kind] not in base:
        visible["CUDA_DEVICE_ORDER"] = base.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi's, not fastest first
    return visible


def _npu_variables(
    device: str, settings: Settings, cpus: Cpus, base: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    own = {"TASK_QUEUE_ENABLE": str(settings.runtime.task_queue)}
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
    for variable, directory, name in (
        ("ACL_OP_COMPILER_CACHE_DIR", "STATE_DIRECTORY", "atc_data"),
        ("ASCEND_PROCESS_LOG_PATH", "LOGS_DIRECTORY", "ascend"),
    ):
        if variable not in base and base.get(directory):  # the default, below $HOME, is read-only in the unit
            own[variable] = f"{base[directory].split(':')[0]}/{name}"
    return own, warnings


def _dropped(base: Mapping[str, str]) -> set[str]:
    """Inherited variables that a worker must not see."""
    return {*DAEMON_ONLY, "CPU_AFFINITY_CONF", ASSIGNMENT} & set(base)


def _with_preload(
    preload: Preload, base: Mapping[str, str], worker_env: Mapping[str, str]
) -> tuple[Preload, dict[str, str]]:
    """The library that a worker really gets, and LD_PRELOAD: ours behind what was there."""
    if preload.path is None:
        return preload, {}
    if "LD_PRELOAD" in worker_env:
        return Preload(None, "worker_env sets LD_PRELOAD"), {}
    present = [entry for entry in re.split(r"[:\s]+", base.get("LD_PRELOAD", "")) if entry]
    other = next((entry for entry in present if re.search("malloc", entry)), None)
    if other:
        return Preload(None, f"LD_PRELOAD already names {other}"), {}
    return preload, {"LD_PRELOAD": ":".join([*present, preload.path])}


def _kind(device: str) -> str:
    return device.partition(":")[0]


def _ldconfig() -> dict[str, list[Path]]:
    """ld.so's cache: soname to paths."""
    for program in ("/sbin/ldconfig", "/usr/sbin/ldconfig"):
        try:
            listed = subprocess.run([program, "-p"], capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        found: dict[str, list[Path]] = {}
        for name, path in re.findall(r"^\s+(\S+) \(.*\) => (/.+)$", listed, re.MULTILINE):
            found.setdefault(name, []).append(Path(path))
        return found
    return {}


def _loadable(path: Path) -> bool:
    """Whether a file is an ELF library of this interpreter's word size, byte order and machine."""
    ours = _elf_identity(Path(sys.executable))
    return ours is not None and _elf_identity(path) == ours


def _elf_identity(path: Path) -> tuple[bytes, bytes] | None:
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return None
    return (head[4:6], head[18:20]) if head.startswith(b"\x7fELF") else None


def thread_masks() -> dict[str, str]:
    """``name/tid`` of every thread of this process to its CPU list."""
    masks = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            status = (task / "status").read_text()
        except OSError:  # it ended meanwhile
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        masks[f"{fields['Name']}/{task.name}"] = fields["Cpus_allowed_list"]
    return masks


def _mapped(library: str) -> bool:
    """Whether a library is in this process's memory; the kernel names the file behind links."""
    real = os.path.realpath(library)
    return any(line.rstrip("\n").endswith(real) for line in Path("/proc/self/maps").open())


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
