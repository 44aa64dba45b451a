"""Which CPUs are near which device, and which of them each slot gets.

Pure; `blendmaskd.discovery` asks the host, and the `parse_*` functions read what its tools say. What the host does not
tell is left out, never guessed: a device of unknown place gets an even share of the CPUs. Devices are numbered as this
process sees them: with ASCEND_RT_VISIBLE_DEVICES=4,5 (or CUDA_VISIBLE_DEVICES) npu:0 is the host's card 4.
"""
from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

VISIBLE_DEVICES = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
PCI_ADDRESS = re.compile(r"\b[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b", re.IGNORECASE)

Cpus = tuple[int, ...]  # sorted, without repeats


class HostError(ValueError):
    """This host cannot do what the settings demand; the text names what, and what to change."""


def plan_cpus(
    devices: Sequence[str],
    placed: Mapping[str, Cpus],
    available: Collection[int],
    near: Mapping[str, Iterable[int]],
    cores: Iterable[Cpus] = (),
) -> dict[str, Cpus]:
    """A non-empty CPU set for each device, out of `available`.

    `placed` are the settings' own, taken as they are. Each other device gets its share of the CPUs near it, or, when
    these are unknown or not available, of the CPUs that are near no device; devices that compete for CPUs split them
    evenly, whole cores (`cores`: CPUs that are hyperthreads of one core) where there are enough. CPUs that the
    settings gave away are avoided if that leaves any. Only with more devices than CPUs is a CPU shared.

    Raises `HostError` for a CPU that is not available.
    """
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

    CUDA may name it by UUID. Raises `HostError` when the variable makes fewer devices visible.
    """
    kind, _, index = device.partition(":")
    variable = VISIBLE_DEVICES[kind]
    if variable not in environment:
        return index
    visible = [name.strip() for name in environment[variable].split(",") if name.strip()]
    if int(index) >= len(visible):
        raise HostError(f"{device}: not visible, {variable}={environment[variable]}")
    return visible[int(index)]


def parse_cpus(text: str) -> Cpus:
    """``0-3,8`` as (0, 1, 2, 3, 8). Empty for anything that is no CPU list, such as ``NA`` or a CPU above 99999."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        bounds = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
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
    found = [(chip.get("Chip Logic ID", str(order)), chip.get("NPU ID", ""), chip.get("Chip ID", ""))
             for order, chip in enumerate(chips)]  # fmt: skip
    return {int(i): (int(npu), int(chip)) for i, npu, chip in found if all(map(str.isdecimal, (i, npu, chip)))}


def npu_rows(text: str) -> list[list[str]]:
    """``npu-smi info``: the cells of the lines that begin with a number."""
    lines = [[cell.strip() for cell in line.strip("| \t").split("|")] for line in text.splitlines()]
    return [cells for cells in lines if len(cells) > 1 and re.match(r"\d+(\s|$)", cells[0])]


def npu_chips(text: str) -> Iterator[tuple[tuple[int, int], list[str], str]]:
    """``npu-smi info``: each chip (NPU id, chip id) with the cells of its first line (NPU and name, health, power and
    temperature) and its PCI address, which is on its second line.
    """
    above: list[str] = []
    for cells in npu_rows(text.partition("Process id")[0]):
        first = cells[0].split()
        if above and PCI_ADDRESS.fullmatch(cells[1]):
            yield (int(above[0].split()[0]), int(first[0])), above, cells[1].lower()
            above = []
        elif len(first) > 1:
            above = cells


def parse_npu_addresses(text: str) -> dict[tuple[int, int], str]:
    """``npu-smi info``: (NPU id, chip id) to PCI address."""
    return {chip: address for chip, _, address in npu_chips(text)}


def parse_npu_affinity(text: str) -> dict[int, Cpus]:
    """``npu-smi info -t topo``: chip logic id to its CPU affinity; empty where there is no such column (A3 on ARM).

    Rows come in the order of logic ids; their labels are NPU ids.
    """
    lines = text.splitlines()
    header = next((re.split(r"\s{2,}", line.strip()) for line in lines if "CPU Affinity" in line), None)
    if header is None or "CPU Affinity" not in header:
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


def _checked(device: str, cpus: Cpus, available: Collection[int]) -> Cpus:
    missing = set(cpus).difference(available)
    if missing:
        raise HostError(
            f"runtime.cpus.{device} = {format_cpus(cpus)!r}: CPUs {format_cpus(missing)} are not available to this"
            f" process, which may use {format_cpus(available)}"
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
