"""Load on HTTP endpoints: a closed loop of clients that keep their connections, of any server that takes an image as a
body. One thread, one selector, so that it takes little of the cores that it shares with the server.

A server on this host is found by its port; the CPU time of who listens there, and of their children, is told as well.
"""
from __future__ import annotations

import contextlib
import re
import selectors
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psutil

from blendmaskd.programs.errors import NoDaemonError, UsageError
from blendmaskd_workers.benchmark.load import ClosedLoop, Sample, figures

ANSWER_S = 60.0


@dataclass(slots=True)
class Line:
    """A connection, with one request in flight or none."""

    socket: socket.socket
    sent: float = 0.0
    answer: bytes = b""


def measure(
    url: str, image: bytes, field: str | None, clients: int, warm_up_s: float, seconds: float
) -> dict[str, Any]:
    """`field`: of a multipart form that has the image; None: it is the body.

    Returns `load.figures`, and ``cpu_s`` per 1000 answers of the server's processes, where they can be seen.

    Raises `UsageError` for no http URL, `NoDaemonError` when nobody listens there.
    """
    host, port, request = _request(url, image, field)
    server = _processes(port)
    start = time.monotonic() + warm_up_s
    samples, cpu_s = _loop(_connect(host, port, clients), request, start, start + seconds, server)
    found = figures(samples, start, start + seconds)
    return {"url": url, "clients": clients, **found, "cpu_s_per_1000": 1000 * cpu_s / max(found["images"], 1)}


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in ("fps", "p50_ms", "p99_ms", "cpu_s_per_1000")}


def _request(url: str, image: bytes, field: str | None) -> tuple[str, int, bytes]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname or not parts.path:
        raise UsageError(f"--http {url}: expected http://HOST:PORT/PATH")
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    kind, body = "image/jpeg", image
    if field is not None:
        kind = "multipart/form-data; boundary=blendmaskd"
        part = f'--blendmaskd\r\nContent-Disposition: form-data; name="{field}"; filename="image.jpg"\r\n'
        body = f"{part}Content-Type: image/jpeg\r\n\r\n".encode() + image + b"\r\n--blendmaskd--\r\n"
    headers = (f"Content-Type: {kind}", f"Content-Length: {len(body)}", "", "")
    head = "\r\n".join([f"POST {path} HTTP/1.1", f"Host: {parts.netloc}", *headers])
    return parts.hostname, parts.port or 80, head.encode() + body


def _connect(host: str, port: int, clients: int) -> list[Line]:
    try:
        lines = [Line(socket.create_connection((host, port), 5)) for _ in range(clients)]
    except OSError as error:
        raise NoDaemonError(f"http://{host}:{port}: {error.strerror or error}") from None
    for line in lines:
        line.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line.socket.settimeout(ANSWER_S)
    return lines


def _loop(
    lines: Sequence[Line], request: bytes, start: float, end: float, server: Sequence[psutil.Process]
) -> tuple[list[Sample], float]:
    """What became of the requests, and the CPU seconds of the server from `start` to `end`."""
    schedule, samples = ClosedLoop(len(lines), time.monotonic()), []
    before = None
    with contextlib.ExitStack() as closing, selectors.DefaultSelector() as selector:
        for number, line in enumerate(lines):
            closing.enter_context(line.socket)
            selector.register(line.socket, selectors.EVENT_READ, number)
        while (now := time.monotonic()) < end:
            if before is None and now >= start:
                before = spent_cpu_s(server)
            for client, _ in schedule.due(now):
                lines[client].sent = time.monotonic()
                lines[client].socket.sendall(request)
            left_s = min(end, schedule.next_due()) - time.monotonic()
            for key, _ in selector.select(max(left_s, 0)):
                line = lines[key.data]
                if code := _receive(line):
                    done = time.monotonic()
                    failed = code != "200"
                    samples.append(Sample(line.sent, line.sent, done, code if failed else ""))
                    schedule.answered(key.data, done, failed)
        return samples, spent_cpu_s(server) - (before or 0.0)


def _receive(line: Line) -> str:
    """The status of an answer that is complete; empty: there is more to come. Raises `NoDaemonError`."""
    part = line.socket.recv(1 << 18)
    if not part:
        raise NoDaemonError("the server closed a connection that had a request")
    line.answer += part
    head, found, body = line.answer.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    complete = len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")  # or chunked
    if not found or not complete:
        return ""
    line.answer = b""
    return head.split(None, 2)[1].decode()


def _processes(port: int) -> list[psutil.Process]:
    """Those of this host that listen at a port, and their children; none where that may not be seen."""
    with contextlib.suppress(psutil.Error):
        listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        pids = {each.pid for each in listening if each.laddr and each.laddr.port == port and each.pid}
        parents = [psutil.Process(pid) for pid in pids]
        return list({each for parent in parents for each in (parent, *parent.children(recursive=True))})
    return []


def spent_cpu_s(processes: Sequence[psutil.Process]) -> float:
    """CPU seconds so far of those that live."""
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
