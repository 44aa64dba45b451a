"""The broker by example: images that workers died with, see daemon/blendmaskd/core/suspects.py."""
from __future__ import annotations

import fcntl
from typing import Any

import msgspec
import pytest
from brokers import LIMITS, answers, finish, leased_ahead, leases, lose, serve_all, submit, with_workers

from blendmaskd.core.actions import Acquit, Action, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.regions import PAGE, Memory
from blendmaskd.protocol import Cancel, Code, Failed, Image, Lease, Place, Result, Started, Submit


def test_when_a_worker_died_what_still_waited_keeps_its_turn() -> None:
    broker = Broker(msgspec.structs.replace(LIMITS, max_jobs=100))
    with_workers(broker, "npu:0.1")
    for job in ("a0", "a1", "a2"):
        submit(broker, job, client=b"a")
    submit(broker, "b0", client=b"b")
    lose(broker, "npu:0.1")
    assert serve_all(broker, broker.ready("npu:0.2", "npu:0", 1, 0.0)) == ["a0", "a1", "b0", "a2"], "after suspects"


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
