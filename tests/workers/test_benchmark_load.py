"""The benchmark's schedules and counting: what is sent when, and which figures the answers amount to."""
from __future__ import annotations

import itertools
import math
import statistics

import pytest

from blendmaskd_workers.benchmark import load
from blendmaskd_workers.benchmark.load import FAILED_PAUSE_S, ClosedLoop, OpenLoop, Sample


def answered(intended: float, latency: float, sent: float | None = None, code: str = "") -> Sample:
    return Sample(intended, intended if sent is None else sent, intended + latency, code)


def intended_times(schedule: OpenLoop, until: float) -> list[float]:
    return [intended for _, intended in schedule.due(until) if intended is not None]


def test_percentiles_are_values_that_occurred() -> None:
    ranked = [float(value) for value in range(1, 101)]
    assert [load.percentile(ranked, percent) for percent in (1, 50, 90, 99, 100)] == [1, 50, 90, 99, 100]
    assert load.percentile([3.0, 7.0], 50) == 3.0
    assert load.percentile([3.0, 7.0], 51) == 7.0
    assert load.percentile([5.0], 99) == 5.0
    assert math.isnan(load.percentile([], 50))


def test_a_closed_loop_keeps_one_job_of_each_client_in_flight() -> None:
    schedule = ClosedLoop(3, start=10.0)
    assert list(schedule.due(9.9)) == []
    assert schedule.next_due() == 10.0
    assert sorted(client for client, _ in schedule.due(10.0)) == [0, 1, 2]
    assert list(schedule.due(99.0)) == []
    assert schedule.next_due() == math.inf
    schedule.answered(1, now=11.0, failed=False)
    assert list(schedule.due(11.0)) == [(1, None)]


def test_a_client_whose_job_failed_pauses_before_the_next() -> None:
    schedule = ClosedLoop(1, start=0.0)
    list(schedule.due(0.0))
    schedule.answered(0, now=1.0, failed=True)
    assert list(schedule.due(1.0)) == []
    assert schedule.next_due() == 1.0 + FAILED_PAUSE_S
    assert list(schedule.due(1.0 + FAILED_PAUSE_S)) == [(0, None)]


def test_an_open_loop_is_a_poisson_process_of_its_rate() -> None:
    times = intended_times(OpenLoop(50.0, clients=4, start=100.0, seed=1), until=500.0)
    gaps = [later - earlier for earlier, later in itertools.pairwise([100.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.03)  # exponential: deviation and mean are the same
    assert statistics.median(gaps) == pytest.approx(math.log(2) / 50, rel=0.03)


def test_an_open_loop_is_the_same_again_for_the_same_seed_however_often_it_is_asked() -> None:
    often = OpenLoop(50.0, clients=2, start=0.0, seed=7)
    in_steps = [time for step in range(1, 101) for time in intended_times(often, step / 10)]
    assert in_steps == intended_times(OpenLoop(50.0, clients=2, start=0.0, seed=7), 10.0)
    assert in_steps != intended_times(OpenLoop(50.0, clients=2, start=0.0, seed=8), 10.0)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    schedule = OpenLoop(10.0, clients=2, start=0.0, seed=0)
    before = schedule.next_due()
    schedule.answered(0, now=0.0, failed=False)
    assert schedule.next_due() == before
    clients = [client for client, _ in schedule.due(2.0)]
    assert clients == [index % 2 for index in range(len(clients))]
    assert len(clients) > 4


def test_the_warm_up_counts_neither_as_throughput_nor_as_latency() -> None:
    samples = [answered(time / 10, latency=0.5) for time in range(20)] + [answered(2.0, 0.01), answered(2.5, 0.03)]
    figures = load.figures(samples, start=2.0, end=4.0)
    assert (figures["jobs"], figures["p50_ms"], figures["max_ms"]) == (2, pytest.approx(10), pytest.approx(30))
    # Those that were sent in the warm-up and answered after it are throughput all the same.
    assert figures["images"] == sum(2.0 <= sample.answered < 4.0 for sample in samples)
    assert figures["fps"] == figures["images"] / 2


def test_latency_counts_from_when_a_job_should_have_been_sent() -> None:
    # The server stands still for a second; the generator can send the second job only after that, and it is fast then.
    samples = [answered(0.0, latency=1.0), answered(0.1, sent=1.0, latency=0.95)]
    figures = load.figures(samples, start=0.0, end=2.0)
    assert figures["max_ms"] == pytest.approx(1000)
    assert figures["p50_ms"] == pytest.approx(950)
    assert (figures["late_sends"], figures["latest_send_ms"]) == (1, pytest.approx(900))


def test_after_a_stall_an_open_loop_sends_what_it_owes_with_the_times_it_owes_it_from() -> None:
    schedule = OpenLoop(100.0, clients=1, start=0.0, seed=0)
    list(schedule.due(1.0))
    owed = intended_times(schedule, 2.0)
    assert len(owed) > 50
    assert all(1.0 < time <= 2.0 for time in owed)


def test_failures_count_by_code_and_not_as_images() -> None:
    samples = [answered(0.1, 0.1), answered(0.2, 0.1, code="busy"), answered(0.3, 0.1, code="busy"),
               Sample(0.4, 0.4, math.inf, load.NO_ANSWER)]  # fmt: skip
    figures = load.figures(samples, start=0.0, end=1.0)
    assert figures["failures"] == {"busy": 2, "no-answer": 1}
    assert (figures["images"], figures["jobs"], figures["max_ms"]) == (1, 4, pytest.approx(100))


def test_wrong_answers_are_counted() -> None:
    samples = [answered(0.1, 0.1)._replace(wrong=True), answered(0.2, 0.1)]
    assert load.figures(samples, start=0.0, end=1.0)["wrong"] == 1


def test_nothing_measured_has_no_latency() -> None:
    figures = load.figures([], start=0.0, end=1.0)
    assert figures["fps"] == 0
    assert math.isnan(figures["p50_ms"])
