"""The client: `Client` blocks, `AsyncClient` awaits; both keep many jobs in flight over one socket.

    from blendmaskd import Client

    with Client("ipc:///run/blendmaskd/client.sock") as client:
        result = client.segment("photo.jpg", score_threshold=0.3)
        for result in client.map(["a.jpg", "b.jpg"]):
            print(result.width, result.height, len(result.detections))

An image is a file's path (read here and sent), the bytes of an encoded image, a uint8 array of height x width x 3 in
BGR order, or a `ServerPath`. A failed job raises `JobFailed` with one of `blendmaskd.protocol.Code`.

Trying again is safe: a job keeps its name and the socket its identity, so the daemon recognises a job that it still
has and never runs it twice at once. What the daemon says may succeed later (`busy`, `unavailable`, …) is tried again
after the time that it names, for as long as `timeout_s` allows; when the connection comes back, after a restart of the
daemon say, what is unanswered is sent again. Nothing here imports torch, or numpy.

``submit`` leaves a durable job with a daemon that has a spool, and ``fetch`` has its answer, from any process, whatever
died in between.

Large images go to a daemon on the same host through shared memory, see `blendmaskd.client.places`; answers come by
socket. ``transport="socket"`` does without, ``"shared"`` fails where there is none.
"""
from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any, Literal, Self

import zmq

from blendmaskd import protocol
from blendmaskd.client.asynchronous import AsyncClient
from blendmaskd.client.connection import DEFAULT_ENDPOINT, Connection, HandshakeError, check_window, wants_ipv6
from blendmaskd.client.exchange import Call, Image, JobFailed, Segmentation, ServerPath, SharedMemoryError
from blendmaskd.keys import KeyFileError
from blendmaskd.protocol import Code, GetStats, Options, Submit

__all__ = [  # what `blendmaskd` exports
    "DEFAULT_ENDPOINT", "AsyncClient", "Client", "Code", "HandshakeError", "Image", "JobFailed", "KeyFileError",
    "Segmentation", "ServerPath", "SharedMemoryError",
]  # fmt: skip

LONGEST_POLL_S = 3600.0  # poll takes no infinite time


class Client(Connection):
    """Blocking client. Not for several threads at once, nor for a forked child; each may have its own, and a call that
    comes while another thread's runs raises RuntimeError, as one on a closed client does.

    `timeout_s` bounds each wait for an answer, and is the deadline of a job that names none; `retries` bounds how often
    a job is tried again when the daemon says that this can help. A tcp:// endpoint takes keys, see `blendmaskd.keys`:
    `server_key` is the file of the daemon's public key, `key` that of our own secret one.
    Raises ValueError for an endpoint that is none and for keys that cannot be used; each call that waits for the
    daemon raises `HandshakeError` when it does not let us in.
    """

    _closed = True  # until it is connected

    def _begin(self) -> None:
        self._thread = threading.RLock()  # held by the thread whose call runs
        self._connect(wants_ipv6(self.endpoint), zmq.Context())
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        if self._places:
            self._poller.register(self._places.fileno(), zmq.POLLIN)

    def segment(
        self, image: Image, *, deadline_s: float | None = None, priority: int = 0, **options: Any
    ) -> Segmentation:
        """Segment one image. `options`: score_threshold, max_detections, mask_format, see `protocol.Options`.

        Raises `JobFailed`, TimeoutError when no answer comes, OSError for a file that cannot be read.
        """
        with self._alone():
            job = self._exchange.add(image, deadline_s, priority, Options(**options), time.monotonic())
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
        check_window(window)
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error = {on_error!r}: expected 'raise' or 'return'")
        jobs: deque[Call] = deque()
        source = iter(images)
        try:
            while True:
                with self._alone():
                    for image in itertools.islice(source, window - len(jobs)):
                        jobs.append(self._add_or_fail(image, on_error, deadline_s, priority, options))
                    if not jobs:
                        return
                    self._wait_for(jobs[0])
                job = jobs.popleft()
                yield job.answer if on_error == "return" and isinstance(job.answer, JobFailed) else job.result()
        finally:
            if not self._is_foreign and not self._closed:
                with self._alone():
                    for job in jobs:
                        self._abandon(job)

    def submit(
        self, image: Image, *, job: str | None = None, deadline_s: float | None = None, priority: int = 0,
        **options: Any,
    ) -> str:  # fmt: skip
        """Leave a durable job with the daemon; returns its id, with which any client has the answer, by `fetch`.

        It has been written to the daemon's spool: it survives the daemon, and this client may go. The id is a secret:
        who has it can fetch and forget. `job` chooses it, from 32 characters or more, drawn by chance; submitting the
        same one again changes nothing. `deadline_s` is a day by default. Raises as `segment`; `JobFailed` with
        `bad-request` where the daemon has no spool.
        """
        with self._alone():
            added = self._exchange.add_durable(image, job, deadline_s, priority, Options(**options), time.monotonic())
            self._wait_for(added)
        added.check()
        return added.name

    def fetch(self, job: str, *, wait: bool = True) -> Segmentation | None:
        """The answer to a durable job, each time. None, only without `wait`: there is none yet.

        Raises `JobFailed` with the job's own failure, or with `bad-request` for a job that the daemon does not know;
        TimeoutError when there is no answer within `timeout_s`, after which it may be fetched again.
        """
        with self._alone():
            asked = self._exchange.ask(protocol.Fetch(job=job, wait=wait), time.monotonic())
            self._wait_for(asked)
        return None if isinstance(asked.answer, protocol.Accepted) else asked.result()

    def forget(self, job: str) -> None:
        """Let the daemon drop a durable job and its answer; without one it is cancelled."""
        with self._alone():
            asked = self._exchange.ask(protocol.Forget(job=job), time.monotonic())
            self._wait_for(asked)
        asked.check()

    def stats(self) -> dict[str, Any]:
        """The daemon's latest snapshot; docs/wire.md describes its keys."""
        with self._alone():
            self._exchange.stats.clear()
            self._send(protocol.encode(GetStats()))
            deadline = time.monotonic() + self.timeout_s
            while not self._exchange.stats:
                self._turn(deadline)
            return self._exchange.stats.popleft()

    def close(self) -> None:
        """Give up what is in flight and disconnect. Again, or in a forked child, it does nothing."""
        if self._closed or self._is_foreign:
            return
        with self._alone():
            self._closed = True
            for job in list(self._exchange.jobs.values()):
                self._abandon(job)
            self._disconnect()

    def __del__(self) -> None:
        """A client that is forgotten gives back what it held."""
        if not sys.is_finalizing():
            self.close()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """For the time of a call. Raises RuntimeError for one that must not be."""
        self._check_usable()
        if not self._thread.acquire(blocking=False):
            raise RuntimeError("this client is being used by another thread: make one in each thread")
        try:
            yield
        finally:
            self._thread.release()

    def _add_or_fail(
        self, image: Image, on_error: str, deadline_s: float | None, priority: int, options: Mapping[str, Any]
    ) -> Call:
        try:
            job = self._exchange.add(image, deadline_s, priority, Options(**options), time.monotonic())
        except OSError as error:
            failed = JobFailed(Code.BAD_IMAGE, f"cannot be read: {error.strerror or error}")
            answer = error if on_error == "raise" else failed
            return Call(Submit(job="-", image=protocol.Image(kind="encoded")), [], 0, 0.0, math.inf, answer)
        self._send_due()
        return job

    def _wait_for(self, job: Call) -> None:
        deadline = time.monotonic() + self.timeout_s
        try:
            while job.answer is None:
                self._turn(deadline)
        except BaseException:
            self._abandon(job)
            raise

    def _turn(self, deadline: float) -> None:
        """Send what is due, take in what comes, until something did or the deadline passes."""
        self._renew()
        self._send_due()
        if self._exchange.answered:  # without a message: there is no shared memory, and it is required
            self._exchange.answered.clear()
            return
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
        if self._places and self._places.fileno() in events:
            self._exchange.receive_memory(time.monotonic())
        self._exchange.answered.clear()  # whoever waits for a job looks at that job

    def _send_due(self) -> None:
        for frames in self._exchange.due(time.monotonic()):
            self._send(frames)

    def _send(self, frames: list[Any]) -> None:
        """Never blocks but for a connection that was refused: its pipe is gone, and the event that says why is near."""
        self._renew()
        while True:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
                return
            except zmq.Again:
                if not self._monitor.poll(int(self.timeout_s * 1000)):
                    raise self._timed_out() from None
                self._on_monitor()

    def _on_monitor(self) -> None:
        self._on_event(self._monitor.recv_multipart())
        if self._refused:
            raise HandshakeError(self._refused)

    def _abandon(self, job: Call) -> None:
        if self._exchange.drop(job.name):
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart(protocol.encode(protocol.Cancel(job=job.name)), zmq.NOBLOCK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
