"""Metrics: a snapshot for Prometheus, and what it says of the daemon's health. Pure; `blendmaskd.shell.pages` serves
both.

Every figure is the snapshot's; nothing is counted here. Health says `ok`, `degraded` (some devices are down),
`draining` or why not, with the status line.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from blendmaskd.core.stats import status_line
from blendmaskd.protocol import STAGE_BOUNDS_S, Code

STALE_S = 5.0  # the loop takes a snapshot each second; one this old means that it hangs

Snapshot = Mapping[str, Any]


class SnapshotCollector(Collector):
    """One snapshot as metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        s = self.snapshot
        yield GaugeMetricFamily("blendmaskd_snapshot_seq", "Number of the snapshot these figures are of", s["seq"])
        yield GaugeMetricFamily(
            "blendmaskd_combined_fps", "Images per second, all devices together", s["combined_fps"]
        )
        yield GaugeMetricFamily("blendmaskd_queue_jobs", "Jobs that wait for a device", s["queue"]["jobs"])
        yield GaugeMetricFamily("blendmaskd_queue_bytes", "Image bytes that wait", s["queue"]["bytes"])
        yield GaugeMetricFamily(
            "blendmaskd_queue_jobs_limit", "Jobs that may wait (queue.max_jobs)", s["queue"]["max_jobs"]
        )
        yield GaugeMetricFamily(
            "blendmaskd_queue_bytes_limit", "Image bytes that may wait (queue.max_bytes)", s["queue"]["max_bytes"]
        )
        yield GaugeMetricFamily("blendmaskd_leased_jobs", "Jobs at the workers", s["leased"])
        yield GaugeMetricFamily("blendmaskd_regions", "Regions of shared memory that are open", s["regions"]["count"])
        yield GaugeMetricFamily("blendmaskd_region_bytes", "Their bytes", s["regions"]["bytes"])
        if spool := s.get("spool"):
            yield GaugeMetricFamily("blendmaskd_spool_jobs", "Durable jobs without an answer", spool["jobs"])
            yield GaugeMetricFamily("blendmaskd_spool_answers", "Answers that are kept", spool["answers"])
            yield GaugeMetricFamily("blendmaskd_spool_bytes", "Their images and answers", spool["bytes"])
            yield GaugeMetricFamily(
                "blendmaskd_spool_bytes_limit", "What they may have (spool_bytes)", spool["max_bytes"]
            )
            yield GaugeMetricFamily("blendmaskd_spool_trouble", "1 while it cannot be written", bool(spool["trouble"]))
        yield GaugeMetricFamily("blendmaskd_draining", "1 while it only finishes what it accepted", s["draining"])
        yield GaugeMetricFamily("blendmaskd_start_time_seconds", "When the daemon started, Unix time", s["started"])
        yield self._gauge("blendmaskd_device_fps", "Images per second of a device", "fps")
        yield self._gauge("blendmaskd_device_busy_share", "Share of the window that the device was busy", "busy_share")
        yield self._gauge("blendmaskd_worker_memory_bytes", "Resident size of the worker process", "memory_bytes")
        yield self._gauge("blendmaskd_device_memory_bytes", "Memory held on the device", "device_memory_bytes")
        yield self._counter("blendmaskd_images", "Images finished by a device", "images")
        yield self._counter("blendmaskd_device_busy_seconds", "Time in which the device was busy", "busy_seconds")
        yield self._counter("blendmaskd_worker_restarts", "Restarts after a worker's death", "restarts")
        up = GaugeMetricFamily("blendmaskd_worker_up", "1 while the device can serve", labels=["device"])
        for device in s["devices"]:
            up.add_metric([device["device"]], float(device["state"] == "ready"))
        yield up
        jobs = CounterMetricFamily("blendmaskd_jobs", "Jobs by outcome", labels=["outcome"])
        # Codes that did not come up yet too: a rate cannot see a counter's first step from nothing.
        for outcome, number in {"answered": s["answered"], **dict.fromkeys(Code, 0), **s["failures"]}.items():
            jobs.add_metric([outcome], number)
        yield jobs
        yield self._stages()

    def _gauge(self, name: str, text: str, key: str) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=["device"])
        for device in self.snapshot["devices"]:
            family.add_metric([device["device"]], device[key])
        return family

    def _counter(self, name: str, text: str, key: str) -> CounterMetricFamily:
        family = CounterMetricFamily(name, text, labels=["device"])
        for device in self.snapshot["devices"]:
            family.add_metric([device["device"]], device[key])
        return family

    def _stages(self) -> HistogramMetricFamily:
        family = HistogramMetricFamily("blendmaskd_stage_seconds", "Where an image's time went", labels=["stage"])
        bounds = [*map(str, STAGE_BOUNDS_S), "+Inf"]
        for stage, histogram in self.snapshot["stages"].items():
            family.add_metric([stage], list(zip(bounds, histogram["buckets"])), histogram["sum"])
        return family


def render(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot))
    text: bytes = generate_latest(registry)
    return text


def health(snapshot: Snapshot, age_s: float) -> tuple[HTTPStatus, HTTPStatus, str]:
    """Status of /healthz and of /readyz, and the body of both. An empty snapshot: there was none yet."""
    ok, down = HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE
    if not snapshot:
        return ok, down, "starting\n"
    line = status_line(snapshot)
    if age_s > STALE_S:
        return down, down, f"the serving loop has hung for {age_s:.0f} s\n{line}\n"
    if snapshot["draining"]:
        return ok, down, f"draining\n{line}\n"
    if all(device["state"] in ("failed", "ended") for device in snapshot["devices"]):
        return down, down, f"all devices have failed\n{line}\n"
    if missing := snapshot.get("missing"):
        return ok, down, f"removed or replaced by others: {', '.join(missing)}: restart the daemon\n{line}\n"
    if not snapshot["serving"]:
        return ok, down, f"no device is up yet\n{line}\n"
    return ok, ok, f"{'degraded' if snapshot['degraded'] else 'ok'}\n{line}\n"
