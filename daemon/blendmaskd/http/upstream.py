"""The broker as the front sees it: a client for each token, so that turns stay fair between them.

Nothing here waits for ever: an answer is waited for until its deadline, a broker that is away for `wait_s`, and nobody
waits for whoever has left.
"""
from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Set
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from blendmaskd.client.asynchronous import AsyncClient
from blendmaskd.client.exchange import Described, JobFailed
from blendmaskd.client.exchange import Segmentation as Answer
from blendmaskd.http.rest import Failure, Query, Request
from blendmaskd.protocol import Code

log = logging.getLogger("blendmaskd.http")

LATE_S = 2.0  # that an answer may come after its deadline: the broker's own `timeout` comes first
STATS_S = 3.0
FRESH_S = 1.0  # the broker takes a snapshot each second
LONGEST_S = 2 * 86400.0  # no deadline of ours is later

T = TypeVar("T")


class Upstream:
    """A call that is cancelled, as when whoever asked has left, cancels its job."""

    def __init__(self, endpoint: str, wait_s: float) -> None:
        self._endpoint = endpoint
        self._wait_s = wait_s
        self._members: dict[str, _Member] = {}
        self._snapshot: tuple[float, dict[str, Any] | Failure] = (-math.inf, {})  # when it was taken
        self._asking = asyncio.Lock()
        self._complained = False  # since a daemon answered

    async def segment(self, name: str, request: Request[Any]) -> Answer:
        """The answer to an image. Raises `Failure`."""
        member = await self._member(name)
        call = member.client.segment(_image(request), deadline_s=request.deadline_s, **_options(request.query))
        return await self._answer(member, call, request.deadline_s)

    async def submit(self, name: str, request: Request[Any], job: str) -> None:
        """Accept a durable job. Raises `Failure`."""
        member = await self._member(name)
        options = _options(request.query) | {"deadline_s": request.query.deadline_s}
        await self._answer(member, member.submit(job, _image(request), **options), 60.0)

    async def fetch(self, name: str, job: str, wait_s: float) -> Answer | JobFailed | None:
        """The answer of a durable job, or how it failed; None if there is neither within `wait_s`.

        Raises `Failure`, `unknown-job` among others.
        """
        member = await self._member(name)
        return await self._answer(member, _ended(member.fetch(job, wait_s)), wait_s + 60.0)

    async def forget(self, name: str, job: str) -> None:
        """Raises `Failure`."""
        member = await self._member(name)
        await self._answer(member, member.forget(job), 60.0)

    async def snapshot(self) -> dict[str, Any]:
        """The broker's latest snapshot, at most a second old. Raises `Failure`."""
        async with self._asking:
            if time.monotonic() - self._snapshot[0] > FRESH_S:
                found = await self._ask_snapshot()
                self._snapshot = time.monotonic(), found
        found = self._snapshot[1]
        if isinstance(found, Failure):
            raise found
        return found

    async def _ask_snapshot(self) -> dict[str, Any] | Failure:
        """A failure is kept as well: those who ask together must not wait one after the other."""
        member = await self._member("")
        try:
            return await self._answer(member, member.client.stats(), STATS_S)
        except Failure as failure:
            return failure

    async def close(self, keep: Set[str] = frozenset()) -> None:
        """Close the clients, but for those of these tokens."""
        for name in self._members.keys() - keep:
            await self._members.pop(name).leave()

    async def _member(self, name: str) -> _Member:
        if name not in self._members:
            self._members[name] = _Member(AsyncClient(self._endpoint, timeout_s=LONGEST_S, retries=0))
        member = self._members[name]
        try:
            await member.enter()
        except Exception as error:  # for want of descriptors, say
            self._drop(member)
            log.error("no client of the broker can be made: %s", error)
            raise Failure(Code.UNAVAILABLE, f"the front cannot connect to the daemon: {error}") from None
        return member

    def _drop(self, member: _Member) -> None:
        """Whoever comes next gets a new one."""
        self._members = {name: other for name, other in self._members.items() if other is not member}

    def _complain(self, client: AsyncClient) -> None:
        if not self._complained:
            log.warning("no daemon answers at %s.%s", client.endpoint, client.hint)
        self._complained = True

    async def _answer(self, member: _Member, call: Awaitable[T], limit_s: float) -> T:
        task = asyncio.ensure_future(call)
        give_up = time.monotonic() + limit_s + LATE_S
        try:
            while not task.done():
                away_s, left_s = member.client.away_s, give_up - time.monotonic()
                if away_s > self._wait_s:
                    self._complain(member.client)
                    raise Failure(Code.UNAVAILABLE, f"no daemon has been there for {away_s:.0f} s", self._wait_s)
                if left_s <= 0:
                    absent = f": none has been there for {away_s:.1f} s" if away_s else ""
                    raise Failure(Code.TIMEOUT, f"the daemon has not answered within the deadline{absent}")
                patience = max(self._wait_s - away_s, 0.0) + 0.01
                await asyncio.wait({task}, timeout=min(left_s, patience, 1.0))
            found = task.result()
            self._complained = False
            return found
        except JobFailed as error:
            raise Failure(error.code, error.reason, error.retry_after_s) from None
        except RuntimeError as error:  # the client has failed
            log.exception("a client of the broker has failed")
            self._drop(member)
            raise Failure(Code.UNAVAILABLE, str(error)) from None
        finally:
            task.cancel()


class _Member:
    """One client of the broker. Requests about one durable job go one at a time, as answers do not tell them apart."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self._entering: asyncio.Task[Any] | None = None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: dict[str, _Wait] = {}

    async def enter(self) -> None:
        if self._entering is None:
            self._entering = asyncio.create_task(self.client.__aenter__())
        await asyncio.shield(self._entering)

    async def leave(self) -> None:
        if self._entering is not None:
            with contextlib.suppress(Exception):  # then it was never connected
                await self._entering
                await self.client.__aexit__(None, None, None)

    async def submit(self, job: str, image: Any, **options: Any) -> None:
        if job not in self._waiting:  # else it was accepted before
            await self._alone(job, lambda: self.client.submit(image, job=job, **options))

    async def fetch(self, job: str, wait_s: float) -> Answer | None:
        if job not in self._waiting:  # only what was accepted is waited for: `submit` relies on it
            found = await self._alone(job, lambda: self.client.fetch(job, wait=False))
            if found is not None or not wait_s:
                return found
        wait = self._waiting.get(job)
        if wait is None:
            wait = self._waiting[job] = _Wait(asyncio.create_task(self._alone(job, lambda: self.client.fetch(job))))
        wait.callers += 1
        try:
            await asyncio.wait({wait.task}, timeout=wait_s)
            if wait.task.cancelled():
                raise JobFailed(Code.CANCELLED, "the job was deleted", job=job)
            return wait.task.result() if wait.task.done() else None
        finally:
            wait.callers -= 1
            if not wait.callers:
                self._end(job, wait)

    async def forget(self, job: str) -> None:
        if wait := self._waiting.get(job):
            self._end(job, wait)
        await self._alone(job, lambda: self.client.forget(job))

    def _end(self, job: str, wait: _Wait) -> None:
        wait.task.cancel()
        if self._waiting.get(job) is wait:
            del self._waiting[job]

    async def _alone(self, job: str, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._turns.setdefault(job, asyncio.Lock()):
            return await call()


@dataclass(slots=True)
class _Wait:
    """A fetch that waits, for all who ask for the same job."""

    task: asyncio.Task[Answer | None]
    callers: int = 0


async def _ended(call: Awaitable[T]) -> T | JobFailed:
    """How the job failed, if it is not the asking."""
    try:
        return await call
    except JobFailed as error:
        if error.code in (Code.UNKNOWN_JOB, Code.BUSY, Code.DRAINING, Code.UNAVAILABLE):
            raise
        return error


def _image(request: Request[Any]) -> Described:
    return Described(request.image, [] if request.image.kind == "path" else [request.payload])


def _options(query: Query) -> dict[str, Any]:
    options: dict[str, Any] = msgspec.structs.asdict(query.options)
    if query.options.max_detections is None:
        del options["max_detections"]
    return options | {"priority": getattr(query, "priority", 0)}
