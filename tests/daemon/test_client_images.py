"""Images and options by either client: the same answer whatever they come in, and a reason when they cannot be read."""
import asyncio
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients import Peer, Pixels, answered, checksum, encoded, in_thread, pixels, with_client

from blendmaskd import protocol
from blendmaskd.client.blocking import AsyncClient, Client, JobFailed, ServerPath
from blendmaskd.protocol import Code


def test_an_array_bytes_and_a_file_give_the_same_answer(shared_daemon: Any, tmp_path: Path) -> None:
    image = pixels(1, 20, 30)
    file = tmp_path / "image.png"
    file.write_bytes(encoded(image, "PNG"))
    for source in (image, file.read_bytes(), bytearray(file.read_bytes()), file, str(file)):
        result = shared_daemon.client.segment(source)
        assert (result.width, result.height) == (30, 20)
        assert answered(result) == checksum(image)
        assert result.device in ("cpu:0", "cpu:1")
        assert result.timings["total"] >= result.timings["device"] >= 0.005


@pytest.mark.parametrize(
    "view",
    [
        lambda image: image[::2, ::3],
        lambda image: image[::-1],
        lambda image: image[:, ::-1],
        lambda image: image[:, :, ::-1],
        lambda image: np.asfortranarray(image),
        lambda image: image.transpose(1, 0, 2),
        lambda image: np.broadcast_to(image[:1], image.shape),
        lambda image: image[3:9, 2:7],
    ],
    ids=["steps", "flipped", "mirrored", "other channel order", "columns first", "transposed", "broadcast", "window"],
)
def test_an_array_that_is_not_contiguous_arrives_as_it_looks(
    shared_daemon: Any, view: Callable[[Pixels], Pixels]
) -> None:
    image = view(pixels(2, 12, 12))
    result = shared_daemon.client.segment(image)
    assert (result.height, result.width) == image.shape[:2]
    assert answered(result) == checksum(image)


def test_options_reach_the_engine(shared_daemon: Any) -> None:
    segment = shared_daemon.client.segment
    (detection,) = segment(pixels(1)).detections
    assert detection["segmentation"]["size"] == [6, 8]
    assert "segmentation" not in segment(pixels(1), mask_format="none").detections[0]
    assert isinstance(segment(pixels(1), mask_format="polygon").detections[0]["segmentation"], list)
    assert segment(pixels(1), max_detections=0).detections == []
    assert segment(pixels(1), score_threshold=1.0, priority=9, deadline_s=5).detections
    with pytest.raises(TypeError, match="softness"):
        segment(pixels(1), softness=1)
    with pytest.raises(JobFailed, match=r"bad-request: submit: .*score_threshold") as refused:
        segment(pixels(1), score_threshold=2.0)
    assert refused.value.code is Code.BAD_REQUEST


def test_what_is_no_image_is_refused_here(shared_daemon: Any, tmp_path: Path) -> None:
    for thing in (None, 7, [[1, 2, 3]], np.zeros((4, 4), np.uint8)):
        with pytest.raises(TypeError):
            shared_daemon.client.segment(thing)
    with pytest.raises(FileNotFoundError):
        shared_daemon.client.segment(tmp_path / "missing.jpg")


def test_a_path_on_the_server_is_off_unless_a_root_allows_it(shared_daemon: Any) -> None:
    with pytest.raises(JobFailed, match=r"bad-request: images by path are disabled: paths\.roots"):
        shared_daemon.client.segment(ServerPath("/etc/passwd"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + size) + chunk(b"IDAT" + zlib.compress(b"")) + chunk(b"IEND")


BAD: dict[str, tuple[Any, str]] = {
    "truncated JPEG": (encoded(pixels(1, 200, 300), "JPEG")[:4000], "bad-image: cannot be decoded: .*truncated"),
    "truncated PNG": (encoded(pixels(1, 200, 300), "PNG")[:4000], "bad-image: cannot be decoded: .*truncated"),
    "0 bytes": (b"", "bad-image: the image is empty"),
    "not an image": (b"#!/bin/sh\necho hello\n", "bad-image: not a JPEG, PNG, WebP, BMP or TIFF"),
    "a GIF": (encoded(pixels(1), "GIF"), "bad-image: not a JPEG, PNG, WebP, BMP or TIFF"),
    "60000x60000 header": (png_header(60000, 60000), "too-large: 60000x60000 pixels are over the limit of 50000000"),
    "four channels": (np.zeros((4, 4, 4), np.uint8), r"bad-image: shape \[4, 4, 4\]: expected \[height, width, 3\]"),
    "no rows": (np.zeros((0, 4, 3), np.uint8), r"bad-image: shape \[0, 4, 3\]"),
    "floats": (np.zeros((4, 4, 3), np.float32), "bad-image: dtype 'float32': expected uint8"),
    "signed": (np.zeros((4, 4, 3), np.int8), "bad-image: dtype 'int8': expected uint8"),
}


@pytest.mark.parametrize(("image", "reason"), BAD.values(), ids=BAD)
def test_a_bad_image_is_answered_with_a_reason_and_costs_the_worker_nothing(
    shared_daemon: Any, image: Any, reason: str
) -> None:
    before = shared_daemon.pids()
    for _ in range(2):  # one for each worker
        with pytest.raises(JobFailed, match=reason) as failed:
            shared_daemon.client.segment(image)
        assert failed.value.code in (Code.BAD_IMAGE, Code.TOO_LARGE)
        assert answered(shared_daemon.client.segment(pixels(5))) == checksum(pixels(5))
    assert shared_daemon.pids() == before


def test_a_raw_image_whose_bytes_do_not_fit_its_shape_is_bad(shared_daemon: Any) -> None:
    socket = shared_daemon.dealer()
    image = protocol.Image(kind="raw", shape=(4, 4, 3))
    socket.send_multipart(protocol.encode(protocol.Submit(job="short", image=image), [bytes(47)]))
    message, _ = protocol.decode(socket.recv_multipart(), protocol.TO_CLIENT)
    assert message == protocol.Failed(
        job="short", code=Code.BAD_IMAGE, reason="shape (4, 4, 3) of uint8: expected 48 bytes, found 47"
    )


def test_stats_are_the_latest_snapshot(shared_daemon: Any, wait_until: Any) -> None:
    old = shared_daemon.client.stats()["seq"]
    before = wait_until(lambda: (stats := shared_daemon.client.stats())["seq"] > old and stats)  # has all answers
    assert [device["device"] for device in before["devices"]] == ["cpu:0", "cpu:1"]
    shared_daemon.client.segment(pixels(0))
    wait_until(lambda: shared_daemon.client.stats()["answered"] == before["answered"] + 1)
    assert shared_daemon.client.stats()["seq"] > before["seq"]


def test_numbers_and_texts_of_other_libraries_are_numbers_and_texts(shared_daemon: Any) -> None:
    options = {"score_threshold": np.float32(0.25), "max_detections": np.int64(0), "priority": np.int8(-1),
               "deadline_s": np.float64(5), "mask_format": np.array(["none"])[0]}  # fmt: skip
    assert shared_daemon.client.segment(pixels(0), **options).detections == []
    assert with_client(shared_daemon.endpoint, lambda client: client.segment(pixels(0), **options)).detections == []
    with Client(shared_daemon.endpoint, timeout_s=np.float32(5), retries=np.int64(2)) as client:
        assert answered(client.segment(pixels(0))) == checksum(pixels(0))


@pytest.mark.parametrize("view", [lambda data: memoryview(data)[::2], lambda data: memoryview(data[::2]).cast("b")])
def test_views_of_bytes_arrive_as_they_look(shared_daemon: Any, view: Any) -> None:
    data = bytearray(encoded(pixels(1, 20, 30), "PNG"))
    spread = bytearray(2 * len(data))
    spread[::2] = data
    assert answered(shared_daemon.client.segment(view(spread))) == checksum(pixels(1, 20, 30))


LARGE = np.zeros((1000, 1500, 3), np.uint8)


@pytest.mark.parametrize("transport", ["auto", "socket", "shared"])
def test_an_image_over_the_limit_fails_alone_and_at_once(daemon: Any, transport: Any) -> None:
    """Its frame would be twice what ZeroMQ reads, and cost the connection."""
    running = daemon(devices=["cpu:0"], limits={"max_image_bytes": 1 << 20})
    reason = r"too-large: 4500000 bytes: an image has at most 1048576 \(limits.max_image_bytes\)"

    async def work(client: AsyncClient) -> None:
        large = asyncio.create_task(client.segment(LARGE))
        assert answered(await asyncio.wait_for(client.segment(pixels(1)), 5)) == checksum(pixels(1))
        with pytest.raises(JobFailed, match=reason):
            await asyncio.wait_for(large, 5)

    with_client(running.endpoint, work)
    client = running.connect(transport=transport)
    found = list(client.map([pixels(1), LARGE, pixels(2), LARGE, pixels(3)], on_error="return"))
    assert [str(each).partition(":")[0] for each in found if isinstance(each, JobFailed)] == ["too-large"] * 2
    assert [answered(found[place]) for place in (0, 2, 4)] == [checksum(pixels(number)) for number in (1, 2, 3)]
    assert "gone" not in running.log


def test_the_limits_are_asked_again_of_a_daemon_that_was_restarted(daemon: Any) -> None:
    running = daemon(devices=["cpu:0"], limits={"max_image_bytes": 1 << 20})
    client = running.client
    with pytest.raises(JobFailed, match="too-large"):
        client.segment(LARGE)
    running.kill()
    running.rewrite(limits={"max_image_bytes": 8 << 20})
    running.start()
    running.wait_ready()
    assert client.segment(LARGE).width == 1500


def test_a_daemon_that_knows_no_limits_gets_the_image(peer: Peer) -> None:
    with Client(peer.endpoint, timeout_s=10, transport="socket") as client:
        result = in_thread(lambda: client.segment(LARGE))
        assert peer.receive() == protocol.GetLimits()
        peer.refuse("", Code.BAD_REQUEST)
        peer.finish(peer.receive().job)
        assert result().device == "npu:0"
