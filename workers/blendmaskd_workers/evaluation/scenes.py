"""Fixed images with fixed ground truth: the same on every machine, by seed.

A scene is a photograph, or painted noise where none is given, with ellipses and rectangles whose places, sizes and
classes the seed decides; on a photograph they are not painted, they only stand for instances. Coordinates are shares of
the image until `ground_truth` puts them into network pixels.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from blendmaskd.images.decoding import Pixels
from blendmaskd_workers.blendmask import Config, Prepared
from blendmaskd_workers.training.targets import GroundTruth

SIZES = ((800, 800), (600, 900))  # height, width of the painted scenes
SIDES = (0.05, 0.1, 0.2, 0.35, 0.6, 0.9)  # of the shapes, so that every level of the pyramid gets some

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scene:
    """One image and what is to be found in it."""

    name: str
    pixels: Pixels
    boxes: Shares  # (G, 4) x1, y1, x2, y2, from 0 to 1
    round: npt.NDArray[np.bool_]  # (G,) an ellipse that fills its box, or the box itself
    seeds: npt.NDArray[np.int64]  # (G,) the class, once modulo the number of classes


def painted(seed: int) -> list[Scene]:
    """A scene of each of `SIZES`: coloured shapes, the smallest on top, over smooth noise."""
    scenes = []
    for number, (height, width) in enumerate(SIZES, start=1):
        random = np.random.default_rng([seed, number])
        scene = over(f"scene {number}", _noise(random, height, width), random)
        for index in range(len(scene.boxes))[::-1]:
            colour = np.random.default_rng(int(scene.seeds[index])).integers(0, 256, 3, np.uint8)
            scene.pixels[_inside(scene, index, height, width)] = colour
        scenes.append(scene)
    return scenes


def photographed(names: Sequence[str], photographs: Sequence[Pixels], seed: int) -> list[Scene]:
    return [
        over(name, pixels, np.random.default_rng([seed, number]))
        for number, (name, pixels) in enumerate(zip(names, photographs), start=1)
    ]


def over(name: str, pixels: Pixels, random: np.random.Generator) -> Scene:
    """Shapes of all `SIDES`, wholly within the image."""
    sides = np.array(SIDES)[:, None] * random.uniform(0.8, 1.1, (len(SIDES), 2))
    corners = random.uniform(0, 1, sides.shape) * (1 - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1)
    return Scene(name, pixels, boxes, random.random(len(SIDES)) < 0.5, random.integers(0, 1 << 30, len(SIDES)))


def ground_truth(scene: Scene, prepared: Prepared, config: Config) -> GroundTruth:
    """The scene's instances in the network pixels of its prepared image."""
    height, width = prepared.net_size
    boxes = torch.from_numpy(scene.boxes * [width, height, width, height]).float()
    classes = torch.from_numpy(scene.seeds % config.num_classes)
    centres = (np.arange(config.resolution) + 0.5) / config.resolution
    masks = [_shape(round_, centres, centres) for round_ in scene.round]
    semantic = np.zeros((height, width), np.int64)
    for index in range(len(boxes))[::-1]:
        semantic[_inside(scene, index, height, width)] = int(classes[index]) + 1
    return GroundTruth(boxes, classes, torch.from_numpy(np.stack(masks)).float(), torch.from_numpy(semantic))


def _inside(scene: Scene, index: int, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Which pixels (height, width) belong to a shape."""
    x1, y1, x2, y2 = scene.boxes[index]
    y = ((np.arange(height) + 0.5) / height - y1) / (y2 - y1)
    x = ((np.arange(width) + 0.5) / width - x1) / (x2 - x1)
    return _shape(bool(scene.round[index]), y, x)


def _shape(round_: bool, y: Shares, x: Shares) -> npt.NDArray[np.bool_]:
    """Which of the places (y, x) lie in the shape that fills the unit square: (len(y), len(x))."""
    if round_:
        return ((y[:, None] - 0.5) ** 2 + (x[None] - 0.5) ** 2) < 0.25
    return ((y > 0) & (y < 1))[:, None] & ((x > 0) & (x < 1))[None]


def _noise(random: np.random.Generator, height: int, width: int) -> Pixels:
    """Coarse blocks under fine grain, as photographs have low and high frequencies."""
    coarse = random.integers(40, 200, (height // 50 + 1, width // 50 + 1, 3))
    blocks = coarse.repeat(50, axis=0).repeat(50, axis=1)[:height, :width]
    return (blocks + random.integers(-30, 31, (height, width, 3))).clip(0, 255).astype(np.uint8)
