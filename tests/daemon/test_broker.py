"""The broker by example: one history per rule."""
from __future__ import annotations

import fcntl
import weakref
from typing import Any

import msgspec
import pytest

from blendmaskd.core.actions import Acquit, Action, Answered, Dropped, Evict, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.refusals import Limits
from blendmaskd.core.regions import PAGE, Memory
from blendmaskd.protocol import (
    Cancel,
    Code,
    Failed,
    FailedLease,
    Finished,
    Image,
    Lease,
    Place,
    Result,
    Revoke,
    Started,
    Stop,
    Submit,
)

LIMITS = Limits(
    max_jobs=4, max_bytes=1000, max_image_bytes=500, max_attempts=2, deadline_s=10.0, stall_s=5.0, paths_allowed=False
)
ANSWER = [b"detections"]


def submit(
    broker: Broker, job: str, now: float = 0.0, client: bytes = b"c", size: int = 10, user: bytes = b"", **fields: Any
) -> list[Action]:
    message = Submit(job=job, image=Image(kind="encoded"), **fields)
    actions = broker.submit(client, message, [job.encode().ljust(size, b"x")], now, user)  # an image of its own
    broker.check()
    return actions


def leases(actions: list[Action]) -> list[tuple[str, int]]:
    """Worker and number of each lease among the actions."""
    return [(a.worker, a.message.lease) for a in actions if isinstance(a, SendWorker) and isinstance(a.message, Lease)]


def answers(actions: list[Action]) -> dict[str, Result | Failed]:
    return {a.answer.job: a.answer for a in actions if isinstance(a, Answered)}


def finish(broker: Broker, worker: str, lease: int, now: float = 1.0) -> list[Action]:
    message = Finished(lease=lease, width=2, height=1, timings={"device": 0.02})
    actions = broker.finished(worker, message, ANSWER, now)
    broker.check()
    return actions


def lose(broker: Broker, worker: str, now: float = 1.0) -> list[Action]:
    actions = broker.exited(worker, now, f"{worker} killed by SIGKILL")
    broker.check()
    return actions


@pytest.fixture
def broker() -> Broker:
    return Broker(LIMITS)


def with_workers(broker: Broker, *names: str, window: int = 2) -> Broker:
    for name in names:
        broker.ready(name, name.partition(".")[0], window, 0.0)
    return broker


def test_a_job_is_leased_finished_and_answered(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    [lease] = [a for a in submit(broker, "a") if isinstance(a, SendWorker)]
    assert (lease.worker, lease.payload) == ("npu:0.1", [b"axxxxxxxxx"])
    broker.started("npu:0.1", Started(leases=[lease.message.lease]), 0.5)  # type: ignore[union-attr]
    [answer] = finish(broker, "npu:0.1", lease.message.lease, now=2.0)  # type: ignore[union-attr]
    timings = {"device": 0.02, "queue": 0.0, "send": 1.98, "total": 2.0}
    assert answer == Answered(b"c", Result(job="a", width=2, height=1, device="npu:0", timings=timings), ANSWER)
    assert (broker.unanswered, broker.leased) == (0, 0)


class Frame(bytearray):
    """Bytes that can be watched; no test may keep them."""


@pytest.mark.parametrize("end", ["answer", "cancel", "client gone"])
def test_an_image_is_let_go_with_its_answer_however_far_its_deadline(broker: Broker, end: str) -> None:
    frame = Frame(10)
    watched = weakref.ref(frame)
    broker.submit(b"c", Submit(job="a", image=Image(kind="encoded"), deadline_s=3600), [frame], 0.0)
    del frame
    assert watched() is not None
    match end:
        case "answer":
            [(_, number)] = leases(broker.ready("npu:0.1", "npu:0", 1, 0.0))
            finish(broker, "npu:0.1", number)
        case "cancel":
            broker.cancel(b"c", Cancel(job="a"), 0.0)
        case _:
            broker.client_gone(b"c", 0.0)
    assert watched() is None


def test_images_in_shared_memory_count_as_sent_ones_do(broker: Broker) -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, shared_memory_bytes=1 << 20))
    memory = Memory(descriptor=7, inode=1, bytes=4096, seals=fcntl.F_SEAL_SHRINK, page_bytes=PAGE, pid=1)
    broker.open_region("r", memory)

    def submit_place(job: str, size: int) -> dict[str, Result | Failed]:
        image = Image(kind="encoded", place=Place(region="r", offset=0, bytes=size))
        return answers(broker.submit(job.encode(), Submit(job=job, image=image), [], 0.0))

    assert submit_place("large", 501)["large"].code is Code.TOO_LARGE  # type: ignore[union-attr]
    assert submit_place("a", 500) == submit_place("b", 400) == {}
    assert broker.jobs.waiting_bytes == 900
    assert submit_place("c", 200)["c"].code is Code.BUSY  # type: ignore[union-attr]
    broker.check()


def test_windows_fill_least_loaded_first_then_jobs_wait(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", "npu:1.1")
    given = [worker for job in "abcdef" for worker, _ in leases(submit(broker, job))]
    assert given == ["npu:0.1", "npu:1.1", "npu:0.1", "npu:1.1"]
    assert broker.jobs.waiting_jobs == 2


def test_priority_first_then_arrival(broker: Broker) -> None:
    for job, priority in [("low", -1), ("first", 0), ("second", 0), ("high", 9)]:
        submit(broker, job, priority=priority)
    given = []
    actions = broker.ready("npu:0.1", "npu:0", 1, 0.0)
    while leases(actions):
        [(worker, lease)] = leases(actions)
        actions = finish(broker, worker, lease)
        given += list(answers(actions))
    assert given == ["high", "first", "second", "low"]


def serve_all(broker: Broker, actions: list[Action]) -> list[str]:
    """Finish one lease after the other, all in one worker, until nothing waits; the jobs in their order."""
    given = []
    held = leases(actions)
    while held:
        [(worker, lease), *held] = held
        actions = finish(broker, worker, lease)
        given += list(answers(actions))
        held += leases(actions)
    return given


@pytest.mark.parametrize("user", [b"", b"of all"])
def test_clients_take_turns_whatever_each_has_waiting(user: bytes) -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, max_jobs=100))
    for number in range(6):
        submit(broker, f"a{number}", client=b"a", user=user)
    for client in (b"b", b"c"):
        for number in range(2):
            submit(broker, f"{client.decode()}{number}", client=client, user=user)
    given = serve_all(broker, broker.ready("npu:0.1", "npu:0", 1, 0.0))
    assert given == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3", "a4", "a5"]


def test_a_client_can_step_back_but_not_push_in(broker: Broker) -> None:
    for job, client, priority in [("a9", b"a", 9), ("a8", b"a", 8), ("b0", b"b", 0), ("c-1", b"c", -1)]:
        submit(broker, job, client=client, priority=priority)
    assert serve_all(broker, broker.ready("npu:0.1", "npu:0", 1, 0.0)) == ["a9", "b0", "a8", "c-1"]


def test_when_a_worker_died_what_still_waited_keeps_its_turn() -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, max_jobs=100))
    with_workers(broker, "npu:0.1")
    for job in ("a0", "a1", "a2"):
        submit(broker, job, client=b"a")
    submit(broker, "b0", client=b"b")
    lose(broker, "npu:0.1")
    assert serve_all(broker, broker.ready("npu:0.2", "npu:0", 1, 0.0)) == ["a0", "a1", "b0", "a2"], "after suspects"


@pytest.mark.parametrize("unit", ["jobs", "bytes"])
def test_one_client_leaves_room_for_the_next(unit: str) -> None:
    size = 10 if unit == "jobs" else 100
    bounds = {"max_jobs": 64} if unit == "jobs" else {"max_jobs": 1000, "max_bytes": 6400}
    broker = Broker(msgspec.structs.replace(LIMITS, **bounds))
    taken = {}
    for client in (b"a", b"b", b"c"):
        replies = [answers(submit(broker, f"{number}", client=client, size=size)) for number in range(64)]
        taken[client] = replies.index(next(filter(None, replies)))
        [refusal] = next(filter(None, replies)).values()
        assert isinstance(refusal, Failed)
        assert (refusal.code, unit in refusal.reason, refusal.retry_after_s) == (Code.BUSY, True, 1.0)
    assert taken == {b"a": 56, b"b": 7, b"c": 1}


def test_one_clients_own_bounds_count_what_is_on_a_device_too() -> None:
    limits = msgspec.structs.replace(LIMITS, max_jobs=100, max_jobs_per_client=3, max_bytes_per_client=100)
    broker = with_workers(Broker(limits), "npu:0.1")
    for job in ("1", "2", "3"):
        submit(broker, job)
    refusal = answers(submit(broker, "4"))["4"]
    assert isinstance(refusal, Failed)
    assert refusal.code is Code.BUSY
    assert refusal.reason == "this client has 3 unanswered jobs, the maximum for one client"
    submit(broker, "large", client=b"other", size=500)  # its only one: how large one may be is another bound
    refusal = answers(submit(broker, "more", client=b"other", size=1))["more"]
    assert isinstance(refusal, Failed)
    assert (refusal.code, refusal.reason) == (
        Code.BUSY, "this client has 500 unanswered bytes, the maximum for one client is 100"
    )  # fmt: skip


def leased_ahead(actions: list[Action]) -> list[bool]:
    return [a.message.ahead for a in actions if isinstance(a, SendWorker) and isinstance(a.message, Lease)]


def test_a_client_with_nothing_on_a_device_goes_ahead_of_one_with_several() -> None:
    broker = with_workers(Broker(msgspec.structs.replace(LIMITS, max_jobs=100)), "npu:0.1", "npu:1.1")
    for number in range(10):
        assert True not in leased_ahead(submit(broker, f"a{number}", client=b"a"))
    assert leased_ahead(submit(broker, "b0", client=b"b")) == [True]  # beyond the window
    assert leased_ahead(submit(broker, "b1", client=b"b")) == []  # it has one by now
    assert leased_ahead(submit(broker, "c-1", client=b"c", priority=-1)) == []  # steps back
    assert leased_ahead(submit(broker, "d0", client=b"d")) == [True]  # the other worker's place beyond the window
    assert leased_ahead(submit(broker, "e0", client=b"e")) == []  # there is no third
    assert broker.leased == 6


def test_nobody_gets_more_by_being_many_clients() -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, max_jobs=1000, max_bytes=100_000))
    taken = [submit(broker, "m", client=b"%d" % number, user=b"many") for number in range(1000)]
    refused = [next(iter(answers(actions).values())) for actions in taken if answers(actions)]
    assert 900 < len(taken) - len(refused) < 1000, "the last places are others'"
    assert isinstance(refused[0], Failed)
    assert refused[0].reason.startswith("all clients of this user have")
    for number in range(2):
        assert answers(submit(broker, f"one{number}", client=b"x", user=b"one")) == {}
    assert serve_all(broker, broker.ready("npu:0.1", "npu:0", 1, 0.0))[:5] == ["m", "one0", "m", "one1", "m"]


def test_a_user_with_nothing_on_a_device_goes_ahead_of_one_with_several() -> None:
    broker = with_workers(Broker(msgspec.structs.replace(LIMITS, max_jobs=100)), "npu:0.1")
    for number in range(10):
        assert True not in leased_ahead(submit(broker, "m", client=b"%d" % number, user=b"many"))
    assert leased_ahead(submit(broker, "m", client=b"new", user=b"many")) == []
    assert leased_ahead(submit(broker, "one", client=b"x", user=b"one")) == [True]


def test_clients_with_one_job_each_are_all_alike(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    for client in (b"a", b"b", b"c"):
        assert True not in leased_ahead(submit(broker, "only", client=client))
    assert broker.leased == 2


def test_nothing_goes_ahead_into_a_worker_that_is_kept_for_a_suspect() -> None:
    broker = with_workers(Broker(msgspec.structs.replace(LIMITS, max_jobs=100)), "npu:0.1")
    [(worker, lease)] = leases(submit(broker, "killer", client=b"a"))
    broker.started(worker, Started(leases=[lease]), 0.0)
    broker.ready("npu:1.1", "npu:1", 2, 0.0)
    for number in range(4):
        submit(broker, f"a{number}", client=b"a")
    lose(broker, worker)
    assert leased_ahead(submit(broker, "b0", client=b"b")) == []
    assert broker.leased == 2


@pytest.mark.parametrize(
    ("fill", "size", "code"),
    [(4, 10, Code.BUSY), (1, 450, Code.BUSY), (0, 501, Code.TOO_LARGE)],
    ids=["jobs", "bytes", "one image"],
)
def test_over_a_bound_the_answer_is_at_once(broker: Broker, fill: int, size: int, code: Code) -> None:
    for number in range(fill):
        submit(broker, f"waiting {number}", size=10 if size == 10 else 100)
    if code is Code.BUSY and size == 450:
        submit(broker, "more", size=460)
    [action] = submit(broker, "over", size=size)
    assert isinstance(action, Answered)
    refusal = action.answer
    assert isinstance(refusal, Failed)
    assert (refusal.job, refusal.code) == ("over", code)
    assert (refusal.retry_after_s is not None) == code.retryable


def test_busy_names_when_half_the_queue_will_be_gone(broker: Broker) -> None:
    """Two leases of 0.2 s at a time are 10 jobs a second."""
    with_workers(broker, "npu:0.1")
    busy_for_0_2_s(broker, now=0.0)
    assert retry_after_s(broker, now=0.3) == pytest.approx(0.2)


def test_an_idle_hour_does_not_slow_what_busy_names(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    for hour in range(3):
        busy_for_0_2_s(broker, now=3600.0 * hour)
    assert retry_after_s(broker, now=3600.0 * 3) == pytest.approx(0.2)


def test_what_busy_names_follows_the_last_answers(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    busy_for_0_2_s(broker, now=0.0)
    for number in range(1, 100):
        [(_, lease)] = leases(submit(broker, "slower", now=float(number)))
        finish(broker, "npu:0.1", lease, now=number + 0.4)
    assert retry_after_s(broker, now=200.0) == pytest.approx(0.4, rel=0.01)


def test_while_nothing_was_served_busy_names_a_second(broker: Broker) -> None:
    assert retry_after_s(broker, now=0.0) == 1.0


def busy_for_0_2_s(broker: Broker, now: float) -> None:
    held = [lease for job in "ab" for _, lease in leases(submit(broker, job, now=now))]
    for lease in held:
        finish(broker, "npu:0.1", lease, now=now + 0.2)


def retry_after_s(broker: Broker, now: float) -> float | None:
    """As `busy` names it, with two jobs on a device, or four waiting where there is none."""
    while (refusal := answers(submit(broker, f"{broker.unanswered}", now=now))) == {}:
        pass
    [busy] = refusal.values()
    assert isinstance(busy, Failed)
    return busy.retry_after_s


def test_a_repeated_submit_of_a_live_job_changes_nothing(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    [(_, lease)] = leases(submit(broker, "a"))
    assert submit(broker, "a") == []
    assert leases(submit(broker, "a", client=b"other"))
    assert list(answers(finish(broker, "npu:0.1", lease))) == ["a"]


def test_paths_are_refused_where_none_is_allowed(broker: Broker) -> None:
    message = Submit(job="p", image=Image(kind="path", path="/etc/passwd"))
    refusal = answers(broker.submit(b"c", message, [], 0.0))["p"]
    assert isinstance(refusal, Failed)
    assert refusal.code is Code.BAD_REQUEST


def test_the_deadline_answers_in_the_queue_and_on_the_device(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=1)
    [(_, lease)] = leases(submit(broker, "on the device", deadline_s=1.0))
    submit(broker, "in the queue", deadline_s=2.0)
    assert broker.next_deadline() == 1.0
    late = broker.expire(1.0)
    assert answers(late)["on the device"].code is Code.TIMEOUT  # type: ignore[union-attr]
    assert SendWorker("npu:0.1", Revoke(lease=lease)) in late
    assert broker.next_deadline() == 2.0
    assert answers(broker.expire(2.0))["in the queue"].code is Code.TIMEOUT  # type: ignore[union-attr]
    assert answers(finish(broker, "npu:0.1", lease)) == {}, "a late result is dropped"


def test_a_timeout_names_the_deadline_however_short(broker: Broker) -> None:
    submit(broker, "a", deadline_s=0.002)
    failed = answers(broker.expire(0.0021))["a"]
    assert isinstance(failed, Failed)
    assert failed.reason == "the deadline passed 0.002 s after it arrived, in the queue"


def test_a_window_that_grows_is_filled_and_one_that_shrinks_runs_empty(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=1)
    held = [number for job in "abcd" for _, number in leases(submit(broker, job))]
    assert len(held) == 1
    held += [number for _, number in leases(broker.set_window("npu:0.1", 3, 0.5))]
    broker.check()
    assert len(held) == 3
    assert broker.set_window("npu:0.1", 1, 0.6) == []
    assert [leases(finish(broker, "npu:0.1", number)) != [] for number in held] == [False, False, True]
    assert broker.set_window("nobody", 2, 0.7) == []


def test_a_revoked_lease_fills_the_window_until_the_worker_ends_it(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=1)
    [(_, lease)] = leases(submit(broker, "a"))
    broker.cancel(b"c", Cancel(job="a"), 0.5)
    assert leases(submit(broker, "b")) == []
    freed = broker.failed("npu:0.1", FailedLease(lease=lease, code=Code.CANCELLED, reason="revoked"), 1.0)
    assert leases(freed)
    assert answers(freed) == {}


def test_cancel_answers_once_and_only_what_is_unanswered(broker: Broker) -> None:
    submit(broker, "a")
    assert answers(broker.cancel(b"c", Cancel(job="a"), 0.0))["a"].code is Code.CANCELLED  # type: ignore[union-attr]
    assert broker.cancel(b"c", Cancel(job="a"), 0.0) == []
    assert broker.cancel(b"stranger", Cancel(job="a"), 0.0) == []


def test_a_client_that_left_is_not_worked_for(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=1)
    [(_, lease)] = leases(submit(broker, "leased"))
    submit(broker, "waiting")
    submit(broker, "stays", client=b"other")
    actions = broker.client_gone(b"c", 1.0)
    broker.check()
    dropped = [Dropped("leased", Code.CANCELLED), Dropped("waiting", Code.CANCELLED)]
    assert actions == [dropped[0], SendWorker("npu:0.1", Revoke(lease=lease)), dropped[1]]
    assert broker.jobs.waiting_jobs == 1


def test_a_dead_workers_jobs_go_to_the_other_in_their_order(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=3)
    for job in "abc":
        submit(broker, job)
    submit(broker, "d")
    lose(broker, "npu:0.1")
    assert serve_all(broker, broker.ready("npu:1.1", "npu:1", 4, 1.0)) == list("abcd")


def test_a_job_that_was_started_is_tried_again_alone_then_given_up(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    poison = leases(submit(broker, "poison"))[0][1]
    submit(broker, "mate")
    broker.started("npu:0.1", Started(leases=[poison]), 0.5)
    lose(broker, "npu:0.1")
    first = broker.ready("npu:0.2", "npu:0", 2, 1.0)
    broker.check()
    [lease] = [a.message for a in first if isinstance(a, SendWorker)]
    assert isinstance(lease, Lease)
    assert lease.alone
    assert broker.holds_suspect("npu:0.2")
    assert leases(submit(broker, "later")) == [], "nothing keeps a suspect company"
    broker.started("npu:0.2", Started(leases=[lease.lease]), 1.5)
    given_up = answers(lose(broker, "npu:0.2"))["poison"]
    assert isinstance(given_up, Failed)
    assert given_up.code is Code.WORKER_LOST
    assert "npu:0.2 killed by SIGKILL" in given_up.reason
    third = broker.ready("npu:0.3", "npu:0", 2, 2.0)
    assert not broker.holds_suspect("npu:0.3")
    assert list(answers(finish(broker, *leases(third)[0]))) == ["mate"]


def test_a_suspect_waits_for_a_worker_that_is_emptied_for_it(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", "npu:1.1")
    numbers = dict(leases(submit(broker, "a")) + leases(submit(broker, "b")))
    (_, second_of_1) = leases([*submit(broker, "c"), *submit(broker, "d")])[1]
    broker.started("npu:0.1", Started(leases=[numbers["npu:0.1"]]), 0.5)
    lose(broker, "npu:0.1")
    submit(broker, "e")
    assert leases(finish(broker, "npu:1.1", numbers["npu:1.1"])) == [], "it is left to empty"
    [(worker, suspect)] = leases(finish(broker, "npu:1.1", second_of_1))
    assert worker == "npu:1.1"
    assert leases(finish(broker, worker, suspect)), "then the others go on"


def test_an_image_that_kills_before_it_starts_costs_no_more_workers_than_another(broker: Broker) -> None:
    submit(broker, "kills the decoder")
    submit(broker, "mate")
    lost = 0
    outcome: dict[str, Any] = {}
    while not outcome:
        lost += 1
        assert lost < 10
        with_workers(broker, f"npu:0.{lost}")
        outcome = answers(lose(broker, f"npu:0.{lost}"))
    assert {job: answer.code for job, answer in outcome.items()} == {"kills the decoder": Code.WORKER_LOST}
    assert lost == LIMITS.max_attempts, "one in company, one alone"
    [(_, lease)] = leases(broker.ready("npu:0.3", "npu:0", 2, 1.0))
    assert isinstance(answers(finish(broker, "npu:0.3", lease))["mate"], Result)


def test_the_only_lease_of_a_worker_that_dies_counts_as_started(broker: Broker) -> None:
    submit(broker, "poison")
    for life in (1, 2):
        with_workers(broker, f"npu:0.{life}")
        outcome = answers(lose(broker, f"npu:0.{life}"))
    assert outcome["poison"].code is Code.WORKER_LOST


# -- images that kill, see daemon/blendmaskd/core/suspects.py ----------------------------------------------------------


def submit_image(
    broker: Broker, job: str, image: bytes = b"poison", now: float = 0.0, client: bytes = b"c"
) -> list[Action]:
    actions = broker.submit(client, Submit(job=job, image=Image(kind="encoded")), [image], now)
    broker.check()
    return actions


def given_up(broker: Broker, now: float = 1.0) -> Broker:
    """A broker that has given up the image `poison`, with workers on two devices."""
    submit_image(broker, "first")
    for life in (1, 2):
        with_workers(broker, f"npu:{life}.1")
        lose(broker, f"npu:{life}.1", now)
    return with_workers(broker, "npu:0.9", "npu:1.9")


def test_an_image_that_was_given_up_is_refused_at_once_under_any_name_for_ten_minutes(broker: Broker) -> None:
    given_up(broker, now=1.0)
    for now in (1.0, 300.5, 600.9):
        [refused] = answers(submit_image(broker, f"again at {now}", now=now, client=b"other")).values()
        assert isinstance(refused, Failed)
        assert (refused.code, refused.retry_after_s) == (Code.WORKER_LOST, None)
        assert "given up: npu:2.1 killed by SIGKILL; it was on a worker that died 2 times" in refused.reason
        assert refused.reason.endswith(f"it may be retried in {round(601.5 - now)} s")
    assert leases(submit_image(broker, "another", b"good", now=2.0))
    assert leases(submit_image(broker, "after that", now=601.0))


def test_a_reload_forgets_what_was_given_up_and_whom_it_suspects(broker: Broker) -> None:
    given_up(broker)
    assert broker.forget_suspects(2.0) == []
    assert leases(submit_image(broker, "again"))
    lose(broker, "npu:0.9")
    lose(broker, "npu:1.9")
    broker = Broker(LIMITS)
    for job in ("a", "b", "c"):
        submit(broker, job)
    with_workers(broker, "npu:0.1")
    lose(broker, "npu:0.1")
    with_workers(broker, "npu:0.2")
    assert len(leases(broker.forget_suspects(1.0))) == 0, "a is still alone there"
    assert len(leases(broker.ready("npu:1.1", "npu:1", 2, 1.0))) == 2


def test_all_jobs_with_the_image_are_answered_when_it_is_given_up(broker: Broker) -> None:
    for number in range(3):
        submit_image(broker, f"{number}", client=f"{number}".encode())
    submit_image(broker, "good", b"good")
    with_workers(broker, "npu:0.1", window=1)
    assert answers(lose(broker, "npu:0.1")) == {}
    with_workers(broker, "npu:0.2", window=1)
    lost = answers(lose(broker, "npu:0.2"))
    assert {job: answer.code for job, answer in lost.items()} == dict.fromkeys("012", Code.WORKER_LOST)  # type: ignore[union-attr]
    assert serve_all(broker, broker.ready("npu:0.3", "npu:0", 2, 1.0)) == ["good"]


def test_one_image_is_tried_by_one_worker_at_a_time(broker: Broker) -> None:
    for number in range(3):
        submit_image(broker, f"{number}")
    submit_image(broker, "good", b"good")
    with_workers(broker, "npu:0.1", window=1)
    lose(broker, "npu:0.1")
    assert len(leases(broker.ready("npu:0.2", "npu:0", 1, 1.0))) == 1
    other = broker.ready("npu:1.1", "npu:1", 1, 1.0)
    broker.check()
    assert list(answers(finish(broker, *leases(other)[0]))) == ["good"]


def test_a_result_clears_an_image_and_all_its_jobs(broker: Broker) -> None:
    for number in range(4):
        submit_image(broker, f"{number}")
    with_workers(broker, "npu:0.1", window=2)
    lose(broker, "npu:0.1")
    [(worker, lease)] = leases(broker.ready("npu:0.2", "npu:0", 3, 1.0))
    assert len(leases(finish(broker, worker, lease))) == 3, "in company again"
    assert not broker.holds_suspect("npu:0.2")
    assert answers(lose(broker, "npu:0.2")) == {}, "the deaths before are forgiven"


@pytest.mark.parametrize("end", ["deadline", "cancel", "client gone"])
def test_who_does_not_wait_does_not_wash_an_image_clean(broker: Broker, end: str) -> None:
    for life in (1, 2):
        with_workers(broker, f"npu:{life}.1")
        assert leases(submit_image(broker, "poison"))
        match end:
            case "deadline":
                broker.expire(11.0)
            case "cancel":
                broker.cancel(b"c", Cancel(job="poison"), 0.5)
            case _:
                broker.client_gone(b"c", 0.5)
        broker.check()
        assert lose(broker, f"npu:{life}.1", 12.0) == [] or life == 2
    [refused] = answers(submit_image(broker, "again", now=13.0)).values()
    assert isinstance(refused, Failed)
    assert refused.code is Code.WORKER_LOST


def test_an_image_in_shared_memory_is_known_too_also_when_its_client_has_died() -> None:
    memory = {"r": b"..poison..", "s": b"poison"}
    broker = Broker(
        msgspec.structs.replace(LIMITS, shared_memory_bytes=1 << 20),
        lambda place, start, end: memory[place.region][place.offset + start : place.offset + end],
    )
    for region in memory:
        file = Memory(descriptor=7, inode=1, bytes=4096, seals=fcntl.F_SEAL_SHRINK, page_bytes=PAGE, pid=1)
        broker.open_region(region, file)

    def submit_place(job: str, region: str, offset: int) -> list[Action]:
        image = Image(kind="encoded", place=Place(region=region, offset=offset, bytes=6))
        return broker.submit(b"c", Submit(job=job, image=image), [], 1.0)

    with_workers(broker, "npu:0.1")
    submit_place("a", "r", 2)
    broker.end_region("r")
    del memory["r"]
    broker.client_gone(b"c", 1.0)
    lose(broker, "npu:0.1")
    with_workers(broker, "npu:1.1")
    submit_place("b", "s", 0)
    assert answers(lose(broker, "npu:1.1"))["b"].code is Code.WORKER_LOST  # type: ignore[union-attr]
    assert answers(submit_image(broker, "c", now=2.0))["c"].code is Code.WORKER_LOST  # type: ignore[union-attr]


def test_an_image_that_is_suspected_waits_for_an_empty_worker_when_it_comes_under_another_name(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    submit_image(broker, "a", b"one")
    lose(broker, "npu:0.1")
    broker.cancel(b"c", Cancel(job="a"), 1.0)
    with_workers(broker, "npu:1.1")
    [(worker, lease)] = leases(submit_image(broker, "b", b"two"))
    assert leases(submit_image(broker, "c", b"one")) == [], "it would have company, although there is room"
    assert [worker for worker, _ in leases(finish(broker, worker, lease))] == ["npu:1.1"]
    assert leases(submit_image(broker, "d", b"two")) == []


def test_a_suspect_is_tried_on_another_device_where_one_is_free(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    submit_image(broker, "a")
    with_workers(broker, "npu:0.2", "npu:1.1")
    assert [worker for worker, _ in leases(lose(broker, "npu:0.1"))] == ["npu:1.1"]


def test_two_suspects_change_places(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", "npu:1.1")
    submit_image(broker, "a", b"one")
    submit_image(broker, "b", b"two")
    for worker in ("npu:0.1", "npu:1.1"):
        lose(broker, worker)
    [(worker, lease)] = leases(broker.ready("npu:0.2", "npu:0", 2, 1.0))
    assert list(answers(finish(broker, worker, lease))) == ["b"]


def test_deaths_are_the_images_fault_when_the_devices_work(broker: Broker) -> None:
    """On two devices; the other death is `holds_suspect`'s."""
    with_workers(broker, "npu:0.1")
    submit_image(broker, "poison")
    assert not broker.holds_suspect("npu:0.1")
    lose(broker, "npu:0.1")
    with_workers(broker, "npu:1.1")
    assert broker.holds_suspect("npu:1.1")
    assert Acquit("npu:0") in lose(broker, "npu:1.1")


@pytest.mark.parametrize("served", [True, False])
def test_a_device_that_has_finished_nothing_is_not_acquitted_of_a_death(broker: Broker, served: bool) -> None:
    with_workers(broker, "npu:0.1")
    if served:
        finish(broker, *leases(submit(broker, "good"))[0])
    submit_image(broker, "poison")
    lose(broker, "npu:0.1")
    with_workers(broker, "npu:0.2")
    assert (Acquit("npu:0") in lose(broker, "npu:0.2")) is served


def test_with_one_attempt_neighbours_are_still_tried_alone() -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, max_attempts=1))
    with_workers(broker, "npu:0.1")
    [(_, poison)] = leases(submit_image(broker, "poison"))
    submit_image(broker, "mate", b"good")
    broker.started("npu:0.1", Started(leases=[poison]), 0.5)
    assert list(answers(lose(broker, "npu:0.1"))) == ["poison"]
    assert serve_all(broker, broker.ready("npu:0.2", "npu:0", 2, 1.0)) == ["mate"]
    submit_image(broker, "lone", b"lone")
    assert list(answers(lose(broker, "npu:0.2"))) == ["lone"]


def test_a_worker_that_makes_no_progress_is_evicted(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    submit(broker, "a", now=1.0, deadline_s=100)
    broker.heard("npu:0.1", 5.0)
    assert broker.expire(5.9) == []
    broker.heard("npu:0.1", 5.9)
    [evict] = broker.expire(6.0)
    assert evict == Evict("npu:0.1", "no lease has ended for 5 s")
    assert broker.expire(7.0) == [], "once is enough"
    assert broker.next_deadline() == 101.0, "the job's own"
    assert leases(submit(broker, "b", now=7.0)) == []


def test_a_silent_worker_is_evicted(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    broker.heard("npu:0.1", 6.0)
    assert broker.expire(10.9) == []
    assert broker.expire(11.0) == [Evict("npu:0.1", "no sign of life for 5 s")]


def test_each_end_of_a_lease_is_progress(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    [(_, first)] = leases(submit(broker, "a", deadline_s=100))
    submit(broker, "b", deadline_s=100)
    finish(broker, "npu:0.1", first, now=4.0)
    broker.heard("npu:0.1", 8.0)
    assert broker.expire(8.9) == []
    assert broker.expire(9.0) == [Evict("npu:0.1", "no lease has ended for 5 s")]


def test_time_in_which_the_daemon_stood_still_is_no_silence_of_a_worker(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", "npu:1.1")
    submit(broker, "1", now=1.0, deadline_s=100)
    broker.heard("npu:1.1", 9.0)  # it was read before anybody noticed
    broker.forgive(8.0, 9.0)
    assert broker.expire(12.9) == []
    assert broker.expire(13.0) == [Evict("npu:0.1", "no sign of life for 5 s")]
    assert broker.expire(13.9) == [], "no more than it stood still"
    assert broker.expire(14.0) == [Evict("npu:1.1", "no sign of life for 5 s")]


def test_a_retiring_worker_finishes_and_is_then_told_to_stop(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    [(_, first)] = leases(submit(broker, "a"))
    [(_, second)] = leases(submit(broker, "b"))
    assert broker.retire("npu:0.1") == []
    assert leases(submit(broker, "c")) == []
    assert SendWorker("npu:0.1", Stop()) not in finish(broker, "npu:0.1", first)
    assert SendWorker("npu:0.1", Stop()) in finish(broker, "npu:0.1", second)
    with_workers(broker, "npu:1.1", window=1)
    broker.cancel(b"c", Cancel(job="c"), 1.0)
    with_workers(broker, "npu:2.1")
    assert broker.retire("npu:2.1") == [SendWorker("npu:2.1", Stop())]


def test_draining_refuses_new_jobs_finishes_old_ones_and_ends(broker: Broker) -> None:
    with_workers(broker, "npu:0.1")
    [(_, lease)] = leases(submit(broker, "old"))
    submit(broker, "slow")
    broker.drain()
    assert answers(submit(broker, "new"))["new"].code is Code.DRAINING  # type: ignore[union-attr]
    assert isinstance(answers(finish(broker, "npu:0.1", lease))["old"], Result)
    assert answers(broker.end_drain())["slow"].code is Code.DRAINING  # type: ignore[union-attr]
    broker.check()
    assert broker.unanswered == 0


def test_when_no_device_can_serve_nothing_waits(broker: Broker) -> None:
    submit(broker, "waiting")
    assert answers(broker.set_available(False))["waiting"].code is Code.UNAVAILABLE  # type: ignore[union-attr]
    assert answers(submit(broker, "new"))["new"].code is Code.UNAVAILABLE  # type: ignore[union-attr]
    broker.set_available(True)
    assert answers(submit(broker, "later")) == {}


def test_answered_jobs_do_not_pile_up_behind_far_deadlines(broker: Broker) -> None:
    with_workers(broker, "npu:0.1", window=1)
    for number in range(1000):
        [(worker, lease)] = leases(submit(broker, f"{number}", deadline_s=86400.0))
        finish(broker, worker, lease)
    assert len(broker.jobs._deadlines) < 100
