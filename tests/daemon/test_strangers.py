"""A thousand strangers at a TCP endpoint get nothing and leave nothing; who is allowed is served throughout.

The figures are printed: ``pytest -s tests/daemon/test_strangers.py``.
"""
from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from attack import Polite, greeting, head, is_closed
from curve import Guarded, start

from blendmaskd.client.blocking import Client, HandshakeError
from blendmaskd.protocol import Image, Submit, encode

IMAGE = np.zeros((48, 64, 3), np.uint8)
WAVES, EACH = 3, 67  # of five kinds: a thousand and five
SUBMIT = encode(Submit(job="job", image=Image(kind="encoded")), [os.urandom(200_000)])
GROWTH_BYTES = 8 << 20  # of a daemon that has met strangers before; a connection's buffers alone would be 16 MB
CLOSED_S = 30.0  # the daemon closes what says nothing after five


@pytest.fixture
def guarded(daemon) -> Iterator[Guarded]:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        yield start(daemon, Path(folder))


@pytest.mark.slow
def test_a_thousand_strangers_get_nothing_and_leave_nothing(guarded: Guarded, wait_until, capfd) -> None:
    process = psutil.Process(guarded.daemon.process.pid)
    with guarded.client("alice") as alice, _Served(guarded) as served:
        _wave(guarded, 0)
        rest = wait_until(lambda: _at_rest(process, served), CLOSED_S)
        began, answers = time.monotonic(), served.count
        peak = 0
        for number in range(WAVES):
            before = served.count
            peak = max(peak, _wave(guarded, number, process))
            assert served.count > before, "the client that is allowed was not served meanwhile"
        took, answers = time.monotonic() - began, served.count - answers
        wait_until(lambda: process.num_fds() <= rest[1], CLOSED_S)
        after = process.memory_info().rss, process.num_fds()
        assert alice.segment(IMAGE).width == 64
    stats = guarded.daemon.client.stats()
    with capfd.disabled():
        print(
            f"\n{WAVES * 5 * EACH} strangers in {took:.1f} s: RSS {rest[0] / 2**20:.1f} -> {after[0] / 2**20:.1f} MiB, "
            f"descriptors {rest[1]} -> {after[1]} (peak {peak}), {answers} answers to the client that is allowed, "
            f"slowest {served.slowest_s * 1000:.0f} ms"
        )
    assert after[0] - rest[0] < GROWTH_BYTES
    assert served.failure is None
    assert set(stats["failures"].values()) <= {0}, "a stranger got as far as the broker"


class _Served:
    """A client that is allowed, one job after the other."""

    def __init__(self, guarded: Guarded) -> None:
        self._client: Client = guarded.client("bob", timeout_s=60.0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count, self.slowest_s = 0, 0.0
        self.failure: Exception | None = None

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                self._client.segment(IMAGE)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.count += 1
        except Exception as error:  # told in the main thread
            self.failure = error

    def __enter__(self) -> _Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def _at_rest(process: psutil.Process, served: _Served) -> tuple[int, int] | None:
    """RSS and descriptors, when the strangers' connections are closed."""
    tcp = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED]
    return (process.memory_info().rss, process.num_fds()) if len(tcp) <= 2 and served.count > 20 else None


def _wave(guarded: Guarded, number: int, process: psutil.Process | None = None) -> int:
    """`EACH` strangers of each kind at once; returns the descriptors that the daemon has with them."""
    with contextlib.ExitStack() as stack:
        dealers = [
            stack.enter_context(dealer)
            for _ in range(EACH)
            for dealer in (
                guarded.dealer(None),
                guarded.dealer("alice", os.urandom(16), server_key=guarded.folder / "bob.key"),
                guarded.dealer("ursula", os.urandom(16)),
            )
        ]
        for dealer in dealers:
            with contextlib.suppress(zmq.Again):  # refused already
                dealer.send_multipart(SUBMIT, zmq.NOBLOCK)
        generator = random.Random(number)
        silent = [stack.enter_context(_connect(guarded.port)) for _ in range(EACH)]
        noisy = [stack.enter_context(_connect(guarded.port)) for _ in range(EACH)]
        for place, connection in enumerate(noisy):
            with contextlib.suppress(OSError):  # closed already
                connection.sendall(_noise(place, generator))
        peak = process.num_fds() if process else 0
        for connection in silent + noisy:
            _must_be_closed(connection)
        for dealer in dealers:
            with pytest.raises(zmq.Again):
                dealer.recv_multipart(zmq.NOBLOCK)
        return peak


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=CLOSED_S)


def _noise(place: int, generator: random.Random) -> bytes:
    """Bytes that are no handshake, or the beginning of one, or one of ZMTP 1 and 2, which know no keys."""
    message = b"".join(bytes([1, len(frame)]) + frame for frame in SUBMIT[:2])
    return (
        generator.randbytes(generator.randrange(1, 5000)),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x01\x00" + message,
        b"\xff" + bytes(8) + b"\x7f\x01\x05\x00\x00" + message,
        b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\x00" + bytes(31),
        b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE" + bytes(15) + b"\x00" + bytes(31) + generator.randbytes(3000),
        b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + b"\x00" + bytes(31) + b"\x04\x19\x05READY",
        b"\xff" + bytes(8) + b"\x7f\x03\x01PLAIN" + bytes(15) + b"\x00" + bytes(31) + b"\x04\x08\x05HELLO\x00\x00",
    )[place % 8]


def _must_be_closed(connection: socket.socket) -> None:
    """By the daemon, after at most its own greeting."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(4096):
            received += len(chunk)
            assert received <= 64, chunk


def test_a_stranger_that_tries_again_and_again_is_still_a_stranger(guarded: Guarded) -> None:
    with guarded.client("ursula") as ursula:
        for _ in range(50):
            with pytest.raises(HandshakeError):
                ursula.stats()
    with guarded.client("alice") as alice:
        assert alice.segment(IMAGE).width == 64


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True], ids=["HELLO", "INITIATE"])
def test_a_handshake_without_end_is_cut_off(guarded: Guarded, wait_until, known: bool) -> None:
    """ZeroMQ takes one of any size that a message may have, and keeps it until it is whole."""
    begun = greeting(b"CURVE") + (_hello(guarded) if known else b"")
    handshake = [begun, head(128 << 20, command=True), *[bytes(1 << 20)] * 120]
    with guarded.client("alice") as alice, contextlib.ExitStack() as stack, Polite(guarded.daemon, alice) as polite:
        peers = [stack.enter_context(_connect(guarded.port)) for _ in range(12)]
        sending = [threading.Thread(target=_send, args=(peer, handshake)) for peer in peers]
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join()
        for peer in peers:
            wait_until(lambda peer=peer: is_closed(peer))
    assert polite.most_bytes - polite.idle_bytes < 256 << 20


def _hello(guarded: Guarded) -> bytes:
    """A good one, of a client that believes to have found the daemon."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = dataclasses.replace(guarded, tcp=f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with there.dealer("ursula"), listener.accept()[0] as accepted:
            accepted.sendall(greeting(b"CURVE"))
            return accepted.recv(64 + 202, socket.MSG_WAITALL)[64:]


def _send(peer: socket.socket, parts: list[bytes]) -> None:
    """As far as the other side takes it."""
    peer.settimeout(1.0)
    with contextlib.suppress(OSError):
        for part in parts:
            peer.sendall(part)
