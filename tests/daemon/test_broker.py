"""The broker by example, one history per rule: jobs, leases, workers and deadlines."""
from __future__ import annotations

import fcntl
import weakref

import msgspec
import pytest
from brokers import ANSWER, LIMITS, answers, finish, leases, submit, with_workers

from blendmaskd.core.actions import Answered, Dropped, Evict, SendWorker
from blendmaskd.core.broker import Broker
from blendmaskd.core.regions import PAGE, Memory
from blendmaskd.protocol import Cancel, Code, Failed, FailedLease, Image, Place, Result, Revoke, Started, Stop, Submit


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
