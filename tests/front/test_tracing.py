"""Spans, as a collector gets them."""
from __future__ import annotations

import gzip
import http.server
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from running_front import MakeFront

trace_service = pytest.importorskip(
    "opentelemetry.proto.collector.trace.v1.trace_service_pb2", reason="needs the extra otel"
)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Any]:
    """Its `url`, and all `spans` that it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
            got = trace_service.ExportTraceServiceRequest.FromString(body)
            server.spans += [span for resource in got.resource_spans for scope in resource.scope_spans
                             for span in scope.spans]  # fmt: skip
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.spans = []
        server.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.slow
def test_a_request_is_a_span_with_its_stages(
    shared_daemon: Any, front: MakeFront, photo: bytes, collector: Any
) -> None:
    here = front(shared_daemon, traces=collector.url)
    assert here.ask("POST", "/v1/segment", photo, traceparent=f"00-{TRACE}-{PARENT}-01").status == 200
    assert here.ask("POST", "/v1/segment", photo, traceparent=f"00-{TRACE[::-1]}-{PARENT}-00").status == 200
    assert here.ask("POST", "/v1/segment", b"no image", traceparent="rubbish").status == 422
    here.ask("GET", "/healthz")
    here.end()  # sends what is left
    mine = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    [root] = [span for span in mine if span.parent_span_id.hex() == PARENT]
    stages = [span for span in mine if span.parent_span_id == root.span_id]
    assert root.name == "POST /v1/segment"
    assert [span.name for span in stages] == ["queue", "decode", "wait", "device", "finish", "send"]
    for earlier, later in itertools.pairwise(stages):
        assert earlier.end_time_unix_nano == later.start_time_unix_nano
    assert root.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano
    device = stages[3]
    assert device.end_time_unix_nano - device.start_time_unix_nano == pytest.approx(5e6, rel=0.5)
    others = [span for span in collector.spans if span.trace_id.hex() != TRACE]
    assert [span.name for span in others] == ["POST /v1/segment"]  # the one without a parent; none for the unsampled
