"""What the clients share: endpoint, keys, socket options, how images travel.

A wrong key is silence to ZeroMQ's users: what its events tell of a handshake becomes `HandshakeError`, or, where only
guessing is possible, a hint in the TimeoutError.
"""
from __future__ import annotations

import contextlib
import operator
import os
import secrets
import socket as sockets
import sys
import time
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import zmq
from zmq.utils.monitor import parse_monitor_message

from blendmaskd.client import places
from blendmaskd.client.exchange import Exchange
from blendmaskd.endpoints import ipc_path, parse_place
from blendmaskd.keys import PUBLIC, Pair, read_pair, read_public

DEFAULT_ENDPOINT = "ipc:///run/blendmaskd/client.sock"
RETRIES = 8
LINGER_MS = 200  # lets the cancellations leave
EXPECTED = "expected ipc:///PATH or tcp://HOST:PORT"
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000  # a path that has gone silent is given up after so long
CONNECT_MS = 10_000  # then the connection is tried anew

EVENTS = (
    zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)  # fmt: skip

Transport = Literal["auto", "socket", "shared"]
KeyFile = str | Path | None
Keys = tuple[bytes, Pair]  # the daemon's public one, and our own


class HandshakeError(ConnectionError):
    """The daemon does not let us in, or wants keys that we were not given; the text says what to do.

    The client may be used again: it connects anew.
    """


class Connection:
    """What both clients share: endpoint, keys (None: it has none), settings, the exchange."""

    _closed = False
    _socket: Any  # of zmq or zmq.asyncio, as the monitor
    _monitor: Any

    def __init__(
        self, endpoint: str = DEFAULT_ENDPOINT, timeout_s: float = 60.0, retries: int = RETRIES,
        transport: Transport = "auto", server_key: KeyFile = None, key: KeyFile = None,
    ) -> None:  # fmt: skip
        self._pid = os.getpid()
        self.endpoint = endpoint
        self._key_files = server_key, key
        self.keys = _keys(endpoint, server_key, key)
        self._refused = ""  # why the connection was refused for good; ZeroMQ does not try again then
        self._failed_handshakes = 0
        self._disconnects = 0  # in a row
        self._away_since: float | None = time.monotonic()
        self._places = _places(endpoint, transport)
        self._exchange = Exchange(operator.index(retries), _seconds(timeout_s), self._places)
        self._begin()

    def __reduce__(self) -> NoReturn:
        """A copy would close what is not its own."""
        raise TypeError("a client cannot be copied or pickled: make one in each process, thread and event loop")

    def _begin(self) -> None:
        """What is to be done at once; nothing by default."""

    @property
    def timeout_s(self) -> float:
        """How long an answer is waited for."""
        return self._exchange.timeout_s

    @timeout_s.setter
    def timeout_s(self, seconds: float) -> None:
        self._exchange.timeout_s = _seconds(seconds)

    @property
    def away_s(self) -> float:
        """For how long there has been no connection to the daemon, in seconds; 0 while there is one."""
        return 0.0 if self._away_since is None else time.monotonic() - self._away_since

    def _check_usable(self) -> None:
        """Raises RuntimeError for a client that is another process's, or closed."""
        if self._is_foreign:
            raise RuntimeError(
                f"this client belongs to process {self._pid}: after a fork, make another one in the child"
            )
        if self._closed:
            raise RuntimeError("this client is closed: make another one")

    @property
    def _is_foreign(self) -> bool:
        """Whether this is a child of the process that made the client: sockets and threads of it are not here."""
        return os.getpid() != self._pid

    def _connect(self, ipv6: bool, context: zmq.Context[Any]) -> None:
        """`ipv6`: see `wants_ipv6`. Raises ValueError for an endpoint to which nothing can be connected."""
        self._context, self._was_connected = context, False
        self._socket = socket = context.socket(zmq.DEALER)
        self._monitor = socket.get_monitor_socket(EVENTS)
        self._closed = False
        introduce(socket, self.keys)
        if self.endpoint.startswith("tcp://"):
            socket.set(zmq.IPV6, ipv6)
            socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            socket.set(zmq.HANDSHAKE_IVL, CONNECT_MS)
            socket.set(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)  # at a mark a send would block, whatever `timeout_s` says; callers bound themselves
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        try:
            socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            self._disconnect()
            raise ValueError(f"{self.endpoint}: {error}: {EXPECTED}") from None

    def _disconnect(self) -> None:
        self._closed = True
        self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
        if self._places:
            self._places.close()

    def _on_event(self, frames: list[bytes]) -> None:
        """Take in what happened to the connection, as its monitor says; `_refused` says why it never will stand."""
        match parse_monitor_message(frames)["event"]:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._failed_handshakes, self._away_since = 0, None
                if self._was_connected:
                    self._exchange.reconnected(time.monotonic())
                self._was_connected = True
            case zmq.EVENT_DISCONNECTED:
                self._disconnects += 1
                self._away_since = self._away_since or time.monotonic()
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                self._failed_handshakes += 1
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                public = Path(self._key_files[1] or "").with_suffix(PUBLIC)
                self._refused = (
                    f"{self.endpoint}: the daemon does not allow this key: copy its public half, {public}, into the "
                    "folder that the daemon's settings name as curve.client_keys"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if self.keys:
                self._refused = f"{self.endpoint}: the server there does not use keys: is it the right endpoint?"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refused = (
                    f"{self.endpoint}: the daemon there requires keys: its public and your secret one (server_key and "
                    "key; programs: --server-key FILE --key FILE); see `blendmaskd-keys --help`"
                )

    def _renew(self) -> None:
        """Connect once more after a refusal: things may have changed."""
        if not self._refused:
            return
        self._refused = ""
        with contextlib.suppress(zmq.ZMQError):  # ZeroMQ may have forgotten it
            self._socket.disconnect(self.endpoint)
        self._socket.connect(self.endpoint)
        self._exchange.reconnected(time.monotonic())

    def _timed_out(self) -> TimeoutError:
        return TimeoutError(
            f"no answer from {self.endpoint} within {self.timeout_s:g} s: is the daemon running there?{self.hint}"
        )

    @property
    def hint(self) -> str:
        """What else may be the reason for silence: something to end an error's text with."""
        if self.endpoint.startswith("ipc://") and _forbidden(ipc_path(self.endpoint)):
            return " This user may not use that socket: is it in the socket's group?"
        if self._disconnects and not self.keys and self.endpoint.startswith("ipc://"):
            return f" It closed the connection {self._disconnects} times: is it at its limit of clients?"
        if not self._failed_handshakes:
            return ""
        question = f"is {self._key_files[0]} the public key of this daemon?" if self.keys else (
            "does it require keys (server_key and key; programs: --server-key FILE --key FILE)?"
        )  # fmt: skip
        return f" {self._failed_handshakes} handshakes failed: {question}"


def _forbidden(path: str) -> bool:
    """Whether there may be a socket that is not for this user."""
    try:
        os.stat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return not os.access(path, os.W_OK, effective_ids=True)


def _seconds(timeout_s: float) -> float:
    seconds = float(timeout_s)
    if not seconds > 0:
        raise ValueError(f"timeout_s = {timeout_s!r}: expected more than 0 seconds")
    return seconds


def wants_ipv6(endpoint: str) -> bool:
    """Whether the host has no IPv4 address: ZeroMQ takes a name's first address, by one protocol only.

    Asks the resolver, which may take its time. Raises ValueError for an endpoint to which nothing can be connected.
    """
    try:
        if endpoint.startswith("ipc://"):
            ipc_path(endpoint)
        if not endpoint.startswith("tcp://"):
            return False
        host, port = parse_place(endpoint.removeprefix("tcp://"))
        if host == "*" or not port:
            raise ValueError("a client needs a host and a port")
    except ValueError as error:
        raise ValueError(f"{endpoint}: {error}: {EXPECTED}") from None
    try:
        return all(found[0] == sockets.AF_INET6 for found in sockets.getaddrinfo(host, None))
    except OSError:  # it may be known later
        return False


def introduce(socket: zmq.Socket[Any], keys: Keys | None) -> None:
    """Give a socket, before it connects, what a daemon knows a client by: an identity, and keys where it has any."""
    socket.set(zmq.IDENTITY, b"c" + secrets.token_bytes(15))  # ROUTERs reserve identities that begin with 0
    if keys:
        server, pair = keys
        socket.set(zmq.CURVE_SERVERKEY, server)
        socket.set(zmq.CURVE_PUBLICKEY, pair.public)
        socket.set(zmq.CURVE_SECRETKEY, pair.secret)


def _places(endpoint: str, transport: Transport) -> places.Places | None:
    local = endpoint.startswith("ipc://")
    if transport not in get_args(Transport):
        raise ValueError(f"transport = {transport!r}: expected {', '.join(get_args(Transport))}")
    if transport == "shared" and not local:
        raise ValueError(f"{endpoint}: transport 'shared' needs a daemon on this host, with an ipc:///PATH endpoint")
    if transport == "shared" and not places.SUPPORTED:
        raise ValueError(f"transport 'shared' needs Linux: {sys.platform} does not support it")
    if transport == "socket" or not local or not places.SUPPORTED:
        return None
    return places.Places(endpoint.removeprefix("ipc://"), required=transport == "shared")


def _keys(endpoint: str, server_key: KeyFile, key: KeyFile) -> Keys | None:
    """The server's public key and our own pair. Raises ValueError when one is missing or cannot be used."""
    if server_key is None and key is None:
        return None
    if not endpoint.startswith("tcp://"):
        raise ValueError(f"{endpoint}: keys are for tcp://HOST:PORT; ipc:// is protected by the mode of its socket")
    if server_key is None or key is None:
        missing = "server_key (the daemon's server.key)" if server_key is None else "key (our own NAME.key_secret)"
        raise ValueError(f"{endpoint}: both keys are needed: {missing} is missing")
    return read_public(server_key), read_pair(key)


def check_window(window: int) -> None:
    if window < 1:
        raise ValueError(f"window = {window}: expected at least 1")
