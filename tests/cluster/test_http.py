"""What an HTTP request asks for, and how it is answered."""
from __future__ import annotations

import json

import msgpack
import pytest

from blendmaskd.protocol import Code, Failed, Image, Options
from blendmaskd_workers.cluster import http
from blendmaskd_workers.cluster.channel import Answer


def test_a_query_has_the_wires_fields() -> None:
    assert http.read({}, 10, 60.0) == http.Request(image=Image(kind="encoded"), options=Options(), deadline_s=60.0)
    found = http.read(
        {"score_threshold": "0.5", "max_detections": "3", "mask_format": "polygon", "deadline_s": "2.5"}, 10, 60.0
    )
    assert found.options == Options(score_threshold=0.5, max_detections=3, mask_format="polygon")
    assert found.deadline_s == 2.5
    raw = http.read({"kind": "raw", "shape": "4,6,3", "order": "rgb"}, 72, 60.0).image
    assert raw == Image(kind="raw", shape=(4, 6, 3), order="rgb")


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"scor": "1"}, "`scor`"),
        ({"score_threshold": "much"}, "score_threshold"),
        ({"score_threshold": "1.5"}, "<= 1"),
        ({"max_detections": "-1"}, ">= 0"),
        ({"mask_format": "png"}, "png"),
        ({"kind": "video"}, "video"),
        ({"kind": "raw"}, "kind=raw needs shape"),
        ({"kind": "raw", "shape": "4x6"}, "HEIGHT,WIDTH,3"),
        ({"kind": "path"}, "kind=path needs path"),
        ({"kind": "path", "path": "/a"}, "takes no body"),
        ({"deadline_s": "0"}, "deadline_s=0"),
        ({"deadline_s": "nan"}, "deadline_s=nan"),
    ],
)
def test_a_query_that_cannot_be_followed_says_why(query, words) -> None:
    with pytest.raises(http.RequestError, match=words):
        http.read(query, 10, 60.0)


def test_an_answer_is_json_with_all_digits() -> None:
    detections = [{"score": 0.1 + 0.2, "bbox": [1 / 3, 0.0, 2.0, 3.0], "category_name": "star"}]
    answer = Answer(width=6, height=4, node="a", device="npu:0", timings={"device": 0.02},
                    detections=msgpack.packb(detections))  # fmt: skip
    status, headers, body = http.write(answer, {"device": 0.02, "total": 0.03})
    assert (status, headers) == (200, {"content-type": "application/json"})
    assert json.loads(body) == {
        "width": 6, "height": 4, "node": "a", "device": "npu:0", "timings": {"device": 0.02, "total": 0.03},
        "detections": detections,
    }  # fmt: skip


@pytest.mark.parametrize("code", list(Code))
def test_each_code_has_a_status_and_says_whether_to_try_again(code) -> None:
    status, headers, body = http.write(Failed(job="", code=code, reason="so it is"), {})
    tree = json.loads(body)
    assert 400 <= status < 600
    assert (tree["code"], tree["reason"]) == (code, "so it is")
    assert ("retry_after_s" in tree) == ("retry-after" in headers) == code.retryable
