"""How many images to batch: against devices that are given as latency tables."""
from __future__ import annotations

import itertools
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd_workers.batching import LARGEST, LONG_S, SIZES_REMEMBERED, Batching, ahead

SIZE = (800, 800)
RECORD = {1: 0.02179, 2: 0.03890, 4: 0.12243, 8: 0.22638}  # one Ascend 910


def serve(batching: Batching, device: dict[int, float], rounds: int = 40, ready: int = 64) -> list[int]:
    """Run batches on a device of this latency while so many images are ready; the batch sizes in turn."""
    sizes = []
    for _ in range(rounds):
        sizes.append(batching.choose(SIZE, ready))
        batching.observe(SIZE, sizes[-1], latency(device, sizes[-1]))
    return sizes


def latency(device: dict[int, float], count: int) -> float:
    largest = max(size for size in device if size <= count)
    return device[largest] * count / largest


def test_the_record_table_learned_from_nothing_ends_at_two_and_tries_four_few_times() -> None:
    sizes = serve(Batching("auto"), RECORD)
    assert sizes[-20:] == [2] * 20
    assert sizes.count(4) <= 4
    assert max(sizes) == 4


def test_what_the_settings_know_is_used_at_once() -> None:
    assert serve(Batching("auto", RECORD), RECORD) == [2] * 40


def test_a_device_other_than_the_settings_say_is_learned() -> None:
    gains = {1: 0.020, 2: 0.022, 4: 0.025, 8: 0.030, 16: 0.050}
    assert serve(Batching("auto", {1: 0.020, 2: 0.040}), gains)[-1] == 1, "the table says that two are no gain"
    assert serve(Batching("auto", {1: 0.020, 2: 0.039}), gains)[-1] == 16


def test_a_table_of_another_image_size_keeps_its_ratios() -> None:
    batching = Batching("auto", RECORD)
    for _ in range(5):
        batching.observe((800, 1216), 1, RECORD[1] * 1.5)
    assert batching.target((800, 1216)) == 2


def test_sizes_are_learned_apart() -> None:
    batching = Batching("auto")
    gains = {1: 0.020, 2: 0.022, 4: 0.050}
    assert serve(batching, gains)[-1] == 2
    assert batching.choose((64, 64), 8) == 1
    assert batching.target() == 2, "the window must hold the batches of either"


def test_a_batch_that_takes_longer_than_allowed_is_not_chosen_and_not_tried() -> None:
    assert serve(Batching("auto", RECORD, longest_s=0.030), RECORD) == [1] * 40
    gains = {1: 0.020, 2: 0.024, 4: 0.030, 8: 0.050}
    assert max(serve(Batching("auto", None, longest_s=0.048), gains)) == 4


def test_a_slow_device_is_left_alone() -> None:
    assert serve(Batching("auto"), {1: LONG_S, 2: LONG_S}) == [1] * 40


def test_the_first_run_of_a_size_may_compile() -> None:
    batching = Batching("auto")
    batching.observe(SIZE, 1, 90.0)
    assert serve(batching, RECORD)[-1] == 2


def test_one_slow_run_is_forgiven() -> None:
    batching = Batching("auto")
    serve(batching, RECORD)
    batching.observe(SIZE, 2, 5.0)
    assert batching.target(SIZE) == 2


def test_what_the_engine_cannot_do_is_not_tried_again() -> None:
    batching = Batching("auto")
    gains = {1: 0.020, 2: 0.022, 4: 0.025}
    for _ in range(40):
        size = batching.choose(SIZE, 64)
        if size == 4:
            batching.refuse(SIZE, 4)
        else:
            batching.observe(SIZE, size, latency(gains, size))
    assert batching.choose(SIZE, 64) == batching.target(SIZE) == 2
    known = Batching("auto", {1: 0.020, 2: 0.021, 4: 0.022, 8: 0.023})
    known.refuse(SIZE, 4)
    assert known.target(SIZE) == 2, "what the table says of larger batches is void too"


def test_a_set_batch_is_filled_as_far_as_images_are_there() -> None:
    batching = Batching(4, RECORD)
    assert batching.target(SIZE) == batching.target() == 4
    assert [batching.choose(SIZE, ready) for ready in (1, 3, 9)] == [1, 3, 4]


def test_of_ever_new_sizes_the_last_are_remembered() -> None:
    batching = Batching("auto", RECORD)
    for side in range(1000):
        batching.observe(SIZE, 1, 0.02)
        batching.observe((side, 1), 2, 0.03)
    seen = batching.seen()
    assert len(seen) == SIZES_REMEMBERED
    assert {(1, *SIZE, 0.02), (2, 999, 1, None)} <= set(seen)
    assert batching.first_s((0, 1), 2) == 0.0


def test_any_thread_may_ask_and_observe() -> None:
    batching = Batching("auto")
    interval = sys.getswitchinterval()

    def observe(first: int) -> None:
        for height, width in itertools.product(range(first, 1344, 64), range(32, 1344, 32)):
            for _ in range(5):
                batching.observe((height, width), 1, 0.02)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            observers = [pool.submit(observe, first) for first in (32, 64)]
            while not all(each.done() for each in observers):
                assert batching.target() >= 1
                assert len(batching.seen()) <= SIZES_REMEMBERED
        assert [each.result() for each in observers] == [None, None]
    finally:
        sys.setswitchinterval(interval)


def test_seen_lists_every_batch_size_with_the_median_of_its_last_runs() -> None:
    batching = Batching("auto")
    for seconds in (9.0, 1.0, 2.0, 3.0):
        batching.observe(SIZE, 1, seconds)
    batching.observe((64, 96), 2, 0.5)
    assert batching.seen() == [(1, 800, 800, 2.0), (2, 64, 96, None)]


@given(
    st.lists(st.floats(0.001, 1.0), min_size=5, max_size=5),
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.sampled_from([math.inf, 0.01, 0.1]),
)
def test_whatever_the_device_a_batch_is_never_more_than_there_is_nor_than_allowed(
    seconds: list[float], arrivals: list[int], longest_s: float
) -> None:
    device = dict(zip((1, 2, 4, 8, 16), sorted(seconds)))
    batching = Batching("auto", None, longest_s)
    for ready in arrivals:
        count = batching.choose(SIZE, ready)
        assert 1 <= count <= min(ready, LARGEST)
        if count > 1:
            assert 2 * latency(device, count // 2) <= longest_s, "expected to take too long"
        batching.observe(SIZE, count, latency(device, count))


@pytest.mark.parametrize("ready", [1, 2, 3, 5])
def test_with_fewer_images_than_the_best_batch_the_best_of_those_is_run(ready: int) -> None:
    device = {1: 0.020, 2: 0.030, 4: 0.040, 8: 0.060}
    assert Batching("auto", device).choose(SIZE, ready) == {1: 1, 2: 2, 3: 2, 5: 4}[ready]


@pytest.mark.parametrize(("preparing_s", "busy_s", "held"), [
    (0.0, 0.0, 0), (0.1, 1.0, 0), (0.99, 1.0, 0), (3.5, 1.0, 3), (100.0, 1.0, 8), (0.1, 0.0, 8),
], ids=["idle", "small", "nearly", "large", "more than threads", "a device of no time"])
def test_as_many_images_are_held_ahead_as_are_prepared_while_the_device_runs_one(preparing_s, busy_s, held) -> None:
    assert ahead(preparing_s, busy_s, threads=8) == held
