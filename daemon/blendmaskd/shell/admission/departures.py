"""Departures: which clients of this host have left, so that no device works for them.

A ROUTER does not tell that a peer has disconnected; a message to it fails, but by then its job is done. ZeroMQ's
monitor tells of connections that come and end, by their descriptors, and each message of the descriptor that it came
by. A connection by ipc never ends but with its client; one by tcp may come back, and is left alone.

A descriptor's number may be taken anew at once, and a message may be read when its connection has long ended. So the
connections that have a number are counted: once all is known that ZeroMQ had told before a client was heard, its own is
one of those that have come by then, and has ended when all of those have. Where another comes between a client's last
message and the next look, the client is known to have left only when that one has.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from blendmaskd.shell.admission.access import FROM_AFAR

Place = tuple[int, bool]  # descriptor, and whether it is of a local connection: the ends of both kinds have no order


@dataclass(slots=True)
class Number:
    """The connections that have had a descriptor, one after the other."""

    came: int = 1
    open: bool = True  # the last of them
    clients: dict[bytes, int] = field(default_factory=dict)  # of which connection each was at the latest


class Departures:
    """Fed by `blendmaskd.shell.admission.gate`, which hears of connections."""

    def __init__(self) -> None:
        self._heard: dict[bytes, Place] = {}  # since all was known
        self._places: dict[bytes, Place] = {}  # where each client spoke last
        self._numbers: dict[Place, Number] = {}
        self._changed: set[Place] = set()
        self._left: list[bytes] = []

    def heard(self, client: bytes, descriptor: int) -> None:
        """A client said something over this connection."""
        self._heard[client] = descriptor, not client.startswith(FROM_AFAR)

    def spoke(self, descriptor: int, *, local: bool) -> bool:
        """Whether something was heard from there since all was known: the connection came before that."""
        return (descriptor, local) in self._heard.values()

    def knows(self, client: bytes) -> bool:
        """Whether it has said something, and is not known to have left."""
        return client in self._heard or client in self._places

    def connection(self, client: bytes) -> tuple[int, int] | None:
        """The open connection that has the descriptor by which this client spoke last: that, and how many had it."""
        place = self._heard.get(client) or self._places.get(client)
        number = self._numbers.get(place) if place is not None else None
        return (place[0], number.came) if place is not None and number is not None and number.open else None

    def came(self, descriptor: int, *, local: bool) -> None:
        """A connection has come: whoever had its number before has gone, which ZeroMQ does not always tell."""
        place = descriptor, local
        if place in self._numbers:
            self._numbers[place].came += 1
            self._numbers[place].open = True
            self._changed.add(place)
        else:
            self._numbers[place] = Number()

    def ended(self, descriptor: int, *, local: bool) -> None:
        """A connection has ended."""
        place = descriptor, local
        if place in self._numbers:
            self._numbers[place].open = False
            self._changed.add(place)

    def settle(self) -> None:
        """All is known that was told before any client was heard."""
        for client, place in self._heard.items():
            self._place(client, place)
        self._heard.clear()
        for place in self._changed:
            self._look(self._numbers[place])
        self._changed.clear()

    def take(self) -> list[bytes]:
        """Who has left since the last call."""
        left, self._left = self._left, []
        return left

    def _place(self, client: bytes, place: Place) -> None:
        before = self._places.get(client)
        if before is not None and before != place:
            del self._numbers[before].clients[client]
        number = self._numbers.setdefault(place, Number())  # it speaks, so it has come
        number.clients[client] = number.came
        self._places[client] = place
        if not number.open:
            self._changed.add(place)

    def _look(self, number: Number) -> None:
        ended = number.came - number.open
        for client in [client for client, latest in number.clients.items() if latest <= ended]:
            del number.clients[client], self._places[client]
            if not client.startswith(FROM_AFAR):
                self._left.append(client)
