"""The client: `Client` blocks, `AsyncClient` awaits; both keep many jobs in flight over one socket.

    from daemon.client import Client

    with Client("ipc:///run/blendmaskd/client.sock") as client:
        result = client.segment("photo.jpg", score_threshold=0.3)
        for result in client.map(["a.jpg", "b.jpg"]):
            print(result.width, result.height, len(result.detections))

An image is a file's path (read here and sent), the bytes of an encoded image, a uint8 array of height x width x 3 in
BGR order, or a `ServerPath`. A failed job raises `JobFailed` with one of `daemon.protocol.Code`.

Trying again is safe: a job keeps its name and the socket its identity, so the daemon recognises a job that it still
has and never runs it twice at once. What the daemon says may succeed later (`busy`, `worker-lost`, …) is tried again
after the time that it names, for as long as `timeout_s` allows; when the connection comes back, after a restart of the
daemon say, what is unanswered is sent again. Nothing here imports torch, or numpy.
"""
from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgpack
import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from daemon import protocol
from daemon.protocol import TO_CLIENT, Code, Failed, GetStats, Options, Result, Stats, Submit

DEFAULT_ENDPOINT = "ipc:///run/blendmaskd/client.sock"
LEAST_RETRY_S = 0.05
RETRIES = 8
LONGEST_DEADLINE_S = 86400.0  # that the wire allows
LONGEST_POLL_S = 3600.0  # poll takes no infinite time
ANSWER_S = 0.5  # that the daemon's `timeout` may take to come, so that the client does not give up just before it


class JobFailed(Exception):
    """A job was answered with a failure: `code` says which, `reason` why."""

    def __init__(self, code: Code, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ServerPath:
    """An image that the server reads itself, below a root that its settings allow."""

    path: str


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The answer to a job. `detections` are COCO results in descending score, see `daemon.protocol`."""

    width: int  # pixels
    height: int
    device: str
    timings: dict[str, float]  # seconds by stage
    detections: list[dict[str, Any]]


Image = str | Path | bytes | ServerPath | Any  # Any: an array, or what else has `shape`, `dtype` and a buffer


@dataclass(slots=True, eq=False)
class Job:
    """A submission until its answer is taken."""

    submit: Submit
    payload: list[Any]
    retries_left: int
    give_up_at: float  # no retry starts after it
    send_at: float  # inf: sent, waiting
    answer: Segmentation | JobFailed | OSError | None = None  # OSError: its file cannot be read

    def frames(self) -> list[Any]:
        return protocol.encode(self.submit, self.payload)

    def result(self) -> Segmentation:
        assert self.answer is not None
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Exchange:
    """What is in flight, and what is to be sent when. Pure: no socket, no clock."""

    def __init__(self, retries: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._retries = retries
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self.jobs: dict[str, Job] = {}  # unanswered
        self.stats: deque[dict[str, Any]] = deque()

    def add(self, image: Image, deadline_s: float | None, priority: int, options: Options, now: float) -> Job:
        """A new job, to be sent at once. Raises OSError for a file that cannot be read, TypeError for no image."""
        described, payload = describe(image)
        name = f"{self._prefix}-{next(self._numbers)}"
        if deadline_s is None:
            deadline_s = min(max(self.timeout_s - ANSWER_S, self.timeout_s / 2), LONGEST_DEADLINE_S)
        submit = Submit(job=name, image=described, options=options, deadline_s=deadline_s, priority=priority)
        job = self.jobs[name] = Job(submit, payload, self._retries, give_up_at=now + self.timeout_s, send_at=now)
        return job

    def due(self, now: float) -> Iterator[list[Any]]:
        """Frames to be sent now."""
        for job in list(self.jobs.values()):
            if job.send_at <= now:
                job.send_at = math.inf
                yield job.frames()

    def next_send(self) -> float:
        return min((job.send_at for job in self.jobs.values()), default=math.inf)

    def reconnected(self, now: float) -> None:
        """Whoever is at the other end now may not know of what was sent before."""
        for job in self.jobs.values():
            job.send_at = min(job.send_at, now)

    def receive(self, frames: list[Any], now: float) -> Job | None:
        """Take in a message; returns the job that it answers, if that has its last answer now."""
        message: protocol.ToClient
        message, payload = protocol.decode(frames, TO_CLIENT)
        match message:
            case Stats():
                self.stats.append(message.stats)
            case Result() if message.job in self.jobs:
                job = self.jobs.pop(message.job)
                detections = msgpack.unpackb(memoryview(payload[0]))
                job.answer = Segmentation(
                    message.width, message.height, message.device, message.timings, detections
                )
                return job
            case Failed() if message.job in self.jobs:
                return self._failed(self.jobs[message.job], message, now)
        return None

    def _failed(self, job: Job, message: Failed, now: float) -> Job | None:
        may_retry = message.code.retryable and message.code is not Code.TIMEOUT
        again_at = now + max(message.retry_after_s or 0.0, LEAST_RETRY_S)
        if may_retry and job.retries_left and again_at < job.give_up_at:
            job.retries_left -= 1
            job.send_at = again_at
            return None
        del self.jobs[message.job]
        job.answer = JobFailed(message.code, message.reason, message.retry_after_s)
        return job


def describe(image: Image) -> tuple[protocol.Image, list[Any]]:
    """How an image travels, and its payload frames."""
    match image:
        case ServerPath():
            return protocol.Image(kind="path", path=image.path), []
        case str() | Path():
            return protocol.Image(kind="encoded"), [Path(image).read_bytes()]
        case bytes() | bytearray() | memoryview():
            return protocol.Image(kind="encoded"), [image]
    shape, dtype = getattr(image, "shape", None), str(getattr(image, "dtype", ""))
    if shape is None:
        raise TypeError(f"{type(image).__name__} is not an image: expected a path, bytes or an array")
    if len(shape) != 3:
        raise TypeError(f"array of shape {tuple(shape)}: expected (height, width, 3)")
    contiguous = memoryview(image) if memoryview(image).c_contiguous else image.tobytes()
    return protocol.Image(kind="raw", shape=(int(shape[0]), int(shape[1]), int(shape[2])), dtype=dtype), [contiguous]


class _Connection:
    """What both clients share: endpoint, settings, the exchange."""

    def __init__(self, endpoint: str, timeout_s: float, retries: int) -> None:
        self.endpoint = endpoint
        self._exchange = Exchange(retries, timeout_s)

    @property
    def timeout_s(self) -> float:
        """How long an answer is waited for."""
        return self._exchange.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._exchange.timeout_s = seconds

    def _open(self, socket: zmq.Socket[Any]) -> None:
        socket.set(zmq.IDENTITY, b"c" + secrets.token_bytes(15))  # ROUTERs reserve identities that begin with 0
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)  # at a mark a send would block, whatever `timeout_s` says; callers bound themselves
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise ValueError(f"{self.endpoint}: {error}: expected ipc:///PATH or tcp://HOST:PORT") from None

    def _add(self, image: Image, deadline_s: float | None, priority: int, options: Mapping[str, Any]) -> Job:
        return self._exchange.add(image, deadline_s, priority, Options(**options), time.monotonic())

    def _timed_out(self) -> TimeoutError:
        return TimeoutError(f"no answer from {self.endpoint} within {self.timeout_s:g} s: does the daemon run there?")


class Client(_Connection):
    """Blocking client. Not for several threads at once; each may have its own.

    `timeout_s` bounds each wait for an answer, and is the deadline of a job that names none; `retries` bounds how often
    a job is tried again when the daemon says that this can help. Raises ValueError for an endpoint that is none.
    """

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, timeout_s: float = 60.0, retries: int = RETRIES) -> None:
        super().__init__(endpoint, timeout_s, retries)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._was_connected = False
        try:
            self._open(self._socket)
        except ValueError:
            self.close()
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def segment(
        self,
        image: Image,
        *,
        deadline_s: float | None = None,
        priority: int = 0,
        **options: Any,
    ) -> Segmentation:
        """Segment one image. `options`: score_threshold, max_detections, mask_format, see `protocol.Options`.

        Raises `JobFailed`, TimeoutError when no answer comes, OSError for a file that cannot be read.
        """
        job = self._add(image, deadline_s, priority, options)
        self._wait_for(job)
        return job.result()

    def map(
        self, images: Iterable[Image], *, window: int = 16, on_error: Literal["raise", "return"] = "raise",
        deadline_s: float | None = None, priority: int = 0, **options: Any,
    ) -> Generator[Segmentation | JobFailed, None, None]:  # fmt: skip
        """Segment many images, `window` of them in flight; the results come in the order of the images.

        In its place a failed job raises, or with ``on_error="return"`` stands as a `JobFailed`; so does a file that
        cannot be read, as an OSError or as `bad-image`. TimeoutError is raised in any case.
        """
        _check_window(window)
        jobs: deque[Job] = deque()
        source = iter(images)
        try:
            while True:
                for image in itertools.islice(source, window - len(jobs)):
                    jobs.append(self._add_or_fail(image, on_error, deadline_s, priority, options))
                if not jobs:
                    return
                self._wait_for(jobs[0])
                job = jobs.popleft()
                yield job.answer if on_error == "return" and isinstance(job.answer, JobFailed) else job.result()
        finally:
            for job in jobs:
                self._abandon(job)

    def stats(self) -> dict[str, Any]:
        """The daemon's latest snapshot; its keys are described in `daemon/stats.py`."""
        self._exchange.stats.clear()
        self._socket.send_multipart(protocol.encode(GetStats()))
        deadline = time.monotonic() + self.timeout_s
        while not self._exchange.stats:
            self._turn(deadline)
        return self._exchange.stats.popleft()

    def close(self) -> None:
        """Give up what is in flight and disconnect."""
        for job in list(self._exchange.jobs.values()):
            self._abandon(job)
        self._socket.disable_monitor()
        self._context.destroy(linger=200)  # lets the cancellations leave

    def _add_or_fail(
        self, image: Image, on_error: str, deadline_s: float | None, priority: int, options: Mapping[str, Any]
    ) -> Job:
        try:
            job = self._add(image, deadline_s, priority, options)
        except OSError as error:
            failed = JobFailed(Code.BAD_IMAGE, f"cannot be read: {error.strerror or error}")
            answer = error if on_error == "raise" else failed
            return Job(Submit(job="-", image=protocol.Image(kind="encoded")), [], 0, 0.0, math.inf, answer)
        self._send_due()
        return job

    def _wait_for(self, job: Job) -> None:
        deadline = time.monotonic() + self.timeout_s
        try:
            while job.answer is None:
                self._turn(deadline)
        except BaseException:
            self._abandon(job)
            raise

    def _turn(self, deadline: float) -> None:
        """Send what is due, take in what comes, until something did or the deadline passes."""
        self._send_due()
        now = time.monotonic()
        if now >= deadline:
            raise self._timed_out()
        until = min(deadline, self._exchange.next_send(), now + LONGEST_POLL_S)
        wait_ms = math.ceil((until - now) * 1000)
        events = dict(self._poller.poll(max(wait_ms, 0)))
        if self._monitor in events:
            self._on_monitor()
        if self._socket in events:
            self._exchange.receive(self._socket.recv_multipart(copy=False), time.monotonic())

    def _send_due(self) -> None:
        for frames in self._exchange.due(time.monotonic()):
            self._socket.send_multipart(frames, copy=False)

    def _on_monitor(self) -> None:
        event = parse_monitor_message(self._monitor.recv_multipart())["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            if self._was_connected:
                self._exchange.reconnected(time.monotonic())
            self._was_connected = True

    def _abandon(self, job: Job) -> None:
        if self._exchange.jobs.pop(job.submit.job, None) is not None:
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(protocol.encode(protocol.Cancel(job=job.submit.job)), zmq.NOBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient(_Connection):
    """The same for asyncio. Any number of tasks of one event loop may share it; use it as ``async with``."""

    def __init__(self, endpoint: str = DEFAULT_ENDPOINT, timeout_s: float = 60.0, retries: int = RETRIES) -> None:
        super().__init__(endpoint, timeout_s, retries)
        self._futures: dict[str, asyncio.Future[None]] = {}
        self._stats_futures: list[asyncio.Future[dict[str, Any]]] = []

    async def __aenter__(self) -> Self:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            self._open(self._socket)
        except ValueError:
            self._disconnect()
            raise
        self._wake = asyncio.Event()
        self._tasks = [asyncio.create_task(task()) for task in (self._read, self._write, self._watch)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._futures):
            await self._close_job(name)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._disconnect()

    async def segment(
        self, image: Image, *, deadline_s: float | None = None, priority: int = 0, **options: Any
    ) -> Segmentation:
        """As `Client.segment`. Cancelling the task cancels the job."""
        job = self._add(image, deadline_s, priority, options)
        name = job.submit.job
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
        return job.result()

    async def map(
        self, images: Iterable[Image], *, window: int = 16, **options: Any
    ) -> AsyncGenerator[Segmentation, None]:
        """As `Client.map`, raising the first failure."""
        _check_window(window)
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
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._stats_futures.append(future)
        await self._socket.send_multipart(protocol.encode(GetStats()))
        try:
            async with asyncio.timeout(self.timeout_s):
                return await future
        except TimeoutError:
            raise self._timed_out() from None

    async def _read(self) -> None:
        while True:
            job = self._exchange.receive(await self._socket.recv_multipart(copy=False), time.monotonic())
            if job is not None:
                self._tell(job)
            while self._exchange.stats:
                self._tell_stats(self._exchange.stats.popleft())
            self._wake.set()

    def _tell(self, job: Job) -> None:
        future = self._futures.pop(job.submit.job, None)
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
            wait_s = self._exchange.next_send() - time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(wait_s) else max(wait_s, 0)):
                    await self._wake.wait()

    async def _watch(self) -> None:
        connected = False
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if connected:
                    self._exchange.reconnected(time.monotonic())
                    self._wake.set()
                connected = True

    async def _close_job(self, name: str) -> None:
        """Whoever still waits for it is told why it ends."""
        job = self._exchange.jobs.get(name)
        if job is not None:  # else it was answered just now
            job.answer = JobFailed(Code.CANCELLED, "the client was closed")
            self._tell(job)
            await self._abandon(name)

    def _disconnect(self) -> None:
        self._socket.disable_monitor()
        self._context.destroy(linger=200)  # lets the cancellations leave

    async def _abandon(self, name: str) -> None:
        self._futures.pop(name, None)
        if self._exchange.jobs.pop(name, None) is not None:
            await self._socket.send_multipart(protocol.encode(protocol.Cancel(job=name)))


def _check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window = {window}: expected at least 1")
