"""KServe's Open Inference Protocol (v2), and what Triton's clients ask for beside it. Pure.

Two models: ``blendmask`` takes an encoded image (BYTES, one element), ``blendmask-pixels`` an array (UINT8, height,
width, 3). Parameters of a request are those of a query of the REST interface, without polygons. In JSON, BYTES are
base64; as binary tensors they are lengths and bytes, as Triton's extension says.
"""
from __future__ import annotations

import base64
import binascii
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blendmaskd.http.rest import Failure, Request, SegmentQuery, describe
from blendmaskd.protocol import Code

PRODUCT = {"name": "blendmaskd", "version": "2", "extensions": [
    "binary_tensor_data", "model_configuration", "model_repository", "statistics"]}  # fmt: skip
ENCODED, PIXELS = "blendmask", "blendmask-pixels"
VERSION = "1"
HEADER_LENGTH = "inference-header-content-length"
ITEMS = {"BYTES": "", "UINT8": "B", "FP32": "f", "INT64": "q"}  # struct's letters
TRITON = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32", "INT64": "TYPE_INT64"}


class Tensor(msgspec.Struct, frozen=True):
    """What a model takes or gives; -1: as many as there are."""

    name: str
    datatype: Literal["BYTES", "UINT8", "FP32", "INT64"]
    shape: list[int]


INPUTS = {ENCODED: Tensor("image", "BYTES", [1]), PIXELS: Tensor("image", "UINT8", [-1, -1, 3])}
INDEX = [{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in INPUTS]
OUTPUTS = (
    Tensor("boxes", "FP32", [-1, 4]),  # x, y, width, height in pixels
    Tensor("scores", "FP32", [-1]),
    Tensor("category_ids", "INT64", [-1]),
    Tensor("category_names", "BYTES", [-1]),
    Tensor("rle_counts", "BYTES", [-1]),  # of COCO's compressed masks, which are of the image's size
    Tensor("image_size", "INT64", [2]),  # height, width
)


class Model(msgspec.Struct, frozen=True):
    """A model's metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


class Input(msgspec.Struct, frozen=True):
    """A tensor of a request; its data are here, or follow the JSON."""

    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=8)]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class Wanted(msgspec.Struct, frozen=True):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class Inference(msgspec.Struct, frozen=True):
    """The JSON of a request; some clients write null for what they leave out."""

    inputs: Annotated[list[Input], Meta(min_length=1, max_length=1)]
    id: Annotated[str, Meta(max_length=256)] | None = None
    outputs: list[Wanted] | None = None
    parameters: dict[str, Any] | None = None


@dataclass
class Statistics:
    """Of a model since the start, as Triton counts."""

    count: Counter[str] = field(default_factory=Counter)  # by outcome
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # by outcome and by stage

    def add(self, outcome: Literal["success", "fail"], seconds: float, timings: Mapping[str, float]) -> None:
        self.count[outcome] += 1
        for name, value in {outcome: seconds, **timings}.items():
            self.seconds[name] += value

    def as_tree(self, name: str) -> dict[str, Any]:
        done = self.count["success"]

        def of(*stages: str) -> dict[str, int]:
            return _duration(done, sum(self.seconds[stage] for stage in stages))

        ends = {outcome: _duration(self.count[outcome], self.seconds[outcome]) for outcome in ("success", "fail")}
        stages = {"queue": of("queue"), "compute_input": of("decode", "wait"), "compute_infer": of("device"),
                  "compute_output": of("finish", "send"), "cache_hit": _duration(0, 0), "cache_miss": _duration(0, 0)}
        return {"name": name, "version": VERSION, "last_inference": 0, "inference_count": done, "execution_count": done,
                "inference_stats": {**ends, **stages}, "batch_stats": []}  # fmt: skip


def _duration(count: int, seconds: float) -> dict[str, int]:
    return {"count": count, "ns": int(seconds * 1e9)}


def metadata(name: str) -> Model:
    return Model(name, [VERSION], "blendmaskd", [INPUTS[name]], list(OUTPUTS))


def config(name: str) -> dict[str, Any]:
    """As Triton's model configuration."""

    def tensor(found: Tensor) -> dict[str, Any]:
        return {"name": found.name, "data_type": TRITON[found.datatype], "dims": found.shape}

    return {"name": name, "platform": "blendmaskd", "backend": "blendmaskd", "max_batch_size": 0,
            "input": [tensor(INPUTS[name])], "output": [tensor(each) for each in OUTPUTS]}  # fmt: skip


def read(
    model: str, body: bytes, header_bytes: int | None, deadline_s: float
) -> tuple[Inference, Request[SegmentQuery]]:
    """What a request asks for. `header_bytes`: of its JSON; None: it is no more than that. Raises `Failure`."""
    cut = len(body) if header_bytes is None else header_bytes
    if not 0 <= cut <= len(body):
        raise Failure(Code.BAD_REQUEST, f"Inference-Header-Content-Length: {cut} of a body of {len(body)} bytes")
    try:
        asked = msgspec.json.decode(body[:cut], type=Inference)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Failure(Code.BAD_REQUEST, str(error)) from None
    _check_outputs(asked.outputs or [])
    payload = _data(asked.inputs[0], INPUTS[model], body[cut:])
    fields = {name: value for name, value in (asked.parameters or {}).items() if name not in OURS}
    if fields.get("mask_format") == "polygon":
        raise Failure(Code.BAD_REQUEST, "mask_format=polygon: outputs are tensors: rle or none")
    if model == PIXELS:
        fields |= {"kind": "raw", "shape": ",".join(map(str, asked.inputs[0].shape))}
    return asked, describe(fields, payload, deadline_s, SegmentQuery)


OURS = ("binary_data_output",)  # parameters about the form of the answer
NOT_OURS = ("classification", "shared_memory_region")  # Triton's, of an output, which would be another one without


def _check_outputs(wanted: Sequence[Wanted]) -> None:
    """Raises `Failure`."""
    if unknown := {each.name for each in wanted} - {each.name for each in OUTPUTS}:
        raise Failure(Code.BAD_REQUEST, f"there is no output {min(unknown)!r:.100}")
    for each in wanted:
        for name in NOT_OURS:
            if name in (each.parameters or {}):
                raise Failure(Code.BAD_REQUEST, f"{each.name}: there is no {name} here: outputs are in the answer")


def _data(given: Input, wanted: Tensor, rest: bytes) -> bytes:
    """The image of an input. Raises `Failure`."""
    if (given.name, given.datatype) != (wanted.name, wanted.datatype):
        raise Failure(Code.BAD_REQUEST, f"the input is {wanted.name} of type {wanted.datatype}")
    expected = wanted.shape
    if len(given.shape) != len(expected) or any(e not in (-1, g) for g, e in zip(given.shape, expected)):
        raise Failure(Code.BAD_REQUEST, f"the shape of {wanted.name} is {expected}")
    size = (given.parameters or {}).get("binary_data_size")
    if (size is None) == (given.data is None):
        raise Failure(Code.BAD_REQUEST, f"{wanted.name} has its data in JSON, or its binary_data_size")
    if size is not None and size != len(rest):
        raise Failure(Code.BAD_REQUEST, f"binary_data_size is {size!r:.20}, and {len(rest)} bytes follow the JSON")
    data = rest if given.data is None else _from_json(given.data, wanted)
    if wanted.datatype == "BYTES" and given.data is None:
        if len(data) < 4 or int.from_bytes(data[:4], "little") != len(data) - 4:
            raise Failure(Code.BAD_REQUEST, f"{wanted.name}: expected one element, its length in four bytes before it")
        return data[4:]
    if wanted.datatype == "UINT8" and len(data) != math.prod(given.shape):
        raise Failure(Code.BAD_REQUEST, f"{wanted.name}: {len(data)} values for a shape of {given.shape}")
    return data


def _from_json(data: Sequence[Any], wanted: Tensor) -> bytes:
    try:
        if wanted.datatype == "UINT8":
            return bytes(_flat(data))
        [text] = data
        return base64.b64decode(text, validate=True)
    except (ValueError, TypeError, binascii.Error) as error:
        expected = "integers from 0 to 255" if wanted.datatype == "UINT8" else "one image in base64"
        raise Failure(Code.BAD_REQUEST, f"{wanted.name}: expected {expected}: {error}") from None


def _flat(data: Sequence[Any], depth: int = 3) -> Iterator[Any]:
    for value in data:
        if isinstance(value, list) and depth > 1:
            yield from _flat(value, depth - 1)
        else:
            yield value


def write(
    model: str, asked: Inference, width: int, height: int, detections: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, str], bytes]:
    """Headers and body of an answer."""
    binary = (asked.parameters or {}).get("binary_data_output", False) is True
    wanted = asked.outputs or [Wanted(tensor.name) for tensor in OUTPUTS]
    values = _columns(width, height, detections)
    tensors, parts = [], []
    for each in wanted:
        tensor = next(known for known in OUTPUTS if known.name == each.name)
        column = values[tensor.name]
        shape = [len(column) // 4, 4] if tensor.name == "boxes" else [len(column)]
        described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": shape}
        if (each.parameters or {}).get("binary_data", binary) is True:
            parts.append(_packed(tensor.datatype, column))
            described["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            described["data"] = column
        tensors.append(described)
    named = {"id": asked.id} if asked.id else {}
    head = msgspec.json.encode({"model_name": model, "model_version": VERSION, "outputs": tensors, **named})
    if not parts:
        return {"content-type": "application/json"}, head
    return {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}, b"".join([head, *parts])


def _columns(width: int, height: int, detections: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {
        "boxes": [number for found in detections for number in found["bbox"]],
        "scores": [found["score"] for found in detections],
        "category_ids": [found["category_id"] for found in detections],
        "category_names": [found["category_name"] for found in detections],
        "rle_counts": [found.get("segmentation", {}).get("counts", "") for found in detections],
        "image_size": [height, width],
    }


def _packed(datatype: str, column: Sequence[Any]) -> bytes:
    if datatype == "BYTES":
        texts = [text.encode() for text in column]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return struct.pack(f"<{len(column)}{ITEMS[datatype]}", *column)
