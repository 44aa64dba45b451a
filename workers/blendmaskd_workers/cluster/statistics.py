"""The cluster's statistics: snapshots of fronts and workers as one snapshot, and as metrics. Pure.

The names are `blendmaskd.core.metrics`'s own. What belongs to one process keeps a series of its own, with the label
``node``, so that a restart resets it as Prometheus expects: a worker's figures have ``node`` and ``device``, a
front's ``node``. **combined FPS = the sum of the devices' FPS**, of all nodes.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from blendmaskd import settings
from blendmaskd.core.metrics import SnapshotCollector
from blendmaskd.core.stats import FAILURES

CONTENT_TYPE = CONTENT_TYPE_LATEST
Snapshot = dict[str, Any]

OF_THE_CLUSTER = {"blendmaskd_combined_fps", "blendmaskd_queue_jobs", "blendmaskd_leased_jobs"}
OF_A_FRONT = {"blendmaskd_jobs", "blendmaskd_stage_seconds", "blendmaskd_start_time_seconds"}
OF_A_WORKER = {
    "blendmaskd_device_fps", "blendmaskd_device_busy_share", "blendmaskd_worker_memory_bytes",
    "blendmaskd_device_memory_bytes", "blendmaskd_images", "blendmaskd_device_busy_seconds",
    "blendmaskd_worker_up",
}  # fmt: skip


def combine(fronts: Sequence[Snapshot], workers: Sequence[Snapshot], *, seq: int, queue: settings.Queue) -> Snapshot:
    """One snapshot in the form of `blendmaskd.core.stats`, whose devices have their ``node``; see there for the keys.

    ``queue.jobs`` are images that fronts wait for and no worker holds yet. Latencies are each front's: ``fronts``.
    """
    devices = sorted((device for each in workers for device in each["devices"]), key=_place)
    leased = sum(each["leased"] for each in workers)
    serving = sum(device["state"] == "ready" for device in devices)
    failures: Counter[str] = Counter()
    for each in fronts:
        failures.update(each["failures"])
    recent = sorted((failure for each in fronts for failure in each["recent_failures"]), key=lambda f: -f["time"])
    return {
        "seq": seq,
        "time": max(each["time"] for each in fronts),
        "started": min(each["started"] for each in fronts),
        "engine": fronts[0]["engine"],
        "window_s": fronts[0]["window_s"],
        "combined_fps": round(sum(device["fps"] for device in devices), 2),
        "degraded": serving < len(devices),
        "draining": False,
        "serving": serving,
        "queue": {
            "jobs": max(sum(each["in_flight"] for each in fronts) - leased, 0), "bytes": 0,
            "max_jobs": queue.max_jobs, "max_bytes": queue.max_bytes,
        },
        "leased": leased,
        "regions": {"count": 0, "bytes": 0},
        "answered": sum(each["answered"] for each in fronts),
        "failures": dict(failures),
        "recent_failures": recent[:FAILURES],
        "fronts": [{key: each[key] for key in ("node", "in_flight", "latency")} for each in fronts],
        "devices": devices,
    }  # fmt: skip


def named(whole: Snapshot) -> Snapshot:
    """With devices named ``node/device``, for lines that people read."""
    devices = [{**device, "device": f"{device['node']}/{device['device']}"} for device in whole["devices"]]
    return {**whole, "devices": devices}


def render(whole: Snapshot, fronts: Sequence[Snapshot], workers: Sequence[Snapshot]) -> bytes:
    """The cluster's metrics in Prometheus' text format; `whole` is of `combine`."""
    registry = CollectorRegistry()
    registry.register(_Cluster(whole, fronts, workers))
    text: bytes = generate_latest(registry)
    return text


@dataclass(eq=False, slots=True)
class _Cluster(Collector):
    whole: Snapshot
    fronts: Sequence[Snapshot]
    workers: Sequence[Snapshot]

    def collect(self) -> Iterator[Metric]:
        whole = {**self.whole, "stages": {}}
        yield from _families([whole], OF_THE_CLUSTER)
        yield from _families([{**whole, **each} for each in self.fronts], OF_A_FRONT)
        workers = [{**whole, **each, "node": each["devices"][0]["node"]} for each in self.workers]
        yield from _families(workers, OF_A_WORKER)


def _families(snapshots: Iterable[Mapping[str, Any]], names: set[str]) -> Iterator[Metric]:
    """The families of these names, one for all snapshots; samples get their snapshot's ``node`` as a label."""
    merged: dict[str, Metric] = {}
    for snapshot in snapshots:
        labels = {"node": snapshot["node"]} if "node" in snapshot else {}
        for family in SnapshotCollector(snapshot).collect():
            if family.name not in names:
                continue
            one = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            one.samples += [sample._replace(labels={**labels, **sample.labels}) for sample in family.samples]
    yield from merged.values()


def _place(device: Mapping[str, Any]) -> tuple[str, str, int]:
    kind, _, number = device["device"].partition(":")
    return device["node"], kind, int(number)
