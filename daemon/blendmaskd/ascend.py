"""What a host says of its Ascend software and cards: health, who uses them, versions and which of them belong together;
and what is known of its chips.

Parsers of what npu-smi prints and of the files that CANN, driver and firmware leave, and Huawei's table of versions.
Pure: texts in, values out; what is not understood is left out. Device numbers and CPU sets are `blendmaskd.topology`'s.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blendmaskd.topology import npu_chips, npu_rows

INSTALLED = Path("/usr/local/Ascend")  # driver and firmware, and CANN unless it is elsewhere
Chip = tuple[int, int]  # NPU id, chip id: npu-smi's names, see `topology.parse_npu_map`

# torch_npu's release: the CANN it was made for. From COMPATIBILITY.md of github.com/Ascend/pytorch, August 2026. A
# release serves the torch of its first three numbers. 2.13.0 was not in the table yet.
CANN_OF_TORCH_NPU = {
    "2.12.0": "9.1.0", "2.11.0": "9.1.0", "2.10.0.post4": "9.1.0", "2.9.0.post6": "9.1.0", "2.7.1.post8": "9.1.0",
    "2.9.0.post2": "9.0.0", "2.8.0.post4": "9.0.0", "2.7.1.post4": "9.0.0",
    "2.9.0": "8.5.0", "2.8.0.post2": "8.5.0", "2.7.1.post2": "8.5.0", "2.6.0.post5": "8.5.0",
    "2.8.0": "8.3.RC1", "2.7.1": "8.3.RC1", "2.6.0.post3": "8.3.RC1", "2.1.0.post17": "8.3.RC1",
    "2.6.0": "8.2.RC1", "2.5.1.post1": "8.2.RC1", "2.1.0.post13": "8.2.RC1",
    "2.5.1": "8.1.RC1", "2.4.0.post4": "8.1.RC1", "2.3.1.post6": "8.1.RC1", "2.1.0.post12": "8.1.RC1",
    "2.4.0.post2": "8.0.0", "2.3.1.post4": "8.0.0", "2.1.0.post10": "8.0.0",
    "2.4.0": "8.0.RC3", "2.3.1.post2": "8.0.RC3", "2.1.0.post8": "8.0.RC3",
    "2.3.1": "8.0.RC2", "2.2.0.post2": "8.0.RC2", "2.1.0.post6": "8.0.RC2",
    "2.2.0": "8.0.RC1", "2.1.0.post4": "8.0.RC1", "2.1.0": "7.0.0",
}  # fmt: skip
EXCHANGEABLE = "8.5.0", "9.1.0"  # by its release notes 7.3.0 to 26.1.0, torch_npu of each of these CANN works with all


@dataclass(frozen=True, slots=True)
class Card:
    """A chip as ``npu-smi info`` lists it."""

    name: str  # 910B3
    health: str  # OK, Warning, Alarm, Critical
    temperature_c: int | None = None


class MemoryErrors(NamedTuple):
    """Of a chip's memory since its last reset, by ECC."""

    single_bit: int  # corrected
    double_bit: int  # not corrected


# Names by torch.npu.get_device_name, which are CANN's. torch_npu draws the same line: those before Ascend910B1.
WITHOUT_FLOAT32 = re.compile(r"Ascend(910(PremiumA|ProA|ProB|A|B)|310P\w*)(?!\w)")


def multiplies_float32(chip: str) -> bool:
    """Whether a chip's cube unit, which does convolutions and matrix products, takes float32; else float16 alone."""
    return not WITHOUT_FLOAT32.match(chip)


def parse_npu_cards(text: str) -> dict[Chip, Card]:
    """``npu-smi info``: each chip's name, health and temperature."""
    return {chip: Card(cells[0].split()[1], cells[1], _temperature(cells)) for chip, cells, _ in npu_chips(text)}


def _temperature(cells: list[str]) -> int | None:
    """Of a chip's first line: power, temperature and huge pages are in one cell."""
    figures = cells[2].split() if len(cells) > 2 else []
    return int(figures[1]) if len(figures) > 1 and figures[1].isdecimal() else None


def chips_by_logic_id(chips: Mapping[int, Chip], cards: Iterable[Chip]) -> dict[str, Chip]:
    """Chips by the ids that torch counts, from ``npu-smi info -m``; in their order where npu-smi has no such map."""
    return {str(logic_id): chip for logic_id, chip in (chips or dict(enumerate(sorted(cards)))).items()}


def parse_npu_memory_errors(text: str, npu: int) -> dict[Chip, MemoryErrors]:
    """``npu-smi info -t ecc -i NPU``: of each chip, whose number ends its lines where there are several."""
    blocks = re.split(r"^\s*Chip ID\s*:\s*(\d+)\s*$", text, flags=re.MULTILINE)
    return {
        (npu, int(chip)): MemoryErrors(_bit_errors(block, "Single"), _bit_errors(block, "Double"))
        for block, chip in zip(blocks[::2], blocks[1::2] or ["0"])
        if "Bit Error Count" in block
    }


def _bit_errors(text: str, kind: str) -> int:
    counts = re.findall(rf"^\s*(?:HBM|DDR) {kind} Bit Error Count\s*:\s*(\d+)\s*$", text, re.MULTILINE)
    return sum(map(int, counts))


# What the runtime's error codes mean for the worker that met one, by acl's rt_error_codes.h. All others of 507xxx end
# the process's context, and a new process gets a new one: those are tried again.
OUTLASTS_THE_PROCESS = {507010, 507012, 507033, 507899, 507901}  # heartbeat, reports, set-up, driver, connection
NEEDS_A_RESET = {507054, 507055}  # memory: errors of several bits, and suspected ones
FAULT = re.compile(r"error code\D{0,5}(507\d{3})\b")
RESET = "npu-smi set -t reset -i NPU_ID -c CHIP_ID, as root, with nothing else on the card; docs/troubleshooting.md"


def fault_code(text: str) -> int | None:
    """The code of a fault of the device, 507xxx, in an error of torch_npu; None where it is about something else."""
    found = FAULT.search(text)
    return int(found[1]) if found else None


def parse_npu_error(text: str) -> str:
    """``npu-smi info -t health``: the error's codes and words; empty where there are none."""
    found = re.findall(r"^\s*Error (?:Code|Information)\s*: *(.+?)\s*$", text, re.MULTILINE)
    return ", ".join(part for part in found if part != "NA")


def parse_npu_processes(text: str) -> dict[Chip, list[tuple[int, str]]]:
    """``npu-smi info``: the processes on each chip, as pid and name; chips that nobody uses are left out."""
    found: dict[Chip, list[tuple[int, str]]] = {}
    for cells in npu_rows(text.partition("Process id")[2]):
        chip = cells[0].split()
        if len(chip) == 2 and chip[1].isdecimal() and len(cells) > 2 and cells[1].isdecimal():
            found.setdefault((int(chip[0]), int(chip[1])), []).append((int(cells[1]), cells[2]))
    return found


def parse_version(text: str) -> str:
    """The version that a ``version.info`` or ``ascend_*_install.info`` file tells; empty if it tells none."""
    found = re.search(r"^version\s*=\s*(\S+)$", text, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else ""


def parse_firmware_ranges(text: str) -> list[tuple[str, str]]:
    """The firmware that a driver works with, by its ``version.info``: ``compatible_version_fw=[7.0.0,7.5.99]``."""
    line = re.search(r"^compatible_version_fw\s*=(.*)$", text, re.MULTILINE)
    return re.findall(r"\[([^,\]]+),([^\]]+)\]", line[1]) if line else []


def cann_for(torch_npu: str) -> tuple[str, str] | None:
    """The oldest and the newest CANN that a release of torch_npu is known to work with; None: not in the table."""
    made_for = CANN_OF_TORCH_NPU.get(torch_npu.partition("+")[0])
    if made_for is None:
        return None
    return EXCHANGEABLE if within(made_for, [EXCHANGEABLE]) else (made_for, made_for)


def kernels_of(chip: str) -> str:
    """The folder of CANN's compiled operators for a chip, ascend910b of Ascend910B3; empty for an unknown chip."""
    folders = {r"910B\d": "ascend910b", r"910_93": "ascend910_93", r"910(PremiumA|Pro[AB]|[AB])(?!\w)": "ascend910",
               r"310P": "ascend310p", r"310B": "ascend310b"}  # fmt: skip
    named = chip.removeprefix("Ascend")
    return next((folder for pattern, folder in folders.items() if re.match(pattern, named)), "")


def order(version: str) -> tuple[int, ...]:
    """Versions of CANN, driver and firmware in their order: 8.2.RC1 < 8.2.0 < 8.5.0. Empty for what is none."""
    parts = re.match(r"(\d+)((?:\.\d+)*)(?:\.RC(\d+))?", version, re.IGNORECASE)
    if not parts:
        return ()
    numbers = [int(number) for number in re.findall(r"\d+", parts[1] + parts[2])]
    return (*numbers, -1, int(parts[3])) if parts[3] else tuple(numbers)


def within(version: str, ranges: list[tuple[str, str]]) -> bool:
    """Whether a version lies in one of these ranges, bounds included."""
    return any(order(low) <= order(version) <= order(high) for low, high in ranges)
