"""Durable jobs: which the spool keeps, which of them the broker has, who waits for their answers. Pure.

Events come from clients, from the broker and from the spool; what comes out is for them. What is asked of the spool
takes effect in the order in which it was asked; its replies name jobs by ``seq``, which no two lives of a name share.

Where a durable job is:

=========  =============================================================================================
storing    on its way into the spool; its clients are owed `Accepted`
spooled    in the spool alone, in the line of its owner
loading    on its way from the spool to the broker
queued     the broker has it
answered   on its way into the spool with its answer, which its waiters get when it is there
=========  =============================================================================================

What is answered and in the spool is nowhere here: the spool finds it by its name. So nothing that a client was told is
ever only in memory, and what the daemon does not live to do is done by the next one. Owners take turns; none may take
more of the spool, answers included, or of the way into it than `refusals.SHARE` times what it leaves.
"""
from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

import msgspec

from blendmaskd.core import spool_messages as spool
from blendmaskd.core.actions import DURABLE, Answered, Dropped, refused
from blendmaskd.core.actions import Action as BrokerAction
from blendmaskd.core.broker import Broker
from blendmaskd.core.durable_jobs import Job, Jobs, Owned, State, job_of
from blendmaskd.core.refusals import MOST_JOBS_OF_A_CLIENT, SHARE
from blendmaskd.protocol import (
    Accepted,
    Cancel,
    Code,
    Failed,
    Fetch,
    Forget,
    Forgotten,
    Frames,
    RegionError,
    Submit,
    ToClient,
)

RETRY_S = 1.0  # after which the spool may have room, or work again
MOST_LOADS = 5  # of a job whose image cannot be read
UNPROVEN_LOSSES = 3  # daemons that died with a job: then it is the reason, perhaps, rather than what they died of
MOST_LOOKS = 1000  # questions to the spool that wait
LOOKS_AT_ONCE = 8  # of them the spool has, so that few answers are in memory
MOST_ERASURES = 1000  # that the spool is asked for and has not done: some commits


class SendClient(msgspec.Struct, frozen=True):
    """Send this to a client. It is no job's end: that was `Answered` or `Dropped`."""

    client: bytes
    message: ToClient
    payload: Frames = ()


Action = BrokerAction | SendClient | spool.Request


class Durable:
    """See the module. `max_bytes` bounds the spool; 0: there is none. `check()` states the invariants."""

    def __init__(
        self, broker: Broker, max_bytes: int, now: float = 0.0, stored: Iterable[spool.Stored] = (), next_seq: int = 1
    ) -> None:
        self.max_bytes = max_bytes
        self.usage = spool.Usage(answers=0, bytes=0)
        self._broker = broker
        self._seq = itertools.count(next_seq)
        self.jobs = Jobs()
        self._looks = 0  # that the spool has
        self._erasures: Counter[bytes] = Counter()  # that the spool has, by client
        self._to_look: OrderedDict[bytes, deque[str]] = OrderedDict()  # names, by client in turn; none is empty
        self._ended = False
        for each in stored:
            self._take_up(each, now)

    @property
    def busy(self) -> bool:
        """Whether a job is on its way somewhere, so that ending now would cost work."""
        return self.jobs.states.total() > self.jobs.states[State.SPOOLED] + self.jobs.states[State.LOADING]

    # -- clients ----------------------------------------------------------------------------------------------------

    def submit(
        self, client: bytes, message: Submit, size: int, payload: Callable[[], Frames], now: float
    ) -> list[Action]:
        """Accept a job when the spool has it, or answer at once why not. `payload` reads its image of `size` bytes, or
        raises `RegionError`."""
        job = self.jobs.by_name.get(message.job)
        if job is not None and job.state is not State.STORING:
            return [SendClient(client, Accepted(job=message.job))]
        if job is not None:
            self.jobs.owe(job.submitters, client)
            return []
        if refusal := self._refusal(client, message, size):
            return [Answered(client, refusal)]
        try:
            image = payload()
        except RegionError as error:
            return [Answered(client, refused(message.job, Code.BAD_REQUEST, str(error)))]
        if message.image.place:
            message = msgspec.structs.replace(message, image=msgspec.structs.replace(message.image, place=None))
        if given_up := self._broker.refusals.given_up(message.job, message.image, image, now):
            return [Answered(client, given_up)]
        stored = spool.Stored(next(self._seq), message.job, client, message.priority, size)
        job = job_of(stored, now, State.STORING)
        self.jobs.owe(job.submitters, client)
        self.jobs.add(job)
        return [spool.Store(stored, message, image)]

    def fetch(self, client: bytes, message: Fetch) -> list[Action]:
        """Send the answer as soon as there is one."""
        if not self.max_bytes:
            return [SendClient(client, refused(message.job, Code.UNKNOWN_JOB, DISABLED))]
        if (job := self.jobs.by_name.get(message.job)) is None:
            return self._look(client, message.job)
        if self._ended:
            return [SendClient(client, _ending(message.job))]
        if message.wait:
            self.jobs.owe(job.waiters, client)
        elif job.state is State.STORING:
            self.jobs.owe(job.submitters, client)
        else:
            return [SendClient(client, Accepted(job=message.job))]
        return []

    def forget(self, client: bytes, message: Forget, now: float) -> list[Action]:
        """Drop a job and its answer, wherever they are."""
        if not self.max_bytes:
            return [SendClient(client, refused(message.job, Code.UNKNOWN_JOB, DISABLED))]
        erasures = self._erasures.total()
        if self._erasures[client] >= SHARE * (MOST_ERASURES - erasures):
            return [SendClient(client, _busy(message.job, f"{erasures} jobs are being forgotten"))]
        self._erasures[client] += 1
        actions: list[Action] = []
        if job := self.jobs.by_name.get(message.job):
            self.jobs.remove(job)
            if job.state is State.QUEUED:
                actions += self._broker.withdraw(job.name, now)
            actions += self._drop(job, refused(job.name, Code.CANCELLED, "it was forgotten"))
        return [*actions, spool.Erase(client, message.job), *self.feed()]

    def stop_waiting(self, client: bytes, message: Cancel) -> list[Action]:
        """This client waits for that job no longer: its `fetch` is answered as one that does not wait."""
        job = self.jobs.by_name.get(message.job)
        if job is None or client not in job.waiters:
            return []
        self.jobs.settle(job.waiters, client)
        return self.fetch(client, Fetch(job=message.job, wait=False))

    def client_gone(self, client: bytes) -> None:
        """Nobody waits there any more; its jobs stay."""
        self._to_look.pop(client, None)
        self.jobs.settle_client(client)

    # -- the broker -------------------------------------------------------------------------------------------------

    def feed(self) -> list[Action]:
        """Load what the broker has room for."""
        actions: list[Action] = []
        while self.jobs.lined_up and self.jobs.states[State.LOADING] < self._broker.room:
            job = self.jobs.lined_up.next()
            self.jobs.move(job, State.LOADING)
            actions.append(spool.Load(job.seq))
        return actions

    def leased(self, name: str) -> list[Action]:
        """A worker has it from now on: should the daemon die, it may have been the reason."""
        job = self.jobs.by_name[name]
        job.leased = True
        return [_mark(job)]

    def lost(self, name: str, attempts: int, losses: int) -> list[Action]:
        """A worker died with it."""
        job = self.jobs.by_name[name]
        job.attempts, job.losses, job.leased = attempts, losses, False
        return [_mark(job)]

    def returned(self, name: str) -> list[Action]:
        """The broker has it no more."""
        job = self.jobs.by_name[name]
        self.jobs.line_up(job, first=True)
        was_leased, job.leased = job.leased, False
        return [_mark(job)] if was_leased else []

    def answered(self, answer: spool.Answer, payload: Frames) -> list[Action]:
        """A job has its answer."""
        job = self.jobs.by_name[answer.job]
        self.jobs.move(job, State.ANSWERED)
        job.answer = (answer, payload)
        return [spool.StoreAnswer(job.seq, answer, payload), *self.feed()]

    # -- the spool --------------------------------------------------------------------------------------------------

    def replied(self, reply: spool.Reply, now: float) -> list[Action]:
        """What follows from what the spool says."""
        match reply:
            case spool.Usage():
                self.usage = reply
                return []
            case spool.Looked():
                return self._looked(reply)
            case spool.Erased():
                self._erasures[reply.client] -= 1
                if not self._erasures[reply.client]:
                    del self._erasures[reply.client]
                failed = _unwritten(reply.name, reply.reason) if reply.reason else None
                return [SendClient(reply.client, failed or Forgotten(job=reply.name))]
        if (job := self.jobs.by_seq.get(reply.seq)) is None:
            return []  # forgotten
        match reply:
            case spool.Kept():
                self.jobs.line_up(job)
                return [*self._accept(job), *self.feed()]
            case spool.Known():
                self.jobs.remove(job)
                waiters = self.jobs.settle_all(job.waiters)
                return [*self._accept(job), *(each for client in waiters for each in self._look(client, job.name))]
            case spool.NotKept():
                self.jobs.remove(job)
                return self._drop(job, _unwritten(job.name, reply.reason))
            case spool.Loaded():
                return self._loaded(job, reply, now)
            case spool.NotLoaded():
                return self._not_loaded(job, reply.reason)
            case spool.AnswerKept():
                assert job.answer is not None
                self.jobs.remove(job)
                return [SendClient(client, *job.answer) for client in self.jobs.settle_all(job.waiters)]

    def end(self) -> list[Action]:
        """The daemon ends: what is left is done by the next one, and whoever waits is told so."""
        self._ended = True
        owed = [(client, job.name) for job in self.jobs for client in self.jobs.settle_job(job)]
        owed += [(client, name) for client, names in self._to_look.items() for name in names]
        self._to_look.clear()
        return [SendClient(client, _ending(name)) for client, name in owed]

    def _take_up(self, stored: spool.Stored, now: float) -> None:
        """A job that an earlier daemon left. If a worker had it, that worker is lost, as the broker counts it."""
        attempts, losses = stored.attempts, stored.losses
        if stored.leased:
            attempts += attempts > 0 or losses >= UNPROVEN_LOSSES
            losses += 1
        job = job_of(stored, now, State.LOADING)
        job.attempts, job.losses = attempts, losses
        self.jobs.add(job)
        self.jobs.line_up(job)

    def _refusal(self, client: bytes, message: Submit, size: int) -> Failed | None:
        if not self.max_bytes:
            return refused(message.job, Code.BAD_REQUEST, DISABLED)
        if unfit := self._broker.refusals.unfit(message.job, message.image, size):
            return unfit
        reason = self._shortage(size) or self._greed(client, self.jobs.owned(client), size)
        return _busy(message.job, reason) if reason else None

    def _shortage(self, size: int) -> str:
        """What there is no room for; empty: nothing."""
        storing, limits = self.jobs.states[State.STORING], self._broker.limits
        if storing >= limits.max_jobs or (storing and self.jobs.storing_bytes + size > limits.max_bytes):
            return f"{storing} jobs are being written to the spool"
        used = self.usage.bytes + self.jobs.storing_bytes
        if used + size > self.max_bytes:
            return f"the spool holds {used} of {self.max_bytes} bytes (spool_bytes)"
        return ""

    def _greed(self, client: bytes, own: Owned, size: int) -> str:
        """What of its owner's is too much for one; empty: nothing."""
        limits = self._broker.limits
        if own.jobs >= limits.max_jobs_per_client:
            return f"this client has {own.jobs} unanswered durable jobs, {MOST_JOBS_OF_A_CLIENT}"
        if own.bytes + size > limits.max_bytes_per_client:
            most = f"{limits.max_bytes_per_client} (queue.max_bytes_per_client)"
            return f"this client has {own.bytes} unanswered bytes, the maximum for one client is {most}"
        if own.storing >= SHARE * (limits.max_jobs - self.jobs.states[State.STORING]):
            on_the_way = f"{own.storing} jobs being written to the spool"
            return f"this client has {on_the_way}: the last places are reserved for others"
        stored = self.usage.owners.get(client, 0) + own.storing_bytes
        if stored and stored + size > SHARE * (self.max_bytes - self.usage.bytes - self.jobs.storing_bytes - size):
            reserved = "the last ones are reserved for others; forget answers that you have"
            return f"this client has {stored} of {self.max_bytes} bytes (spool_bytes), answers included: {reserved}"
        return ""

    def _accept(self, job: Job) -> list[Action]:
        return [SendClient(client, Accepted(job=job.name)) for client in self.jobs.settle_all(job.submitters)]

    def _drop(self, job: Job, failed: Failed) -> list[Action]:
        """Tell whoever waits of a job that the spool does not have."""
        return [Dropped(job.name, failed.code), *(SendClient(client, failed) for client in self.jobs.settle_job(job))]

    def _loaded(self, job: Job, loaded: spool.Loaded, now: float) -> list[Action]:
        if not self._broker.room:
            self.jobs.line_up(job, first=True)
            return []
        self.jobs.move(job, State.QUEUED)
        return [*self._broker.adopt(loaded.message, loaded.payload, job.accepted, now, job.attempts, job.losses)]

    def _not_loaded(self, job: Job, reason: str) -> list[Action]:
        """Behind the others, and tried again; in the end it is damaged rather than the disk's bad moment."""
        job.loads += 1
        if job.loads < MOST_LOADS:
            self.jobs.line_up(job)
            return []
        text = f"its image cannot be read from the spool: {reason}"
        return [Answered(DURABLE, refused(job.name, Code.UNAVAILABLE, text))]

    def _look(self, client: bytes, name: str) -> list[Action]:
        own = self._to_look.get(client, ())
        if len(own) >= SHARE * (MOST_LOOKS - sum(map(len, self._to_look.values()))):
            return [SendClient(client, _busy(name, f"{len(own)} answers are being fetched"))]
        self._to_look.setdefault(client, deque()).append(name)
        return self._look_on()

    def _look_on(self) -> list[Action]:
        """Clients take turns."""
        looks: list[Action] = []
        while self._to_look and self._looks < LOOKS_AT_ONCE:
            client, names = self._to_look.popitem(last=False)
            looks.append(spool.Look(client, names.popleft()))
            self._looks += 1
            if names:
                self._to_look[client] = names
        return looks

    def _looked(self, looked: spool.Looked) -> list[Action]:
        self._looks -= 1
        if looked.reason:
            reason = f"the spool cannot be read: {looked.reason}"
            told = SendClient(looked.client, refused(looked.name, Code.UNAVAILABLE, reason, RETRY_S))
        else:
            answer = looked.answer or refused(looked.name, Code.UNKNOWN_JOB, UNKNOWN)
            told = SendClient(looked.client, answer, looked.payload)
        return [told, *self._look_on()]

    def check(self) -> None:
        self.jobs.check()
        assert all(self._to_look.values()), "an empty line is kept"
        assert self._looks == LOOKS_AT_ONCE or not self._to_look, "an answer is not looked for"


UNKNOWN = "no durable job of this name: never accepted, forgotten, or its answer has expired (spool_keep_s)"
DISABLED = "durable jobs are disabled: set spool in the daemon's settings (spool: PATH)"


def _mark(job: Job) -> spool.Mark:
    return spool.Mark(job.seq, job.attempts, job.losses, job.leased)


def _busy(name: str, reason: str) -> Failed:
    return refused(name, Code.BUSY, reason, RETRY_S)


def _ending(name: str) -> Failed:
    return refused(name, Code.DRAINING, "the daemon is stopping", RETRY_S)


def _unwritten(name: str, reason: str) -> Failed:
    return refused(name, Code.UNAVAILABLE, f"the spool cannot be written: {reason}", RETRY_S)
