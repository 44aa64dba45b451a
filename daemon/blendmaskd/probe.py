"""What a process found that opened a device as its worker would: `python -m blendmaskd_workers --probe` prints it, as
JSON in a line of its own, and `blendmaskd check` reads it among whatever libraries print, as CANN's may."""
from __future__ import annotations

import contextlib
import json
from enum import StrEnum

import msgspec


class Cause(StrEnum):
    """Why a device cannot be used, where that says what to do."""

    NO_PACKAGE = "no-package"  # of the extra serve
    NO_TORCH_NPU = "no-torch-npu"
    NO_CANN = "no-cann"  # in this environment: torch_npu is installed and cannot be loaded
    NOT_VISIBLE = "not-visible"
    PRECISION = "precision"  # that this device does not compute in


class Probe(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error` is empty where the device could be opened."""

    error: str = ""
    cause: Cause | None = None  # of the error
    name: str = ""  # Ascend910B3
    memory_bytes: int = 0  # all there is
    bf16: bool | None = None  # whether it computes in bfloat16; None: it does not tell
    chosen: str = ""  # what a network computes in, and why, where model.precision = auto chose it
    differences: tuple[str, ...] = ()  # from what its launch plan wanted


MARK = "blendmaskd-probe "


def in_a_line(probe: Probe) -> str:
    """What is printed of it, whatever was printed before without an end of line."""
    return f"\n{MARK}{msgspec.json.encode(probe).decode()}\n"


def among(printed: str) -> Probe:
    """What was found, by all that such a process printed."""
    marked = [line.rpartition(MARK) for line in reversed(printed.splitlines()) if MARK in line]
    for _, _, text in sorted(marked, key=lambda parts: bool(parts[0])):  # first what begins a line
        with contextlib.suppress(ValueError):
            told, _ = json.JSONDecoder().raw_decode(text)  # something else may have been printed right behind it
            return msgspec.convert(told, Probe)
    return Probe(error=f"the process that tried it did not say what it found, but {printed.strip()[-200:]!r}")
