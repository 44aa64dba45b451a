"""What is remembered of images that workers died with, by example."""
from __future__ import annotations

from typing import Any

import msgspec
import pytest

from blendmaskd.core.regions import RegionError
from blendmaskd.core.suspects import KEEP_S, MOST, Death, Suspects, Suspicion
from blendmaskd.protocol import Image, Place

RAW = Image(kind="raw", shape=(20, 10, 3))
BYTES = bytes(range(200)) * 3
MEMORY = b"x" * 100 + BYTES


def read(place: Place, start: int, end: int) -> bytes:
    if place.region != "r":
        raise RegionError("it has ended")
    return MEMORY[place.offset + start : place.offset + end]


def in_memory(image: Image, region: str = "r") -> Image:
    return msgspec.structs.replace(image, place=Place(region=region, offset=100, bytes=len(BYTES)))


@pytest.fixture
def suspects() -> Suspects:
    return Suspects(read)


def keep(suspects: Suspects, image: Image = RAW, payload: Any = (BYTES,), now: float = 0.0) -> Suspicion:
    found = suspects.keep(Suspicion(suspects.identify(image, payload)), now)
    suspects.check()
    return found


def test_an_image_is_its_bytes_and_their_layout(suspects) -> None:
    kept = keep(suspects)
    assert suspects.find(RAW, [bytearray(BYTES)], 1.0) is kept
    assert suspects.find(in_memory(RAW), [], 1.0) is kept, "however it comes"
    others = [
        (Image(kind="raw", shape=(10, 20, 3)), BYTES),
        (msgspec.structs.replace(RAW, order="rgb"), BYTES),
        (Image(kind="encoded"), BYTES),
        (RAW, BYTES[:-1] + b"\0"),
        (RAW, b"\1" + BYTES[1:]),
        (RAW, BYTES[:300] + b"\0" + BYTES[301:]),
        (RAW, BYTES + b"\0"),
        (RAW, b""),
    ]
    assert [suspects.find(image, [payload], 1.0) for image, payload in others] == [None] * len(others)
    assert suspects.find(RAW, [], 1.0) is None


def test_what_a_header_says_beside_encoded_bytes_makes_no_other_image(suspects) -> None:
    kept = keep(suspects, Image(kind="encoded"))
    odd = Image(kind="encoded", shape=(1, 2, 3), dtype="x", order="rgb")
    assert suspects.find(odd, [BYTES], 1.0) is kept
    assert suspects.find(in_memory(odd), [], 1.0) is kept


def test_by_path_it_is_the_path(suspects) -> None:
    kept = keep(suspects, Image(kind="path", path="/a/1.jpg"), ())
    for path in ("/a/1.jpg", "/a/./1.jpg", "/a//b/../1.jpg"):
        assert suspects.find(Image(kind="path", path=path), [], 1.0) is kept
    assert suspects.find(Image(kind="path", path="/a/2.jpg"), [], 1.0) is None


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 71, 72, 600])
def test_images_of_all_sizes_are_known_again(suspects, size) -> None:
    kept = keep(suspects, Image(kind="encoded"), [BYTES[:size]])
    assert suspects.find(Image(kind="encoded"), [BYTES[:size]], 1.0) is kept


def test_what_cannot_be_read_is_no_known_image(suspects) -> None:
    gone = in_memory(RAW, "ended")
    assert suspects.identify(gone, []) is None
    assert keep(suspects, gone, []) is not keep(suspects, gone, [])
    keep(suspects)
    assert suspects.find(gone, [], 1.0) is None


def test_it_is_forgotten_ten_minutes_after_the_last_death(suspects) -> None:
    kept = keep(suspects)
    assert suspects.keep(kept, 60.0) is kept
    assert suspects.find(RAW, [BYTES], KEEP_S + 59.9) is kept
    assert suspects.find(RAW, [BYTES], KEEP_S + 60.0) is None
    suspects.check()
    assert list(suspects) == []


def test_no_more_are_remembered_than_the_bound_the_latest(suspects) -> None:
    for number in range(MOST + 10):
        keep(suspects, Image(kind="encoded"), [number.to_bytes(4, "big")])
    assert len(list(suspects)) == MOST
    assert suspects.find(Image(kind="encoded"), [(9).to_bytes(4, "big")], 1.0) is None
    assert suspects.find(Image(kind="encoded"), [(10).to_bytes(4, "big")], 1.0)


def test_what_is_cleared_is_gone_and_only_that(suspects) -> None:
    kept, other = keep(suspects), keep(suspects, payload=[BYTES[::-1]])
    suspects.clear(kept)
    suspects.clear(kept)
    suspects.check()
    assert suspects.find(RAW, [BYTES], 1.0) is None
    assert suspects.find(RAW, [BYTES[::-1]], 1.0) is other


def test_nothing_is_read_of_an_image_that_looks_like_no_suspect() -> None:
    asked: list[tuple[int, int]] = []

    def watched(place: Place, start: int, end: int) -> bytes:
        asked.append((start, end))
        return read(place, start, end)

    suspects = Suspects(watched)
    assert suspects.find(in_memory(RAW), [], 0.0) is None
    keep(suspects, Image(kind="encoded"))
    keep(suspects, payload=[bytes(len(BYTES) - 1)])
    assert suspects.find(in_memory(RAW), [], 0.0) is None
    assert asked == []
    keep(suspects, payload=[bytes(len(BYTES))])
    assert suspects.find(in_memory(RAW), [], 0.0) is None
    assert all(end - start <= 64 for start, end in asked), "no more than samples of another's"


@pytest.mark.parametrize(
    ("max_attempts", "attempts", "losses", "guilty"),
    [(1, 0, 1, False), (1, 1, 1, True), (1, 0, 2, True), (2, 1, 1, False), (2, 0, 2, True), (2, 2, 2, True),
     (3, 2, 2, False), (3, 0, 3, True)],
)  # fmt: skip
def test_when_it_is_given_up(max_attempts, attempts, losses, guilty) -> None:
    """A neighbour of one that kills is never given up for the first death, whatever `max_attempts` is."""
    deaths = [Death("npu:0", False, True) for _ in range(losses)]
    assert Suspicion(None, attempts=attempts, deaths=deaths).guilty(max_attempts) is guilty
