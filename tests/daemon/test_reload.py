"""Reloads by example, played with the supervisor's slots; generated histories are in test_daemon_machine.py."""
from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import pytest

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.core import reload
from blendmaskd.core.launch_plan import Basis, Preload
from blendmaskd.core.reload import Action, Adopt, GiveUp, Over, Ready, Reload, StopCheck
from blendmaskd.core.supervisor import Spawn, State, Stop, Supervisor
from blendmaskd.settings import Restarts, Settings, SettingsError, from_tree

RESTARTS = Restarts(first_delay_s=0.5, longest_delay_s=4.0, give_up_after=4, start_timeout_s=100.0, stop_s=2.0)
DRAIN_S = 30.0
A, B, C = "npu:0", "npu:1", "npu:2"


def basis(*devices: str) -> Basis:
    return Basis(Settings(devices=list(devices), restarts=RESTARTS, drain_s=DRAIN_S), {}, Preload(None), (0,), math.inf)


OLD = basis(A, B)


class Daemon:
    """Both cores; `so_far` is what was to be done since it was last looked at."""

    def __init__(self, *devices: str) -> None:
        self.supervisor = Supervisor(devices, RESTARTS, DRAIN_S)
        self.reload = Reload(self.supervisor, basis(*devices))
        self.done: list[Action] = []
        self.does(self.supervisor.start(0.0), 0.0)

    def does(self, actions: Iterable[Action], now: float) -> None:
        self.done += [*actions, *self.reload.follow(now)]
        self.supervisor.check()
        self.reload.check()

    def so_far(self) -> list[Action]:
        done, self.done = self.done, []
        return done

    def ready(self, slot: str, now: float) -> list[Action]:
        assert self.supervisor.ready(slot, self.supervisor.slots[slot].generation, now)
        self.does([], now)
        return self.so_far()

    def die(self, slot: str, now: float, code: int = EXIT_CANNOT_BOOT) -> list[Action]:
        generation = self.supervisor.slots[slot].generation
        self.does(self.supervisor.exited(slot, generation, "killed by SIGKILL", code, False, now), now)
        return self.so_far()

    def begin(self, new: Basis, now: float, complaint: str | None = None) -> list[Action]:
        """A reload, as far as the end of its check."""
        self.reload.try_out(new, now)
        self.does([], now)
        self.does(self.reload.tried(complaint, now), now)
        return self.so_far()


@pytest.fixture
def up() -> Daemon:
    """Both slots READY at time 0, and reported."""
    daemon = Daemon(A, B)
    assert daemon.so_far() == [Spawn(A, 1), Spawn(B, 1)]
    assert daemon.ready(A, 0.0) == []
    assert daemon.ready(B, 0.0) == [Ready()]
    return daemon


def test_workers_are_replaced_one_at_a_time_and_the_end_is_reported(up: Daemon) -> None:
    new = basis(A, B)
    assert up.begin(new, 10.0) == [Adopt(new), Stop(A, 1)]
    assert up.reload.basis is new
    assert up.die(A, 12.0, code=0) == [Spawn(A, 2)]
    assert up.reload.reloading
    assert up.ready(A, 13.0) == [Stop(B, 1)]
    assert up.die(B, 14.0, code=0) == [Spawn(B, 2)]
    assert up.ready(B, 15.0) == [Ready()]
    assert not up.reload.reloading
    assert up.supervisor.slots[A].restarts == up.supervisor.slots[A].failures == 0


def test_a_complaint_ends_a_reload_before_anything_changes(up: Daemon) -> None:
    assert up.begin(basis(A), 1.0, complaint="no such file") == [Over("reload refused, nothing changed: no such file")]
    assert up.reload.basis.settings == OLD.settings
    assert not up.reload.busy


def test_a_check_that_takes_too_long_is_stopped_once(up: Daemon) -> None:
    up.reload.try_out(basis(A), 1.0)
    assert up.reload.busy
    assert up.reload.follow(100.9) == []
    [stop] = up.reload.follow(101.0)
    assert isinstance(stop, StopCheck)
    assert "restarts.start_timeout_s" in stop.why
    assert up.reload.follow(200.0) == []
    up.does(up.reload.tried("killed by SIGKILL", 200.0), 200.0)
    assert [type(action) for action in up.so_far()] == [Over]


def test_a_reload_waits_for_a_new_worker_that_dies(up: Daemon) -> None:
    up.begin(basis(A, B), 10.0)
    up.die(A, 12.0, code=0)
    assert up.die(A, 13.0, code=1) == [], "B serves on"
    up.does(up.supervisor.expire(13.5), 13.5)
    assert up.so_far() == [Spawn(A, 3)]
    assert up.ready(A, 14.0) == [Stop(B, 1)]


def test_a_reload_goes_past_a_device_that_was_gone_before_it(up: Daemon) -> None:
    up.die(A, 0.0)
    new = basis(A, B)
    assert up.begin(new, 0.1) == [Adopt(new), Spawn(A, 2)]
    assert up.die(A, 0.2) == [Stop(B, 1)]
    assert up.reload.trying


def test_a_failed_device_that_is_tried_anew_as_a_reload_comes_does_not_speak_against_it(up: Daemon) -> None:
    up.die(A, 0.0)
    up.does(up.supervisor.expire(RESTARTS.retry_failed_s), RESTARTS.retry_failed_s)
    assert up.so_far() == [Spawn(A, 2)]
    up.begin(basis(A, B), RESTARTS.retry_failed_s)
    assert up.die(A, RESTARTS.retry_failed_s, code=-9) == [Spawn(A, 3)], "it loads what is not wanted any more"
    assert up.die(A, RESTARTS.retry_failed_s) == [Stop(B, 1)]
    assert up.reload.trying


def test_a_reload_by_which_the_first_worker_cannot_boot_is_undone(up: Daemon) -> None:
    before = up.reload.basis
    assert up.begin(basis(A, B, C), 0.0)[1:] == [Spawn(C, 1)]
    assert up.die(C, 0.1) == [Stop(A, 1)], "a new device may not be there"
    assert up.die(A, 0.2, code=0) == [Spawn(A, 2)]
    adopt, *others = up.die(A, 0.3)
    assert isinstance(adopt, Adopt)
    assert (adopt.basis, adopt.undone) == (before, f"{A}: cannot boot: killed by SIGKILL")
    assert others == [Spawn(A, 3)]
    assert up.supervisor.slots[C].state is State.ENDED
    assert up.ready(A, 0.5) == [Ready()], "B serves by what is back"
    assert not up.reload.reloading


@pytest.mark.parametrize("code", [1, -9])
def test_a_reload_by_which_the_first_worker_keeps_dying_is_undone(up: Daemon, code: int) -> None:
    before = up.reload.basis
    up.begin(basis(A, B), 0.0)
    up.die(A, 0.0, code=0)
    now = 0.0
    for _ in range(RESTARTS.give_up_after - 1):
        assert up.die(A, now, code=code) == []
        now = up.supervisor.slots[A].deadline or now
        up.does(up.supervisor.expire(now), now)
        assert [type(action) for action in up.so_far()] == [Spawn]
    adopt, spawn = up.die(A, now, code=code)
    assert isinstance(adopt, Adopt)
    assert adopt.basis is before
    assert spawn == Spawn(A, up.supervisor.slots[A].generation)
    assert up.supervisor.slots[B].generation == 1


def test_a_worker_that_was_on_its_way_when_the_reload_came_speaks_against_it_too(up: Daemon) -> None:
    up.die(A, 0.0, code=-9)
    assert up.begin(basis(A, B), 0.1)[1:] == [Spawn(A, 2)]
    adopt, *_ = up.die(A, 0.2)
    assert isinstance(adopt, Adopt), "B is not tried by the same"
    assert adopt.undone


def test_a_reload_that_one_worker_has_booted_by_goes_past_a_device_that_fails(up: Daemon) -> None:
    up.begin(basis(A, B, C), 0.0)
    assert up.ready(C, 0.1) == [Stop(A, 1)]
    up.die(A, 0.2, code=0)
    assert up.die(A, 0.3) == [Stop(B, 1)]


def test_a_reload_during_another_one_s_trial_goes_back_to_what_has_served(up: Daemon) -> None:
    before = up.reload.basis
    up.begin(basis(A, B, C), 0.0)
    up.begin(basis(A, B, C), 0.1)
    assert up.die(C, 0.2, code=-9) == [Spawn(C, 2)]
    adopt, *_ = up.die(C, 0.3)
    assert isinstance(adopt, Adopt)
    assert adopt.basis is before


def test_a_drain_stops_a_check_and_a_replacement(up: Daemon) -> None:
    up.begin(basis(A, B), 0.0)
    up.reload.try_out(basis(A), 0.0)
    assert up.reload.drain() == [StopCheck("")]
    assert up.reload.tried("killed by SIGKILL", 0.1) == []
    up.die(A, 0.1, code=0)
    assert up.ready(A, 0.2) == [], "B may finish what it has, and nobody is told of an end"
    assert up.reload.busy


def test_a_device_that_is_taken_out_stops_beside_the_replacement(up: Daemon) -> None:
    up.die(A, 0.0)
    new = basis(A, C)
    assert up.begin(new, 1.0) == [Adopt(new), Spawn(A, 2), Spawn(C, 1), Stop(B, 1)]


def test_a_device_that_comes_back_while_it_stops_is_not_counted_as_replaced(up: Daemon) -> None:
    up.begin(basis(A, B), 1.0)
    assert up.begin(basis(A), 2.0)[1:] == [Stop(B, 1)]
    assert up.begin(basis(A, B), 3.0)[1:] == [], "both stop already, for different reasons"
    assert up.die(A, 4.0, code=0) == [Spawn(A, 2)]
    assert up.die(B, 4.0, code=0) == [Spawn(B, 2)]


def test_a_first_start_that_cannot_be_is_given_up_and_a_later_one_is_not(up: Daemon) -> None:
    hopeless = Daemon(A)
    hopeless.so_far()
    assert hopeless.die(A, 0.1) == [GiveUp()]
    up.die(A, 0.0)
    up.die(B, 0.0)
    assert up.begin(basis(A, B), 1.0)[1:] == [Spawn(A, 2), Spawn(B, 2)]
    assert up.die(A, 1.1) == []
    [over] = up.die(B, 1.1)
    assert isinstance(over, Over)
    assert "no worker can be started" in over.text


@pytest.mark.parametrize(("key", "tree"), [
    ("endpoints", {"endpoints": {"metrics": None}}),
    ("spool", {"spool": "/var/lib/blendmaskd/spool"}),
    ("limits.max_connections", {"limits": {"max_connections": 7}}),
    ("limits.max_image_bytes", {"limits": {"max_image_bytes": 1 << 40}}),
])  # fmt: skip
def test_what_is_open_cannot_be_changed(key: str, tree: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match=f"^{key}: .* needs a restart"):
        reload.refuse_rebinding(Settings(), from_tree(tree))


def test_other_settings_can_be_changed() -> None:
    lower = msgspec.structs.replace(Settings().limits, max_image_bytes=1)
    reload.refuse_rebinding(Settings(), Settings(devices=[A], limits=lower))
