from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from blendmaskd.images.overlay import colour, draw

# pycocotools 2.0.11 hands numpy an array by a protocol that numpy 2.4 warns about.

GREY = 128


def plain(width: int = 300, height: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY, GREY, GREY))


def result(bbox: tuple[float, ...], score: float = 0.9, name: str = "cat", **more: Any) -> dict[str, Any]:
    return {"bbox": list(bbox), "score": score, "class_index": 0, "category_id": 1, "category_name": name, **more}


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def block(height: int, width: int, rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def changed(image: Image.Image) -> np.ndarray:
    return (np.asarray(image) != GREY).any(axis=2)


def opacity(pixel: np.ndarray, own: tuple[int, int, int], below: float | np.ndarray = GREY) -> float:
    """How much of the colour was mixed into the pixel, from the channel that says it best."""
    share = (pixel - below) / (np.array(own, float) - below)
    return float(share[np.argmax(np.abs(np.array(own) - below))])


def test_a_mask_is_tinted_and_outlined_and_what_is_beside_it_is_left_alone() -> None:
    mask = block(200, 300, slice(70, 130), slice(110, 190))
    image = plain()
    drawn = draw(image, [result((100, 60, 100, 80), segmentation=rle(mask))])
    assert drawn.size == image.size
    assert drawn.mode == "RGB"
    pixels = np.asarray(drawn).astype(float)
    assert 0.3 < opacity(pixels[100, 150], colour(0)) < 0.6
    for outside, inside in ((109, 110), (190, 189)):
        border = opacity(pixels[100, inside], colour(0))
        assert border > 0.7
        assert opacity(pixels[100, outside], colour(0)) == pytest.approx(border, abs=0.05)
    np.testing.assert_array_equal(pixels[60, 150], colour(0))  # the box
    assert not changed(drawn)[62:68, 102:198].any()  # between box and mask
    beside = changed(drawn)
    beside[60:140, 100:200] = False
    beside[40:60, 95:160] = False  # the tag, above the box
    assert not beside.any()
    assert not changed(image).any()


def test_polygons_look_like_the_mask_they_outline() -> None:
    mask = block(200, 300, slice(60, 140), slice(100, 200))
    by_rle = draw(plain(), [result((100, 60, 100, 80), segmentation=rle(mask))])
    corners = [100, 60, 200, 60, 200, 140, 100, 140]
    by_polygon = draw(plain(), [result((100, 60, 100, 80), segmentation=[[float(number) for number in corners]])])
    differs = (np.asarray(by_rle) != np.asarray(by_polygon)).any(axis=2)
    assert differs.mean() < 0.01


@pytest.mark.parametrize("more", [{}, {"segmentation": []}, {"segmentation": rle(np.zeros((200, 300), bool))}])
def test_without_a_mask_box_and_tag_are_drawn(more: dict[str, Any]) -> None:
    drawn = draw(plain(), [result((100, 60, 100, 80), **more)])
    assert changed(drawn)[60, 100:200].all()
    assert not changed(drawn)[100, 110:190].any()


def test_without_results_nothing_is_drawn() -> None:
    assert not changed(draw(plain(), [])).any()


def test_a_mask_of_another_size_is_refused_with_both_sizes() -> None:
    turned = rle(np.ones((300, 200), bool))
    with pytest.raises(ValueError, match=r"size \[300, 200\], the image \[200, 300\] \(height, width\)"):
        draw(plain(300, 200), [result((0, 0, 9, 9), segmentation=turned)])


def test_a_small_instance_is_drawn_over_a_large_one_of_higher_score() -> None:
    large = result((0, 0, 300, 200), 0.9, segmentation=rle(np.ones((200, 300), bool)))
    small = result((140, 90, 30, 30), 0.5, segmentation=rle(block(200, 300, slice(90, 120), slice(140, 170))))
    below = np.asarray(draw(plain(), [large]))[105, 155].astype(float)
    pixel = np.asarray(draw(plain(), [large, small]))[105, 155]
    tint = opacity(pixel, colour(1), below)
    np.testing.assert_allclose(pixel, below + tint * (np.array(colour(1)) - below), atol=2)
    assert 0.3 < tint < 0.6


def test_grey_and_transparent_images_are_drawn_in_colour() -> None:
    for mode in ("L", "RGBA", "P"):
        assert draw(plain().convert(mode), [result((10, 50, 80, 60))]).mode == "RGB"


def test_a_tag_is_whole_wherever_its_box_is() -> None:
    def tag_pixels(x: float, y: float) -> int:
        return int(changed(draw(plain(), [result((x, y, 1, 1))])).sum())

    wanted = tag_pixels(150, 100)
    assert wanted > 500
    for x in (0, 150, 299):
        for y in (0, 3, 100, 199):
            assert abs(tag_pixels(x, y) - wanted) <= 4  # pixels of the box, and those that round the tag's corners


def test_a_name_too_long_for_the_image_is_written_smaller() -> None:
    pixels = np.asarray(draw(plain(130, 60), [result((5, 30, 20, 20), name="WWWWWWWWWWWWWW")]))
    ink = pixels[:, :, 1] > 150  # neither the image nor the tag has as much green
    assert ink.any()
    assert not ink[:, [0, -1]].any()


def test_tags_of_neighbours_do_not_cover_each_other() -> None:
    alone = changed(draw(plain(), [result((100, 100, 60, 40))])).sum()
    both = draw(plain(), [result((100, 100, 60, 40)), result((100, 100, 60, 40), 0.8)])
    tag = alone - changed(draw(plain(), [result((100, 100, 60, 40), name="")])).sum()
    assert changed(both).sum() > alone + tag


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (8, 8), (3, 400)])
def test_the_smallest_images_are_drawn(size: tuple[int, int]) -> None:
    width, height = size
    boxes = [(0, 0, width, height), (width - 0.4, height - 0.4, 0.4, 0.4), (0.2, 0.2, 0.1, 0.1)]
    whole = rle(np.ones((height, width), bool))
    assert draw(plain(*size), [result(box, segmentation=whole) for box in boxes]).size == size


def test_names_in_other_scripts_are_drawn() -> None:
    drawn = draw(plain(), [result((50, 50, 100, 100), name="кошка 猫 café")])
    assert changed(drawn)[:50].any()


def test_the_colours_of_a_crowd_are_distinct_and_stay_when_it_grows() -> None:
    colours = [colour(place) for place in range(100)]
    assert len(set(colours)) == 100
    distances = [np.abs(np.subtract(one, other)).max() for one, other in combinations(colours[:20], 2)]
    assert min(distances) >= 40
    few, many = ([result((20 * i, 100, 10, 10)) for i in range(count)] for count in (1, 9))
    line = np.asarray(draw(plain(), few))[100, 5], np.asarray(draw(plain(), many))[100, 5]
    np.testing.assert_array_equal(*line)
    np.testing.assert_array_equal(line[0], colour(0))
