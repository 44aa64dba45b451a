"""Requests at a `blendmaskd-http` of our own: each is answered or its connection closed, others are served."""
from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from random import Random
from typing import Self

import psutil
from PIL import Image

from fuzz.live import Stranger, Target, first_said
from fuzz.mutate import mutate
from fuzz.pictures import saved
from fuzz.rules import BrokenRuleError

START_S = 30.0
ANSWER_S = 20.0
POLITE_S = 10.0  # in which a polite client is answered
LEAK_MB = 64.0
WARM = 500  # inputs after which the front is taken to be warm
PATIENCE_S, MOST_STAYING = 0.01, 40
NAME = b"0123456789abcdef0123456789abcdef"


class Front(Stranger):
    """A stranger to the front: see `fuzz.strangers`."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._number = 0
        self._warm: tuple[float, int] | None = None  # MB, descriptors
        self._stop = threading.Event()
        self._impolite = ""

    def __enter__(self) -> Self:
        self._log = tempfile.NamedTemporaryFile("w+")
        settings = {"http.endpoint": "127.0.0.1:0", "endpoints.clients": f"[{self._target.host.endpoint}]",
                    "http.receive_s": "3", "limits.max_image_bytes": "1000000"}  # fmt: skip
        flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "blendmaskd.http.program", *flags]
        self._process = subprocess.Popen(command, stderr=self._log)
        self._port = self._serving()
        self._polite = threading.Thread(target=self._ask_politely)
        self._polite.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._polite.join()
        self._process.terminate()
        try:
            self._process.wait(ANSWER_S)
        finally:
            self._process.kill()
            self._log.close()

    def feed(self, random: Random) -> str:
        self._number += 1
        if self._number == WARM:
            self._warm = self._held()
        if self._number % 200 == 0:
            self._check()
        if random.random() < 0.6:
            return self._patient(random)
        with socket.create_connection(("127.0.0.1", self._port), ANSWER_S) as stranger, contextlib.suppress(OSError):
            stranger.sendall(_request(random))
            stranger.shutdown(socket.SHUT_WR)
            return _code(first_said(stranger))
        return "reset"

    def _patient(self, random: Random) -> str:
        """One that waits for its answer, and stays when there is none at once."""
        stranger = socket.create_connection(("127.0.0.1", self._port), PATIENCE_S)
        try:
            stranger.sendall(_request(random))
            said = stranger.recv(65536)
        except TimeoutError:
            self._stay(stranger, MOST_STAYING)
            return "stays"
        except OSError:
            said = b""
        stranger.close()
        return _code(said)

    def settle(self) -> None:
        self._hang_up()
        self._check()
        if self._warm is None:
            return
        deadline = time.monotonic() + ANSWER_S
        while self._held()[1] > self._warm[1] + 5:
            if time.monotonic() > deadline:
                raise BrokenRuleError(f"the front's descriptors: {self._warm[1]} became {self._held()[1]}")
            time.sleep(0.1)
        if self._held()[0] > self._warm[0] + LEAK_MB:
            raise BrokenRuleError(f"the front's memory, in MB: {self._warm[0]} became {self._held()[0]}")

    def _check(self) -> None:
        if self._process.poll() is not None:
            raise BrokenRuleError(f"the front ended with {self._process.returncode}: {self._said()}")
        if "Traceback" in self._said() or "ERROR" in self._said():
            raise BrokenRuleError(self._said())
        if self._impolite:
            raise BrokenRuleError(f"the polite client: {self._impolite}")

    def _held(self) -> tuple[float, int]:
        process = psutil.Process(self._process.pid)
        return process.memory_info().rss / 1e6, process.num_fds()

    def _said(self) -> str:
        with open(self._log.name, encoding="utf-8", errors="replace") as log:
            return log.read()[-5000:]

    def _serving(self) -> int:
        deadline = time.monotonic() + START_S
        while not (found := re.search(r"serving http://.*:(\d+)", self._said())):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BrokenRuleError(f"the front does not serve: {self._said()}")
            time.sleep(0.05)
        return int(found[1])

    def _ask_politely(self) -> None:
        while not self._stop.is_set() and not self._impolite:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=POLITE_S)
            try:
                connection.request("POST", "/v1/segment", PICTURE)
                status = connection.getresponse().status
                self._impolite = "" if status == 200 else f"got {status}"
            except OSError as error:
                self._impolite = repr(error)
            finally:
                connection.close()
            self._stop.wait(0.05)


PICTURE = saved(Image.new("RGB", (9, 7), (200, 30, 60)), "PNG")
FORM = (b'--xx\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + PICTURE + b"\r\n--xx\r\n"
        b'Content-Disposition: form-data; name="mask_format"\r\n\r\nnone\r\n--xx--\r\n')  # fmt: skip
JSON = json.dumps({"image": base64.b64encode(PICTURE).decode(), "score_threshold": 0.5}).encode()
TENSOR = len(PICTURE).to_bytes(4, "little") + PICTURE
INFER = json.dumps({"id": "1", "inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {
    "binary_data_size": len(TENSOR)}}], "outputs": [{"name": "boxes", "parameters": {"binary_data": True}}]}).encode()
PIXELS = json.dumps({"inputs": [{"name": "image", "datatype": "UINT8", "shape": [2, 2, 3], "data": [7] * 12}],
                     "parameters": {"mask_format": "none"}}).encode()  # fmt: skip
POSTS = (
    (b"/v1/segment?score_threshold=0.1&mask_format=polygon", b"Content-Type: image/png\r\n", PICTURE),
    (b"/v1/segment", b"Content-Type: multipart/form-data; boundary=xx\r\n", FORM),
    (b"/v1/segment", b"Content-Type: application/json\r\n", JSON),
    (b"/v1/segment?kind=raw&shape=7,9,3&order=rgb&deadline_s=5", b"", bytes(189)),
    (b"/v1/jobs?job=" + NAME, b"", PICTURE),
    (b"/v2/models/blendmask/infer", b"Inference-Header-Content-Length: %d\r\n" % len(INFER), INFER + TENSOR),
    (b"/v2/models/blendmask-pixels/versions/1/infer", b"", PIXELS),
    (b"/v2/repository/index", b"", b"{}"),
)
GETS = (b"/", b"/docs", b"/openapi.json", b"/v1/categories", b"/v1/stats", b"/v1/jobs/" + NAME + b"?wait=0.01", b"/v2",
        b"/readyz", b"/healthz", b"/metrics", b"/v2/models/blendmask/config", b"/%2e%2e/etc/passwd", b"*",
        b"http://evil.example/", b"//", b"/\xff", b"/v1/jobs/%00%ff", b"/?" + b"a=b&" * 3000)  # fmt: skip
EXTRA = (
    b"", b"", b"", b"Expect: 100-continue\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n",
    b"Content-Length: 18446744073709551616\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"Origin: null\r\n",
    b"X: " + b"y" * 40_000 + b"\r\n", b"X: y\r\n" * 300, b"Authorization: Bearer \xff\r\n", b"Connection: close\r\n",
    b"Connection: upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
)  # fmt: skip


def _request(random: Random) -> bytes:
    """One or two requests, most of them damaged: in the header, the body, or somewhere."""
    whole = b"".join(_one(random) for _ in range(random.choice((1, 1, 1, 2))))
    return mutate(random, whole) if random.random() < 0.5 else whole


def _one(random: Random) -> bytes:
    other = random.choice((b"127.0.0.1:80", b"evil.example", b"[::1", b"\xff"))
    host = b"localhost" if random.random() < 0.8 else other
    extra = random.choice(EXTRA)
    if random.random() < 0.4:
        method = random.choice((b"GET", b"GET", b"HEAD", b"DELETE", b"PUT", b"OPTIONS", b"TRACE", b"CONNECT"))
        return method + b" " + random.choice(GETS) + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + extra + b"\r\n"
    path, kind, body = random.choice(POSTS)
    body = mutate(random, body) if random.random() < 0.6 else body
    size = len(body) + random.choice((0, 0, 0, 0, 0, 1, -1, 100_000))
    head = b"POST " + path + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + kind + extra
    if b"chunked" in extra:
        return head + b"\r\n%x\r\n" % len(body) + body + b"\r\n0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % max(size, 0) + body


def _code(said: bytes) -> str:
    if not said:
        return "closed"
    if not said.startswith(b"HTTP/1.1 "):
        raise BrokenRuleError(f"no HTTP: {said[:100]!r}")
    return said.split()[1].decode()
