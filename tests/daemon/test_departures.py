"""Departures, on real sockets: who has left is told, and nobody who has not."""
from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from blendmaskd.shell.admission.access import FROM_AFAR
from blendmaskd.shell.admission.departures import Departures
from blendmaskd.shell.admission.gate import FEW, Gate

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
        self.gate.receive(self.gate.sockets, behind=())
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
    descriptor, _ = here.departures._heard[b"a"]
    before = _inode(descriptor)
    a.close(linger=0)
    assert wait_until(lambda: _inode(descriptor) != before)
    assert here.turn() == ([b"a"], [])
    assert here.turn() == ([], [])


def _told(departures: Departures, *, ended: int = 0, came: int = 0) -> list[bytes]:
    """Of connections by the descriptor 30, one after the other; then all is known. Returns who has left."""
    for _ in range(ended):
        departures.ended(30, local=True)
    for _ in range(came):
        departures.came(30, local=True)
    departures.settle()
    return departures.take()


def test_whose_message_is_read_late_has_left_with_its_connection() -> None:
    departures = Departures()
    assert _told(departures, came=1) == []
    departures.heard(b"a", 30)
    assert _told(departures) == []
    assert _told(departures, ended=1, came=1) == [b"a"]
    departures.heard(b"a", 30)  # what it had said before is read now
    departures.heard(b"b", 30)
    assert departures.connection(b"a") == departures.connection(b"b") == (30, 2)
    assert _told(departures) == [], "either may be whose connection it is"
    assert _told(departures, ended=1) == [b"a", b"b"]
    departures.heard(b"c", 30)  # read later still
    assert _told(departures) == [b"c"]
    assert departures.connection(b"c") is None
    assert not departures.knows(b"c")


def test_a_connection_that_comes_tells_that_the_one_before_has_ended() -> None:
    departures = Departures()
    _told(departures, came=1)
    departures.heard(b"a", 30)
    assert _told(departures) == []
    assert _told(departures, came=1) == [b"a"]


def test_who_comes_back_by_the_same_descriptor_has_not_left() -> None:
    departures = Departures()
    for _ in range(3):
        departures.came(30, local=True)
        departures.heard(b"a", 30)
        assert _told(departures) == []
        departures.ended(30, local=True)
    assert _told(departures) == [b"a"]


@dataclass(eq=False)
class Connection:
    descriptor: int
    client: bytes
    unread: int = 0
    is_open: bool = True


class Connections(RuleBasedStateMachine):
    """Clients that come, speak and leave. All events are taken at once, in order; messages of any connection are read
    between, however long ago it has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.departures = Departures()
        self.connections: list[Connection] = []
        self.events: list[tuple[Callable[..., None], int]] = []
        self.heard: set[bytes] = set()  # who is not told to have left since

    @property
    def open(self) -> list[Connection]:
        return [each for each in self.connections if each.is_open]

    @property
    def unread(self) -> list[Connection]:
        return [each for each in self.connections if each.unread]

    @precondition(lambda self: len(self.open) < 2)
    @rule()
    def comes(self) -> None:
        descriptor = next(each for each in (9, 10) if each not in [one.descriptor for one in self.open])
        self.connections.append(Connection(descriptor, b"%d" % len(self.connections)))
        self.events.append((self.departures.came, descriptor))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def speaks(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.open)).unread += 1

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from(self.open)))

    @precondition(lambda self: self.unread)
    @rule(data=st.data())
    def is_read(self, data: st.DataObject) -> None:
        self._read(data.draw(st.sampled_from(self.unread)))

    def teardown(self) -> None:
        for connection in self.open:
            self._end(connection)
        for connection in self.unread:
            while connection.unread:
                self._read(connection)
        self.look()
        assert self.heard == set()
        assert not self.departures._places
        assert not any(number.clients for number in self.departures._numbers.values())

    def _end(self, connection: Connection) -> None:
        connection.is_open = False
        self.events.append((self.departures.ended, connection.descriptor))

    def _read(self, connection: Connection) -> None:
        connection.unread -= 1
        self.departures.heard(connection.client, connection.descriptor)
        self.heard.add(connection.client)
        assert self.departures.knows(connection.client)

    @rule()
    def look(self) -> None:
        for tell, descriptor in self.events:
            tell(descriptor, local=True)
        self.events.clear()
        self.departures.settle()
        left = self.departures.take()
        assert len(left) == len(set(left))
        assert not {each.client for each in self.open} & set(left)
        self.heard -= set(left)


TestConnections = Connections.TestCase


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
    assert here.departures._places == {}
    assert not any(number.clients for number in here.departures._numbers.values())


def test_the_end_of_a_local_connection_may_be_told_when_a_remote_one_has_its_number() -> None:
    departures, remote = Departures(), FROM_AFAR + b"b"
    departures.came(30, local=True)
    departures.heard(b"a", 30)
    departures.settle()
    departures.came(30, local=False)
    departures.heard(remote, 30)
    departures.settle()
    assert departures.take() == []
    departures.ended(30, local=True)
    departures.settle()
    assert departures.take() == [b"a"]
    assert departures.connection(remote) == (30, 1)
    departures.ended(30, local=False)
    departures.settle()
    assert departures.take() == [], "it may come back"
    assert departures.connection(remote) is None
    assert not departures.knows(remote)


@pytest.mark.parametrize("transport", ["ipc"])
def test_who_comes_and_goes_waits_for_messages_that_are_left(here) -> None:
    strangers = [socket.socket(socket.AF_UNIX) for _ in range(FEW + 8)]
    for stranger in strangers:
        stranger.connect(here.endpoint.removeprefix("ipc://"))
        assert stranger.recv(1), "ZeroMQ tells of a connection before it greets"
    here.gate.receive(here.gate.sockets, behind=["ipc"])
    assert here.gate.connections == FEW
    here.gate.receive(here.gate.sockets, behind=[])
    assert here.gate.connections == len(strangers)
    for stranger in strangers:
        stranger.close()


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
