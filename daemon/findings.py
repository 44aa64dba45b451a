"""What `blendmaskd check` makes of a host: small functions that take facts and return findings, a line each.

Pure: `daemon.check` asks the host, these judge. A finding is ``ok``, ``warning`` (it serves, not as it could) or
``error`` (it will not serve as the settings say), and names the remedy. A check that does not concern these settings
returns nothing.
"""
from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from daemon import ascend, spawn
from daemon.ascend import Card
from daemon.protocol import MEMORY_SUFFIX
from daemon.topology import VISIBLE_DEVICES, Cpus, format_cpus

SOCKET_PATH_BYTES = 107  # sockaddr_un, without its final zero
FILES_PER_CLIENT = 3  # its connection, and with shared memory the second one and the region
FEW_FILES = 512
GIB = 1 << 30


class Finding(msgspec.Struct, frozen=True):
    """A line of the report."""

    area: str  # device, versions, permissions, …
    level: Literal["ok", "warning", "error"]
    text: str
    remedy: str = ""  # what to do; empty for ok


class Holder(msgspec.Struct, frozen=True):
    """Who has an endpoint."""

    pid: int | None = None  # None: this user may not see it
    command: str = ""
    ours: bool = False  # a running blendmaskd

    def __str__(self) -> str:
        who = "a running blendmaskd" if self.ours else self.command or "another process"
        return who if self.pid is None else f"{who} (pid {self.pid})"


class Probe(msgspec.Struct, frozen=True):
    """What a process said that opened the device as a worker does; `error` is empty when it could."""

    error: str = ""
    name: str = ""  # Ascend910B3
    memory_bytes: int = 0  # all there is
    bf16: bool | None = None  # whether it computes in bfloat16; None: it does not tell
    differences: tuple[str, ...] = ()  # from what its launch plan wanted


class DeviceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One configured npu or cuda device, and cpu ones of engines that compute."""

    device: str
    hidden: str = ""  # why the daemon's environment does not show it
    tool: str = ""  # npu-smi, nvidia-smi; empty for a CPU
    cards: int | None = None  # how many the tool lists; None: it does not answer
    card: Card | None = None
    users: tuple[tuple[int, str], ...] = ()  # pid and name of processes on it, ours left out
    probe: Probe | None = None  # None: not tried
    untried: str = ""  # why not


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A device node of the Ascend driver."""

    path: str
    there: bool
    usable: bool = False  # for reading and writing by this user
    group: str = ""
    member: bool = False  # this user is, or becomes at the next login
    service_may: bool | None = None  # whether the service's user is in the group; None: there is no such user


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Versions as installed; empty where not there or not told."""

    python: str
    torch: str = ""
    torch_npu: str = ""
    machine: str = "x86_64"
    cann: str = ""
    cann_home: str = ""  # ASCEND_HOME_PATH
    set_env: str = ""  # a set_env.sh that was found, for the remedy
    driver: str = ""
    firmware: str = ""
    firmware_ranges: list[tuple[str, str]] = []  # that the driver works with


class EndpointFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One place where the daemon is to listen."""

    setting: str  # endpoints.clients, endpoints.metrics
    endpoint: str  # ipc://PATH, tcp://HOST:PORT, HOST:PORT
    folder: str = ""  # ipc: of the socket
    folder_usable: bool = True  # it can be written, or made
    by_systemd: bool = False  # the installed unit makes the folder when it starts
    bind_errno: int = 0  # tcp: what a trial bind said
    open_to_all: bool = False  # without keys, on an address that others reach
    holder: Holder | None = None


class LimitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Resource limits and memory."""

    files: int  # soft RLIMIT_NOFILE
    hard_files: int
    locked_bytes: int | None  # RLIMIT_MEMLOCK; None: no limit
    available_bytes: int  # of the host's memory, or of the control group's where that is less
    promised_bytes: int  # that queue and shared memory may take


class TcpFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Who may connect by tcp."""

    insecure: bool = False
    server_key: str = ""  # what is wrong with it
    client_keys: str = ""  # the folder
    folder_there: bool = True
    names: tuple[str, ...] = ()  # of the clients
    complaints: tuple[str, ...] = ()  # of files that are no keys


class SpoolFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The file of durable jobs."""

    path: str
    folder_there: bool = True
    writable: bool = True
    network: str = ""  # the type of file system, where it is one of a network
    free_bytes: int = 0
    may_take_bytes: int = 0


class FolderFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A folder that a setting names, for reading."""

    setting: str
    path: str
    there: bool
    usable: bool


# -- devices --------------------------------------------------------------------------------------------------------


def device(facts: DeviceFacts, precision: str) -> list[Finding]:
    """Whether it is there, healthy, free, and opens with this precision."""
    name = facts.device
    if facts.hidden:
        variable = VISIBLE_DEVICES[name.partition(":")[0]]
        return [_error("device", facts.hidden, f"change {variable} or the setting devices")]
    if facts.probe and facts.probe.error:
        return [*_card(facts), _error("device", f"{name}: {facts.probe.error}", _probe_remedy(facts))]
    return [*_card(facts), *_users(facts), *(_opened(facts, precision) if facts.probe else _unopened(facts))]


def plan(warnings: Iterable[str]) -> list[Finding]:
    """What a launch plan says of settings that will not do what they seem to say."""
    return [_warning("device", warning, "docs/settings.md, runtime") for warning in warnings]


def _card(facts: DeviceFacts) -> list[Finding]:
    name = facts.device
    if not facts.tool:
        return []
    if facts.cards is None:
        return [_warning("device", f"{name}: {facts.tool} does not answer: health and other users are not known",
                         f"is the driver installed, and {facts.tool} on PATH? It may need root")]  # fmt: skip
    if facts.card is None:
        return [_error("device", f"{name}: {facts.tool} lists {facts.cards} devices, not this one",
                       "name others in devices, or look for the card with lspci")]  # fmt: skip
    if facts.card.health in ("OK", ""):
        return []
    text = f"{name}: {facts.card.name}, health {facts.card.health}"
    if facts.card.health == "Warning":
        return [_warning("device", text, "npu-smi info -t health; the driver's log is dmesg")]
    return [_error("device", text, "npu-smi info -t health; a card in this state may need a reset or a reboot")]


def _users(facts: DeviceFacts) -> list[Finding]:
    if not facts.users:
        return []
    who = ", ".join(f"pid {pid} ({name})" for pid, name in facts.users)
    return [_warning("device", f"{facts.device}: in use by {who}", "stop it, or share the device's memory and time")]


def _opened(facts: DeviceFacts, precision: str) -> list[Finding]:
    assert facts.probe is not None
    probe, name = facts.probe, facts.device
    findings = [
        _warning("device", f"{name}: {difference}", "docs/troubleshooting.md") for difference in probe.differences
    ]
    if precision == "bf16" and probe.bf16 is False:
        findings.append(_error("device", f"{name}: {probe.name} does not compute in bfloat16",
                               "model.precision: fp16, or fp32"))  # fmt: skip
    if not findings:
        health = f", health {facts.card.health}" if facts.card and facts.card.health else ""
        findings = [_ok("device", f"{name}: {probe.name}, {probe.memory_bytes / GIB:.0f} GiB{health}, {precision}")]
    return findings


def _unopened(facts: DeviceFacts) -> list[Finding]:
    return [_ok("device", f"{facts.device}: not opened, {facts.untried}")]


def _probe_remedy(facts: DeviceFacts) -> str:
    assert facts.probe is not None
    error = facts.probe.error
    if "set_env.sh" in error:
        return "source CANN's set_env.sh in this shell; see the lines of versions and permissions"
    if "is not installed" in error:
        return "pip install the torch_npu that belongs to your CANN and torch: docs/deployment.md"
    if "are visible" in error:
        return "see the lines of permissions; is the driver loaded?"
    if "precision" in error or "float16" in error:
        return "model.precision: auto, or fp32"
    return "docs/troubleshooting.md"


def nodes(facts: Sequence[NodeFacts], opened: bool, user: str) -> list[Finding]:
    """Whether this user, and the service's, may use the driver's device nodes. `opened`: every device was opened."""
    if opened:
        return _shut_out(facts)
    missing = [node.path for node in facts if not node.there]
    findings = [_shut(node, user) for node in facts if node.there and not node.usable]
    if missing:
        findings.append(_error("permissions", f"not there: {', '.join(missing)}",
                               "install the driver, or load it; in a container: --device"))  # fmt: skip
    return findings


def _shut_out(facts: Sequence[NodeFacts]) -> list[Finding]:
    """This user may use the nodes: may the service's?"""
    groups = sorted({node.group for node in facts if node.there and node.service_may is False})
    findings = []
    for group in groups:
        text = f"the service's user blendmaskd is not in the group {group} of the device nodes"
        findings.append(_error("permissions", text, f"usermod --append --groups {group} blendmaskd"))
    if not findings and any(node.there for node in facts):
        findings = [_ok("permissions", "device nodes")]
    return findings


def _shut(node: NodeFacts, user: str) -> Finding:
    remedy = f"usermod --append --groups {node.group} {user}, then log in again"
    if node.member:
        remedy = f"{user} is in the group {node.group} since this login began: log in again"
    return _error("permissions", f"{node.path}: {user} may not use it (group {node.group})", remedy)


# -- software -------------------------------------------------------------------------------------------------------


def versions(facts: VersionFacts, npu: bool) -> list[Finding]:
    """Whether torch, torch_npu, CANN, driver and firmware belong together; the last four only for NPUs."""
    if not facts.torch:
        return [_error("versions", "torch is not installed for this Python", "pip install blendmaskd's requirements")]
    found = [f"Python {facts.python}", f"torch {facts.torch}"]
    if not npu:
        return [_ok("versions", ", ".join(found))]
    findings = [*_torch_npu(facts), *_cann(facts), *_firmware(facts)]
    named = {"torch_npu": facts.torch_npu, "CANN": facts.cann, "driver": facts.driver, "firmware": facts.firmware}
    found += [f"{name} {version or 'unknown'}" for name, version in named.items()]
    return findings or [_ok("versions", ", ".join(found))]


def _torch_npu(facts: VersionFacts) -> list[Finding]:
    if not facts.torch_npu:
        return [_warning("versions", "torch_npu is not installed for this Python", _PAIR)]
    ours, theirs = (version.partition("+")[0].split(".")[:2] for version in (facts.torch, facts.torch_npu))
    if ours != theirs:
        wanted = ".".join(facts.torch_npu.split(".")[:3])
        return [_error("versions", f"torch_npu {facts.torch_npu} needs torch {wanted}, this is {facts.torch}",
                       f"pip install torch=={wanted}, or the torch_npu for {facts.torch}")]  # fmt: skip
    if facts.machine == "x86_64" and "+cu" in facts.torch:
        return [_error("versions", f"torch {facts.torch} is the CUDA build: on x86 torch_npu needs the CPU build",
                       "pip install torch from PyTorch's index for CPUs")]  # fmt: skip
    return []


def _cann(facts: VersionFacts) -> list[Finding]:
    if not facts.cann_home:
        script = facts.set_env or "/usr/local/Ascend/ascend-toolkit/set_env.sh"
        what = "CANN is installed, but not in this environment" if facts.set_env else "no CANN was found"
        remedy = f"source {script}" if facts.set_env else "install CANN, then source its set_env.sh"
        return [_warning("versions", f"ASCEND_HOME_PATH is not set: {what}", remedy)]
    if not facts.cann:
        return [_warning("versions", f"{facts.cann_home} does not tell the version of CANN",
                         "look for ascend_toolkit_install.info there")]  # fmt: skip
    wanted = ascend.cann_for(facts.torch_npu)
    if not facts.torch_npu or not wanted or ascend.order(wanted) == ascend.order(facts.cann):
        return []
    age = "older" if ascend.order(facts.cann) < ascend.order(wanted) else "newer"
    return [_warning("versions", f"torch_npu {facts.torch_npu} was made for CANN {wanted}; {facts.cann} is {age}",
                     _PAIR)]  # fmt: skip


def _firmware(facts: VersionFacts) -> list[Finding]:
    ranges = facts.firmware_ranges
    if not facts.firmware or not ranges or ascend.within(facts.firmware, ranges):
        return []
    told = ", ".join(f"{low} to {high}" for low, high in ranges)
    return [_warning("versions", f"driver {facts.driver} works with firmware {told}; this is {facts.firmware}",
                     "install the firmware of the driver's package")]  # fmt: skip


_PAIR = "the pairs are in docs/deployment.md; the newest at github.com/Ascend/pytorch, COMPATIBILITY.md"


def allocator(choice: str, preload: spawn.Preload | None, complaint: str, apt: bool, dnf: bool) -> list[Finding]:
    """Whether workers get tcmalloc. `complaint`: why a required or named library cannot be had."""
    install = _install_tcmalloc(apt, dnf)
    if preload is None:
        return [_error("allocator", complaint, install)]
    if preload.path:
        return [_ok("allocator", preload.path)]
    if choice == "off" or "LD_PRELOAD" in preload.reason:  # another allocator, or by somebody else's choice
        return [_ok("allocator", preload.reason)]
    return [_warning("allocator", "tcmalloc is not installed: workers use libc's malloc", install)]


def _install_tcmalloc(apt: bool, dnf: bool) -> str:
    if apt:
        return "apt-get install libtcmalloc-minimal4"
    return "dnf install gperftools-libs" if dnf else spawn.TCMALLOC_PACKAGES


# -- CPUs -----------------------------------------------------------------------------------------------------------


def cpus(plan: Mapping[str, Cpus], near: Mapping[str, Cpus], placed: Iterable[str], hinted: bool) -> list[Finding]:
    """The CPU set of each device. `placed`: by the settings; `hinted`: the host's tool answers at all."""
    findings = []
    for name, own in plan.items():
        shared = sorted(other for other, theirs in plan.items() if other != name and set(theirs) & set(own))
        text = f"{name}: CPUs {format_cpus(own)}"
        by_place = set(near.get(name, ())) & set(own)
        if shared:
            findings.append(_warning("cpus", f"{text}, shared with {', '.join(shared)}",
                                     "fewer devices, more CPUs, or runtime.cpus"))  # fmt: skip
        elif name.startswith("npu") and hinted and name not in placed and not by_place:
            findings.append(_warning("cpus", f"{text}; which are near it is not known",
                                     "npu-smi info -t topo; then name them in runtime.cpus"))  # fmt: skip
        else:
            why = "by runtime.cpus" if name in placed else "near it" if by_place else "an even share"
            findings.append(_ok("cpus", f"{text}, {why}"))
    return findings


def governor(slow: Mapping[int, str]) -> list[Finding]:
    """CPUs of the plan, by governor, that a fixed low clock may hold back."""
    if not slow:
        return []
    names = ", ".join(sorted(set(slow.values())))
    return [_warning("cpus", f"governor {names} on CPUs {format_cpus(slow)}: they may run at a low clock",
                     "cpupower frequency-set --governor performance")]  # fmt: skip


# -- endpoints, files, limits ---------------------------------------------------------------------------------------


def endpoint(facts: EndpointFacts) -> list[Finding]:
    """Whether the daemon can listen there."""
    where = f"{facts.setting}: {facts.endpoint}"
    if facts.holder and facts.holder.ours:
        return [_ok("endpoint", f"{where}: served by {facts.holder}")]
    if facts.holder:
        return [_error("endpoint", f"{where}: taken by {facts.holder}", f"stop it, or choose another {facts.setting}")]
    problem = _ipc_problem(facts) if facts.endpoint.startswith("ipc://") else _tcp_problem(facts)
    if problem:
        return [problem]
    if facts.open_to_all:
        return [_warning("endpoint", f"{where}: free, and open to whoever reaches the port",
                         "127.0.0.1 is this host's alone")]  # fmt: skip
    if facts.by_systemd:
        return [_ok("endpoint", f"{where}: systemd makes the folder when the service starts")]
    return [_ok("endpoint", f"{where}: free")]


def _ipc_problem(facts: EndpointFacts) -> Finding | None:
    path = facts.endpoint.removeprefix("ipc://")
    size = len(os.fsencode(path))
    if size > SOCKET_PATH_BYTES:
        return _error("endpoint", f"{facts.setting}: a path of {size} bytes, {SOCKET_PATH_BYTES} are possible",
                      "a shorter path")  # fmt: skip
    if size + len(MEMORY_SUFFIX) > SOCKET_PATH_BYTES:
        return _warning("endpoint", f"{facts.setting}: a path of {size} bytes leaves no room for {MEMORY_SUFFIX}: "
                        "no shared memory", "a shorter path")  # fmt: skip
    if not facts.folder_usable and not facts.by_systemd:
        return _error("endpoint", f"{facts.setting}: this user cannot make {path}",
                      "run as the service's user, or --set 'endpoints.clients=[ipc:///tmp/blendmaskd.sock]'")
    return None


def _tcp_problem(facts: EndpointFacts) -> Finding | None:
    where = f"{facts.setting}: {facts.endpoint}"
    match facts.bind_errno:
        case 0:
            return None
        case errno.EADDRINUSE:
            return _error("endpoint", f"{where}: taken by another process", f"choose another {facts.setting}")
        case errno.EACCES:
            return _error("endpoint", f"{where}: a port below 1024 needs rights", "choose a port above 1023")
        case errno.EADDRNOTAVAIL:
            return _error("endpoint", f"{where}: this host has no such address", "ip address lists those it has")
        case other:
            return _error("endpoint", f"{where}: {os.strerror(other)}", f"choose another {facts.setting}")


def tcp(facts: TcpFacts) -> list[Finding]:
    """Whether tcp endpoints have keys, and clients."""
    if facts.insecure:
        return [_warning("keys", "insecure_tcp: whoever reaches the port can submit jobs and read the traffic",
                         "curve.server_key and curve.client_keys; blendmaskd-keys makes them")]  # fmt: skip
    if facts.server_key:
        return [_error("keys", f"curve.server_key: {facts.server_key}", "blendmaskd-keys server")]
    if not facts.folder_there:
        return [_error("keys", f"curve.client_keys: {facts.client_keys} is not there", "blendmaskd-keys server")]
    findings = [_warning("keys", f"curve.client_keys: {complaint}", "mend or remove the file")
                for complaint in facts.complaints]  # fmt: skip
    if not facts.names:
        return [*findings, _warning("keys", f"no client may connect by tcp yet: {facts.client_keys} holds no keys",
                                    "blendmaskd-keys client")]  # fmt: skip
    return [*findings, _ok("keys", f"{len(facts.names)} clients may connect by tcp")]


def folder(facts: FolderFacts) -> list[Finding]:
    """Whether a folder that a setting names can be read."""
    if not facts.there:
        return [_error("files", f"{facts.setting}: {facts.path} is not there", "make it, or name another")]
    if not facts.usable:
        return [_error("files", f"{facts.setting}: {facts.path} cannot be read by this user", "chmod or chgrp")]
    return [_ok("files", f"{facts.setting}: {facts.path}")]


def spool(facts: SpoolFacts) -> list[Finding]:
    """Whether durable jobs can be kept."""
    if not facts.folder_there:
        return [_error("files", f"spool: the folder of {facts.path} is not there", "make it, for the daemon's user")]
    if not facts.writable:
        return [_error("files", f"spool: this user cannot write {facts.path}", "chown or chgrp its folder")]
    if facts.network:
        return [_warning("files", f"spool: {facts.path} is on {facts.network}: a database there can be damaged",
                         "a file on a disk of this host")]  # fmt: skip
    if facts.may_take_bytes > facts.free_bytes:
        return [_warning("files", f"spool: may take {facts.may_take_bytes / GIB:.1f} GiB, "
                         f"{facts.free_bytes / GIB:.1f} GiB are free", "a smaller spool_bytes, or another disk")]
    return [_ok("files", f"spool: {facts.path}")]


def weights(engine: str, named: str | None, complaint: str | None, took_s: float) -> list[Finding]:
    """Whether the checkpoint matches the config, as a process found that loaded both; `complaint` None: it could."""
    if engine == "timed":
        return [_ok("weights", "the engine timed needs none")]
    if complaint is None:
        return [_ok("weights", f"{named}: matches the config, loaded in {took_s:.1f} s")]
    remedy = "--set model.weights=FILE" if named is None else "model.weights and model.config must be of one network"
    return [_error("weights", complaint, remedy)]


def limits(facts: LimitFacts) -> list[Finding]:
    """Descriptors and memory."""
    locked = "no limit" if facts.locked_bytes is None else f"{facts.locked_bytes / (1 << 20):.0f} MiB"
    clients = facts.files // FILES_PER_CLIENT
    text = f"{facts.files} open files: some {clients} clients; locked memory: {locked}"
    findings = [_ok("limits", text)]
    if facts.files < FEW_FILES:
        findings = [_warning("limits", text, f"ulimit -n {min(65536, facts.hard_files)}; the service has 65536")]
    if facts.promised_bytes > facts.available_bytes:
        findings.append(_warning(
            "limits",
            f"queue and shared memory may take {facts.promised_bytes / GIB:.1f} GiB, "
            f"{facts.available_bytes / GIB:.1f} GiB are available",
            "a smaller queue.max_bytes or shared_memory_bytes",
        ))  # fmt: skip
    return findings


def identity(user: str, is_root: bool, has_service: bool) -> list[Finding]:
    """What root may do says little of what the service's user may."""
    if not is_root or not has_service:
        return []
    return [_warning("permissions", "run as root: the service runs as blendmaskd",
                     "runuser -u blendmaskd -- blendmaskd check …")]  # fmt: skip


def as_tree(findings: Sequence[Finding]) -> dict[str, Any]:
    """For ``--json``."""
    counts = {level: sum(finding.level == level for finding in findings) for level in ("ok", "warning", "error")}
    return {**counts, "findings": msgspec.to_builtins(findings)}


def _ok(area: str, text: str) -> Finding:
    return Finding(area, "ok", text)


def _warning(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, "warning", text, remedy)


def _error(area: str, text: str, remedy: str) -> Finding:
    return Finding(area, "error", text, remedy)
