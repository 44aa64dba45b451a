"""Connections in bounds: how many, how long a request may take to arrive, and an answer to be read.

uvicorn bounds none of these. h11 reads the requests: it bounds their headers, and takes nothing that two readers could
understand differently.
"""
from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from blendmaskd.http.rest import Failure
from blendmaskd.protocol import Code
from blendmaskd.settings import Http

log = logging.getLogger("blendmaskd.http")

SHORTAGES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
MAX_HEADER_BYTES = 32 << 10
HANDSHAKE_S = 10.0  # of TLS
SWEEP_S = 0.5
MOST_LEAVING, LEAVING_S = 64, 1.0
BACKLOG, AT_ONCE = 1024, 16  # connections that wait for us, and that are taken before others are served
DESCRIPTORS = 65536
SHORTAGE_S = 10.0  # between two lines that complain of one
LATE_S = 2.0  # the application answers a body that is late; then the connection goes


class _Transport:
    """A transport that reads on when it is closed while a request arrives, until the client has left: else the kernel
    would take the answer back with what was not read.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport = transport
        self._connection = connection
        self._ends = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._ends or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing() or self._connection.conn.their_state is not h11.SEND_BODY:
            self._transport.close()
            return
        self._ends = True
        self._connection.end()
        self._transport.resume_reading()


class Connection(H11Protocol):
    """One connection. `http`, `most` and `leaving` are set by `Server`."""

    http: Http
    most: int  # connections at once
    connections: set[Any]  # all of the server
    leaving: set[Connection]  # refused, until they have read why
    since: float | None = None  # a request has been arriving
    unread_since: float | None = None  # more of an answer waits than the kernel takes
    quiet_since = 0.0  # nothing was asked

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self.since = self.quiet_since = self.loop.time()
        if len(self.connections) <= self.most:
            return
        quiet = [other for other in self.connections if other is not self and other.is_quiet]
        if quiet:
            oldest = min(quiet, key=lambda other: other.quiet_since)
            self.connections.discard(oldest)  # it is lost only later, and others are made before
            oldest.transport.abort()
        else:
            self.refuse(Failure(Code.BUSY, f"{self.most} connections wait for answers (http.max_connections)"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.leaving.discard(self)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self in self.leaving:
            return
        if self.since is None:
            self.since = self.loop.time()
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def _look(self) -> None:
        """Whether a request is arriving still, or the next one has begun to."""
        if self.conn.their_state is h11.SEND_BODY:
            return
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self.since = (self.since or self.loop.time()) if begun else None
        self.quiet_since = self.loop.time()

    def shutdown(self) -> None:
        """As uvicorn's; who waits for an answer is told that it is the last one here."""
        if not self.is_quiet:
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]
        super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread_since = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.unread_since = None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing of it would be lost: it has no request, or has its answer."""
        return self.cycle is None or self.cycle.response_complete

    def sweep(self, now: float) -> None:
        """End what takes too long."""
        if self.unread_since is not None and now - self.unread_since > self.http.send_s:
            self.transport.abort()
        elif self.since is None or now - self.since <= self.http.receive_s:
            return
        elif self.conn.our_state is h11.IDLE:
            self.refuse(late(self.http.receive_s))
        elif now - self.since > self.http.receive_s + LATE_S:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """For what h11 could not read, also while an answer is under way."""
        self.refuse(Failure(Code.BAD_REQUEST, "this is no HTTP/1.1 request, or its header has more than "
                            f"{MAX_HEADER_BYTES} bytes"))  # fmt: skip

    def refuse(self, failure: Failure) -> None:
        """Answer where that is still possible, and close: at once, the kernel would take the answer back with what was
        not read.
        """
        if self.transport.is_closing() or self in self.leaving:
            return
        if not self.is_quiet or len(self.leaving) >= MOST_LEAVING:
            self.transport.abort()
            return
        headers = {**failure.headers, "content-length": str(len(failure.body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        line = f"HTTP/1.1 {failure.status.value} {failure.status.phrase}\r\n"
        self.transport.write(f"{line}{head}\r\n".encode() + failure.body)
        self.end()
        self.connections.discard(self)
        self.leaving.add(self)
        self.loop.call_later(LEAVING_S, self.transport.abort)

    def end(self) -> None:
        """Tell whoever reads that nothing follows."""
        if self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # it has left meanwhile
                self.transport.write_eof()


def most_connections(wanted: int) -> int:
    """How many this process may have at once: half of the descriptors at most, whose limit is raised first."""
    found = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (DESCRIPTORS if limit == resource.RLIM_INFINITY else limit for limit in found)
    if soft < min(hard, DESCRIPTORS):
        soft = min(hard, DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, found[1]))
    return min(wanted, soft // 2)


def late(receive_s: float) -> Failure:
    return Failure(Code.TIMEOUT, f"the request did not arrive within {receive_s:g} s (http.receive_s)",
                   status=HTTPStatus.REQUEST_TIMEOUT)  # fmt: skip


class Server(uvicorn.Server):
    """Serves an application on a socket until `stop`; requests then have `drain_s` to be answered."""

    def __init__(self, app: Any, http: Http, drain_s: float, tls: ssl.SSLContext | None) -> None:
        most = most_connections(http.max_connections)
        kind = type("Connection", (Connection,), {"http": http, "most": most, "leaving": set()})
        super().__init__(uvicorn.Config(
            app, http=kind, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=False, workers=1,
            server_header=False, proxy_headers=False, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_keep_alive=math.ceil(http.idle_s), timeout_graceful_shutdown=math.ceil(drain_s),
        ))  # fmt: skip
        self._kind = kind
        self._tls = tls
        self._complains_at = 0.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with a bound on handshakes, and our lifespan's errors raised."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            raise RuntimeError("the application cannot start; see above")
        loop = asyncio.get_running_loop()
        timeout = HANDSHAKE_S if self._tls else None
        self.servers = [
            await loop.create_server(
                self._make, sock=each, ssl=self._tls, ssl_handshake_timeout=timeout, backlog=AT_ONCE
            )
            for each in sockets or []
        ]
        for each in sockets or []:
            each.listen(BACKLOG)  # asyncio has one number for both
        loop.set_exception_handler(self._on_fault)
        self.started = True
        self._sweep()

    def _on_fault(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """asyncio tries again in a second, and says so for each connection that it cannot take."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in SHORTAGES:
            loop.default_exception_handler(context)
        elif loop.time() > self._complains_at:
            self._complains_at = loop.time() + SHORTAGE_S
            log.error("connections have to wait: %s (LimitNOFILE=, ulimit -n)", error.strerror)

    def _make(self) -> asyncio.Protocol:
        state = self.lifespan.state
        made: asyncio.Protocol = self._kind(config=self.config, server_state=self.server_state, app_state=state)
        return made

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for connection in list(self.server_state.connections):
            connection.sweep(loop.time())  # type: ignore[union-attr]
        loop.call_later(SWEEP_S, self._sweep)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT drain, and are no reason to end by them."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield

    def stop(self) -> None:
        self.should_exit = True
