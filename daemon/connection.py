"""What the clients share: endpoint, socket options, how images travel."""
from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal, get_args

import zmq

from daemon.exchange import Exchange, Image, Job
from daemon.places import Places
from daemon.protocol import Options

DEFAULT_ENDPOINT = "ipc:///run/blendmaskd/client.sock"
RETRIES = 8

Transport = Literal["auto", "socket", "shared"]


class Connection:
    """What both clients share: endpoint, settings, the exchange."""

    def __init__(self, endpoint: str, timeout_s: float, retries: int, transport: Transport) -> None:
        self.endpoint = endpoint
        self._places = _places(endpoint, transport)
        self._exchange = Exchange(retries, timeout_s, self._places)

    @property
    def timeout_s(self) -> float:
        """How long an answer is waited for."""
        return self._exchange.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._exchange.timeout_s = seconds

    def _open(self, socket: zmq.Socket[Any]) -> None:
        socket.set(zmq.IDENTITY, b"c" + secrets.token_bytes(15))  # ROUTERs reserve identities that begin with 0
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)  # at a mark a send would block, whatever `timeout_s` says; callers bound themselves
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise ValueError(f"{self.endpoint}: {error}: expected ipc:///PATH or tcp://HOST:PORT") from None

    def _add(self, image: Image, deadline_s: float | None, priority: int, options: Mapping[str, Any]) -> Job:
        return self._exchange.add(image, deadline_s, priority, Options(**options), time.monotonic())

    def _timed_out(self) -> TimeoutError:
        return TimeoutError(f"no answer from {self.endpoint} within {self.timeout_s:g} s: does the daemon run there?")


def _places(endpoint: str, transport: Transport) -> Places | None:
    local = endpoint.startswith("ipc://")
    if transport not in get_args(Transport):
        raise ValueError(f"transport = {transport!r}: expected {', '.join(get_args(Transport))}")
    if transport == "shared" and not local:
        raise ValueError(f"{endpoint}: transport 'shared' needs the daemon on this host, by an ipc:///PATH endpoint")
    if transport == "socket" or not local:
        return None
    return Places(endpoint.removeprefix("ipc://"), required=transport == "shared")


def check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window = {window}: expected at least 1")
