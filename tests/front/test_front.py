"""`blendmaskd-http` in front of a running daemon: images, failures, what is known, who may ask."""
from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from running_front import Front, MakeFront, fronts, read_all, segment_request

from blendmaskd.http.certificate import load
from checkout import ROOT

TOKEN = "0123456789abcdef0123456789abcdef"


def test_an_image_is_segmented_however_it_is_sent(shared_front: Front, photo: bytes) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
    form = head + photo + b"\r\n--x--\r\n"
    tree = json.dumps({"image": base64.b64encode(photo).decode(), "mask_format": "rle"}).encode()
    for body, kind in ((photo, "image/jpeg"), (form, "multipart/form-data; boundary=x"), (tree, "application/json")):
        reply = shared_front.ask("POST", "/v1/segment", body, Content_Type=kind)
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json"), reply
        assert (reply.tree["width"], reply.tree["height"]) == (383, 259)
        [found] = reply.tree["detections"]
        assert (found["bbox"], found["segmentation"]["size"]) == ([0, 0, 383, 259], [259, 383])
        assert {"queue", "device", "total"} <= set(reply.tree["timings"])
    bare = shared_front.ask("POST", "/v1/segment?mask_format=none&max_detections=1", photo).tree
    assert "segmentation" not in bare["detections"][0]


def test_answers_leave_at_once(shared_front: Front) -> None:
    """Without TCP_NODELAY each would wait 40 ms for its header to be acknowledged."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", shared_front.port, timeout=20)) as line:
        took = []
        for _ in range(50):
            begun = time.monotonic()
            line.request("GET", "/v2")
            line.getresponse().read()
            took.append(time.monotonic() - begun)
        assert statistics.median(took) < 0.035


def test_pixels_and_their_order_arrive_as_they_were_sent(shared_front: Front, shared_daemon: Any) -> None:
    pixels = bytes(range(72))
    path = "/v1/segment?kind=raw&shape=4,6,3&order="
    answers = [shared_front.ask("POST", path + order, pixels).tree for order in ("bgr", "rgb")]
    sums = [answer["detections"][0]["checksum"] for answer in answers]
    array = np.frombuffer(pixels, np.uint8).reshape(4, 6, 3)
    own = [shared_daemon.client.segment(each).detections[0]["checksum"] for each in (array, array[..., ::-1].copy())]
    assert sums == own
    assert sums[0] != sums[1]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/segment", b"no image", 422, "bad-image"),
        ("POST", "/v1/segment", b"", 422, "bad-image"),
        ("POST", "/v1/segment?scor=1", b"x", 400, "bad-request"),
        ("POST", "/v1/segment?mask_format=rle&mask_format=none", b"x", 400, "bad-request"),
        ("POST", "/v1/segment?kind=path&path=/etc/passwd", None, 400, "bad-request"),
        ("POST", "/v1/segment?kind=raw&shape=9999,9999,3", b"x", 413, "too-large"),
        ("POST", "/v1/jobs", b"x", 400, "bad-request"),  # there is no spool
        ("GET", f"/v1/jobs/{TOKEN}", None, 404, "unknown-job"),
        ("GET", "/v1/jobs/short", None, 404, "bad-request"),
        ("GET", "/v1/segment", None, 405, "bad-request"),
        ("GET", "/nowhere", None, 404, "bad-request"),
        ("GET", "/v1/stats?x=1", None, 400, "bad-request"),
    ],
)
def test_what_cannot_be_done_has_a_code_and_a_status(
    shared_front: Front, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    reply = shared_front.ask(method, path, body)
    assert (reply.status, reply.headers["content-type"]) == (status, "application/problem+json"), reply
    assert (reply.tree["code"], reply.tree["status"]) == (code, status)


@pytest.mark.slow
def test_a_deadline_ends_what_waits(daemon: Any, front: MakeFront, photo: bytes) -> None:
    server = daemon(timed={"latency_ms": {1: 1500}}, devices=["cpu:0"])
    reply = front(server).ask("POST", "/v1/segment?deadline_s=0.2", photo)
    assert (reply.status, reply.tree["code"], "retry-after" in reply.headers) == (504, "timeout", True)


@pytest.mark.slow
def test_a_full_queue_is_said_at_once(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon(timed={"latency_ms": {1: 60_000}}, devices=["cpu:0"], queue={"max_jobs_per_client": 1})
    here = front(server)
    with here.connect() as held:
        held.sendall(segment_request(photo))
        wait_until(lambda: server.client.stats()["leased"] == 1)
        reply = here.ask("POST", "/v1/segment", photo)
    assert (reply.status, reply.tree["code"]) == (503, "busy")
    assert int(reply.headers["retry-after"]) >= 1
    server.kill()


@pytest.mark.slow
def test_whoever_leaves_cancels_its_job(daemon: Any, front: MakeFront, photo: bytes, wait_until: Any) -> None:
    server = daemon(timed={"latency_ms": {1: 60_000}}, devices=["cpu:0"])
    here = front(server)
    with here.connect() as left:
        left.sendall(segment_request(photo))
        wait_until(lambda: server.client.stats()["leased"] == 1)
    wait_until(lambda: server.client.stats()["failures"].get("cancelled") == 1)
    server.kill()


def test_what_is_known_is_shown(shared_front: Front, shared_daemon: Any, photo: bytes) -> None:
    assert shared_front.ask("GET", "/healthz").body == b"ok\n"
    assert shared_front.ask("GET", "/readyz").status == 200
    assert shared_front.ask("GET", "/v1/categories").tree[16] == {"id": 18, "name": "dog"}
    stats = shared_front.ask("GET", "/v1/stats").tree
    assert stats["serving"] == 2
    assert {"pid", "wanted", "actual"}.isdisjoint(stats["devices"][0])
    assert {"recent_failures", "missing"}.isdisjoint(stats)
    shared_front.ask("POST", "/v1/segment", photo)
    text = shared_front.ask("GET", "/metrics").body.decode()
    assert re.search(r'blendmaskd_http_requests_total\{method="POST",route="/v1/segment",status="200"\} \d', text)
    named = re.findall(r"`(blendmaskd_http_\w+)`", (ROOT / "docs" / "http.md").read_text(encoding="utf-8"))
    assert sorted(re.findall(r"(?m)^# TYPE (\w+)", text)) == sorted(named)
    shared_front.ask("GET", "/some-name-that-a-client-chose")
    shared_front.ask("POST", "/v1/jobs/another-name-that-a-client-chose")
    assert "client-chose" not in shared_front.ask("GET", "/metrics").body.decode()


# -- who may ask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:1"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "gpu1.example.org"}, 200),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "null"}, 403),
        ({"Host": "localhost", "Origin": "http://[::1"}, 403),
    ],
)
def test_pages_of_others_cannot_ask(
    named_front: Front, photo: bytes, headers: dict[str, str], status: int
) -> None:
    assert named_front.ask("POST", "/v1/segment", photo, **headers).status == status


@pytest.fixture(scope="module")
def named_front(shared_daemon: Any, wait_until: Any) -> Any:
    with fronts(wait_until) as make:
        yield make(shared_daemon, hosts=["gpu1.example.org"])


def test_tokens_are_asked_for_and_noticed_when_they_change(
    shared_daemon: Any, front: MakeFront, photo: bytes, tmp_path: Path, wait_until: Any
) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# who may ask\nalice {TOKEN}\n")
    file.chmod(0o600)
    here = front(shared_daemon, tokens=str(file))

    def status(token: str, path: str = "/v1/segment") -> int:
        return here.ask("POST", path, photo, Authorization=f"Bearer {token}").status

    assert (status(TOKEN), status(TOKEN[::-1]), status("")) == (200, 401, 401)
    refused = here.ask("GET", "/v1/stats")
    assert (refused.status, refused.tree["code"]) == (401, "unauthorised")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert here.ask("GET", "/v1/stats", Authorization=f"Basic {TOKEN}").status == 401
    assert [here.ask("GET", path).status for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 401]
    file.write_text(f"bob {TOKEN[::-1]}\n")
    wait_until(lambda: status(TOKEN) == 401)
    assert status(TOKEN[::-1]) == 200
    file.chmod(0o640)
    wait_until(lambda: status(TOKEN[::-1]) == 401)
    assert "others can read it" in here.log
    file.chmod(0o600)
    wait_until(lambda: status(TOKEN[::-1]) == 200)


@pytest.mark.slow
def test_each_token_is_a_client_of_its_own(
    daemon: Any, front: MakeFront, photo: bytes, tmp_path: Path, wait_until: Any
) -> None:
    """The broker bounds clients: what one has waiting costs the other no place."""
    server = daemon(timed={"latency_ms": {1: 500}}, devices=["cpu:0"], queue={"max_jobs_per_client": 2})
    file = tmp_path / "tokens"
    file.write_text(f"alice {TOKEN}\nbob {TOKEN[::-1]}\n")
    file.chmod(0o600)
    here = front(server, tokens=str(file))
    codes: list[int] = []
    flood = [
        threading.Thread(target=lambda: codes.append(
            here.ask("POST", "/v1/segment", photo, Authorization=f"Bearer {TOKEN}").status))
        for _ in range(8)
    ]  # fmt: skip
    for thread in flood:
        thread.start()
    wait_until(lambda: 503 in codes)
    assert here.ask("POST", "/v1/segment", photo, Authorization=f"Bearer {TOKEN[::-1]}").status == 200
    for thread in flood:
        thread.join()
    assert set(codes) == {200, 503}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--set", "http.endpoint=0.0.0.0:0"], "without tokens is open to anyone"),
        (["--set", "http.endpoint=nowhere"], "expected HOST:PORT"),
        (["--set", "http.tokens=/nowhere/tokens"], "/nowhere/tokens: No such file"),
        (["--set", "http.certificate=a.pem"], "http.key is not"),
        (["--set", "http.certificate=a.pem", "--set", "http.key=b.pem"], "a.pem"),
        (["--set", "http.hosts=['a b']"], "expected a name"),
        (["--set", "endpoints.clients=[tcp://127.0.0.1:1]", "--set", "insecure_tcp=true"], "ipc:///PATH"),
        (["--set", "http.endpoint=192.0.2.1:1", "--set", "http.insecure=true"], "192.0.2.1:1"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(flags: list[str], words: str) -> None:
    command = [sys.executable, "-m", "blendmaskd.http.program", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (78, 1), done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("blendmaskd-http: ")


def certificate(folder: Path, name: str) -> tuple[str, str]:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    return str(certificate), str(key)


@pytest.mark.slow
def test_https_by_files_that_are_noticed_when_they_change(
    shared_daemon: Any, front: MakeFront, tmp_path: Path, wait_until: Any
) -> None:
    chain, key = certificate(tmp_path, "one")
    here = front(shared_daemon, certificate=chain, key=key)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def shown() -> bytes:
        with socket.create_connection(("127.0.0.1", here.port), 10) as plain, context.wrap_socket(plain) as secure:
            secure.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert secure.recv(100).startswith(b"HTTP/1.1 200")
            return secure.getpeercert(True) or b""

    first = shown()
    (tmp_path / "other").mkdir()
    other, its_key = certificate(tmp_path / "other", "two")
    os.replace(other, chain)  # not with its key, so far
    wait_until(lambda: "the certificate that was read before stays" in here.log)
    assert shown() == first
    os.replace(its_key, key)
    wait_until(lambda: shown() != first)


def test_a_key_with_a_passphrase_is_refused_rather_than_asked_for(tmp_path: Path) -> None:
    chain, key = certificate(tmp_path, "one")
    lock = ["openssl", "pkey", "-aes256", "-passout", "pass:x", "-in", key, "-out", f"{key}.locked"]
    subprocess.run(lock, check=True)
    with pytest.raises(OSError, match="has a passphrase"):
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain, f"{key}.locked")
    load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), chain, key)


# -- stopping, several processes --------------------------------------------------------------------------------------


def test_what_was_accepted_is_answered_when_it_stops(
    daemon: Any, front: MakeFront, photo: bytes, wait_until: Any
) -> None:
    server = daemon(timed={"latency_ms": {1: 3000}}, devices=["cpu:0"])  # seen in a snapshot
    here = front(server)
    with here.connect() as waiting:
        waiting.sendall(segment_request(photo))
        wait_until(lambda: server.client.stats()["leased"] == 1)
        here.process.send_signal(signal.SIGTERM)
        answer = waiting.recv(1000)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"\r\nconnection: close\r\n" in answer  # so nobody sends the next one here
    assert here.process.wait(20) == 0


@pytest.mark.slow
def test_what_is_not_answered_within_drain_s_is_a_problem_too(
    daemon: Any, front: MakeFront, photo: bytes, wait_until: Any
) -> None:
    server = daemon(timed={"latency_ms": {1: 60_000}}, devices=["cpu:0"])
    here = front(server, "--set", "drain_s=1")
    with here.connect() as waiting, here.connect() as unfinished:
        unfinished.sendall(b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
        waiting.sendall(segment_request(photo))
        wait_until(lambda: server.client.stats()["leased"] == 1)
        here.process.send_signal(signal.SIGTERM)
        for each in (waiting, unfinished):
            answer = read_all(each)
            assert answer.startswith(b"HTTP/1.1 503"), answer
            assert b'"code":"draining"' in answer
    assert here.process.wait(20) == 0
    server.kill()


@pytest.mark.slow
def test_its_processes_import_nothing_from_the_working_directory(
    shared_daemon: Any, tmp_path: Path, wait_until: Any
) -> None:
    (tmp_path / "uvicorn.py").write_text("raise SystemExit('not this one')")
    command = [sys.executable, "-P", "-m", "blendmaskd.http.program", "--settings", shared_daemon.settings_file,
               "--set", "http.endpoint=127.0.0.1:0", "--set", "http.processes=2"]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        front = subprocess.Popen(command, cwd=tmp_path, stderr=log)
    try:
        wait_until(lambda: (tmp_path / "log").read_text().count("serving http") == 2, 30)
    finally:
        front.terminate()
        front.wait(20)


@pytest.mark.slow
def test_several_processes_share_the_endpoint(
    daemon: Any, front: MakeFront, photo: bytes, wait_until: Any
) -> None:
    here = front(daemon(), processes=2)
    wait_until(lambda: here.log.count("serving http") == 2)
    children = psutil.Process(here.process.pid).children()
    assert len(children) == 2
    assert {here.ask("POST", "/v1/segment", photo).status for _ in range(10)} == {200}
    counted = r'requests_total\{method="POST",route="/v1/segment",status="200"\} 10.0'
    assert re.search(counted, here.ask("GET", "/metrics").body.decode())
    os.kill(children[0].pid, signal.SIGKILL)
    wait_until(lambda: here.log.count("serving http") == 3, 30)
    assert here.ask("POST", "/v1/segment", photo).status == 200
    here.kill()
    wait_until(lambda: not any(child.is_running() for child in children[1:]))


def test_its_processes_import_nothing_from_the_folder_they_stand_in(
    daemon: Any, tmp_path: Path, wait_until: Any
) -> None:
    (tmp_path / "logging.py").write_text("raise SystemExit('anybody may write here')")
    command = [sys.executable, "-P", "-m", "blendmaskd.http.program", "--settings", str(daemon().settings_file)]
    command += ["--set", "http.endpoint=127.0.0.1:0", "--set", "http.processes=2"]
    told = tmp_path / "log"
    with told.open("wb") as log, subprocess.Popen(command, cwd=tmp_path, stderr=log) as process:
        try:
            wait_until(lambda: told.read_text().count("serving http") == 2, 20)
        finally:
            process.terminate()
