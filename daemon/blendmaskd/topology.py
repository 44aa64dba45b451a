"""Which CPUs are near which device, and which of them each slot gets.

`discover` asks the host (sysfs, npu-smi, nvidia-smi); the `parse_*` functions and `plan_cpus` are pure. What the host
does not tell is left out, never guessed: a device of unknown place gets an even share of the CPUs. Devices are
numbered as this process sees them: with ASCEND_RT_VISIBLE_DEVICES=4,5 (or CUDA_VISIBLE_DEVICES) npu:0 is the host's
card 4. Nothing here starts a worker or imports torch.
"""
from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
SYSFS = Path("/sys")
CGROUPS = Path("/sys/fs/cgroup")
TOOL_TIMEOUT_S = 10.0  # npu-smi takes seconds on a busy host
PCI_ADDRESS = re.compile(r"\b[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", re.IGNORECASE)

Cpus = tuple[int, ...]  # sorted, without repeats


class TopologyError(ValueError):
    """A device or CPU set that this process cannot use; the text names device and CPUs."""


def host_plan(devices: Sequence[str], settings_cpus: Literal["auto"] | Mapping[str, str]) -> dict[str, Cpus]:
    """The CPU set of each device on this host; see `plan_cpus`."""
    placed = () if settings_cpus == "auto" else settings_cpus
    available = available_cpus()
    near = discover([device for device in devices if device not in placed], os.environ)
    return plan_cpus(devices, settings_cpus, available, near, cores(available))


def available_cpus() -> Cpus:
    """The CPUs that this process may use: its affinity mask, which a cgroup or systemd may have narrowed."""
    import psutil  # of the extra serve: who only shows statistics needs none of it

    return tuple(sorted(psutil.Process().cpu_affinity() or range(psutil.cpu_count() or 1)))


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """How many CPUs' time this process's cgroup may use, which no CPU set shows; infinite without a limit.

    Of cgroup 2 the tightest ``cpu.max`` from its own group upwards; of cgroup 1 what a container sees as its own.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = cgroups / path.lstrip("/")
    limits = [f"{group}/cpu.max" for group in (folder, *folder.parents) if group.is_relative_to(cgroups)]
    found = [_read_text(limit).split() for limit in limits]
    found.append([_read_text(f"{cgroups}/cpu/cpu.cfs_{what}_us").strip() for what in ("quota", "period")])
    return min((int(one[0]) / int(one[1]) for one in found if len(one) == 2 and one[0].isdigit()), default=math.inf)


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def plan_cpus(
    devices: Sequence[str],
    settings_cpus: Literal["auto"] | Mapping[str, str],
    available: Collection[int],
    near: Mapping[str, Iterable[int]],
    cores: Iterable[Cpus] = (),
) -> dict[str, Cpus]:
    """A non-empty CPU set for each device, out of `available`.

    CPU lists in the settings are taken as they are. Each other device gets its share of the CPUs near it, or, when
    these are unknown or not available, of the CPUs that are near no device; devices that compete for CPUs split them
    evenly, whole cores (`cores`: CPUs that are hyperthreads of one core) where there are enough. CPUs that the
    settings gave away are avoided if that leaves any. Only with more devices than CPUs is a CPU shared.

    Raises `TopologyError` for a CPU list that holds no CPU or one that is not available.
    """
    placed = {} if settings_cpus == "auto" else settings_cpus
    plan = {device: _checked(device, placed[device], available) for device in devices if device in placed}
    given = {cpu for cpus in plan.values() for cpu in cpus}
    free = frozenset(available) - given or frozenset(available)
    open_devices = [device for device in devices if device not in placed]
    known = {device: pool for device in open_devices if (pool := free & frozenset(near.get(device, ())))}
    rest = free.difference(*known.values()) or free
    for group, pool in _competing({device: known.get(device, rest) for device in open_devices}):
        plan.update(zip(group, _split(pool, len(group), cores)))
    return {device: plan[device] for device in devices}


def visible_id(device: str, environment: Mapping[str, str]) -> str:
    """What the host calls a device: ``npu:1`` is ``5`` where ASCEND_RT_VISIBLE_DEVICES=4,5 and ``1`` where it is unset.

    CUDA may name it by UUID. Raises `TopologyError` when the variable makes fewer devices visible.
    """
    kind, _, index = device.partition(":")
    variable = VISIBLE_DEVICES[kind]
    if variable not in environment:
        return index
    visible = [name.strip() for name in environment[variable].split(",") if name.strip()]
    if int(index) >= len(visible):
        raise TopologyError(f"{device}: not visible, {variable}={environment[variable]}")
    return visible[int(index)]


def discover(devices: Collection[str], environment: Mapping[str, str], sysfs: Path = SYSFS) -> dict[str, Cpus]:
    """The CPUs near each device, for those of which the host tells them: a CPU device is near to none."""
    near: dict[str, Cpus] = {}
    for kind, find in (("npu", _near_npu), ("cuda", _near_cuda)):
        ids = {device: visible_id(device, environment) for device in devices if device.startswith(kind)}
        found = find(environment, sysfs) if ids else {}
        near.update({device: found[name] for device, name in ids.items() if name in found})
    return near


def cores(cpus: Iterable[int], sysfs: Path = SYSFS) -> list[Cpus]:
    """The hyperthreads of each core among `cpus`, where sysfs tells."""
    texts = {_read(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    return sorted(parse_cpus(text) for text in texts if text)


def pci_cpus(address: str, sysfs: Path = SYSFS) -> Cpus:
    """The CPUs near a PCI device such as ``0000:c1:00.0``; empty where its NUMA node is unknown."""
    folder = sysfs / "bus/pci/devices" / address
    node = _read(folder / "numa_node")
    if node.startswith("-"):  # firmware tells no node; local_cpulist then is simply every CPU
        return ()
    return parse_cpus(_read(folder / "local_cpulist") or _read(sysfs / f"devices/system/node/node{node}/cpulist"))


def parse_cpus(text: str) -> Cpus:
    """``0-3,8`` as (0, 1, 2, 3, 8). Empty for anything that is no CPU list, such as ``NA``."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        bounds = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not bounds:
            return ()
        cpus.update(range(int(bounds[1]), int(bounds[2] or bounds[1]) + 1))
    return tuple(sorted(cpus))


def format_cpus(cpus: Iterable[int]) -> str:
    """The inverse of `parse_cpus`: (0, 1, 2, 3, 8) as ``0-3,8``."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


def parse_npu_map(text: str) -> dict[int, tuple[int, int]]:
    """``npu-smi info -m``: chip logic id (the index that torch counts by) to (NPU id, chip id).

    A board's controller (``Mcu``) has no logic id. Chips that print no such column are numbered in order.
    """
    rows = [re.split(r"\s{2,}|\t", line.strip()) for line in text.splitlines() if line.strip()]
    if not rows or "NPU ID" not in rows[0]:
        return {}
    chips = [dict(zip(rows[0], row)) for row in rows[1:] if row[0].isdigit() and row[-1].lower() != "mcu"]
    ids = [chip.get("Chip Logic ID", str(order)) for order, chip in enumerate(chips)]
    return {int(i): (int(chip["NPU ID"]), int(chip["Chip ID"])) for i, chip in zip(ids, chips) if i.isdigit()}


def parse_npu_addresses(text: str) -> dict[tuple[int, int], str]:
    """``npu-smi info``: (NPU id, chip id) to PCI address. A chip takes two lines; its NPU id is on the first."""
    addresses: dict[tuple[int, int], str] = {}
    npu = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| \t").split("|")]
        first = cells[0].split()[:1]
        if len(cells) < 2 or not first or not first[0].isdigit():
            continue
        if npu is not None and PCI_ADDRESS.fullmatch(cells[1]):
            addresses[npu, int(first[0])] = cells[1].lower()
        else:
            npu = int(first[0])
    return addresses


def parse_npu_affinity(text: str) -> dict[int, Cpus]:
    """``npu-smi info -t topo``: chip logic id to its CPU affinity; empty where there is no such column (A3 on ARM).

    Rows come in the order of logic ids; their labels are NPU ids.
    """
    lines = text.splitlines()
    header = next((re.split(r"\s{2,}", line.strip()) for line in lines if "CPU Affinity" in line), None)
    if header is None:
        return {}
    column = header.index("CPU Affinity") + 1  # rows have a label before the cells
    rows = [line.split() for line in lines if re.match(r"\s*(NPU|Phy-ID)\d+\s+\S", line) and "CPU Affinity" not in line]
    found = {order: parse_cpus(row[column]) for order, row in enumerate(rows) if len(row) > column}
    return {order: cpus for order, cpus in found.items() if cpus}


def parse_cuda_addresses(text: str) -> dict[str, str]:
    """``nvidia-smi --query-gpu=index,uuid,pci.bus_id --format=csv,noheader``: index and UUID to PCI address."""
    addresses: dict[str, str] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and PCI_ADDRESS.fullmatch(cells[2]):
            domain, _, rest = cells[2].lower().partition(":")
            addresses[cells[0]] = addresses[cells[1]] = f"{domain[-4:]}:{rest}"  # it prints eight digits, sysfs four
    return addresses


def _checked(device: str, text: str, available: Collection[int]) -> Cpus:
    cpus = parse_cpus(text)
    if not cpus:
        raise TopologyError(f"runtime.cpus.{device} = {text!r}: holds no CPU")
    missing = set(cpus).difference(available)
    if missing:
        raise TopologyError(
            f"runtime.cpus.{device} = {text!r}: CPUs {format_cpus(missing)} are not available to this process,"
            f" which may use {format_cpus(available)}"
        )
    return cpus


def _competing(pools: Mapping[str, frozenset[int]]) -> list[tuple[list[str], frozenset[int]]]:
    """Devices whose pools overlap, with all the CPUs of these pools."""
    groups: list[tuple[list[str], frozenset[int]]] = []
    for device, pool in pools.items():
        touching = [group for group in groups if group[1] & pool]
        members = [member for group in touching for member in group[0]]
        groups = [group for group in groups if group not in touching]
        groups.append(([*members, device], pool.union(*(group[1] for group in touching))))
    return groups


def _split(pool: frozenset[int], shares: int, cores: Iterable[Cpus]) -> list[Cpus]:
    """`pool` in contiguous parts of nearly equal size, whole cores where there are enough of them."""
    parts = {tuple(cpu for cpu in core if cpu in pool) for core in cores} - {()}
    single = pool.difference(*parts)
    units = sorted(parts | {(cpu,) for cpu in single})
    if len(units) < shares:
        units = [(cpu,) for cpu in sorted(pool)]
    if len(units) < shares:
        return [units[share % len(units)] for share in range(shares)]
    bounds = [len(units) * share // shares for share in range(shares + 1)]
    return [tuple(sorted(cpu for unit in units[a:b] for cpu in unit)) for a, b in itertools.pairwise(bounds)]


def _near_npu(environment: Mapping[str, str], sysfs: Path) -> dict[str, Cpus]:
    """By logic id. The PCI address leads to the kernel's own answer; npu-smi's table is asked where that fails."""
    addresses = parse_npu_addresses(ask_tool(["npu-smi", "info"], environment))
    chips = parse_npu_map(ask_tool(["npu-smi", "info", "-m"], environment))
    near = {i: pci_cpus(addresses[chip], sysfs) for i, chip in chips.items() if chip in addresses}
    near = {i: cpus for i, cpus in near.items() if cpus}
    if not chips or len(near) < len(chips):
        near = parse_npu_affinity(ask_tool(["npu-smi", "info", "-t", "topo"], environment)) | near
    return {str(i): cpus for i, cpus in near.items()}


def _near_cuda(environment: Mapping[str, str], sysfs: Path) -> dict[str, Cpus]:
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    addresses = parse_cuda_addresses(ask_tool(query, environment))
    found = {name: pci_cpus(address, sysfs) for name, address in addresses.items()}
    return {name: cpus for name, cpus in found.items() if cpus}


def ask_tool(argv: Sequence[str], environment: Mapping[str, str]) -> str:
    """What a vendor's tool prints; empty when it is absent, fails or hangs."""
    try:
        answer = subprocess.run(
            argv, env={**environment, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=TOOL_TIMEOUT_S, check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.decode(errors="replace")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
