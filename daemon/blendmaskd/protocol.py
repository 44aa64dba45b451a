"""The wire protocol: the messages between client, broker and worker, and their encoding as ZeroMQ frames.

docs/wire.md is its specification. A message that cannot be decoded raises `ProtocolError`; beyond `decode` everything
is typed.
"""
from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence, Sized
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from blendmaskd.choices import remedy
from blendmaskd.wanted import Actual

MAGIC = b"BMD1"
MAX_HEADER_BYTES = 64 << 10
MEMORY_SUFFIX = ".fd"
# Of a job, in `timings` and in the snapshot, whose histograms have these bounds.
STAGES = ("queue", "decode", "wait", "device", "finish", "send", "total")
IDLE = ("input", "launches", "selection")  # what a device waits for before the parts of a run, in their order
STAGE_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SURE_BYTES = 1 << 20  # a frame of so many is read whatever the settings are
LONGEST_DEADLINE_S = 86400
LEAST_DURABLE_NAME = 32  # characters: 128 random bits in hexadecimal
LONGEST_NAME, LONGEST_PATH = 128, 4096  # characters

Frames = Sequence[Sized]  # payload frames: bytes or zmq.Frame; the broker asks only for their length
JobName = Annotated[str, Meta(min_length=1, max_length=LONGEST_NAME)]
Seconds = Annotated[float, Meta(ge=0)]


class Code(StrEnum):
    """Why a job failed: a closed table. `retryable` says whether the same job may succeed later."""

    BAD_REQUEST = "bad-request"  # malformed or unsupported
    UNKNOWN_JOB = "unknown-job"  # there is no such durable job
    BAD_IMAGE = "bad-image"
    TOO_LARGE = "too-large"
    BUSY = "busy"  # the queue is full: try again after `retry_after_s`
    TIMEOUT = "timeout"  # the deadline passed
    CANCELLED = "cancelled"
    WORKER_LOST = "worker-lost"  # workers died with its image: the broker has retried it, and now rejects it
    ENGINE_FAILED = "engine-failed"  # the engine raised
    UNAVAILABLE = "unavailable"  # no device can serve
    DRAINING = "draining"  # elsewhere, or later
    UNAUTHORISED = "unauthorised"

    @property
    def retryable(self) -> bool:
        return self in _RETRYABLE


_RETRYABLE = {Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE, Code.DRAINING}


class ProtocolError(ValueError):
    """A message that breaks the rules. `job` is its job's name where that could be read, else empty."""

    def __init__(self, reason: str, job: str = "") -> None:
        super().__init__(reason)
        self.job = job


class RegionError(RuntimeError):
    """Shared memory that cannot be used, or read; the message says why, `left` how many bytes are available."""

    def __init__(self, reason: str, left: int = 0) -> None:
        super().__init__(reason)
        self.left = left


class _Message(msgspec.Struct, tag_field="type", frozen=True):
    """A message header: a map with the key ``type``."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where in shared memory an image lies."""

    region: Annotated[str, Meta(max_length=64)]
    offset: Annotated[int, Meta(ge=0)]
    bytes: Annotated[int, Meta(ge=0)]


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """How the image of a job is sent."""

    kind: Literal["encoded", "raw", "path"]
    shape: tuple[int, int, int] | None = None  # raw: height, width, 3
    dtype: Annotated[str, Meta(max_length=32)] = "uint8"
    order: Literal["bgr", "rgb"] = "bgr"
    path: Annotated[str, Meta(max_length=LONGEST_PATH)] | None = None
    place: Place | None = None  # in shared memory; None: it is the payload


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of the network's output a job asks for."""

    score_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_detections: Annotated[int, Meta(ge=0)] | None = None
    mask_format: Literal["rle", "polygon", "none"] = "rle"


class Submit(_Message, tag="submit", frozen=True, kw_only=True):
    """Client to broker: one job."""

    job: JobName
    image: Image
    options: Options = msgspec.field(default_factory=Options)
    deadline_s: Annotated[float, Meta(gt=0, le=LONGEST_DEADLINE_S)] | None = None  # from arrival; None: the daemon's
    priority: Annotated[int, Meta(ge=-9, le=9)] = 0
    durable: bool = False  # kept in the spool: `accepted` when it is there, its answer by `fetch`


class Fetch(_Message, tag="fetch", frozen=True, kw_only=True):
    """Client to broker: request the answer of a durable job."""

    job: JobName
    wait: bool = True  # until there is one; otherwise `accepted` means that there is none yet


class Forget(_Message, tag="forget", frozen=True, kw_only=True):
    """Client to broker: a durable job and its answer are no longer wanted."""

    job: JobName


class Cancel(_Message, tag="cancel", frozen=True, kw_only=True):
    """Client to broker: the job is no longer wanted."""

    job: JobName


class GetStats(_Message, tag="get-stats", frozen=True, kw_only=True):
    """Client to broker: request the latest snapshot."""


class GetLimits(_Message, tag="get-limits", frozen=True, kw_only=True):
    """Client to broker: what may it send?"""


class Result(_Message, tag="result", frozen=True, kw_only=True):
    """Broker to client: the answer. Payload: msgpack list of COCO results."""

    job: str
    width: int
    height: int
    device: str
    timings: dict[str, float]


class Accepted(_Message, tag="accepted", frozen=True, kw_only=True):
    """Broker to client: a durable job is in the spool, and will be answered."""

    job: str


class Forgotten(_Message, tag="forgotten", frozen=True, kw_only=True):
    """Broker to client: this durable job has been removed."""

    job: str


class Failed(_Message, tag="failed", frozen=True, kw_only=True):
    """Broker to client: the answer of a job without a result."""

    job: str
    code: Code
    reason: str
    retry_after_s: float | None = None


class Stats(_Message, tag="stats", frozen=True, kw_only=True):
    """Broker to client: a snapshot."""

    stats: dict[str, Any]


class Limits(_Message, tag="limits", frozen=True, kw_only=True):
    """Broker to client: what it takes."""

    max_image_bytes: int


class Ready(_Message, tag="ready", frozen=True, kw_only=True):
    """Worker to broker: loaded and warm."""

    token: str  # of this run of the daemon, so that no orphan of another run is accepted
    pid: int
    window: Annotated[int, Meta(ge=1)]  # leases it wants to hold
    actual: Actual


class Started(_Message, tag="started", frozen=True, kw_only=True):
    """Worker to broker: these leases are about to enter the device."""

    leases: list[int]


class Finished(_Message, tag="finished", frozen=True, kw_only=True):
    """Worker to broker: a lease's result. Payload: as in `Result`."""

    lease: int
    width: int
    height: int
    timings: dict[str, float]


class FailedLease(_Message, tag="failed-lease", frozen=True, kw_only=True):
    """Worker to broker: a lease that ended without a result."""

    lease: int
    code: Code
    reason: str


class Report(_Message, tag="report", frozen=True, kw_only=True):
    """Worker to broker, each second: what was done since the last report."""

    start: float  # CLOCK_MONOTONIC
    end: float
    images: int
    busy_s: Seconds  # the device's own time
    # what it waited for between the runs that ended meanwhile, see IDLE; their sum may exceed end - start
    idle_s: dict[str, Seconds] = {}
    memory_bytes: int  # resident size of the process
    device_memory_bytes: int  # held on the device; 0 where the host's memory is meant
    # batch, height, width (padded) met so far, and the median of the last runs in seconds, None before the second run
    shapes: list[tuple[int, int, int, float | None]]
    window: Annotated[int, Meta(ge=1)]  # leases it wants to hold now


class Preview(_Message, tag="preview", frozen=True, kw_only=True):
    """Worker to broker: the last segmented image, where `show_last_image` is on. Payload: a JPEG."""


class Lease(_Message, tag="lease", frozen=True, kw_only=True):
    """Broker to worker: segment this image. Payload: as in `Submit`."""

    lease: int
    image: Image
    options: Options
    deadline: float  # CLOCK_MONOTONIC
    alone: bool = False  # a worker died with it before: never batched with others
    ahead: bool = False  # runs before leases without this flag: its client has no other job on a device


class Revoke(_Message, tag="revoke", frozen=True, kw_only=True):
    """Broker to worker: this lease is no longer wanted; skip it if it has not started."""

    lease: int


class OpenRegion(_Message, tag="open-region", frozen=True, kw_only=True):
    """Broker to worker: images may lie in this memory."""

    region: str
    descriptor: int  # of the daemon's process
    inode: int  # of the file; if the descriptor has another by now, the region has ended
    bytes: int


class CloseRegion(_Message, tag="close-region", frozen=True, kw_only=True):
    """Broker to worker: this region has ended; its memory is free when nobody has it open any more."""

    region: str


class Stop(_Message, tag="stop", frozen=True, kw_only=True):
    """Broker to worker: finish what you hold, then exit."""


def shown_job(name: str) -> str:
    """A job's name for logs and statistics: only the beginning, if it may be a durable job's secret."""
    return name if len(name) < LEAST_DURABLE_NAME else f"{name[:8]}..."


OfJobs = Submit | Cancel | Fetch | Forget
FromClient = OfJobs | GetStats | GetLimits
ToClient = Result | Failed | Accepted | Forgotten | Stats | Limits
FromWorker = Ready | Started | Finished | FailedLease | Report | Preview
ToWorker = Lease | Revoke | OpenRegion | CloseRegion | Stop
Message = FromClient | ToClient | FromWorker | ToWorker

M = TypeVar("M")

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
NULL = b"\xc0"
_FIELDS = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])


class Kinds(dict[str, type[M]]):
    """The messages that one side may send, by type."""

    def __init__(self, messages: Any) -> None:
        super().__init__({each.__struct_config__.tag: each for each in get_args(messages)})
        self.decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(messages)


FROM_CLIENT: Kinds[FromClient] = Kinds(FromClient)
TO_CLIENT: Kinds[ToClient] = Kinds(ToClient)
FROM_WORKER: Kinds[FromWorker] = Kinds(FromWorker)
TO_WORKER: Kinds[ToWorker] = Kinds(ToWorker)


def encode(message: Message, payload: Frames = ()) -> list[Any]:
    """Frames of a message; the payload's frames are passed on as they are."""
    return [MAGIC, msgspec.msgpack.encode(message), *payload]


def decode(frames: Sequence[Any], kinds: Kinds[M], nulls: bool = True) -> tuple[M, list[Any]]:
    """The message of these frames and its payload. `kinds` is what the sender may say, `nulls` whether it may say null
    for what it leaves to its default.

    Raises `ProtocolError` for anything else; its `job` names the job where that could be read.
    """
    if len(frames) < 2 or len(frames[0]) != len(MAGIC) or bytes(memoryview(frames[0])) != MAGIC:
        raise ProtocolError(f"expected frames [{MAGIC.decode()}, header, payload...]")
    header = memoryview(frames[1])
    if kinds is FROM_CLIENT and len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes: at most {MAX_HEADER_BYTES}; pixels go into payload frames")
    try:
        message = kinds.decoder.decode(header)
    except UNREADABLE:
        message = _read_in_steps(header, kinds, nulls)
    if isinstance(message, Submit):
        _check_submit(message, len(frames) - 2)
    return message, list(frames[2:])


def _read_in_steps(view: memoryview, kinds: Kinds[M], nulls: bool) -> M:
    """Read a refused header again, only what is known of it. Raises `ProtocolError` with a clear reason and its job."""
    try:
        header = _FIELDS.decode(view)
        name, job = _text(header, "type"), _text(header, "job")
    except UNREADABLE as error:
        raise ProtocolError(f"header is not a msgpack map with str keys: {error}") from None
    job = job if len(job) <= LONGEST_NAME else ""
    if not name:
        raise ProtocolError("header has no type")
    if (kind := kinds.get(name)) is None:
        raise ProtocolError(f"type {name!r:.80}: expected one of {', '.join(kinds)}", job)
    try:
        return msgspec.msgpack.decode(msgspec.msgpack.encode(_without_nulls(header) if nulls else header), type=kind)
    except UNREADABLE as error:
        raise ProtocolError(f"{name}: {error}{remedy(str(error), kind)}", job) from None


def _text(header: Mapping[str, msgspec.Raw], key: str) -> str:
    """Empty: there is none. Raises UnicodeDecodeError."""
    try:
        return msgspec.msgpack.decode(header[key], type=str)
    except (KeyError, msgspec.ValidationError):
        return ""


def _without_nulls(header: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
    """What is given, in the header and in the maps in it."""
    maps: dict[str, Any] = {}
    for key in header.keys() & {"image", "options"}:
        with contextlib.suppress(*UNREADABLE):
            maps[key] = _given(_FIELDS.decode(header[key]))
    return {**_given(header), **maps}


def _given(fields: Mapping[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    return {key: value for key, value in fields.items() if bytes(value) != NULL}


def _check_submit(message: Submit, payload_frames: int) -> None:
    image = message.image
    wanted = 0 if image.kind == "path" or image.place else 1
    if payload_frames != wanted:
        what = "an image in shared memory" if image.place else f"kind {image.kind}"
        raise ProtocolError(f"{payload_frames} payload frames: {what} takes {wanted}", message.job)
    if message.durable and len(message.job) < LEAST_DURABLE_NAME:
        text = f"job: the name of a durable job must have at least {LEAST_DURABLE_NAME} random characters"
        raise ProtocolError(text, message.job)
    if image.kind == "path" and not image.path:
        raise ProtocolError("image.path: missing", message.job)
    if image.kind == "path" and image.place:
        raise ProtocolError("image.place: kind path takes none", message.job)
    if image.kind == "raw" and image.shape is None:
        raise ProtocolError("image.shape: missing", message.job)
