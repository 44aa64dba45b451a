"""Departures: which clients of this host have left, so that no device works for them.

A ROUTER does not tell that a peer has disconnected; a message to it fails, but by then its job is done. ZeroMQ's
monitor tells of a connection that ended by its descriptor, and each message of the descriptor that it came by. A
connection by ipc never ends but with its client; one by tcp may come back, and is left alone.

A descriptor's number may be taken anew at once: what a client said in the turn before its number was told to have ended
may have come by the new one. Such a client is left alone too: the first answer that cannot reach it tells the same.
"""
from __future__ import annotations

from dataclasses import dataclass

from blendmaskd.shell.admission.access import FROM_AFAR


@dataclass(slots=True)
class Heard:
    """Of a connection: who said something there last, and in which turn."""

    client: bytes
    turn: int


class Departures:
    """Fed by `blendmaskd.shell.admission.gate`, which hears of connections."""

    def __init__(self) -> None:
        self._heard: dict[int, Heard] = {}  # by descriptor
        self._descriptors: dict[bytes, int] = {}  # by client, the last one
        self._left: list[bytes] = []
        self._turn = 0

    def heard(self, client: bytes, descriptor: int) -> None:
        """A client said something over this connection."""
        last = self._heard.get(descriptor)
        if last is not None and last.client == client:
            last.turn = self._turn
            return
        if last is not None and self._descriptors.get(last.client) == descriptor:
            del self._descriptors[last.client]  # it said this after its end was told
        self._heard[descriptor] = Heard(client, self._turn)
        self._descriptors[client] = descriptor

    def knows(self, descriptor: int) -> bool:
        """Whether a client said something over this connection."""
        return descriptor in self._heard

    def descriptor(self, client: bytes) -> int | None:
        """Of the connection by which this client said something last; None: it has ended."""
        return self._descriptors.get(client)

    def ended(self, descriptor: int, *, local: bool) -> None:
        """A connection has ended. Ends of local and of remote ones are told in no order among each other."""
        last = self._heard.get(descriptor)
        if last is None or last.client.startswith(FROM_AFAR) is local:  # taken anew, by a client of the other kind
            return
        del self._heard[descriptor]
        if self._descriptors.get(last.client) != descriptor:
            return
        del self._descriptors[last.client]
        if last.turn < self._turn and local:
            self._left.append(last.client)

    def take(self) -> list[bytes]:
        """Who has left since the last call; to be called in each turn, before any client is heard."""
        left, self._left = self._left, []
        self._turn += 1
        return left
