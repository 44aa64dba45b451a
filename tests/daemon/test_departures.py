"""Departures, on real sockets: who has left is told, and nobody who has not."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from blendmaskd.shell.admission.gate import Gate

Connect = Callable[[bytes], zmq.Socket[bytes]]


class Daemon:
    """A router and its departures; `turn` reads as the daemon does. Each client is known by the name it has."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.set(zmq.ROUTER_HANDOVER, 1)
        self.gate = Gate(context, {endpoint[:3]: self.router}, None, most=100, most_tcp=100)
        self.departures = self.gate.departures
        self.router.bind(endpoint)
        self.endpoint = str(self.router.get_string(zmq.LAST_ENDPOINT))

    def turn(self, wait_ms: int = 0) -> tuple[list[bytes], list[bytes]]:
        """Who left, and who said something."""
        self.gate.receive()
        left = self.departures.take()
        heard = []
        if self.router.poll(wait_ms):
            while self.router.poll(0):
                client, *frames = self.router.recv_multipart(copy=False)
                self.gate.heard(client.bytes, frames[-1])
                heard.append(client.bytes)
        return left, heard


@pytest.fixture(params=["ipc", "tcp"])
def transport(request) -> str:
    return str(request.param)


@pytest.fixture
def context() -> Iterator[Any]:
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def here(context, transport) -> Iterator[Daemon]:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        yield Daemon(context, f"ipc://{Path(folder) / 'd.sock'}" if transport == "ipc" else "tcp://127.0.0.1:*")


@pytest.fixture
def connect(context, here) -> Iterator[Connect]:
    sockets = []

    def connect(name: bytes) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        sockets.append(socket)
        socket.set(zmq.IDENTITY, name)
        socket.connect(here.endpoint)
        return socket

    yield connect
    for socket in sockets:
        socket.close(linger=0)


def says(here: Daemon, socket: zmq.Socket[bytes], name: bytes) -> None:
    socket.send_multipart([b"magic", b"header"])
    assert here.turn(10_000) == ([], [name])


def test_who_has_left_by_ipc_is_told_once(here, connect, transport, wait_until) -> None:
    a, b = connect(b"a"), connect(b"b")
    says(here, a, b"a")
    says(here, b, b"b")
    here.turn()
    a.close(linger=0)
    if transport == "tcp":
        assert wait_until(lambda: here.gate.sockets[0].poll(0))
        assert here.turn() == ([], []), "it may come back"
    else:
        assert wait_until(lambda: here.turn()[0]) == [b"a"]
    says(here, b, b"b")
    assert here.turn() == ([], [])


@pytest.mark.parametrize("transport", ["ipc"])
def test_what_was_said_in_the_turn_before_may_be_anothers(here, connect, wait_until) -> None:
    a = connect(b"a")
    says(here, a, b"a")
    a.close(linger=0)
    assert wait_until(lambda: here.gate.sockets[0].poll(0))
    assert here.turn() == ([], []), "it might have been said by a new connection of the same number"
    assert here.turn() == ([], [])


@pytest.mark.parametrize("transport", ["ipc"])
def test_who_has_come_back_has_not_left(here, connect, wait_until) -> None:
    first = connect(b"a")
    says(here, first, b"a")
    second = connect(b"a")  # the first is handed over, and its connection ends
    says(here, second, b"a")
    for _ in range(3):
        here.turn()
    first.close(linger=0)
    says(here, second, b"a")
    for _ in range(20):
        assert here.turn(10) == ([], [])
    second.close(linger=0)
    assert wait_until(lambda: here.turn()[0]) == [b"a"]


@pytest.mark.parametrize("transport", ["ipc"])
def test_nothing_is_kept_of_who_has_left(here, connect, wait_until) -> None:
    for number in range(50):
        name = b"%d" % number
        socket = connect(name)
        says(here, socket, name)
        if number % 2:
            here.turn()
        socket.close(linger=0)
        assert wait_until(lambda: here.turn() and here.gate.connections == 0)
    assert here.departures._heard == {}
    assert here.departures._descriptors == {}
