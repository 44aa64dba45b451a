"""The wire protocol: the messages between client, broker and worker, and their encoding as ZeroMQ frames.

This docstring is its specification; any language with ZeroMQ and msgpack can be a client.

**Frames.** Both sides use DEALER to ROUTER, without an empty delimiter. A message is ``[b"BMD1", header, payload…]``.
The header is a msgpack map with a key ``type``; unknown keys are ignored, so that either side may be newer. Pixels and
detections are payload frames, never inside the header; the broker forwards them without copying or decoding them.

**A client** sends

``submit``
    ``job`` (str of 1 to 128 characters, the client's own name for the job), ``image`` (map, below) and, optionally,
    ``options`` (map, below), ``deadline_s`` (seconds from arrival), ``priority`` (-9 to 9, default 0: among one
    client's jobs higher priorities run first, and jobs below 0 also yield to those of all other clients).
    Payload: one frame with the image; none for kind ``path`` and for an image in shared memory. While a job of the
    same name from the same client is unanswered, a repeated ``submit`` changes nothing: there will still be exactly
    one answer.
``cancel``
    ``job``. The job is answered `cancelled` if it had no answer yet; an unknown job is ignored. For a durable job,
    only this client's wait ends.
``fetch``, ``forget``
    ``job``, a durable one; see below. ``fetch`` may have ``wait`` (default true).
``get-stats``
    Answered by ``stats``.
``get-limits``
    Answered by ``limits``. Frames of up to 1 MiB are always read; the connection of a client that sends one of more
    than twice ``max_image_bytes`` is closed, so ask before sending a large image.

``image``: ``kind`` is ``encoded`` (JPEG, PNG, WebP, BMP or TIFF bytes), ``raw`` (``shape`` [height, width, 3],
``dtype`` ``uint8``, ``order`` ``bgr`` or ``rgb``, rows from the top, no padding) or ``path`` (``path``: a file on the
server, below a root that its settings allow). An ``encoded`` or ``raw`` image in shared memory has a ``place``: a map
of ``region`` (str, its name, see below), ``offset`` (bytes from the region's start) and ``bytes`` (which count toward
limits as a payload does).

``options``: ``score_threshold`` (0 to 1; default 0: everything the network returns), ``max_detections`` (default: all),
``mask_format`` (``rle``, ``polygon`` or ``none``; default ``rle``).

**The broker** answers each accepted job exactly once, with

``result``
    ``job``, ``width``, ``height`` (pixels of the image), ``device``, ``timings`` (seconds by stage: ``queue``,
    ``decode``, ``wait``, ``device``, ``finish``, ``send``, ``total``). Payload: one frame, a msgpack list of COCO
    results in descending score: ``bbox`` [x, y, width, height], ``score``, ``class_index``, ``category_id``,
    ``category_name``, ``segmentation`` (``{"size": [h, w], "counts": str}`` as pycocotools reads it, or a list of
    polygons).
``failed``
    ``job``, ``code`` (one of `Code`), ``reason``, and ``retry_after_s`` if a retry can help. It is also the answer to a
    message that cannot be read, with the job's name if it could be found and an empty one otherwise.
    `worker-lost` is final: the broker itself has retried the image on another worker, and rejects it for ten minutes.
    During that time anyone who submits the same image gets this answer at once, under whatever name; ``reason`` says
    when it may be tried again.
``stats``
    ``stats``: the snapshot described in ``blendmaskd.core.stats``.
``limits``
    ``max_image_bytes``: a larger image is answered `too-large`.

**Durable jobs** outlive the daemon; they require ``spool`` in its settings. A ``submit`` with ``durable`` true is
answered ``accepted`` (``job``) once the job and its image are on disk, or ``failed`` (`busy`: the spool is full;
`unavailable`: it cannot be written; `bad-request`: there is none). From then on the job is never cancelled because a
client leaves, is leased again after a restart of the daemon, and gets exactly one answer, which is kept. ``fetch``
returns this answer, as ``result`` or ``failed``, as soon as there is one, any number of times and to anyone who asks;
with ``wait`` false it is answered ``accepted`` while there is none. A ``fetch`` for an unknown job is answered
`bad-request`. ``forget`` is answered ``forgotten`` (``job``) when the job has been removed from the spool; a job that
had no answer ends as `cancelled`. Answers that are not forgotten are kept for ``spool_keep_s`` of the daemon's running
time.

The name of a durable job is a secret, like a region's: anyone who knows it can fetch and forget the job. It therefore
has at least 32 characters, which the client chooses at random. A ``submit`` with a name that is already in the spool is
answered ``accepted`` and changes nothing, before and after a restart, so repeating it is safe. Its `failed` looks like
that of a ``fetch``: wait for the answer to one before sending the other. ``deadline_s`` counts from the time the daemon
accepted the job, or resumed it after a restart; the default is one day. An image in shared memory is copied; one of
kind ``path`` stays where it is and is read when its turn comes. A job that was running when the daemon died counts as
having lost its worker: an image that takes the host down also ends as `worker-lost`.

**Over TCP** the daemon is a CURVE server: the client sets the daemon's public key and a key pair of its own whose
public half is allowed. Its identity (ZMQ_ROUTING_ID) has at least 16 random bytes and is a secret, because answers go
to whoever uses it. A shorter or missing identity is answered `unauthorised`. So are messages under an identity that has
unanswered jobs of another key, and the unanswered jobs of a key that is no longer allowed; anything such a key sends
afterwards is dropped.

**Shared memory** bypasses ZeroMQ, which cannot pass descriptors. Beside each ipc socket the daemon listens on a Unix
socket of type SOCK_SEQPACKET, at the same path with `MEMORY_SUFFIX` appended. A client on the same host connects and
sends one message: ``BMD1``, and with it (SCM_RIGHTS) the descriptor of a memory file (``memfd_create``) that it has
sealed with F_SEAL_SHRINK so that it can never be truncated. One message comes back, a msgpack map: ``region``, the name
of the new region; or ``reason``, why it was refused, with ``left``, the number of bytes still available. The region
lasts as long as the connection, which the kernel closes when the client dies; nothing more may be sent over it. An
image's bytes must not change before its job is answered. The name is a secret: anyone who knows it can use the region.

**Workers** use the same frames on a socket of their own: ``ready``, ``started``, ``finished``, ``failed-lease``,
``report``, ``preview`` towards the broker; ``lease``, ``revoke``, ``open-region``, ``close-region``, ``stop`` from it.
Each lease gets exactly one ``finished`` or ``failed-lease``. Times in ``lease`` and ``report`` are CLOCK_MONOTONIC,
which all processes of a host share.

Pickle is never used. A message that cannot be decoded raises `ProtocolError`; beyond `decode` everything is typed.
"""
from __future__ import annotations

import functools
import operator
from collections.abc import Sequence, Sized
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from blendmaskd.wanted import Actual

MAGIC = b"BMD1"
MAX_HEADER_BYTES = 64 << 10
MEMORY_SUFFIX = ".fd"
# Of a job, in `timings` and in the snapshot, whose histograms have these bounds.
STAGES = ("queue", "decode", "wait", "device", "finish", "send", "total")
IDLE = ("input", "launches", "selection")  # what a device waits for before the parts of a run, in their order
STAGE_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SURE_BYTES = 1 << 20  # a frame of so many is read whatever the settings are
LEAST_DURABLE_NAME = 32  # characters: 128 random bits in hexadecimal

Frames = Sequence[Sized]  # payload frames: bytes or zmq.Frame; the broker asks only for their length
JobName = Annotated[str, Meta(min_length=1, max_length=128)]
Seconds = Annotated[float, Meta(ge=0)]


class Code(StrEnum):
    """Why a job failed: a closed table. `retryable` says whether the same job may succeed later."""

    BAD_REQUEST = "bad-request"  # malformed or unsupported
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
    """A message that breaks the rules above. `job` is its job's name where that could be read, else empty."""

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
    path: Annotated[str, Meta(max_length=4096)] | None = None
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
    deadline_s: Annotated[float, Meta(gt=0, le=86400)] | None = None  # from arrival; None: the daemon's own
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


class Kinds(dict[str, type[M]]):
    """The messages that one side may send, by type."""

    def __init__(self, *messages: type[M]) -> None:
        super().__init__({_tag(message): message for message in messages})
        self.decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(functools.reduce(operator.or_, messages))


def _tag(message: Any) -> str:
    return str(message.__struct_config__.tag)


FROM_CLIENT: Kinds[FromClient] = Kinds(Submit, Cancel, Fetch, Forget, GetStats, GetLimits)
TO_CLIENT: Kinds[ToClient] = Kinds(Result, Failed, Accepted, Forgotten, Stats, Limits)
FROM_WORKER: Kinds[FromWorker] = Kinds(Ready, Started, Finished, FailedLease, Report, Preview)
TO_WORKER: Kinds[ToWorker] = Kinds(Lease, Revoke, OpenRegion, CloseRegion, Stop)


def encode(message: Message, payload: Frames = ()) -> list[Any]:
    """Frames of a message; the payload's frames are passed on as they are."""
    return [MAGIC, msgspec.msgpack.encode(message), *payload]


def decode(frames: Sequence[Any], kinds: Kinds[M]) -> tuple[M, list[Any]]:
    """The message of these frames and its payload. `kinds` is what the sender may say.

    Raises `ProtocolError` for anything else; its `job` names the job where that could be read.
    """
    if len(frames) < 2 or len(frames[0]) != len(MAGIC) or bytes(memoryview(frames[0])) != MAGIC:
        raise ProtocolError(f"expected frames [{MAGIC.decode()}, header, payload...]")
    header = memoryview(frames[1])
    if kinds is FROM_CLIENT and len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(header)} bytes: at most {MAX_HEADER_BYTES}; pixels go into payload frames")
    try:
        message = kinds.decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = _read_in_steps(header, kinds)
    if isinstance(message, Submit):
        _check_submit(message, len(frames) - 2)
    return message, list(frames[2:])


def _read_in_steps(view: memoryview, kinds: Kinds[M]) -> M:
    """Read a refused header again to find a clear reason and the name of its job: raises `ProtocolError`."""
    header = _header(view)
    job = header.get("job")
    job = job if isinstance(job, str) and len(job) <= 128 else ""
    kind = kinds.get(header["type"])
    if kind is None:
        raise ProtocolError(f"type {header['type']!r:.80}: expected one of {', '.join(kinds)}", job)
    try:
        return msgspec.convert(header, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{header['type']}: {error}", job) from None


def _header(view: memoryview) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(view, strict_map_key=True)
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"header is not msgpack: {str(error) or type(error).__name__}") from None
    if not isinstance(header, dict):
        raise ProtocolError(f"header is a {type(header).__name__}: expected a map")
    if not isinstance(header.get("type"), str):
        raise ProtocolError("header has no type")
    return header


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
