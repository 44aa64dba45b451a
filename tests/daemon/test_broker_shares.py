"""The broker by example: who goes first, how much each may have waiting, and when to come again."""
from __future__ import annotations

import msgspec
import pytest
from brokers import LIMITS, answers, finish, leased_ahead, leases, serve_all, submit, with_workers

from blendmaskd.core.actions import Answered
from blendmaskd.core.broker import Broker
from blendmaskd.protocol import Code, Failed


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
    assert refusal.reason == "this client has 3 unanswered jobs, the maximum for one client (queue.max_jobs_per_client)"
    submit(broker, "large", client=b"other", size=500)  # its only one: how large one may be is another bound
    refusal = answers(submit(broker, "more", client=b"other", size=1))["more"]
    assert isinstance(refusal, Failed)
    assert (refusal.code, refusal.reason) == (
        Code.BUSY,
        "this client has 500 unanswered bytes, the maximum for one client is 100 (queue.max_bytes_per_client)",
    )  # fmt: skip


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
