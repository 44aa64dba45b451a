"""Durable jobs under generated histories, with the real broker and the real spool on its file.

The daemon dies at any moment: what was asked of the spool and not yet done is lost with it, as kill -9 would lose it,
and what was said to nobody. Whatever happens, each accepted job is answered once, with its own answer, which stays the
same.
"""
from __future__ import annotations

import itertools
import random
import sqlite3
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendmaskd.core import durable
from blendmaskd.core.actions import DURABLE, Acquit, Answered, Dropped, Evict, Losses, Returned, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.durable import UNPROVEN_LOSSES, Durable, SendClient
from blendmaskd.core.durable_jobs import State
from blendmaskd.core.refusals import Limits
from blendmaskd.core.spool_messages import (
    AnswerKept,
    Erase,
    Erased,
    Kept,
    Look,
    Looked,
    Reply,
    Request,
    Store,
    StoreAnswer,
    Stored,
)
from blendmaskd.protocol import (
    Accepted,
    Cancel,
    Code,
    Failed,
    Fetch,
    Finished,
    Forget,
    Forgotten,
    Image,
    Lease,
    RegionError,
    Result,
    Revoke,
    Started,
    Submit,
)
from blendmaskd.shell.spool import ROW_BYTES, Spool

LIMITS = Limits(
    max_jobs=6, max_jobs_per_client=12, max_bytes=10_000, max_image_bytes=100, max_attempts=2, deadline_s=20.0,
    stall_s=1000.0,
)  # fmt: skip
CLIENTS = st.sampled_from([b"a", b"b", b"c"])
index = st.integers(0, 1000)


class StillSpool(Spool):
    """Does what it is asked only when told to, here and now."""

    def begin(self) -> list[Stored]:
        self._start = lambda: None  # type: ignore[method-assign]
        self.asked: deque[Request] = deque()
        return self.open()

    def ask(self, request: Request) -> None:
        self.asked.append(request)

    def do(self, count: int) -> list[Reply]:
        batch = [self.asked.popleft() for _ in range(min(count, len(self.asked)))]
        return [self.usage, *self._carry_out(batch)] if batch else []

    def die(self) -> None:
        self.asked.clear()
        self._db.close()


class DurableMachine(RuleBasedStateMachine):
    """Plays clients, workers, the disk and death."""

    def __init__(self) -> None:
        super().__init__()
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # hundreds of spools: no disk's time is wanted
        self.folder = tempfile.TemporaryDirectory(prefix="bmd-spool-", dir=memory)
        self.names = self.finished = 0
        self.gone: set[str] = set()  # forgotten, as a client was told
        self.images: dict[str, bytes] = {}
        self.generation = 0
        self.accepted: dict[str, bytes] = {}  # name: image; said to a client
        self.kept: dict[str, Any] = {}  # name: answer that a client was given
        self.forgotten: set[str] = set()
        self.left: set[tuple[bytes, str]] = set()  # a client that asked, and did not wait
        self.runs: Counter[str] = Counter()  # how often an answer was kept
        self.deaths: Counter[str] = Counter()  # of workers that had started it
        self.start()

    def start(self) -> None:
        self.now = 0.0
        self.available = True
        self.spool = StillSpool(Path(self.folder.name) / "spool.db", keep_s=1e6)
        stored = self.spool.begin()
        self.broker = Broker(LIMITS)
        self.durable = Durable(self.broker, 100_000, 0.0, stored, self.spool.next_seq)
        self.waiting: dict[bytes, set[str]] = {client: set() for client in (b"a", b"b", b"c")}
        self.submitting: dict[bytes, set[str]] = {client: set() for client in (b"a", b"b", b"c")}
        self.held: dict[str, dict[int, str]] = {}  # worker: lease: job

    def carry_out(self, actions: Iterable[durable.Action]) -> None:
        queue = deque(actions)
        while queue:
            queue.extend(self.does(queue.popleft()))

    def does(self, action: durable.Action) -> list[durable.Action]:
        match action:
            case Answered(owner, answer, payload) if owner == DURABLE:
                return self.durable.answered(answer, payload)
            case Answered(owner, answer, payload):
                self.receive(SendClient(owner, answer, payload))
            case SendClient():
                self.receive(action)
            case SendWorker(worker, Lease() as lease, payload, name):
                assert name
                assert lease.alone <= (not self.held[worker])
                if name in self.accepted:
                    assert bytes(payload[0]) == self.accepted[name], "another image"
                self.held[worker][lease.lease] = name
                return self.durable.leased(name)
            case SendWorker(worker, Revoke(lease=number)):
                assert number in self.held[worker]
            case Losses():
                return self.durable.lost(action.job, action.attempts, action.losses)
            case Returned():
                return self.durable.returned(action.job)
            case SendWorker() | Evict() | Acquit() | Dropped():
                pass
            case _:
                self.spool.ask(action)
        return []

    def receive(self, action: SendClient) -> None:
        """A client hears of a job."""
        message = action.message
        match message:
            case Accepted():
                self.submitting[action.client].discard(message.job)
                self.accepted.setdefault(message.job, self.images[message.job])
            case Failed(code=Code.BUSY) if message.job in self.submitting[action.client]:
                self.submitting[action.client].remove(message.job)  # whether it waits for an answer too or not
            case Result() | Failed() if message.job in self.waiting[action.client]:
                self.waiting[action.client].remove(message.job)
                if isinstance(message, Failed) and message.code is Code.UNKNOWN_JOB:
                    assert message.job not in self.accepted or message.job in self.forgotten, "an accepted job is lost"
                elif isinstance(message, Failed) and message.code is Code.CANCELLED:
                    assert message.job in self.forgotten
                else:
                    given = (message, [bytes(frame) for frame in action.payload])
                    assert message.job not in self.gone, "a forgotten job's answer"
                    assert self.kept.setdefault(message.job, given) == given, "another answer than before"
                    if isinstance(message, Result):
                        assert given[1][0].startswith(b"answer to %s," % self.images[message.job]), "another job's"
                    else:
                        assert message.code is Code.WORKER_LOST
                        assert self.deaths[message.job], "no worker died with it"
            case Failed() if message.job in self.submitting[action.client]:
                self.submitting[action.client].remove(message.job)
            case Result() | Failed():
                assert (action.client, message.job) in self.left, "an answer that nobody waits for"
            case Forgotten():
                assert message.job in self.forgotten
                self.gone.add(message.job)

    # -- clients

    @rule(client=CLIENTS, priority=st.integers(-1, 1))
    def submit(self, client: bytes, priority: int) -> None:
        self.names += 1
        name = f"{self.names:032}"
        self.images[name] = f"image {self.names}".encode()
        self.send(client, name, priority)

    @rule(client=CLIENTS, priority=st.integers(-1, 1))
    def submit_and_lease(self, client: bytes, priority: int) -> None:
        """Likelier than by chance: a job that the broker has."""
        if not self.held:
            self.ready(window=2)
        self.submit(client, priority)
        for _ in range(2):
            self.disk_catches_up()

    def send(self, client: bytes, name: str, priority: int = 0) -> None:
        message = Submit(job=name, image=Image(kind="encoded"), durable=True, priority=priority)
        image = self.images[name]
        self.submitting[client].add(name)
        self.carry_out(self.durable.submit(client, message, len(image), lambda: [image], self.now))

    @precondition(lambda self: self.names)
    @rule(client=CLIENTS, pick=index)
    def submit_again(self, client: bytes, pick: int) -> None:
        name = f"{pick % self.names + 1:032}"
        if name not in self.forgotten:
            self.send(client, name)

    @precondition(lambda self: self.names)
    @rule(client=CLIENTS, pick=index)
    def fetch(self, client: bytes, pick: int) -> None:
        name = f"{pick % self.names + 1:032}"
        if name not in self.waiting[client]:
            self.waiting[client].add(name)
            self.carry_out(self.durable.fetch(client, Fetch(job=name)))

    @precondition(lambda self: self.names)
    @rule(client=CLIENTS, pick=index)
    def stop_waiting(self, client: bytes, pick: int) -> None:
        """A `fetch` that is still open becomes one that does not wait; one that is being looked up has its answer."""
        job = self.durable.jobs.by_name.get(f"{pick % self.names + 1:032}")
        if job is not None and client in job.waiters:
            self.waiting[client].remove(job.name)
            self.submitting[client].add(job.name)
            self.carry_out(self.durable.stop_waiting(client, Cancel(job=job.name)))
            assert job.state is State.STORING or job.name not in self.submitting[client], "a fetch has no answer"

    @precondition(lambda self: self.names)
    @rule(client=CLIENTS, pick=index, really=st.sampled_from([False, False, True]))
    def forget(self, client: bytes, pick: int, really: bool) -> None:
        name = f"{pick % self.names + 1:032}"
        if really:
            self.forgotten.add(name)
            self.carry_out(self.durable.forget(client, Forget(job=name), self.now))

    @rule(client=CLIENTS)
    def leave(self, client: bytes) -> None:
        self.left |= {(client, name) for name in self.waiting[client] | self.submitting[client]}
        self.waiting[client].clear()
        self.submitting[client].clear()
        self.durable.client_gone(client)

    # -- workers

    @precondition(lambda self: len(self.held) < 2)
    @rule(window=st.integers(1, 3))
    def ready(self, window: int) -> None:
        self.generation += 1
        worker = f"npu:0.{self.generation}"
        self.held[worker] = {}
        self.carry_out(self.broker.ready(worker, "npu:0", window, self.now))
        self.carry_out(self.durable.feed())

    def some_lease(self, pick: int) -> tuple[str, int]:
        every = [(worker, number) for worker, leases in sorted(self.held.items()) for number in leases]
        return every[pick % len(every)]

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def start_lease(self, pick: int) -> None:
        worker, number = self.some_lease(pick)
        self.carry_out(self.broker.started(worker, Started(leases=[number]), self.now))

    @precondition(lambda self: any(self.held.values()))
    @rule(pick=index)
    def finish(self, pick: int) -> None:
        worker, number = self.some_lease(pick)
        name = self.held[worker].pop(number)
        message = Finished(lease=number, width=1, height=1, timings={})
        self.finished += 1
        answer = b"answer to %s, number %d" % (self.images[name], self.finished)
        self.carry_out(self.broker.finished(worker, message, [answer], self.now))

    @precondition(lambda self: self.held)
    @rule(pick=index)
    def worker_dies(self, pick: int) -> None:
        worker = sorted(self.held)[pick % len(self.held)]
        for name in self.held.pop(worker).values():
            self.deaths[name] += 1
        self.carry_out(self.broker.exited(worker, self.now, "died"))

    @rule(available=st.sampled_from([True, True, False]))
    def devices_come_and_go(self, available: bool) -> None:
        self.available = available
        self.carry_out(self.broker.set_available(available))
        self.carry_out(self.durable.feed())

    # -- the disk, and death

    @precondition(lambda self: self.spool.asked)
    @rule(count=st.integers(1, 5))
    def disk(self, count: int) -> None:
        for reply in self.spool.do(count):
            if isinstance(reply, AnswerKept) and reply.seq in self.durable.jobs.by_seq:  # else it was forgotten
                name = self.durable.jobs.by_seq[reply.seq].name
                self.runs[name] += 1
                assert self.runs[name] == 1, "answered twice"
            self.carry_out(self.durable.replied(reply, self.now))

    @rule()
    def disk_catches_up(self) -> None:
        for _ in range(len(self.spool.asked)):
            self.disk(1)

    @rule()
    def the_daemon_dies(self) -> None:
        for leases in self.held.values():
            for name in leases.values():
                self.deaths[name] += 1
        self.spool.die()
        self.start()

    @invariant()
    def holds(self) -> None:
        self.durable.check()
        self.broker.check()
        queued = {job.name for job in self.durable.jobs if job.state is State.QUEUED}
        assert queued == self.broker.jobs.account(DURABLE).jobs.keys(), "the broker has other jobs"
        assert self.durable._looks == sum(isinstance(asked, Look) for asked in self.spool.asked)
        assert self.durable._erasures == Counter(each.client for each in self.spool.asked if isinstance(each, Erase))
        assert self.available or not self.broker.unanswered, "a job waits for no device"

    def teardown(self) -> None:
        """Whatever happened: with a good worker and disk all accepted jobs can be fetched, after one more death too."""
        try:
            self.devices_come_and_go(available=True)
            while self.held:
                self.worker_dies(0)
            self.ready(window=2)
            self.finish_all()
            assert not self.durable.jobs
            usage = self.spool.usage
            self.the_daemon_dies()
            assert self.spool.usage == usage, "bytes or answers are miscounted"
            assert not self.durable.jobs, "an answer was not kept"
            self.finish_all()
            self.spool.die()
        finally:
            self.folder.cleanup()

    def finish_all(self) -> None:
        """Do whatever there is to do, and fetch all answers."""
        for _ in range(1000):
            if self.spool.asked:
                self.disk(5)
            elif any(self.held.values()):
                self.finish(0)
        got = self.kept
        self.kept = {}
        for name in self.accepted.keys() - self.forgotten:
            self.waiting[b"a"].add(name)
            self.carry_out(self.durable.fetch(b"a", Fetch(job=name)))
            self.disk(5)
        assert self.kept.keys() == self.accepted.keys() - self.forgotten, "an accepted job is not answered"
        assert all(got.get(name, answer) == answer for name, answer in self.kept.items()), "another answer than before"


def test_nobody_is_told_what_is_not_on_the_disk() -> None:
    machine = DurableMachine()
    machine.ready(window=1)
    machine.submit(client=b"a", priority=0)
    machine.fetch(client=b"b", pick=0)
    assert not machine.accepted
    machine.disk(1)
    assert machine.accepted
    machine.disk_catches_up()
    machine.finish(0)
    assert not machine.kept
    machine.disk_catches_up()
    assert machine.kept
    machine.teardown()


@pytest.mark.parametrize("pushing", [0, 9])
def test_owners_take_turns_and_leave_each_other_room(pushing: int) -> None:
    machine = DurableMachine()
    for client in (b"a", b"a", b"a", b"b"):
        machine.submit(client=client, priority=pushing if client == b"a" else 0)
    machine.disk_catches_up()
    machine.ready(window=1)
    machine.disk_catches_up()
    order = []
    for _ in range(4):
        order += [int(name) for leases in machine.held.values() for name in leases.values()]
        machine.finish(0)
        machine.disk_catches_up()
    assert order == [1, 4, 2, 3]
    answers = machine.durable.usage.owners[b"a"]
    machine.durable.max_bytes = machine.durable.usage.bytes + 40 + (answers + 40 + 6) // 7
    owned = Submit(job="9" * 32, image=Image(kind="encoded"), durable=True)
    (stored,) = machine.durable.submit(b"a", owned, 40, lambda: [bytes(40)], 0.0)
    assert isinstance(stored, Store)
    (refused,) = machine.durable.submit(b"a", msgspec.structs.replace(owned, job="8" * 32), 40, lambda: [b""], 0.0)
    assert "the last ones are reserved for others" in refused.answer.reason
    (stored,) = machine.durable.submit(b"b", msgspec.structs.replace(owned, job="7" * 32), 40, lambda: [b""], 0.0)
    assert isinstance(stored, Store)
    machine.spool.die()
    machine.folder.cleanup()


def test_a_job_whose_image_cannot_be_read_is_refused_and_not_kept() -> None:
    def unreadable() -> list[bytes]:
        raise RegionError("region 'r': Input/output error")

    durable = Durable(Broker(LIMITS), max_bytes=1000)
    job = Submit(job="9" * 32, image=Image(kind="encoded"), durable=True)
    (refused,) = durable.submit(b"a", job, 40, unreadable, 0.0)
    assert refused.answer == Failed(job=job.job, code=Code.BAD_REQUEST, reason="region 'r': Input/output error")
    durable.check()
    assert len(durable.jobs) == 0


@pytest.mark.parametrize(
    ("limits", "taken", "complaint"),
    [
        ({"max_jobs_per_client": 3}, 3,
         "this client has 3 unanswered durable jobs, the maximum for one client (queue.max_jobs_per_client)"),
        ({"max_bytes_per_client": 90}, 2,
         "this client has 80 unanswered bytes, the maximum for one client is 90 (queue.max_bytes_per_client)"),
        ({"max_jobs": 16, "max_jobs_per_client": 16}, 14,
         "this client has 14 jobs being written to the spool: the last places are reserved for others"),
    ],
)
def test_one_owner_has_no_more_than_one_may(limits: dict[str, int], taken: int, complaint: str) -> None:
    core = Broker(msgspec.structs.replace(LIMITS, **limits))
    jobs = Durable(core, 1_000_000)

    def submit(client: bytes, number: int) -> Any:
        message = Submit(job=f"{number:032}", image=Image(kind="encoded"), durable=True)
        (action,) = jobs.submit(client, message, 40, lambda: [bytes(40)], 0.0)
        return action

    stored = [submit(b"a", number) for number in range(taken)]
    assert all(isinstance(action, Store) for action in stored)
    refused = submit(b"a", 100).answer
    assert (refused.code, refused.reason) == (Code.BUSY, complaint)
    assert isinstance(submit(b"b", 200), Store), "another one may"
    for number, action in enumerate(stored):
        jobs.forget(b"a", Forget(job=action.job.name), 0.0)
        jobs.check()
        assert isinstance(submit(b"a", 300 + number), Store)


@pytest.mark.parametrize("ask", ["fetch", "forget"])
def test_what_is_asked_of_the_spool_is_bounded_and_no_client_takes_it_all(ask: str) -> None:
    jobs = Durable(Broker(LIMITS), 1_000_000)

    def asked(client: bytes, number: int) -> list[durable.Action]:
        name = f"{number:032}"
        return jobs.fetch(client, Fetch(job=name)) if ask == "fetch" else jobs.forget(client, Forget(job=name), 0.0)

    def refused(actions: list[durable.Action]) -> bool:
        return any(isinstance(each, SendClient) and each.message.code is Code.BUSY for each in actions)

    taken = [number for number in range(2000) if not refused(asked(b"a", number))]
    assert 800 < len(taken) < 900
    assert not refused(asked(b"b", 2001)), "another one may"
    replies = [Looked(b"a", "x", None, ()), Erased(b"a", "x")]
    for _ in range(10):
        jobs.replied(replies[ask == "forget"], 0.0)
    assert not refused(asked(b"a", 2002))


def with_an_answer(path: Path, keep_s: float) -> StillSpool:
    """A spool of one job, which is answered."""
    spool = StillSpool(path, keep_s)
    spool.begin()
    message = Submit(job="1" * 32, image=Image(kind="encoded"), durable=True)
    spool.ask(Store(Stored(seq=1, name=message.job, owner=b"a", priority=0, size=3), message, [b"abc"]))
    spool.ask(StoreAnswer(1, Failed(job=message.job, code=Code.BAD_IMAGE, reason="no image"), ()))
    spool.do(2)
    return spool


def test_answers_are_dropped_by_the_spool_s_own_clock(tmp_path: Path) -> None:
    """It stands while no daemon runs, and does not follow the host's."""
    spool = with_an_answer(tmp_path / "spool.db", keep_s=100.0)
    spool._opened -= 60.0
    spool._expire()
    spool.die()
    assert spool.usage.answers == 1
    spool = StillSpool(tmp_path / "spool.db", keep_s=100.0)
    assert spool.begin() == []
    spool._opened -= 30.0
    spool._expire()
    assert spool.usage.answers == 1
    spool._opened -= 11.0
    spool._expire()
    assert (spool.usage.answers, spool.usage.bytes) == (0, 0)
    spool.die()


def test_one_s_high_priorities_hold_up_no_other() -> None:
    machine = DurableMachine()
    machine.broker.refusals.limits = msgspec.structs.replace(LIMITS, max_jobs=60)  # of which many wait in the broker
    for priority, client in [(9, b"a")] * 6 + [(0, b"b")] * 2:
        machine.submit(client=client, priority=priority)
        machine.disk_catches_up()
    machine.ready(window=2)
    machine.disk_catches_up()
    begun: list[int] = []
    for _ in range(4):
        begun += [int(name) for leases in machine.held.values() for name in leases.values()]
        machine.finish(0)
        machine.disk_catches_up()
    assert list(dict.fromkeys(begun)) == [1, 7, 2, 8, 3]
    machine.teardown()


def test_a_client_that_leaves_costs_no_look_at_the_jobs_of_others() -> None:
    def calls(jobs: int) -> int:
        stored = [Stored(number, f"{number:032}", b"other", 0, 1) for number in range(1, jobs + 1)]
        many = Durable(Broker(LIMITS), 1 << 20, stored=stored)
        many.fetch(b"leaving", Fetch(job=stored[-1].name))
        events: list[str] = []
        sys.setprofile(lambda frame, event, argument: events.append(event))
        many.client_gone(b"leaving")
        sys.setprofile(None)
        many.check()
        assert not many.jobs.owed(b"leaving")
        return len(events)

    assert calls(1000) == calls(1)


def test_all_that_is_written_counts_until_it_is_dropped(tmp_path: Path) -> None:
    spool = with_an_answer(tmp_path / "spool.db", keep_s=1e6)
    row = spool._db.execute("SELECT length(submit) + length(answer) FROM jobs").fetchone()
    assert row[0] > 0
    assert spool.usage.bytes >= row[0] + ROW_BYTES
    assert spool.usage.owners == {b"a": spool.usage.bytes}
    spool.die()
    again = StillSpool(tmp_path / "spool.db", keep_s=1e6)
    again.begin()
    assert again.usage == spool.usage
    again._carry_out([Erase(b"a", again._db.execute("SELECT name FROM jobs").fetchone()[0])])
    assert again.usage.bytes == 0
    assert again.usage.owners == {}
    again.die()


def test_what_cannot_be_dropped_is_still_counted(tmp_path: Path) -> None:
    spool = with_an_answer(tmp_path / "spool.db", keep_s=1.0)
    before = spool.usage
    spool._opened -= 60.0
    spool._db.execute("CREATE TEMP TRIGGER full BEFORE UPDATE ON clock BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(sqlite3.Error, match="disk is full"), spool._commit(synchronous=False):
        spool._expire()
    assert spool.usage == before
    spool.die()


@pytest.mark.parametrize("most", [5_000, 400_000, 2_000_000])
def test_jobs_that_fill_the_disk_leave_room_for_answers_and_to_forget_them(
    small_disk: Any, tmp_path: Path, most: int
) -> None:
    spool, draw = StillSpool(small_disk(tmp_path / "disk", "16m") / "spool.db", keep_s=1e6), random.Random(most)
    spool.begin()
    numbers = itertools.count(1)
    for _ in range(3):
        seqs = list(itertools.takewhile(lambda seq: stores(spool, seq, draw.randrange(most)), numbers))
        assert spool.usage.bytes > most
        for seq in seqs:
            answer = Result(job=f"{seq:032}", width=1, height=1, device="npu:0", timings={})
            replies = spool._carry_out([StoreAnswer(seq, answer, [draw.randbytes(draw.randrange(most // 2))])])
            assert replies == [AnswerKept(seq)]
        for seq in seqs:
            assert spool._carry_out([Erase(b"a", f"{seq:032}")]) == [Erased(b"a", f"{seq:032}")]
        assert spool.usage.bytes == 0
    spool.die()


def stores(spool: Spool, seq: int, size: int) -> bool:
    message = Submit(job=f"{seq:032}", image=Image(kind="encoded"), durable=True)
    stored = Stored(seq=seq, name=message.job, owner=b"a", priority=0, size=size)
    return spool._carry_out([Store(stored, message, [bytes(size)])]) == [Kept(seq)]


@pytest.mark.parametrize("first", [True, False], ids=["its worker dies first", "at once"])
def test_an_image_that_takes_the_daemon_down_is_given_up_in_the_end(first: bool) -> None:
    machine = DurableMachine()
    machine.submit(client=b"a", priority=0)
    lives = 0
    while not machine.spool.usage.answers:
        lives += 1
        assert lives <= (LIMITS.max_attempts if first else UNPROVEN_LOSSES + LIMITS.max_attempts) + 1
        machine.ready(window=2)
        while machine.spool.asked:
            machine.disk(5)
        if first and any(machine.held.values()):
            machine.worker_dies(0)
            machine.disk(5)
        machine.the_daemon_dies()
    machine.fetch(client=b"b", pick=0)
    machine.disk(1)
    ((answer, payload),) = machine.kept.values()
    assert (answer.code, payload) == (Code.WORKER_LOST, [])
    machine.teardown()


TestDurable = DurableMachine.TestCase
TestDurable.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
