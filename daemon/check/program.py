"""`blendmaskd check`: asks this host whether the daemon can serve with these settings, and says what to mend.

    blendmaskd check --settings configs/daemon.yaml
    blendmaskd check --devices cpu:0 cpu:1 --set model.weights=model_final.pth
    blendmaskd check --settings /etc/blendmaskd/daemon.yaml --json

Run it as the user that the daemon will run as, in the same environment: rights, limits and CANN's variables are looked
at as they are here. Each line is ok, warning (it will serve, not as it could) or error, with the remedy below it.
Nothing is changed. Each device is opened as its worker would, for a moment, unless a daemon of ours has it; weights are
loaded on the CPU. Exit code: 0 when there is no error (warnings do not count), 1 otherwise.
"""
# torch is only ever loaded by the processes that it starts.
from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import importlib.metadata
import itertools
import json
import os
import platform
import pwd
import resource
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil
from rich.console import Console
from rich.text import Text

from daemon import ascend, spawn, topology
from daemon.access import AllowedKeys
from daemon.ascend import Card, Chip
from daemon.check import cpu_findings, device_findings, endpoint_findings, resource_findings, software_findings
from daemon.check.device_findings import DeviceFacts, NodeFacts, Probe
from daemon.check.endpoint_findings import EndpointFacts, Holder, TcpFacts
from daemon.check.finding import Finding, as_tree
from daemon.check.resource_findings import FolderFacts, LimitFacts, SpoolFacts
from daemon.check.software_findings import VersionFacts
from daemon.keys import KeyFileError, read_pair
from daemon.settings import Settings, SettingsError
from daemon.sockets import is_loopback
from daemon.spawn import LaunchPlan, Preload, SpawnError
from daemon.topology import Cpus, TopologyError

ASCEND = Path("/usr/local/Ascend")
CANN_FOLDERS = ("ascend-toolkit", "cann", "nnae", "nnrt")  # below ASCEND, in the order of install_service.sh
NODES = ("davinci_manager", "devmm_svm", "hisi_hdc")  # beside davinciN
SERVICE_USER = "blendmaskd"
UNIT = Path("/etc/systemd/system/blendmaskd.service")
RUNTIME_FOLDER = Path("/run/blendmaskd")  # RuntimeDirectory= of the unit
DYNAMIC_DRIVERS = ("intel_pstate", "amd-pstate-epp")  # their powersave raises the clock as needed
NETWORK_TYPES = ("nfs", "cifs", "smb", "ceph", "glusterfs", "lustre", "fuse.sshfs", "9p")
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
EXIT_ERRORS = 1


def main(load: Callable[[], Settings], as_json: bool) -> int:
    """Check with the settings that `load` gives. Returns the exit code."""
    try:
        settings = load()
    except SettingsError as error:
        found = [Finding("settings", "error", str(error), "docs/settings.md")]
    else:
        summary = f"{' '.join(settings.devices)}, engine {settings.engine}"
        found = [Finding("settings", "ok", summary), *examine(settings, os.environ)]
    if as_json:
        print(json.dumps(as_tree(found), indent=1))
    else:
        _show(found)
    return EXIT_ERRORS if any(finding.level == "error" for finding in found) else 0


def examine(settings: Settings, environment: Mapping[str, str]) -> list[Finding]:
    """Every check, in the order of the report. Takes seconds: devices are opened and weights loaded."""
    user = pwd.getpwuid(os.geteuid()).pw_name
    endpoints = list(_endpoints(settings))
    serving = next((each.holder for each in endpoints if each.holder and each.holder.ours), None)
    preload, preload_complaint = _preload(settings)
    plan, near, placing = _places(settings, environment)
    trials = _start_trials(settings, plan, preload, serving, environment)
    npus = [device for device in settings.devices if device.startswith("npu") and settings.engine != "timed"]
    cards = _Npus(environment) if npus else None
    versions = _versions(environment)
    probes = {device: _probe(trial) for device, trial in trials.items() if device != WEIGHTS}
    devices = [_device(name, settings, cards, environment, probes.get(name), serving) for name in settings.devices]
    opened = all((probe := probes.get(device)) is not None and not probe.error for device in npus)

    found = device_findings.identity(user, os.geteuid() == 0, _service_groups() is not None)
    found += [line for each in devices for line in device_findings.device(each, settings.model.precision)]
    launched = [trial.plan for trial in trials.values() if trial.plan]
    found += device_findings.plan(dict.fromkeys(warning for each in launched for warning in each.warnings))
    if npus and not serving:
        found += device_findings.nodes(_nodes(npus, environment), opened, user)
    found += software_findings.versions(versions, bool(npus))
    found += placing + cpu_findings.cpus(plan, near, _placed(settings), cards is not None and cards.answers)
    found += cpu_findings.governor(_slow_governors(cpu for own in plan.values() for cpu in own))
    found += software_findings.allocator(
        settings.runtime.preload, launched[-1].preload if launched and preload else preload, preload_complaint,
        apt=shutil.which("apt-get") is not None, dnf=shutil.which("dnf") is not None,
    )  # fmt: skip
    found += [line for each in endpoints for line in endpoint_findings.endpoint(each)]
    found += [line for each in _keys(settings) for line in endpoint_findings.tcp(each)]
    found += [line for each in _folders(settings) for line in resource_findings.folder(each)]
    found += [line for each in _spool(settings) for line in resource_findings.spool(each)]
    found += _weights(settings, trials.get(WEIGHTS))
    return found + resource_findings.limits(_limits(settings))


def _show(found: Sequence[Finding]) -> None:
    console = Console(soft_wrap=True, highlight=False)
    for finding in found:
        console.print(Text(f"{finding.level:8}", STYLES[finding.level]), Text(f"{finding.area:12} {finding.text}"))
        if finding.remedy:
            console.print(Text(f"{'':22}-> {finding.remedy}", "dim"))
    counts = as_tree(found)
    console.print(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['error']} errors")


# -- trials: processes that do what a worker would --------------------------------------------------------------------

WEIGHTS = "weights"


class _Trial:
    """A process of `python -m workers`, started by a launch plan as a worker is; or why none could be."""

    def __init__(self, start: Callable[[], LaunchPlan], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self.took_s = 0.0
        self.printed = ""
        self.complaint: str | None = None
        self.plan: LaunchPlan | None = None
        try:
            self.plan = start()
            self._process = spawn.launch(self.plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except SpawnError as error:
            self.complaint = str(error)

    def end(self) -> _Trial:
        """Wait for it: `printed` or `complaint` hold what came of it."""
        if self.complaint is not None:
            return self
        try:
            printed, complaint = self._process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            self.complaint = f"not done after restarts.start_timeout_s = {self._timeout_s:g} s"
            return self
        self.took_s = time.monotonic() - self._began
        self.printed = printed.decode(errors="replace")
        code = self._process.returncode
        if code != 0:
            last = (complaint.decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            self.complaint = last if code > 0 else f"the process that tried it died of signal {-code}: {last}"
        return self


def _start_trials(
    settings: Settings,
    plan: Mapping[str, Cpus],
    preload: Preload | None,
    serving: Holder | None,
    environment: Mapping[str, str],
) -> dict[str, _Trial]:
    """All at once, by device, and `WEIGHTS`; the engine timed loads nothing and opens nothing."""
    if settings.engine == "timed" or not plan:
        return {}

    def trial(device: str, argument: str) -> _Trial:
        def launch_plan() -> LaunchPlan:
            return spawn.plan(
                device, 0, settings, plan.get(device) or topology.available_cpus(), base_environment=environment,
                endpoint="", token="", preload=preload or Preload(None), arguments=("-m", "workers", argument),
            )  # fmt: skip

        return _Trial(launch_plan, settings.restarts.start_timeout_s)

    tried = [device for device in settings.devices if device.startswith("cpu") or not serving]
    return {WEIGHTS: trial("cpu:0", "--check"), **{device: trial(device, "--probe") for device in tried}}


def _probe(trial: _Trial) -> Probe:
    trial.end()
    if trial.complaint is not None:
        return Probe(error=trial.complaint)
    return msgspec.json.decode(trial.printed, type=Probe)


def _weights(settings: Settings, trial: _Trial | None) -> list[Finding]:
    if trial is None:
        return resource_findings.weights(settings.engine, None, None, 0.0) if settings.engine == "timed" else []
    trial.end()
    return resource_findings.weights(settings.engine, settings.model.weights, trial.complaint, trial.took_s)


# -- devices --------------------------------------------------------------------------------------------------------


class _Npus:
    """What npu-smi tells of this host's cards."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        text = topology.ask_tool(["npu-smi", "info"], environment)
        self.answers = bool(text)
        self.cards = ascend.parse_npu_cards(text)
        self._users = ascend.parse_npu_processes(text)
        self._chips = topology.parse_npu_map(topology.ask_tool(["npu-smi", "info", "-m"], environment))

    def chip(self, host_id: str) -> Chip | None:
        """By logic id; cards in their order where npu-smi has no map."""
        chips = self._chips or dict(enumerate(sorted(self.cards)))
        return chips.get(int(host_id)) if host_id.isdigit() else None

    def users(self, chip: Chip) -> tuple[tuple[int, str], ...]:
        """Processes on a card, without those of a daemon of ours."""
        return tuple((pid, name) for pid, name in self._users.get(chip, ()) if not _is_ours(pid))


def _device(
    device: str,
    settings: Settings,
    npus: _Npus | None,
    environment: Mapping[str, str],
    probe: Probe | None,
    serving: Holder | None,
) -> DeviceFacts:
    untried = f"it is in use by {serving}" if serving else f"the engine {settings.engine} does not use it"
    kind = device.partition(":")[0]
    if kind == "cpu" or settings.engine == "timed":
        return DeviceFacts(device=device, probe=probe, untried=untried)
    try:
        host_id = topology.visible_id(device, environment)
    except TopologyError as error:
        return DeviceFacts(device=device, hidden=str(error))
    if kind == "npu" and npus is not None:
        chip = npus.chip(host_id)
        return DeviceFacts(
            device=device, tool="npu-smi", cards=len(npus.cards) if npus.answers else None,
            card=npus.cards.get(chip) if chip else None, users=npus.users(chip) if chip else (),
            probe=probe, untried=untried,
        )  # fmt: skip
    gpus = _gpus(environment)
    return DeviceFacts(
        device=device, tool="nvidia-smi", cards=len(gpus) // 2 or None,
        card=Card(gpus[host_id], "") if host_id in gpus else None, probe=probe, untried=untried,
    )  # fmt: skip


def _gpus(environment: Mapping[str, str]) -> dict[str, str]:
    """Names by index and by UUID."""
    query = ["nvidia-smi", "--query-gpu=index,uuid,name", "--format=csv,noheader"]
    lines = topology.ask_tool(query, environment).splitlines()
    rows = [[cell.strip() for cell in line.split(",", 2)] for line in lines]
    return {key: row[2] for row in rows if len(row) == 3 for key in row[:2]}


def _nodes(npus: Iterable[str], environment: Mapping[str, str]) -> list[NodeFacts]:
    names = list(NODES)
    for device in npus:
        with contextlib.suppress(TopologyError):
            names.append(f"davinci{topology.visible_id(device, environment)}")
    return [_node(Path("/dev") / name) for name in names]


def _node(path: Path) -> NodeFacts:
    try:
        group_id = path.stat().st_gid
    except OSError:
        return NodeFacts(path=str(path), there=False)
    try:
        group = grp.getgrgid(group_id).gr_name
    except KeyError:
        group = str(group_id)
    user = pwd.getpwuid(os.geteuid())
    service = _service_groups()
    return NodeFacts(
        path=str(path),
        there=True,
        usable=os.access(path, os.R_OK | os.W_OK),
        group=group,
        member=group_id in os.getgrouplist(user.pw_name, user.pw_gid),
        service_may=None if service is None else group_id in service,
    )


def _service_groups() -> set[int] | None:
    """The groups of the service's user, where that exists."""
    try:
        user = pwd.getpwnam(SERVICE_USER)
    except KeyError:
        return None
    return set(os.getgrouplist(SERVICE_USER, user.pw_gid))


# -- software -------------------------------------------------------------------------------------------------------


def _versions(environment: Mapping[str, str]) -> VersionFacts:
    home = environment.get("ASCEND_HOME_PATH", "")
    scripts = [ASCEND / folder / "set_env.sh" for folder in CANN_FOLDERS]
    driver = _read(ASCEND / "driver/version.info")
    return VersionFacts(
        python=platform.python_version(),
        torch=_installed("torch"),
        torch_npu=_installed("torch_npu"),
        machine=platform.machine(),
        cann=_cann_version(Path(home)) if home else "",
        cann_home=home,
        set_env=next((str(script) for script in scripts if script.exists()), ""),
        driver=ascend.parse_version(driver),
        firmware=ascend.parse_version(_read(ASCEND / "firmware/version.info")),
        firmware_ranges=ascend.parse_firmware_ranges(driver),
    )


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cann_version(home: Path) -> str:
    """As torch_npu looks for it: a file ascend_*_install.info in the folder of CANN or the one of its machine."""
    folders = (home, home / f"{platform.machine()}-linux")
    files = [file for folder in folders for file in sorted(folder.glob("ascend_*_install.info"))]
    return next((version for file in files if (version := ascend.parse_version(_read(file)))), "")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _preload(settings: Settings) -> tuple[Preload | None, str]:
    """The allocator that the settings mean, or why it cannot be had."""
    try:
        return spawn.resolve_preload(settings.runtime.preload), ""
    except SpawnError as error:
        return None, str(error)


# -- CPUs -----------------------------------------------------------------------------------------------------------


def _placed(settings: Settings) -> Iterable[str]:
    return () if settings.runtime.cpus == "auto" else settings.runtime.cpus


def _places(
    settings: Settings, environment: Mapping[str, str]
) -> tuple[dict[str, Cpus], dict[str, Cpus], list[Finding]]:
    """The plan, the CPUs near each device, and what stands in the way of a plan."""
    visible = []
    for device in settings.devices:
        with contextlib.suppress(TopologyError):  # `_device` tells of it
            if not device.startswith("cpu"):
                topology.visible_id(device, environment)
            visible.append(device)
    available = topology.available_cpus()
    near = topology.discover([device for device in visible if device not in _placed(settings)], environment)
    try:
        plan = topology.plan_cpus(visible, settings.runtime.cpus, available, near, topology.cores(available))
    except TopologyError as error:
        return {}, near, [Finding("cpus", "error", str(error), "runtime.cpus: auto, or CPUs of this list")]
    return plan, near, []


def _slow_governors(cpus: Iterable[int]) -> dict[int, str]:
    """CPUs whose governor may keep them at a low clock."""
    slow = {}
    for cpu in cpus:
        folder = topology.SYSFS / f"devices/system/cpu/cpu{cpu}/cpufreq"
        governor, driver = _read(folder / "scaling_governor").strip(), _read(folder / "scaling_driver").strip()
        if governor == "powersave" and driver not in DYNAMIC_DRIVERS:
            slow[cpu] = governor
    return slow


# -- endpoints, files, limits ---------------------------------------------------------------------------------------


def _endpoints(settings: Settings) -> Iterator[EndpointFacts]:
    for endpoint in settings.endpoints.clients:
        if endpoint.startswith("ipc://"):
            yield _ipc(endpoint)
        else:
            yield _tcp("endpoints.clients", endpoint, endpoint.removeprefix("tcp://"))
    if settings.endpoints.metrics:
        yield _tcp("endpoints.metrics", settings.endpoints.metrics, settings.endpoints.metrics)


def _ipc(endpoint: str) -> EndpointFacts:
    path = Path(endpoint.removeprefix("ipc://"))
    there = next(folder for folder in (path.absolute().parent, *path.absolute().parents) if folder.exists())
    return EndpointFacts(
        setting="endpoints.clients",
        endpoint=endpoint,
        folder=str(path.parent),
        folder_usable=os.access(there, os.W_OK | os.X_OK),
        by_systemd=path.is_relative_to(RUNTIME_FOLDER) and UNIT.exists(),
        holder=_lock_holder(Path(f"{path}.lock")),
    )


def _lock_holder(path: Path) -> Holder | None:
    """The process that holds the lock beside a socket; see `daemon.sockets`."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(_locker(path))
    except OSError:  # not there, or not ours to read: what the folder's rights say then
        return None
    return None


def _locker(path: Path) -> int | None:
    """The pid in /proc/locks, where this process may know it."""
    inode = str(path.stat().st_ino)
    for line in _read(Path("/proc/locks")).splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].rpartition(":")[2] == inode and fields[4].isdigit():
            return int(fields[4]) or None
    return None


def _tcp(setting: str, endpoint: str, place: str) -> EndpointFacts:
    host, _, port = place.rpartition(":")
    host = host.strip("[]").replace("*", "0.0.0.0")
    number = _bind_errno(host, port)
    holder = None
    if number == errno.EADDRINUSE:
        holder = _listener(int(port))
        if setting == "endpoints.metrics" and holder.pid is None and _is_our_page(place):
            holder = Holder(ours=True)
    open_to_all = setting == "endpoints.metrics" and not is_loopback(place)
    return EndpointFacts(
        setting=setting, endpoint=endpoint, bind_errno=number, open_to_all=open_to_all, holder=holder
    )


def _bind_errno(host: str, port: str) -> int:
    if not port.isdigit():
        return 0  # an endpoint such as tcp://eth0:*, which ZeroMQ understands
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except socket.gaierror:
        return errno.EADDRNOTAVAIL
    except OSError as error:
        return error.errno or 0
    return 0


def _listener(port: int) -> Holder:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return _holder(connection.pid)
    return Holder()


def _is_our_page(place: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{place}/metrics", timeout=2) as page:
            return b"blendmaskd_snapshot_seq" in page.read()
    except OSError:
        return False


def _holder(pid: int | None) -> Holder:
    if pid is None:
        return Holder()
    try:
        return Holder(pid=pid, command=psutil.Process(pid).name(), ours=_is_ours(pid))
    except psutil.Error:
        return Holder(pid=pid)


def _is_ours(pid: int) -> bool:
    """Whether a process is a daemon of ours or a worker of one."""
    try:
        process = psutil.Process(pid)
        return any(_is_daemon(each.cmdline()) for each in (process, *process.parents()))
    except psutil.Error:
        return False


def _is_daemon(argv: Sequence[str]) -> bool:
    modules = [argument for option, argument in itertools.pairwise(argv) if option == "-m"]
    return "daemon" in modules or any(Path(argument).name == "blendmaskd" for argument in argv[:2])


def _keys(settings: Settings) -> Iterator[TcpFacts]:
    if not any(endpoint.startswith("tcp://") for endpoint in settings.endpoints.clients):
        return
    server_key, folder = settings.curve.server_key, settings.curve.client_keys
    if not server_key or not folder:
        yield TcpFacts(insecure=True)
        return
    complaint = ""
    try:
        read_pair(server_key)
    except KeyFileError as error:
        complaint = str(error)
    allowed = AllowedKeys(folder)
    change = allowed.refresh()
    yield TcpFacts(server_key=complaint, client_keys=folder, folder_there=os.path.isdir(folder),
                   names=tuple(allowed.names.values()), complaints=tuple(change.complaints))  # fmt: skip


def _spool(settings: Settings) -> Iterator[SpoolFacts]:
    if settings.spool is None:
        return
    folder = Path(settings.spool).absolute().parent
    if not folder.is_dir():
        yield SpoolFacts(path=settings.spool, folder_there=False)
        return
    there = os.path.exists(settings.spool)
    yield SpoolFacts(
        path=settings.spool,
        writable=os.access(folder, os.W_OK | os.X_OK) and (not there or os.access(settings.spool, os.R_OK | os.W_OK)),
        network=_network_type(folder),
        free_bytes=psutil.disk_usage(str(folder)).free + (os.path.getsize(settings.spool) if there else 0),
        may_take_bytes=settings.spool_bytes,
    )


def _network_type(folder: Path) -> str:
    """The type of the file system of a folder, if others on the network have it too."""
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    kind = next((mounts[place] for place in (folder, *folder.parents) if place in mounts), "")
    return kind if kind.startswith(NETWORK_TYPES) else ""


def _folders(settings: Settings) -> Iterator[FolderFacts]:
    for root in settings.paths.roots:
        yield FolderFacts(setting="paths.roots", path=root, there=os.path.isdir(root),
                          usable=os.access(root, os.R_OK | os.X_OK))  # fmt: skip


def _limits(settings: Settings) -> LimitFacts:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LimitFacts(
        files=soft if soft != resource.RLIM_INFINITY else 1 << 20,
        hard_files=hard if hard != resource.RLIM_INFINITY else 1 << 20,
        locked_bytes=None if locked == resource.RLIM_INFINITY else locked,
        available_bytes=min(psutil.virtual_memory().available, _control_group_bytes()),
        promised_bytes=settings.queue.max_bytes + settings.shared_memory_bytes,
    )


def _control_group_bytes() -> int:
    """What the control group of this process may have in all."""
    group = _read(Path("/proc/self/cgroup")).strip().rpartition("::")[2].lstrip("/")
    text = _read(Path("/sys/fs/cgroup") / group / "memory.max").strip()
    return int(text) if text.isdigit() else 1 << 62
