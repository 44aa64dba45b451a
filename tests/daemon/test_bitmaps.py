"""Segmentations are decoded as pycocotools does, and damaged ones are refused."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from blendmaskd.coco.bitmaps import decode
from blendmaskd_workers import outlines
from blendmaskd_workers.results import edges

BITMAPS = arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=2, max_side=70))


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@given(BITMAPS)
def test_an_rle_is_decoded_to_the_pixel(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(rle(mask), *mask.shape), mask)


@given(BITMAPS)
def test_polygons_of_a_mask_are_that_mask_again(mask: np.ndarray) -> None:
    polygons = [part.ravel().tolist() for part in outlines.trace(*edges((mask, (0, 0))))]
    np.testing.assert_array_equal(decode(polygons, *mask.shape), mask)


@pytest.mark.parametrize("mask", [np.zeros((3, 5), bool), np.ones((3, 5), bool), np.eye(1200, 1300, dtype=bool)])
def test_runs_of_any_length(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(decode(rle(mask), *mask.shape), mask)


@given(st.lists(st.lists(st.integers(-300, 1100).map(lambda tenths: tenths / 10), min_size=6, max_size=12)
                .filter(lambda numbers: len(numbers) % 2 == 0), min_size=1, max_size=3))  # fmt: skip
def test_a_slanted_polygon_has_the_pixels_whose_centres_are_in_it(polygons: list[list[float]]) -> None:
    """pycocotools moves each corner to a fifth of a pixel, so only pixels on an outline may differ."""
    height, width = 60, 80
    ours = decode(polygons, height, width)
    theirs = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
    outlines = sum(np.hypot(*np.diff([*points, points[0]], axis=0).T).sum() for points in
                   (np.reshape(polygon, (-1, 2)) for polygon in polygons))  # fmt: skip
    assert (ours != theirs).sum() <= outlines


@pytest.mark.parametrize("segmentation", [[], [[]], [[3.0, 4.0]], [[1.0, 1.0, 9.0, 9.0]]])
def test_no_polygon_and_one_of_no_area_have_no_pixels(segmentation: list[list[float]]) -> None:
    assert not decode(segmentation, 20, 30).any()


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ({"size": [30, 20], "counts": "x"}, "the image \\[20, 30\\]"),
        ({"size": [20, 30], "counts": ""}, "add up"),
        ({"size": [20, 30], "counts": "0Z"}, "damaged"),
        ({"size": [20, 30], "counts": "PPPPPPPPPPPPP0"}, "damaged"),
        ({"size": [20, 30], "counts": "5"}, "add up to 20 x 30"),
        ({"size": [20, 30], "counts": "\x7f"}, "damaged"),
        ({"size": [20, 30], "counts": "ñ"}, "damaged"),
        ({"size": [20, 30], "counts": "@0hb0"}, "damaged|add up"),
    ],
)
def test_what_is_no_mask_of_the_image_is_refused(segmentation: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(segmentation, 20, 30)
