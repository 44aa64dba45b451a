"""The OpenAPI document, made of the types that requests are read by and answers written from, and a page of it."""
from __future__ import annotations

from html import escape
from typing import Any

import msgspec

from blendmaskd.coco.categories import Category
from blendmaskd.http import kserve, rest

REFERENCE = "#/components/schemas/{name}"
BINARY = {"type": "string", "format": "binary"}
JOB_PATH = [{"name": "job", "in": "path", "required": True, "schema": {"type": "string"},
             "description": "the job's name"}]  # fmt: skip
MODEL_PATH = [{"name": "model", "in": "path", "required": True,
               "schema": {"type": "string", "enum": list(kserve.INPUTS)}}]  # fmt: skip
ASKED = (400, 401, 403, 404, 405, 421)
OF_AN_IMAGE = (*ASKED, 408, 409, 413, 415, 422, 431, 500, 502, 503, 504)
OF_THE_DAEMON = (*ASKED, 409, 500, 502, 503, 504)
TYPES = (rest.SegmentQuery, rest.JobQuery, rest.WaitQuery, rest.Rle, rest.Detection, rest.Segmentation, rest.Problem,
         rest.Job, Category, kserve.Model, kserve.Inference)  # fmt: skip


def _document() -> dict[str, Any]:
    _, schemas = msgspec.json.schema_components(TYPES, ref_template=REFERENCE)
    schemas["Segmentation"]["properties"]["detections"]["items"] = _to("Detection")
    image, job, wait = (schemas.pop(name)["properties"] for name in ("SegmentQuery", "JobQuery", "WaitQuery"))
    inference = {"required": True, "content": {"application/json": {"schema": _to("Inference")}}}
    gone, unready = {"204": {"description": "it is deleted"}}, {**_object(), **_object(503)}
    table = (
        ("post /v1/segment", "segment", "Segment an image", _answer("Segmentation"), OF_AN_IMAGE, _query(image),
         _image(image)),
        ("post /v1/jobs", "submit", "Accept a durable job", _answer("Job", 202), OF_AN_IMAGE, _query(job), _image(job)),
        ("get /v1/jobs/{job}", "fetch", "What became of a durable job", _answer("Job"), OF_THE_DAEMON,
         [*JOB_PATH, *_query(wait)]),
        ("delete /v1/jobs/{job}", "forget", "Delete a durable job and its answer", gone, OF_THE_DAEMON, JOB_PATH),
        ("get /v1/categories", "categories", "The categories of the network",
         _answer("Category", schema={"type": "array", "items": _to("Category")}), (*ASKED, 503)),
        ("get /v1/stats", "stats", "What the daemon does", _object(), OF_THE_DAEMON),
        ("get /healthz", "healthz", "Whether the front is up", _text(), ASKED),
        ("get /readyz", "readyz", "Whether an image can be segmented now", {**_text(), **_text(503)}, ASKED),
        ("get /metrics", "metrics", "The front's metrics for Prometheus", _text(), ASKED),
        ("get /v2", "product", "KServe: server metadata", _object(), ASKED),
        ("get /v2/health/live", "live", "KServe: whether the front is up", _object(), ASKED),
        ("get /v2/health/ready", "ready", "KServe: as /readyz", unready, ASKED),
        ("get /v2/models/{model}", "model", "KServe: a model's metadata", _answer("Model"), ASKED, MODEL_PATH),
        ("get /v2/models/{model}/ready", "model_ready", "KServe: as /readyz", unready, ASKED, MODEL_PATH),
        ("get /v2/models/{model}/config", "config", "Triton: a model's configuration", _object(), ASKED, MODEL_PATH),
        ("get /v2/models/{model}/stats", "statistics", "Triton: a model's statistics", _object(), ASKED, MODEL_PATH),
        ("post /v2/models/{model}/infer", "infer", "KServe: segment an image, given and answered as tensors", _object(),
         OF_AN_IMAGE, MODEL_PATH, inference),
    )  # fmt: skip
    paths: dict[str, dict[str, Any]] = {}
    for route, *row in table:
        method, path = route.split()
        paths.setdefault(path, {})[method] = _operation(*row)
    text = "BlendMask instance segmentation. Failures are RFC 9457 problems with a stable code."
    return {
        "openapi": "3.1.0",
        "info": {"title": "blendmaskd", "version": "1", "description": text},
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _to(name: str) -> dict[str, Any]:
    return {"$ref": REFERENCE.format(name=name)}


def _operation(
    name: Any, summary: Any, answers: Any, problems: Any, parameters: Any = (), body: Any = None
) -> dict[str, Any]:
    problem = {"description": "a failure", "content": {
        kind: {"schema": _to("Problem")} for kind in (rest.PROBLEM_TYPE, "application/json")}}  # fmt: skip
    responses = {str(status): problem for status in problems} | answers
    made = {"operationId": name, "summary": summary, "parameters": list(parameters), "responses": responses}
    return made if body is None else {**made, "requestBody": body}


def _answer(name: str, status: int = 200, schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema or _to(name)}}
    return {str(status): {"description": name, "content": content}}


def _object(status: int = 200) -> dict[str, Any]:
    return _answer("an object", status, {"type": "object"})


def _text(status: int = 200) -> dict[str, Any]:
    return {str(status): {"description": "text", "content": {"text/plain": {"schema": {"type": "string"}}}}}


def _given(schema: dict[str, Any]) -> dict[str, Any]:
    """Without null, which is the same as leaving it out, and cannot be said in a query."""
    if "enum" in schema:
        return {"type": "string", **schema}
    branches = [branch for branch in schema.get("anyOf", []) if branch != {"type": "null"}]
    if not branches:
        return schema
    return {**branches[0], **{key: value for key, value in schema.items() if key not in ("anyOf", "default")}}


def _query(properties: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": name, "in": "query", "schema": _given(schema)} for name, schema in properties.items()]


def _image(properties: dict[str, Any]) -> dict[str, Any]:
    """An image in each of the ways that `bodies` reads."""
    fields = {name: _given(schema) for name, schema in properties.items()}
    base64 = {"type": "string", "contentEncoding": "base64"}

    def of(image: dict[str, Any]) -> dict[str, Any]:
        return {"schema": {"type": "object", "properties": {"image": image, **fields}, "required": ["image"],
                           "additionalProperties": False}}  # fmt: skip

    return {"required": True, "content": {
        "application/octet-stream": {"schema": BINARY}, "image/jpeg": {"schema": BINARY},
        "multipart/form-data": of(BINARY), "application/json": of(base64)}}  # fmt: skip


# -- the page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
section { border-top: 1px solid #8884; } h2 { font: 600 1.1rem ui-monospace, monospace; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .1rem 1rem .1rem 0; vertical-align: top; }
code, pre { font-family: ui-monospace, monospace; font-size: .9rem; } pre { overflow-x: auto; }
"""
HEAD = f"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>blendmaskd over HTTP</title><style>{STYLE}</style><h1>blendmaskd over HTTP</h1>
<p><a href=/>Try an image</a> · <a href=/openapi.json>openapi.json</a></p>"""


def _page(document: dict[str, Any]) -> str:
    sections = [
        _section(f"{method.upper()} {path}", operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    types = [
        f"<h3 id='{name}'>{name}</h3><pre>{escape(msgspec.json.format(msgspec.json.encode(schema)).decode())}</pre>"
        for name, schema in document["components"]["schemas"].items()
    ]
    return HEAD + f"<p>{document['info']['description']}</p>{''.join(sections)}<section>{''.join(types)}</section>"


def _section(title: str, operation: dict[str, Any]) -> str:
    rows = [f"<tr><td><code>{each['name']}</code><td>{each['in']}<td><code>{escape(_kind(each['schema']))}</code>"
            for each in operation["parameters"]]  # fmt: skip
    table = f"<table><tr><th>parameter<th>in<th>type{''.join(rows)}</table>" if rows else ""
    bodies = ", ".join(operation.get("requestBody", {}).get("content", {}))
    body = f"<p>Body: <code>{bodies}</code></p>" if bodies else ""
    statuses = ", ".join(sorted(operation["responses"]))
    return (f"<section><h2>{escape(title)}</h2><p>{escape(operation['summary'])}</p>{table}{body}"
            f"<p>Answers: {statuses}</p></section>")  # fmt: skip


def _kind(schema: dict[str, Any]) -> str:
    return " ".join(f"{key}: {value}" for key, value in schema.items() if key != "title")


DOCUMENT = _document()
TEXT = msgspec.json.encode(DOCUMENT)
PAGE = _page(DOCUMENT).encode()
