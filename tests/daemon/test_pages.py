"""The pages over HTTP: what is answered to whom, and that slow clients hurt nobody."""
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from blendmaskd.core.metrics import STALE_S
from blendmaskd.shell import pages
from blendmaskd.shell.pages import MOST_CONNECTIONS, Pages

DEVICE = {"device": "npu:0", "state": "ready", "fps": 1.0, "busy_share": 0.5, "memory_bytes": 1, "restarts": 0,
          "device_memory_bytes": 0, "images": 1, "busy_seconds": 1.0, "idle_seconds": {"input": 2.0},
          "wanted": {"cpus": "0", "env": {"TOKEN": "secret"}}, "actual": {"cpus": "0", "env": {"TOKEN": "secret"}},
          }  # fmt: skip
SNAPSHOT = {
    "seq": 1, "time": 1.0, "started": 0.0, "combined_fps": 1.0, "degraded": False, "draining": False, "serving": 1,
    "queue": {"jobs": 0, "bytes": 0, "max_jobs": 1, "max_bytes": 1}, "leased": 0, "answered": 1, "failures": {},
    "regions": {"count": 0, "bytes": 0}, "stages": {}, "devices": [DEVICE],
}  # fmt: skip


@pytest.fixture(scope="module")
def one_server() -> Iterator[Pages]:
    made = Pages("127.0.0.1:0")
    yield made
    made.close()


@pytest.fixture
def server(one_server: Pages) -> Pages:
    """Has just published `SNAPSHOT` and no image."""
    one_server.publish(SNAPSHOT)
    one_server.show_image(None)
    return one_server


def ask(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (small letters) and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.headers.items()}, response.read()
    finally:
        connection.close()


def get(port: int, path: str) -> tuple[int, str]:
    status, _, body = ask(port, path)
    return status, body.decode()


def test_health_is_the_loop_s_own() -> None:
    now = 100.0
    server = Pages("127.0.0.1:0", clock=lambda: now)
    try:
        assert [get(server.port, path) for path in ("/healthz", "/readyz", "/metrics", "/stats.json")] == [
            (200, "starting\n"), (503, "starting\n"), (503, "starting\n"), (200, "{}")
        ]  # fmt: skip
        server.publish(SNAPSHOT)
        assert get(server.port, "/healthz?verbose")[0] == get(server.port, "/readyz")[0] == 200
        now += STALE_S + 1  # and no snapshot since
        for path in ("/healthz", "/readyz"):
            status, body = get(server.port, path)
            assert (status, body.startswith("the serving loop has hung for 6 s\n")) == (503, True)
        server.publish(SNAPSHOT)
        assert get(server.port, "/readyz")[0] == 200
    finally:
        server.close()


@pytest.mark.parametrize("path", ["/", "/stats.json", "/metrics", "/healthz", "/readyz", "/nothing", "/last.jpg"])
def test_head_is_get_without_a_body(server: Pages, path: str) -> None:
    status, headers, body = ask(server.port, path)
    assert status == (404 if path in ("/nothing", "/last.jpg") else 200)
    assert int(headers["content-length"]) == len(body) > 0
    headless = ask(server.port, path, "HEAD")
    assert (headless[0], headless[2]) == (status, b"")
    assert headless[1].keys() == headers.keys()
    assert headless[1]["content-length"] == headers["content-length"]


@pytest.mark.parametrize(("method", "status"), [("POST", 405), ("PUT", 405), ("DELETE", 405), ("OPTIONS", 405),
                                                ("PATCH", 405), ("TRACE", 501), ("NONSENSE", 501)])  # fmt: skip
def test_nothing_can_be_changed(server: Pages, method: str, status: int) -> None:
    found, headers, _ = ask(server.port, "/", method)
    assert found == status
    assert headers.get("allow") == ("GET, HEAD" if status == 405 else None)
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/stats.json", "/metrics", "/readyz", "/nothing"])
def test_headers_keep_a_browser_from_mischief(server: Pages, path: str) -> None:
    headers = ask(server.port, path)[1]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert "python" not in headers["server"].lower()
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:9464", 200), ("localhost", 200), ("LOCALHOST:80", 200), ("[::1]:9464", 200), ("10.1.2.3", 200),
        ("rebound.example:9464", 421), ("localhost.rebound.example", 421), ("", 421),
    ],
)  # fmt: skip
def test_a_name_that_dns_may_lie_about_is_refused_on_loopback(server: Pages, host: str, status: int) -> None:
    for path in ("/", "/stats.json", "/metrics", "/last.jpg"):
        assert ask(server.port, path, Host=host)[0] == (404 if path == "/last.jpg" and status == 200 else status)


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /healthz HTTP/1.1", b"400"), (b"GET /healthz HTTP/1.0", b"200"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: rebound.example", b"400"),
        (b"POST / HTTP/1.1", b"400"), (b"GET /healthz HTTP/1.1\r\nHost: localhost", b"200"),
    ],
)  # fmt: skip
def test_http_1_1_names_one_host(server: Pages, head: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(head + b"\r\n\r\n")
        assert raw.makefile("rb").readline().split()[1] == status


def test_a_daemon_that_listens_for_others_is_called_by_any_name() -> None:
    server = Pages("0.0.0.0:0")
    try:
        assert ask(server.port, "/healthz", Host="gpu-7.example:9464")[0] == 200
    finally:
        server.close()


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("needs IPv6")
    try:
        server = Pages("[::1]:0")
    except OSError as error:
        pytest.skip(f"needs ::1: {error}")
    try:
        with socket.create_connection(("::1", server.port), 10) as connection:
            connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.0 200")
    finally:
        server.close()


def test_json_is_the_snapshot_without_environments(server: Pages) -> None:
    status, headers, body = ask(server.port, "/stats.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert b"secret" not in body
    shown = json.loads(body)
    for side in ("wanted", "actual"):
        assert shown["devices"][0].pop(side) == {"cpus": "0"}
    without = {name: value for name, value in DEVICE.items() if name not in ("wanted", "actual")}
    assert shown == {**SNAPSHOT, "devices": [without]}


def test_the_last_image_is_there_only_while_one_is_shown(server: Pages) -> None:
    server.show_image(b"\xff\xd8 a picture")
    status, headers, body = ask(server.port, "/last.jpg?17")
    assert (status, headers["content-type"], body) == (200, "image/jpeg", b"\xff\xd8 a picture")
    server.show_image(None)
    assert ask(server.port, "/last.jpg")[0] == 404


def test_the_page_asks_nobody_else(server: Pages) -> None:
    text = ask(server.port, "/")[2].decode()
    assert re.findall(r"https?://[^\s'\"]+", text) == ["http://www.w3.org/2000/svg"] * 2  # a namespace's name
    assert not re.findall(r"\sstyle=|\son[a-z]+=|<script src|<link rel=\"stylesheet|@import|innerHTML", text)


# -- slow clients -----------------------------------------------------------------------------------------------------


def threads() -> int:
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


def test_connections_that_say_nothing_neither_block_nor_add_up(server: Pages, wait_until: Any) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 20))
                  for _ in range(3 * MOST_CONNECTIONS)]  # fmt: skip
        server.publish(SNAPSHOT)  # however long that took
        assert get(server.port, "/readyz")[0] == 200
        wait_until(lambda: threads() <= MOST_CONNECTIONS)
        assert silent[0].recv(1) == b""  # the oldest gave way
    wait_until(lambda: threads() == 0)


def test_a_client_that_drips_is_cut_off(server: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, the request never does: only a bound on the whole connection ends it."""
    monkeypatch.setattr(pages, "LIFE_S", 1.0)
    begun = time.monotonic()
    connection = socket.create_connection(("127.0.0.1", server.port), 0.1)
    with connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET / HTTP/1.0\r\nX: ")
        while time.monotonic() < begun + 30:
            connection.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                assert connection.recv(1) == b""
                break
    assert time.monotonic() < begun + 30


def test_a_client_that_does_not_read_is_cut_off(
    server: Pages, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr(pages, "LIFE_S", 1.0)
    server.show_image(bytes(64 << 20))  # more than any socket buffers
    with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
        connection.sendall(b"GET /last.jpg HTTP/1.0\r\n\r\n")
        wait_until(lambda: threads() == 1)
        wait_until(lambda: threads() == 0, 30)
