"""ROIAlign at and beyond the edges, and the blend, against one-sample-at-a-time arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blendmaskd_workers.blendmask.blender import blend, roi_align

HEIGHT, WIDTH, SIDE = 5, 7, 4  # of the bases, and of the crop
BASES = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


def naive_sample(base: np.ndarray, y: float, x: float) -> float:
    """One bilinear sample as torchvision's CPU kernel takes it."""
    height, width = base.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = int(y), int(x)
    y1, x1 = y0 + 1, x0 + 1
    if y0 >= height - 1:
        y = y0 = y1 = height - 1
    if x0 >= width - 1:
        x = x0 = x1 = width - 1
    down, right = y - y0, x - x0
    return ((1 - down) * (1 - right) * base[y0, x0] + (1 - down) * right * base[y0, x1]
            + down * (1 - right) * base[y1, x0] + down * right * base[y1, x1])


def naive_roi_align(bases: np.ndarray, box, side: int) -> np.ndarray:
    x0, y0, x1, y1 = (coordinate * 0.25 - 0.5 for coordinate in box)
    return np.array([
        [[naive_sample(base, y0 + (i + 0.5) * (y1 - y0) / side, x0 + (j + 0.5) * (x1 - x0) / side)
          for j in range(side)] for i in range(side)]
        for base in bases
    ])


def crop(boxes, image: int = 0) -> np.ndarray:
    return roi_align(BASES, torch.full((len(boxes),), image), torch.tensor(boxes), SIDE).numpy()


# Eighths keep samples exact in float32, so that samples on the very edge fall on the same side in both.
sides = st.integers(-20 * 8, 60 * 8).map(lambda eighths: eighths / 8)


@settings(max_examples=200)
@given(st.lists(st.tuples(sides, sides, sides, sides), min_size=1, max_size=5), st.integers(0, 1))
def test_roi_align_equals_one_sample_at_a_time(boxes, image):
    expected = np.stack([naive_roi_align(BASES[image].numpy().astype(np.float64), box, SIDE) for box in boxes])
    np.testing.assert_allclose(crop(boxes, image), expected, rtol=0, atol=1e-5)


def test_a_base_pixel_has_its_centre_in_the_middle_of_its_four_pixels():
    box = [4.0, 8.0, 20.0, 24.0]  # covers exactly base pixels 1..4 by 2..5
    assert torch.equal(torch.tensor(crop([box])[0, :, :3]), BASES[0, :, 2:5, 1:5])


def test_more_than_one_base_pixel_outside_is_exactly_zero_and_less_repeats_the_border():
    found = crop([[-8.0, 0.0, 8.0, 16.0]])[0]  # columns at -2, -1, 0, 1
    assert (found[:, :, 0] == 0).all()
    assert torch.equal(torch.tensor(found[:, :, 1]), BASES[0, :, :4, 0])
    assert torch.equal(torch.tensor(found[:, :, 2]), BASES[0, :, :4, 0])
    assert torch.equal(torch.tensor(found[:, :, 3]), BASES[0, :, :4, 1])


def test_the_far_border_reaches_one_base_pixel_further_than_the_last_centre():
    found = crop([[20.0, 0.0, 36.0, 16.0]])[0]  # columns at 5, 6, 7, 8 of 7
    assert torch.equal(torch.tensor(found[:, :, 1]), BASES[0, :, :4, 6])
    assert torch.equal(torch.tensor(found[:, :, 2]), BASES[0, :, :4, 6])
    assert (found[:, :, 3] == 0).all()


@pytest.mark.parametrize("box", [[np.nan] * 4, [-np.inf, 0, np.inf, 9], [0, 0, 3e38, 9], [-3e38, 0, 3e38, 9]])
def test_boxes_without_a_sensible_place_are_harmless(box):
    assert np.isfinite(crop([box])).all()


def test_a_box_without_area_samples_one_point():
    found = crop([[6.0, 6.0, 6.0, 6.0]])[0]
    np.testing.assert_array_equal(found, np.broadcast_to(BASES[0, :, 1, 1].numpy()[:, None, None], found.shape))


def test_blend_weights_the_bases_by_the_softmax_of_the_attention():
    box = torch.tensor([[4.0, 0.0, 20.0, 16.0]])
    attention = torch.tensor([0.0, 1.0, 2.0])[None, :, None, None].expand(1, 3, 2, 2)
    found = blend(BASES, attention, torch.tensor([1]), box, SIDE)
    weights = torch.tensor([0.0, 1.0, 2.0]).softmax(0)[:, None, None]
    assert found.shape == (1, SIDE, SIDE)
    torch.testing.assert_close(found[0], (BASES[1, :, :4, 1:5] * weights).sum(0).sigmoid())


def test_attention_is_interpolated_before_the_softmax():
    bases = torch.tensor([1.0, -1.0])[None, :, None, None].expand(1, 2, 8, 8)
    attention = torch.tensor([[[[4.0, 0.0]] * 2, [[0.0, 4.0]] * 2]])  # (1, 2, 2, 2)
    found = blend(bases, attention, torch.tensor([0]), torch.tensor([[4.0, 4.0, 20.0, 20.0]]), 4)[0, 0]
    difference = torch.tensor([4.0, 2.0, -2.0, -4.0])  # logits' difference at the four columns, linear
    torch.testing.assert_close(found, torch.tanh(difference / 2).sigmoid())
