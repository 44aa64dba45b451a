"""`map` of either client: its window, its order, and where failures go."""
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients import Pixels, answered, checksum, outcomes, pixels, with_client

from blendmaskd.client.blocking import AsyncClient, JobFailed
from blendmaskd.protocol import Code


def test_map_keeps_the_window_full_and_the_order(shared_daemon: Any) -> None:
    taken = itertools.count(1)
    at_work = []
    last = 0

    def images() -> Iterator[Pixels]:
        nonlocal last
        for number in range(60):
            last = next(taken)
            yield pixels(number)

    for place, result in enumerate(shared_daemon.client.map(images(), window=7)):
        assert answered(result) == checksum(pixels(place))
        at_work.append(last - place)
    assert place == 59
    assert at_work[:50] == [7] * 50
    assert max(at_work) == 7


def test_map_uses_both_devices(shared_daemon: Any) -> None:
    results = list(shared_daemon.client.map([pixels(0)] * 20))
    assert {result.device for result in results} == {"cpu:0", "cpu:1"}


def test_map_returns_failures_in_their_place_or_raises_the_first(shared_daemon: Any, tmp_path: Path) -> None:
    images = [pixels(0), b"no image", tmp_path / "missing.png", pixels(3), tmp_path, b"", pixels(6)]
    results = list(shared_daemon.client.map(images, on_error="return", window=3))
    failed = {place: result for place, result in enumerate(results) if isinstance(result, JobFailed)}
    assert {place: result.code for place, result in failed.items()} == dict.fromkeys((1, 2, 4, 5), Code.BAD_IMAGE)
    assert failed[2].reason == "cannot be read: No such file or directory"
    assert failed[4].reason == "cannot be read: Is a directory"
    for place in (0, 3, 6):
        assert answered(results[place]) == checksum(images[place])
    raising = shared_daemon.client.map(images, window=3)
    assert answered(next(raising)) == checksum(images[0])
    with pytest.raises(JobFailed, match="bad-image"):
        next(raising)
    raising = shared_daemon.client.map([images[0], images[2]])
    assert answered(next(raising)) == checksum(images[0])
    with pytest.raises(FileNotFoundError):
        next(raising)


def test_an_unfinished_map_cancels_what_is_in_flight(slow_daemon: Any, wait_until: Any) -> None:
    before = outcomes(slow_daemon)
    results = slow_daemon.client.map([pixels(number) for number in range(10)], window=6)
    assert answered(next(results)) == checksum(pixels(0))
    results.close()

    def new(outcome: str) -> int:
        return outcomes(slow_daemon).get(outcome, 0) - before.get(outcome, 0)

    wait_until(lambda: new("answered") + new("cancelled") == 6)
    assert new("cancelled") > 0


def test_async_map_keeps_the_order_and_raises_the_first_failure(shared_daemon: Any) -> None:
    async def work(client: AsyncClient) -> None:
        images = [pixels(number) for number in range(30)]
        results = [answered(result) async for result in client.map(images, window=5, mask_format="none")]
        assert results == [checksum(image) for image in images]
        assert (await client.stats())["window_s"] == 10
        with pytest.raises(JobFailed, match="bad-image"):
            [result async for result in client.map([pixels(0), b"no image", pixels(2)], window=2)]
        with pytest.raises(ValueError, match="window = 0"):
            [result async for result in client.map([pixels(0)], window=0)]
        assert answered(await client.segment(pixels(9))) == checksum(pixels(9))

    with_client(shared_daemon.endpoint, work)
