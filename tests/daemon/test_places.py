"""The client's side of shared memory, against an end that does as each test wants."""
from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from memory_files import SEALS, pixels

from blendmaskd import protocol
from blendmaskd.client.blocking import Client, JobFailed
from blendmaskd.client.places import PLACES
from blendmaskd.protocol import FROM_CLIENT, Code, Failed, Place, RegionError
from blendmaskd.shell.shared_memory import Ended, Offered, SharedMemory


class Peer:
    """The other end, which takes regions in and then does as the test wants."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/p"
        self.path = f"{folder}/p.fd"
        self.listen()
        self.bind()

    def listen(self) -> None:
        self.memory = SharedMemory()
        self.memory.listen(self.path)

    def bind(self) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVTIMEO, 10_000)
        self.socket.bind(self.endpoint)

    def start_again(self) -> None:
        """As a daemon that was killed and started anew."""
        self.socket.close()
        self.memory.close()
        os.unlink(self.path)
        self.listen()
        self.bind()

    def receive(self) -> tuple[Any, list[bytes]]:
        self.client, *frames = self.socket.recv_multipart()
        return protocol.decode(frames, FROM_CLIENT)

    def send(self, message: Any, *payload: bytes) -> None:
        self.socket.send_multipart([self.client, *protocol.encode(message, payload)])

    def finish(self, job: str) -> None:
        self.send(protocol.Result(job=job, width=1, height=1, device="npu:0", timings={}), b"\x90")

    def offer(self) -> Offered:
        """The next memory that is handed over."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            for event in self.memory.receive(0.0):
                if isinstance(event, Offered):
                    return event
        raise TimeoutError

    def grant(self, name: str = "r") -> str:
        self.memory.accept(self.offer(), name)
        return name

    def close(self) -> None:
        self.socket.close()
        self.memory.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with contextlib.closing(Peer(tmp_path)) as other:
        yield other


@contextlib.contextmanager
def segmenting(peer: Peer, *images: Any, transport: Any = "shared") -> Iterator[list[Any]]:
    """A client segments images meanwhile, one by one; the answers, or the first error, are in the list afterwards."""
    answers: list[Any] = []

    def work() -> None:
        with Client(peer.endpoint, timeout_s=10, transport=transport) as client:
            try:
                for image in images:
                    answers.append(client.segment(image))
            except Exception as error:
                answers.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield answers
    finally:
        thread.join(20)


def test_a_bad_request_is_tried_once_by_socket_before_it_counts(peer: Peer) -> None:
    image = pixels(1)
    with segmenting(peer, image) as answers:
        region = peer.grant()
        placed, payload = peer.receive()
        assert placed.image.place == Place(region=region, offset=0, bytes=image.nbytes)
        assert payload == []
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="it has ended"))
        again, payload = peer.receive()
        assert (again.job, again.image.place, payload) == (placed.job, None, [image.tobytes()])
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="really"))
    assert isinstance(answers[0], JobFailed)
    assert answers[0].reason == "really"


def test_a_region_that_workers_cannot_read_is_not_used_again(peer: Peer) -> None:
    with segmenting(peer, pixels(1), pixels(2)) as answers:
        peer.grant("first")
        placed, _ = peer.receive()
        peer.send(Failed(job=placed.job, code=Code.BAD_REQUEST, reason="Permission denied"))
        assert peer.receive()[1]
        assert [event.region for event in peer.memory.receive(0.0) if isinstance(event, Ended)] == ["first"]
        peer.finish(placed.job)
        peer.grant("second")
        placed, _ = peer.receive()
        assert placed.image.place.region == "second"
        peer.finish(placed.job)
    assert [answer.width for answer in answers] == [1, 1]


def test_a_retry_finds_the_image_where_it_was(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        peer.grant()
        placed, _ = peer.receive()
        peer.send(Failed(job=placed.job, code=Code.BUSY, reason="full", retry_after_s=0.01))
        assert peer.receive() == (placed, [])
        peer.finish(placed.job)
    assert answers[0].width == 1


def test_until_the_region_is_there_images_go_by_socket(peer: Peer) -> None:
    with segmenting(peer, pixels(1), transport="auto") as answers:
        submitted, payload = peer.receive()
        assert submitted.image.place is None
        assert payload == [pixels(1).tobytes()]
        assert peer.offer().memory.bytes == PLACES << 18
        peer.finish(submitted.job)
    assert answers[0].width == 1


def test_what_a_client_hands_over_cannot_change_its_size(peer: Peer) -> None:
    with segmenting(peer, pixels(1)):
        offered = peer.offer()
        assert offered.memory.seals == SEALS
        assert offered.memory.pid == os.getpid()
        peer.memory.refuse(offered, RegionError("enough"))


def test_a_client_that_is_refused_says_why(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        peer.memory.refuse(peer.offer(), RegionError("no shared memory today"))
    assert str(answers[0]) == "shared memory is required: no shared memory today"


def test_a_client_that_is_refused_offers_what_is_left(peer: Peer) -> None:
    with segmenting(peer, pixels(1)) as answers:
        peer.memory.refuse(peer.offer(), RegionError("too much", left=3 << 18))
        offered = peer.offer()
        assert offered.memory.bytes == 3 << 18
        peer.memory.refuse(offered, RegionError("too much", left=(1 << 18) - 1))
    assert str(answers[0]) == "shared memory is required: too much"


def test_a_client_that_needs_shared_memory_waits_for_its_daemon(peer: Peer) -> None:
    peer.socket.close()
    peer.memory.close()
    for path in (peer.endpoint.removeprefix("ipc://"), peer.path):
        os.unlink(path)
    with segmenting(peer, pixels(1)) as answers:
        peer.listen()
        peer.bind()
        peer.grant()
        peer.finish(peer.receive()[0].job)
    assert answers[0].width == 1


def test_after_a_new_connection_images_are_sent_again_by_socket(peer: Peer) -> None:
    with segmenting(peer, pixels(1), pixels(2)) as answers:
        peer.grant("old")
        placed, _ = peer.receive()
        peer.start_again()
        again, payload = peer.receive()
        assert (again.job, payload) == (placed.job, [pixels(1).tobytes()])
        peer.finish(placed.job)
        peer.grant("new")  # the old one means nothing to whoever is there now
        placed, _ = peer.receive()
        assert placed.image.place == Place(region="new", offset=0, bytes=180_000)
        peer.finish(placed.job)
    assert [answer.width for answer in answers] == [1, 1]
