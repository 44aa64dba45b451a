"""Scenes: the same for a seed, with instances for every level of the pyramid."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from blendmaskd_workers import blendmask
from blendmaskd_workers.evaluation import scenes


def test_scenes_depend_on_the_seed_alone() -> None:
    first, second, other = scenes.painted(3), scenes.painted(3), scenes.painted(4)
    for one, two, three in zip(first, second, other):
        np.testing.assert_array_equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.boxes, two.boxes)
        assert (one.boxes != three.boxes).any()
    assert [scene.pixels.shape for scene in first] == [(800, 800, 3), (600, 900, 3)]


def test_shapes_lie_within_the_image_and_have_all_sizes() -> None:
    for scene in scenes.painted(0):
        assert scene.boxes.min() >= 0
        assert scene.boxes.max() <= 1
        sides = (scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1)
        assert sides.min() < 0.06
        assert sides.max() > 0.7


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_shape_is_on_top_in_picture_and_ground_truth(config: Path, seed: int) -> None:
    network = blendmask.load_config(config)
    for scene in scenes.painted(seed):
        prepared = blendmask.prepare(scene.pixels, network)
        truth = scenes.ground_truth(scene, prepared, network)
        assert truth.semantic is not None
        assert truth.semantic.shape == prepared.net_size
        x1, y1, x2, y2 = truth.boxes[0].tolist()
        assert truth.semantic[int((y1 + y2) / 2), int((x1 + x2) / 2)] == truth.classes[0] + 1
        height, width = prepared.image_size
        x, y = (scene.boxes[0, :2] + scene.boxes[0, 2:]) / 2 * [width, height]
        colour = np.random.default_rng(int(scene.seeds[0])).integers(0, 256, 3, np.uint8)
        assert (scene.pixels[int(y) - 2: int(y) + 2, int(x) - 2: int(x) + 2] == colour).all()


def test_ground_truth_is_within_what_the_network_knows(config: Path) -> None:
    network = blendmask.load_config(config)
    [scene] = scenes.painted(0)[1:]
    truth = scenes.ground_truth(scene, blendmask.prepare(scene.pixels, network), network)
    assert truth.masks.shape == (len(scene.boxes), network.resolution, network.resolution)
    assert set(truth.classes.tolist()) <= set(range(network.num_classes))
    ellipses = truth.masks[np.flatnonzero(scene.round)].mean(dim=(1, 2))
    np.testing.assert_allclose(ellipses, np.pi / 4, atol=0.03)
    assert (truth.masks[np.flatnonzero(~scene.round)] == 1).all()


def test_a_photograph_stays_as_it_is() -> None:
    photograph = np.full((40, 60, 3), 127, np.uint8)
    [scene] = scenes.photographed(["a.png"], [photograph], seed=0)
    assert scene.name == "a.png"
    assert (scene.pixels == 127).all()
    assert len(scene.boxes) == len(scenes.SIDES)
