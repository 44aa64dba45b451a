"""Training targets against plain loops: who owns which location, and masks within boxes.

`test_losses.py` has targets recorded from the real AdelaiDet; here are the cases that no photograph shows.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from blendmaskd_workers.training.targets import GroundTruth, Targets, assign, bitmap_mask, centreness, polygon_mask

STRIDES = (8, 16, 32, 64, 128)
CLASSES = 5
RADIUS = 1.5
BOUNDS = (64, 128, 256, 512)


def truth(boxes, classes=None) -> GroundTruth:
    classes = [index % CLASSES for index in range(len(boxes))] if classes is None else classes
    return GroundTruth(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                       torch.tensor(classes, dtype=torch.int64), torch.zeros(len(boxes), 2, 2), None)


def level_sizes(height, width):
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in STRIDES]


def assigned(truths, size, bounds=BOUNDS) -> Targets:
    return assign(truths, level_sizes(*size), STRIDES, bounds, RADIUS, CLASSES)


# -- which instance a location belongs to -----------------------------------------------------------------------------


def owner(x, y, stride, low, high, boxes):
    """The index of the box that a location belongs to, or None."""
    if boxes and (boxes[0][0] + boxes[0][2]) / 2 == 0:
        return None
    best, least = None, math.inf
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        centre_x, centre_y = (x1 + x2) / 2, (y1 + y2) / 2
        reach = stride * RADIUS
        left = max(centre_x - reach, x1)
        top = max(centre_y - reach, y1)
        right = min(centre_x + reach, x2)
        bottom = min(centre_y + reach, y2)
        if not (left < x < right and top < y < bottom):
            continue
        if not low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high:
            continue
        if (x2 - x1) * (y2 - y1) < least:
            best, least = index, (x2 - x1) * (y2 - y1)
    return best


def expected(images, sizes, bounds):
    """Labels of all locations, and (position, instance, distances in strides) of the positive ones."""
    labels, positives = [], []
    lows, highs = (-1, *bounds), (*bounds, 1e8)
    for (height, width), stride, low, high in zip(sizes, STRIDES, lows, highs):
        before = 0
        for boxes in images:
            for row in range(height):
                for column in range(width):
                    x, y = column * stride + stride // 2, row * stride + stride // 2
                    index = owner(x, y, stride, low, high, boxes)
                    if index is None:
                        labels.append(CLASSES)
                        continue
                    x1, y1, x2, y2 = boxes[index]
                    distances = [distance / stride for distance in (x - x1, y - y1, x2 - x, y2 - y)]
                    positives.append((len(labels), before + index, distances))
                    labels.append(index % CLASSES)
            before += len(boxes)
    return labels, positives


@st.composite
def boxes_of_an_image(draw):
    """Boxes on a coarse or a fine grid: on the coarse one, equal areas and distances on levels' borders are common."""
    grid = draw(st.sampled_from([4, 0.25]))
    boxes = []
    for _ in range(draw(st.integers(0, 5))):
        x1, y1 = (draw(st.integers(-8, 30)) * 4 + draw(st.integers(0, 3)) * grid for _ in range(2))
        width, height = (draw(st.sampled_from([8, 16, 24, 32, 48, 64, 128, 136, 264])) + draw(st.integers(0, 1)) * grid
                         for _ in range(2))
        boxes.append((x1, y1, x1 + width, y1 + height))
    return boxes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(boxes_of_an_image(), min_size=1, max_size=3), st.sampled_from([BOUNDS, (16, 32, 64, 128)]))
def test_every_location_has_the_owner_that_loops_find(images, bounds):
    size = (96, 128)
    found = assigned([truth(boxes) for boxes in images], size, bounds)
    labels, positives = expected(images, level_sizes(*size), bounds)
    assert found.labels.tolist() == labels
    assert found.positives.tolist() == [position for position, _, _ in positives]
    assert found.instances.tolist() == [instance for _, instance, _ in positives]
    assert found.distances.tolist() == [distances for _, _, distances in positives]  # all exact in float32


def at(found: Targets, size, x, y, stride) -> int:
    """The label at a location of the first and only image."""
    sizes = level_sizes(*size)
    level = STRIDES.index(stride)
    start = sum(height * width for height, width in sizes[:level])
    return found.labels[start + y // stride * sizes[level][1] + x // stride].item()


def test_smaller_box_wins():
    found = assigned([truth([(0, 0, 40, 40), (8, 8, 32, 32)], [1, 2])], (64, 64))
    assert at(found, (64, 64), 20, 20, 8) == 2


def test_first_of_equal_boxes_wins():
    found = assigned([truth([(4, 4, 36, 36), (4, 4, 36, 36)], [1, 2])], (64, 64))
    assert set(found.labels[found.positives].tolist()) == {1}
    found = assigned([truth([(0, 12, 40, 28), (12, 0, 28, 40)], [2, 1])], (64, 64))
    assert at(found, (64, 64), 20, 20, 8) == 2


@pytest.mark.parametrize(("side", "strides"), [
    (127, {8}), (128, {8, 16}), (128.5, {16}), (255, {16}), (256, {16, 32}), (256.5, {32}),
])
def test_a_border_between_levels_belongs_to_both(side, strides):
    """The box is centred on a location of each level, and wide: its farthest sides are `side` / 2 away."""
    size = (320, 320)
    found_at = set()
    for stride in STRIDES[:3]:
        x = y = 160 + stride // 2
        box = (x - side / 2, y - 32, x + side / 2, y + 32)
        if at(assigned([truth([box], [3])], size), size, x, y, stride) == 3:
            found_at.add(stride)
    assert found_at == strides


def test_centre_sampling_is_strict():
    """Box centre on a location: p3's next ones are 8 pixels off, within the reach of 12; 12 itself is outside."""
    size = (64, 64)
    found = assigned([truth([(4, 4, 52, 52)], [1])], size)  # centre 28
    inside = [x for x in range(4, 64, 8) if at(found, size, x, 28, 8) == 1]
    assert inside == [20, 28, 36]
    found = assigned([truth([(8, 8, 56, 56)], [1])], size)  # centre 32: 20 and 44 are 12 off
    assert [x for x in range(4, 64, 8) if at(found, size, x, 28, 8) == 1] == [28, 36]


def test_image_without_instances_is_background():
    found = assigned([truth([])], (64, 64))
    assert (found.labels == CLASSES).all()
    assert found.positives.shape == (0,)
    assert found.distances.shape == (0, 4)
    assert found.centreness.shape == (0,)


def test_instances_count_through_the_batch():
    box = (4, 4, 36, 36)
    found = assigned([truth([box, (40, 40, 60, 60)], [0, 1]), truth([]), truth([box], [2])], (64, 64))
    pairs = set(zip(found.labels[found.positives].tolist(), found.instances.tolist()))
    assert pairs == {(0, 0), (1, 1), (2, 2)}


def test_first_box_centred_on_x_0_blanks_its_image_only():
    centred, other = (-16, 4, 16, 36), (8, 8, 40, 40)
    assert len(assigned([truth([centred, other])], (64, 64)).positives) == 0
    assert len(assigned([truth([other, centred])], (64, 64)).positives) > 0
    found = assigned([truth([centred, other]), truth([other])], (64, 64))
    assert set(found.instances.tolist()) == {2}


def test_centreness():
    distances = torch.tensor([[2.0, 3, 2, 3], [1, 4, 4, 1], [1, 2, 9, 2]])
    assert centreness(distances).tolist() == pytest.approx([1, 1 / 4, 1 / 3])


# -- masks within boxes -----------------------------------------------------------------------------------------------


def roi_align(bitmap, box, resolution):
    """ROIAlignV2 at sampling ratio 0, in exact numbers: as many samples a bin as it has pixels, rounded up."""
    height, width = bitmap.shape
    x1, y1, x2, y2 = (Fraction(float(side)) for side in box)
    bin_height, bin_width = (y2 - y1) / resolution, (x2 - x1) / resolution
    rows, columns = math.ceil(bin_height), math.ceil(bin_width)
    means = [[Fraction(0)] * resolution for _ in range(resolution)]
    for j in range(resolution):
        for i in range(resolution):
            total = Fraction(0)
            for v in range(rows):
                for u in range(columns):
                    y = y1 - Fraction(1, 2) + bin_height * (j + (v + Fraction(1, 2)) / rows)
                    x = x1 - Fraction(1, 2) + bin_width * (i + (u + Fraction(1, 2)) / columns)
                    total += bilinear(bitmap, y, x, height, width)
            means[j][i] = total / (rows * columns)
    return means


def bilinear(bitmap, y, x, height, width):
    y, x = (min(max(place, Fraction(0)), Fraction(size - 1)) for place, size in ((y, height), (x, width)))
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    return ((1 - down) * ((1 - across) * int(bitmap[top, left]) + across * int(bitmap[top, right]))
            + down * ((1 - across) * int(bitmap[bottom, left]) + across * int(bitmap[bottom, right])))


@st.composite
def bitmaps_with_boxes(draw):
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    bitmap = random.random((height, width)) < draw(st.sampled_from([0.2, 0.5, 0.8]))
    x1, x2 = sorted(draw(st.lists(st.integers(0, width * 8), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(draw(st.lists(st.integers(0, height * 8), min_size=2, max_size=2, unique=True)))
    return bitmap, np.array([x1, y1, x2, y2], np.float32) / 8


@settings(max_examples=60, deadline=None, derandomize=True)
@given(bitmaps_with_boxes(), st.integers(1, 5))
def test_bitmap_mask_is_roi_align_from_one_half(bitmap_and_box, resolution):
    bitmap, box = bitmap_and_box
    exact = [[float(mean >= Fraction(1, 2)) for mean in row] for row in roi_align(bitmap, box, resolution)]
    found = bitmap_mask(bitmap, box, resolution)
    assert found.dtype == np.float32
    assert found.tolist() == exact


def test_bitmap_mask_of_whole_pixels_is_the_crop():
    bitmap = np.random.default_rng(0).random((20, 30)) < 0.5
    found = bitmap_mask(bitmap, np.array([5, 3, 19, 17], np.float32), 14)
    np.testing.assert_array_equal(found, bitmap[3:17, 5:19])


def drawn(points, resolution):
    """One polygon on a raster, by COCO's rasteriser."""
    rle = coco_mask.frPyObjects([np.ravel(points).tolist()], resolution, resolution)
    return coco_mask.decode(rle)[:, :, 0].astype(bool)


def test_polygon_mask_is_moved_and_stretched_to_the_box():
    box = np.array([10, 20, 30, 60], np.float32)
    left_half = np.array([10, 20, 20, 20, 20, 60, 10, 60], np.float64)
    found = polygon_mask([left_half], box, 8)
    assert found.dtype == np.float32
    assert found.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 8


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.tuples(st.integers(-8, 200), st.integers(-8, 200)), min_size=3, max_size=6),
                min_size=1, max_size=3), st.integers(4, 28))
def test_polygon_mask_is_the_union_of_its_parts(polygons, resolution):
    box = np.array([16, 8, 144, 136], np.float32)
    scale = resolution / 128
    union = np.zeros((resolution, resolution), bool)
    for points in polygons:
        union |= drawn([((x - 16) * scale, (y - 8) * scale) for x, y in points], resolution)
    found = polygon_mask([np.array(points, np.float64).ravel() for points in polygons], box, resolution)
    np.testing.assert_array_equal(found, union)


def test_overlapping_parts_do_not_cancel():
    box = np.array([0, 0, 8, 8], np.float32)
    whole, corner = np.array([0, 0, 8, 0, 8, 8, 0, 8.0]), np.array([0, 0, 4, 0, 4, 4, 0, 4.0])
    assert polygon_mask([whole, corner, corner], box, 8).all()


def test_narrow_boxes_count_as_a_tenth_of_a_pixel_wide():
    box = np.array([10, 10, 10.0625, 18], np.float32)
    found = polygon_mask([np.array([10, 10, 10.05, 10, 10.05, 18, 10, 18.0])], box, 8)
    assert found.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]] * 8
