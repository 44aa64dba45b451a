"""Messages: what clients say goes to the cores, and what the cores answer goes to clients, workers and the spool.

A part of the shell, beside the loop of `blendmaskd.shell.server`, which calls it when a socket has something. It
reads no signal and starts no process: what concerns a worker's process is told to the loop by `evict`.
"""
from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import zmq

from blendmaskd import protocol
from blendmaskd.core import broker, durable
from blendmaskd.core.stats import Stats
from blendmaskd.logs import about, shown
from blendmaskd.protocol import FROM_CLIENT, Code, ProtocolError, RegionError
from blendmaskd.settings import Settings
from blendmaskd.shell.admission.access import Identities, Verdict
from blendmaskd.shell.job_log import JobLog
from blendmaskd.shell.shared_memory import Ended, Offered
from blendmaskd.shell.sockets import Sockets, receive, send
from blendmaskd.shell.spool import Spool

log = logging.getLogger("blendmaskd")

REFUSED_S = 10.0  # between two lines about connections that were turned away


class Traffic:
    """`broker` and `durable` are the cores; `snapshot` is what clients that ask for statistics get.

    `evict` is called with a worker that hangs, `acquit` with a device that is not to blame for a death. Raises
    `SpoolError` when the spool cannot be opened; `close` it.
    """

    def __init__(
        self, settings: Settings, sockets: Sockets, stats: Stats, evict: Callable[[broker.Evict], None],
        acquit: Callable[[broker.Acquit], None],
    ) -> None:  # fmt: skip
        self.snapshot: dict[str, Any] = {}
        self.broker = broker.Broker(_limits(settings), self._read_place)
        self.broker.tracing = settings.log.jobs
        self.durable = durable.Durable(self.broker, max_bytes=0)
        self.spool: Spool | None = None
        self._settings = settings
        self._sockets = sockets
        self._stats = stats
        self._evict = evict
        self._acquit = acquit
        self._job_log = JobLog(settings.log.jobs)
        self._identities: Identities | None = None  # where keys are needed
        self._tell_refused_at = 0.0
        self._told_unreachable: set[bytes] = set()  # clients, in this second
        if settings.spool is not None:
            self._open_spool(settings.spool)
        if sockets.gate is not None:
            self._open_gate()

    def close(self) -> None:
        if self.spool is not None:
            self.spool.close()

    def adopt(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self._settings = settings
        self.broker.limits = _limits(settings)
        self.broker.regions.max_bytes = settings.shared_memory_bytes
        self.broker.tracing = self._job_log.tracing = settings.log.jobs
        if self.spool is not None:
            self.durable.max_bytes, self.spool.keep_s = settings.spool_bytes, settings.spool_keep_s

    def tick(self, now: float) -> None:
        """What is due each second."""
        self._told_unreachable.clear()
        self._sockets.shared_memory.expire(now)
        self._job_log.tick()
        self._watch_gate(now)

    def describe(self) -> dict[str, Any]:
        """What a snapshot shows of jobs, regions and the spool; see `Stats.snapshot`."""
        core = self.broker
        return {
            "queue": {
                "jobs": core.waiting_jobs,
                "bytes": core.waiting_bytes,
                "max_jobs": core.limits.max_jobs,
                "max_bytes": core.limits.max_bytes,
            },
            "regions": {"count": len(core.regions), "bytes": core.regions.bytes},
            "spool": self._describe_spool(),
            "leased": core.leased,
        }

    # -- from clients -----------------------------------------------------------------------------------------------

    def read_clients(self) -> None:
        """What has come since; a bounded number of messages."""
        for frames in receive(self._sockets.clients):
            client = frames[0].bytes
            if self._sockets.departures:
                self._sockets.departures.heard(client, frames[-1])
            if self._sockets.gate and (verdict := self._judge(client, frames[-1])) is not Verdict.WELCOME:
                self._turn_away(client, frames, verdict)
                continue
            message: protocol.FromClient
            try:
                message, payload = protocol.decode(frames[1:], FROM_CLIENT)
            except ProtocolError as error:
                failed = protocol.Failed(job=error.job, code=Code.BAD_REQUEST, reason=str(error))
                self.carry_out([broker.Answered(client, failed)])
                continue
            self._on_client(client, message, payload, time.monotonic())

    def _on_client(self, client: bytes, message: protocol.FromClient, payload: Sequence[Any], now: float) -> None:
        match message:
            case protocol.Submit(durable=True):
                self._submit_durable(client, message, payload, now)
            case protocol.Submit():
                self.carry_out(self.broker.submit(client, message, payload, now))
            case protocol.Cancel():
                self.durable.stop_waiting(client, message)
                self.carry_out(self.broker.cancel(client, message, now))
            case protocol.Fetch():
                self.carry_out(self.durable.fetch(client, message))
            case protocol.Forget():
                self.carry_out(self.durable.forget(client, message, now))
            case protocol.GetStats():
                self.carry_out([durable.SendClient(client, protocol.Stats(stats=self.snapshot))])

    def let_go(self, clients: Iterable[bytes]) -> None:
        """Of clients that have left, those with jobs."""
        for client in clients:
            if self.broker.has_jobs(client):
                log.info("a client is gone: its jobs are cancelled", extra=about(client=shown(client)))
            self.carry_out(self._client_gone(client))

    def _client_gone(self, client: bytes) -> list[broker.Action]:
        self.durable.client_gone(client)
        return self.broker.client_gone(client, time.monotonic())

    # -- to clients, workers and the spool --------------------------------------------------------------------------

    def carry_out(self, actions: Iterable[durable.Action]) -> None:
        """What was decided, in that order, with all that follows from it."""
        queue = deque(actions)
        while queue:
            queue.extend(self._carry_out(queue.popleft()))
        if self.broker.steps:
            steps, self.broker.steps = self.broker.steps, []
            self._job_log.tell(steps, time.monotonic())

    def _carry_out(self, action: durable.Action) -> Iterable[durable.Action]:
        match action:
            case broker.SendWorker():
                self._send_worker(action.worker, action.message, action.payload)
                return self.durable.leased(action.durable) if action.durable else ()
            case broker.Answered():
                return self._answered(action)
            case durable.SendClient():
                return self._send(action.client, action.message, action.payload)
            case broker.Dropped():
                self._stats.dropped(action.code)
            case broker.Evict():
                self._evict(action)
            case broker.Acquit():
                self._acquit(action)
            case broker.Losses():
                return self.durable.lost(action.job, action.attempts, action.losses)
            case broker.Returned():
                return self.durable.returned(action.job)
            case _:
                assert self.spool is not None
                self.spool.ask(action)
        return ()

    def _answered(self, action: broker.Answered) -> Iterable[durable.Action]:
        """Here every outcome is counted, but for what is dropped."""
        answer = action.answer
        if isinstance(answer, protocol.Result):
            self._stats.answered(answer.timings)
        else:
            self._stats.failed(time.time(), protocol.shown_job(answer.job), answer.code, answer.reason)
        if action.owner == broker.DURABLE:
            return self.durable.answered(answer, action.payload)
        return self._send(action.owner, answer, action.payload)

    def _send(
        self, client: bytes, message: protocol.ToClient, payload: protocol.Frames
    ) -> Iterable[durable.Action]:
        try:
            send(self._sockets.clients, client, protocol.encode(message, payload))
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            why = "is gone" if error.errno == errno.EHOSTUNREACH else "does not read its answers"
            if client not in self._told_unreachable:  # a flood that nobody reads must not become one of lines
                self._told_unreachable.add(client)
                log.info("a client %s: its jobs are cancelled", why, extra=about(client=shown(client)))
            return self._client_gone(client)
        return ()

    def _send_worker(self, worker: str, message: protocol.ToWorker, payload: protocol.Frames) -> None:
        try:
            send(self._sockets.workers, worker.encode(), protocol.encode(message, payload))
        except zmq.ZMQError as error:
            if error.errno not in (errno.EHOSTUNREACH, errno.EAGAIN):
                raise
            log.warning("not reachable; its death will follow", extra=about(slot=worker))

    # -- durable jobs, see blendmaskd.core.durable ---------------------------------------------------------------------

    def _open_spool(self, path: str) -> None:
        self.spool = Spool(Path(path), self._settings.spool_keep_s)
        stored = self.spool.open()
        self.durable = durable.Durable(
            self.broker, self._settings.spool_bytes, time.monotonic(), stored, self.spool.next_seq
        )
        self.durable.usage = self.spool.usage
        log.info("spool %s: %d jobs to do, %d answers", self.spool.path, len(stored), self.spool.usage.answers)

    def _submit_durable(self, client: bytes, message: protocol.Submit, payload: Sequence[Any], now: float) -> None:
        place = message.image.place
        size = place.bytes if place else sum(len(frame) for frame in payload)

        def read() -> protocol.Frames:
            if place is None:
                return payload
            return [self._read_place(place, 0, place.bytes)]

        self.carry_out(self.durable.submit(client, message, size, read, now))

    def on_spool(self) -> None:
        """The spool has said something."""
        assert self.spool is not None
        before = self.durable.usage.trouble
        for reply in self.spool.replies():
            self.carry_out(self.durable.replied(reply, time.monotonic()))
        trouble = self.durable.usage.trouble
        if trouble and not before:
            log.error("spool %s: %s: answers are kept in memory until it can be written", self.spool.path, trouble)
        elif before and not trouble:
            log.info("spool %s: is written again", self.spool.path)

    def _describe_spool(self) -> dict[str, Any] | None:
        usage = self.durable.usage
        described = {"jobs": self.durable.unanswered, "answers": usage.answers, "bytes": usage.bytes}
        return {**described, "max_bytes": self.durable.max_bytes, "trouble": usage.trouble} if self.spool else None

    # -- shared memory ----------------------------------------------------------------------------------------------

    def on_shared_memory(self) -> None:
        """Memory is offered, or given back."""
        for event in self._sockets.shared_memory.receive(time.monotonic()):
            match event:
                case Offered():
                    self._open_region(event)
                case Ended():
                    self.carry_out(self.broker.end_region(event.region))

    def _read_place(self, place: protocol.Place, start: int, end: int) -> bytes:
        """These bytes of an image in shared memory. Raises `RegionError` when its region has ended."""
        complaint = self.broker.regions.complaint(place)
        if complaint:
            raise RegionError(complaint)
        descriptor = self.broker.regions.opening(place.region).descriptor
        return os.pread(descriptor, end - start, place.offset + start)

    def _open_region(self, offered: Offered) -> None:
        name = secrets.token_hex(16)
        try:
            self.carry_out(self.broker.open_region(name, offered.memory))
        except RegionError as error:
            self._sockets.shared_memory.refuse(offered, error)
        else:
            self._sockets.shared_memory.accept(offered, name)

    # -- strangers, see blendmaskd.shell.admission.access --------------------------------------------------------------

    def _open_gate(self) -> None:
        allowed = self._sockets.allowed
        if allowed is None:
            log.warning("insecure_tcp: whoever reaches the tcp endpoint can submit jobs and read the traffic")
            return
        self._identities = Identities(allowed, self._waits)
        self.on_keys()
        if not allowed.names:
            log.warning("no client may connect by tcp yet: %s holds no keys", allowed.folder)

    def _waits(self, client: bytes) -> bool:
        return self.broker.has_jobs(client) or self.durable.waits(client)

    def _judge(self, client: bytes, frame: zmq.Frame) -> Verdict:
        assert self._sockets.gate is not None
        user = self._sockets.gate.user(frame)
        return Verdict.WELCOME if self._identities is None else self._identities.judge(client, user)

    def _turn_away(self, client: bytes, frames: Sequence[zmq.Frame], verdict: Verdict) -> None:
        assert self._sockets.gate is not None
        if verdict is Verdict.UNKNOWN:
            self._stats.dropped(Code.UNAUTHORISED)
            self._sockets.gate.close(frames[-1])  # the handshake of its next connection tells it why
            return
        if verdict is Verdict.TAKEN:
            log.warning("another key took its identity: its jobs are cancelled", extra=about(client=shown(client)))
            self.carry_out(self._client_gone(client))
        try:
            message: protocol.FromClient
            message, _ = protocol.decode(frames[1:], FROM_CLIENT)
            job = getattr(message, "job", "")
        except ProtocolError as error:
            job = error.job
        failed = protocol.Failed(job=job, code=Code.UNAUTHORISED, reason=verdict.value)
        self.carry_out([broker.Answered(client, failed)])

    def _watch_gate(self, now: float) -> None:
        if self._sockets.gate is None:
            return
        self._sockets.gate.refresh()
        self.on_keys()
        if self._identities is not None:
            self._identities.forget_idle()
        if now >= self._tell_refused_at and (refused := self._sockets.gate.take_refused()):
            self._tell_refused_at = now + REFUSED_S
            log.warning("tcp connections turned away: %s", refused)

    def on_keys(self) -> None:
        """Keys have come or gone, perhaps."""
        assert self._sockets.gate is not None
        for change in self._sockets.gate.take_changes():
            for complaint in change.complaints:
                log.error("curve.client_keys: %s", complaint)
            for name in change.added.values():
                log.info("client key %s: may connect", name)
            for name in change.removed.values():
                log.info("client key %s: shut out", name)
            for client in () if self._identities is None else self._identities.of(change.removed):
                self.durable.client_gone(client)
                self.carry_out(self.broker.shut_out(client, Verdict.UNKNOWN.value, time.monotonic()))


def _limits(settings: Settings) -> broker.Limits:
    return broker.Limits(
        max_jobs=settings.queue.max_jobs,
        max_bytes=settings.queue.max_bytes,
        max_jobs_per_client=settings.queue.max_jobs_per_client or math.inf,
        max_bytes_per_client=settings.queue.max_bytes_per_client or math.inf,
        max_image_bytes=settings.limits.max_image_bytes,
        max_attempts=settings.max_attempts,
        deadline_s=settings.deadline_s,
        stall_s=settings.restarts.stall_s,
        paths_allowed=bool(settings.paths.roots),
        shared_memory_bytes=settings.shared_memory_bytes,
    )
