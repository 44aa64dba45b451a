"""What the tests of clients share: small images that are told apart, and a peer that does as each test wants."""
import asyncio
import io
import threading
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq
from PIL import Image

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Segmentation
from blendmaskd.protocol import FROM_CLIENT, Code

Pixels = npt.NDArray[np.uint8]
SLOW_MS = 250


class Peer:
    """The other end, as the test wants it to be."""

    def __init__(self, socket: zmq.Socket[Any], endpoint: str) -> None:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RCVTIMEO, 10_000)
        socket.bind(endpoint)
        self.socket = socket
        self.endpoint = endpoint

    def receive(self) -> Any:
        """The next message."""
        self.client, *frames = self.socket.recv_multipart()
        return protocol.decode(frames, FROM_CLIENT)[0]

    def send(self, message: Any, payload: tuple[bytes, ...] = ()) -> None:
        """An answer to whoever spoke last."""
        self.socket.send_multipart([self.client, *protocol.encode(message, payload)])

    def refuse(self, job: str, code: Code, retry_after_s: float | None = None) -> None:
        self.send(protocol.Failed(job=job, code=code, reason="because", retry_after_s=retry_after_s))

    def finish(self, job: str) -> None:
        self.send(protocol.Result(job=job, width=1, height=1, device="npu:0", timings={}), (b"\x90",))


def pixels(number: int, height: int = 6, width: int = 8) -> Pixels:
    """An image that differs from every other number's."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def checksum(image: Pixels) -> int:
    return zlib.crc32(np.ascontiguousarray(image).tobytes())


def answered(result: Any) -> int:
    """The checksum in a result of the timed engine."""
    assert isinstance(result, Segmentation), result
    number: int = result.detections[0]["checksum"]
    return number


def encoded(image: Pixels, form: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[:, :, ::-1]).save(file, form)
    return file.getvalue()


def in_thread(work: Callable[[], Any]) -> Callable[[], Any]:
    """Run it beside the test; call what is returned for its value or its exception."""
    values: list[Any] = []

    def keep() -> None:
        try:
            values.append(work())
        except Exception as error:
            values.append(error)

    thread = threading.Thread(target=keep)
    thread.start()

    def value() -> Any:
        thread.join(30)
        assert values, "it still runs"
        if isinstance(values[0], Exception):
            raise values[0]
        return values[0]

    return value


def outcomes(daemon: Any) -> dict[str, int]:
    stats = daemon.client.stats()
    return {"answered": stats["answered"], **stats["failures"]}


async def gather(endpoint: str, images: list[Any]) -> list[Segmentation]:
    async with AsyncClient(endpoint, timeout_s=20) as client:
        return await asyncio.gather(*(client.segment(image) for image in images))


def with_client(endpoint: str, work: Callable[[AsyncClient], Awaitable[Any]], timeout_s: float = 20.0) -> Any:
    async def run() -> Any:
        async with AsyncClient(endpoint, timeout_s=timeout_s) as client, asyncio.timeout(60):
            return await work(client)

    return asyncio.run(run())
