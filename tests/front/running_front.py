"""A real `blendmaskd-http`, in its own process."""
from __future__ import annotations

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from checkout import ROOT

PHOTO = ROOT / "configs" / "demo" / "images" / "0003.jpg"
STOP_S = 20.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        return json.loads(self.body)


class Front:
    """A running `blendmaskd-http`."""

    def __init__(self, daemon: Any, wait_until: Any, arguments: tuple[str, ...], http: Mapping[str, Any]) -> None:
        self._wait_until = wait_until
        self.log_file = Path(daemon.folder) / f"http-{id(self)}.log"
        settings = {"endpoint": "127.0.0.1:0", **http}
        flags = [flag for key, value in settings.items() for flag in ("--set", f"http.{key}={json.dumps(value)}")]
        self.command = [sys.executable, "-m", "blendmaskd.http.program", "--settings", str(daemon.settings_file)]
        self.command += [*flags, *arguments]
        self.port = 0
        self.start()

    def start(self) -> None:
        """Again after it was killed: at the same port."""
        before = self.log.count("serving http")
        command = [part.replace("127.0.0.1:0", f"127.0.0.1:{self.port}") for part in self.command]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=log)

        def serving() -> list[str]:
            assert self.process.poll() is None, self.log
            return re.findall(r"serving https?://.*:(\d+)", self.log)[before:]

        self.port = int(self._wait_until(serving, 30)[0])

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, method: str, path: str, body: bytes | None = None, timeout: float = 30.0, **headers: str
    ) -> Reply:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)) as connection:
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Reply(response.status, dict(response.getheaders()), response.read())

    def connect(self) -> socket.socket:
        made = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def raw(self, *parts: bytes) -> bytes:
        """All that comes back until the front closes."""
        with self.connect() as connection:
            for part in parts:
                connection.sendall(part)
            return read_all(connection)

    def memory(self) -> int:
        rss: int = psutil.Process(self.process.pid).memory_info().rss
        return rss

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """Drain and stop; fails when that does not work, or when it logged a fault of its own."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                code = self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
                pytest.fail(f"the front did not stop:\n{self.log}")
            assert code == 0, self.log
        assert "Traceback" not in self.log, self.log


def segment_request(image: bytes) -> bytes:
    """All of a request, as it travels."""
    head = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    return head % len(image) + image


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return found


MakeFront = Callable[..., Front]


@contextlib.contextmanager
def fronts(wait_until: Any) -> Iterator[MakeFront]:
    with contextlib.ExitStack() as ends:

        def make(daemon: Any, *arguments: str, **http: Any) -> Front:
            made = Front(daemon, wait_until, arguments, http)
            ends.callback(made.end)
            return made

        yield make
