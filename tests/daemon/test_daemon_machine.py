"""Broker, supervisor, reload and clients' exchanges together under generated histories, as
`daemon/blendmaskd/shell/server.py` plays them.

The machine is clients, processes and time. Two clients are `Exchange`s, as `Client` has them: what they try again is
their decision. The third is bare: it says what it likes, and submits what failed again under another name. What they
say and hear goes through the wire's bytes. Processes load, serve, hang, die of images and of nothing, answer late; a
device may be gone for good. After each step all cores' `check()` holds and what one knows agrees with the other and
with the processes; no poison image has cost more workers than `max_attempts`, however often it came. At the end
everything that is owed has had exactly one answer.

To add an event, add a `@rule`: play the part of the outside, and give what a core answers to `broker_does` or
`supervisor_does`. What must hold after any step goes into `holds`, what must come of it in the end into `teardown`.
"""
from __future__ import annotations

import math
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendmaskd import protocol
from blendmaskd.assignment import EXIT_CANNOT_BOOT, EXIT_HOST_LACKS
from blendmaskd.client import exchange
from blendmaskd.client.connection import RETRIES
from blendmaskd.client.exchange import Exchange, JobFailed, Segmentation
from blendmaskd.core import actions as broker_actions
from blendmaskd.core import reload as reload_module
from blendmaskd.core import supervisor as supervisor_module
from blendmaskd.core.actions import Acquit, Answered, Evict, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.health import Health, Reading
from blendmaskd.core.launch_plan import Basis, Preload
from blendmaskd.core.refusals import Limits
from blendmaskd.core.reload import Adopt, GiveUp, Ready, Reload, StopCheck
from blendmaskd.core.supervisor import Kill, Spawn, State, Supervisor
from blendmaskd.protocol import (
    FROM_CLIENT,
    Cancel,
    Code,
    Failed,
    FailedLease,
    Finished,
    Image,
    Lease,
    Options,
    Result,
    Revoke,
    Started,
    Stop,
    Submit,
)
from blendmaskd.settings import Model, Restarts, Settings

LIMITS = Limits(
    max_jobs=6, max_bytes=60, max_image_bytes=30, max_attempts=2, deadline_s=20.0, stall_s=8.0,
    max_jobs_per_client=5, max_bytes_per_client=70,
)  # fmt: skip
RESTARTS = Restarts(
    first_delay_s=0.5, longest_delay_s=4.0, give_up_after=3, stable_s=30.0, start_timeout_s=15.0, stop_s=2.0
)
DRAIN_S = 10.0
DEVICES = ("npu:0", "npu:1")
BAD = "bad.pth"
TIMEOUT_S = 15.0  # of the exchanges
REFUSALS = {Code.BUSY, Code.TOO_LARGE, Code.DRAINING, Code.UNAVAILABLE, Code.WORKER_LOST}

client = st.sampled_from(["a", "b", "bare"])
pick = st.integers(0, 5)


@dataclass
class Process:
    """A worker, as the host sees it."""

    device: str
    generation: int
    bootable: bool = True  # by its settings
    loading: bool = True
    hung: bool = False
    held: dict[int, bytes] = field(default_factory=dict)  # lease: image
    started: set[int] = field(default_factory=set)
    told_to_stop: bool = False

    @property
    def name(self) -> str:
        return f"{self.device}.{self.generation}"


def basis(devices: tuple[str, ...], bootable: bool) -> Basis:
    """What workers are started by, and whether any device can boot by it."""
    model = Model(weights=None if bootable else BAD)
    settings = Settings(devices=list(devices), model=model, restarts=RESTARTS, drain_s=DRAIN_S)
    return Basis(settings, {}, Preload(None), (0,), math.inf)


class DaemonMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.broker = Broker(LIMITS)
        self.supervisor = Supervisor(DEVICES, RESTARTS, DRAIN_S)
        self.processes: dict[str, Process] = {}
        self.exchanges = {name: Exchange(RETRIES, TIMEOUT_S) for name in ("a", "b")}
        self.asked: list[exchange.Call] = []  # of the exchanges, that are to have an answer
        self.owed: dict[tuple[str, str], bytes] = {}  # client, job: accepted, unanswered; their images
        self.lost: list[bytes] = []  # images of the bare client that failed
        self.killed: Counter[bytes] = Counter()  # workers, by poison images since the last reload
        self.died_with: Counter[bytes] = Counter()  # workers that died of whatever, by images that they held
        self.gone: set[str] = set()  # devices on which nothing can start
        self.reload = Reload(self.supervisor, basis(DEVICES, bootable=True))
        self.health = Health(self.supervisor)
        self.reported = False  # as ready
        self.checking = False  # a process tries the reload's candidate
        self.served_before = False  # one of the wanted devices, when the last reload came
        self.seen: list[tuple[str, int]] = []  # every lease there was
        self.jobs = 0
        self.draining_until: float | None = None
        self.told_available = True
        self.supervisor_does(self.supervisor.start(self.now))

    # -- the shell --------------------------------------------------------------------------------------------------

    def broker_does(self, actions: list[broker_actions.Action]) -> None:
        for action in actions:
            match action:
                case Answered(to, answer, payload):
                    key = (to.decode(), answer.job)
                    assert key in self.owed, f"{answer} answers nothing that is owed"
                    self.hears(key, self.owed.pop(key), answer, payload)
                case SendWorker(worker, Lease() as lease, payload):
                    process = self.processes[worker]
                    assert not process.told_to_stop, "a lease for a worker that was told to stop"
                    assert lease.alone <= (not process.held), "a suspect in company"
                    process.held[lease.lease] = bytes(payload[0])
                    self.seen.append((worker, lease.lease))
                case SendWorker(worker, Revoke(lease=number)):
                    assert number in self.processes[worker].held, "revoked what the worker does not hold"
                case SendWorker(worker, Stop()):
                    assert not self.processes[worker].held, "told to stop with leases held"
                    self.processes[worker].told_to_stop = True
                case Evict(worker, reason):
                    process = self.processes[worker]
                    evicted = self.supervisor.evict(process.device, process.generation, reason, self.now)
                    self.supervisor_does(evicted)
                case Acquit(device):
                    self.supervisor.acquit(device)

    def supervisor_does(self, actions: Iterable[reload_module.Action]) -> None:
        for action in actions:
            match action:
                case Spawn(device, generation):
                    assert not any(other.device == device for other in self.processes.values()), "two in one slot"
                    process = Process(device, generation, self.bootable)
                    self.processes[process.name] = process
                case supervisor_module.Stop(device, generation):
                    slot = self.supervisor.slots[device]
                    assert slot.ending or slot.resting or not self.moving(device), "two are taken down at once"
                    self.broker_does(self.broker.retire(f"{device}.{generation}"))
                case Kill(device, generation, number):
                    name = f"{device}.{generation}"
                    # A stopped process takes SIGABRT only when it goes on; SIGKILL always works.
                    if number is signal.SIGKILL or not self.processes[name].hung:
                        self.end(self.processes[name], -number)
                case StopCheck():
                    self.check_ends(bad=True)
                case Adopt(adopted, undone):
                    self.killed.clear()
                    self.broker_does(self.broker.forget_suspects(self.now))
                    assert adopted is self.reload.basis
                    assert bool(undone) <= (adopted.settings.model.weights is None), "what it goes back to has served"
                case Ready():
                    assert any(p.bootable and not p.loading for p in self.processes.values()), "ready for what?"
                    self.reported = True
                case GiveUp():
                    assert not self.reported, "it has served"

    @property
    def bootable(self) -> bool:
        return self.reload.basis.settings.model.weights is None

    def moving(self, but: str) -> list[str]:
        gone = (State.READY, State.FAILED, State.RESTING, State.ENDED)
        return [slot.name for slot in self.supervisor.slots.values() if slot.state not in gone and slot.name != but]

    def end(self, process: Process, code: int) -> None:
        """Its process is gone: as `Processes.reap`."""
        del self.processes[process.name]
        self.died_with.update(set(process.held.values()))
        blameless = self.broker.holds_suspect(process.name)
        actions = self.supervisor.exited(process.device, process.generation, f"{code}", code, blameless, self.now)
        self.broker_does(self.broker.exited(process.name, self.now, "died"))
        self.supervisor_does(actions)

    def follow(self) -> None:
        """As `Server._keep_house`."""
        self.supervisor_does(self.health.follow(self.now))
        self.supervisor_does(self.reload.follow(self.now))
        hopeless = self.supervisor.hopeless and not self.supervisor.draining
        if hopeless == self.told_available:
            self.told_available = not hopeless
            self.broker_does(self.broker.set_available(not hopeless))
        if self.draining_until is None:
            return
        if self.now >= self.draining_until and self.broker.unanswered:
            self.broker_does(self.broker.end_drain())
        if not self.broker.unanswered and not self.supervisor.draining:
            self.supervisor_does(self.supervisor.drain(self.now))

    def let_pass(self, seconds: float) -> None:
        self.now += seconds
        self.exchanges_send()
        self.broker_does(self.broker.expire(self.now))
        self.supervisor_does(self.supervisor.expire(self.now))
        self.follow()

    # -- clients ----------------------------------------------------------------------------------------------------

    @rule(client=client, size=st.sampled_from([10, 20, 35]), deadline_s=st.sampled_from([None, 3.0]),
          poison=st.sampled_from([0, 0, 1, 2]), priority=st.sampled_from([0, 1]))  # fmt: skip
    def submit(self, client: str, size: int, deadline_s: float | None, poison: int, priority: int) -> None:
        """Good images are all different; there are few that are poison, and they come again and again."""
        self.jobs += 1
        image = f"poison {poison}".encode() if poison else f"{self.jobs}".encode().ljust(size)
        if client in self.exchanges:
            added = self.exchanges[client].add(image, deadline_s, priority, Options(), self.now)
            self.asked.append(added)
            self.exchanges_send()
            return
        message = Submit(job=f"j{self.jobs}", image=Image(kind="encoded"), deadline_s=deadline_s, priority=priority)
        self.says(client, protocol.encode(message, [image]))

    @precondition(lambda self: self.lost)
    @rule(pick=pick)
    def insist(self, pick: int) -> None:
        """The bare client knows better than the daemon."""
        self.jobs += 1
        image = self.lost[-1 - pick % len(self.lost)]
        self.says("bare", protocol.encode(Submit(job=f"j{self.jobs}", image=Image(kind="encoded")), [image]))

    def exchanges_send(self) -> None:
        for client, each in self.exchanges.items():
            for frames in each.due(self.now):
                self.says(client, frames)

    def says(self, client: str, frames: list[bytes]) -> None:
        """A client submits: as `Desk.read_clients`."""
        message: protocol.FromClient
        message, [image] = protocol.decode(frames, FROM_CLIENT)
        assert isinstance(message, Submit)
        actions = self.broker.submit(client.encode(), message, [image], self.now)
        match actions:
            case [Answered(_, Failed(code=code) as refusal)] if refusal.job == message.job and code in REFUSALS:
                self.hears((client, message.job), image, refusal, ())
                return
        assert self.draining_until is None
        assert self.told_available
        self.owed[client, message.job] = image
        self.broker_does(actions)

    def hears(self, key: tuple[str, str], image: bytes, answer: Result | Failed, payload: protocol.Frames) -> None:
        lost = isinstance(answer, Failed) and answer.code is Code.WORKER_LOST
        assert not lost or self.died_with[image] >= LIMITS.max_attempts, f"{image!r} is given up without a reason"
        client, job = key
        if client in self.exchanges:
            self.exchanges[client].receive(protocol.encode(answer, payload), self.now)
            assert not (lost and job in self.exchanges[client].jobs), "a client tries again what the broker gave up"
        elif isinstance(answer, Failed):
            self.lost.append(image)

    @rule(client=client, count=st.integers(2, 8), size=st.sampled_from([5, 20]), poison=st.sampled_from([0, 0, 0, 1]))
    def submit_many(self, client: str, count: int, size: int, poison: int) -> None:
        """Until there is no room, perhaps; the same poison image under many names, perhaps."""
        for _ in range(count):
            self.submit(client, size, None, poison, 0)

    def some_job(self, pick: int) -> tuple[str, str]:
        return sorted(self.owed)[pick % len(self.owed)]

    @precondition(lambda self: self.owed)
    @rule(pick=pick)
    def submit_again(self, pick: int) -> None:
        client, job = self.some_job(pick)
        again = Submit(job=job, image=Image(kind="encoded"))
        assert self.broker.submit(client.encode(), again, [b"again"], self.now) == []

    @precondition(lambda self: self.owed)
    @rule(pick=pick)
    def cancel(self, pick: int) -> None:
        client, job = self.some_job(pick)
        self.broker_does(self.broker.cancel(client.encode(), Cancel(job=job), self.now))
        assert (client, job) not in self.owed

    @precondition(lambda self: self.owed)
    @rule(pick=pick)
    def stops_waiting(self, pick: int) -> None:
        """As a `Client` whose `timeout_s` is over."""
        client, job = self.some_job(pick)
        if client in self.exchanges:
            self.exchanges[client].drop(job)
            self.asked = [each for each in self.asked if each.name != job]
        self.broker_does(self.broker.cancel(client.encode(), Cancel(job=job), self.now))

    @precondition(lambda self: self.owed)
    @rule(client=client)
    def client_gone(self, client: str) -> None:
        """With an exchange its connection: it sends what is unanswered again."""
        self.owed = {key: image for key, image in self.owed.items() if key[0] != client}
        self.broker_does(self.broker.client_gone(client.encode(), self.now))
        if client in self.exchanges:
            self.exchanges[client].reconnected(self.now)
            self.exchanges_send()

    # -- workers ----------------------------------------------------------------------------------------------------

    def alive(self, **wanted: bool) -> list[Process]:
        """Processes of which this holds, hung ones not among them."""
        return [p for _, p in sorted(self.processes.items())
                if not p.hung and all(bool(getattr(p, key)) == value for key, value in wanted.items())]  # fmt: skip

    def is_loaded(self, process: Process) -> None:
        """Its device is gone and it ends; or it says that it is ready: as `Processes.ready`."""
        if process.device in self.gone or not process.bootable:
            self.end(process, EXIT_CANNOT_BOOT)
            return
        process.loading = False
        if self.supervisor.ready(process.device, process.generation, self.now):
            self.broker_does(self.broker.ready(process.name, process.device, 2, self.now))

    @precondition(lambda self: self.alive(loading=True))
    @rule(pick=pick)
    def loaded(self, pick: int) -> None:
        loading = self.alive(loading=True)
        self.is_loaded(loading[pick % len(loading)])

    def some_lease(self, pick: int) -> tuple[Process, int]:
        every = [(process, number) for process in self.alive(held=True) for number in process.held]
        return every[pick % len(every)]

    @precondition(lambda self: self.alive(held=True))
    @rule(pick=pick)
    def start(self, pick: int) -> None:
        process, number = self.some_lease(pick)
        process.started.add(number)
        self.broker_does(self.broker.started(process.name, Started(leases=[number]), self.now))
        if process.held[number].startswith(b"poison"):
            self.dies_of(process, process.held[number])

    def dies_of(self, process: Process, image: bytes) -> None:
        self.killed[image] += 1
        self.end(process, -signal.SIGKILL)

    def ends_lease(self, process: Process, number: int) -> None:
        """With a result; a poison image has none."""
        image = process.held[number]
        if image.startswith(b"poison"):
            self.dies_of(process, image)
            return
        del process.held[number]
        message = Finished(lease=number, width=1, height=1, timings={})
        self.broker_does(self.broker.finished(process.name, message, [b"\x90"], self.now))

    @precondition(lambda self: self.alive(held=True))
    @rule(pick=pick)
    def finish(self, pick: int) -> None:
        self.ends_lease(*self.some_lease(pick))

    @precondition(lambda self: self.alive(held=True))
    @rule(pick=pick)
    def fail(self, pick: int) -> None:
        process, number = self.some_lease(pick)
        del process.held[number]
        message = FailedLease(lease=number, code=Code.ENGINE_FAILED, reason="raised")
        self.broker_does(self.broker.failed(process.name, message, self.now))

    @precondition(lambda self: self.seen)
    @rule(pick=pick)
    def answer_late(self, pick: int) -> None:
        """Of a lease that is over, or of a worker that is dead."""
        worker, number = self.seen[-1 - pick % len(self.seen)]
        process = self.processes.get(worker)
        if process is None or number not in process.held:
            message = Finished(lease=number, width=1, height=1, timings={})
            self.broker_does(self.broker.finished(worker, message, [b"\x90"], self.now))

    @precondition(lambda self: self.alive())
    @rule(pick=pick, code=st.sampled_from([-9, -11, 0, 3, 70, EXIT_CANNOT_BOOT, EXIT_HOST_LACKS]))
    def die(self, pick: int, code: int) -> None:
        self.end(self.alive()[pick % len(self.alive())], code)

    @precondition(lambda self: self.alive())
    @rule(pick=pick)
    def hang(self, pick: int) -> None:
        self.alive()[pick % len(self.alive())].hung = True

    @precondition(lambda self: self.alive(told_to_stop=True))
    @rule(pick=pick)
    def stops(self, pick: int) -> None:
        """As it was asked to."""
        asked = self.alive(told_to_stop=True)
        self.end(asked[pick % len(asked)], 0)

    @precondition(lambda self: self.alive(loading=False))
    @rule(pick=pick, window=st.integers(1, 3))
    def change_window(self, pick: int, window: int) -> None:
        serving = self.alive(loading=False)
        process = serving[pick % len(serving)]
        self.broker.heard(process.name, self.now)
        self.broker_does(self.broker.set_window(process.name, window, self.now))

    # -- devices, time, operators -----------------------------------------------------------------------------------

    @rule(device=st.sampled_from(DEVICES), gone=st.booleans())
    def device_gone(self, device: str, gone: bool) -> None:
        (self.gone.add if gone else self.gone.discard)(device)

    @rule(device=st.sampled_from(DEVICES), health=st.sampled_from(["OK", "Alarm", "Alarm"]))
    def npu_smi_says(self, device: str, health: str) -> None:
        self.health.read({device: Reading(time=self.now, health=health)})

    @rule(seconds=st.sampled_from([0.5, 2.0, 9.0]))
    def wait(self, seconds: float) -> None:
        """Workers that live report each second."""
        for _ in range(max(int(seconds), 1)):
            for process in self.alive():
                self.broker.heard(process.name, self.now)
            self.let_pass(min(seconds, 1.0))

    @rule()
    def all_work(self) -> None:
        """Everybody does what they should, and a second passes: so that histories get somewhere."""
        for process in self.alive():
            if process.name not in self.processes:
                continue  # it ended in this very loop
            self.broker.heard(process.name, self.now)
            if process.loading:
                self.is_loaded(process)
            elif process.told_to_stop:
                self.end(process, 0)
            while process.held and process.name in self.processes:
                self.ends_lease(process, next(iter(process.held)))
        if self.checking:
            self.check_ends(bad=False)
        self.let_pass(1.0)

    @precondition(lambda self: not self.reload.busy)
    @rule(devices=st.sampled_from([DEVICES, DEVICES, DEVICES[:1]]), bootable=st.sampled_from([True, True, False]),
          at_once=st.booleans())  # fmt: skip
    def begin_reload(self, devices: tuple[str, ...], bootable: bool, at_once: bool) -> None:
        """As `Processes.try_out`; the check may end at once."""
        self.reload.try_out(basis(devices, bootable), self.now)
        self.checking = True
        if at_once:
            self.check_ends(bad=False)

    @precondition(lambda self: self.checking)
    @rule(bad=st.sampled_from([False, False, True]))
    def check_ends(self, bad: bool) -> None:
        """As `Processes.reap`."""
        self.checking = False
        candidate, before = self.reload.candidate, self.reload.basis
        assert candidate is not None
        devices = candidate.settings.devices
        slots = [self.supervisor.slots[device] for device in devices if device in self.supervisor.slots]
        served = any(slot.state is State.READY for slot in slots)
        actions = self.reload.tried("bad" if bad else None, self.now)
        adopted = self.reload.basis is candidate
        assert adopted == (not bad and self.draining_until is None)
        assert adopted or self.reload.basis is before
        if adopted:
            self.served_before = served
        self.supervisor_does(actions)

    @precondition(lambda self: self.draining_until is None)
    @rule(really=st.sampled_from([False, False, False, True]))
    def drain(self, really: bool) -> None:
        if really:
            self.draining_until = self.now + DRAIN_S
            self.broker.drain()
            self.supervisor_does(self.reload.drain())

    # -- what holds -------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.follow()
        self.broker.check()
        self.supervisor.check()
        self.reload.check()
        assert self.broker.unanswered == len(self.owed)
        assert max(self.killed.values(), default=0) <= LIMITS.max_attempts, "one image costs more workers than it may"
        for client in {client for client, _ in self.owed}:
            sizes = [len(image) for (owner, _), image in self.owed.items() if owner == client]
            assert (len(sizes) <= 5, sum(sizes) <= 70) == (True, True), f"{client} has more than one client may"
        assert self.broker.leased == sum(len(process.held) for process in self.processes.values())
        running = {f"{s.name}.{s.generation}" for s in self.supervisor.slots.values() if s.running}
        assert running == self.processes.keys(), "a slot runs without a process, or the other way round"
        for slot in self.supervisor.slots.values():
            name = f"{slot.name}.{slot.generation}"
            if slot.state is State.READY:
                assert self.broker.last_heard(name) is not None, "ready, and gets no leases"
        assert self.told_available or not self.owed, "jobs wait for devices that will not come"

    def teardown(self) -> None:
        """Whatever happened: after a while everything that is owed is answered, and a drain comes to its end."""
        if sys.exc_info()[1] is not None:
            return  # a step has failed: what comes of that would only hide it
        for _ in range(60):
            self.all_work()
            self.holds()
        assert not self.owed, f"never answered: {self.owed}"
        for job in self.asked:
            assert isinstance(job.answer, Segmentation | JobFailed), f"{job} waits for ever"
        assert all(each.next_send() == math.inf for each in self.exchanges.values())
        assert not self.reload.reloading, f"a reload that stopped half-way: {self.supervisor.slots}"
        if self.draining_until is not None:
            assert self.supervisor.ended, self.supervisor.slots
        else:
            assert self.bootable or not self.served_before, "settings stand that nothing can boot by"


TestDaemon = DaemonMachine.TestCase
TestDaemon.settings = settings(max_examples=200, stateful_step_count=40, deadline=None, report_multiple_bugs=False)
