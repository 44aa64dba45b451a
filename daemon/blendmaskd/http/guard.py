"""What is around all routes: who may ask, how much is held at once, what is counted, how failures are answered.

Whoever may reach the front might be a page in somebody's browser. So a request with an Origin must come from the
front's own pages, and while the front listens on a loopback address it must be called by address, as `localhost` or by
one of `http.hosts`: a name that a stranger's DNS points at 127.0.0.1 is refused.
"""
from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blendmaskd.http.connections import MAX_HEADER_BYTES, late
from blendmaskd.http.metrics import Metrics
from blendmaskd.http.rest import Failure
from blendmaskd.http.tokens import Tokens
from blendmaskd.protocol import Code
from blendmaskd.settings import Http
from blendmaskd.shell.addresses import host_name, is_own_name

if TYPE_CHECKING:
    from blendmaskd.http.tracing import Tracing

OPEN = frozenset({"/healthz", "/readyz", "/v2/health/live", "/v2/health/ready",  # probes have no token
                  "/", "/docs", "/openapi.json"})  # hold nothing secret  # fmt: skip
HEADERS = {
    b"cache-control": b"no-store",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
METHODS = frozenset({"GET", "HEAD", "POST", "DELETE"})


class Guard:
    """Around an application; `routes` names its endpoints for metrics."""

    def __init__(
        self, app: ASGIApp, http: Http, tokens: Tokens | None, local: bool, metrics: Metrics,
        routes: Mapping[Any, str], tracing: Tracing | None,
    ) -> None:  # fmt: skip
        self._app = app
        self._hosts = frozenset(http.hosts)
        self._tokens = tokens
        self._strict = local or bool(http.hosts)
        self._metrics = metrics
        self._routes = routes
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, sent, received = time.monotonic(), 0, 0, 0

        async def count_in() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def count_out(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                there = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((k, v) for k, v in HEADERS.items() if k not in there)]
            sent += len(message.get("body", b""))
            await send(message)

        self._metrics.in_flight.inc()
        try:
            try:
                scope["client_name"] = self._admit(scope)
            except Failure as failure:
                await answer(failure, count_out)
            else:
                await self._app(scope, count_in, count_out)
        except asyncio.CancelledError:  # uvicorn's, when it stops and drain_s are over
            if not status:
                await answer(Failure(Code.DRAINING, "the front stops, and drain_s are over"), count_out)
        finally:
            self._metrics.in_flight.dec()
            route = self._routes.get(scope.get("endpoint"), "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            seconds = time.monotonic() - begun
            self._metrics.answered(route, method, status, seconds, received, sent)
            if self._tracing is not None and (route.startswith("/v1/") or route.endswith("/infer")):
                found = scope.get("answer")
                timings, device = (found.timings, found.device) if found else ({}, "")
                self._tracing.record(scope["headers"], method, route, status, seconds, timings, device)

    def _admit(self, scope: Scope) -> str:
        """The name of whoever asks; empty without tokens. Raises `Failure`."""
        headers = scope["headers"]
        _check_form(headers)
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = hosts[0] if hosts else None
        if self._strict and not is_own_name(host) and host_name(host or "") not in self._hosts:
            reason = f"the front is not called so: {host!r:.100} (http.hosts)"
            raise Failure(Code.BAD_REQUEST, reason, status=HTTPStatus.MISDIRECTED_REQUEST)
        for name, value in headers:
            if name == b"origin" and value.decode("latin-1").partition("://")[2] != (host or ""):
                reason = "pages of other sites may not ask (the Origin is not the Host)"
                raise Failure(Code.UNAUTHORISED, reason, status=HTTPStatus.FORBIDDEN)
        if self._tokens is None or scope["path"] in OPEN:
            return ""
        given = next((value.decode("latin-1") for name, value in headers if name == b"authorization"), "")
        kind, _, token = given.partition(" ")
        found = self._tokens.name_of(token.strip()) if kind.lower() == "bearer" else None
        if found is None:
            raise Failure(Code.UNAUTHORISED, "this needs a token that http.tokens has: Authorization: Bearer TOKEN")
        return found


def _check_form(headers: list[tuple[bytes, bytes]]) -> None:
    """What h11 lets pass. Raises `Failure`."""
    if sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
        raise Failure(Code.TOO_LARGE, f"a header has at most {MAX_HEADER_BYTES} bytes",
                      status=HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)  # fmt: skip
    names = {name for name, _ in headers}
    if {b"content-length", b"transfer-encoding"} <= names:  # a proxy before us may have gone by the other one
        raise Failure(Code.BAD_REQUEST, "Content-Length and Transfer-Encoding exclude each other")


async def answer(failure: Failure, send: Send) -> None:
    """Of all that is refused here, only an image without a token is worth reading to its end."""
    headers = {**failure.headers, "content-length": str(len(failure.body))}
    if failure.status != HTTPStatus.UNAUTHORIZED:
        headers["connection"] = "close"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status.value, "headers": raw})
    await send({"type": "http.response.body", "body": failure.body})


class Budget:
    """Bytes of requests that are held at once."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held = 0

    def take(self, count: int) -> None:
        """Raises `Failure`."""
        if self._held + count > self.most:
            raise Failure(Code.BUSY, f"the front holds {self._held} bytes of requests (http.max_bytes)")
        self._held += count

    def give_back(self, count: int) -> None:
        self._held -= count


class Held:
    """The body of a request, read within limits, and held until the end of the block."""

    def __init__(self, budget: Budget, receive_s: float) -> None:
        self._budget = budget
        self._receive_s = receive_s
        self._count = 0

    async def __aenter__(self) -> Held:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._budget.give_back(self._count)

    async def read(self, request: Request, most: int) -> bytes:
        """Raises `Failure`, and ClientDisconnect."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Failure(Code.BAD_REQUEST, "bodies are taken as they are, without Content-Encoding",
                          status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE)  # fmt: skip
        most = min(most, self._budget.most)
        self._check(int(request.headers.get("content-length", 0)), most)
        parts = []
        try:
            async with asyncio.timeout(self._receive_s):
                async for part in request.stream():
                    self._check(self._count + len(part), most)
                    self._budget.take(len(part))
                    self._count += len(part)
                    parts.append(part)
        except TimeoutError:
            raise late(self._receive_s) from None
        return b"".join(parts)

    def _check(self, count: int, most: int) -> None:
        if count > most:
            reason = f"{count} bytes: a request has at most {most} (limits.max_image_bytes, http.max_bytes)"
            raise Failure(Code.TOO_LARGE, reason)
