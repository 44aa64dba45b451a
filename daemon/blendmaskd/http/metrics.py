"""What the front counts, for Prometheus. No label is a client's choice: routes and methods are those that there are.

Several processes on one socket count together: prometheus_client's files, in a folder that `program` makes.
"""
from __future__ import annotations

import os

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)

BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

disable_created_metrics()  # type: ignore[no-untyped-call]  # several processes have none either


class Metrics:
    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        labels = ["route", "method"]
        self._requests = Counter(
            "blendmaskd_http_requests", "Requests by route and status", [*labels, "status"], registry=own
        )
        self._seconds = Histogram(
            "blendmaskd_http_request_seconds", "Seconds from a request's header to the end of its answer", labels,
            buckets=BOUNDS_S, registry=own,
        )  # fmt: skip
        self._bytes = Counter("blendmaskd_http_bytes", "Bytes of bodies", [*labels, "direction"], registry=own)
        self.in_flight = Gauge(
            "blendmaskd_http_in_flight", "Requests without an answer", registry=own, multiprocess_mode="livesum"
        )
        self.connections = Gauge(
            "blendmaskd_http_connections", "Open connections", registry=own, multiprocess_mode="livesum"
        )

    def answered(self, route: str, method: str, status: int, seconds: float, received: int, sent: int) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route, method).observe(seconds)
        self._bytes.labels(route, method, "received").inc(received)
        self._bytes.labels(route, method, "sent").inc(sent)

    def render(self) -> bytes:
        registry = self._registry
        if FOLDER_VARIABLE in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        text: bytes = generate_latest(registry)
        return text
