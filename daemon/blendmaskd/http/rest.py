"""The REST interface, of `blendmaskd-http` and of the Ray application: what a request asks for, how it is answered.

``POST /v1/segment?score_threshold=0.3`` with an image, see `bodies`. What is asked for is in the query or in fields of
the body: `protocol.Options`, `protocol.Image` (``kind``, ``shape=480,640,3``, ``dtype``, ``order``, ``path``), and
``deadline_s``. An answer is `Segmentation` as JSON, a failure a `Problem` (RFC 9457) with a status of `STATUS`. Pure.
"""
from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from blendmaskd.choices import remedy
from blendmaskd.http import bodies
from blendmaskd.protocol import LEAST_DURABLE_NAME, LONGEST_DEADLINE_S, LONGEST_NAME, LONGEST_PATH, Code, Image, Options

STATUS = {
    Code.BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    Code.UNKNOWN_JOB: HTTPStatus.NOT_FOUND,
    Code.BAD_IMAGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Code.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
    Code.CANCELLED: HTTPStatus.CONFLICT,
    Code.WORKER_LOST: HTTPStatus.BAD_GATEWAY,
    Code.ENGINE_FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DRAINING: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.UNAUTHORISED: HTTPStatus.UNAUTHORIZED,
}
RETRY_AFTER_S = 1.0
PROBLEM_TYPE = "application/problem+json"
LONGEST_WAIT_S = 60.0
Priority = Annotated[int, Meta(ge=-9, le=9)]
# Python's $ is also before a newline at the end.
JobName = Annotated[
    str, Meta(min_length=LEAST_DURABLE_NAME, max_length=LONGEST_NAME, pattern=r"^[A-Za-z0-9._~-]+(?!\n)$")
]
Shape = Annotated[str, Meta(description="raw: HEIGHT,WIDTH,3", pattern=r"^[0-9]{1,9},[0-9]{1,9},3(?!\n)$")]


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may be asked for beside the image, in the query or as fields of the body."""

    kind: Literal["encoded", "raw", "path"] = "encoded"
    shape: Shape | None = None
    dtype: Literal["uint8"] = "uint8"
    order: Literal["bgr", "rgb"] = "bgr"
    path: Annotated[str, Meta(max_length=LONGEST_PATH)] | None = None
    score_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.0
    max_detections: Annotated[int, Meta(ge=0, le=10**9)] | None = None
    mask_format: Literal["rle", "polygon", "none"] = "rle"
    deadline_s: Annotated[float, Meta(gt=0, le=LONGEST_DEADLINE_S)] | None = None

    @property
    def options(self) -> Options:
        return msgspec.convert(self, Options, from_attributes=True)


class SegmentQuery(Query, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What may be asked for of the front."""

    priority: Priority = 0


class JobQuery(SegmentQuery, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The same for a durable job. Whoever names it may repeat the request."""

    job: JobName | None = None


class WaitQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long the answer of a job is waited for, in seconds."""

    wait: Annotated[float, Meta(ge=0, le=LONGEST_WAIT_S)] = 0.0


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A query without parameters."""


class Rle(msgspec.Struct, frozen=True):
    """COCO's compressed mask."""

    size: Annotated[list[int], Meta(description="height, width", min_length=2, max_length=2)]
    counts: str


class Detection(msgspec.Struct, frozen=True):
    """A COCO result."""

    bbox: Annotated[list[float], Meta(description="x, y, width, height in pixels", min_length=4, max_length=4)]
    score: float
    class_index: int
    category_id: int
    category_name: str
    segmentation: Rle | list[list[float]] | UnsetType = UNSET


class Segmentation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of an image."""

    width: int
    height: int
    device: str
    timings: Annotated[dict[str, float], Meta(description="seconds by stage")]
    detections: list[Any]  # as `Detection`; they are not looked at again
    node: str = ""  # of a cluster


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request has no other answer (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    code: Code
    retry_after_s: float | None = None  # where trying again can help


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A durable job. Its name is a secret: whoever knows it can fetch and delete the job."""

    job: str
    state: Literal["waiting", "done", "failed"]
    result: Segmentation | UnsetType = UNSET
    error: Problem | UnsetType = UNSET


class Failure(Exception):
    """A request that ends with a `Problem`."""

    def __init__(
        self, code: Code, reason: str, retry_after_s: float | None = None, status: HTTPStatus | None = None
    ) -> None:
        super().__init__(f"{code}: {reason}")
        self.status = status or STATUS[code]
        after = (retry_after_s or RETRY_AFTER_S) if code.retryable else None
        self.problem = Problem(type=f"urn:blendmaskd:{code}", title=self.status.phrase, status=self.status,
                               detail=reason, code=code, retry_after_s=after)  # fmt: skip

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(self.problem)

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": PROBLEM_TYPE}
        if self.problem.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.problem.retry_after_s)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers


Q = TypeVar("Q", bound=Query)


class Request(msgspec.Struct, Generic[Q], frozen=True, kw_only=True):
    """What a client wants."""

    image: Image
    payload: bytes  # empty for a path
    query: Q
    deadline_s: float  # from arrival


def read(
    parameters: Mapping[str, str], content_type: str, body: bytes, deadline_s: float, kind: type[Q]
) -> Request[Q]:
    """The request that a query and a body make. Raises `Failure`."""
    try:
        found = bodies.read(content_type, body)
    except bodies.Malformed as error:
        raise Failure(Code.BAD_REQUEST, str(error)) from None
    if both := parameters.keys() & found.fields.keys():
        raise Failure(Code.BAD_REQUEST, f"`{min(both)}` is given twice, in the query and in the body")
    return describe({**parameters, **found.fields}, found.image, deadline_s, kind)


def describe(fields: Mapping[str, Any], payload: bytes, deadline_s: float, kind: type[Q]) -> Request[Q]:
    """The request that an image and what is said of it make. Raises `Failure`."""
    try:
        query = msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`$.", "`").replace("Object contains", "the request has")
        raise Failure(Code.BAD_REQUEST, f"{reason}{remedy(str(error), kind)}") from None
    shape = msgspec.convert(query.shape.split(","), tuple[int, int, int], strict=False) if query.shape else None
    if complaint := _complaint(query, payload):
        raise Failure(Code.BAD_REQUEST, complaint)
    if query.kind != "path" and not payload:
        reason = "the image is empty: it is the body, `image` of a form, or in base64 `image` of a JSON object"
        raise Failure(Code.BAD_IMAGE, reason)
    image = Image(kind=query.kind, shape=shape, dtype=query.dtype, order=query.order, path=query.path)
    return Request(image=image, payload=payload, query=query, deadline_s=query.deadline_s or deadline_s)


def _complaint(query: Query, image: bytes) -> str:
    if query.kind == "raw" and query.shape is None:
        return "kind=raw needs shape=HEIGHT,WIDTH,3"
    if query.kind == "path" and not query.path:
        return "kind=path needs path=FILE"
    if query.kind == "path" and image:
        return "kind=path takes no body"
    return ""
