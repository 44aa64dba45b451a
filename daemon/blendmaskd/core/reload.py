"""Reload: by what workers are started, and how that becomes something else. Pure: events and `now` in, actions out.

First a process loads the new settings and weights: a complaint of it, its deadline and a drain end the reload. Then the
new settings are adopted: workers are started by them, and the next older worker is asked to stop whenever no slot is on
its way, until none is left or the daemon drains. They are on trial until a worker has become ready by them; if a slot
fails for good before that, they are undone, and workers that serve are left as they are. A slot that had failed before,
or is new, does not speak against them.

The first start is reported like a reload: once, when no slot is on its first way up, or when none can ever serve.
"""
from __future__ import annotations

import math

import msgspec

from blendmaskd.core import supervisor
from blendmaskd.core.launch_plan import Basis
from blendmaskd.core.supervisor import Slot, State, Supervisor
from blendmaskd.settings import Settings, SettingsError

NEEDS_RESTART = ("endpoints", "curve", "insecure_tcp", "spool")
MOVING = (State.STARTING, State.STOPPING, State.BACKOFF)  # BACKOFF: perhaps what is new does not work


class StopCheck(msgspec.Struct, frozen=True):
    """Kill the process that tries the candidate."""

    why: str  # for people; empty: nothing is wrong with it


class Adopt(msgspec.Struct, frozen=True):
    """Go by this from now on, but for workers that run."""

    basis: Basis
    undone: str = ""  # why the settings before it could not stay


class Ready(msgspec.Struct, frozen=True):
    """Report that the daemon serves by the current settings."""


class Over(msgspec.Struct, frozen=True):
    """Report that a reload has ended, and how."""

    text: str


class GiveUp(msgspec.Struct, frozen=True):
    """End: nothing has ever served, and nothing can."""


Action = StopCheck | Adopt | Ready | Over | GiveUp | supervisor.Action


class Reload:
    """See the module. `check()` states the invariants; tests call it after every step."""

    def __init__(self, supervisor: Supervisor, basis: Basis) -> None:
        self.basis = basis  # what new workers are started by
        self.candidate: Basis | None = None  # what a process tries
        self.trying = False  # no worker has become ready by `basis` yet
        self.draining = False
        self._supervisor = supervisor
        self._check_deadline = math.inf
        self._before = basis  # what came before those that are on trial
        self._replacing = False
        self._last: dict[str, int] = {}  # generations when `basis` was adopted: these and earlier ones are older
        self._witnesses: set[str] = set()  # slots that were up then, or on their way
        self._taken_out: set[str] = set()  # slots whose worker stops because an earlier reload took them out
        self._reported = False  # that all are ready by `basis`, or that none ever will be
        self._served = False

    @property
    def busy(self) -> bool:
        """Whether another reload cannot begin now."""
        return self.candidate is not None or self.draining

    @property
    def reloading(self) -> bool:
        """Whether a worker is to be replaced, or is on its way down for that."""
        return bool(self._older()) or any(slot.wanted_down for slot in self._supervisor.slots.values())

    # -- events -----------------------------------------------------------------------------------------------------

    def try_out(self, candidate: Basis, now: float) -> None:
        """A process tries it."""
        assert not self.busy
        self.candidate, self._check_deadline = candidate, now + candidate.settings.restarts.start_timeout_s

    def refuse(self, why: str) -> list[Action]:
        """There is nothing to try."""
        return [Over(f"reload refused, nothing changed: {why}")]

    def tried(self, complaint: str | None, now: float) -> list[Action]:
        """The process that tried the candidate has ended; without a complaint, the candidate is good."""
        assert self.candidate is not None
        candidate, self.candidate, self._check_deadline = self.candidate, None, math.inf
        if self.draining:
            return []
        if complaint is not None:
            return self.refuse(complaint)
        if not self.trying:
            self._before = self.basis
        slots = self._supervisor.slots.values()
        self._witnesses = {slot.name for slot in slots if not slot.given_up and slot.state is not State.ENDED}
        self._last = {slot.name: slot.generation for slot in slots}
        self.trying = self._replacing = True
        return self._adopt(Adopt(candidate), now)

    def drain(self) -> list[Action]:
        """Workers that serve now are left as they are, to finish what was accepted."""
        self.draining, self._replacing = True, False
        return [] if self.candidate is None else [StopCheck("")]

    def forgive(self, seconds: float) -> None:
        """The daemon itself did nothing for so long."""
        self._check_deadline += seconds

    def follow(self, now: float) -> list[Action]:
        """What follows from where the slots are now; to be called after whatever happens to them."""
        slots = self._supervisor.slots.values()
        actions: list[Action] = []
        if now >= self._check_deadline:
            self._check_deadline = math.inf
            actions.append(StopCheck("the check of settings and weights takes too long (restarts.start_timeout_s)"))
        if any(slot.state is State.READY and slot.generation > self._last.get(slot.name, 0) for slot in slots):
            self.trying = False
        failed = (slot for slot in slots if slot.state is State.FAILED and slot.name in self._witnesses)
        if self.trying and (slot := next(failed, None)):
            self.trying = self._replacing = False
            actions += self._adopt(Adopt(self._before, f"{slot.name}: {slot.reason}"), now)
        elif (older := self._older()) and not any(slot.state in MOVING for slot in slots):
            actions += self._supervisor.replace(older[0].name, now)
        return actions + self._report()

    def _older(self) -> list[Slot]:
        """Slots whose worker serves by other settings than `basis`, and is to be replaced."""
        slots = self._supervisor.slots.values() if self._replacing else ()
        return [slot for slot in slots if slot.state is State.READY and slot.generation <= self._last.get(slot.name, 0)]

    def _adopt(self, action: Adopt, now: float) -> list[Action]:
        self.basis, self._reported = action.basis, False
        stopping = [slot for slot in self._supervisor.slots.values() if slot.state is State.STOPPING]
        self._taken_out = {slot.name for slot in stopping if slot.ending or slot.name in self._taken_out}
        settings = action.basis.settings
        return [action, *self._supervisor.renew(settings.devices, settings.restarts, settings.drain_s, now)]

    def _report(self) -> list[Action]:
        up = self._supervisor
        if self._reported or self.draining:
            return []
        if up.settled and up.ready_slots and not self.reloading:
            self._reported = self._served = True
            return [Ready()]
        if not up.hopeless:
            return []
        self._reported = True
        text = "reload: no worker can be started by the new settings; fix the errors above, then reload"
        return [Over(text) if self._served else GiveUp()]

    def check(self) -> None:
        assert (self.candidate is not None) or self._check_deadline == math.inf, self._check_deadline
        assert self._replacing or self.draining or not self.trying, "tried, and never replaced"
        assert not (self._replacing and self.draining)
        slots = self._supervisor.slots.values()
        if not self._supervisor.draining:
            kept = [slot for slot in slots if not slot.ending and slot.state is not State.ENDED]
            assert {slot.name for slot in kept} == set(self.basis.settings.devices), slots
            replaced = [slot for slot in kept if slot.wanted_down and slot.name not in self._taken_out]
            assert sum(slot.ready_since is not None for slot in replaced) <= 1, slots


def refuse_rebinding(opened: Settings, new: Settings) -> None:
    """Raise `SettingsError` where sockets and files, opened by older settings, would have to be others."""
    for key in NEEDS_RESTART:
        if getattr(opened, key) != getattr(new, key):
            raise SettingsError(f"{key}: a change needs a restart")
    if opened.limits.max_connections != new.limits.max_connections:
        raise SettingsError("limits.max_connections: a change needs a restart")
    if new.limits.max_image_bytes > opened.limits.max_image_bytes:  # ZeroMQ would close the sender's connection
        raise SettingsError("limits.max_image_bytes: a higher one needs a restart")
