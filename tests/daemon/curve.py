"""What the tests of TCP endpoints share: a daemon with keys, and clients of it."""
from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from blendmaskd import keys
from blendmaskd.client.blocking import Client


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Guarded:
    """A daemon with an ipc and a CURVE endpoint; alice and bob are allowed, ursula has a key that is not."""

    daemon: Any
    tcp: str
    folder: Path

    @property
    def port(self) -> int:
        return int(self.tcp.rpartition(":")[2])

    @property
    def server_key(self) -> Path:
        return self.folder / "keys" / "server.key"

    @property
    def allowed(self) -> Path:
        return self.folder / "keys" / "clients"

    def secret(self, name: str) -> Path:
        return self.folder / f"{name}.key_secret"

    def client(self, name: str = "alice", **options: Any) -> Client:
        """To be closed by the caller."""
        options = {"server_key": self.server_key, "key": self.secret(name), "timeout_s": 20.0, **options}
        return Client(self.tcp, **options)

    def dealer(
        self, name: str | None = "alice", identity: bytes = b"", server_key: Path | None = None, reconnect_ms: int = 100
    ) -> Any:
        """A bare socket, connected; without a name one without keys. `reconnect_ms`: -1: it never connects again."""
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.SNDTIMEO, 10_000)
        dealer.set(zmq.RCVTIMEO, 20_000)
        dealer.set(zmq.RECONNECT_IVL, reconnect_ms)
        if identity:
            dealer.set(zmq.IDENTITY, identity)
        if name is not None:
            pair = keys.read_pair(self.secret(name))
            dealer.set(zmq.CURVE_SERVERKEY, keys.read_public(server_key or self.server_key))
            dealer.set(zmq.CURVE_PUBLICKEY, pair.public)
            dealer.set(zmq.CURVE_SECRETKEY, pair.secret)
        dealer.connect(self.tcp)
        return dealer

    def allow(self, name: str) -> None:
        keys.write_public(self.allowed, name, keys.read_public(self.folder / f"{name}.key"))

    def forbid(self, name: str) -> None:
        (self.allowed / f"{name}.key").unlink()


def start(make: Callable[..., Any], folder: Path, **settings: Any) -> Guarded:
    """`make` is one of the fixtures that start daemons."""
    keys.main(["server", str(folder / "keys")])
    for name in ("alice", "bob", "ursula"):
        keys.write_pair(folder, name)
    tcp = f"tcp://127.0.0.1:{free_port()}"
    guarded = Guarded(None, tcp, folder)
    for name in ("alice", "bob"):
        guarded.allow(name)
    daemon = make(
        endpoints={"clients": [f"ipc://{folder}/client.sock", tcp], "metrics": None},
        curve={"server_key": str(folder / "keys" / "server.key_secret"), "client_keys": str(guarded.allowed)},
        **settings,
    )
    return Guarded(daemon, tcp, folder)


def nothing_more(dealer: Any) -> bool:
    """Whether no message is there."""
    with suppress(zmq.Again):
        dealer.recv_multipart(zmq.NOBLOCK)
        return False
    return True
