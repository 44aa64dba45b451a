"""What npu-smi says of the NPUs, asked by a thread of its own: it takes seconds on a busy host, or does not answer."""
from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping

from blendmaskd import ascend, discovery, topology
from blendmaskd.ascend import Chip
from blendmaskd.core.health import Reading
from blendmaskd.logs import about
from blendmaskd.topology import HostError

log = logging.getLogger("blendmaskd")

Readings = dict[str, Reading]  # by device


class NpuHealth:
    """Asks every so often, in a thread; the loop takes what was said."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._found: deque[Readings] = deque()
        self._wanted: tuple[list[str], float] = [], 0.0
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="npu-health", daemon=True)
        self._told: dict[str, str] = {}  # by device, what the log has of its health
        self._silent = False

    def watch(self, devices: Iterable[str], every_s: float) -> None:
        """From now on of these, as often as that; 0: never."""
        self._wanted = [device for device in devices if device.startswith("npu:")], every_s
        self._changed.set()
        if all(self._wanted) and not self._thread.is_alive():
            self._thread.start()

    def take(self) -> Readings:
        """What was said since the last call; nothing where npu-smi did not answer, or is not asked any more."""
        taken: Readings = {}
        if not self._wanted[1]:
            self._found.clear()
        while self._found:
            found = self._found.popleft()
            self._tell(found)
            taken |= found
        return taken

    def _ask_on(self) -> None:
        while True:
            devices, every_s = self._wanted
            if devices and every_s:
                self._found.append(ask(devices, self._environment))
            self._changed.wait(every_s or None)
            self._changed.clear()

    def _tell(self, found: Readings) -> None:
        if bool(found) is self._silent:
            self._silent = not found
            log.info("npu-smi %s", "does not answer: the health of NPUs is unknown" if self._silent else "answers")
        for device, reading in found.items():
            if self._told.get(device, "OK") != reading.health:
                level = logging.INFO if reading.health == "OK" else logging.WARNING
                error = f": {reading.error}" if reading.error else ""
                log.log(level, "health %s%s", reading.health, error, extra=about(slot=device))
            self._told[device] = reading.health


def ask(devices: Iterable[str], environment: Mapping[str, str]) -> Readings:
    """What npu-smi says of these; nothing of those that it does not list."""

    def tool(*arguments: str) -> str:
        return discovery.ask_tool(["npu-smi", "info", *arguments], environment)

    cards = ascend.parse_npu_cards(tool())
    chips = ascend.chips_by_logic_id(topology.parse_npu_map(tool("-m")) if cards else {}, cards)
    errors: dict[Chip, ascend.MemoryErrors] = {}
    readings = {}
    for device in devices:
        with contextlib.suppress(HostError):
            host_id = topology.visible_id(device, environment)
            if (chip := chips.get(host_id)) is None or (card := cards.get(chip)) is None:
                continue
            if chip not in errors:
                errors |= ascend.parse_npu_memory_errors(tool("-t", "ecc", "-i", str(chip[0])), chip[0])
            memory = errors.get(chip)
            told = "" if card.health == "OK" else tool("-t", "health", "-i", str(chip[0]), "-c", str(chip[1]))
            readings[device] = Reading(
                time=time.time(),
                health=card.health,
                error=ascend.parse_npu_error(told),
                temperature_c=card.temperature_c,
                single_bit_errors=memory and memory.single_bit,
                double_bit_errors=memory and memory.double_bit,
                host_id=host_id,
            )
    return readings
