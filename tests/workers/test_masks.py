"""Edges instead of bitmaps: the pixels of pasting, wherever rounding does not decide, and pycocotools' own strings."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from blendmaskd_workers import masks
from blendmaskd_workers.blendmask import paste_one
from blendmaskd_workers.results import edges

NEAR = 1e-5  # of the threshold: there float32's rounding decides


def values(probability: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The stretched probabilities at every pixel of the image, in float64: specification section 7, written plainly."""
    side = len(probability)
    padded = np.pad(probability.astype(np.float64), 2)
    x0, y0, x1, y1 = box.astype(np.float64)
    across = np.clip((np.arange(size[1]) + 0.5 - x0) / (x1 - x0) * side - 0.5, -1.5, side + 0.5) + 2
    down = np.clip((np.arange(size[0]) + 0.5 - y0) / (y1 - y0) * side - 0.5, -1.5, side + 0.5) + 2
    i, j = np.floor(across).astype(int), np.floor(down).astype(int)
    u, v = (across - i)[None, :], (down - j)[:, None]
    top = padded[j][:, i] * (1 - u) + padded[j][:, i + 1] * u
    bottom = padded[j + 1][:, i] * (1 - u) + padded[j + 1][:, i + 1] * u
    return top * (1 - v) + bottom * v


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A few masks over clipped boxes, thin and tiny ones too, in a small image."""
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    count, side = draw(st.integers(1, 4)), draw(st.integers(2, 7))
    levels = st.sampled_from([0.0, 0.2, 0.49, 0.5, 0.51, 0.8, 1.0])
    probabilities = draw(arrays.arrays(np.float32, (count, side, side), elements=levels))
    boxes = []
    for _ in range(count):
        x0, x1 = sorted(draw(st.lists(st.floats(0, width, width=32), min_size=2, max_size=2)))
        y0, y1 = sorted(draw(st.lists(st.floats(0, height, width=32), min_size=2, max_size=2)))
        boxes.append([x0, y0, x1 if x1 - x0 > 1e-3 else x0 + 0.5, y1 if y1 - y0 > 1e-3 else y0 + 0.5])
    clipped = np.clip(np.array(boxes, np.float32), 0, [width, height, width, height]).astype(np.float32)
    clipped[:, :2] = np.minimum(clipped[:, :2], clipped[:, 2:] - np.float32(0.25))
    return probabilities, np.maximum(clipped, 0), (height, width)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_pixels_are_those_of_pasting_and_strings_those_of_pycocotools(case) -> None:
    probabilities, boxes, size = case
    found = masks.encode(probabilities, boxes, size)
    assert len(found) == len(boxes)
    for probability, box, rle in zip(probabilities, boxes, found):
        ours = coco_mask.decode(rle).astype(bool)
        wanted = values(probability, box, size)
        clear = np.abs(wanted - 0.5) > NEAR
        np.testing.assert_array_equal(ours[clear], wanted[clear] >= 0.5)
        assert coco_mask.encode(np.asfortranarray(ours.astype(np.uint8)))["counts"].decode() == rle["counts"]
        for found_edges, wanted_edges in zip(masks.edges(probability, box, size), edges((ours, (0, 0)))):
            np.testing.assert_array_equal(found_edges, wanted_edges)


@pytest.mark.parametrize("scale", [1.0, 2.66], ids=["its own size", "800x1200"])
def test_real_masks_equal_pasted_ones(scale: float) -> None:
    golden = np.load(Path(__file__).parents[1] / "golden" / "R_50_1x_chelsea.npz")
    size = tuple(int(side * scale) for side in golden["img0_orig_hw"])
    boxes = np.clip(golden["img0_pred_boxes"] * np.float32(scale), 0, [size[1], size[0]] * 2).astype(np.float32)
    rng = np.random.default_rng(0)
    probabilities = np.cumsum(np.cumsum(rng.normal(size=(len(boxes), 56, 56)), axis=1), axis=2)
    probabilities = (1 / (1 + np.exp(-probabilities / 8))).astype(np.float32)
    for rle, probability, box in zip(masks.encode(probabilities, boxes, size), probabilities, boxes):
        differs = coco_mask.decode(rle).astype(bool) != paste_one(probability, box, size)
        assert differs.sum() <= 2
        assert (np.abs(values(probability, box, size)[differs] - 0.5) < NEAR).all()


@pytest.mark.slow
def test_long_runs_take_many_groups() -> None:
    probability, box, size = np.ones((2, 2), np.float32), np.array([4000, 0, 4100, 5000], np.float32), (5000, 8000)
    [rle] = masks.encode(probability[None], box[None], size)
    assert coco_mask.area(rle) == (values(probability, box, size) >= 0.5).sum()
    assert rle["counts"].startswith("a]\\Rc0")


def test_no_mask_gives_no_string() -> None:
    assert masks.encode(np.zeros((0, 7, 7), np.float32), np.zeros((0, 4), np.float32), (9, 9)) == []
    [nothing] = masks.encode(np.zeros((1, 7, 7), np.float32), np.array([[1, 1, 5, 5]], np.float32), (9, 9))
    assert coco_mask.area(nothing) == 0
