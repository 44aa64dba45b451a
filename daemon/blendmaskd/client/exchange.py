"""A client's jobs: what is in flight, what is sent when, what an answer means. No socket and no clock:
`blendmaskd.client.blocking` and `blendmaskd.client.asynchronous` bring those.
"""
from __future__ import annotations

import functools
import itertools
import math
import numbers
import os
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack
import msgspec

from blendmaskd import files, protocol
from blendmaskd.protocol import Accepted, Code, Failed, Fetch, Forget, Forgotten, Options, ProtocolError, Result, Submit

if TYPE_CHECKING:
    from blendmaskd.client.places import Places

LEAST_RETRY_S = 0.05
ANSWER_S = 0.5  # that the daemon's `timeout` may take to come, so that the client does not give up just before it


class JobFailed(Exception):
    """A job was answered with a failure: `code` says which, `reason` why; `job` is its name in the daemon's log."""

    def __init__(self, code: Code, reason: str, retry_after_s: float | None = None, job: str = "") -> None:
        super().__init__(f"{code}: {reason}")
        self.job = job
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s


class SharedMemoryError(RuntimeError):
    """A client that demands shared memory cannot have it; the text says why."""


@dataclass(frozen=True, slots=True)
class ServerPath:
    """An image that the server reads itself, below a root that its settings allow."""

    path: str


@dataclass(frozen=True, slots=True)
class Described:
    """An image as it is to travel: for fronts, which have it from elsewhere."""

    description: protocol.Image
    payload: list[Any]  # frames of bytes


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The answer to a job. `detections` are COCO results in descending score, see `blendmaskd.protocol`."""

    width: int  # pixels
    height: int
    device: str
    timings: dict[str, float]  # seconds by stage
    detections: list[dict[str, Any]]
    job: str = ""  # its name in the daemon's log


Request = Submit | Fetch | Forget
Image = str | Path | bytes | ServerPath | Any  # Any: an array, or what else has `shape`, `dtype` and a buffer


@dataclass(slots=True, eq=False)
class Call:
    """A submission, or what else is asked of a job, until its answer is taken."""

    request: Request
    payload: Sequence[Any]
    retries_left: int
    give_up_at: float  # no retry starts after it
    send_at: float  # inf: sent, waiting
    answer: Segmentation | Accepted | Forgotten | Exception | None = None
    place: protocol.Place | None = None  # in shared memory, taken until it has its last answer
    by_socket: bool = False  # whatever shared memory there is

    @property
    def name(self) -> str:
        return self.request.job

    def frames(self) -> list[Any]:
        if self.place is None or self.by_socket:
            return protocol.encode(self.request, self.payload)
        assert isinstance(self.request, Submit)
        image = msgspec.structs.replace(self.request.image, place=self.place)
        return protocol.encode(msgspec.structs.replace(self.request, image=image))

    def result(self) -> Segmentation:
        """Its segmentation; raises the failure that it has instead."""
        self.check()
        assert isinstance(self.answer, Segmentation)
        return self.answer

    def check(self) -> None:
        """Raise the failure that it has."""
        assert self.answer is not None
        if isinstance(self.answer, Exception):
            raise self.answer


class Exchange:
    """What is in flight, and what is to be sent when. Pure, but for `places`, which are shared memory.

    An image goes by shared memory as soon as there is a place for it, and by socket otherwise; only where `places` are
    required it waits. It goes by socket for good once it was refused (the region may have ended), or sent to whom we
    are not connected any more.

    A large image waits until the daemon has said what it takes: a frame that is too large would cost the connection,
    and all jobs with it.
    """

    def __init__(self, retries: int, timeout_s: float, places: Places | None = None) -> None:
        self.timeout_s = timeout_s
        self._retries = retries
        self._places = places
        self._held: list[Call] = []  # until there is a place for them, or the limits are known
        self._most_bytes: float | None = None  # of an image; None: to be asked for
        self._asked = self._to_ask = False
        self._prefix = secrets.token_hex(8)
        self._numbers = itertools.count(1)
        self.jobs: dict[str, Call] = {}  # unanswered
        self.answered: deque[Call] = deque()  # to be taken from here
        self.stats: deque[dict[str, Any]] = deque()

    def add(self, image: Image, deadline_s: float | None, priority: int, options: Options, now: float) -> Call:
        """A new job, to be sent at once. Raises OSError for a file that cannot be read, TypeError for no image and
        for what cannot be sent; `JobFailed` for what the daemon would refuse.
        """
        described, payload = describe(image)
        if deadline_s is None:
            deadline_s = min(max(self.timeout_s - ANSWER_S, self.timeout_s / 2), protocol.LONGEST_DEADLINE_S)
        submit = Submit(job=f"{self._prefix}-{next(self._numbers)}", image=described, options=options,
                        deadline_s=deadline_s, priority=priority)  # fmt: skip
        return self.ask(submit, now, payload, by_socket=False)

    def add_durable(
        self, image: Image, name: str | None, deadline_s: float | None, priority: int, options: Options, now: float
    ) -> Call:
        """A new durable job, accepted when it has an answer. As `add`; its image goes by socket: it is copied."""
        described, payload = describe(image)
        submit = Submit(job=name or secrets.token_hex(16), image=described, options=options, deadline_s=deadline_s,
                        priority=priority, durable=True)  # fmt: skip
        return self.ask(submit, now, payload)

    def ask(self, request: Request, now: float, payload: Sequence[Any] = (), by_socket: bool = True) -> Call:
        """Something about a job, to be sent at once. Raises ValueError for one that is asked about already."""
        request = checked(request, payload)
        if request.job in self.jobs:
            raise ValueError(f"job {request.job}: this client is already waiting for an answer to it")
        job = Call(request, payload, self._retries, give_up_at=now + self.timeout_s, send_at=now, by_socket=by_socket)
        self.jobs[request.job] = job
        return job

    def due(self, now: float) -> Iterator[list[Any]]:
        """Frames to be sent now."""
        for job in list(self.jobs.values()):
            if job.send_at <= now:
                job.send_at = math.inf
                if self._fits(job) and self._placed(job, now):
                    yield job.frames()
        if self._to_ask and not self._asked:
            self._asked = True
            yield protocol.encode(protocol.GetLimits())

    def next_send(self) -> float:
        """When `due` has something to send."""
        return min((job.send_at for job in self.jobs.values()), default=math.inf)

    def reconnected(self, now: float) -> None:
        """Whoever is at the other end now may not know of what was sent before, and may take less."""
        self._most_bytes, self._asked, self._to_ask = None, False, False
        for job in self.jobs.values():
            job.by_socket = job.by_socket or job.place is not None
            job.send_at = min(job.send_at, now)

    def drop(self, name: str) -> bool:
        """Wait for this job no longer; whether it was unanswered."""
        job = self.jobs.pop(name, None)
        if job is not None:
            self._give_back(job)
        return job is not None

    def receive(self, frames: list[Any], now: float) -> None:
        """Take in a message. A job that has its last answer now is in `answered`, a snapshot in `stats`."""
        message: protocol.ToClient
        message, payload = protocol.decode(frames, protocol.TO_CLIENT)
        match message:
            case protocol.Stats():
                self.stats.append(message.stats)
            case Result() if message.job in self.jobs:
                detections = msgpack.unpackb(memoryview(payload[0]))
                size = message.width, message.height
                answer = Segmentation(*size, message.device, message.timings, detections, message.job)
                self._answer(self.jobs[message.job], answer)
            case Accepted() if message.job in self.jobs:
                self._accepted(self.jobs[message.job], message)
            case Forgotten() if message.job in self.jobs:
                if isinstance(self.jobs[message.job].request, Forget):  # not of an earlier one, sent twice
                    self._answer(self.jobs[message.job], message)
            case Failed() if message.job in self.jobs:
                self._failed(self.jobs[message.job], message, now)
            case protocol.Limits():
                self._most_bytes = message.max_image_bytes
            case Failed(job="") if self._asked:  # a daemon that does not know the question
                self._most_bytes = self._most_bytes or math.inf
        self._release(now)

    def receive_memory(self, now: float) -> None:
        assert self._places is not None
        self._places.receive(now)
        self._release(now)

    def _release(self, now: float) -> None:
        for job in self._held:
            job.send_at = now  # there may be a place now
        self._held.clear()

    def _accepted(self, job: Call, message: Accepted) -> None:
        """To a `forget`, or a `fetch` that waits, it is no answer, but what is left of one that was cancelled."""
        request = job.request
        if isinstance(request, Submit) or (isinstance(request, Fetch) and not request.wait):
            self._answer(job, message)

    def _failed(self, job: Call, message: Failed, now: float) -> None:
        if message.code is Code.UNKNOWN_JOB and isinstance(job.request, Submit):
            return  # to an earlier question, which was sent twice: once more when the connection came back
        if message.code is Code.BAD_REQUEST and self._places and job.place is not None:
            self._places.doubt(job.place, now)
            self._give_back(job)
            job.by_socket, job.send_at = True, now
            return
        may_retry = message.code.retryable and message.code is not Code.TIMEOUT
        again_at = now + max(message.retry_after_s or 0.0, LEAST_RETRY_S)
        if may_retry and job.retries_left and again_at < job.give_up_at:
            job.retries_left -= 1
            job.send_at = again_at
            return
        self._answer(job, JobFailed(message.code, message.reason, message.retry_after_s, message.job))

    def _answer(self, job: Call, answer: Segmentation | Accepted | Forgotten | Exception) -> None:
        del self.jobs[job.name]
        self._give_back(job)
        job.answer = answer
        self.answered.append(job)

    def _give_back(self, job: Call) -> None:
        if self._places and job.place is not None:
            self._places.give_back(job.place)
            job.place = None

    def _fits(self, job: Call) -> bool:
        """Whether the daemon takes its image. False: it is not to be sent now."""
        size = sum(memoryview(frame).nbytes for frame in job.payload)
        if size <= protocol.SURE_BYTES or (self._most_bytes is not None and size <= self._most_bytes):
            return True
        if self._most_bytes is None:
            self._to_ask = True
            self._held.append(job)
        else:
            reason = f"{size} bytes: an image has at most {self._most_bytes:.0f} (limits.max_image_bytes)"
            self._answer(job, JobFailed(Code.TOO_LARGE, reason, job=job.name))
        return False

    def _placed(self, job: Call, now: float) -> bool:
        """Put its image to where it travels from. False: it is not to be sent now."""
        if self._places is None or job.place is not None or job.by_socket or not job.payload:
            return True
        job.place = self._places.put(job.payload[0], now)
        if job.place is not None or not self._places.required:
            return True
        if self._places.problem:
            self._answer(job, SharedMemoryError(f"shared memory is required: {self._places.problem}"))
        else:
            job.send_at = self._places.again_at
            self._held.append(job)
        return False


def checked(request: Request, payload: Sequence[Any]) -> Request:
    """The request as the daemon will read it, in plain values. Raises `JobFailed` for what it would refuse; TypeError,
    ValueError and OverflowError for what cannot be sent at all.
    """
    try:
        frames = [protocol.MAGIC, _ENCODER.encode(request), *payload]
        read, _ = protocol.decode(frames, protocol.FROM_CLIENT, nulls=False)  # None is a slip, as in `mask_format=None`
    except ProtocolError as error:
        raise JobFailed(Code.BAD_REQUEST, str(error), job=error.job) from None
    assert isinstance(read, Request)
    return read


def _plain(value: Any) -> int | float | str:
    """A number or text of numpy's, or of another library. Raises TypeError for everything else."""
    if isinstance(value, str):
        return "".join(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"{value!r:.80}: expected a number or text, found {type(value).__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def describe(image: Image) -> tuple[protocol.Image, list[Any]]:
    """How an image travels, and its payload frames: bytes, or views of memory without gaps."""
    match image:
        case Described():
            return image.description, image.payload
        case ServerPath():
            return protocol.Image(kind="path", path=os.fspath(image.path)), []
        case str() | Path():
            with open(files.open_file(image), "rb") as file:
                return protocol.Image(kind="encoded"), [file.read()]
        case bytes() | bytearray() | memoryview():
            return protocol.Image(kind="encoded"), [_contiguous(image)]
    shape, dtype = getattr(image, "shape", None), _name(getattr(image, "dtype", ""))
    if shape is None:
        raise TypeError(f"{type(image).__name__} is not an image: expected a path, bytes or an array")
    if len(shape) != 3:
        raise TypeError(f"array of shape {tuple(shape)}: expected (height, width, 3)")
    height, width, channels = map(int, shape)
    return protocol.Image(kind="raw", shape=(height, width, channels), dtype=dtype), [_contiguous(image)]


@functools.lru_cache(maxsize=64)
def _name(dtype: object) -> str:
    """NumPy takes 2 us to write one."""
    return str(dtype)


def _contiguous(image: Any) -> Any:
    view = memoryview(image)
    if "O" in view.format:
        raise TypeError("an array of objects is not an image: expected uint8")
    return image if isinstance(image, bytes) else view if view.c_contiguous else view.tobytes()
