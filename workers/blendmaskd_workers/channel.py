"""The worker's connection to the daemon: any thread may send, the main thread receives.

A ZeroMQ socket may pass from thread to thread when a lock is between them. So every use of it is under one lock, and a
message costs no detour over the main thread. Waiting cannot be under the lock: the main thread waits for the socket's
file descriptor, which tells only that something has changed. Whoever uses the socket may consume that signal; so who
has sent looks whether messages have come, and wakes the main thread, unless that is about to look itself.
"""
from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import zmq

from blendmaskd import protocol

LARGE_BYTES = 64 << 10  # below, copying costs less than not to
LINGER_MS = 5000  # for the last answers, when the worker stops
POLLIN, NOBLOCK, SNDMORE = int(zmq.POLLIN), int(zmq.NOBLOCK), int(zmq.SNDMORE)  # a flag that is no number costs 0.5 us


class Connection(Protocol):
    """What a loop needs of whoever gives it leases; `Channel` is the daemon's, `blendmaskd_workers.cluster.channel`
    another."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def send(self, message: protocol.FromWorker, payload: Sequence[bytes] = ()) -> None:
        """For any thread."""

    def wake(self) -> None:
        """End `wait`. For any thread."""

    def wait(self, timeout_ms: int) -> None:
        """Until there may be something to receive, or `wake`, or the timeout."""

    def receive(self) -> Iterator[tuple[protocol.ToWorker, Sequence[Any]]]:
        """What has come: messages and their payloads, frames that `memoryview` takes."""


class Channel:
    """Opened on entry, closed on exit; `identity` is the worker's name at the daemon's `endpoint`."""

    def __init__(self, identity: str, endpoint: str) -> None:
        self._identity = identity
        self._endpoint = endpoint
        self._lock = threading.Lock()  # for the socket and the next
        self._receiving = False  # the main thread has not seen yet that nothing is left
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()

    def __enter__(self) -> Self:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, self._identity.encode())
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.RCVHWM, 0)  # at a mark the daemon would lose a lease
        self._socket.connect(self._endpoint)
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(int(self._socket.get(zmq.FD)), select.POLLIN)
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._socket.close()
        self._context.term()

    def send(self, message: protocol.FromWorker, payload: Sequence[bytes] = ()) -> None:
        """For any thread."""
        frames = protocol.encode(message, payload)
        with self._lock:
            for frame in frames[:-1]:
                self._socket.send(frame, SNDMORE)
            self._socket.send(frames[-1], copy=len(frames[-1]) < LARGE_BYTES)
            if not self._receiving and self._readable():
                self.wake()

    def wake(self) -> None:
        """End `wait`. For any thread."""
        os.eventfd_write(self._wake, 1)

    def wait(self, timeout_ms: int) -> None:
        """Until there may be something to receive, or `wake`, or the timeout. Receive before the first time."""
        if any(fd == self._wake for fd, _ in self._poll.poll(timeout_ms)):
            os.eventfd_read(self._wake)

    def receive(self) -> Iterator[tuple[protocol.ToWorker, list[Any]]]:
        """What has come: messages and their payloads; to be asked for until there are no more."""
        while True:
            with self._lock:
                self._receiving = self._readable()
                if not self._receiving:
                    return
                frames = [self._socket.recv(NOBLOCK, copy=False)]
                while frames[-1].more:
                    frames.append(self._socket.recv(NOBLOCK, copy=False))
            message: protocol.ToWorker
            message, payload = protocol.decode(frames, protocol.TO_WORKER)
            yield message, payload

    def _readable(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & POLLIN)
