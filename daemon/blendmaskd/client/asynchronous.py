"""`AsyncClient`, the client for asyncio; `blendmaskd.client.blocking` has both and describes them."""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, Self

import zmq.asyncio

from blendmaskd import protocol
from blendmaskd.client.connection import Connection, HandshakeError, check_window, wants_ipv6
from blendmaskd.client.exchange import Call, Image, JobFailed, Segmentation
from blendmaskd.protocol import Code, GetStats, Options


class AsyncClient(Connection):
    """The same for asyncio. Any number of tasks of one event loop may share it; use it as ``async with``.

    A call outside of that, or in another loop, raises RuntimeError.
    """

    _loop: asyncio.AbstractEventLoop | None = None
    _broken: Exception | None = None  # what has ended a task of ours

    async def __aenter__(self) -> Self:
        if self._loop is not None and not self._closed:
            raise RuntimeError("this client is in use already: make another one")
        ipv6 = await asyncio.to_thread(wants_ipv6, self.endpoint)
        self._loop, self._broken = asyncio.get_running_loop(), None
        self._futures: dict[str, asyncio.Future[None]] = {}
        self._stats_futures: list[asyncio.Future[dict[str, Any]]] = []
        self._connect(ipv6, zmq.asyncio.Context())
        self._wake = asyncio.Event()
        if self._places:
            self._loop.add_reader(self._places.fileno(), self._read_memory)
        self._tasks = [asyncio.create_task(self._keep(task)) for task in (self._read, self._write, self._watch)]
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._closed or self._is_foreign:
            return
        self._closed = True
        for name in list(self._futures):
            await self._close_job(name)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._disconnect()

    def _check_usable(self) -> None:
        super()._check_usable()
        if self._loop is None:
            raise RuntimeError("this client is not connected: use it as `async with AsyncClient(...) as client`")
        if self._loop is not asyncio.get_running_loop():
            raise RuntimeError("this client belongs to another event loop: make one in each loop")
        if self._broken is not None:
            raise RuntimeError(f"this client has failed: {self._broken!r}: make another one") from self._broken

    async def segment(
        self, image: Image, *, deadline_s: float | None = None, priority: int = 0, **options: Any
    ) -> Segmentation:
        """As `Client.segment`. Cancelling the task cancels the job."""
        self._check_usable()
        job = self._exchange.add(image, deadline_s, priority, Options(**options), time.monotonic())
        await self._wait_for(job)
        return job.result()

    async def submit(
        self, image: Image, *, job: str | None = None, deadline_s: float | None = None, priority: int = 0,
        **options: Any,
    ) -> str:  # fmt: skip
        """As `Client.submit`."""
        self._check_usable()
        added = self._exchange.add_durable(image, job, deadline_s, priority, Options(**options), time.monotonic())
        await self._wait_for(added)
        added.check()
        return added.name

    async def fetch(self, job: str, *, wait: bool = True) -> Segmentation | None:
        """As `Client.fetch`. Raises ValueError while another task of this client asks for the same job."""
        self._check_usable()
        asked = self._exchange.ask(protocol.Fetch(job=job, wait=wait), time.monotonic())
        await self._wait_for(asked)
        return None if isinstance(asked.answer, protocol.Accepted) else asked.result()

    async def forget(self, job: str) -> None:
        """As `Client.forget`."""
        self._check_usable()
        asked = self._exchange.ask(protocol.Forget(job=job), time.monotonic())
        await self._wait_for(asked)
        asked.check()

    async def _wait_for(self, job: Call) -> None:
        self._renew()
        name = job.name
        future = self._futures[name] = asyncio.get_running_loop().create_future()
        self._wake.set()
        try:
            async with asyncio.timeout(self.timeout_s):
                await future
        except TimeoutError:
            raise self._timed_out() from None
        finally:
            if job.answer is None:
                await self._abandon(name)

    async def map(
        self, images: Iterable[Image], *, window: int = 16, **options: Any
    ) -> AsyncGenerator[Segmentation, None]:
        """As `Client.map`, raising the first failure."""
        self._check_usable()
        check_window(window)
        tasks: deque[asyncio.Task[Segmentation]] = deque()
        source = iter(images)
        try:
            while True:
                for image in itertools.islice(source, window - len(tasks)):
                    tasks.append(asyncio.create_task(self.segment(image, **options)))
                if not tasks:
                    return
                yield await tasks[0]
                tasks.popleft()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stats(self) -> dict[str, Any]:
        """As `Client.stats`."""
        self._check_usable()
        self._renew()
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._stats_futures.append(future)
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._socket.send_multipart(protocol.encode(GetStats()))
                return await future
        except TimeoutError:
            raise self._timed_out() from None

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Work that must go on as long as the client: whoever waits has its error, and so has every later call."""
        try:
            await work()
        except Exception as error:
            self._broken = error
            self._fail_all(error)

    async def _read(self) -> None:
        while True:
            self._exchange.receive(await self._socket.recv_multipart(copy=False), time.monotonic())
            self._tell_answered()
            while self._exchange.stats:
                self._tell_stats(self._exchange.stats.popleft())
            self._wake.set()

    def _read_memory(self) -> None:
        self._exchange.receive_memory(time.monotonic())
        self._wake.set()

    def _tell_answered(self) -> None:
        while self._exchange.answered:
            self._tell(self._exchange.answered.popleft())

    def _tell(self, job: Call) -> None:
        future = self._futures.pop(job.name, None)
        if future is not None and not future.done():  # done: its task was cancelled and has not run since
            future.set_result(None)

    def _tell_stats(self, snapshot: dict[str, Any]) -> None:
        """To all who wait: an answer that went missing must not leave the next one with the wrong caller."""
        waiting, self._stats_futures = self._stats_futures, []
        for future in waiting:
            if not future.done():
                future.set_result(snapshot)

    async def _write(self) -> None:
        while True:
            self._wake.clear()
            for frames in self._exchange.due(time.monotonic()):
                await self._socket.send_multipart(frames, copy=False)
            self._tell_answered()
            wait_s = self._exchange.next_send() - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(wait_s) else max(wait_s, 0)):
                    await self._wake.wait()

    async def _watch(self) -> None:
        while True:
            self._on_event(await self._monitor.recv_multipart())
            self._wake.set()
            if self._refused:
                self._fail_all(HandshakeError(self._refused))

    def _fail_all(self, error: Exception) -> None:
        """To all who wait."""
        waiting: list[asyncio.Future[Any]] = [*self._futures.values(), *self._stats_futures]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
        self._stats_futures.clear()

    async def _close_job(self, name: str) -> None:
        """Whoever still waits for it is told why it ends."""
        job = self._exchange.jobs.get(name)
        if job is not None:  # else it was answered just now
            job.answer = JobFailed(Code.CANCELLED, "the client was closed")
            self._tell(job)
            await self._abandon(name)

    def _disconnect(self) -> None:
        if self._places:
            asyncio.get_running_loop().remove_reader(self._places.fileno())
        super()._disconnect()

    async def _abandon(self, name: str) -> None:
        self._futures.pop(name, None)
        if self._exchange.drop(name) and not self._refused:  # else there is no pipe to send into
            await self._socket.send_multipart(protocol.encode(protocol.Cancel(job=name)))
