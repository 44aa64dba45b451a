"""Metrics: the latest snapshot for Prometheus, and health, over HTTP from a thread of its own.

The thread computes nothing: it shows the snapshot that the serving loop took last, and how old that is. So health is
the loop's own: when the loop hangs its snapshot ages, and both health pages turn 503.

==========  ===================================================================================================
/metrics    Prometheus text format
/healthz    200 while the daemon can serve or may again soon; 503 when its loop hangs or all slots have failed
/readyz     200 when at least one device can serve now; else 503
==========  ===================================================================================================

Both health pages say `ok`, `degraded` (some devices are down) or why not, with the status line.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from daemon.stats import STAGE_BOUNDS_S, status_line

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
        for outcome, number in {"answered": s["answered"], **s["failures"]}.items():
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


def health(snapshot: Snapshot | None, age_s: float, failed: bool) -> tuple[HTTPStatus, HTTPStatus, str]:
    """Status of /healthz and of /readyz, and the body of both. `failed`: no slot can serve, now or later."""
    if snapshot is None:
        return HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE, "starting\n"
    line = status_line(snapshot)
    if age_s > STALE_S:
        down = HTTPStatus.SERVICE_UNAVAILABLE
        return down, down, f"the serving loop has hung for {age_s:.0f} s\n{line}\n"
    if failed:
        return HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE, f"all devices have failed\n{line}\n"
    if not snapshot["serving"]:
        return HTTPStatus.OK, HTTPStatus.SERVICE_UNAVAILABLE, f"no device is up yet\n{line}\n"
    return HTTPStatus.OK, HTTPStatus.OK, f"{'degraded' if snapshot['degraded'] else 'ok'}\n{line}\n"


class MetricsServer:
    """Serves the pages above. `publish` is called by the serving loop; it only stores."""

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._latest: tuple[Snapshot, float] | None = None
        host, _, port = endpoint.rpartition(":")
        self._http = _Http((host.strip("[]"), int(port)), _handler(self))
        self.port: int = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, name="metrics", daemon=True).start()

    def publish(self, snapshot: Snapshot) -> None:
        self._latest = (snapshot, self._clock())

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def page(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body."""
        snapshot, taken = self._latest or (None, self._clock())
        if path == "/metrics":
            if snapshot is None:
                return HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", b"starting\n"
            return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, render(snapshot)
        failed = snapshot is not None and all(d["state"] in ("failed", "ended") for d in snapshot["devices"])
        healthz, readyz, body = health(snapshot, self._clock() - taken, failed)
        if path in ("/healthz", "/readyz"):
            return healthz if path == "/healthz" else readyz, "text/plain; charset=utf-8", body.encode()
        return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics, /healthz, /readyz\n"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True


def _handler(server: MetricsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # a client that sends nothing does not keep its thread

        def do_GET(self) -> None:
            status, content_type, body = server.page(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not worth a line."""

    return Handler
