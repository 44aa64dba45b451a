"""Departures, on real sockets: who has left is told, and nobody who has not."""
from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from blendmaskd.shell.admission.access import FROM_AFAR
from blendmaskd.shell.admission.departures import Departures
from blendmaskd.shell.admission.gate import Gate

Connect = Callable[[bytes], zmq.Socket[bytes]]


class Daemon:
    """A router and its departures; `turn` reads as the daemon does. Each client is known by the name it has."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self.router = context.socket(zmq.ROUTER)
        self.router.linger = 0
        self.router.set(zmq.ROUTER_HANDOVER, 1)
        self.router.set(zmq.ROUTER_MANDATORY, 1)
        self.gate = Gate(context, {endpoint[:3]: self.router}, None, most=100, most_tcp=100)
        self.departures = self.gate.departures
        self.prefix = FROM_AFAR if endpoint.startswith("tcp:") else b""
        if endpoint.startswith("tcp:"):
            self.gate.bind(endpoint, None)
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
                listener.bind(endpoint.removeprefix("ipc://"))
                listener.listen()
                self.gate.bind_local(listener)
        self.endpoint = str(self.router.get_string(zmq.LAST_ENDPOINT))

    def turn(self, wait_ms: int = 0) -> tuple[list[bytes], list[bytes]]:
        """Who left, and who said something."""
        self.gate.receive()
        left = self.departures.take()
        heard = []
        if self.router.poll(wait_ms):
            while self.router.poll(0):
                client, *frames = self.router.recv_multipart(copy=False)
                self.gate.heard(self.prefix + client.bytes, frames[-1])
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
        dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        sockets.append(dealer)
        dealer.set(zmq.IDENTITY, name)
        dealer.set(zmq.RECONNECT_IVL, -1)
        dealer.connect(here.endpoint)
        return dealer

    yield connect
    for each in sockets:
        each.close(linger=0)


def says(here: Daemon, dealer: zmq.Socket[bytes], name: bytes) -> None:
    dealer.send_multipart([b"magic", b"header"])
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


def _inode(descriptor: int) -> int | None:
    try:
        return os.stat(descriptor).st_ino
    except OSError:
        return None


@pytest.mark.parametrize("transport", ["ipc"])
def test_who_speaks_and_leaves_at_once_has_left(here, connect, wait_until) -> None:
    a = connect(b"a")
    says(here, a, b"a")
    descriptor = here.departures.descriptor(b"a")
    before = _inode(descriptor)
    a.close(linger=0)
    assert wait_until(lambda: _inode(descriptor) != before)
    assert here.turn() == ([b"a"], [])
    assert here.turn() == ([], [])


@pytest.mark.parametrize("comes_back", [True, False])
def test_of_a_number_that_is_taken_anew_it_is_known_who_has_left(comes_back: bool) -> None:
    departures, in_use = Departures(), {30}
    departures.heard(b"a", 30)
    departures.ended(30, local=True)  # that of `a`, or of whoever had the number before
    departures.settle(in_use.__contains__)
    assert departures.take() == []
    assert departures.descriptor(b"a") == 30
    if comes_back:
        departures.heard(b"a", 30)
        assert departures.take() == []
    else:
        departures.heard(b"b", 30)
        assert departures.take() == [], "which of the two has left is not known: messages are read in no order"
    departures.settle(in_use.__contains__)
    departures.ended(30, local=True)
    assert departures.take() == [b"a" if comes_back else b"b"]


def test_before_all_is_known_nobody_has_left() -> None:
    departures = Departures()
    departures.settle({30}.__contains__)
    departures.heard(b"a", 30)  # by the second connection of this number, whose predecessor's end is still to be told
    assert departures.take() == []
    departures.ended(30, local=True)
    assert departures.take() == []
    departures.settle({30}.__contains__)
    assert departures.take() == []
    departures.settle({30}.__contains__)
    departures.ended(30, local=True)
    assert departures.take() == [b"a"]


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
        dealer = connect(name)
        says(here, dealer, name)
        if number % 2:
            here.turn()
        dealer.close(linger=0)
        assert wait_until(lambda: here.turn() and here.gate.connections == 0)
    assert here.departures._heard == {}
    assert here.departures._descriptors == {}


def test_the_end_of_a_local_connection_may_be_told_when_a_remote_one_has_its_number() -> None:
    departures, remote = Departures(), FROM_AFAR + b"b"
    departures.heard(b"a", 30)
    departures.heard(remote, 30)
    assert departures.take() == []
    departures.ended(30, local=True)
    assert departures.take() == []
    assert departures.descriptor(remote) == 30
    departures.ended(30, local=False)
    assert departures.take() == [], "it may come back"
    assert departures.descriptor(remote) is None


ANOTHER = """
import sys, zmq
dealer = zmq.Context().socket(zmq.DEALER)
sys.stdin.readline()
dealer.connect(sys.argv[1])
dealer.send_multipart([b"magic", b"header"])
sys.stdin.read()
"""


@pytest.fixture
def others(here) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two clients in processes of their own, with all the descriptors that they take here."""
    argv = [sys.executable, "-c", ANOTHER, here.endpoint]
    processes = [subprocess.Popen(argv, stdin=subprocess.PIPE) for _ in range(2)]
    yield processes
    for each in processes:
        each.communicate(b"\n")


def _told_to_speak(here: Daemon, process: subprocess.Popen[bytes]) -> list[zmq.Frame]:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    assert here.router.poll(10_000)
    return here.router.recv_multipart(copy=False)


def _free_for_the_next(descriptor: int) -> list[int]:
    """Take all that are lower, so that it is given to who comes next. Returns those."""
    taken = [os.dup(0)]
    while taken[-1] < descriptor:
        taken.append(os.dup(0))
    os.close(taken.pop())
    return taken


def _has_ended(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            return bool(select.select([connection], [], [], 0)[0])
    except OSError:
        return True


@pytest.mark.parametrize("transport", ["ipc"])
@pytest.mark.parametrize("heard", [False, True])
def test_a_connection_is_not_closed_for_one_that_had_its_number(here, others, wait_until, heard: bool) -> None:
    first = _told_to_speak(here, others[0])
    here.turn()
    number = int(first[-1].get(zmq.SRCFD))
    here.gate.heard(first[0].bytes, first[-1])
    here.gate.close(first[-1])
    assert wait_until(lambda: not os.path.exists(f"/proc/self/fd/{number}"))
    taken = _free_for_the_next(number)
    second = _told_to_speak(here, others[1])
    assert second[-1].get(zmq.SRCFD) == number
    if heard:
        here.gate.heard(second[0].bytes, second[-1])
    here.gate.cut_off(first[0].bytes)
    here.gate.close(first[-1])  # another message of the first one's, read late
    assert not _has_ended(number)
    here.gate.close(second[-1])
    assert wait_until(lambda: _has_ended(number))
    for each in taken:
        os.close(each)
