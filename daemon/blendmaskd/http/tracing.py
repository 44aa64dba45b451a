"""Traces by OpenTelemetry (extra ``otel``): a span for each request about an image, and below it one for each stage.

Whoever asks says with ``traceparent`` where the span belongs, and by its flag whether it is wanted. Stages are known
only when the answer is there: their spans are made then, one after the other, ending with the answer. Where
``http.traces`` is not set none of this is loaded.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from blendmaskd.protocol import STAGES

NANOSECONDS = 1e9


class Tracing:
    """Sends spans to an OTLP endpoint by HTTP, in batches, from a thread; what cannot be sent is dropped."""

    def __init__(self, url: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "blendmaskd-http"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("blendmaskd")
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self, headers: Sequence[tuple[bytes, bytes]], method: str, route: str, status: int, seconds: float,
        timings: Mapping[str, float], device: str,
    ) -> None:  # fmt: skip
        """A request that has just ended, after so many seconds. `timings` are its image's, empty without an answer."""
        end = time.time_ns()
        carrier = {name.decode(): value.decode("latin-1") for name, value in headers
                   if name in (b"traceparent", b"tracestate")}  # fmt: skip
        span = self._tracer.start_span(
            f"{method} {route}", self._propagator.extract(carrier), SpanKind.SERVER,
            {"http.request.method": method, "http.route": route, "http.response.status_code": status},
            start_time=end - int(seconds * NANOSECONDS),
        )  # fmt: skip
        if span.is_recording() and timings:
            span.set_attribute("blendmaskd.device", device)
            inside = set_span_in_context(span)
            start = end - int(sum(timings.get(stage, 0.0) for stage in STAGES[:-1]) * NANOSECONDS)
            for stage in STAGES[:-1]:
                stop = start + int(timings.get(stage, 0.0) * NANOSECONDS)
                self._tracer.start_span(stage, inside, start_time=start).end(stop)
                start = stop
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
