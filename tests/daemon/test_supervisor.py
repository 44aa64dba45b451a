"""The supervisor: histories by example, and generated ones against its invariants."""
from __future__ import annotations

import signal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blendmaskd.assignment import EXIT_CANNOT_BOOT, EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS
from blendmaskd.core.health import Health, Reading
from blendmaskd.core.supervisor import Action, InvalidTransition, Kill, Spawn, State, Stop, Supervisor
from blendmaskd.settings import Restarts

RESTARTS = Restarts(
    first_delay_s=0.5, longest_delay_s=4.0, give_up_after=4, stable_s=60.0, start_timeout_s=100.0, stop_s=2.0
)
DRAIN_S = 30.0
A, B = "npu:0", "npu:1"
CODES = [0, 1, -9, EXIT_CANNOT_BOOT, EXIT_DEVICE_BROKEN, EXIT_HOST_LACKS]


@pytest.fixture
def up() -> Supervisor:
    """Both slots READY at time 0."""
    supervisor = Supervisor([A, B], RESTARTS, DRAIN_S)
    assert supervisor.start(0.0) == [Spawn(A, 1), Spawn(B, 1)]
    supervisor.ready(A, 1, 0.0)
    supervisor.ready(B, 1, 0.0)
    supervisor.check()
    return supervisor


def die(supervisor: Supervisor, slot: str, now: float, code: int = -9, blameless: bool = False) -> list[Action]:
    generation = supervisor.slots[slot].generation
    actions = supervisor.exited(slot, generation, "killed by SIGKILL", code, blameless, now)
    supervisor.check()
    return actions


def renew(supervisor: Supervisor, devices: list[str], now: float) -> list[Action]:
    actions = supervisor.renew(devices, RESTARTS, DRAIN_S, now)
    supervisor.check()
    return actions


def test_settled_when_every_slot_is_up_or_has_failed_more_than_once() -> None:
    supervisor = Supervisor([A, B], RESTARTS, DRAIN_S)
    supervisor.start(0.0)
    supervisor.ready(A, 1, 1.0)
    assert not supervisor.settled
    die(supervisor, B, 1.0)
    assert not supervisor.settled, "the first back-off is still hope"
    supervisor.expire(1.5)
    die(supervisor, B, 1.6)
    assert supervisor.settled
    assert supervisor.ready_slots == 1


def test_a_dead_worker_is_restarted_after_delays_that_double(up: Supervisor) -> None:
    now, delays = 0.0, []
    for generation in range(2, 5):
        assert die(up, A, now) == []
        due = up.next_deadline()
        assert due is not None
        delays.append(due - now)
        assert up.expire(due - 0.01) == []
        assert up.expire(due) == [Spawn(A, generation)]
        now = due
    assert delays == [0.5, 1.0, 2.0]
    assert up.slots[A].restarts == 3


def test_the_delay_has_an_end() -> None:
    patient = Supervisor([A], Restarts(first_delay_s=0.5, longest_delay_s=4.0, give_up_after=100), DRAIN_S)
    patient.start(0.0)
    for number in range(50):
        now = number * 1000.0
        die(patient, A, now)
        due = patient.next_deadline()
        assert due is not None
        assert due - now == min(0.5 * 2.0**number, 4.0)
        patient.expire(due)


def test_a_ready_of_an_earlier_life_is_not_this_ones(up: Supervisor) -> None:
    die(up, A, 0.0)
    assert up.expire(0.5) == [Spawn(A, 2)]
    up.ready(A, 1, 0.6)
    assert up.slots[A].state is State.STARTING
    up.ready(A, 2, 0.7)
    assert up.slots[A].state is State.READY


def test_a_slot_that_dies_too_often_fails_and_the_other_goes_on(up: Supervisor) -> None:
    now = 0.0
    for _ in range(RESTARTS.give_up_after):
        die(up, A, now)
        now += 10.0
        up.expire(now)
    assert up.slots[A].state is State.FAILED
    assert "died 4 times in a row" in up.slots[A].reason
    assert up.slots[B].state is State.READY
    assert not up.hopeless


def test_a_failed_slot_is_tried_slowly_for_ever_and_given_up_until_a_try_serves(up: Supervisor) -> None:
    die(up, A, 0.0, code=EXIT_CANNOT_BOOT)
    die(up, B, 0.0, code=EXIT_CANNOT_BOOT)
    for number, code in enumerate((EXIT_CANNOT_BOOT, EXIT_HOST_LACKS, 1, -9), 1):
        due = up.next_deadline()
        assert due == number * RESTARTS.retry_failed_s
        assert up.expire(due) == [Spawn(A, number + 1), Spawn(B, number + 1)]
        assert up.hopeless, "a try is no promise: nothing may wait for it"
        die(up, A, due, code=code)
        die(up, B, due, code=code)
        assert {up.slots[A].state, up.slots[B].state} == {State.FAILED}, "one death is enough"
    up.expire(300.0)
    assert up.ready(A, 6, 300.0)
    assert not up.hopeless
    die(up, A, 301.0)
    assert up.slots[A].state is State.FAILED, "what fails again soon is not restarted quickly again and again"


def test_what_the_host_lacks_is_waited_for_where_a_worker_has_been_ready(up: Supervisor) -> None:
    now = 0.0
    die(up, A, now)
    for _ in range(2000):  # twelve hours and more
        due = up.next_deadline()
        assert due is not None
        assert due - now <= RESTARTS.longest_delay_s
        now = due
        up.expire(now)
        die(up, A, now, code=EXIT_HOST_LACKS)
        assert up.slots[A].state is State.BACKOFF
    [spawn] = up.expire(now + RESTARTS.longest_delay_s)
    assert isinstance(spawn, Spawn)
    up.ready(A, spawn.generation, now)
    die(up, A, now)
    assert up.slots[A].deadline == now + 2 * RESTARTS.first_delay_s, "its own two deaths alone count"


def test_what_the_host_lacks_from_the_start_is_a_fault_of_the_settings(up: Supervisor) -> None:
    first = Supervisor([A], RESTARTS, DRAIN_S)
    first.start(0.0)
    die(first, A, 1.0, code=EXIT_HOST_LACKS)
    assert first.hopeless
    renew(up, [A, B], 0.0)
    up.replace(A, 0.0)
    die(up, A, 1.0, code=0)
    die(up, A, 2.0, code=EXIT_HOST_LACKS)
    assert up.slots[A].state is State.FAILED, "other settings: nothing has served by them"


def test_stable_service_starts_the_count_anew(up: Supervisor) -> None:
    now = 0.0
    for _ in range(3 * RESTARTS.give_up_after):
        now += RESTARTS.stable_s
        die(up, A, now)
        assert up.slots[A].failures == 1
        [spawn] = up.expire(now + 0.5)
        assert isinstance(spawn, Spawn)
        up.ready(A, spawn.generation, now)


def test_a_blameless_death_does_not_count(up: Supervisor) -> None:
    for number in range(2 * RESTARTS.give_up_after):
        die(up, A, float(number), blameless=True)
        [spawn] = up.expire(number + 0.5)
        assert isinstance(spawn, Spawn)
        up.ready(A, spawn.generation, number + 0.6)
    assert up.slots[A].failures == 0


def test_a_death_that_an_image_is_found_to_blame_for_is_taken_off_the_count(up: Supervisor) -> None:
    for number in range(2 * RESTARTS.give_up_after):
        die(up, A, float(number))
        up.acquit(A)
        up.check()
        [spawn] = up.expire(number + 0.5)
        assert isinstance(spawn, Spawn)
        up.ready(A, spawn.generation, number + 0.6)
    up.acquit(A)
    assert up.slots[A].failures == 0
    up.acquit("npu:9")  # a reload has taken it out


def test_a_worker_that_cannot_boot_is_not_restarted(up: Supervisor) -> None:
    die(up, A, 0.0, code=EXIT_CANNOT_BOOT)
    assert up.slots[A].state is State.FAILED
    die(up, B, 0.0, code=EXIT_CANNOT_BOOT)
    assert up.hopeless


def test_a_hung_worker_is_aborted_then_killed(up: Supervisor) -> None:
    assert up.evict(A, 1, "no progress", 10.0) == [Kill(A, 1, signal.SIGABRT)]
    assert up.evict(A, 1, "again", 10.1) == []
    assert up.expire(11.9) == []
    assert up.expire(12.0) == [Kill(A, 1, signal.SIGKILL)]
    die(up, A, 12.1)
    assert up.slots[A].failures == 1


def test_a_worker_that_is_replaced_has_no_past(up: Supervisor) -> None:
    for _ in range(RESTARTS.give_up_after - 1):
        die(up, A, 0.0)
        [spawn] = up.expire(100.0)
        up.ready(A, spawn.generation, 100.0)
    renew(up, [A, B], 100.0)
    up.replace(A, 100.0)
    die(up, A, 100.1, code=0)
    die(up, A, 100.2, code=1)
    assert up.slots[A].state is State.BACKOFF


def test_a_worker_that_hangs_while_it_is_asked_to_stop_is_not_waited_for(up: Supervisor) -> None:
    assert up.replace(A, 0.0) == [Stop(A, 1)]
    assert up.evict(A, 1, "no progress", 5.0) == [Kill(A, 1, signal.SIGABRT)], "long before the drain is over"
    assert up.evict(A, 1, "again", 5.1) == []
    assert die(up, A, 5.2, code=-6) == [Spawn(A, 2)]


def test_a_start_that_takes_too_long_is_aborted() -> None:
    supervisor = Supervisor([A], RESTARTS, DRAIN_S)
    supervisor.start(0.0)
    assert supervisor.expire(100.0) == [Kill(A, 1, signal.SIGABRT)]
    assert not supervisor.ready(A, 1, 100.5), "too late"
    assert supervisor.slots[A].state is State.STOPPING


def test_a_worker_that_does_not_stop_is_made_to(up: Supervisor) -> None:
    up.replace(A, 0.0)
    assert up.expire(DRAIN_S) == [Kill(A, 1, signal.SIGABRT)]
    assert up.expire(DRAIN_S + 2.0) == [Kill(A, 1, signal.SIGKILL)]
    assert die(up, A, 33.0) == [Spawn(A, 2)], "it was asked to go: no back-off"


def test_other_settings_give_a_failed_slot_another_chance_and_follow_the_device_list(up: Supervisor) -> None:
    die(up, A, 0.0, code=EXIT_CANNOT_BOOT)
    actions = renew(up, [A, "npu:2"], 1.0)
    assert actions == [Spawn(A, 2), Spawn("npu:2", 1), Stop(B, 1)]
    die(up, B, 2.0, code=0)
    assert up.slots[B].state is State.ENDED
    assert [slot.name for slot in up.listed] == [A, "npu:2"]
    up.ready(A, 2, 3.0)
    up.ready("npu:2", 1, 3.0)
    assert renew(up, [A, B, "npu:2"], 4.0) == [Spawn(B, 2)], "generations are never used twice"


def test_a_device_taken_out_and_put_back_while_it_stops_is_kept(up: Supervisor) -> None:
    renew(up, [A], 0.0)
    assert up.slots[B].state is State.STOPPING
    renew(up, [A, B], 1.0)
    assert die(up, B, 2.0, code=0) == [Spawn(B, 2)]


def test_drain_stops_everything_for_good(up: Supervisor) -> None:
    die(up, B, 0.0)
    assert up.drain(0.1) == [Stop(A, 1)]
    up.check()
    die(up, A, 0.2, code=0)
    assert up.ended
    assert up.expire(1e6) == []


def test_a_drain_in_a_hurry_gives_a_worker_the_time_to_stop_and_no_more(up: Supervisor) -> None:
    up.replace(A, 0.0)
    up.hurry(1.0)
    assert up.drain(1.0) == [Stop(B, 1)]
    assert up.expire(1.0 + RESTARTS.stop_s) == [Kill(A, 1, signal.SIGABRT), Kill(B, 1, signal.SIGABRT)]


def test_time_in_which_nothing_ran_is_nobodys(up: Supervisor) -> None:
    die(up, A, 0.0)
    up.replace(B, 0.0)
    up.forgive(40.0)
    assert up.expire(DRAIN_S) == []
    assert up.expire(40.5) == [Spawn(A, 2)]
    up.forgive(1000.0)
    assert up.expire(1040.0 + DRAIN_S) == [Kill(B, 1, signal.SIGABRT)]
    assert up.slots[A].state is State.STARTING


def test_drain_does_not_wait_for_a_worker_that_still_loads() -> None:
    supervisor = Supervisor([A], RESTARTS, DRAIN_S)
    supervisor.start(0.0)
    assert supervisor.drain(1.0) == [Kill(A, 1, signal.SIGKILL)]
    die(supervisor, A, 1.1)
    assert supervisor.ended


def test_an_event_that_cannot_be_is_our_fault(up: Supervisor) -> None:
    with pytest.raises(InvalidTransition, match=r"npu:0\.7"):
        up.exited(A, 7, "exited", 0, False, 0.0)


# -- health -----------------------------------------------------------------------------------------------------------


def says(health: Health, now: float, *said: str) -> list[Action]:
    """npu-smi says this of A, reading by reading; what follows from all of it."""
    actions = []
    for word in said:
        health.read({A: Reading(time=now, health=word)} if word else {})
        actions += health.follow(now)
    return actions


@pytest.mark.parametrize(
    ("said", "rests"),
    [
        (["Alarm", "Alarm"], True), (["Alarm", "Critical"], True), (["Alarm", "", "Alarm"], True),
        (["Alarm"], False), (["Alarm", "", "", ""], False), (["Alarm", "OK", "Alarm"], False),
        (["Alarm", "Warning", "Critical"], False), (["Warning"] * 9, False), (["", "", ""], False),
    ],
)  # fmt: skip
def test_a_card_that_is_ill_twice_rests_its_slot(up: Supervisor, said: list[str], rests: bool) -> None:
    assert says(Health(up), 1.0, *said) == ([Stop(A, 1)] if rests else [])
    assert up.slots[B].state is State.READY
    if rests:
        assert die(up, A, 2.0, code=0) == []
        assert (up.slots[A].state, up.slots[A].failures) == (State.RESTING, 0)
        assert up.slots[A].reason.startswith("health ")


def test_a_slot_comes_back_when_its_card_is_well_and_not_because_npu_smi_is_silent(up: Supervisor) -> None:
    health = Health(up)
    says(health, 1.0, "Alarm", "Alarm")
    assert says(health, 1.5, "OK") == [], "it still finishes what it holds"
    says(health, 1.6, "Alarm")
    die(up, A, 2.0, code=0)
    assert says(health, 3.0, "", "Critical", "") == []
    assert says(health, 4.0, "Warning") == [Spawn(A, 2)]
    assert up.slots[A].restarts == 0
    up.check()


def test_the_last_slot_that_serves_goes_on_and_rests_when_another_can(up: Supervisor) -> None:
    health = Health(up)
    die(up, B, 0.5)
    assert says(health, 1.0, "Critical", "Critical", "Critical") == []
    [spawn] = up.expire(1.1)
    up.ready(B, spawn.generation, 2.0)
    assert health.follow(2.0) == [Stop(A, 1)]


def test_a_slot_that_rests_is_better_than_none(up: Supervisor) -> None:
    health = Health(up)
    says(health, 1.0, "Alarm", "Alarm")
    die(up, A, 2.0, code=0)
    die(up, B, 3.0)
    assert health.follow(3.0) == [], "the other may be back soon"
    die(up, up.expire(4.0)[0].slot, 4.0, code=EXIT_DEVICE_BROKEN)
    assert up.slots[B].state is State.FAILED
    assert health.follow(4.0) == [Spawn(A, 2)]


def test_what_is_not_up_rests_at_once_and_what_is_drained_ends(up: Supervisor) -> None:
    health = Health(up)
    die(up, A, 1.0)
    assert says(health, 1.1, "Alarm", "Alarm") == []
    assert up.slots[A].state is State.RESTING
    assert up.expire(1e6) == []
    assert renew(up, [A, B], 2.0) == []
    assert up.drain(3.0) == [Stop(B, 1)]
    assert up.slots[A].state is State.ENDED
    up.check()


def test_a_device_that_needs_a_reset_is_given_up_at_once(up: Supervisor) -> None:
    die(up, A, 1.0, code=EXIT_DEVICE_BROKEN)
    assert up.slots[A].state is State.FAILED
    assert up.next_deadline() == 1.0 + RESTARTS.retry_failed_s


class SupervisorMachine(RuleBasedStateMachine):
    """Plays processes and time; at most one process per slot, generations only grow."""

    @initialize(devices=st.lists(st.sampled_from([A, B, "npu:2"]), min_size=1, unique=True))
    def begin(self, devices: list[str]) -> None:
        self.now = 0.0
        self.living: dict[str, int] = {}
        self.latest: dict[str, int] = {}
        self.asked: set[str] = set()
        self.supervisor = Supervisor(devices, RESTARTS, DRAIN_S)
        self.health = Health(self.supervisor)
        self.said: dict[str, list[str]] = {}
        self.carry_out(self.supervisor.start(self.now))

    @rule(slot=st.sampled_from([A, B, "npu:2"]), health=st.sampled_from(["OK", "Warning", "Alarm", "Critical"]))
    def npu_smi_says(self, slot: str, health: str) -> None:
        self.said.setdefault(slot, []).append(health)
        self.health.read({slot: Reading(time=self.now, health=health)})

    @rule()
    def npu_smi_does_not_answer(self) -> None:
        self.health.read({})

    @rule()
    def follow_health(self) -> None:
        before = set(self.serving())
        actions = self.health.follow(self.now)
        assert len(actions) <= 1
        for action in actions:
            match action:
                case Stop(slot) | Kill(slot):
                    assert set(self.said[slot][-2:]) <= {"Alarm", "Critical"}
                    assert len(self.said[slot]) > 1
                    assert before - {slot}, "the last one that serves"
                case Spawn(slot):
                    assert self.said[slot][-1] in ("OK", "Warning") or not self.up_or_coming()
        self.carry_out(actions)

    def up_or_coming(self) -> list[str]:
        slots = self.supervisor.slots.values()
        return [slot.name for slot in slots if slot.generation < self.latest.get(slot.name, 0) or (
            slot.state in (State.READY, State.STOPPING, State.BACKOFF) and not slot.given_up)]  # fmt: skip

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Spawn(slot, generation):
                    assert slot not in self.living, "two processes in one slot"
                    assert not self.supervisor.draining
                    assert generation > self.latest.get(slot, 0)
                    self.living[slot] = self.latest[slot] = generation
                case Stop(slot, generation) | Kill(slot, generation, _):
                    assert self.living.get(slot) == generation
                    self.asked.add(slot)

    @precondition(lambda self: self.living)
    @rule(pick=st.integers(0, 9))
    def become_ready(self, pick: int) -> None:
        slot = sorted(self.living)[pick % len(self.living)]
        self.supervisor.ready(slot, self.living[slot], self.now)

    @rule(slot=st.sampled_from([A, B]))
    def acquit(self, slot: str) -> None:
        self.supervisor.acquit(slot)

    @precondition(lambda self: self.living)
    @rule(pick=st.integers(0, 9), code=st.sampled_from(CODES), blameless=st.booleans())
    def exit(self, pick: int, code: int, blameless: bool) -> None:
        slot = sorted(self.living)[pick % len(self.living)]
        self.asked.discard(slot)
        generation = self.living.pop(slot)
        self.carry_out(self.supervisor.exited(slot, generation, "died", code, blameless, self.now))

    @precondition(lambda self: self.living)
    @rule(pick=st.integers(0, 9))
    def hang(self, pick: int) -> None:
        slot = sorted(self.living)[pick % len(self.living)]
        self.carry_out(self.supervisor.evict(slot, self.living[slot], "hangs", self.now))

    @precondition(lambda self: not self.supervisor.draining)
    @rule(devices=st.lists(st.sampled_from([A, B, "npu:2"]), min_size=1, unique=True))
    def renew(self, devices: list[str]) -> None:
        self.carry_out(self.supervisor.renew(devices, RESTARTS, DRAIN_S, self.now))
        assert not any(slot.ending and slot.name in devices for slot in self.supervisor.slots.values())

    def serving(self) -> list[str]:
        return [slot.name for slot in self.supervisor.slots.values() if slot.state is State.READY]

    @precondition(lambda self: self.serving() and not self.supervisor.draining)
    @rule(pick=st.integers(0, 9))
    def replace(self, pick: int) -> None:
        self.carry_out(self.supervisor.replace(self.serving()[pick % len(self.serving())], self.now))

    @precondition(lambda self: not self.supervisor.draining)
    @rule()
    def drain(self) -> None:
        self.carry_out(self.supervisor.drain(self.now))

    @rule()
    def hurry(self) -> None:
        self.supervisor.hurry(self.now)

    @rule(seconds=st.floats(2.0, 40))
    def stand_still(self, seconds: float) -> None:
        self.now += seconds
        self.supervisor.forgive(seconds)

    @rule(seconds=st.floats(0.1, 40))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.supervisor.expire(self.now))

    @invariant()
    def holds(self) -> None:
        self.supervisor.check()
        running = {slot.name: slot.generation for slot in self.supervisor.slots.values() if slot.running}
        assert running == self.living

    def teardown(self) -> None:
        """After a drain, when processes end or are killed, everything ends."""
        if not self.supervisor.draining:
            self.drain()
        for _ in range(10):
            for slot, generation in list(self.living.items()):
                if slot in self.asked:
                    del self.living[slot]
                    self.carry_out(self.supervisor.exited(slot, generation, "ended", 0, False, self.now))
            self.now += DRAIN_S
            self.carry_out(self.supervisor.expire(self.now))
        assert self.supervisor.ended


TestSupervisor = SupervisorMachine.TestCase
TestSupervisor.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
