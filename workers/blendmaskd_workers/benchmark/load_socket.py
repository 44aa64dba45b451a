"""A client's connection: its socket, and its region of shared memory where images travel by that.

Each image is copied into a place of the region for each job anew, as `blendmaskd.client.blocking.Client` does: that
cost belongs to the latency of a job and to what this program takes. A place is free again when its job is answered.
"""
from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from blendmaskd import protocol
from blendmaskd.client import places
from blendmaskd.client.connection import Transport
from blendmaskd.programs.errors import UsageError
from blendmaskd.protocol import Options, Place, Submit
from blendmaskd_workers.benchmark.pictures import Picture

NAME_BYTES = 16
_OPEN_NAME = "@" * NAME_BYTES


@dataclass(frozen=True, slots=True)
class Sending:
    """How the images of a load are sent. `deadline_s` is the jobs'; `places`: images of a client in shared memory."""

    transport: Transport
    options: Options
    deadline_s: float
    places: int


class Template:
    """A submission but for its job's name: a job costs no encoding, and no copy of its pixels on their way here."""

    def __init__(self, image: protocol.Image, payload: Sequence[Any], sending: Sending) -> None:
        submit = Submit(job=_OPEN_NAME, image=image, options=sending.options, deadline_s=sending.deadline_s)
        self._magic, header = protocol.encode(submit)
        self._head, _, self._tail = header.partition(_OPEN_NAME.encode())
        self._payload = [zmq.Frame(each, copy=False) for each in payload]  # sent many times: ZeroMQ counts references

    def frames(self, name: str) -> list[Any]:
        """The frames of a job whose name has `NAME_BYTES` ASCII characters."""
        return [self._magic, self._head + name.encode() + self._tail, *self._payload]


class LoadSocket:
    """See the module. `socket` is a connected DEALER."""

    def __init__(self, socket: zmq.Socket[bytes], pictures: Sequence[Picture], sending: Sending) -> None:
        self.socket = socket
        self.region: places.Region | None = None
        self._pictures = pictures
        self._sending = sending
        self._by_socket = [
            Template(each.image, [] if each.payload is None else [each.payload], sending) for each in pictures
        ]
        self._by_place: dict[tuple[int, int], Template] = {}  # by picture and offset

    def open_region(self, endpoint: str) -> None:
        """Ask for shared memory where the transport says so. Raises `UsageError` when it must be and cannot be had."""
        largest = max((len(each.payload) for each in self._pictures if each.payload is not None), default=0)
        transport = self._sending.transport
        if not largest or transport == "socket" or (transport == "auto" and largest < places.SMALLEST_BYTES):
            return
        try:
            self.region = self._opened(endpoint, -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE)
        except (OSError, UsageError) as error:
            if transport == "shared":
                raise UsageError(f"--transport shared: {error}") from None

    def send(self, name: str, picture: int) -> tuple[bool, Place | None]:
        """Send a job. Whether that was possible, and its place in shared memory; if not, all places are taken."""
        payload, place = self._pictures[picture].payload, None
        template = self._by_socket[picture]
        if self.region is not None and payload is not None:
            if not self.region.full:
                place = self.region.put(memoryview(payload))
                template = self._at(place, picture)
            elif self._sending.transport == "shared":
                return False, None
        self.socket.send_multipart(template.frames(name), copy=False)
        return True, place

    def close(self) -> None:
        if self.region is not None:
            self.region.close()

    def _at(self, place: Place, picture: int) -> Template:
        key = (picture, place.offset)
        if key not in self._by_place:
            image = msgspec.structs.replace(self._pictures[picture].image, place=place)
            self._by_place[key] = Template(image, [], self._sending)
        return self._by_place[key]

    def _opened(self, endpoint: str, place_bytes: int) -> places.Region:
        if not endpoint.startswith("ipc://"):
            raise UsageError(f"it needs the daemon on this host, by an ipc endpoint; {endpoint} is none")
        region = places.Region(place_bytes, self._sending.places)
        try:
            region.offer(endpoint.removeprefix("ipc://"))
            region.socket.settimeout(self._sending.deadline_s)
            answer = region.answer()
            if not region.name:
                raise UsageError(answer["reason"])
        except BaseException:
            region.close()
            raise
        return region
