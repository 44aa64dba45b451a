"""Clients of all kinds, in one thread: good ones in a closed loop, and those that the faults ask for.

Good clients are half by socket and half by shared memory, each with images of another size, and two in flight. Every
answer goes into the ledger; a result's checksum must be its image's, and what a bad image is answered is known.
"""
from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgpack
import zmq

from blendmaskd import protocol
from blendmaskd.client.connection import Transport
from blendmaskd.protocol import TO_CLIENT, Code, Failed, Options, Result, Stats
from blendmaskd_workers.benchmark.load_socket import NAME_BYTES, LoadSocket, Sending
from blendmaskd_workers.benchmark.pictures import Picture, synthetic
from chaos.ledger import RESULT, Ledger
from chaos.poison import Poison

SIZES = ((48, 64), (240, 320), (480, 640), (800, 800))
IN_FLIGHT = 2
REFUSED_PAUSE_S = 0.2  # a client that is refused does not become a flood
LOST_AFTER_DEADLINES = 1.5  # no answer for so long: it is lost, for the daemon's own `timeout` is overdue
VANISHING, MUTE, FLOOD = 30, 2000, 400  # jobs
TOLERATED = {Code.BUSY, Code.TIMEOUT, Code.UNAVAILABLE, Code.WORKER_LOST}  # of a good image, among random deaths

POISONS = {"crash": Poison.CRASHES_DECODING, "poison": Poison.KILLS, "exit": Poison.EXITS,
           "raise": Poison.RAISES, "hang": Poison.HANGS}  # fmt: skip
GOOD = [synthetic(size, "raw") for size in SIZES]
BAD = {kind: synthetic((48, width), "raw") for kind, width in POISONS.items()}
BAD["bad-image"] = Picture(protocol.Image(kind="encoded"), b"these bytes are no image", 0)
PICTURES = [*GOOD, *BAD.values()]
EXPECTED = {"raise": Code.ENGINE_FAILED, "bad-image": Code.BAD_IMAGE}  # by bad images that kill nobody


@dataclass(slots=True)
class Party:
    """One client. `reads`: it takes its answers; `leaves_at`: when it goes, whatever it is owed."""

    connection: LoadSocket
    picture: int = 0
    closed_loop: bool = False
    reads: bool = True
    leaves_at: float = float("inf")
    pause_until: float = 0.0
    jobs: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Sent:
    """A job without an answer."""

    party: Party
    picture: int
    place: protocol.Place | None


class Clients:
    """Loads `endpoint`; use it as ``with``. `stats` is the last snapshot that came, `seconds` results by second."""

    def __init__(self, endpoint: str, number: int, seed: int, deadline_s: float) -> None:
        self.ledger = Ledger()
        self.stats: dict[str, Any] = {}
        self.seconds: Counter[int] = Counter()
        self.submitting = True
        self.lost_s = deadline_s * LOST_AFTER_DEADLINES
        self._endpoint = endpoint
        self._number = number
        self._deadline_s = deadline_s
        self._chance = random.Random(seed)
        self._names = itertools.count(1)
        self._sent: dict[str, Sent] = {}
        self._parties: dict[zmq.Socket[bytes], Party] = {}

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._control = self._socket()
        self._poller.register(self._control, zmq.POLLIN)
        for number in range(self._number):
            party = self._join("auto" if number % 2 else "socket")
            party.closed_loop, party.picture = True, number % len(GOOD)
        self._villain = self._join("socket")
        return self

    def __exit__(self, *_: object) -> None:
        for party in self._parties.values():
            party.connection.close()
        self._context.destroy(linger=0)

    @property
    def settled(self) -> bool:
        """Whether nothing is owed any more that may still come."""
        return self.ledger.overdue(time.monotonic(), self.lost_s) == self.ledger.owed

    def turn(self, seconds: float) -> None:
        """Send what is due, and receive for so long."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for party in list(self._parties.values()):
                self._move(party, now)
            for socket, _ in self._poller.poll(max(1, min(int((end - now) * 1000), 50))):
                self._receive(socket)

    def ask_stats(self) -> None:
        """The answer will be in `stats`."""
        self._control.send_multipart(protocol.encode(protocol.GetStats()))

    def misbehave(self, kind: str, now: float) -> None:
        """Do what this fault of a client or of an image is."""
        if kind in BAD:
            self._submit(self._villain, len(GOOD) + list(BAD).index(kind), now)
            return
        number = {"vanish": VANISHING, "mute": MUTE, "flood": FLOOD}[kind]
        party = self._join("socket", receives=2 if kind == "mute" else 0)
        party.reads = kind != "mute"
        party.leaves_at = {"vanish": now + self._chance.uniform(0, 0.3), "mute": now + 3, "flood": float("inf")}[kind]
        for _ in range(number):
            self._submit(party, 0, now)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _socket(self, receives: int = 0) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, receives)
        socket.set(zmq.LINGER, 0)
        socket.connect(self._endpoint)
        return socket

    def _join(self, transport: Transport, receives: int = 0) -> Party:
        sending = Sending(transport, Options(mask_format="none"), self._deadline_s, IN_FLIGHT + 1)
        connection = LoadSocket(self._socket(receives), PICTURES, sending)
        connection.open_region(self._endpoint)
        party = self._parties[connection.socket] = Party(connection)
        if receives == 0:
            self._poller.register(connection.socket, zmq.POLLIN)
        return party

    def _move(self, party: Party, now: float) -> None:
        if now >= party.leaves_at:
            self._leave(party)
        elif party.closed_loop and self.submitting and now >= party.pause_until:
            while len(party.jobs) < IN_FLIGHT:
                self._submit(party, party.picture, now)
        elif not party.closed_loop and party is not self._villain and party.reads and not party.jobs:
            self._leave(party)  # a flood that is over

    def _submit(self, party: Party, picture: int, now: float) -> None:
        name = f"{next(self._names):0{NAME_BYTES}}"
        sent, place = party.connection.send(name, picture)
        assert sent, "a closed loop needs no more places than it has"
        self.ledger.submit(name, now)
        party.jobs.add(name)
        self._sent[name] = Sent(party, picture, place)

    def _leave(self, party: Party) -> None:
        for name in party.jobs:
            self.ledger.abandon(name)
            self._sent.pop(name, None)
        socket = party.connection.socket
        if party.reads:
            self._poller.unregister(socket)
        del self._parties[socket]
        socket.close()
        party.connection.close()

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            message: protocol.ToClient
            message, payload = protocol.decode(frames, TO_CLIENT)
            match message:
                case Stats():
                    self.stats = message.stats
                case Result() | Failed():
                    self._answered(message, payload, time.monotonic())

    def _answered(self, message: Result | Failed, payload: Sequence[bytes], now: float) -> None:
        code = RESULT if isinstance(message, Result) else str(message.code)
        sent = self._sent.pop(message.job, None)
        if sent is None:
            self.ledger.answer(message.job, code)
            return
        self.ledger.answer(message.job, code, _complaint(sent.picture, message, payload))
        party = sent.party
        party.jobs.discard(message.job)
        if sent.place is not None and party.connection.region is not None:
            party.connection.region.give_back(sent.place)
        if isinstance(message, Result):
            self.seconds[int(now)] += 1
        else:
            party.pause_until = now + REFUSED_PAUSE_S


def _complaint(picture: int, message: Result | Failed, payload: Sequence[bytes]) -> str:
    """Why this is no answer to a job of that picture; empty: it is one."""
    kind = None if picture < len(GOOD) else list(BAD)[picture - len(GOOD)]
    if isinstance(message, Failed):
        told = f"{kind or 'a good image'} was answered {message.code}: {message.reason}"
        return "" if message.code in (*TOLERATED, EXPECTED.get(kind or "")) else told
    if kind is not None:
        return f"{kind} has a result"
    checksums = [found["checksum"] for found in msgpack.unpackb(payload[0])]
    return "" if checksums == [PICTURES[picture].checksum] else "the result is another image's"
