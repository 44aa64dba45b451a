"""The wire protocol: the messages between client, broker and worker, and their encoding as ZeroMQ frames.

This docstring is its specification; any language with ZeroMQ and msgpack can be a client.

## Frames

Both sides use DEALER to ROUTER, without an empty delimiter. A message is ``[b"BMD1", header, payload…]``, and its
payload at most one frame: an image, or detections, as bytes. The header is a msgpack map with a key ``type``.

- Keys and texts are msgpack's str, not bin. Unknown keys are ignored, so that either side may be newer; be as lenient.
- Every optional field may be null, which is the same as leaving it out. The daemon writes null rather than leave out.
- Where a number may have a fraction an integer will do, but not the reverse: ``max_detections`` 5.0 is refused. NaN and
  infinity are always refused.
- A header has at most 64 KiB. A frame of up to 1 MiB is always read; a client that sends one of more than twice
  ``max_image_bytes`` and 1 MiB loses its connection without an answer, so ask for the limit (``get-limits``) before
  sending a large image. What else one client may take is in [security.md](security.md).
- msgpackr for JavaScript needs ``new Packr({useRecords: false})``, or it writes an extension of its own instead of
  maps.

## What a client sends

``submit``
    ``job`` (str of 1 to 128 characters, the client's own name for the job), ``image`` (map, below) and, optionally,
    ``options`` (map, below), ``deadline_s`` (seconds from arrival, more than 0 and at most 86400; default: the daemon's
    ``deadline_s``, for durable jobs one day), ``priority`` (integer from -9 to 9, default 0: among one client's jobs
    higher priorities run first, and jobs below 0 also yield to those of all other clients), ``durable`` (default false,
    see below). Payload: one frame with the image; none for kind ``path`` and for an image in shared memory.
``cancel``
    ``job``. A job without an answer is answered ``failed`` with the code `cancelled`; an unknown or answered one is
    ignored. For a durable job, only this client's wait ends: its open ``fetch`` is answered ``accepted``.
``fetch``, ``forget``
    ``job``, a durable one; see below. ``fetch`` may have ``wait`` (default true).
``get-stats``
    Answered by ``stats``.
``get-limits``
    Answered by ``limits``.

**image**: ``kind`` is ``encoded`` (JPEG, PNG, WebP, BMP or TIFF bytes), ``raw`` (``shape`` [height, width, 3],
``dtype`` ``uint8``, which is the default and the only one, ``order`` ``bgr`` (default) or ``rgb``, rows from the top,
no padding) or ``path`` (``path``: a file on the server, below a root that its settings allow). An ``encoded`` or
``raw`` image in shared memory has a ``place``: a map of ``region`` (str, its name, see below), ``offset`` (bytes from
the region's start) and ``bytes`` (which count toward limits as a payload does).

**options**: ``score_threshold`` (0 to 1; default 0: everything the network returns), ``max_detections`` (0 or more;
default: all), ``mask_format`` (``rle``, ``polygon`` or ``none``; default ``rle``).

## What the broker answers

Each accepted job is answered exactly once; answers come in any order.

``result``
    ``job``, ``width``, ``height`` (pixels of the image), ``device``, ``timings`` (seconds by stage: ``queue``,
    ``decode``, ``wait``, ``device``, ``finish``, ``send``, ``total``). Payload: one frame, a msgpack list of COCO
    results in descending score: ``bbox`` [x, y, width, height] in pixels, ``score``, ``class_index`` (from 0, without
    gaps), ``category_id`` (the data set's own), ``category_name``, and ``segmentation``, which is missing with
    ``mask_format`` ``none``.
``failed``
    ``job``, ``code`` (one of the [error codes](client.md#errors)), ``reason`` (for people) and ``retry_after_s``, which
    is null if a retry cannot help. `worker-lost` is final: the broker itself has retried the image on another worker,
    and rejects it for ten minutes. During that time anyone who submits the same image gets this answer at once, under
    whatever name; ``reason`` says when it may be tried again.
``stats``
    ``stats``: the [snapshot](#statistics).
``limits``
    ``max_image_bytes``: a larger image is answered `too-large`.
``accepted``, ``forgotten``
    ``job``, a durable one; see below.

A message that is malformed is answered ``failed`` with `bad-request`. ``job`` is the message's own, or empty where it
could not be read: the header is not a msgpack map with str keys and a ``type``, is too long, or ``job`` is no str of at
most 128 characters. A job of that name that is already accepted is not affected, and still gets its own answer.

## Masks

A **polygon** segmentation is a list with one polygon for each connected part of the mask, none if it has no pixel. A
polygon is a flat list [x0, y0, x1, y1, …] of points in pixels of the image (0, 0 is the upper left corner of the first
pixel), closed from the last to the first. It runs along the edges of pixels and cuts corners from the middle of one
edge to that of the next, so its numbers are multiples of a half. A hole is joined to its outline by a cut without
width.

An **rle** segmentation is COCO's compressed form, a map of ``size`` [height, width] and ``counts`` (str):

1. The mask is a row of height × width pixels, column after column: pixel ``i`` is at x = i ÷ height (rounded down), y =
   i mod height.
2. ``counts`` are lengths of runs, in turn of pixels outside and inside of the mask. The first may be 0.
3. A number is written in groups of five bits, the lowest first: a character's code minus 48 has the group in its lower
   five bits, and 32 added if another group follows.
4. Bit 16 of the last group is the sign: if it is set, the bits above the last group are ones (two's complement).
5. From the fourth run on, the number is the difference to the run two before it.

## Identity and connections

A client *is* its ZeroMQ identity (ZMQ_ROUTING_ID). Names of jobs are its own, and answers go to it, by whichever
connection it has. Without one ZeroMQ makes up another for each connection: what was sent before is answered to nobody.

- **A name may be used again** as soon as it is answered. A ``submit`` with the name of a job that is not answered yet
  changes nothing: there will still be exactly one answer. So it is always safe to send again what is unanswered.
- **After a lost connection send again what is unanswered**: the daemon may have been restarted, or have cancelled the
  jobs of a client that it saw leave, and knows nothing of them; there will only be silence. A socket monitor tells
  when: at each ZMQ_EVENT_HANDSHAKE_SUCCEEDED but the first. A client without one repeats itself after some seconds of
  silence, with ZMQ_IMMEDIATE set, so that nothing piles up while nobody is there. Over TCP set ZMQ_HEARTBEAT_IVL, or a
  path that went dead is not noticed.
- **A second connection under an identity takes over**: the jobs stay, the second gets the answers, the first hears
  nothing more. Two sockets that live at the same time need two identities.

**Over TCP** the daemon is a CURVE server: the client sets the daemon's public key and a key pair of its own whose
public half is allowed. Its identity has at least 16 random bytes and is a secret, because answers go to whoever uses
it. A shorter or missing identity is answered `unauthorised`. So is a message under an identity that has unanswered jobs
of another key; those jobs then end without an answer, and their owner, who lost the connection, sends them again. So
are the unanswered jobs of a key that is no longer allowed; anything such a key sends afterwards is dropped.

A client that is not let in hears nothing; a socket monitor tells why. After ZMQ_EVENT_HANDSHAKE_FAILED_AUTH, the
client's key is not allowed, and ZMQ_EVENT_HANDSHAKE_FAILED_PROTOCOL, one side uses no keys, ZeroMQ gives up: make a new
socket. After ZMQ_EVENT_HANDSHAKE_FAILED_NO_DETAIL, of which many in a row mean a wrong server key, it tries again for
ever.

A **key file** is UTF-8 text, with comments after ``#``; a key is 40 characters of Z85, as ZMQ_CURVE_PUBLICKEY and the
other socket options take it. The daemon's ``server.key`` and a client's ``NAME.key`` lack the last line:

    metadata
        name = "alice"
    curve
        public-key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
        secret-key = "D:)Q[IlAW!ahhC2ac:9*A}h:p?([4%wOTJ%JR%cs"

## Durable jobs

Durable jobs outlive the daemon; they require ``spool`` in its settings. A ``submit`` with ``durable`` true is answered
``accepted`` once the job and its image are on disk, or ``failed`` (`busy`: the spool is full; `unavailable`: it cannot
be written; `bad-request`: there is none). From then on the job is never cancelled because a client leaves, is leased
again after a restart of the daemon, and gets exactly one answer, which is kept. ``fetch`` returns this answer, as
``result`` or ``failed``, as soon as there is one, any number of times and to anyone who asks; with ``wait`` false it is
answered ``accepted`` while there is none. A ``fetch`` for an unknown job is answered `bad-request`. ``forget`` is
answered ``forgotten`` when the job has been removed from the spool; a job that had no answer ends as `cancelled`, and
so does every ``fetch`` that is open, before ``forgotten`` comes. Answers that are not forgotten are kept for
``spool_keep_s`` of the daemon's running time.

The name of a durable job is a secret, like a region's: anyone who knows it can fetch and forget the job. It therefore
has at least 32 characters, which the client chooses at random. A ``submit`` with a name that is already in the spool is
answered ``accepted`` and changes nothing, before and after a restart, so repeating it is safe. Answers do not say to
which request they belong: send one request for a job at a time. Two of a client's ``fetch`` for one job that are open
together may get one answer. ``deadline_s`` counts from the time the daemon accepted the job, or resumed it after a
restart. An image in shared memory is copied; one of kind ``path`` stays where it is and is read when its turn comes. A
job that was running when the daemon died counts as having lost its worker: an image that takes the host down also ends
as `worker-lost`.

## Shared memory

It bypasses ZeroMQ, which cannot pass descriptors. Beside each ipc socket the daemon listens on a Unix socket of type
SOCK_SEQPACKET, at the same path with ``.fd`` appended. A client on the same host connects and sends one message:
``BMD1``, and with it (SCM_RIGHTS) the descriptor of a memory file (``memfd_create``) that it has sealed with
F_SEAL_SHRINK so that it can never be truncated. One message comes back, a msgpack map: ``region``, the name of the new
region; or ``reason``, why it was refused, with ``left``, how many bytes a region may have now (0: none can be had). The
region lasts as long as the connection, which the kernel closes when the client dies; nothing more may be sent over it.
An image's bytes must not change before its job is answered. The name is a secret: anyone who knows it can use the
region.

## Workers

They use the same frames on a socket of their own: ``ready``, ``started``, ``finished``, ``failed-lease``, ``report``,
``preview`` towards the broker; ``lease``, ``revoke``, ``open-region``, ``close-region``, ``stop`` from it. Each lease
gets exactly one ``finished`` or ``failed-lease``. Times in ``lease`` and ``report`` are CLOCK_MONOTONIC, which all
processes of a host share.

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
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        message = _read_in_steps(header, kinds, nulls)
    if isinstance(message, Submit):
        _check_submit(message, len(frames) - 2)
    return message, list(frames[2:])


def _read_in_steps(view: memoryview, kinds: Kinds[M], nulls: bool) -> M:
    """Read a refused header again. Raises `ProtocolError` with a clear reason and the name of its job."""
    header = _header(view)
    job = header.get("job")
    job = job if isinstance(job, str) and len(job) <= 128 else ""
    kind = kinds.get(header["type"])
    if kind is None:
        raise ProtocolError(f"type {header['type']!r:.80}: expected one of {', '.join(kinds)}", job)
    try:
        return msgspec.convert(_without_nulls(header) if nulls else header, kind)
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


def _without_nulls(header: dict[str, Any]) -> dict[str, Any]:
    """What is given, in the header and in the maps in it."""
    maps = {key: _given(value) if isinstance(value, dict) else value for key, value in header.items()}
    return _given(maps)


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


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
