"""Hosts and ports as people write them: the daemon listens there, clients reach it, and check says the same."""
from __future__ import annotations

import errno
import socket
import urllib.request
from typing import Any

import pytest
from curve import free_port

from blendmaskd import settings
from blendmaskd.check import endpoints
from blendmaskd.client.blocking import AsyncClient, Client
from blendmaskd.shell.addresses import unbound

LISTENING = {  # how it is written, and by which hosts a client reaches it
    "127.0.0.1": ("127.0.0.1", "localhost"),
    "localhost": ("127.0.0.1", "localhost"),
    "lo": ("127.0.0.1",),
    "*": ("127.0.0.1", "localhost"),
    "[::1]": ("[::1]",),
    "[::]": ("[::1]", "127.0.0.1", "localhost"),
}


def _need_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as trial:
            trial.bind(("::1", 0))
    except OSError:
        pytest.skip("needs IPv6 on the loopback interface")


def _settings(*clients: str, metrics: str | None = None) -> settings.Settings:
    return settings.from_tree({"insecure_tcp": True, "endpoints": {"clients": list(clients), "metrics": metrics}})


def _judged(*clients: str, metrics: str | None = None) -> list[str]:
    asked = list(endpoints.ask(_settings(*clients, metrics=metrics)))
    return [f"{finding.level} {finding.text}" for facts in asked for finding in endpoints.judge(facts)]


def test_the_daemon_listens_where_it_is_written_and_clients_reach_it(daemon: Any, wait_until: Any) -> None:
    _need_ipv6()
    ports = {host: free_port() for host in LISTENING}
    metrics = f"[::1]:{free_port()}"
    clients = [f"tcp://{host}:{port}" for host, port in ports.items()]
    assert all("free" in line and line.startswith("ok") for line in _judged(*clients, metrics=metrics))
    running = daemon(
        devices=["cpu:0"], insecure_tcp=True, endpoints={"clients": clients, "metrics": metrics}
    )
    for host, reached_by in LISTENING.items():
        for name in reached_by:
            with Client(f"tcp://{name}:{ports[host]}", timeout_s=20) as client:
                assert client.stats()["serving"] == 1, (host, name)
    with urllib.request.urlopen(f"http://{metrics}/readyz", timeout=10) as page:
        assert page.status == 200
    assert all("taken by" in line or "served by" in line for line in _judged(*clients, metrics=metrics))
    assert running.process.poll() is None


def test_an_async_client_resolves_names_too(shared_daemon: Any, daemon: Any) -> None:
    import asyncio

    port = free_port()
    daemon(devices=["cpu:0"], insecure_tcp=True, endpoints={"clients": [f"tcp://localhost:{port}"], "metrics": None})

    async def ask() -> Any:
        async with AsyncClient(f"tcp://localhost:{port}", timeout_s=20) as client:
            return (await client.stats())["serving"]

    assert asyncio.run(ask()) == 1


@pytest.mark.parametrize("other", ["*", "127.0.0.1", "localhost"])
def test_two_endpoints_that_exclude_each_other_are_told(other: str) -> None:
    port = free_port()
    lines = _judged(f"tcp://0.0.0.0:{port}", f"tcp://{other}:{port}")
    assert lines[0].startswith("ok")
    assert lines[1] == (
        f"error endpoints.clients: tcp://{other}:{port}: taken by another endpoint of these settings"
    )
    assert "another endpoint" in _judged(f"tcp://127.0.0.1:{port}", metrics=f"*:{port}")[1]
    assert "another endpoint" not in " ".join(_judged("tcp://127.0.0.1:0", metrics="127.0.0.1:0"))


def test_a_name_that_nobody_knows_is_told() -> None:
    [facts] = endpoints.ask(_settings("tcp://nosuchhost.invalid:9465"))
    assert facts.bind_errno == errno.EADDRNOTAVAIL


def test_why_nothing_can_listen_is_told_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.socket() as second:
        with pytest.raises(OSError, match="in use") as refused:
            second.bind(first.getsockname())
        assert "`blendmaskd check` says" in unbound(refused.value)
    assert unbound(OSError("x has no address")).startswith("x has no address; choose another")


@pytest.mark.parametrize("endpoint", ["tcp://*:1", "tcp://host:*", "tcp://host:0", "tcp://::1:1", "tcp://host:99999",
                                      "ipc://tmp/x", "ipc://~/x"])  # fmt: skip
def test_a_client_refuses_an_endpoint_to_which_nothing_can_connect(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"expected ipc:///PATH or tcp://HOST:PORT"):
        Client(endpoint)
