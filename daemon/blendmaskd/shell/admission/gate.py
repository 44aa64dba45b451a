"""The clients' connections: how many there may be, and who may connect by TCP.

Who: ZeroMQ asks over an inproc socket (ZAP, rfc.zeromq.org/spec/27) about each client that has proved to own its key;
the serving loop answers from the folder of allowed keys. A client without CURVE, or with another server key, fails
before that; what it sends until then the kernel counts, as ZeroMQ would keep all of it. How many: accepted connections
are counted by the events that ZeroMQ tells of its socket. Over the bound the oldest connection of its kind, local or
TCP, that has not said anything yet is closed, else the new one: so a crowd of strangers, who cannot say anything, never
keeps a client out for longer than its handshake, or uses up the daemon's descriptors for longer than a turn of its
loop. ZeroMQ has no such bound: at the limit of descriptors its thread turns in circles, and for a local connection it
aborts the process. So its thread waits for us when too many events are unread: whatever the speed of a crowd, a bounded
number of connections is not counted yet.

What is said after the handshake is judged in `blendmaskd.shell.admission.access`. Nothing here waits.
"""
from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils import z85

from blendmaskd.endpoints import parse_place, place
from blendmaskd.keys import Pair
from blendmaskd.shell.addresses import address
from blendmaskd.shell.admission.access import LOCAL, AllowedKeys, Change
from blendmaskd.shell.admission.departures import Departures

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"blendmaskd"
LOCAL_HOST = "localhost"  # where ZeroMQ sees a peer by ipc, before its uid, gid and pid
LOCAL_PREFIX = f"{LOCAL_HOST}:"
HANDSHAKE_MS = 5000  # then a connection that has not proved who it is is closed
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 15_000, 30_000  # a client whose host is gone is known to be
WAITING_MESSAGES = 32  # of one connection, that ZeroMQ takes in before the loop does; then TCP slows the client down
BACKLOG = 512
LOOK_S = 0.02  # between two looks at what those have sent who have not proved their key
STRANGER_BYTES = 64 << 10  # that they may send; a handshake has less than one
WELCOMED_BYTES = 256  # of ours that they have: greeting and WELCOME are fewer; READY, for a proved key, is beyond
_TCP_INFO = struct.Struct("=120xQQ")  # of linux/tcp.h: tcpi_bytes_acked, tcpi_bytes_received
AT_ONCE = 1024  # events and questions per turn: all that there are, mostly
FEW = 32  # events, while there are messages to be read
POLLIN, NOBLOCK, SRCFD = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SRCFD)

ACCEPTED, DISCONNECTED = int(zmq.EVENT_ACCEPTED), int(zmq.EVENT_DISCONNECTED)
FAILURES = {
    int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL): "sent nothing in time or disconnected",
    int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL): "did not use CURVE or had another server key",
    int(zmq.EVENT_HANDSHAKE_FAILED_AUTH): "had a key that is not allowed",
}
_EVENT = struct.Struct("=hi")  # zmq_socket_monitor(3): the event, and its value, of those that come and go a descriptor


@dataclass(slots=True)
class Crowd:
    """Connections of one kind, by descriptor."""

    most: int
    open: set[int] = field(default_factory=set)
    silent: dict[int, None] = field(default_factory=dict)  # that have not said anything yet, oldest first


class Gate:
    """To be made before any endpoint of the clients is bound; in each turn poll `sockets` with the clients', and call
    `receive` before these are read.

    `departures` tells who has left.
    """

    def __init__(
        self, context: zmq.Context[Any], routers: Mapping[str, zmq.Socket[bytes]], allowed: AllowedKeys | None,
        most: int, most_tcp: int,
    ) -> None:  # fmt: skip
        """`routers`: by kind of endpoint, `ipc` and perhaps `tcp`. `allowed`: None for endpoints without CURVE.

        `most`: connections in all, `most_tcp`: by TCP.
        """
        self.most = most
        self.departures = Departures()
        self.refused: Counter[str] = Counter()  # by reason, since `take_refused`
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._spare = os.dup(self._nothing)  # to close connections with when there are no descriptors left
        self._changes: list[Change] = []
        self._strangers: dict[int, float] = {}  # descriptors that came lately, and may not have proved their key
        self._allowed = allowed
        self._routers = routers
        self._here: set[int | str] = set()  # ports and paths that are listened to
        self._crowds = {"ipc": Crowd(most), "tcp": Crowd(most_tcp)}
        self._monitors = {kind: _monitor(context, router, kind) for kind, router in routers.items()}
        self.sockets = list(self._monitors.values())
        if allowed is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.bind(ZAP_ENDPOINT)  # before the endpoints are: without it ZeroMQ lets everybody in
            self.sockets.append(self._zap)

    def bind_local(self, listener: socket.socket) -> None:
        """Take over a socket that listens at a path. Raises ZMQError."""
        path = str(listener.getsockname())
        router = self._routers["ipc"]
        router.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        router.set(zmq.USE_FD, listener.fileno())  # binding by itself, ZeroMQ would remove what is there
        router.bind(f"ipc://{path}")
        router.set(zmq.USE_FD, -1)
        listener.detach()
        self._here.add(path)

    def bind(self, endpoint: str, keys: Pair | None) -> None:
        """Listen. Raises ZMQError and OSError."""
        router = self._routers["tcp"]
        host, port = parse_place(endpoint.removeprefix("tcp://"))
        host = address(host)  # ZeroMQ asks no resolver for where it listens
        router.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        router.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        router.set(zmq.BACKLOG, BACKLOG)
        router.set(zmq.RCVHWM, WAITING_MESSAGES)
        if keys is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_SECRETKEY, keys.secret)
            router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        router.set(zmq.IPV6, ":" in host)
        router.bind(f"tcp://{place(host, port)}")
        bound = str(router.get_string(zmq.LAST_ENDPOINT))  # with the port that tcp://HOST:* got
        self._here.add(int(bound.rpartition(":")[2]))

    @property
    def connections(self) -> int:
        return sum(len(crowd.open) for crowd in self._crowds.values())

    def receive(self, readable: Container[object], behind: Container[str]) -> None:
        """Take in who came and went, and answer who may stay. `readable`: those of `sockets` that can be read.

        `behind`: kinds of clients of which messages are left to be read. Those who come and go faster than that wait
        then until their messages are read, as ZeroMQ's thread waits for us.
        """
        kinds = [kind for kind, monitor in self._monitors.items() if monitor in readable]
        known = [self._take_events(kind, FEW if kind in behind else AT_ONCE) for kind in kinds]
        if all(known):
            self.departures.settle()
        if self._allowed is not None and self._zap in readable:
            self._answer_questions()
        if self._strangers:
            self._look_at_strangers(time.monotonic())

    def next_look(self, now: float) -> float:
        """When `receive` is to be called, even if nothing is told."""
        return now + LOOK_S if self._strangers else math.inf

    def heard(self, client: bytes, frame: zmq.Frame) -> bool:
        """A client said this: its connection counts as one of a client from here on. False: it is not known by which
        connection it came, so that nobody could close that."""
        try:
            descriptor = int(frame.get(SRCFD))
        except zmq.ZMQError:  # of a peer that speaks ZMTP 1 or 2 nothing is known
            return False
        self._strangers.pop(descriptor, None)
        for crowd in self._crowds.values():
            crowd.silent.pop(descriptor, None)
        self.departures.heard(client, descriptor)
        return True

    def user(self, frame: zmq.Frame) -> bytes:
        """Who runs the client that sent this: a user of this host, or whoever has a key, or is at an address."""
        try:
            address = str(frame.get("Peer-Address"))
        except zmq.ZMQError:
            return b""
        if self._allowed is None or address.startswith(LOCAL_PREFIX):
            return _user_at(address)
        return str(frame.get("User-Id")).encode()

    def key(self, frame: zmq.Frame) -> str:
        """Who sent this frame, where keys are needed: a key, as Z85 text, or `LOCAL`.

        The peer's address is the kernel's word and comes first: a peer may claim any other property.
        """
        try:
            address = str(frame.get("Peer-Address"))
        except zmq.ZMQError:  # of a peer that speaks ZMTP 1 or 2 nothing is known: it has no key
            return ""
        return LOCAL if address.startswith(LOCAL_PREFIX) else str(frame.get("User-Id"))

    def is_operator(self, frame: zmq.Frame) -> bool:
        """Whether this came from a process of the daemon's own user, or of root, on this host."""
        try:
            where, *ids = str(frame.get("Peer-Address")).split(":")
        except zmq.ZMQError:
            return False
        return where == LOCAL_HOST and bool(ids) and ids[0] in ("0", str(os.geteuid()))

    def close(self, frame: zmq.Frame) -> None:
        """Close the connection that this frame came over, unless it has ended."""
        self._catch_up()  # its number may be another's by now
        with contextlib.suppress(zmq.ZMQError):  # of ZMTP 1 and 2 nothing is known
            self._close(int(frame.get(zmq.SRCFD)), str(frame.get("Peer-Address")))

    def cut_off(self, client: bytes) -> None:
        """Close the connection of a client that was there just now, unless it has ended."""
        connection = self.departures.connection(client)
        self._catch_up()
        if connection is not None and connection == self.departures.connection(client):
            self._close(connection[0])

    def refresh(self) -> None:
        """Look whether keys have come or gone."""
        if self._allowed is not None and any(change := self._allowed.refresh()):
            self._changes.append(change)

    def take_changes(self) -> list[Change]:
        """What `refresh` has found since this was asked last."""
        changes, self._changes = self._changes, []
        return changes

    def end(self) -> None:
        """Give back what ZeroMQ's context does not."""
        os.close(self._spare)
        os.close(self._nothing)

    def take_refused(self) -> str:
        """A line about those who were turned away since the last one; empty: nobody was."""
        line = ", ".join(f"{number} {reason}" for reason, number in self.refused.items())
        self.refused.clear()
        return line

    def _catch_up(self) -> None:
        for kind in self._monitors:
            self._take_events(kind, AT_ONCE)

    def _take_events(self, kind: str, most: int) -> bool:
        """Returns whether these are all."""
        monitor = self._monitors[kind]
        for _ in range(most):
            try:
                event, descriptor = _EVENT.unpack(monitor.recv(NOBLOCK))
            except zmq.Again:
                return True
            monitor.recv(NOBLOCK)  # where it listens
            self._on_event(event, descriptor, kind)
        return False

    def _on_event(self, event: int, descriptor: int, kind: str) -> None:
        if event == ACCEPTED:
            self._accepted(descriptor, kind)
            if kind == "tcp" and self._allowed is not None:
                self._strangers[descriptor] = time.monotonic()
        elif event == DISCONNECTED:
            self._forget(descriptor, kind)
            self.departures.ended(descriptor, local=kind == "ipc")
        elif kind == "tcp":
            self.refused[FAILURES[event]] += 1

    def _accepted(self, descriptor: int, kind: str) -> None:
        crowd, local = self._crowds[kind], kind == "ipc"
        crowd.open.add(descriptor)
        self.departures.came(descriptor, local=local)
        if not self.departures.spoke(descriptor, local=local):
            crowd.silent[descriptor] = None
        if len(crowd.open) > crowd.most or self.connections > self.most:
            self.refused["were too many at once"] += 1
            self._close(next(iter(crowd.silent), descriptor))

    def _look_at_strangers(self, now: float) -> None:
        """ZeroMQ takes a handshake of any size that a message may have."""
        for descriptor, came in list(self._strangers.items()):
            welcomed, sent = _exchanged(descriptor)
            if sent > STRANGER_BYTES and welcomed < WELCOMED_BYTES:
                self.refused["sent too much without a key"] += 1
                self._close(descriptor)
            elif welcomed >= WELCOMED_BYTES or now - came > HANDSHAKE_MS / 1000:
                del self._strangers[descriptor]

    def _forget(self, descriptor: int, kind: str) -> None:
        if kind == "tcp":
            self._strangers.pop(descriptor, None)
        self._crowds[kind].open.discard(descriptor)
        self._crowds[kind].silent.pop(descriptor, None)

    def _close(self, descriptor: int, peer: str = "") -> None:
        """End a connection of ZeroMQ's, which finds it at its end then; only one of this `Peer-Address`.

        Through a copy: ZeroMQ may have closed this one and given its number to something else, which its address shows,
        or to another connection. So none is closed twice, and none of another process in its place.
        """
        kind = next((kind for kind, crowd in self._crowds.items() if descriptor in crowd.open), None)
        if kind is None:
            return
        try:
            os.dup2(descriptor, self._spare, inheritable=False)
            connection = socket.socket(fileno=self._spare)
        except OSError:  # closed, or no socket any more
            self._forget(descriptor, kind)
        else:
            with contextlib.suppress(OSError):  # its peer has closed it
                if peer in ("", _peer_address(connection)):
                    self._forget(descriptor, kind)
                    self._shut_down(connection)
            connection.detach()
        os.dup2(self._nothing, self._spare, inheritable=False)

    def _shut_down(self, connection: socket.socket) -> None:
        name = connection.getsockname()
        if (name if connection.family == socket.AF_UNIX else name[1]) in self._here:
            connection.shutdown(socket.SHUT_RDWR)

    def _answer_questions(self) -> None:
        for _ in range(AT_ONCE):
            if not int(self._zap.get(zmq.EVENTS)) & POLLIN:
                return
            self._zap.send_multipart(self._answer(self._zap.recv_multipart()))

    def _answer(self, question: Sequence[bytes]) -> list[bytes]:
        """ZAP's reply: version, request, status, text, user, metadata. ZeroMQ asks in frames of the same version."""
        assert self._allowed is not None
        _, request, domain, _, _, mechanism, *credentials = question
        user = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and domain == ZAP_DOMAIN else ""
        if user not in self._allowed.names:
            self.refresh()  # it may have come just now
        if user in self._allowed.names:
            return [b"1.0", request, b"200", b"OK", user.encode(), b""]
        return [b"1.0", request, b"400", b"key not allowed", b"", b""]


@functools.lru_cache(maxsize=1024)
def _user_at(address: str) -> bytes:
    return f"uid {address.split(':')[1]}".encode() if address.startswith(LOCAL_PREFIX) else address.encode()


def _peer_address(connection: socket.socket) -> str:
    """As ZeroMQ writes it. Raises OSError."""
    if connection.family != socket.AF_UNIX:
        return str(connection.getpeername()[0])
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return f"{LOCAL_HOST}:{uid}:{gid}:{pid}"


def _monitor(context: zmq.Context[Any], router: zmq.Socket[bytes], kind: str) -> zmq.Socket[bytes]:
    """A socket that tells of a router's connections."""
    endpoint = f"inproc://{kind}.monitor"
    router.monitor(endpoint, ACCEPTED | DISCONNECTED | sum(FAILURES))
    monitor: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    monitor.set(zmq.RCVHWM, 1)  # with ZeroMQ's own thousand; at the mark its thread accepts nobody any more
    monitor.connect(endpoint)
    return monitor


def _exchanged(descriptor: int) -> tuple[int, int]:
    """Bytes that a TCP connection's peer has of ours, and has sent; of what is none (any more), nothing."""
    try:
        connection = socket.socket(fileno=descriptor)
    except OSError:
        return 0, 0
    try:
        welcomed, sent = _TCP_INFO.unpack(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except (OSError, struct.error):
        return 0, 0
    finally:
        connection.detach()
    return welcomed, sent
