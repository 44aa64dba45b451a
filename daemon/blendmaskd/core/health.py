"""Health: which slots rest because their card is ill. Pure: what npu-smi said in, actions of the supervisor out.

A card is ill while npu-smi says Alarm or Critical of it, twice in a row at first: its slot finishes what it holds, and
rests until npu-smi says something better. Warning is shown and no more. No answer changes nothing, whatever was known.
The last slot that serves goes on, ill or not, and where no other is left, one that rests comes back.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from blendmaskd.core.supervisor import Action, Slot, State, Supervisor

ILL = ("Alarm", "Critical")
READINGS = 2  # of an illness, before anything follows


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What npu-smi says of a slot's chip."""

    time: float  # Unix
    health: str  # OK, Warning, Alarm, Critical
    error: str = ""  # npu-smi's codes and words for what is not OK
    temperature_c: int | None = None  # None, here and below: it does not tell
    single_bit_errors: int | None = None  # of its memory, corrected by ECC
    double_bit_errors: int | None = None  # the same, not corrected
    host_id: str = ""  # the chip's logic id on this host

    @property
    def ill(self) -> bool:
        return self.health in ILL


class Health:
    """See the module. `readings` are the last ones, by slot."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.readings: dict[str, Reading] = {}
        self._supervisor = supervisor
        self._ill: dict[str, int] = {}  # readings in a row that said so

    def read(self, readings: Mapping[str, Reading]) -> None:
        """npu-smi has answered; slots of which it said nothing keep what they had."""
        for slot, reading in readings.items():
            self.readings[slot] = reading
            self._ill[slot] = self._ill.get(slot, 0) + 1 if reading.ill else 0

    def forget(self) -> None:
        """Nobody asks npu-smi any more: nothing is known, and no slot rests for it."""
        self.readings.clear()
        self._ill.clear()

    def describe(self, slot: str) -> dict[str, Any]:
        """The last reading as plain values; {} where there was none."""
        return {**msgspec.to_builtins(self.readings[slot])} if slot in self.readings else {}

    def follow(self, now: float) -> list[Action]:
        """What follows, for one slot at a time; to be called after whatever happens to slots or readings."""
        up = self._supervisor
        if up.draining:
            return []
        for slot in up.listed:
            if slot.state is State.RESTING and (up.forlorn or not self._ill.get(slot.name, 0)):
                return up.wake(slot.name, now)
        for slot in up.listed:
            if self._ill.get(slot.name, 0) >= READINGS and not slot.resting and self._others_serve(slot):
                return up.rest(slot.name, f"health {self.readings[slot.name].health}", now)
        return []

    def _others_serve(self, slot: Slot) -> bool:
        return any(other.state is State.READY for other in self._supervisor.listed if other is not slot)
