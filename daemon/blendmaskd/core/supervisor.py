"""Supervisor: keeps one worker process in each slot. Pure: events and `now` in, actions out.

A slot is a configured device; a generation is one life of its worker. The state of a slot:

========  ==========================================  =======================================================
state     meaning                                     leaves by
========  ==========================================  =======================================================
STARTING  spawned, loading and warming up             `ready`; `exited`; its start deadline: killed
READY     serving                                     `exited`; `evict`: killed; `replace`, `drain`: STOPPING
STOPPING  told to stop, or being killed               `exited`; its deadline: the next, harder signal
RESTING   has no worker, as its card is ill           `wake`: STARTING
BACKOFF   dead; waits until its delay is over         its delay: STARTING
FAILED    died too often, or cannot boot at all       its longer delay, `renew`: STARTING
ENDED     stopped for good: drained, or taken out     nothing
========  ==========================================  =======================================================

A worker that has to go is first asked (`Stop`, through the broker's socket, so that it finishes what it holds), then
aborted (SIGABRT, which dumps its stacks), then killed. Deaths in a row double the delay up to a longest one; after
`give_up_after` of them the slot is FAILED. A worker that served for `stable_s` starts the count anew. Deaths that an
image is to blame for do not count: as far as that shows at once, they are `blameless`; else they are taken off later.

Nothing is lost for good: a FAILED slot is tried once every `retry_failed_s`, and given up until such a try serves. What
only the host lacks (EXIT_HOST_LACKS: weights on a mount that is away, CPUs, processes) fails no slot once a worker has
been READY by these settings, and is waited for in BACKOFF.

Which worker is replaced when other settings come is decided in `blendmaskd.core.reload`.
"""
from __future__ import annotations

import signal
from collections.abc import Iterable
from enum import Enum

import msgspec

from blendmaskd.assignment import EXIT_CANNOT_BOOT, EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS
from blendmaskd.settings import Restarts

MOST_DOUBLINGS = 60  # far beyond any longest delay, and no overflow


class State(Enum):
    """See the module's table."""

    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"
    RESTING = "resting"
    ENDED = "ended"


class Spawn(msgspec.Struct, frozen=True):
    """Start a worker of this generation in this slot."""

    slot: str
    generation: int


class Stop(msgspec.Struct, frozen=True):
    """Ask this worker to finish what it holds and exit."""

    slot: str
    generation: int


class Kill(msgspec.Struct, frozen=True):
    """Send this signal to the worker's process."""

    slot: str
    generation: int
    signal: signal.Signals


Action = Spawn | Stop | Kill


class InvalidTransition(RuntimeError):
    """An event that this state cannot have: a fault of ours."""


class Slot(msgspec.Struct):
    """One configured device. `name` is the device's."""

    name: str
    state: State = State.BACKOFF
    generation: int = 0
    deadline: float | None = None  # of STARTING, STOPPING, BACKOFF and FAILED
    next_signal: signal.Signals | None = None  # what STOPPING does at its deadline
    ready_since: float | None = None
    failures: int = 0  # in a row
    lacks: int = 0  # starts in a row for which the host lacked something
    given_up: bool = False  # FAILED, or a try to get out of that
    restarts: int = 0  # spawns after the first, replacements by reload not counted
    ending: bool = False  # its worker is the last
    resting: bool = False  # until it is woken there is to be no worker
    wanted_down: bool = False  # it stops because we asked
    reason: str = ""  # why it is where it is, for people

    @property
    def running(self) -> bool:
        return self.state in (State.STARTING, State.READY, State.STOPPING)


class Supervisor:
    """See the module. `check()` states the invariants; tests call it after every step."""

    def __init__(self, devices: Iterable[str], restarts: Restarts, drain_s: float) -> None:
        self.slots = {device: Slot(device) for device in devices}
        self.restarts = restarts
        self.drain_s = drain_s
        self.draining = False
        self.proven = False  # a worker has been READY by the present settings

    # -- what the shell may ask -------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether no slot is on its first way up: what systemd waits for, together with one READY slot."""
        return not any(
            slot.state is State.STARTING or (slot.state is State.BACKOFF and slot.failures + slot.lacks <= 1)
            for slot in self.slots.values()
            if not slot.given_up
        )

    @property
    def listed(self) -> list[Slot]:
        """All but those that a reload has taken out."""
        return [slot for slot in self.slots.values() if self.draining or slot.state is not State.ENDED]

    @property
    def ready_slots(self) -> int:
        return sum(slot.state is State.READY for slot in self.slots.values())

    @property
    def hopeless(self) -> bool:
        """Whether every slot is given up, or ended."""
        return all(slot.given_up or slot.state is State.ENDED for slot in self.slots.values())

    @property
    def ended(self) -> bool:
        return all(slot.state is State.ENDED for slot in self.slots.values())

    @property
    def forlorn(self) -> bool:
        """Whether nothing serves, or soon will, but for what may come of slots that rest."""
        waiting = (State.RESTING, State.FAILED, State.ENDED)
        return all(slot.state in waiting or slot.given_up for slot in self.slots.values())

    # -- events -----------------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[Action]:
        return [self._spawn(slot, now) for slot in self.slots.values()]

    def ready(self, name: str, generation: int, now: float) -> bool:
        """A worker is loaded and warm. False, and ignored, from one that is being killed."""
        slot = self.slots[name]
        if slot.generation != generation or slot.state is not State.STARTING:
            return False
        slot.state, slot.deadline, slot.ready_since, slot.reason = State.READY, None, now, ""
        slot.lacks, slot.given_up, self.proven = 0, False, True
        return True

    def evict(self, name: str, generation: int, reason: str, now: float) -> list[Action]:
        """A worker hangs: abort it, also while it is asked to stop."""
        slot = self.slots[name]
        asked = slot.state is State.STOPPING and slot.next_signal is signal.SIGABRT
        if slot.generation != generation or not (asked or slot.state in (State.STARTING, State.READY)):
            return []
        slot.reason = reason
        return self._signal(slot, signal.SIGABRT, now)

    def exited(self, name: str, generation: int, how: str, code: int, blameless: bool, now: float) -> list[Action]:
        """A worker's process is gone. `blameless`: it died of an image that had killed another worker before."""
        slot = self.slots[name]
        if slot.generation != generation or not slot.running:
            raise InvalidTransition(f"{name}.{generation} exited in {slot}")
        if slot.ready_since is not None and now - slot.ready_since >= self.restarts.stable_s:
            slot.failures = 0
        asked, slot.wanted_down = slot.wanted_down, False
        slot.next_signal = slot.deadline = slot.ready_since = None
        if slot.ending:
            slot.state = State.ENDED
        elif slot.resting:
            slot.state = State.RESTING
        elif asked:
            return [self._spawn(slot, now)]
        elif code == EXIT_HOST_LACKS and self.proven and not slot.given_up:
            slot.lacks += 1
            self._back_off(slot, how, now)
        elif code in (EXIT_CANNOT_BOOT, EXIT_HOST_LACKS):
            self._give_up(slot, f"cannot boot: {how}", now)
        elif code == EXIT_DEVICE_BROKEN:
            self._give_up(slot, how, now)
        else:
            slot.failures += not blameless
            if slot.given_up or slot.failures >= self.restarts.give_up_after:
                self._give_up(slot, f"died {slot.failures} times in a row; the last time {how}", now)
            else:
                self._back_off(slot, how, now)
        return []

    def acquit(self, name: str) -> None:
        """An image was to blame for a death that was counted: it was found out on a later one."""
        if (slot := self.slots.get(name)) and slot.state is not State.FAILED:
            slot.failures = max(slot.failures - 1, 0)

    def renew(self, devices: Iterable[str], restarts: Restarts, drain_s: float, now: float) -> list[Action]:
        """Go by these from now on, also in adding and taking out slots. Workers that serve are left; what is on its way
        begins anew, what failed tries again. What rests rests on.
        """
        self.restarts, self.drain_s, self.proven = restarts, drain_s, False
        wanted = list(devices)
        actions: list[Action] = []
        for name in wanted:
            slot = self.slots.setdefault(name, Slot(name))
            if slot.state is State.ENDED:
                self.slots[name] = slot = Slot(name, generation=slot.generation)
            slot.failures, slot.lacks, slot.given_up = 0, 0, False
            if slot.state in (State.BACKOFF, State.FAILED):
                actions.append(self._spawn(slot, now))
            elif slot.state is State.STARTING:  # it loads what is no longer wanted; nobody would miss it
                slot.wanted_down = True
                actions += self._signal(slot, signal.SIGKILL, now)
            elif slot.state is State.STOPPING:
                slot.ending = False  # its next life is new anyway
        for slot in self.slots.values():
            if slot.name not in wanted:
                actions += self._end(slot, now)
        return actions

    def rest(self, name: str, why: str, now: float) -> list[Action]:
        """Its worker, if it has one, finishes what it holds, and none follows until `wake`."""
        slot = self.slots[name]
        slot.resting, slot.reason = True, why
        return self._empty(slot, State.RESTING, now)

    def wake(self, name: str, now: float) -> list[Action]:
        """A slot that rests is to serve again."""
        slot = self.slots[name]
        assert slot.state is State.RESTING, slot
        slot.resting, slot.failures, slot.lacks, slot.given_up = False, 0, 0, False
        return [self._spawn(slot, now)]

    def replace(self, name: str, now: float) -> list[Action]:
        """Ask a worker that serves to make room for the next."""
        slot = self.slots[name]
        slot.wanted_down = True
        return self._ask(slot, now)

    def drain(self, now: float) -> list[Action]:
        """Every worker finishes what it holds, and none is started any more."""
        self.draining = True
        return [action for slot in self.slots.values() for action in self._end(slot, now)]

    def hurry(self, now: float) -> None:
        """Whoever is asked to stop, or will be, has `stop_s` for it."""
        self.drain_s = min(self.drain_s, self.restarts.stop_s)
        for slot in self.slots.values():
            if slot.state is State.STOPPING and slot.deadline is not None:
                slot.deadline = min(slot.deadline, now + self.restarts.stop_s)

    def expire(self, now: float) -> list[Action]:
        """Do what is due."""
        actions: list[Action] = []
        for slot in self.slots.values():
            if slot.deadline is None or now < slot.deadline:
                continue
            if slot.state in (State.BACKOFF, State.FAILED):
                slot.restarts += 1
                actions.append(self._spawn(slot, now))
            elif slot.state is State.STARTING:
                slot.reason = f"not ready within {self.restarts.start_timeout_s:g} s"
                actions += self._signal(slot, signal.SIGABRT, now)
            else:
                assert slot.next_signal is not None
                actions += self._signal(slot, slot.next_signal, now)
        return actions

    def forgive(self, seconds: float) -> None:
        """The daemon itself did nothing for so long, and perhaps no worker did: all have that much longer."""
        for slot in self.slots.values():
            if slot.deadline is not None:
                slot.deadline += seconds

    def next_deadline(self) -> float | None:
        return min((slot.deadline for slot in self.slots.values() if slot.deadline is not None), default=None)

    def _spawn(self, slot: Slot, now: float) -> Spawn:
        slot.state, slot.generation = State.STARTING, slot.generation + 1
        slot.deadline = now + self.restarts.start_timeout_s
        return Spawn(slot.name, slot.generation)

    def _ask(self, slot: Slot, now: float) -> list[Action]:
        slot.state = State.STOPPING
        slot.deadline, slot.next_signal = now + self.drain_s, signal.SIGABRT
        return [Stop(slot.name, slot.generation)]

    def _signal(self, slot: Slot, number: signal.Signals, now: float) -> list[Action]:
        slot.state, slot.deadline, slot.next_signal = State.STOPPING, now + self.restarts.stop_s, signal.SIGKILL
        return [Kill(slot.name, slot.generation, number)]

    def _end(self, slot: Slot, now: float) -> list[Action]:
        slot.ending = True
        slot.wanted_down |= slot.state in (State.STARTING, State.READY)
        return self._empty(slot, State.ENDED, now)

    def _empty(self, slot: Slot, into: State, now: float) -> list[Action]:
        """Its worker is to go; where there is none, the slot is in the other state at once."""
        if slot.state is State.READY:
            return self._ask(slot, now)
        if slot.state is State.STARTING:
            return self._signal(slot, signal.SIGKILL, now)
        if slot.state in (State.BACKOFF, State.FAILED, State.RESTING):
            slot.state, slot.deadline = into, None
        return []

    def _back_off(self, slot: Slot, how: str, now: float) -> None:
        doubled = self.restarts.first_delay_s * 2.0 ** min(max(slot.failures + slot.lacks - 1, 0), MOST_DOUBLINGS)
        slot.state, slot.reason = State.BACKOFF, how
        slot.deadline = now + min(doubled, self.restarts.longest_delay_s)

    def _give_up(self, slot: Slot, why: str, now: float) -> None:
        """Until a slow try serves; one more death before it has served for long is enough then."""
        slot.state, slot.reason, slot.given_up = State.FAILED, why, True
        slot.deadline, slot.failures = now + self.restarts.retry_failed_s, self.restarts.give_up_after - 1

    def check(self) -> None:
        for slot in self.slots.values():
            timed = slot.state not in (State.READY, State.RESTING, State.ENDED)
            assert (slot.deadline is not None) == timed, slot
            assert (slot.ready_since is not None) <= (slot.state in (State.READY, State.STOPPING)), slot
            assert slot.next_signal is None or slot.state is State.STOPPING, slot
            assert slot.state is not State.STOPPING or slot.next_signal is not None, slot
            assert slot.failures < self.restarts.give_up_after, slot
            assert slot.state is not State.FAILED or slot.given_up, slot
            assert slot.resting or slot.state is not State.RESTING, slot
            assert not slot.resting or slot.state in (State.STOPPING, State.RESTING, State.ENDED), slot
            assert not slot.given_up or slot.state is not State.READY, slot
            assert not (self.draining and slot.state in (State.READY, State.STARTING, State.BACKOFF)), slot
