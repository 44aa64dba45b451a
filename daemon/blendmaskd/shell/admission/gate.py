"""The daemon's TCP endpoints: who may connect, and how many.

Who: ZeroMQ asks over an inproc socket (ZAP, rfc.zeromq.org/spec/27) about each client that has proved to own its key;
the serving loop answers from the folder of allowed keys. A client without CURVE, or with another server key, fails
before that. How many: accepted connections are counted by the events that ZeroMQ tells of its socket. Over the bound
the oldest connection that has not said anything yet is closed, else the new one: so a crowd of strangers, who cannot
say anything, never keeps a client out for longer than its handshake, or uses up the daemon's descriptors for longer
than a turn of its loop. ZeroMQ has no such bound, and at the limit of descriptors its thread turns in circles.

What is said after the handshake is judged in `blendmaskd.shell.admission.access`. Nothing here waits.
"""
from __future__ import annotations

import contextlib
import os
import resource
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from blendmaskd.keys import Pair
from blendmaskd.shell.admission.access import LOCAL, AllowedKeys, Change

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"blendmaskd"
MONITOR_ENDPOINT = "inproc://clients.monitor"
HANDSHAKE_MS = 5000  # then a connection that has not proved who it is is closed
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 15_000, 30_000  # a client whose host is gone is known to be
WAITING_MESSAGES = 32  # of one connection, that ZeroMQ takes in before the loop does; then TCP slows the client down
BACKLOG = 512
AT_ONCE = 256  # events and questions per turn

Event = zmq.Event
_EVENTS = (
    Event.ACCEPTED | Event.DISCONNECTED
    | Event.HANDSHAKE_FAILED_NO_DETAIL | Event.HANDSHAKE_FAILED_PROTOCOL | Event.HANDSHAKE_FAILED_AUTH
)  # fmt: skip
_FAILURES = {
    Event.HANDSHAKE_FAILED_NO_DETAIL: "sent nothing in time or disconnected",
    Event.HANDSHAKE_FAILED_PROTOCOL: "did not use CURVE or had another server key",
    Event.HANDSHAKE_FAILED_AUTH: "had a key that is not allowed",
}


class Gate:
    """Opened before the first TCP endpoint is bound; poll `sockets`, and call `receive` before reading the clients'."""

    def __init__(
        self, context: zmq.Context[Any], router: zmq.Socket[bytes], allowed: AllowedKeys | None, most: int
    ) -> None:
        """`allowed`: None for endpoints without CURVE. `most`: connections, at most half of the descriptors left."""
        left = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd"))
        self.most = max(min(most, left // 2), 1)
        self.refused: Counter[str] = Counter()  # by reason, since `take_refused`
        self._nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._spare = os.dup(self._nothing)  # to close connections with when there are no descriptors left
        self._changes: list[Change] = []
        self._allowed = allowed
        self._router = router
        self._ports: set[int] = set()
        self._connections: dict[int, bool] = {}  # by descriptor, oldest first: has it said anything?
        router.monitor(MONITOR_ENDPOINT, _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.set(zmq.RCVHWM, 0)  # at a mark ZeroMQ's thread would wait for us
        self._monitor.connect(MONITOR_ENDPOINT)
        self.sockets = [self._monitor]
        if allowed is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.bind(ZAP_ENDPOINT)  # before the endpoints are: without it ZeroMQ lets everybody in
            self.sockets.append(self._zap)

    def bind(self, endpoint: str, keys: Pair | None) -> None:
        """Listen. Options are those of the endpoints that are bound from here on. Raises ZMQError."""
        router = self._router
        router.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        router.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        router.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        router.set(zmq.BACKLOG, BACKLOG)
        router.set(zmq.RCVHWM, WAITING_MESSAGES)
        if keys is not None:
            router.set(zmq.CURVE_SERVER, 1)
            router.set(zmq.CURVE_SECRETKEY, keys.secret)
            router.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        router.bind(endpoint)
        bound = str(router.get_string(zmq.LAST_ENDPOINT))  # with the port that tcp://HOST:* got
        self._ports.add(int(bound.rpartition(":")[2]))

    @property
    def connections(self) -> int:
        return len(self._connections)

    def receive(self) -> None:
        """Take in who came and went, and answer who may stay."""
        for _ in range(AT_ONCE):
            if not int(self._monitor.get(zmq.EVENTS)) & zmq.POLLIN:
                break
            event = parse_monitor_message(self._monitor.recv_multipart())
            if event["endpoint"].startswith(b"tcp"):
                self._on_event(Event(event["event"]), event["value"])
        for _ in range(AT_ONCE if self._allowed is not None else 0):
            if not int(self._zap.get(zmq.EVENTS)) & zmq.POLLIN:
                break
            self._zap.send_multipart(self._answer(self._zap.recv_multipart()))

    def user(self, frame: zmq.Frame) -> str:
        """Who sent this frame: a key, as Z85 text, or `LOCAL`. The connection counts as one of a client from here on.

        The peer's address is the kernel's word and comes first: a peer may claim any other property.
        """
        try:
            address = str(frame.get("Peer-Address"))
        except zmq.ZMQError:  # of a peer that speaks ZMTP 1 or 2 nothing is known: where keys are needed it has none
            return LOCAL if self._allowed is None else ""
        if address.startswith("localhost:"):  # of ipc: then uid, gid, pid; TCP's are numeric
            return LOCAL
        descriptor = int(frame.get(zmq.SRCFD))
        if descriptor in self._connections:
            self._connections[descriptor] = True
        return str(frame.get("User-Id")) if self._allowed is not None else LOCAL

    def close(self, frame: zmq.Frame) -> None:
        """Close the connection that this frame came over."""
        with contextlib.suppress(zmq.ZMQError):  # of ZMTP 1 and 2 nothing is known
            self._close(int(frame.get(zmq.SRCFD)))

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

    def _on_event(self, event: Event, value: int) -> None:
        if event is Event.ACCEPTED:
            self._connections[value] = False
            if len(self._connections) > self.most:
                self.refused["were too many at once"] += 1
                self._close(next((old for old, spoke in self._connections.items() if not spoke), value))
        elif event is Event.DISCONNECTED:
            self._connections.pop(value, None)
        else:
            self.refused[_FAILURES[event]] += 1

    def _close(self, descriptor: int) -> None:
        """End a connection of ZeroMQ's, which finds it at its end then.

        Through a copy: ZeroMQ may have closed this one and given its number to something else, which the port shows;
        another connection to this port may well be closed, its client comes again.
        """
        self._connections.pop(descriptor, None)
        try:
            os.dup2(descriptor, self._spare, inheritable=False)
            connection = socket.socket(fileno=self._spare)
        except OSError:  # closed, or no socket any more
            pass
        else:
            inet = connection.family in (socket.AF_INET, socket.AF_INET6)
            with contextlib.suppress(OSError):  # its peer has closed it
                if inet and connection.getsockname()[1] in self._ports:
                    connection.shutdown(socket.SHUT_RDWR)
            connection.detach()
        os.dup2(self._nothing, self._spare, inheritable=False)

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
