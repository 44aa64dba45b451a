"""Selection and suppression on the host, against references that take one pair, or one survivor, at a time."""

from dataclasses import replace

import numpy as np
import one_at_a_time
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import GOLDEN

from blendmaskd_workers.blendmask import load_config, selection
from blendmaskd_workers.blendmask.fcos import NOT_A_CANDIDATE
from blendmaskd_workers.blendmask.selection import batched_nms, select

NO_LIMIT = 10**6


# ---- references ----

def naive_nms(boxes, scores, threshold: float) -> list[int]:
    """torchvision's CPU kernel, one pair at a time in float32; the threshold is a double."""
    order = sorted(range(len(boxes)), key=lambda i: -scores[i])  # stable
    suppressed = [False] * len(boxes)
    keep = []
    for place, i in enumerate(order):
        if suppressed[i]:
            continue
        keep.append(i)
        for j in order[place + 1:]:
            suppressed[j] = suppressed[j] or iou(boxes[i], boxes[j]) > threshold
    return keep


def iou(a, b) -> float:
    zero = np.float32(0)
    width = max(zero, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(zero, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter))


def naive_batched_nms(boxes, scores, classes, threshold, offset_trick: bool) -> list[int]:
    if offset_trick:
        step = boxes.max() + np.float32(1)
        shifted = [[side + np.float32(c) * step for side in box] for box, c in zip(boxes, classes)]
        return naive_nms(shifted, scores, threshold)
    keep = []
    for c in sorted(set(classes.tolist())):
        mine = [i for i in range(len(boxes)) if classes[i] == c]
        keep += [mine[i] for i in naive_nms(boxes[mine], scores[mine], threshold)]
    return sorted(sorted(keep), key=lambda i: -scores[i])


def best_with_ties(keep: list[int], scores, topk: int) -> list[int]:
    if len(keep) <= topk:
        return keep
    last = sorted((scores[i] for i in keep), reverse=True)[topk - 1]
    return [i for i in keep if scores[i] >= last]


# ---- suppression ----

@st.composite
def crowds(draw):
    """Boxes on a coarse grid, so that equal, touching, empty and negative ones and equal scores are common."""
    n = draw(st.integers(1, 40))
    corner, side = st.integers(-40, 40), st.integers(0, 24)
    rows = draw(st.lists(st.tuples(corner, corner, side, side), min_size=n, max_size=n))
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in rows], np.float32)
    boxes = boxes * np.float32(draw(st.sampled_from([1, 0.37, 13.1])))
    scores = np.array(draw(st.lists(st.integers(1, 8), min_size=n, max_size=n)), np.float32) / np.float32(9)
    classes = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int64)
    return boxes, scores, classes


@given(crowds(), st.sampled_from([0.3, 0.5, 0.6]), st.sampled_from([1, 3, NO_LIMIT]), st.booleans())
def test_suppression_equals_the_naive_reference(crowd, threshold, topk, offset_trick):
    boxes, scores, classes = crowd
    expected = best_with_ties(naive_batched_nms(boxes, scores, classes, threshold, offset_trick), scores, topk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "OFFSET_TRICK_LIMIT", 1000 if offset_trick else 0)
        found = batched_nms(boxes, scores, classes, threshold, topk)
    assert found.tolist() == expected


@st.composite
def large_crowds(draw):
    """More boxes than are suppressed together, some equal in score, without area, vast or not finite."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, spread = draw(st.integers(1, 500)), draw(st.sampled_from([20, 200, 2000]))
    corners = rng.integers(-spread, spread, (n, 2))
    boxes = np.concatenate([corners, corners + rng.integers(0, 60, (n, 2))], axis=1).astype(np.float32)
    boxes += rng.random(boxes.shape, np.float32) * np.float32(draw(st.booleans()))
    scores = rng.random(n, np.float32)
    if steps := draw(st.sampled_from([0, 4, 30])):  # few different scores: many tie with the last that is kept
        scores = np.floor(scores * steps) / np.float32(steps)
    odd = np.array([np.nan, np.inf, -np.inf, 3e38, 0, -0.0], np.float32)
    for values in (boxes.ravel(), scores):
        places = rng.random(values.shape) < draw(st.sampled_from([0, 0, 0.01, 0.2]))
        values[places] = rng.choice(odd, places.sum())
    return boxes, scores, rng.integers(0, draw(st.sampled_from([1, 3, 80])), n)


@settings(max_examples=300)
@given(large_crowds(), st.sampled_from([0.3, 0.6]), st.sampled_from([1, 63, 64, 65, 100, NO_LIMIT]), st.booleans())
def test_suppression_in_blocks_equals_one_survivor_at_a_time(crowd, threshold, topk, offset_trick):
    limit = 1000 if offset_trick else 0
    expected = one_at_a_time.batched_nms(*crowd, threshold, topk, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "OFFSET_TRICK_LIMIT", limit)
        found = batched_nms(*crowd, threshold, topk)
    assert found.tolist() == expected.tolist()
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(("fillers", "both_stay"), [(998, False), (999, True)])
def test_classes_can_meet_only_up_to_a_thousand_boxes(fillers, both_stay):
    """Shifted by the largest coordinate plus one, the second class's box at negative coordinates lands on the first."""
    apart = np.arange(fillers, dtype=np.float32)[:, None] * 2 + np.array([0, -900, 1, -899], np.float32)
    first = np.array([[0, 0, 2, 2]], np.float32)
    boxes = np.concatenate([first, first - (apart.max() + 1), apart])
    scores = np.linspace(0.9, 0.1, len(boxes), dtype=np.float32)
    classes = np.array([0, 1] + [0] * fillers)
    keep = batched_nms(boxes, scores, classes, 0.6, NO_LIMIT)
    assert 0 in keep
    assert (1 in keep) is both_stay


def test_overlap_is_compared_with_the_threshold_in_double_precision():
    """An IoU of float32(0.6) is above the double 0.6; a comparison in float32 would call them equal."""
    boxes = np.array([[0, 0, 5, 1], [0, 0, 3, 1]], np.float32)
    assert batched_nms(boxes, np.array([0.9, 0.8], np.float32), np.zeros(2, np.int64), 0.6, NO_LIMIT).tolist() == [0]


def test_boxes_without_area_do_not_suppress_each_other():
    boxes = np.zeros((3, 4), np.float32)
    assert len(batched_nms(boxes, np.ones(3, np.float32), np.zeros(3, np.int64), 0.6, NO_LIMIT)) == 3


def test_suppressing_nothing():
    assert batched_nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), 0.6, 1).size == 0


# ---- selection ----

SIZES = [(4, 6), (2, 3), (1, 2), (1, 1), (1, 1)]  # heights and widths of p3..p7
LARGER_SIZES = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]
LARGER = replace(load_config(GOLDEN / "small_R18.yaml"), num_classes=5)


def packed_candidates(config, chosen):
    """Pack `chosen` = {(level, cell, class): (confidence, distances)}; all others are no candidates."""
    parts = []
    for level, (height, width) in enumerate(SIZES):
        rows = np.full((min(height * width * config.num_classes, config.pre_nms_topk), 7), 0, np.float32)
        rows[:, 0] = NOT_A_CANDIDATE
        mine = [(key, value) for key, value in chosen.items() if key[0] == level]
        for row, ((_, cell, c), (confidence, distances)) in zip(rows, mine):
            row[:] = confidence, c, cell, *distances
        parts.append(rows)
    return np.concatenate(parts)


def test_boxes_scores_and_locations_of_a_candidate(small_config):
    packed = packed_candidates(small_config, {(1, 4, 2): (0.25, (1, 2, 3, 4))})
    found = select(packed, SIZES, small_config)
    assert found.scores.tolist() == [0.5]
    assert found.classes.tolist() == [2]
    assert found.levels.tolist() == [1]
    assert found.cells.tolist() == [4]
    assert found.locations.tolist() == [[24, 24]]  # row 1, column 1 at stride 16
    assert found.boxes.tolist() == [[24 - 16, 24 - 32, 24 + 48, 24 + 64]]


def test_equal_scores_keep_the_order_of_level_location_class(small_config):
    apart = (0.1, 0.1, 0.1, 0.1)
    chosen = dict.fromkeys([(1, 1, 0), (0, 23, 1), (0, 23, 0), (0, 2, 2), (4, 0, 1)], (0.25, apart))
    found = select(packed_candidates(small_config, chosen), SIZES, small_config)
    assert list(zip(found.levels, found.cells, found.classes)) == [
        (0, 2, 2), (0, 23, 0), (0, 23, 1), (1, 1, 0), (4, 0, 1)]


def test_all_that_tie_with_the_last_are_kept(small_config):
    config = replace(small_config, post_nms_topk=2)
    apart = (0.1, 0.1, 0.1, 0.1)
    confidences = [0.5, 0.4, 0.4, 0.4, 0.3]
    chosen = {(0, cell, 0): (confidence, apart) for cell, confidence in enumerate(confidences)}
    assert select(packed_candidates(config, chosen), SIZES, config).cells.tolist() == [0, 1, 2, 3]


def test_nothing_above_the_threshold(small_config):
    found = select(packed_candidates(small_config, {}), SIZES, small_config)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_boxes_that_are_not_finite_are_dropped(small_config):
    chosen = {(0, 0, 0): (0.9, (np.inf, 1, 1, 1)), (0, 1, 0): (0.8, (np.nan, 1, 1, 1)),
              (0, 2, 0): (0.7, (3e38, 1, 1, 1)), (0, 3, 0): (0.6, (1, 1, 1, 1))}
    assert select(packed_candidates(small_config, chosen), SIZES, small_config).cells.tolist() == [3]


@st.composite
def packed(draw):
    """Candidates as a device may give them, in any order, with distances and confidences of all kinds."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    parts = []
    for height, width in LARGER_SIZES:
        pairs = rng.permutation(height * width * LARGER.num_classes)[: LARGER.pre_nms_topk]
        rows = np.empty((len(pairs), 7), np.float32)
        rows[:, 0] = rng.random(len(rows), np.float32)
        rows[:, 1], rows[:, 2] = pairs % LARGER.num_classes, pairs // LARGER.num_classes
        rows[:, 3:] = rng.random((len(rows), 4), np.float32) * np.float32(draw(st.sampled_from([0.5, 3, 50])))
        parts.append(rows)
    packed = np.concatenate(parts)
    if steps := draw(st.sampled_from([0, 5, 60])):
        packed[:, 0] = np.floor(packed[:, 0] * steps) / np.float32(steps)
    packed[rng.random(len(packed)) < draw(st.sampled_from([0, 0.2, 0.6, 0.99])), 0] = NOT_A_CANDIDATE
    odd = rng.random(packed.shape) < draw(st.sampled_from([0, 0.05]))
    odd[:, 1:3] = False
    packed[odd] = rng.choice(np.array([np.nan, np.inf, 3e38, 0], np.float32), odd.sum())
    return packed


@settings(max_examples=200)
@given(packed(), st.sampled_from([1, 100, NO_LIMIT]))
def test_selection_equals_one_level_and_one_survivor_at_a_time(packed, topk):
    """With 1540 candidates at most, classes are kept apart by either rule."""
    config = replace(LARGER, post_nms_topk=topk)
    found, expected = select(packed, LARGER_SIZES, config), one_at_a_time.select(packed, LARGER_SIZES, config)
    for name in selection.Selection.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), strict=True, err_msg=name)
