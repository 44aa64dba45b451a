"""The desk: all messages, of both sockets and the spool. What they say goes to the cores, what those decide goes out.

A part of the shell. What comes in is an iterator of decisions, each to be carried out before the next is asked for: so
`blendmaskd.shell.server` has the one queue of actions. The desk starts no process and reads no signal.
"""
from __future__ import annotations

import errno
import logging
import math
import os
import secrets
import time
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import zmq

from blendmaskd import protocol
from blendmaskd.core import actions, durable
from blendmaskd.core.broker import Broker
from blendmaskd.core.refusals import Limits
from blendmaskd.core.spool_messages import Request
from blendmaskd.core.stats import Stats
from blendmaskd.logs import about
from blendmaskd.protocol import FROM_CLIENT, FROM_WORKER, Code, ProtocolError, RegionError
from blendmaskd.settings import Settings
from blendmaskd.shell.admission.access import Verdict
from blendmaskd.shell.admission.admission import Admission
from blendmaskd.shell.debts import BUSY_BYTES, MOST_BYTES, Debts
from blendmaskd.shell.job_log import JobLog
from blendmaskd.shell.processes import Actions, Child, Decisions, Processes
from blendmaskd.shell.shared_memory import Ended, Offered
from blendmaskd.shell.sockets import Clients, Sockets, receive, receive_last, send, send_to_client
from blendmaskd.shell.spool import Spool

log = logging.getLogger("blendmaskd")

DeskAction = (  # what the desk carries out; first what is frequent
    actions.SendWorker | actions.Answered | durable.SendClient | actions.Dropped | actions.Losses | actions.Returned
    | Request
)  # fmt: skip
DESK_ACTIONS = get_args(DeskAction)  # `isinstance` takes a tuple in a third of the time


class Desk:
    """`broker` and `durable` are the cores. Raises `SpoolError` when the spool cannot be opened; `close` it."""

    def __init__(self, settings: Settings, sockets: Sockets, stats: Stats) -> None:
        self.broker = Broker(_limits(settings), self._read_place)
        self.broker.tracing = settings.log.jobs
        self.durable = durable.Durable(self.broker, max_bytes=0)
        self.spool: Spool | None = None
        self.admission = Admission(sockets.gate, sockets.allowed, self._waits)
        self._snapshot: dict[str, Any] = {}
        self._last_image: dict[str, Any] | None = None
        self._settings = settings
        self._sockets = sockets
        self._stats = stats
        self._job_log = JobLog(settings.log.jobs)
        self._debts = Debts()
        self._told_unreachable: set[bytes] = set()  # clients, in this second
        if settings.spool is not None:
            self._open_spool(settings.spool)

    def close(self) -> None:
        if self.spool is not None:
            self.spool.close()

    def adopt(self, settings: Settings) -> Actions:
        """Go by these settings from now on."""
        self._settings = settings
        self.broker.refusals.limits = _limits(settings)
        self.broker.regions.max_bytes = settings.shared_memory_bytes
        self.broker.tracing = self._job_log.tracing = settings.log.jobs
        if self.spool is not None:
            self.durable.max_bytes, self.spool.keep_s = settings.spool_bytes, settings.spool_keep_s
        if not settings.show_last_image:
            self._show_image(None, None)
        return self.broker.forget_suspects(time.monotonic())

    def tick(self, now: float) -> Decisions:
        """What is due each second."""
        self._told_unreachable.clear()
        self._debts.keep(self.admission.connected)
        self._sockets.shared_memory.expire(now)
        self._job_log.tick()
        yield from self._shut_out(self.admission.tick(now))

    def log_steps(self) -> None:
        """Lines about jobs, from what the broker has told of them since."""
        if self.broker.steps:
            steps, self.broker.steps = self.broker.steps, []
            self._job_log.tell(steps, time.monotonic())

    def publish(self, snapshot: dict[str, Any]) -> None:
        """What clients that ask for statistics get from now on."""
        self._snapshot = snapshot

    def describe(self) -> dict[str, Any]:
        """What a snapshot shows of jobs, regions and the spool; see `Stats.snapshot`."""
        core = self.broker
        return {
            "queue": {"jobs": core.jobs.waiting_jobs, "bytes": core.jobs.waiting_bytes,
                      "max_jobs": core.limits.max_jobs, "max_bytes": core.limits.max_bytes},
            "regions": {"count": len(core.regions), "bytes": core.regions.bytes},
            "spool": self._describe_spool(),
            "leased": core.leased,
            "last_image": self._last_image,
        }  # fmt: skip

    # -- from clients -----------------------------------------------------------------------------------------------

    def admit(self, readable: Container[object]) -> Decisions:
        """Who has left, and who may connect or not be here any more; to be called before clients are read."""
        behind = [clients.kind for clients in self._sockets.clients if clients.behind]
        for client in self.admission.left(readable, behind):
            if self.broker.jobs.has(client):
                self._job_log.tell_of(client, logging.INFO, "a client has left: its jobs are cancelled")
            yield self._client_gone(client)
        yield from self._shut_out(self.admission.shut_out())

    def _shut_out(self, clients: Iterable[bytes]) -> Decisions:
        for client in clients:
            self.durable.client_gone(client)
            yield self.broker.shut_out(client, Verdict.UNKNOWN.value, time.monotonic())

    def read_clients(self, clients: Clients) -> Decisions:
        """What has come since from those of a kind; a bounded number of messages."""
        for frames in clients.receive():
            client = clients.name(frames[0])
            if _is_excessive(frames):
                yield self._expel(client, frames)
                continue
            verdict = self.admission.judge(client, frames[-1])
            if verdict is not Verdict.WELCOME:
                yield self._turn_away(client, frames, verdict)
                continue
            try:
                message, payload = protocol.decode(frames[1:], FROM_CLIENT)
            except ProtocolError as error:
                yield [actions.Answered(client, actions.refused(error.job, Code.BAD_REQUEST, str(error)))]
                continue
            if isinstance(message, protocol.GetStats):
                yield self._tell_stats(client, self.admission.is_operator(frames[-1]))
            else:
                yield self._on_client(client, frames[-1], message, payload, time.monotonic())

    def _expel(self, client: bytes, frames: Sequence[zmq.Frame]) -> Actions:
        """Its message is none that a client makes by mistake."""
        self.admission.close(frames[0])
        text = "a client sent a message of too many frames, or too large ones: its connection is closed"
        self._job_log.tell_of(client, logging.WARNING, text)
        return [actions.Dropped("", Code.BAD_REQUEST), *self._client_gone(client)]

    def _turn_away(self, client: bytes, frames: Sequence[zmq.Frame], verdict: Verdict) -> Actions:
        if verdict is Verdict.UNKNOWN:
            return [actions.Dropped("", Code.UNAUTHORISED)]
        try:
            message, _ = protocol.decode(frames[1:], FROM_CLIENT)
            job = getattr(message, "job", "")
        except ProtocolError as error:
            job = error.job
        refusal = actions.Answered(client, actions.refused(job, Code.UNAUTHORISED, verdict.value))
        if verdict is not Verdict.TAKEN:
            return [refusal]
        self._job_log.tell_of(client, logging.WARNING, "another key took its identity: its jobs are cancelled")
        return [*self._client_gone(client), refusal]

    def _on_client(
        self, client: bytes, frame: zmq.Frame, message: protocol.OfJobs | protocol.GetLimits, payload: Sequence[Any],
        now: float,
    ) -> Actions:  # fmt: skip
        if self._debts.of(client) >= BUSY_BYTES and isinstance(message, protocol.Submit | protocol.Fetch):
            refusal, counted = _unread(message.job), isinstance(message, protocol.Submit)
            return [actions.Answered(client, refusal) if counted else durable.SendClient(client, refusal)]
        match message:
            case protocol.Submit(durable=True):
                return self._submit_durable(client, message, payload, now)
            case protocol.Submit():
                return self.broker.submit(client, message, payload, now, self.admission.user(frame))
            case protocol.Cancel():
                return [*self.durable.stop_waiting(client, message), *self.broker.cancel(client, message, now)]
            case protocol.Fetch():
                return self.durable.fetch(client, message)
            case protocol.Forget():
                return self.durable.forget(client, message, now)
            case protocol.GetLimits():
                limits = protocol.Limits(max_image_bytes=self.broker.limits.max_image_bytes)
                return [durable.SendClient(client, limits)]

    def _tell_stats(self, client: bytes, to_operator: bool) -> Actions:
        if self._debts.of(client) >= BUSY_BYTES:
            return [durable.SendClient(client, _unread(""))]
        snapshot = self._snapshot if to_operator else self._stats.for_client(self._snapshot, client)
        return [durable.SendClient(client, protocol.Stats(stats=snapshot))]

    def _client_gone(self, client: bytes) -> list[actions.Action]:
        self.durable.client_gone(client)
        self._debts.forget(client)
        return self.broker.client_gone(client, time.monotonic())

    # -- from workers -----------------------------------------------------------------------------------------------

    def read_workers(self, processes: Processes, dead: str = "") -> Decisions:
        """What has come since: a bounded number of messages, or all until none of a `dead` worker is left."""
        workers = self._sockets.workers
        for frames in receive_last(workers, dead.encode()) if dead else receive(workers):
            name = frames[0].bytes.decode(errors="replace")
            if name not in processes.children:
                continue  # of another run, or dead and reaped
            try:
                message, payload = protocol.decode(frames[1:], FROM_WORKER)
            except ProtocolError as error:
                log.error("%s", error, extra=about(slot=name))
                continue
            now = time.monotonic()
            self.broker.heard(name, now)
            if isinstance(message, protocol.Ready):
                yield processes.ready(name, message, now)
            else:
                yield self._on_worker(processes.children[name], message, payload, now)

    def _on_worker(self, child: Child, message: protocol.FromWorker, payload: Sequence[Any], now: float) -> Actions:
        match message:
            case protocol.Started():
                return self.broker.started(child.name, message, now)
            case protocol.Finished():
                return self.broker.finished(child.name, message, payload, now)
            case protocol.FailedLease():
                return self.broker.failed(child.name, message, now)
            case protocol.Report():
                self._stats.report(child.slot, message)
                return self.broker.set_window(child.name, message.window, now)
            case protocol.Preview() if self._settings.show_last_image and payload:
                self._show_image({"device": child.slot, "time": time.time()}, payload[0].bytes)
        return ()

    def _show_image(self, last: dict[str, Any] | None, jpeg: bytes | None) -> None:
        self._last_image = last
        if self._sockets.pages:
            self._sockets.pages.show_image(jpeg)

    # -- to clients, workers and the spool --------------------------------------------------------------------------

    def carry_out(self, action: DeskAction) -> Actions:
        """Returns what follows from it."""
        match action:
            case actions.SendWorker():
                frames = protocol.encode(action.message, action.payload)
                if send(self._sockets.workers, action.worker.encode(), frames):
                    log.warning("the worker cannot be reached: it is about to exit", extra=about(slot=action.worker))
                return self.durable.leased(action.durable) if action.durable else ()
            case actions.Answered():
                return self._answer(action)
            case durable.SendClient():
                return self._give(action)
            case actions.Dropped():
                self._stats.failures[action.code] += 1
            case actions.Losses():
                return self.durable.lost(action.job, action.attempts, action.losses)
            case actions.Returned():
                return self.durable.returned(action.job)
            case _:
                assert self.spool is not None
                self.spool.ask(action)
        return ()

    def _answer(self, action: actions.Answered) -> Actions:
        answer = action.answer
        if action.owner == actions.DURABLE:
            followed: Actions = self.durable.answered(answer, action.payload)
        else:
            followed = self._send(action.owner, answer, action.payload)
        if isinstance(answer, protocol.Result):  # counted when it is on its way: somebody waits for it
            self._stats.answered(answer.timings)
        else:
            self._stats.failed(time.time(), protocol.shown_job(answer.job), answer.code, answer.reason, action.owner)
        return followed

    def _give(self, action: durable.SendClient) -> Actions:
        """An answer of the spool's stays there while its client has too much to read."""
        if action.payload and self._debts.of(action.client) >= BUSY_BYTES:
            return self._send(action.client, _unread(getattr(action.message, "job", "")), ())
        return self._send(action.client, action.message, action.payload)

    def _send(self, client: bytes, message: protocol.ToClient, payload: protocol.Frames) -> Actions:
        if self._debts.of(client) >= MOST_BYTES:
            return self._cut_off(client, errno.EAGAIN)
        frames = self._debts.add(client, protocol.encode(message, payload))
        if error := send_to_client(self._sockets.clients, client, frames):
            return self._cut_off(client, error)
        debtor = self._debts.longest()
        return self._cut_off(debtor, errno.EAGAIN) if debtor is not None else ()

    def _cut_off(self, client: bytes, error: int) -> Actions:
        if error == errno.EAGAIN:
            self.admission.cut_off(client)
        self._debts.forget(client)
        why = "is gone" if error == errno.EHOSTUNREACH else "does not read its answers"
        if client not in self._told_unreachable:  # a flood that nobody reads must not become one of lines
            self._told_unreachable.add(client)
            self._job_log.tell_of(client, logging.INFO, "a client %s: its jobs are cancelled", why)
        return self._client_gone(client)

    # -- durable jobs, see blendmaskd.core.durable ---------------------------------------------------------------------

    def _open_spool(self, path: str) -> None:
        self.spool = Spool(Path(path), self._settings.spool_keep_s)
        stored = self.spool.open()
        self.durable = durable.Durable(
            self.broker, self._settings.spool_bytes, time.monotonic(), stored, self.spool.next_seq
        )
        self.durable.usage = self.spool.usage
        log.info("spool %s: %d jobs pending, %d answers stored", self.spool.path, len(stored), self.spool.usage.answers)

    def _submit_durable(self, client: bytes, message: protocol.Submit, payload: Sequence[Any], now: float) -> Actions:
        place = message.image.place
        if place is None:
            size = sum(len(frame) for frame in payload)
            return self.durable.submit(client, message, size, lambda: payload, now)
        return self.durable.submit(client, message, place.bytes, lambda: [self._read_place(place, 0, place.bytes)], now)

    def on_spool(self) -> Decisions:
        """The spool has said something."""
        assert self.spool is not None
        before = self.durable.usage.trouble
        for reply in self.spool.replies():
            yield self.durable.replied(reply, time.monotonic())
        trouble = self.durable.usage.trouble
        if trouble and not before:
            log.error("spool %s: %s: answers are kept in memory until it can be written", self.spool.path, trouble)
        elif before and not trouble:
            log.info("spool %s: writable again", self.spool.path)

    def _describe_spool(self) -> dict[str, Any] | None:
        usage = self.durable.usage
        described = {"jobs": len(self.durable.jobs), "answers": usage.answers, "bytes": usage.bytes}
        return {**described, "max_bytes": self.durable.max_bytes, "trouble": usage.trouble} if self.spool else None

    # -- shared memory ----------------------------------------------------------------------------------------------

    def on_shared_memory(self) -> Decisions:
        """Memory is offered, or given back."""
        for event in self._sockets.shared_memory.receive(time.monotonic()):
            match event:
                case Offered():
                    yield self._open_region(event)
                case Ended():
                    yield self.broker.end_region(event.region)

    def _read_place(self, place: protocol.Place, start: int, end: int) -> bytes:
        """These bytes of an image in shared memory. Raises `RegionError` when its region has ended or is damaged."""
        if complaint := self.broker.regions.complaint(place):
            raise RegionError(complaint)
        descriptor = self.broker.regions.opening(place.region).descriptor
        try:
            return os.pread(descriptor, end - start, place.offset + start)
        except OSError as error:
            raise RegionError(f"region {place.region!r}: {error.strerror}") from None

    def _open_region(self, offered: Offered) -> Actions:
        name = secrets.token_hex(16)
        try:
            opened = self.broker.open_region(name, offered.memory)
        except RegionError as error:
            self._sockets.shared_memory.refuse(offered, error)
            return ()
        self._sockets.shared_memory.accept(offered, name)
        return opened

    def _waits(self, client: bytes) -> bool:
        return self.broker.jobs.has(client) or self.durable.jobs.owed(client)


def _is_excessive(frames: Sequence[zmq.Frame]) -> bool:
    """Whether there are more than anybody needs, or what stands before the image has its size."""
    return frames[-1].more or max(map(len, frames[1:3]), default=0) > protocol.SURE_BYTES


def _unread(job: str) -> protocol.Failed:
    reason = f"more than {BUSY_BYTES} bytes of answers wait for this client to read them"
    return actions.refused(job, Code.BUSY, reason, durable.RETRY_S)


def _limits(settings: Settings) -> Limits:
    return Limits(
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
