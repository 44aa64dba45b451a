import io
import threading
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blendmaskd_workers import outlines
from blendmaskd_workers.preview import BEST, EACH_S, SHARE, SIDE, Previews, picture
from blendmaskd_workers.results import edges, encode_rle

RED_BGR = np.zeros((40, 60, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
RED = Image.new("RGB", (60, 40), "red")


def result(score: float = 0.9, bbox: tuple[float, ...] = (5, 5, 20, 20)) -> dict[str, Any]:
    return {"bbox": list(bbox), "score": score, "category_name": "thing"}


def opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")


def test_a_picture_is_the_image_with_its_results() -> None:
    plain, drawn = opened(picture(RED, [])), opened(picture(RED, [result()]))
    assert plain.size == drawn.size == (60, 40)
    red, green, blue = plain.getpixel((30, 35))
    assert (red > 240, green < 20, blue < 20) == (True, True, True)
    assert np.abs(np.asarray(plain, int) - np.asarray(drawn, int)).max() > 60


def test_a_picture_is_small_and_has_the_best_only() -> None:
    many = [result(bbox=(1, 1, 8, 8))] * BEST
    large = Image.new("RGB", (3000, 1500))
    assert opened(picture(large, many)).size == (SIDE, SIDE // 2)
    assert picture(large, [*many, result(0.1, (1500, 700, 900, 700))]) == picture(large, many)


@pytest.mark.parametrize("as_polygons", [False, True])
def test_a_mask_is_drawn_small_where_it_lies(as_polygons: bool) -> None:
    size = (1501, 2999)
    mask = np.hypot(np.arange(size[0])[:, None] - 400, np.arange(size[1]) - 2200) < 300
    found = result(bbox=(1900, 100, 600, 600))
    whole = [part.ravel().tolist() for part in outlines.trace(*edges((mask, (0, 0))))]
    found["segmentation"] = whole if as_polygons else encode_rle((mask, (0, 0)), size)
    large = Image.new("RGB", size[::-1], "white")
    drawn = np.asarray(opened(picture(large, [found])), int)
    plain = np.asarray(opened(picture(large, [])), int)
    rows, columns = (np.arange(count) * side // count for count, side in zip(drawn.shape, size))
    tinted = np.abs(drawn - plain).max(axis=2) > 60
    assert tinted[mask[np.ix_(rows, columns)]].mean() > 0.98
    assert tinted[~mask[np.ix_(rows, columns)]].mean() < 0.03  # the box and its tag
    assert picture(large, [found]) == picture(large, [found]), "the results are left as they are"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_image_in_each_period_is_taken_and_it_is_a_copy() -> None:
    clock = Clock()
    previews = Previews(lambda jpeg: None, clock)
    pixels = RED_BGR.copy()
    taken = previews.take(pixels)
    assert taken is not None
    pixels[:] = 0  # its client's memory again
    assert taken == RED
    assert previews.take(pixels) is None
    clock.now += EACH_S
    assert previews.take(pixels) is not None


def test_a_picture_that_took_long_keeps_the_next_one_away() -> None:
    clock = Clock()

    def send(jpeg: bytes) -> None:
        clock.now += 3.0  # it and the drawing

    previews = Previews(send, clock)
    taken = previews.take(RED)
    assert taken is not None
    previews.draw(taken, [result()])
    previews._artist.shutdown()
    clock.now = 103.0 + 3.0 / SHARE - 0.1
    assert previews.take(RED) is None
    clock.now += 0.2
    assert previews.take(RED) is not None


def test_what_cannot_be_drawn_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    sent = threading.Event()
    previews = Previews(lambda jpeg: sent.set(), clock)
    previews.draw(RED, [{"bbox": [0, 0, 1, 1], "segmentation": {"size": [1, 1], "counts": "0"}}])
    previews.draw(RED, [result()])
    assert sent.wait(20)
    assert "could not be drawn" in caplog.text
