"""The Serve application on a real cluster of two nodes."""
from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from blendmaskd_workers.engines import timed

pytest.importorskip("ray", reason="needs the extra ray: pip install -e '.[ray]'")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings: Ray's and its libraries' own


def test_an_image_goes_in_over_http_and_coco_results_come_out(shared_app, photograph) -> None:
    found = shared_app.segment(photograph, "mask_format=none")
    assert found.status == 200, found
    assert (found.tree["width"], found.tree["height"], found.tree["device"]) == (451, 300, "npu:0")
    assert found.tree["node"] in ("a", "b")
    [detection] = found.tree["detections"]
    assert detection["bbox"] == [0.0, 0.0, 451.0, 300.0]
    assert "segmentation" not in detection
    assert set(found.tree["timings"]) == {"queue", "decode", "wait", "device", "finish", "total"}

    pixels = np.zeros((4, 6, 3), np.uint8)
    raw = shared_app.segment(pixels.tobytes(), "kind=raw&shape=4,6,3&order=rgb")
    assert raw.tree["detections"][0]["checksum"] == timed.checksum(pixels)


@pytest.mark.parametrize(
    ("query", "body", "status", "code", "words"),
    [
        ("", b"no image", 422, "bad-image", "not a JPEG"),
        ("", b"", 422, "bad-image", "empty"),
        ("", bytes(1_100_000), 413, "too-large", "limits.max_image_bytes"),
        ("score=1", b"x", 400, "bad-request", "`score`"),
        ("score_threshold=2", b"x", 400, "bad-request", "score_threshold"),
        ("mask_format=png", b"x", 400, "bad-request", "mask_format"),
        ("kind=raw", b"x", 400, "bad-request", "shape"),
        ("kind=path&path=/etc/passwd", None, 400, "bad-request", ""),
        ("deadline_s=0.01", "photograph", 504, "timeout", "deadline"),
    ],
)  # fmt: skip
def test_what_cannot_be_segmented_has_a_code_and_a_status(
    shared_app, photograph, query, body, status, code, words
) -> None:
    body = photograph if body == "photograph" else body
    reply = shared_app.segment(body if body is not None else b"", query)
    assert (reply.status, reply.tree["code"]) == (status, code), reply
    assert words in reply.tree["detail"]
    assert ("retry_after_s" in reply.tree) == (code == "timeout")


def test_combined_fps_is_the_sum_of_the_devices_of_all_nodes(shared_app, photograph, wait_until) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: shared_app.answered(photograph), range(40)))

    def counted() -> dict:
        snapshot = shared_app.stats()
        return snapshot if sum(device["images"] for device in snapshot["devices"]) >= 40 else {}

    snapshot = wait_until(counted, 20)
    devices = snapshot["devices"]
    assert [(device["node"], device["device"]) for device in devices] == [("a", "npu:0"), ("b", "npu:0")]
    assert all(device["images"] for device in devices)
    assert snapshot["combined_fps"] == pytest.approx(sum(device["fps"] for device in devices))
    assert snapshot["combined_fps"] > 0
    assert snapshot["answered"] >= 40


def test_metrics_have_the_daemons_names_and_a_node(shared_app, photograph) -> None:
    shared_app.answered(photograph)
    shared_app.segment(b"no image")
    text = shared_app.request("/metrics").body.decode()
    for name in ("blendmaskd_combined_fps ", "blendmaskd_queue_jobs "):
        assert f"\n{name}" in text
    for node in "ab":
        for name in ("device_fps", "images_total", "device_busy_seconds_total", "worker_up"):
            assert f'blendmaskd_{name}{{device="npu:0",node="{node}"}}' in text
        assert f'blendmaskd_jobs_total{{node="{node}",outcome="bad-image"}}' in text
        assert f'blendmaskd_stage_seconds_count{{node="{node}",stage="device"}}' in text


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (Debian: prometheus)")
def test_promtool_finds_nothing_in_the_metrics(shared_app, photograph) -> None:
    shared_app.answered(photograph)
    shared_app.segment(b"no image")
    text = shared_app.request("/metrics").body.decode()
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, ""), checked


def test_health_says_who_serves(shared_app) -> None:
    for page in ("/healthz", "/readyz"):
        reply = shared_app.request(page)
        assert reply.status == 200, reply
        assert reply.body.startswith(b"ok\n")
        assert b"a/npu:0" in reply.body
        assert b"b/npu:0" in reply.body
