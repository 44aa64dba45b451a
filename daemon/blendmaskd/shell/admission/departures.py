"""Departures: which clients of this host have left, so that no device works for them.

A ROUTER does not tell that a peer has disconnected; a message to it fails, but by then its job is done. ZeroMQ's
monitor tells of a connection that ended by its descriptor, and each message of the descriptor that it came by. A
connection by ipc never ends but with its client; one by tcp may come back, and is left alone.

A descriptor's number may be taken anew at once: what a client said in the turn before its number was told to have ended
may have come by the new one. Such a client is left alone too: the first answer that cannot reach it tells the same.
"""
from __future__ import annotations

from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

MONITOR_ENDPOINT = "inproc://clients.departures"


@dataclass(slots=True)
class Heard:
    """Of a connection: who said something there last, and in which turn."""

    client: bytes
    turn: int


class Departures:
    """`socket` is readable when somebody may have left. To be made before the router is bound."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes]) -> None:
        router.monitor(MONITOR_ENDPOINT, zmq.EVENT_DISCONNECTED)
        self.socket = context.socket(zmq.PAIR)
        self.socket.set(zmq.RCVHWM, 0)  # at a mark ZeroMQ's thread would wait for us
        self.socket.connect(MONITOR_ENDPOINT)
        self._heard: dict[int, Heard] = {}  # by descriptor
        self._descriptors: dict[bytes, int] = {}  # by client, the last one
        self._turn = 0

    def heard(self, client: bytes, frame: zmq.Frame) -> None:
        """A client said something: a frame of its message."""
        try:
            descriptor = int(frame.get(zmq.SRCFD))
        except zmq.ZMQError:  # of a peer that speaks ZMTP 1 or 2 nothing is known
            return
        last = self._heard.get(descriptor)
        if last is not None and last.client == client:
            last.turn = self._turn
            return
        if last is not None and self._descriptors.get(last.client) == descriptor:
            del self._descriptors[last.client]  # it said this after its end was told
        self._heard[descriptor] = Heard(client, self._turn)
        self._descriptors[client] = descriptor

    def take(self) -> list[bytes]:
        """Who has left since the last call; to be called in each turn, before any client is heard."""
        left: list[bytes] = []
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            event = parse_monitor_message(self.socket.recv_multipart())
            last = self._heard.pop(event["value"], None)
            if last is None or self._descriptors.get(last.client) != event["value"]:
                continue
            del self._descriptors[last.client]
            if last.turn < self._turn and event["endpoint"].startswith(b"ipc"):
                left.append(last.client)
        self._turn += 1
        return left
