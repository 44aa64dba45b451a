"""Readings: temperature, power and health of NPUs, as npu-smi tells them on the host that they are in.

The program that shows them asks, not the daemon: npu-smi can take seconds. `Readings` asks in a thread of its own, at a
slow pace; whoever shows them takes what is there. Where there is no npu-smi there is nothing.
"""
from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blendmaskd import discovery
from blendmaskd.ascend import Chip
from blendmaskd.topology import npu_chips, parse_npu_map

EACH_S = 5.0


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one chip; None: it does not tell."""

    temperature_c: float | None
    power_w: float | None  # on a card of two chips the first one's, for both
    health: str  # OK, Warning, Alarm, Critical


def parse_npu_readings(text: str) -> dict[Chip, Reading]:
    """``npu-smi info``: the readings of each chip."""
    readings = {}
    for chip, cells, _ in npu_chips(text):
        power, temperature = [*(cells[2] if len(cells) > 2 else "").split(), "", ""][:2]
        readings[chip] = Reading(_number(temperature), _number(power), cells[1])
    return readings


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


class Readings:
    """Asks npu-smi every `EACH_S`. `latest` is by chip logic id, which is the host's number of a device."""

    def __init__(self, ask: Callable[..., str] = discovery.ask_tool) -> None:
        self._ask = ask
        self.latest: Mapping[int, Reading] = {}
        self._numbers: dict[str, int] = {}  # by device, of its last worker
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="readings", daemon=True)

    def __enter__(self) -> Readings:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Does not wait for an npu-smi under way: its end ends the thread."""
        self._ended.set()

    def of(self, device: Mapping[str, Any]) -> Reading | None:
        """The reading of a device of a snapshot: its worker's environment says, or said, which of the host's it is."""
        number = device["wanted"].get("env", {}).get("ASCEND_RT_VISIBLE_DEVICES", "")
        if device["device"].startswith("npu:") and number.isdigit():
            self._numbers[device["device"]] = int(number)
        return self.latest.get(self._numbers.get(device["device"], -1))

    def _follow(self) -> None:
        numbers = parse_npu_map(self._ask(["npu-smi", "info", "-m"], os.environ))
        while not self._ended.is_set():
            readings = parse_npu_readings(self._ask(["npu-smi", "info"], os.environ))
            numbered = numbers or dict(enumerate(sorted(readings)))
            self.latest = {number: readings[chip] for number, chip in numbered.items() if chip in readings}
            self._ended.wait(EACH_S)
