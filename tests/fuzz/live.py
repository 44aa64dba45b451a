"""A daemon of our own to throw things at, with a good client that must be served all the time, and what it holds."""
from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, Self

import numpy as np
import psutil

from blendmaskd.client.blocking import Client
from blendmaskd_workers.engines import timed
from chaos.host import Host
from fuzz.rules import LIMITS, BrokenRuleError

GOOD_S = 30.0  # in which a good client must be answered, whatever else goes on
BACK_S = 30.0  # in which descriptors must be back
SETTINGS: dict[str, Any] = {
    "timed": {"latency_ms": {1: 1, 8: 2}},
    "limits": {"max_image_bytes": LIMITS.max_image_bytes, "max_image_pixels": LIMITS.max_image_pixels},
    "shared_memory_bytes": 64 << 20,
    "drain_s": 10,
    "worker_env": {},  # without the faults that chaos makes
}
# What may never be in its log: that something was not foreseen.
_UNFORESEEN = re.compile(r"Traceback|Segmentation|Fatal Python error|failed on a batch|preparing its image failed")


class Target:
    """`host` is the daemon. `settle` waits until it has no more descriptors than before."""

    def __init__(self, host: Host) -> None:
        self.host = host
        listening = psutil.Process(host.process.pid).net_connections("tcp4")
        self.port = next(each.laddr.port for each in listening if each.status == psutil.CONN_LISTEN)  # of its pages
        self.path = host.endpoint.removeprefix("ipc://")
        self.good = GoodClient(host.endpoint)
        self._pids = self._workers()
        self._before = self.descriptors()
        self.warm = self.resident()

    def descriptors(self) -> dict[str, int]:
        return {name: held[2] for name, held in self.host.held().items()}

    def resident(self) -> dict[str, float]:
        """MB by process."""
        return {name: held[1] for name, held in self.host.held().items()}

    def settle(self) -> None:
        """Raises `BrokenRuleError` when its descriptors do not come back."""
        deadline = time.monotonic() + BACK_S
        while any(count > self._before[name] for name, count in self.descriptors().items() if name in self._before):
            if time.monotonic() > deadline:
                raise BrokenRuleError(f"descriptors {self._before} became {self.descriptors()}")
            time.sleep(0.05)

    def check(self) -> None:
        """Raises `BrokenRuleError` for a daemon or worker that died, a good client that was not served, a traceback."""
        self.good.check()
        if self.host.process.poll() is not None:
            raise BrokenRuleError(f"the daemon ended with {self.host.process.returncode}: {self.log()}")
        if self._workers() != self._pids:
            raise BrokenRuleError(f"workers {self._pids} became {self._workers()}: {self.log()}")
        if _UNFORESEEN.search(self.log()):
            raise BrokenRuleError(self.log())

    def log(self) -> str:
        return self.host.log.read_text(errors="replace")[-5000:]

    def _workers(self) -> dict[str, int]:
        return {name: held[0] for name, held in self.host.held().items()}


class Stranger(ABC):
    """Feeds a target; a context manager. `outcomes` counts what came of it."""

    def __init__(self, target: Target) -> None:
        self.outcomes: Counter[str] = Counter()
        self._target = target
        self._staying: deque[socket.socket] = deque()  # connections of no more words

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()

    @abstractmethod
    def feed(self, random: Random) -> str:
        """Throw one input; what came of it, empty where that comes later. Raises `BrokenRuleError`."""

    def settle(self) -> None:
        """Wait for what is owed."""
        self._hang_up()

    def _stay(self, stranger: socket.socket, most: int) -> None:
        """Keep a connection; of more than so many the oldest goes."""
        self._staying.append(stranger)
        if len(self._staying) > most:
            self._staying.popleft().close()

    def _hang_up(self) -> None:
        while self._staying:
            self._staying.popleft().close()


def first_said(stranger: socket.socket) -> bytes:
    """What came first of an answer that is read to its end; nothing where there was none."""
    said = b""
    try:
        while part := stranger.recv(65536):
            said = said or part
    except TimeoutError:
        raise BrokenRuleError("a request was neither answered nor closed") from None
    return said


class GoodClient(threading.Thread):
    """Segments one image after the other, half of them by shared memory, and looks at each answer."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(daemon=True)
        self.answered = 0
        self.slowest_s = 0.0
        self._endpoint = endpoint
        self._ended = threading.Event()
        self._trouble = ""

    def run(self) -> None:
        small, large = (np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8) for side in (20, 300))
        expected = [timed.checksum(small), timed.checksum(large)]
        try:
            with Client(self._endpoint, timeout_s=GOOD_S) as client:
                while not self._ended.is_set():
                    for image, checksum in zip((small, large), expected):
                        start = time.monotonic()
                        found = client.segment(image).detections[0]["checksum"]
                        self.slowest_s = max(self.slowest_s, time.monotonic() - start)
                        self.answered += 1
                        if found != checksum:
                            raise BrokenRuleError("the result of another image")
                    self._ended.wait(0.02)
        except Exception as error:
            self._trouble = f"after {self.answered} answers: {type(error).__name__}: {error}"

    def check(self) -> None:
        if self._trouble:
            raise BrokenRuleError(f"the good client was not served {self._trouble}")

    def end(self) -> None:
        self._ended.set()
        self.join(2 * GOOD_S)


@contextlib.contextmanager
def target() -> Iterator[Target]:
    """A daemon that is up, being used by its good client; gone when this is left, which must work too."""
    with tempfile.TemporaryDirectory(prefix="blendmaskd-fuzz-") as name:
        folder = Path(name)
        host = Host(folder, 2, folder / "log", {**SETTINGS, "spool": str(folder / "spool")}, "127.0.0.1:0")
        host.start()
        try:
            found = Target(host)
            found.good.start()
            yield found
            found.good.end()
            found.check()
        finally:
            code = host.stop()
        if code:
            raise BrokenRuleError(f"the daemon ended with {code} when it was told to stop: {found.log()}")
