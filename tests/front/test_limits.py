"""Connections and requests in bounds: what is too much or too slow is answered or cut off; others are served."""
from __future__ import annotations

import contextlib
import resource
import socket
import time
from typing import Any

import psutil
import pytest
from running_front import Front, MakeFront, fronts, read_all, segment_request

from blendmaskd.http.connections import Server
from blendmaskd.settings.schema import Http


@pytest.fixture(scope="module")
def strict(shared_daemon: Any, wait_until: Any) -> Any:
    """A front with short times and few places."""
    with fronts(wait_until) as make:
        yield make(shared_daemon, "--set", "limits.max_image_bytes=200000", receive_s=1.0, send_s=1.0,
                   max_connections=8, max_bytes=1_000_000)  # fmt: skip


def test_what_uvicorn_reads_of_the_environment_is_none_of_the_front_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "auto")
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    config = Server(None, Http(), 1.0, None).config
    assert (config.workers, config.proxy_headers) == (1, False)


def status_of(answer: bytes) -> int:
    return int(answer.split()[1]) if answer else 0


CHUNKED = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
HEAD = b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ([b"hello\r\n\r\n"], 400),
        ([b"GET /healthz HTTP/1.1\r\n\r\n"], 400),  # no Host
        ([b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"], 400),
        ([HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"], 400),
        ([HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\nGET /"], 400),
        ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], 0),
        ([b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 50_000 + b"\r\n\r\n"], 431),
        ([b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 500_000 + b"\r\n\r\n"], 400),
        ([b"GET /" + b"a" * 50_000 + b" HTTP/1.1\r\n\r\n"], 400),
        ([b"GET /healthz HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n X: folded\r\n\r\n"], 421),
        ([HEAD + b"Content-Length: 200001\r\nConnection: close\r\n\r\n" + b"x" * 200_001], 413),
        ([HEAD + b"Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n"], 413),
        ([HEAD + CHUNKED + b"30d41\r\n", b"x" * 200_001, b"\r\n0\r\n\r\n"], 413),
        ([HEAD + b"Connection: close\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"], 415),
        ([HEAD + b"Content-Length: 10\r\n\r\nfive5"], 408),  # and no more
        ([HEAD], 408),
        ([], 408),
    ],
)
def test_what_is_no_request_or_too_much_ends_in_time(strict: Front, parts: list[bytes], status: int) -> None:
    begun = time.monotonic()
    assert status_of(strict.raw(*parts)) == status
    assert time.monotonic() - begun < 10
    assert strict.ask("GET", "/healthz").status == 200


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\n", 413),
        (b"POST /v1/segment HTTP/1.1\r\nHost: evil.example\r\n", 421),
        (b"POST /v1/segment HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.example\r\n", 403),
        (b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\n", 404),
        (b"POST /v1/segment HTTP/1.0\r\n", 413),
    ],
)
def test_whoever_sends_all_before_it_reads_sees_why_it_was_refused(strict: Front, start: bytes, status: int) -> None:
    """As Python's urllib does. If the front closed at once, the kernel would throw its answer away."""
    body = bytes(8 << 20)
    assert status_of(strict.raw(start + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body), body)) == status


def test_whoever_was_refused_cannot_stay(strict: Front, wait_until: Any) -> None:
    with strict.connect() as rude:
        rude.sendall(HEAD + b"Connection: close\r\nContent-Length: 8000000\r\n\r\n")
        assert status_of(read_all(rude)) == 413
        wait_until(lambda: open_connections(strict) == 0)


def test_a_header_that_drips_is_cut_off(strict: Front) -> None:
    with strict.connect() as slow:
        slow.settimeout(0.05)
        until = time.monotonic() + 15
        slow.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until:
                slow.sendall(b"X: y\r\n")
                with contextlib.suppress(TimeoutError):
                    if not slow.recv(1000):
                        break
        assert time.monotonic() < until


@pytest.mark.slow
def test_an_answer_that_is_not_read_is_cut_off(daemon: Any, front: MakeFront, wait_until: Any) -> None:
    here = front(daemon(), send_s=0.5)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", here.port))
        deaf.settimeout(1)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:  # pipelined: each has an answer of some kilobytes
                deaf.sendall(b"GET /v1/stats HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        wait_until(lambda: open_connections(here) == 0, 20)


def open_connections(front: Front) -> int:
    """Beside the one that asks."""
    text = front.ask("GET", "/metrics").body.decode()
    return int(float(text.split("\nblendmaskd_http_connections ")[1].split()[0]))


def test_silent_connections_make_room(strict: Front, photo: bytes) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(30):
            held.enter_context(strict.connect())
        assert strict.ask("POST", "/v1/segment", photo).status == 200


def test_connections_that_come_together_are_bounded_too(
    shared_daemon: Any, front: MakeFront, wait_until: Any
) -> None:
    here = front(shared_daemon, max_connections=8)
    process = psutil.Process(here.process.pid)

    def established() -> int:
        return [each.status for each in process.net_connections("tcp4")].count("ESTABLISHED")

    with contextlib.ExitStack() as held:
        process.suspend()
        for _ in range(60):
            held.enter_context(here.connect())
        process.resume()
        assert here.ask("GET", "/healthz").status == 200  # it came last
        wait_until(lambda: established() <= 8)


@pytest.mark.slow
def test_without_descriptors_others_wait_and_the_log_says_so_once(
    shared_daemon: Any, front: MakeFront, photo: bytes, wait_until: Any
) -> None:
    here = front(shared_daemon)
    assert here.ask("POST", "/v1/segment", photo).status == 200  # it is connected
    pid = here.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as held:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 10, before[1]))
        for _ in range(60):
            held.enter_context(here.connect())
        wait_until(lambda: "connections have to wait: Too many open files" in here.log)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        assert here.ask("POST", "/v1/segment", photo).status == 200
    assert here.log.count("\n") < 10, here.log


def test_connections_with_requests_are_kept(shared_daemon: Any, front: MakeFront, photo: bytes) -> None:
    here = front(shared_daemon, max_connections=4)
    with contextlib.ExitStack() as held:
        waiting = [held.enter_context(here.connect()) for _ in range(4)]
        for each in waiting:
            each.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(photo))
            assert status_of(each.recv(1000)) == 100
        refused = here.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert status_of(refused) == 503
        assert b"retry-after" in refused
        for each in waiting:
            each.sendall(photo)
        assert [status_of(each.recv(1000)) for each in waiting] == [200] * 4


def test_what_no_budget_would_hold_is_too_large_rather_than_busy(shared_daemon: Any, front: MakeFront) -> None:
    reply = front(shared_daemon, max_bytes=1000).ask("POST", "/v1/segment", bytes(1001))
    assert (reply.status, reply.tree["code"], "http.max_bytes" in reply.tree["detail"]) == (413, "too-large", True)


def test_bodies_are_held_within_a_budget(strict: Front, photo: bytes, wait_until: Any) -> None:
    """Five bodies of nearly 200 kB and one of 32 are more than a megabyte: whichever is last is refused."""
    with contextlib.ExitStack() as held:
        unfinished = [held.enter_context(strict.connect()) for _ in range(5)]
        for each in unfinished:
            each.sendall(HEAD + b"Content-Length: 200000\r\n\r\n" + b"x" * 199_000)
        answer = strict.ask("POST", "/v1/segment", photo)
        answers = [answer.body, *(each.recv(2000) for each in unfinished)]
    assert sum(b"http.max_bytes" in each for each in answers) == 1
    wait_until(lambda: strict.ask("POST", "/v1/segment", photo).status == 200)


@pytest.mark.slow
def test_memory_comes_back(strict: Front, photo: bytes) -> None:
    def flood(count: int) -> None:
        for _ in range(count):
            strict.ask("POST", "/v1/segment", b"x" * 199_000)

    flood(20)
    before = strict.memory()
    flood(300)  # 60 MB
    assert strict.memory() < before + (20 << 20)


def test_pipelined_requests_are_answered_in_order(strict: Front, photo: bytes) -> None:
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with strict.connect() as line:
        line.sendall(segment_request(photo) + segment_request(b"no image") + last)
        answers = read_all(line)
    assert answers.count(b"HTTP/1.1 ") == 3
    assert answers.index(b"HTTP/1.1 200") < answers.index(b"HTTP/1.1 422") < answers.rindex(b"ok\n")
