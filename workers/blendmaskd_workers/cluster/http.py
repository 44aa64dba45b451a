"""HTTP in front of workers: what a request asks for, and how an answer or a failure is written. Pure, knows no Ray.

``POST /segment?score_threshold=0.3`` with the image's bytes as the body. The query has the wire's fields: those of
`protocol.Options`, of `protocol.Image` (``kind``, ``shape=480,640,3``, ``dtype``, ``order``, ``path``), and
``deadline_s``. An answer is JSON: ``width``, ``height``, ``node``, ``device``, ``timings`` and ``detections``, the COCO
results; a failure is ``code``, ``reason``, and ``retry_after_s`` where trying again can help, under the status of
`STATUS`.
"""
from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Literal

import msgspec

from blendmaskd.protocol import Code, Failed, Image, Options
from blendmaskd_workers.cluster.channel import Answer

STATUS = {
    Code.BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    Code.BAD_IMAGE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Code.TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Code.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
    Code.CANCELLED: HTTPStatus.CONFLICT,  # that nobody reads: the client is gone
    Code.WORKER_LOST: HTTPStatus.BAD_GATEWAY,
    Code.ENGINE_FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    Code.UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.DRAINING: HTTPStatus.SERVICE_UNAVAILABLE,
    Code.UNAUTHORISED: HTTPStatus.UNAUTHORIZED,
}
RETRY_AFTER_S = 1.0


class RequestError(ValueError):
    """A request that cannot be read; the text says why."""


class Query(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The query's parameters, as text gives them."""

    kind: Literal["encoded", "raw", "path"] = "encoded"
    shape: str | None = None
    dtype: str = "uint8"
    order: Literal["bgr", "rgb"] = "bgr"
    path: str | None = None
    score_threshold: float = 0.0
    max_detections: int | None = None
    mask_format: str = "rle"
    deadline_s: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a client wants."""

    image: Image
    options: Options
    deadline_s: float  # from arrival


def read(parameters: Mapping[str, str], body_bytes: int, deadline_s: float) -> Request:
    """The request that a query and a body of so many bytes make. Raises `RequestError`."""
    try:
        query = msgspec.convert(dict(parameters), Query, strict=False)
        options = msgspec.convert({name: getattr(query, name) for name in Options.__struct_fields__}, Options)
    except msgspec.ValidationError as error:
        raise RequestError(str(error).replace("`$.", "`").replace("Object contains", "the query has")) from None
    shape = _shape(query.shape)
    if query.kind == "raw" and shape is None:
        raise RequestError("kind=raw needs shape=HEIGHT,WIDTH,3")
    if query.kind == "path" and not query.path:
        raise RequestError("kind=path needs path=FILE")
    if query.kind == "path" and body_bytes:
        raise RequestError("kind=path takes no body")
    if query.deadline_s is not None and not 0 < query.deadline_s <= 86400:
        raise RequestError(f"deadline_s={query.deadline_s:g}: expected more than 0 and at most 86400")
    image = Image(kind=query.kind, shape=shape, dtype=query.dtype, order=query.order, path=query.path)
    return Request(image=image, options=options, deadline_s=query.deadline_s or deadline_s)


def write(outcome: Answer | Failed, timings: Mapping[str, float]) -> tuple[HTTPStatus, dict[str, str], bytes]:
    """Status, headers and body; `timings` are an answer's."""
    headers = {"content-type": "application/json"}
    if isinstance(outcome, Answer):
        fields = {name: getattr(outcome, name) for name in ("width", "height", "node", "device")}
        fields |= {"timings": dict(timings), "detections": msgspec.msgpack.decode(outcome.detections)}
        return HTTPStatus.OK, headers, msgspec.json.encode(fields)
    failure: dict[str, object] = {"code": outcome.code, "reason": outcome.reason}
    if outcome.code.retryable:
        failure["retry_after_s"] = retry_after_s = outcome.retry_after_s or RETRY_AFTER_S
        headers["retry-after"] = str(max(1, round(retry_after_s)))
    return STATUS[outcome.code], headers, msgspec.json.encode(failure)


def _shape(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        height, width, channels = map(int, text.split(","))
    except ValueError:
        raise RequestError(f"shape={text}: expected HEIGHT,WIDTH,3") from None
    return height, width, channels
