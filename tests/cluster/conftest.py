"""A Ray cluster of two nodes on this machine, with one declared NPU and one CPU each; one for all tests that leave it
as it is. Needs the extra `ray`: each test module says so by `importorskip`.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from checkout import ROOT

PORT = 18600
START_S = 120.0


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def tree(self) -> Any:
        return json.loads(self.body)


class Application:
    """A Serve application; `url` is its own."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{PORT}/{name}"

    def request(self, path: str, data: bytes | None = None) -> Reply:
        request = urllib.request.Request(self.url + path, data=data)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Reply(response.status, dict(response.headers), response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read())

    def segment(self, image: bytes, query: str = "") -> Reply:
        return self.request(f"/v1/segment?{query}", image)

    def answered(self, image: bytes, query: str = "") -> dict[str, Any]:
        """As a client that tries again what can be tried again: what has no code of ours is Ray's own failure."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                reply = self.segment(image, query)
                if reply.status == 200:
                    return reply.tree
                assert _retryable(reply), reply
            except OSError as error:  # the connection went with its node
                reply = error
            assert time.monotonic() < deadline, reply
            time.sleep(0.2)

    def stats(self) -> dict[str, Any]:
        return self.request("/v1/stats").tree


def _retryable(reply: Reply) -> bool:
    try:
        return "retry_after_s" in reply.tree
    except ValueError:
        return True  # Ray's own text: a lost front, or a proxy that has just started and has no routes yet


Deploy = Callable[..., Application]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """Nodes a, the head, and b."""
    from cluster_trial import trial

    with trial({"a": {}, "b": {}}) as running:
        yield running


@contextlib.contextmanager
def _applications() -> Iterator[Deploy]:
    from ray import serve

    from blendmaskd_workers.cluster.serve import application

    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": PORT})
    names: list[str] = []

    def run(settings: dict[str, Any], **args: Any) -> Application:
        names.append(f"app{next(_numbers)}")
        built = application({"settings": settings, **args})
        serve.run(built, name=names[-1], route_prefix=f"/{names[-1]}")
        return Application(names[-1])

    try:
        yield run
    finally:
        for name in names:
            serve.delete(name)


@pytest.fixture
def deploy(cluster) -> Iterator[Deploy]:
    """``deploy(settings, **args)`` runs an application until the test's end."""
    with _applications() as run:
        yield run


@pytest.fixture(scope="module")
def shared_app(cluster) -> Iterator[Application]:
    """For tests of a module that leave it as it is: two timed NPUs, 20 ms an image."""
    with _applications() as run:
        yield run({"devices": ["npu:0"], "engine": "timed", "timed": {"latency_ms": {1: 20}}, "batch": 1,
                   "limits": {"max_image_bytes": 1_000_000}})  # fmt: skip


_numbers = itertools.count()


@pytest.fixture(scope="session")
def photograph() -> bytes:
    return (ROOT / "tests" / "golden" / "images" / "chelsea.png").read_bytes()
