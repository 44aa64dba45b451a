"""The broker under generated histories: every accepted job gets exactly one answer, and `check()` always holds."""
from __future__ import annotations

import fcntl
from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendmaskd.core.actions import Action, Answered, Evict, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.refusals import Limits
from blendmaskd.core.regions import PAGE, Memory
from blendmaskd.protocol import (
    Cancel,
    CloseRegion,
    Code,
    Failed,
    FailedLease,
    Finished,
    Image,
    Lease,
    OpenRegion,
    Revoke,
    Started,
    Stop,
    Submit,
)

LIMITS = Limits(
    max_jobs=6, max_bytes=60, max_image_bytes=30, max_attempts=2, deadline_s=20.0, stall_s=8.0,
    shared_memory_bytes=64 * PAGE,
)  # fmt: skip
CLIENTS = st.sampled_from([b"a", b"b"])
USERS = st.sampled_from([b"", b"u"])
REFUSALS = {Code.BUSY, Code.TOO_LARGE, Code.DRAINING, Code.UNAVAILABLE}
index = st.integers(0, 1000)


class BrokerMachine(RuleBasedStateMachine):
    """Plays clients, workers and time; keeps its own account of what is owed."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = Broker(LIMITS)
        self.now = 0.0
        self.owed: set[tuple[bytes, str]] = set()  # accepted, unanswered
        self.held: dict[str, dict[int, str]] = {}  # worker: lease: job
        self.started: dict[str, set[int]] = {}
        self.stopped: set[str] = set()
        self.regions: set[str] = set()
        self.mapped: dict[str, set[str]] = {}  # worker: regions
        self.jobs = 0
        self.generation = 0
        self.spent: Counter[str] = Counter()  # deaths of a worker that had started the job
        self.draining = self.unavailable = False

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Answered(client, answer):
                    key = (client, answer.job)
                    assert key in self.owed, f"{answer} answers nothing that is owed"
                    self.owed.remove(key)
                case SendWorker(worker, Lease() as lease, payload):
                    assert worker not in self.stopped, "a lease for a worker that was told to stop"
                    assert payload, "a lease without its image"
                    assert lease.alone <= (not self.held[worker]), "a suspect in company"
                    assert lease.deadline > self.now - LIMITS.deadline_s
                    self.held[worker][lease.lease] = bytes(payload[0]).decode().strip()
                case SendWorker(worker, Revoke(lease=number)):
                    assert number in self.held[worker], "revoked what the worker does not hold"
                case SendWorker(worker, OpenRegion(region=name)):
                    assert name not in self.mapped[worker], "opened twice"
                    self.mapped[worker].add(name)
                case SendWorker(worker, CloseRegion(region=name)):
                    self.mapped[worker].remove(name)
                case SendWorker(worker, Stop()):
                    assert not self.held[worker], "told to stop with leases held"
                    self.stopped.add(worker)
                case Evict(worker):
                    assert worker in self.held

    # -- clients

    @rule(
        client=CLIENTS, size=st.integers(5, 35), priority=st.integers(-1, 1), deadline_s=st.floats(1, 40), user=USERS
    )
    def submit(self, client: bytes, size: int, priority: int, deadline_s: float, user: bytes = b"") -> None:
        self.jobs += 1
        name = f"j{self.jobs}"
        message = Submit(job=name, image=Image(kind="encoded"), priority=priority, deadline_s=deadline_s)
        actions = self.broker.submit(client, message, [name.ljust(size).encode()], self.now, user)
        refused = [
            a for a in actions if isinstance(a, Answered) and isinstance(a.answer, Failed) and a.answer.job == name
        ]
        if refused:
            assert len(actions) == 1
            assert refused[0].answer.code in REFUSALS  # type: ignore[union-attr]
            return
        assert not self.draining
        assert not self.unavailable
        self.owed.add((client, name))
        self.carry_out(actions)

    @rule(client=CLIENTS, count=st.integers(2, 8))
    def submit_many(self, client: bytes, count: int) -> None:
        """Until there is no room, perhaps."""
        for _ in range(count):
            self.submit(client, 5, 0, 20.0)

    @precondition(lambda self: self.owed)
    @rule(pick=index)
    def submit_again(self, pick: int) -> None:
        client, name = sorted(self.owed)[pick % len(self.owed)]
        again = Submit(job=name, image=Image(kind="encoded"))
        assert self.broker.submit(client, again, [b"again"], self.now) == []

    @precondition(lambda self: self.owed)
    @rule(pick=index)
    def cancel(self, pick: int) -> None:
        client, name = sorted(self.owed)[pick % len(self.owed)]
        self.carry_out(self.broker.cancel(client, Cancel(job=name), self.now))
        assert (client, name) not in self.owed

    @precondition(lambda self: self.owed)
    @rule(client=CLIENTS)
    def leave(self, client: bytes) -> None:
        self.owed = {key for key in self.owed if key[0] != client}
        self.carry_out(self.broker.client_gone(client, self.now))

    @precondition(lambda self: len(self.regions) < 4)
    @rule()
    def open_region(self) -> None:
        self.jobs += 1
        memory = Memory(descriptor=7, inode=self.jobs, bytes=PAGE, seals=fcntl.F_SEAL_SHRINK, page_bytes=PAGE, pid=1)
        self.regions.add(f"r{self.jobs}")
        self.carry_out(self.broker.open_region(f"r{self.jobs}", memory))

    @precondition(lambda self: self.regions)
    @rule(pick=index)
    def end_region(self, pick: int) -> None:
        name = sorted(self.regions)[pick % len(self.regions)]
        self.regions.remove(name)
        self.carry_out(self.broker.end_region(name))

    # -- workers

    @precondition(lambda self: len(self.held) < 3)
    @rule(window=st.integers(1, 3))
    def ready(self, window: int) -> None:
        self.generation += 1
        worker = f"npu:0.{self.generation}"
        self.held[worker], self.started[worker], self.mapped[worker] = {}, set(), set()
        self.carry_out(self.broker.ready(worker, "npu:0", window, self.now))

    @precondition(lambda self: self.held)
    @rule(pick=index, window=st.integers(1, 4))
    def change_window(self, pick: int, window: int) -> None:
        worker = sorted(self.held)[pick % len(self.held)]
        before = len(self.held[worker])
        self.carry_out(self.broker.set_window(worker, window, self.now))
        assert len(self.held[worker]) <= max(before, window), "a window is overfull"

    def some_lease(self, pick: int) -> tuple[str, int]:
        every = [(worker, number) for worker, leases in sorted(self.held.items()) for number in leases]
        return every[pick % len(every)]

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def start(self, pick: int) -> None:
        worker, number = self.some_lease(pick)
        self.started[worker].add(number)
        self.carry_out(self.broker.started(worker, Started(leases=[number]), self.now))

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def finish(self, pick: int) -> None:
        worker, number = self.some_lease(pick)
        del self.held[worker][number]
        message = Finished(lease=number, width=1, height=1, timings={})
        self.carry_out(self.broker.finished(worker, message, [b"r"], self.now))

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def fail(self, pick: int) -> None:
        worker, number = self.some_lease(pick)
        del self.held[worker][number]
        message = FailedLease(lease=number, code=Code.BAD_IMAGE, reason="truncated")
        self.carry_out(self.broker.failed(worker, message, self.now))

    @rule(number=st.integers(1, 50), worker=st.sampled_from(["npu:0.1", "npu:0.2", "npu:9.9"]))
    def answer_late_or_never_asked(self, number: int, worker: str) -> None:
        if number not in self.held.get(worker, {}):
            message = Finished(lease=number, width=1, height=1, timings={})
            self.carry_out(self.broker.finished(worker, message, [b"r"], self.now))

    @precondition(lambda self: self.held)
    @rule(pick=index)
    def die(self, pick: int) -> None:
        worker = sorted(self.held)[pick % len(self.held)]
        leases = self.held.pop(worker)
        started = self.started.pop(worker)
        for number in started & leases.keys():
            self.spent[leases[number]] += 1
        before = set(self.owed)
        actions = self.broker.exited(worker, self.now, "died")
        lost = {a.answer.job for a in actions if isinstance(a, Answered)}
        assert lost <= set(leases.values()), "a job was lost that this worker did not hold"
        assert len(lost) <= 1 or all(self.spent[job] >= LIMITS.max_attempts for job in lost)
        self.carry_out(actions)
        innocent = {key for key in before if key[1] not in leases.values()}
        assert innocent <= self.owed

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def die_of_an_image(self, pick: int) -> None:
        """Likelier than by chance: a job that was started, and a worker that dies and comes back."""
        self.start(pick)
        worker, _ = self.some_lease(pick)
        self.die(sorted(self.held).index(worker))
        self.ready(window=2)

    @precondition(lambda self: self.held)
    @rule(pick=index)
    def retire(self, pick: int) -> None:
        self.carry_out(self.broker.retire(sorted(self.held)[pick % len(self.held)]))

    # -- time and state

    @rule(seconds=st.floats(0.1, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.carry_out(self.broker.expire(self.now))

    @rule(available=st.sampled_from([True] * 5 + [False]))
    def devices_come_and_go(self, available: bool) -> None:
        self.unavailable = not available
        self.carry_out(self.broker.set_available(available))
        assert available or not self.owed

    @precondition(lambda self: not self.draining)
    @rule(really=st.sampled_from([False] * 9 + [True]))  # else most histories would be over before they began
    def drain(self, really: bool) -> None:
        if really:
            self.draining = True
            self.broker.drain()

    @precondition(lambda self: self.draining)
    @rule()
    def end_drain(self) -> None:
        self.carry_out(self.broker.end_drain())
        assert not self.owed

    @invariant()
    def holds(self) -> None:
        self.broker.check()
        assert self.broker.unanswered == len(self.owed)
        assert all(self.mapped[worker] == self.regions for worker in self.held), "a worker has other regions"
        assert self.broker.leased == sum(map(len, self.held.values()))
        assert self.broker.jobs.waiting_bytes <= LIMITS.max_bytes + 3 * 3 * LIMITS.max_image_bytes

    def teardown(self) -> None:
        """Whatever happened: with one good worker, everything that is owed is answered."""
        for worker in list(self.held):
            del self.held[worker]
            self.carry_out(self.broker.exited(worker, self.now, "died"))
        self.ready(window=2)
        while any(self.held.values()):
            self.finish(0)
        assert not self.owed
        self.broker.check()


TestBroker = BrokerMachine.TestCase
TestBroker.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
