"""Metrics: a snapshot for Prometheus, and health by the same. Pure; `blendmaskd.shell.pages` serves both.

Every figure is the snapshot's; nothing is counted here. Health says `ok`, `degraded` (some devices are down),
`draining` or why not, with the status line.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from blendmaskd.core.stats import status_line
from blendmaskd.protocol import STAGE_BOUNDS_S, Code
from blendmaskd.wanted import models_shown

STALE_S = 5.0  # the loop takes a snapshot each second; one this old means that it hangs

BY_DEVICE = (  # kind of metric, name, help, key of a device in the snapshot
    (GaugeMetricFamily, "device_fps", "Images per second of the device", "fps"),
    (GaugeMetricFamily, "device_busy_share", "Share of the window in which the device was busy", "busy_share"),
    (GaugeMetricFamily, "worker_memory_bytes", "Resident memory of the worker process", "memory_bytes"),
    (GaugeMetricFamily, "device_memory_bytes", "Memory allocated on the device", "device_memory_bytes"),
    (CounterMetricFamily, "images", "Images finished by the device", "images"),
    (CounterMetricFamily, "device_busy_seconds", "Seconds in which the device was busy", "busy_seconds"),
    (CounterMetricFamily, "worker_restarts", "Restarts after a worker's death", "restarts"),
)

HEALTH = {"OK": 0, "Warning": 1, "Alarm": 2, "Critical": 3}
BY_CARD: tuple[tuple[str, str, str, Callable[[Mapping[str, Any]], float | None]], ...] = (  # name, help, label, value
    ("blendmaskd_npu_health", "0 OK, 1 Warning, 2 Alarm, 3 Critical", "device",
     lambda card: HEALTH.get(card["health"])),
    ("blendmaskd_npu_health_time_seconds", "When npu-smi said so, Unix time", "device", lambda card: card["time"]),
    ("blendmaskd_npu_temperature_celsius", "Temperature of the chip", "device", lambda card: card["temperature_c"]),
    ("blendmaskd_npu_memory_errors_single_bit", "Errors of the chip's memory that ECC corrected", "device",
     lambda card: card["single_bit_errors"]),
    ("blendmaskd_npu_memory_errors_double_bit", "Errors of the chip's memory that ECC found", "device",
     lambda card: card["double_bit_errors"]),
    ("npu_chip_info_health_status", "1: healthy, 0: not", "id", lambda card: card["health"] == "OK"),
    ("npu_chip_info_temperature", "Temperature in degrees Celsius", "id", lambda card: card["temperature_c"]),
    ("npu_chip_info_hbm_ecc_single_bit_error_cnt", "HBM Single Bit Error Count", "id",
     lambda card: card["single_bit_errors"]),
    ("npu_chip_info_hbm_ecc_double_bit_error_cnt", "HBM Double Bit Error Count", "id",
     lambda card: card["double_bit_errors"]),
)  # fmt: skip

Snapshot = Mapping[str, Any]


class SnapshotCollector(Collector):
    """One snapshot as metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for name, text, value in self._gauges():
            yield GaugeMetricFamily(f"blendmaskd_{name}", text, value)
        for kind, name, text, key in BY_DEVICE:
            family = kind(f"blendmaskd_{name}", text, labels=["device"])
            for device in self.snapshot["devices"]:
                family.add_metric([device["device"]], device[key])
            yield family
        yield self._idle()
        yield from self._cards()
        up = GaugeMetricFamily("blendmaskd_worker_up", "1 while the device can serve", labels=["device"])
        for device in self.snapshot["devices"]:
            up.add_metric([device["device"]], float(device["state"] == "ready"))
        yield up
        yield from self._models()
        yield self._jobs()
        yield self._stages()

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        """Name, help and value of what is of the whole daemon."""
        s = self.snapshot
        queue, regions, spool = s["queue"], s["regions"], s.get("spool")
        yield "snapshot_seq", "Sequence number of the snapshot that these figures come from", s["seq"]
        yield "combined_fps", "Images per second of all devices together", s["combined_fps"]
        yield "queue_jobs", "Jobs waiting for a device", queue["jobs"]
        yield "queue_bytes", "Image bytes waiting for a device", queue["bytes"]
        yield "queue_jobs_limit", "Maximum number of waiting jobs (queue.max_jobs)", queue["max_jobs"]
        yield "queue_bytes_limit", "Maximum of waiting image bytes (queue.max_bytes)", queue["max_bytes"]
        yield "leased_jobs", "Jobs leased to workers", s["leased"]
        yield "regions", "Open regions of shared memory", regions["count"]
        yield "region_bytes", "Bytes in open regions of shared memory", regions["bytes"]
        if spool:
            yield "spool_jobs", "Durable jobs without an answer", spool["jobs"]
            yield "spool_answers", "Answers in the spool", spool["answers"]
            yield "spool_bytes", "Bytes that durable jobs and answers take in the spool", spool["bytes"]
            yield "spool_bytes_limit", "Maximum size of the spool in bytes (spool_bytes)", spool["max_bytes"]
            yield "spool_trouble", "1 while the spool cannot be written", bool(spool["trouble"])
        yield "draining", "1 while the daemon finishes accepted jobs and refuses new ones", s["draining"]
        yield "start_time_seconds", "Start time of the daemon, Unix time", s["started"]

    def _models(self) -> Iterator[Metric]:
        models = models_shown(self.snapshot["devices"])
        yield GaugeMetricFamily("blendmaskd_models", "Different models on ready devices", len(models))
        served = GaugeMetricFamily("blendmaskd_device_model", "1: what it has loaded", labels=["device", "model"])
        for model, devices in models.items():
            for name in devices:
                served.add_metric([name, model], 1.0)
        yield served

    def _jobs(self) -> CounterMetricFamily:
        family = CounterMetricFamily("blendmaskd_jobs", "Jobs by outcome", labels=["outcome"])
        # Codes that did not come up yet too: a rate cannot see a counter's first step from nothing.
        outcomes = {"answered": self.snapshot["answered"], **dict.fromkeys(Code, 0), **self.snapshot["failures"]}
        for outcome, number in outcomes.items():
            family.add_metric([outcome], number)
        return family

    def _idle(self) -> CounterMetricFamily:
        text = "Seconds that a device waited between runs, by reason"
        family = CounterMetricFamily("blendmaskd_device_idle_seconds", text, labels=["device", "reason"])
        for device in self.snapshot["devices"]:
            for reason, seconds in device["idle_seconds"].items():
                family.add_metric([device["device"], reason], seconds)
        return family

    def _cards(self) -> Iterator[Metric]:
        """What npu-smi says, by our names, and by those of Huawei's npu-exporter, for dashboards that know them."""
        for name, text, label, value in BY_CARD:
            family = GaugeMetricFamily(name, text, labels=[label])
            for device in self.snapshot["devices"]:
                if (card := device.get("card")) and (found := value(card)) is not None:
                    family.add_metric([card["host_id"] if label == "id" else device["device"]], float(found))
            if family.samples:
                yield family

    def _stages(self) -> HistogramMetricFamily:
        text = "Seconds that an image spent in each stage"
        family = HistogramMetricFamily("blendmaskd_stage_seconds", text, labels=["stage"])
        bounds = [*map(str, STAGE_BOUNDS_S), "+Inf"]
        for stage, histogram in self.snapshot["stages"].items():
            family.add_metric([stage], list(zip(bounds, histogram["buckets"])), histogram["sum"])
        return family


def render(snapshot: Snapshot) -> bytes:
    """The snapshot in Prometheus' text format."""
    return generate_latest(SnapshotCollector(snapshot))


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
