import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blendmaskd.core.stats import FRESH_S, RESOLUTION, Histogram, Stats, status_line
from blendmaskd.protocol import MAX_HEADER_BYTES, STAGE_BOUNDS_S, STAGES, Code, Report, encode
from blendmaskd.protocol import Stats as StatsMessage


def report(start: float, images: int, busy_s: float = 0.0, length_s: float = 1.0, **more: Any) -> Report:
    values = {"memory_bytes": 0, "device_memory_bytes": 0, "shapes": [], "window": 2, **more}
    return Report(start=start, end=start + length_s, images=images, busy_s=busy_s, **values)


def snapshot(stats: Stats, now: float, *devices: str, state: str = "ready", **totals: Any) -> dict[str, Any]:
    slots = [{"device": device, "state": state} for device in devices or ("npu:0",)]
    return stats.snapshot(now, 1000.0 + now, slots, **totals)


def device(stats: Stats, now: float, name: str = "npu:0") -> dict[str, Any]:
    found: dict[str, Any] = snapshot(stats, now, name)["devices"][0]
    return found


def test_fps_are_the_images_of_the_window_over_its_time() -> None:
    stats = Stats(10.0)
    for second in range(30):
        stats.report("npu:0", report(float(second), 40 + second % 2, busy_s=0.9))
    found = device(stats, 30.0)
    assert found["fps"] == 40.5
    assert found["busy_share"] == 0.9
    assert found["images"] == 30 * 40 + 15
    assert found["busy_seconds"] == pytest.approx(27.0)


def test_a_device_that_has_just_begun_is_rated_over_the_time_that_it_has_had() -> None:
    stats = Stats(10.0)
    stats.report("npu:0", report(100.0, 50))
    assert device(stats, 101.0)["fps"] == 50.0


def test_an_idle_device_has_no_fps_and_keeps_its_counters() -> None:
    stats = Stats(10.0)
    stats.report("npu:0", report(0.0, 50, busy_s=1.0))
    for second in range(1, 12):
        stats.report("npu:0", report(float(second), 0))
    found = device(stats, 12.0)
    assert (found["fps"], found["busy_share"], found["images"], found["busy_seconds"]) == (0.0, 0.0, 50, 1.0)


def test_what_a_device_waited_for_adds_up() -> None:
    stats = Stats(10.0)
    for start in (0.0, 1.0):
        stats.report("npu:0", report(start, 50, idle_s={"input": 0.25, "selection": 0.125}))
    found = device(stats, 2.0)
    assert found["idle_seconds"] == {"input": 0.5, "launches": 0.0, "selection": 0.25}


def test_a_device_that_falls_silent_falls_to_zero() -> None:
    stats = Stats(10.0)
    for second in range(10):
        stats.report("npu:0", report(float(second), 40))
    fps = [device(stats, now)["fps"] for now in (10.0, 10.0 + FRESH_S - 0.1, 13.0, 15.0, 19.0, 20.0)]
    assert fps[0] == fps[1] == 40.0
    assert fps == sorted(fps, reverse=True)
    assert 0 < fps[3] < fps[2] < 40
    assert fps[-1] == 0.0


def test_a_lost_worker_s_rate_is_gone_and_its_images_are_not() -> None:
    stats = Stats(10.0)
    stats.report("npu:0", report(0.0, 40, memory_bytes=7))
    stats.exited("npu:0")
    stats.exited("npu:1")  # which never reported
    found = device(stats, 1.0)
    assert (found["fps"], found["busy_share"], found["memory_bytes"], found["images"]) == (0.0, 0.0, 0, 40)
    stats.report("npu:0", report(5.0, 30))
    assert device(stats, 6.0)["fps"] == 30.0
    assert device(stats, 6.0)["images"] == 70


def test_memory_and_shapes_are_those_of_the_newest_report() -> None:
    stats = Stats(10.0)
    stats.report("npu:0", report(0.0, 1, memory_bytes=1, device_memory_bytes=2, shapes=[(1, 800, 1088, None)]))
    shapes = [(1, 800, 1088, 0.5), (2, 32, 64, None)]
    stats.report("npu:0", report(1.0, 1, memory_bytes=3, device_memory_bytes=4, shapes=shapes))
    found = device(stats, 2.0)
    assert (found["memory_bytes"], found["device_memory_bytes"]) == (3, 4)
    assert found["shapes"] == [[1, 800, 1088, 0.5], [2, 32, 64, None]]


images = st.lists(st.integers(0, 500), min_size=1, max_size=15)


@given(st.lists(images, min_size=1, max_size=8), st.floats(0.5, 1.5))
def test_combined_is_exactly_the_sum_of_what_is_shown(all_images: list[list[int]], length_s: float) -> None:
    stats = Stats(10.0)
    names = [f"npu:{number}" for number in range(len(all_images))]
    for name, counts in zip(names, all_images):
        for second, count in enumerate(counts):
            stats.report(name, report(second * length_s, count, length_s=length_s))
    found = snapshot(stats, 15.0, *names)
    assert found["combined_fps"] == round(sum(device["fps"] for device in found["devices"]), 2)
    assert f"{found['combined_fps']:.2f}" == f"{sum(round(d['fps'] * 100) for d in found['devices']) / 100:.2f}"
    assert all(0 <= device["busy_share"] <= 1 for device in found["devices"])


def test_a_snapshot_has_the_next_number_and_what_it_is_told() -> None:
    stats = Stats(7.0)
    first = snapshot(stats, 1.0, queue={"jobs": 1, "bytes": 2}, answered=3)
    assert (first["seq"], first["time"], first["window_s"]) == (1, 1001.0, 7.0)
    assert (first["queue"], first["answered"]) == ({"jobs": 1, "bytes": 2}, 3)
    assert snapshot(stats, 2.0)["seq"] == 2


@pytest.mark.parametrize(
    ("states", "serving", "degraded"),
    [(["ready", "ready"], 2, False), (["ready", "silent"], 1, True), (["backoff", "failed"], 0, True)],
)
def test_degraded_is_fewer_than_all(states: list[str], serving: int, degraded: bool) -> None:
    slots = [{"device": f"npu:{number}", "state": state} for number, state in enumerate(states)]
    found = Stats(10.0).snapshot(0.0, 0.0, slots)
    assert (found["serving"], found["degraded"]) == (serving, degraded)


def test_stage_times_are_counted_by_bounds() -> None:
    stats = Stats(10.0)
    stats.answered({"device": 0.02179, "decode": 0.005, "total": 31.0, "unheard of": 1.0})
    stats.answered({"device": 0.03, "decode": 0.0})
    stages = snapshot(stats, 0.0)["stages"]
    assert set(stages) == set(STAGES)
    assert stages["device"] == {"buckets": [0] * 5 + [1] + [2] * 10, "count": 2, "sum": pytest.approx(0.05179)}
    assert stages["decode"]["buckets"] == [1, 1, 1, 2] + [2] * 12  # a bound belongs to its own bucket
    assert stages["total"]["buckets"] == [0] * 15 + [1]
    assert stages["queue"] == {"buckets": [0] * 16, "count": 0, "sum": 0.0}


@given(st.lists(st.floats(0, 100), max_size=50))
def test_buckets_are_cumulative_and_complete(times: list[float]) -> None:
    histogram = Histogram()
    for seconds in times:
        histogram.observe(seconds)
    found = histogram.as_dict()
    assert found["buckets"] == [sum(t <= bound for t in times) for bound in STAGE_BOUNDS_S] + [len(times)]
    assert found["count"] == len(times)


def test_the_status_line_says_it_in_one_line() -> None:
    devices = [{"device": "npu:0", "fps": 49.1, "state": "ready"}, {"device": "npu:1", "fps": 49.07, "state": "ready"}]
    found = {"combined_fps": 98.17, "devices": devices, "queue": {"jobs": 3}, "seq": 17, "serving": 2}
    assert status_line(found) == "98.17 FPS = npu:0 49.10 + npu:1 49.07, 3 waiting, seq 17"
    devices[1] |= {"state": "backoff", "fps": 0.0}
    assert status_line(found | {"serving": 1}).endswith("seq 17; degraded: npu:1 backoff")
    devices[0] |= {"state": "starting"}
    assert status_line(found | {"serving": 0}).endswith("seq 17; not serving: npu:0 starting, npu:1 backoff")


# -- latency and failures of late -------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-5, 1000), min_size=1, max_size=200))
def test_recent_latency_is_right_to_its_resolution(seconds: list[float]) -> None:
    stats = Stats(10.0)
    for value in seconds:
        stats.answered({"total": value})
    found = snapshot(stats, 1.0)["latency"]
    assert found["count"] == len(seconds)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        exact = sorted(seconds)[math.ceil(share * len(seconds)) - 1]
        assert exact / 1.01 <= found[name] <= exact * RESOLUTION * 1.01


def test_recent_latency_forgets_what_is_older_than_the_window() -> None:
    stats = Stats(10.0)
    for _ in range(50):
        stats.answered({"queue": 0.9, "device": 0.1, "total": 1.0})
    means = snapshot(stats, 1.0)["latency"]["stages"]
    assert means == {"queue": pytest.approx(0.9), "device": pytest.approx(0.1), "total": pytest.approx(1.0)}
    for second in range(2, 11):
        stats.answered({"device": 0.1, "total": 0.1})
        found = snapshot(stats, float(second))["latency"]
    assert found["p99"] == pytest.approx(1.0, rel=0.05)
    found = snapshot(stats, 11.0)["latency"]
    assert (found["count"], found["stages"]) == (9, {"device": pytest.approx(0.1), "total": pytest.approx(0.1)})
    assert found["p99"] == pytest.approx(0.1, rel=0.05)
    assert snapshot(stats, 100.0)["latency"] == {"count": 0, "p50": None, "p99": None, "stages": {}}


def test_a_flood_of_one_failure_does_not_wash_the_others_away() -> None:
    stats = Stats(10.0)
    stats.failed(1.0, "poison", "worker-lost", "npu:0.1 killed by SIGSEGV")
    for number in range(1000):
        stats.failed(2.0 + number, f"job-{number}", "busy", "the queue is full")
    found = snapshot(stats, 1.0)["recent_failures"]
    assert [failure["job"] for failure in found] == ["job-999", "job-998", "job-997", "job-996", "job-995", "poison"]
    assert found[-1] == {"time": 1.0, "job": "poison", "code": "worker-lost", "reason": "npu:0.1 killed by SIGSEGV"}


def test_remembered_failures_are_bounded_so_that_a_snapshot_stays_one_header() -> None:
    stats = Stats(10.0)
    for code in Code:
        for number in range(100):
            stats.failed(float(number), "\U0001f600" * 128, code, "\U0001f600" * 5000)
    found = snapshot(stats, 1.0)["recent_failures"]
    assert len(found) == 20
    assert len(encode(StatsMessage(stats={"recent_failures": found}))[1]) < MAX_HEADER_BYTES / 2
