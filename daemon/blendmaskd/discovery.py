"""Asks the host (sysfs, cgroups, npu-smi, nvidia-smi) which CPUs there are, and which are near which device.

`blendmaskd.topology` is the pure half. What the host does not tell is left out. Nothing here imports torch.
"""
from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from blendmaskd import topology
from blendmaskd.topology import Cpus, parse_cpus, plan_cpus, visible_id

SYSFS = Path("/sys")
CGROUPS = Path("/sys/fs/cgroup")
TOOL_TIMEOUT_S = 10.0  # npu-smi takes seconds on a busy host


def places(
    devices: Sequence[str],
    placed: Mapping[str, Cpus],
    environment: Mapping[str, str],
    near: Mapping[str, Cpus] | None = None,
) -> tuple[dict[str, Cpus], Mapping[str, Cpus]]:
    """The CPU set of each device on this host, see `plan_cpus`, and what is near those that are not `placed`.

    `near`: what an earlier call found; npu-smi can take seconds, in which no job would move.
    """
    available = available_cpus()
    if near is None:
        near = discover([device for device in devices if device not in placed], environment)
    return plan_cpus(devices, placed, available, near, cores(available)), near


def available_cpus() -> Cpus:
    """The CPUs that this process may use: its affinity mask, which a cgroup or systemd may have narrowed."""
    return tuple(sorted(os.sched_getaffinity(os.getpid())))


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float:
    """How many CPUs' time this process's cgroup may use, which no CPU set shows; infinite without a limit.

    Of cgroup 2 the tightest ``cpu.max`` from its own group upwards; of cgroup 1 what a container sees as its own.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    folder = cgroups / path.lstrip("/")
    limits = [group / "cpu.max" for group in (folder, *folder.parents) if group.is_relative_to(cgroups)]
    found = [read(limit).split() for limit in limits]
    found.append([read(cgroups / f"cpu/cpu.cfs_{what}_us") for what in ("quota", "period")])
    return min((int(one[0]) / int(one[1]) for one in found if len(one) == 2 and one[0].isdigit()), default=math.inf)


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
    texts = {read(sysfs / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in cpus}
    return sorted(parse_cpus(text) for text in texts if text)


def pci_cpus(address: str, sysfs: Path = SYSFS) -> Cpus:
    """The CPUs near a PCI device such as ``0000:c1:00.0``; empty where its NUMA node is unknown."""
    folder = sysfs / "bus/pci/devices" / address
    node = read(folder / "numa_node")
    if node.startswith("-"):  # firmware tells no node; local_cpulist then is simply every CPU
        return ()
    return parse_cpus(read(folder / "local_cpulist") or read(sysfs / f"devices/system/node/node{node}/cpulist"))


def _near_npu(environment: Mapping[str, str], sysfs: Path) -> dict[str, Cpus]:
    """By logic id. The PCI address leads to the kernel's own answer; npu-smi's table is asked where that fails."""
    addresses = topology.parse_npu_addresses(ask_tool(["npu-smi", "info"], environment))
    chips = topology.parse_npu_map(ask_tool(["npu-smi", "info", "-m"], environment))
    near = {i: cpus for i, chip in chips.items() if chip in addresses and (cpus := pci_cpus(addresses[chip], sysfs))}
    if not chips or len(near) < len(chips):
        near = topology.parse_npu_affinity(ask_tool(["npu-smi", "info", "-t", "topo"], environment)) | near
    return {str(i): cpus for i, cpus in near.items()}


def _near_cuda(environment: Mapping[str, str], sysfs: Path) -> dict[str, Cpus]:
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    addresses = topology.parse_cuda_addresses(ask_tool(query, environment))
    return {name: cpus for name, address in addresses.items() if (cpus := pci_cpus(address, sysfs))}


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


def read(path: Path) -> str:
    """A small file's text, without space around it; empty where it is not there, or not ours to read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
