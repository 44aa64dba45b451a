"""What an HTTP request asks for, and how it is answered."""
from __future__ import annotations

import base64
import json

import pytest

from blendmaskd.http import bodies, rest
from blendmaskd.http.rest import Failure
from blendmaskd.protocol import Code, Image, Options

BOUNDARY = "----x"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


def read(query: dict[str, str], body: bytes = b"pixels", kind: str = "image/jpeg") -> rest.Request[rest.Query]:
    return rest.read(query, kind, body, 60.0, rest.Query)


def form(*fields: tuple[str, bytes]) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value + b"\r\n"
        for name, value in fields
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def test_a_query_has_the_wires_fields() -> None:
    found = read({})
    assert (found.image, found.payload, found.query.options, found.deadline_s) == (
        Image(kind="encoded"), b"pixels", Options(), 60.0
    )  # fmt: skip
    found = read({"score_threshold": "0.5", "max_detections": "3", "mask_format": "polygon", "deadline_s": "2.5"})
    assert found.query.options == Options(score_threshold=0.5, max_detections=3, mask_format="polygon")
    assert found.deadline_s == 2.5
    raw = read({"kind": "raw", "shape": "4,6,3", "order": "rgb"}).image
    assert raw == Image(kind="raw", shape=(4, 6, 3), order="rgb")


@pytest.mark.parametrize("image", [b"pixels", b"\r\n--\r\n----x\r\n\r\n", b"\xff\xd8\r\n\r\n--", b"\r\n"])
def test_an_image_comes_in_three_ways(image: bytes) -> None:
    ways = [
        (image, "image/jpeg", {"mask_format": "none"}),
        (image, "application/x-www-form-urlencoded", {"mask_format": "none"}),  # what curl --data-binary says
        (form(("image", image), ("mask_format", b"none")), FORM, {}),
        (json.dumps({"image": base64.b64encode(image).decode(), "mask_format": "none"}).encode(),
         "application/json; charset=utf-8", {}),
    ]  # fmt: skip
    for body, kind, query in ways:
        found = read(query, body, kind)
        assert (found.payload, found.query.options) == (image, Options(mask_format="none")), kind


@pytest.mark.parametrize(
    "disposition",
    [
        "form-data; name=image; filename=a.jpg; filename*=utf-8''a.jpg",  # .NET
        'form-data; filename="a.jpg"; name="image"',
        'FORM-DATA;NAME="image"',
        r'form-data; name="image"; filename="x; name=\"y\".jpg"',
        'form-data; name="image"; filename="; name=y"',
        'form-data; name="image"; filename="\u00e4 \u4e2d.jpg"',
    ],
)
def test_a_field_is_named_as_clients_write_it(disposition: str) -> None:
    head = f"--x\r\nContent-Type: image/jpeg\r\nContent-Disposition: {disposition}\r\n\r\n"
    assert read({}, head.encode() + b"pixels\r\n--x--", "multipart/form-data; boundary=x").payload == b"pixels"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"scor": "1"}, "`scor`"),
        ({"score_threshold": "much"}, "score_threshold"),
        ({"score_threshold": "1.5"}, "<= 1"),
        ({"score_threshold": "nan"}, ">= 0"),
        ({"max_detections": "-1"}, ">= 0"),
        ({"mask_format": "png"}, "png"),
        ({"kind": "video"}, "video"),
        ({"kind": "raw"}, "kind=raw needs shape"),
        ({"kind": "raw", "shape": "4x6"}, "shape"),
        ({"kind": "raw", "shape": "4,6,4"}, "shape"),
        ({"kind": "raw", "shape": "4,6,3\n"}, "shape"),
        ({"kind": "raw", "shape": f"{2**70},1,3"}, "shape"),
        ({"kind": "path"}, "kind=path needs path"),
        ({"kind": "path", "path": "/a"}, "takes no body"),
        ({"deadline_s": "0"}, "deadline_s"),
        ({"deadline_s": "nan"}, "deadline_s"),
    ],
)
def test_a_query_that_cannot_be_followed_says_why(query: dict[str, str], words: str) -> None:
    with pytest.raises(Failure, match=words) as failure:
        read(query)
    assert failure.value.status == 400


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("image/jpeg", b"", "the image is empty"),
        ("application/json", b"{", "no JSON"),
        ("application/json", b"[" * 100_000, "no JSON"),
        ("application/json", b"\xff", "no JSON"),
        ("application/json", b"[]", "expected an object"),
        ("application/json", b'{"image": 1}', "base64"),
        ("application/json", b'{"image": "%%%%"}', "base64"),
        ("application/json", b'{"image": "eA==", "score_threshold": [1]}', "score_threshold"),
        ("application/json", b'{"score_threshold": 1}', "the image is empty"),
        ("multipart/form-data", b"x", "boundary"),
        ("multipart/form-data; boundary*=utf-8''x", b"x", "boundary"),
        (FORM, b"x", "does not end"),
        (FORM, form(("image", b"x"))[:-6], "does not end"),
        (FORM, form(("image", b"x"), ("image", b"y")), "two fields `image`"),
        (FORM, form(("image", b"x"), *((f"f{number}", b"") for number in range(40))), "more than 32"),
        (FORM, form(("image", b"x"), ("what", b"1")), "`what`"),
        (FORM, b"------x\r\nX: y\r\n\r\nz\r\n------x--", "no name"),
        (FORM, form(("mask_format", b"none")), "the image is empty"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(kind: str, body: bytes, words: str) -> None:
    with pytest.raises(Failure, match=words):
        read({}, body, kind)


def test_nothing_is_said_twice() -> None:
    with pytest.raises(Failure, match="`mask_format` is given twice"):
        read({"mask_format": "rle"}, form(("image", b"x"), ("mask_format", b"none")), FORM)


def test_a_body_may_be_as_large_as_its_image_makes_it() -> None:
    image = b"x" * 1000
    tree = json.dumps({"image": base64.b64encode(image).decode()}).encode()
    for kind, body in (("image/png", image), (FORM, form(("image", image))), ("application/json", tree)):
        assert len(body) <= bodies.largest(kind, len(image)) <= len(body) + bodies.ALLOWANCE


@pytest.mark.parametrize("code", list(Code))
def test_each_code_has_a_status_and_says_whether_to_try_again(code: Code) -> None:
    failure = Failure(code, "so it is", 2.4)
    tree = json.loads(failure.body)
    assert 400 <= failure.status < 600
    assert failure.headers["content-type"] == "application/problem+json"
    assert (tree["code"], tree["detail"], tree["status"], tree["type"]) == (
        code, "so it is", failure.status, f"urn:blendmaskd:{code}"
    )  # fmt: skip
    assert ("retry_after_s" in tree) == ("retry-after" in failure.headers) == code.retryable
    if code.retryable:
        assert (tree["retry_after_s"], failure.headers["retry-after"]) == (2.4, "2")


def test_a_job_has_no_newline_in_its_name() -> None:
    name = "0123456789abcdef" * 2
    assert rest.read({"job": name}, "", b"x", 60.0, rest.JobQuery).query.job == name
    with pytest.raises(Failure, match="job"):
        rest.read({"job": name + "\n"}, "", b"x", 60.0, rest.JobQuery)


@pytest.mark.parametrize(
    ("query", "remedy"),
    [
        ({"score_treshold": "0.5"}, "unknown field `score_treshold`; did you mean score_threshold?"),
        ({"zoom": "2"}, "unknown field `zoom`"),
        ({"mask_format": "png"}, "at `mask_format`; expected rle, polygon, none"),
        ({"order": "bgra"}, "at `order`; expected bgr, rgb"),
    ],
)
def test_a_word_that_is_unknown_is_refused_with_those_that_are_not(query: dict[str, str], remedy: str) -> None:
    with pytest.raises(Failure) as refused:
        read(query)
    assert refused.value.problem.code is Code.BAD_REQUEST
    assert refused.value.problem.detail.endswith(remedy)
