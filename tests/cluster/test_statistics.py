"""Snapshots of fronts and workers as one."""
from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from blendmaskd.core.metrics import health
from blendmaskd.core.stats import Stats, status_line
from blendmaskd.protocol import Report
from blendmaskd.settings import Queue
from blendmaskd_workers.cluster import statistics


def worker(node: str, device: str, images: int, *, leased: int = 0, state: str = "ready") -> dict[str, Any]:
    stats = Stats(10.0)
    report = Report(start=0.0, end=1.0, images=images, busy_s=0.5, memory_bytes=7, device_memory_bytes=8, shapes=[],
                    window=2)  # fmt: skip
    stats.report(device, report)
    slot = {"device": device, "node": node, "state": state, "restarts": 0, "wanted": {}, "actual": {}}
    return stats.snapshot(1.0, 101.0, [slot], leased=leased, answered=0, failures={})


def front(node: str, answered: int, failures: dict[str, int], *, in_flight: int = 0) -> dict[str, Any]:
    stats = Stats(10.0)
    stats.answered({"device": 0.02, "total": 0.03})
    return stats.snapshot(1.0, 101.0, [], node=node, started=100.0, in_flight=in_flight, answered=answered,
                          failures=failures, engine="timed")  # fmt: skip


FRONTS = [front("a", 3, {"busy": 1}, in_flight=5), front("b", 4, {"busy": 2, "timeout": 1}, in_flight=2)]
WORKERS = [worker("b", "npu:10", 30, leased=2), worker("b", "npu:2", 20, leased=1), worker("a", "npu:0", 10)]


def whole(fronts: list = FRONTS, workers: list = WORKERS) -> dict[str, Any]:
    return statistics.combine(fronts, workers, seq=7, queue=Queue())


def test_combined_fps_is_the_sum_of_the_devices_of_all_nodes() -> None:
    snapshot = whole()
    assert snapshot["combined_fps"] == 60.0
    assert [(each["node"], each["device"], each["fps"]) for each in snapshot["devices"]] == [
        ("a", "npu:0", 10.0), ("b", "npu:2", 20.0), ("b", "npu:10", 30.0)
    ]  # fmt: skip
    assert (snapshot["answered"], snapshot["failures"]) == (7, {"busy": 3, "timeout": 1})
    assert snapshot["queue"]["jobs"] == 4, "7 at the fronts, 3 of them at workers"
    assert "b/npu:10 30.00" in status_line(statistics.named(snapshot))


def test_a_worker_in_trouble_degrades_and_none_is_not_ready() -> None:
    degraded = whole(workers=[WORKERS[0], worker("a", "npu:0", 0, state="stopping")])
    assert health(statistics.named(degraded), 0.0)[:2] == (200, 200)
    assert health(statistics.named(degraded), 0.0)[2].startswith("degraded")
    assert whole(workers=[])["serving"] == 0


def test_each_process_keeps_series_of_its_own() -> None:
    text = statistics.render(whole(), FRONTS, WORKERS).decode()
    samples = {(sample.name, *sorted(sample.labels.items())): sample.value
               for family in text_string_to_metric_families(text) for sample in family.samples}  # fmt: skip
    assert samples[("blendmaskd_combined_fps",)] == 60.0
    assert samples["blendmaskd_device_fps", ("device", "npu:10"), ("node", "b")] == 30.0
    assert samples["blendmaskd_images_total", ("device", "npu:0"), ("node", "a")] == 10.0
    assert samples["blendmaskd_jobs_total", ("node", "b"), ("outcome", "busy")] == 2.0
    assert samples["blendmaskd_jobs_total", ("node", "a"), ("outcome", "answered")] == 3.0
    assert samples["blendmaskd_stage_seconds_count", ("node", "a"), ("stage", "device")] == 1.0
    assert text.count("# TYPE blendmaskd_device_fps gauge") == 1
