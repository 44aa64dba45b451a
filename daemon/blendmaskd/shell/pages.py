"""Pages: what the daemon shows over HTTP, from threads of their own.

===========  ==================================================================================================
/            the status page, `status.html`: one file that fetches nothing but the next two
/stats.json  the latest snapshot, without the workers' environments; ``{}`` before the first
/last.jpg    the last segmented image, where `show_last_image` is on
/metrics     Prometheus text format
/healthz     200 while the daemon can serve or may again soon; 503 when its loop hangs or all slots have failed
/readyz      200 when at least one device can serve now; else 503
===========  ==================================================================================================

The threads compute nothing of their own: they show the snapshot that the serving loop took last, and how old that is.
So health is the loop's own: when the loop hangs its snapshot ages, and both health pages turn 503.

Nothing can be changed from here. Whoever may connect may read; so three things are kept from a browser: other sites'
pages cannot embed what is here (CORP), nor run anything in the status page (CSP names its script and style by hash),
and while the daemon listens on a loopback address only, a request must name it by address or as `localhost`: a name
that a stranger's DNS points at 127.0.0.1 is refused.

A connection is closed after one answer and lives at most `LIFE_S`, whatever it sends or reads meanwhile; when there
are `MOST_CONNECTIONS`, the oldest gives way. Each page is made once per snapshot.
"""
from __future__ import annotations

import contextlib
import functools
import html
import ipaddress
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from blendmaskd.core.metrics import Snapshot, health, render
from blendmaskd.endpoints import parse_place
from blendmaskd.shell import csp
from blendmaskd.shell.addresses import address, is_own_name

LIFE_S = 10.0
MOST_CONNECTIONS = 32
TEXT = "text/plain; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class Page:
    """An answer; `headers` go over `HEADERS`."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Pages:
    """Serves the pages above. The serving loop calls `publish` and `show_image`; they only store."""

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic, front: str = "") -> None:
        """`front`: http://HOST:PORT of the HTTP front, to which the status page links while somebody listens there."""
        self._clock = clock
        self._front = front
        self._latest = _Published({}, clock())
        self._image: bytes | None = None
        self._text, self._policy = csp.page("blendmaskd.shell", "status.html")
        host, port = parse_place(endpoint)
        self._http = _Http((address(host), port), _handler(self))
        self.port: int = self._http.server_address[1]
        self._local_only = ipaddress.ip_address(str(self._http.server_address[0])).is_loopback
        threading.Thread(target=self._http.serve_forever, name="pages", daemon=True).start()

    def publish(self, snapshot: Snapshot) -> None:
        self._latest = _Published(snapshot, self._clock())

    def show_image(self, jpeg: bytes | None) -> None:
        """The last segmented image; None: there is none to be seen."""
        self._image = jpeg

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def page(self, path: str, host: str | None) -> Page:
        """The answer to a request for `path` that names `host`."""
        latest = self._latest
        if self._local_only and not is_own_name(host):
            text = f"{host}: this daemon listens on a loopback address and answers only to an IP address or localhost\n"
            return Page(HTTPStatus.MISDIRECTED_REQUEST, TEXT, text.encode())
        match path:
            case "/":
                return self._status_page(host)
            case "/stats.json":
                return Page(HTTPStatus.OK, "application/json", latest.json)
            case "/last.jpg" if (image := self._image) is not None:
                return Page(HTTPStatus.OK, "image/jpeg", image)
            case "/metrics" if latest.snapshot:
                return Page(HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, latest.metrics)
            case "/metrics":
                return Page(HTTPStatus.SERVICE_UNAVAILABLE, TEXT, b"starting\n")
            case "/healthz" | "/readyz":
                healthz, readyz, text = health(latest.snapshot, self._clock() - latest.taken)
                return Page(healthz if path == "/healthz" else readyz, TEXT, text.encode())
        return Page(HTTPStatus.NOT_FOUND, TEXT, b"/, /stats.json, /metrics, /healthz, /readyz\n")

    def _status_page(self, host: str | None) -> Page:
        text = self._text
        scheme, _, endpoint = self._front.partition("://")
        if endpoint and _listens(endpoint):
            name, port = re.sub(r":\d*$", "", host or "localhost"), endpoint.rpartition(":")[2]
            link = f'<a href="{scheme}://{html.escape(name)}:{port}/">Try an image</a>'
            text = text.replace(b"<!--try-->", link.encode())
        return Page(HTTPStatus.OK, "text/html; charset=utf-8", text, {"Content-Security-Policy": self._policy})


@dataclass
class _Published:
    snapshot: Snapshot
    taken: float

    @functools.cached_property
    def metrics(self) -> bytes:
        return render(self.snapshot)

    @functools.cached_property
    def json(self) -> bytes:
        """Without environments: `worker_env` may hold secrets, and no file's mode guards this as it does a socket."""
        devices = [
            {**device, **{side: _without_environment(device[side]) for side in ("wanted", "actual")}}
            for device in self.snapshot.get("devices", [])
        ]
        tree = {**self.snapshot, "devices": devices} if devices else dict(self.snapshot)
        return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode()


def _without_environment(effect: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in effect.items() if name != "env"}


def _listens(endpoint: str) -> bool:
    """Whether somebody does, of this host."""
    host, port = parse_place(endpoint)
    with contextlib.suppress(OSError), socket.create_connection((address(host), port), timeout=0.2):
        return True
    return False


class _Http(ThreadingHTTPServer):
    """A thread for each connection, in bounds."""

    daemon_threads = True
    request_queue_size = 128  # that wait to be accepted; beyond it a client tries again only after a second

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._lock = threading.Lock()
        self._begun: dict[socket.socket, float] = {}  # oldest first
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """As HTTPServer's, without asking DNS for this host's full name, which can take many seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._begun) >= MOST_CONNECTIONS:
                oldest = next(iter(self._begun))
                del self._begun[oldest]
                _end(oldest)
            self._begun[request] = time.monotonic()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Called twice a second: end what has lived too long. Its thread then reads or writes in vain, and goes."""
        oldest = time.monotonic() - LIFE_S
        with self._lock:
            for connection in [found for found, begun in self._begun.items() if begun < oldest]:
                _end(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._begun.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left, or was ended, is not worth a line."""


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def _handler(pages: Pages) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = LIFE_S
        server_version = "blendmaskd"
        sys_version = ""

        def parse_request(self) -> bool:
            """Also refuses what names no host, or two (RFC 9112, 3.2); HTTP/1.0 knows none."""
            if not super().parse_request():
                return False
            if self.request_version == "HTTP/1.1" and len(self.headers.get_all("Host", ())) != 1:
                self.send_error(HTTPStatus.BAD_REQUEST)
                return False
            return True

        def do_GET(self) -> None:
            self._answer(pages.page(self.path.partition("?")[0], self.headers.get("Host")))

        do_HEAD = do_GET

        def do_POST(self) -> None:
            self._answer(Page(HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"GET or HEAD\n", {"Allow": "GET, HEAD"}))

        do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_POST

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What http.server refuses by itself, with our headers and without an echo of what was asked."""
            self.close_connection = True
            self._answer(Page(HTTPStatus(code), TEXT, f"{HTTPStatus(code).phrase}\n".encode()))

        def _answer(self, page: Page) -> None:
            self.send_response(page.status)
            headers = {"Content-Type": page.content_type, "Content-Length": str(len(page.body)), "Connection": "close"}
            for name, value in {**headers, **HEADERS, **page.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(page.body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not worth a line."""

    return Handler
