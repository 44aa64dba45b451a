"""The generator: sends jobs as a schedule says, and notes what becomes of them. One thread, one poller.

Each client has a socket of its own, because that is what a client is to the daemon: an identity, a connection, a share
of the broker's attention. A `zmq.Poller` over eight of them costs 10 µs a turn, over 32 of them 30 µs. Nothing is
tried again: a failure is a failure.

It must stay light, because it runs beside what it measures, often on the same cores: submissions are encoded once (see
`load_socket.Template`), and an answer that equals one that was found right is not decoded again.
"""
from __future__ import annotations

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgpack
import zmq

from blendmaskd import protocol
from blendmaskd.client.connection import Keys, introduce
from blendmaskd.protocol import TO_CLIENT, Failed, GetStats, Place, Result, Stats
from blendmaskd_workers.benchmark.load import NO_ANSWER, Sample, Schedule
from blendmaskd_workers.benchmark.load_socket import NAME_BYTES, LoadSocket, Sending
from blendmaskd_workers.benchmark.pictures import Picture

GRACE_S = 1.0  # for the daemon's own `timeout` to arrive
NAP_S = 0.0002  # polls count in whole milliseconds; the last one before a send is spent in naps
TICK_S = 1.0


@dataclass(frozen=True, slots=True)
class InFlight:
    client: int
    picture: int
    intended: float
    sent: float
    place: Place | None


class Generator:
    """Loads `endpoint` with `pictures` in turn, from `clients` connections; use it as ``with``.

    `keys`: for a daemon that wants some. `samples` are the jobs that have ended. Times are of `time.monotonic`.
    Entering raises `UsageError` when the images must go by shared memory and cannot.
    """

    def __init__(
        self, endpoint: str, pictures: Sequence[Picture], clients: int, sending: Sending, keys: Keys | None = None
    ) -> None:
        self.samples: list[Sample] = []
        self.answer_bytes = 0  # of the last result
        self.checked = 0  # results that could be compared with their image
        self._endpoint = endpoint
        self._pictures = pictures
        self._sending = sending
        self._clients = clients
        self._keys = keys
        self._schedule: Schedule | None = None
        self._number = 0
        self._in_flight: dict[str, InFlight] = {}
        self._held: list[deque[float]] = [deque() for _ in range(clients)]  # no place for their images yet
        self._right = [b""] * len(pictures)  # the last payload that was found right
        self._stats: dict[str, Any] | None = None
        self._connections: list[LoadSocket] = []

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, max(1023, 2 * self._clients))
        self._poller = zmq.Poller()
        try:
            for _ in range(self._clients):
                self._connections.append(LoadSocket(self._socket(), self._pictures, self._sending))
                self._connections[-1].open_region(self._endpoint)
            self._control = self._socket()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        self._context.destroy(linger=0)
        for connection in self._connections:
            connection.close()

    @property
    def by_shared_memory(self) -> bool:
        """Whether images go that way, all of them."""
        return all(connection.region is not None for connection in self._connections)

    def begin(self, schedule: Schedule) -> None:
        """From now on jobs are sent as the schedule says, whenever `run` is called. Forgets earlier samples."""
        self.samples = []
        self.checked = 0
        self._schedule = schedule
        gc.collect()
        gc.freeze()  # so that a collection during the measurement has little to look through

    def run(self, seconds: float, tick: Callable[[], None] | None = None) -> None:
        """Send and receive for so long; calls `tick` each second."""
        end = time.monotonic() + seconds
        next_tick = time.monotonic() + TICK_S
        while (now := time.monotonic()) < end:
            if tick is not None and now >= next_tick:
                next_tick += TICK_S
                tick()
            self._turn(end)

    def stats(self) -> dict[str, Any]:
        """The daemon's latest snapshot; the load goes on meanwhile. TimeoutError when none comes."""
        self._stats = None
        self._control.send_multipart(protocol.encode(GetStats()))
        end = time.monotonic() + self._sending.deadline_s
        while self._stats is None:
            if time.monotonic() >= end:
                raise TimeoutError(f"{self._endpoint} gave no stats within {self._sending.deadline_s:g} s")
            self._turn(end)
        return self._stats

    def drain(self) -> None:
        """Send nothing more, and wait for what is in flight. What then has no answer has failed: `no-answer`."""
        self._schedule = None
        end = time.monotonic() + self._sending.deadline_s + GRACE_S
        while self._in_flight and time.monotonic() < end:
            self._turn(end)
        self.samples += [Sample(job.intended, job.sent, math.inf, NO_ANSWER) for job in self._in_flight.values()]
        self._in_flight.clear()
        for held in self._held:
            self.samples += [Sample(intended, end, math.inf, NO_ANSWER) for intended in held]
            held.clear()

    def _socket(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        introduce(socket, self._keys)
        socket.set(zmq.SNDHWM, 0)  # the daemon bounds what waits, and says so
        socket.set(zmq.RCVHWM, 0)
        socket.connect(self._endpoint)
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _turn(self, end: float) -> None:
        """Send what is due, then receive what is here or comes before there is more to send."""
        until = end
        if self._schedule is not None:
            for client, intended in self._schedule.due(time.monotonic()):
                self._send(client, intended)
            until = min(end, self._schedule.next_due())
        left_s = until - time.monotonic()
        if 0 < left_s < 0.001:
            time.sleep(min(left_s, NAP_S))
        for socket, _ in self._poller.poll(max(int(left_s * 1000), 0)):
            self._receive(socket)

    def _send(self, client: int, intended: float | None) -> None:
        self._number += 1
        name = f"{self._number:0{NAME_BYTES}}"
        picture = self._number % len(self._pictures)
        begun = time.monotonic()
        sent, place = self._connections[client].send(name, picture)
        if sent:
            self._in_flight[name] = InFlight(client, picture, begun if intended is None else intended, begun, place)
        else:
            self._held[client].append(begun if intended is None else intended)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            now = time.monotonic()
            message: protocol.ToClient
            message, payload = protocol.decode(frames, TO_CLIENT)
            match message:
                case Stats():
                    self._stats = message.stats
                case Result():
                    self._end(message.job, now, payload[0], "")
                case Failed():
                    self._end(message.job, now, b"", message.code)

    def _end(self, name: str, now: float, payload: bytes, code: str) -> None:
        job = self._in_flight.pop(name, None)
        if job is None:
            return  # given up in an earlier `drain`
        connection = self._connections[job.client]
        if job.place is not None and connection.region is not None:
            connection.region.give_back(job.place)
        if self._held[job.client]:
            self._send(job.client, self._held[job.client].popleft())
        if self._schedule is not None:
            self._schedule.answered(job.client, now, bool(code))
        wrong = not code and self._is_wrong(job.picture, payload)
        self.samples.append(Sample(job.intended, job.sent, now, str(code), wrong))

    def _is_wrong(self, picture: int, payload: bytes) -> bool:
        self.answer_bytes = len(payload)
        if self._right[picture] == payload:
            self.checked += 1
            return False
        checksums = [found["checksum"] for found in msgpack.unpackb(payload) if "checksum" in found]
        if not checksums:
            return False
        self.checked += 1
        if any(checksum != self._pictures[picture].checksum for checksum in checksums):
            return True
        self._right[picture] = payload
        return False
