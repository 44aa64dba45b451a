"""Departures: which clients of this host have left, so that no device works for them.

A ROUTER does not tell that a peer has disconnected; a message to it fails, but by then its job is done. ZeroMQ's
monitor tells of a connection that ended by its descriptor, and each message of the descriptor that it came by. A
connection by ipc never ends but with its client; one by tcp may come back, and is left alone.

A descriptor's number may be taken anew at once: what a client said just before its number is told to have ended may
have come by the new one. So it is looked whether the number is in use, once all is known that ZeroMQ had told until
then. Who spoke over a number that another has is left alone: the first answer that cannot reach it tells the same.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blendmaskd.shell.admission.access import FROM_AFAR


@dataclass(slots=True)
class Heard:
    """Of a connection: who said something there last, and how often all was known before."""

    client: bytes
    turn: int


class Departures:
    """Fed by `blendmaskd.shell.admission.gate`, which hears of connections."""

    def __init__(self) -> None:
        self._heard: dict[int, Heard] = {}  # by descriptor
        self._descriptors: dict[bytes, int] = {}  # by client, the last one
        self._left: list[bytes] = []
        self._unsure: dict[int, bytes] = {}  # ended numbers, and who spoke there just before
        self._turn = 0

    def heard(self, client: bytes, descriptor: int) -> None:
        """A client said something over this connection."""
        last = self._heard.get(descriptor)
        if last is not None and last.client == client:
            last.turn = self._turn
            return
        if last is not None and self._descriptors.get(last.client) == descriptor:
            del self._descriptors[last.client]  # one of the two spoke before its end, and is read after the other
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
        if last.turn < self._turn:
            self._gone(last.client)
        else:
            del self._descriptors[last.client]
            self._unsure[descriptor] = last.client

    def settle(self, is_open: Callable[[int], bool]) -> None:
        """All is known that was told before any client was heard: `is_open` says which numbers are in use."""
        for descriptor, client in self._unsure.items():
            if client in self._descriptors:
                continue
            self._descriptors[client] = descriptor
            if is_open(descriptor):
                self._heard.setdefault(descriptor, Heard(client, self._turn))
            else:
                self._gone(client)
        self._unsure.clear()
        self._turn += 1

    def _gone(self, client: bytes) -> None:
        del self._descriptors[client]
        if not client.startswith(FROM_AFAR):
            self._left.append(client)

    def take(self) -> list[bytes]:
        """Who has left since the last call."""
        left, self._left = self._left, []
        return left
