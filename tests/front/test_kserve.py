"""The Open Inference Protocol, as Triton's own clients speak it."""
from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running_front import Front

from blendmaskd.http import kserve
from blendmaskd.http.rest import Failure

NAMES = [tensor.name for tensor in kserve.OUTPUTS]


@pytest.fixture
def triton(shared_front: Front) -> Any:
    http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    with http.InferenceServerClient(f"127.0.0.1:{shared_front.port}") as client:
        yield http, client


def check(result: Any) -> None:
    assert result.as_numpy("boxes").tolist() == [[0, 0, 383, 259]]
    assert result.as_numpy("scores").tolist() == [1]
    assert result.as_numpy("category_ids").tolist() == [1]
    assert result.as_numpy("image_size").tolist() == [259, 383]


def texts(result: Any, name: str) -> list[bytes]:
    return [each if isinstance(each, bytes) else each.encode() for each in result.as_numpy(name).tolist()]


def test_a_client_finds_what_there_is(triton: Any) -> None:
    _, client = triton
    assert (client.is_server_live(), client.is_server_ready(), client.is_model_ready("blendmask", "1")) == (True,) * 3
    assert client.get_server_metadata()["name"] == "blendmaskd"
    assert [each["name"] for each in client.get_model_repository_index()] == ["blendmask", "blendmask-pixels"]
    for model, datatype, dims in (("blendmask", "BYTES", [1]), ("blendmask-pixels", "UINT8", [-1, -1, 3])):
        found = client.get_model_metadata(model)
        assert found["inputs"] == [{"name": "image", "datatype": datatype, "shape": dims}]
        assert [each["name"] for each in found["outputs"]] == NAMES
        assert client.get_model_config(model)["input"][0]["dims"] == dims


@pytest.mark.parametrize("binary", [True, False])
def test_an_encoded_image(triton: Any, photo: bytes, binary: bool) -> None:
    http, client = triton
    given = http.InferInput("image", [1], "BYTES")
    image = photo if binary else base64.b64encode(photo)
    given.set_data_from_numpy(np.array([image], dtype=object), binary_data=binary)
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in NAMES]
    for asked in (None, outputs):
        result = client.infer("blendmask", [given], outputs=asked, request_id="one")
        check(result)
        assert result.get_response()["id"] == "one"
        assert texts(result, "category_names") == [b"image"]
        assert texts(result, "rle_counts")[0].isascii()
    options = {"score_threshold": 1, "mask_format": "none"}
    few = client.infer("blendmask", [given], outputs=outputs[:1], parameters=options)
    assert few.as_numpy("scores") is None
    assert few.as_numpy("boxes").shape == (1, 4)


@pytest.mark.parametrize("binary", [True, False])
def test_pixels(triton: Any, binary: bool) -> None:
    http, client = triton
    pixels = np.random.default_rng(1).integers(0, 256, (259, 383, 3), np.uint8)
    given = http.InferInput("image", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels, binary_data=binary)
    check(client.infer("blendmask-pixels", [given]))


def test_failures_are_the_clients_exceptions(triton: Any, photo: bytes) -> None:
    http, client = triton
    given = http.InferInput("image", [1], "BYTES")
    given.set_data_from_numpy(np.array([b"no image"], dtype=object))
    error = pytest.importorskip("tritonclient.utils").InferenceServerException
    with pytest.raises(error, match="bad-image"):
        client.infer("blendmask", [given])
    with pytest.raises(error, match="there are blendmask and blendmask-pixels"):
        client.get_model_metadata("resnet")
    before = client.get_inference_statistics("blendmask")["model_stats"][0]["inference_stats"]
    given.set_data_from_numpy(np.array([photo], dtype=object))
    client.infer("blendmask", [given])
    after = client.get_inference_statistics("blendmask", "1")["model_stats"][0]["inference_stats"]
    assert after["fail"]["count"] == before["fail"]["count"] >= 1
    assert after["success"]["count"] == before["success"]["count"] + 1
    assert after["compute_infer"]["ns"] > before["compute_infer"]["ns"]


def request(**changes: Any) -> bytes:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(b"pixels").decode()]}
    top = {key: changes.pop(key) for key in ("id", "outputs", "parameters") if key in changes}
    return json.dumps({"inputs": [{**tensor, **changes}], **top}).encode()


@pytest.mark.parametrize(
    ("body", "cut", "words"),
    [
        (b"{", None, "truncated|malformed"),
        (b"{}", None, "inputs"),
        (b'{"inputs": []}', None, "inputs"),
        (request(), 10_000, "Inference-Header-Content-Length"),
        (request(name="picture"), None, "the input is image of type BYTES"),
        (request(datatype="FP32"), None, "the input is image of type BYTES"),
        (request(shape=[2]), None, "the shape of image"),
        (request(shape=[-1]), None, ">= 0"),
        (request(data=["%"]), None, "one image in base64"),
        (request(data=["eA==", "eA=="]), None, "one image in base64"),
        (request(data=[1]), None, "one image in base64"),
        (request(data=None), None, "has its data in JSON, or"),
        (request(data=None, parameters={"x": 1}), None, "has its data in JSON, or"),
        (request(outputs=[{"name": "logits"}]), None, "no output 'logits'"),
        (request(parameters={"mask_format": "polygon"}), None, "polygon"),
        (request(parameters={"score_threshold": 2}), None, "score_threshold"),
        (request(parameters={"what": 2}), None, "what"),
    ],
)
def test_a_request_that_cannot_be_read_says_why(body: bytes, cut: int | None, words: str) -> None:
    with pytest.raises(Failure, match=words):
        kserve.read("blendmask", body, cut, 60.0)


def test_null_is_left_out_as_some_clients_write_it() -> None:
    tree = json.loads(request(id=None, outputs=None, parameters=None))
    tree["inputs"][0]["parameters"] = None
    asked, found = kserve.read("blendmask", json.dumps(tree).encode(), None, 60.0)
    assert found.payload == b"pixels"
    _, body = kserve.write("blendmask", asked, 6, 4, [])
    assert "id" not in json.loads(body)


@pytest.mark.parametrize("name", ["classification", "shared_memory_region"])
def test_what_tritons_outputs_can_be_besides_is_refused(name: str) -> None:
    body = request(outputs=[{"name": "scores", "parameters": {name: 1}}])
    with pytest.raises(Failure, match=f"scores: there is no {name}"):
        kserve.read("blendmask", body, None, 60.0)


@pytest.mark.parametrize("rest", [b"", b"\0", b"\7\0\0\0pixels", b"\5\0\0\0pixels", b"\xff\xff\xff\xffpixels"])
def test_binary_elements_are_as_long_as_they_say(rest: bytes) -> None:
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(rest)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    with pytest.raises(Failure, match="its length in four bytes"):
        kserve.read("blendmask", head + rest, len(head), 60.0)
    right = b"\6\0\0\0pixels"
    tensor["parameters"] = {"binary_data_size": len(right)}
    head = json.dumps({"inputs": [tensor]}).encode()
    _, found = kserve.read("blendmask", head + right, len(head), 60.0)
    assert found.payload == b"pixels"
    with pytest.raises(Failure, match="bytes follow the JSON"):
        kserve.read("blendmask", head + right + b"x", len(head), 60.0)


def test_no_detection_is_a_tensor_of_none() -> None:
    asked = kserve.Inference([kserve.Input("image", "BYTES", [1])])
    _, body = kserve.write("blendmask", asked, 6, 4, [])
    shapes = {each["name"]: each["shape"] for each in json.loads(body)["outputs"]}
    assert shapes == {**{name: [0] for name in NAMES}, "boxes": [0, 4], "image_size": [2]}


@pytest.mark.slow
def test_perf_analyzer_runs(shared_front: Front, photo: bytes, tmp_path: Path) -> None:
    """The one of tritonclient's wheel 2.51.0; PERF_ANALYZER names it where it is not on PATH."""
    program = shutil.which(os.environ.get("PERF_ANALYZER", "perf_analyzer"))
    environment = {**os.environ, "LD_LIBRARY_PATH": os.environ.get("PERF_ANALYZER_LIBRARIES", "")}
    run = {"env": environment, "capture_output": True, "text": True, "check": False}
    if not program or subprocess.run([program, "--version"], **run).returncode:
        pytest.skip("needs perf_analyzer of tritonclient 2.51.0, libb64 and libcudart.so.12 (.ci/run installs them)")
    element = base64.b64encode(len(photo).to_bytes(4, "little") + photo).decode()
    (tmp_path / "data.json").write_text(json.dumps({"data": [{"image": {"b64": element}}]}))
    command = [program, "-m", "blendmask", "-u", f"127.0.0.1:{shared_front.port}", "-i", "http", "--input-data",
               str(tmp_path / "data.json"), "--concurrency-range", "4", "--measurement-mode", "count_windows",
               "--measurement-request-count", "50", "--max-trials", "3", "-s", "99", "-f", str(tmp_path / "out.csv")]
    done = subprocess.run(command, timeout=110, **run)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = csv.DictReader((tmp_path / "out.csv").read_text().splitlines())
    assert float(row["Inferences/Second"]) > 1
