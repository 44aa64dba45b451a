"""Scaling and clipping boxes; pasting masks inside their window only."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blendmaskd_workers.blendmask import (
    Detections,
    Instances,
    Prepared,
    finish,
    paste_one,
    paste_window,
    postprocess,
)

SIZE = (30, 41)  # of the photograph


def instances(boxes) -> Instances:
    n = len(boxes)
    return Instances(
        boxes=np.array(boxes, np.float32).reshape(n, 4), scores=np.linspace(0.9, 0.1, n, dtype=np.float32),
        classes=np.arange(n), probabilities=np.random.default_rng(0).random((n, 8, 8), np.float32),
        locations=np.zeros((n, 2), np.float32), levels=np.zeros(n, np.int64))


def photograph(net_size=(60, 82)) -> Prepared:
    return Prepared(torch.zeros(3, *net_size), SIZE, net_size, (64, 96))


def test_boxes_are_scaled_and_clipped_and_the_order_stays():
    found = finish(instances([[2, 4, 20, 24], [-10, -10, 90, 90], [60, 50, 100, 100]]), photograph())
    assert found.boxes.tolist() == [[1, 2, 10, 12], [0, 0, 41, 30], [30, 25, 41, 30]]
    assert found.image_size == SIZE


def test_boxes_outside_or_without_area_are_dropped_with_all_their_fields():
    given_ = instances([[-9, 0, -1, 5], [2, 4, 20, 24], [5, 5, 5, 9], [82, 0, 90, 5], [3, 9, 6, 8], [4, 4, 8, 8]])
    found = finish(given_, photograph())
    assert found.classes.tolist() == [1, 5]
    np.testing.assert_array_equal(found.scores, given_.scores[[1, 5]])
    np.testing.assert_array_equal(found.probabilities, given_.probabilities[[1, 5]])


def test_no_instances():
    found = finish(instances([]), photograph())
    assert found.boxes.shape == (0, 4)
    assert list(found.masks()) == []


def full_paste(probability, box, size):
    """Evaluate every pixel of the photograph, as the reference does on a GPU; returns the values (H, W)."""
    (height, width), (x0, y0, x1, y1) = size, torch.tensor(box)
    x = (torch.arange(0, width, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(0, height, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)
    return F.grid_sample(torch.tensor(probability)[None, None], grid[None], align_corners=False)[0, 0].numpy()


@st.composite
def clipped_boxes(draw):
    height, width = SIZE
    x = sorted(draw(st.tuples(*[st.floats(0, width, width=32)] * 2)))
    y = sorted(draw(st.tuples(*[st.floats(0, height, width=32)] * 2)))
    box = np.array([x[0], y[0], x[1], y[1]], np.float32)
    return box if (box[2:] > box[:2]).all() else np.array([3.5, 2.25, 20, 30], np.float32)


@settings(max_examples=200)
@given(clipped_boxes(), st.integers(0, 2**32 - 1), st.sampled_from([2**20, 7]))
def test_pasting_the_window_equals_pasting_everywhere(box, seed, pixels_at_once):
    probability = np.random.default_rng(seed).random((8, 8), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postprocess, "PIXELS_AT_ONCE", pixels_at_once)
        found = paste_one(probability, box, SIZE)
    np.testing.assert_array_equal(found, full_paste(probability, box, SIZE) >= 0.5)


def test_the_window_is_a_pixel_more_than_the_box_and_within_the_photograph():
    window, corner = paste_window(np.ones((4, 4), np.float32), np.array([5.25, 0, 9.25, 30], np.float32), SIZE)
    assert corner == (0, 4)
    assert window.shape == (30, 7)
    assert window[1:-1, 1:5].all()  # columns 5..8 have their centres in the box; corners fade
    assert not window[:, [0, 6]].any()


def test_a_mask_that_fills_its_box_sets_the_pixels_whose_centres_are_well_inside():
    mask = paste_one(np.ones((8, 8), np.float32), np.array([4, 6, 20, 26], np.float32), SIZE)
    expected = np.zeros(SIZE, bool)
    expected[6:26, 4:20] = True
    np.testing.assert_array_equal(mask, expected)


def test_exactly_one_half_belongs_to_the_mask():
    assert paste_one(np.full((1, 1), 0.5, np.float32), np.array([0, 0, 1, 1], np.float32), (1, 1)).all()


def test_read_only_arrays_are_fine_and_masks_come_one_by_one():
    probabilities = np.broadcast_to(np.float32(1), (3, 8, 8))
    boxes = np.broadcast_to(np.array([1, 1, 9, 9], np.float32), (3, 4))
    found = Detections(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), probabilities, SIZE)
    expected = np.zeros((3, *SIZE), bool)
    expected[:, 1:9, 1:9] = True
    np.testing.assert_array_equal(np.stack(list(found.masks())), expected)
