"""A raw client that keeps account of every answer, and bare submissions without any client's help."""
from __future__ import annotations

import threading
import zlib
from collections import Counter
from typing import Any

import msgpack
import numpy as np
import zmq

from blendmaskd import protocol
from blendmaskd.protocol import TO_CLIENT, Failed, Image, Result, Submit

LONG_S = 60.0  # for what takes a second on a quiet machine
QUICK_RESTARTS = {"first_delay_s": 0.05, "stop_s": 2}
IN_FLIGHT = 8
ANSWER_S = 60.0


def picture(width: int = 64, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (48, width, 3), np.uint8)


def submission(job: str, pixels: np.ndarray[Any, np.dtype[np.uint8]], **fields: Any) -> list[Any]:
    """The frames of a raw image."""
    height, width, _ = pixels.shape
    message = Submit(job=job, image=Image(kind="raw", shape=(height, width, 3)), **fields)
    return protocol.encode(message, [pixels.tobytes()])


def answer(frames: list[Any]) -> Result | Failed:
    message: protocol.ToClient
    message, _ = protocol.decode(frames, TO_CLIENT)
    assert isinstance(message, Result | Failed)
    return message


class Load(threading.Thread):
    """A raw client that keeps jobs in flight, each of another image, and keeps account of every answer."""

    def __init__(self, endpoint: str, in_flight: int = IN_FLIGHT, checked: bool = True) -> None:
        """`checked`: the engine is the timed one, which answers with a checksum of the image."""
        super().__init__()
        self.endpoint = endpoint
        self.in_flight = in_flight
        self.checked = checked
        self.stop = threading.Event()
        self.answers: Counter[str] = Counter()
        self.failures: list[Failed] = []
        self.wrong: list[str] = []
        self.sums: dict[str, int] = {}
        self.unanswered: set[str] = set()

    @property
    def answered(self) -> int:
        return sum(self.answers.values())

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as self.socket:
            self.socket.linger = 0
            self.socket.connect(self.endpoint)
            while not self.stop.is_set() or self.unanswered:
                while len(self.unanswered) < self.in_flight and not self.stop.is_set():
                    self.submit()
                if not self.socket.poll(ANSWER_S * 1000):
                    return  # what is unanswered stays so, and fails the test
                self.receive()
            while self.socket.poll(100):  # a duplicate would come right behind
                self.receive()

    def submit(self) -> None:
        name = str(len(self.sums))
        pixels = picture(seed=len(self.sums))
        self.sums[name] = zlib.crc32(pixels.data)
        self.unanswered.add(name)
        self.socket.send_multipart(submission(name, pixels))

    def receive(self) -> None:
        message: protocol.ToClient
        message, payload = protocol.decode(self.socket.recv_multipart(), TO_CLIENT)
        assert isinstance(message, Result | Failed)
        self.answers[message.job] += 1
        self.unanswered.discard(message.job)
        if isinstance(message, Failed):
            self.failures.append(message)
        elif self.checked and msgpack.unpackb(payload[0])[0]["checksum"] != self.sums[message.job]:
            self.wrong.append(message.job)

    def end(self) -> None:
        """Stop submitting; wait for what is owed; check it: one answer for each job, and the right one."""
        self.stop.set()
        self.join(2 * ANSWER_S)
        assert not self.is_alive()
        assert not self.unanswered
        assert not self.wrong
        assert self.answers.keys() == self.sums.keys()
        assert set(self.answers.values()) <= {1}
