"""A data set of textured shapes in COCO's format, rendered: what the demo model learns from and is measured on.

    python scripts/make_shapes.py --output out/shapes --train 3000 --held-out 300 --seed 0

Leaves images/train/NNNN.jpg and images/held_out/NNNN.jpg, train.json and held_out.json (COCO instances whose
`file_name` is relative to the folder of the split), and README.txt. Nobody's pictures go into it.

Rules: an image depends on the seed, its split and its number only, never on how many there are or on who renders it.
Whatever can be seen is annotated: a shape that would hide too much of another is not drawn at all. A mask is what is
visible of its shape, without the hole of a ring; box and area are those of the mask. Must never import torch.
"""
from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import track

from blendmaskd.output import Help
from blendmaskd.programs.arguments import count
from blendmaskd.programs.errors import guarded

Pixels = NDArray[np.float32]  # (height, width, 3) RGB or (height, width), 0 to 1
Mask = NDArray[np.bool_]  # (height, width)

SPLITS = ("train", "held_out")
CATEGORIES = ("disc", "square", "triangle", "star", "ring")  # with ids from 1
SIDES = (240, 400)  # of an image, pixels, both included
SHAPES = (2, 8)  # wanted in an image, both included
SIZES = (28.0, 170.0)  # longer side of a whole shape's box, pixels
LARGEST_SHARE = 0.6  # of an image's shorter side
INSIDE = 0.7  # of a shape at least, where the image's border cuts it
VISIBLE = 0.5  # of a shape at least, after all
TRIES = 20  # to place a shape, before the image goes without it
SUPERSAMPLING = 4
MARGIN = 8  # pixels around a shape, for its shadow
QUALITY = 92  # of JPEG

README = """\
Textured shapes in COCO's format, rendered by scripts/make_shapes.py of blendmaskd with seed {seed}.
{counts}
Everything was computed; nobody's pictures are in it. It is in the public domain (CC0 1.0).
"""


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("make_shapes", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    make(arguments.output, {"train": arguments.train, "held_out": arguments.held_out}, arguments.seed)
    return 0


def make(output: Path, counts: dict[str, int], seed: int) -> None:
    """Render `counts[split]` images of each split below `output`, on all CPUs that this process may use.

    Raises OSError, FileExistsError when there are images of a split already: nothing is mixed or overwritten.
    """
    for split in counts:
        (output / "images" / split).mkdir(parents=True)
    context = multiprocessing.get_context("spawn")  # fork would copy the locks of the caller's threads
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for split, count in counts.items():
            save = partial(_save, output / "images" / split, seed, split)
            saved = pool.map(save, range(1, count + 1), chunksize=16)
            shown = track(saved, split, count, console=Console(stderr=True))
            annotations = json.dumps(dataset(seed, split, list(shown)))
            (output / f"{split}.json").write_text(annotations, encoding="utf-8")
    told = "\n".join(f"{split}: {count} images" for split, count in counts.items())
    (output / "README.txt").write_text(README.format(seed=seed, counts=told), encoding="utf-8")


def _save(folder: Path, seed: int, split: str, number: int) -> Described:
    scene = render(seed, split, number)
    name = f"{number:04}.jpg"
    Image.fromarray(scene.pixels).save(folder / name, quality=QUALITY)
    height, width, _ = scene.pixels.shape
    return {"file_name": name, "height": height, "width": width}, [annotate(each) for each in scene.instances]


# -- annotations ------------------------------------------------------------------------------------------------------


Described = tuple[dict[str, Any], list[dict[str, Any]]]  # an image that was saved, and its annotations, without ids


@dataclass(slots=True)
class Instance:
    """A shape where it is drawn."""

    category: int  # index into CATEGORIES
    top: int  # of the patch in the image, pixels; it may begin outside
    left: int
    alpha: Pixels  # of the patch: the share of a pixel that the shape covers
    whole: int  # pixels of the shape, inside the image or not, hidden or not
    visible: Mask  # of the image's size


@dataclass(frozen=True, slots=True)
class Scene:
    """An image and what is in it, in the order in which it was drawn."""

    pixels: NDArray[np.uint8]  # (height, width, 3) RGB
    instances: list[Instance]


def annotate(instance: Instance) -> dict[str, Any]:
    """The COCO annotation of an instance, without ids: RLE mask, its area in pixels, its tight box xywh."""
    encoded = rle.encode(np.asfortranarray(instance.visible, dtype=np.uint8))
    return {
        "category_id": instance.category + 1,
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
        "bbox": rle.toBbox(encoded).tolist(),
        "area": int(instance.visible.sum()),
        "iscrowd": 0,
    }


def dataset(seed: int, split: str, described: Sequence[Described]) -> dict[str, Any]:
    """The COCO tree of a split; ids of images and of annotations count from 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, (image, found) in enumerate(described, 1):
        images.append({"id": image_id, **image, "license": 1})
        for annotation in found:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    return {
        "info": {"description": f"Textured shapes, {split}, rendered by make_shapes.py of blendmaskd, seed {seed}"},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, 1)],
    }


# -- an image ---------------------------------------------------------------------------------------------------------


def render(seed: int, split: str, number: int) -> Scene:
    """Image `number`, from 1, of a split: the same for the same arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), number])
    height, width = (int(side) for side in rng.integers(*SIDES, size=2, endpoint=True))
    canvas = _background(rng, height, width)
    placed: list[Instance] = []
    for _ in range(rng.integers(*SHAPES, endpoint=True)):
        shape = _place(rng, canvas.shape[:2], placed)
        if shape is not None:
            placed.append(shape)
            _paint(rng, canvas, shape)
    pixels = np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)
    return Scene(pixels, placed)


def _place(rng: Generator, size: tuple[int, int], placed: Sequence[Instance]) -> Instance | None:
    """A shape at a place where it hides no other too much; the others' visible masks lose what it hides."""
    for _ in range(TRIES):
        shape = _propose(rng, size)
        rest = [other.visible & ~shape.visible for other in placed]
        enough = all(left.sum() >= VISIBLE * other.whole for left, other in zip(rest, placed))
        if enough and shape.visible.sum() >= INSIDE * shape.whole:
            for other, left in zip(placed, rest):
                other.visible = left
            return shape
    return None


def _propose(rng: Generator, size: tuple[int, int]) -> Instance:
    """Any shape anywhere: sizes are evenly distributed on a logarithmic scale."""
    category = int(rng.integers(len(CATEGORIES)))
    largest = min(SIZES[1], LARGEST_SHARE * min(size))
    alpha = _alpha(_outline(rng, category), math.exp(rng.uniform(math.log(SIZES[0]), math.log(largest))))
    top, left = (int(rng.integers(side)) - len(alpha) // 2 for side in size)
    inner, outer = _overlap(size, top, left, len(alpha))
    visible = np.zeros(size, bool)
    visible[outer] = alpha[inner] >= 0.5
    return Instance(category, top, left, alpha, int((alpha >= 0.5).sum()), visible)


Window = tuple[slice, slice]


def _overlap(size: tuple[int, int], top: int, left: int, side: int) -> tuple[Window, Window]:
    """Where a square patch and the image overlap: in the patch, and in the image."""
    rows = max(top, 0), min(top + side, size[0])
    columns = max(left, 0), min(left + side, size[1])
    return (
        (slice(rows[0] - top, rows[1] - top), slice(columns[0] - left, columns[1] - left)),
        (slice(*rows), slice(*columns)),
    )


def _paint(rng: Generator, canvas: Pixels, shape: Instance) -> None:
    """Draw a shape and its shadow on the canvas, in colours that differ from what is there."""
    inner, outer = _overlap(canvas.shape[:2], shape.top, shape.left, len(shape.alpha))
    alpha = shape.alpha[inner][..., None]
    covered = canvas[outer][alpha[..., 0] >= 0.5]
    candidates = [_colours(rng) for _ in range(4)]
    first, second = max(candidates, key=lambda pair: min(_contrast(colour, covered) for colour in pair))
    texture = _texture(rng, alpha.shape[:2], rng.uniform(6, 24), PATTERNS)[..., None]
    canvas[outer] *= 1 - rng.uniform(0.2, 0.5) * _shadow(shape.alpha)[inner][..., None]
    canvas[outer] += alpha * (first + (second - first) * texture + _grain(rng, alpha.shape) - canvas[outer])


def _contrast(colour: Pixels, covered: Pixels) -> float:
    """How far the colour is from nine tenths of the pixels (n, 3): 0 to 1.73."""
    return float(np.quantile(np.linalg.norm(covered[::7] - colour, axis=-1), 0.1))


def _shadow(alpha: Pixels) -> Pixels:
    """The shape's own outline, blurred, a little lower and to the right."""
    image = Image.fromarray((alpha * 255 + 0.5).astype(np.uint8))
    return np.roll(_plane(image.filter(ImageFilter.GaussianBlur(3))), (2, 2), (0, 1))


def _plane(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.float32) / np.float32(255)


# -- outlines ---------------------------------------------------------------------------------------------------------

Outline = list[NDArray[np.float64]]  # polygons (n, 2), x and y: the first is filled, the others are holes in it


def _outline(rng: Generator, category: int) -> Outline:
    """A shape of that category, turned, centred on 0; the longer side of its box is 1."""
    outline = _OUTLINES[CATEGORIES[category]](rng)
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    turned = [polygon @ turn for polygon in outline]
    low, high = turned[0].min(axis=0), turned[0].max(axis=0)
    return [(polygon - (low + high) / 2) / (high - low).max() for polygon in turned]


def _polar(angles: Any, radii: Any) -> NDArray[np.float64]:
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1)


def _ellipse(aspect: float) -> NDArray[np.float64]:
    return _polar(np.linspace(0, 2 * math.pi, 180, endpoint=False), 1.0) * (1, aspect)


def _ring(rng: Generator) -> Outline:
    outer = _ellipse(rng.uniform(0.8, 1))
    return [outer, outer * rng.uniform(0.45, 0.6)]


def _star(rng: Generator) -> Outline:
    angles = np.arange(10) * math.pi / 5
    return [_polar(angles, np.where(np.arange(10) % 2, rng.uniform(0.42, 0.52), 1.0))]


_OUTLINES: dict[str, Callable[[Generator], Outline]] = {
    "disc": lambda rng: [_ellipse(rng.uniform(0.8, 1))],
    "square": lambda rng: [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1, rng.uniform(0.8, 1))],
    "triangle": lambda rng: [_polar(np.deg2rad(np.arange(3) * 120 + rng.uniform(-12, 12, 3)), 1.0)],
    "star": _star,
    "ring": _ring,
}


def _alpha(outline: Outline, size: float) -> Pixels:
    """The outline drawn `size` pixels long, anti-aliased, in the middle of a square patch with a margin."""
    side = math.ceil(size) + 2 * MARGIN
    image = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(image)
    for index, polygon in enumerate(outline):
        points = (polygon * size + side / 2) * SUPERSAMPLING - 0.5  # Pillow's pixels are centred on whole numbers
        draw.polygon([(float(x), float(y)) for x, y in points], fill=0 if index else 255)
    return _plane(image.reduce(SUPERSAMPLING))


# -- colours and textures ---------------------------------------------------------------------------------------------


def _colours(rng: Generator) -> tuple[Pixels, Pixels]:
    """Two colours (3,) of a shape: clear ones, of hues not far from each other."""
    hue, saturation, value = rng.uniform(), rng.uniform(0.45, 1), rng.uniform(0.45, 1)
    other = hue + rng.uniform(-0.1, 0.1), saturation * rng.uniform(0.5, 1), value * rng.uniform(0.55, 0.85)
    return _rgb(hue, saturation, value), _rgb(*other)


def _rgb(hue: float, saturation: float, value: float) -> Pixels:
    """From HSV, hue in turns."""
    ramps = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation * (1 - ramps)), np.float32)


def _background(rng: Generator, height: int, width: int) -> Pixels:
    """A whole image without shapes: calmer and paler than they are, of coarser texture."""
    first = _rgb(rng.uniform(), rng.uniform(0, 0.5), rng.uniform(0.15, 0.95))
    second = np.clip(first + rng.uniform(-0.3, 0.3, 3), 0, 1).astype(np.float32)
    texture = _texture(rng, (height, width), rng.uniform(20, 90), BACKGROUNDS)[..., None]
    painted = first + (second - first) * texture + _grain(rng, (height, width, 3))
    return painted.astype(np.float32)


def _grain(rng: Generator, shape: tuple[int, ...]) -> Pixels:
    return rng.standard_normal(shape, np.float32) * np.float32(rng.uniform(0, 0.03))


Pattern = Callable[[Generator, Pixels, Pixels, float], Pixels]  # of coordinates along and across, and a period


def _texture(rng: Generator, size: tuple[int, int], period: float, patterns: Sequence[Pattern]) -> Pixels:
    """One of the patterns, turned: a plane (height, width) of values from 0 to 1. `period` is in pixels."""
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return patterns[int(rng.integers(len(patterns)))](rng, along, across, period)


def _wave(position: Pixels, period: float) -> Pixels:
    return np.asarray(np.sin(position * (2 * math.pi / period)), np.float32)


def _sharpened(wave: Pixels) -> Pixels:
    """From -1 to 1 to mostly 0 and 1, with edges that are a little soft."""
    return np.asarray(0.5 + 0.5 * np.tanh(wave * 4), np.float32)


def _stripes(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    return _sharpened(_wave(along + rng.uniform(0, period), period))


def _checker(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    return _sharpened(_wave(along + rng.uniform(0, period), period) * _wave(across, period) * 2)


def _dots(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    return _sharpened(_wave(along + rng.uniform(0, period), period) + _wave(across, period) - 0.8)


def _gradient(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    low, high = float(along.min()), float(along.max())
    return np.asarray((along - low) / (high - low), np.float32)


def _noise(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    """Random grids, each twice as fine and half as strong as the one before."""
    octaves = [_blurred_grid(rng, along.shape, period / 2**octave) / 2**octave for octave in range(3)]
    return np.asarray(np.clip(np.sum(octaves, axis=0) / 1.75, 0, 1), np.float32)


def _blobs(rng: Generator, along: Pixels, across: Pixels, period: float) -> Pixels:
    return _sharpened(_blurred_grid(rng, along.shape, period) * 2 - 1)


def _blurred_grid(rng: Generator, size: tuple[int, ...], step: float) -> Pixels:
    """Random values `step` pixels apart, smooth in between."""
    height, width = (math.ceil(side / step) + 2 for side in size)
    grid = Image.fromarray(rng.random((height, width), np.float32))
    smooth = grid.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32)


PATTERNS: tuple[Pattern, ...] = (_stripes, _checker, _dots, _gradient, _noise, _blobs)
BACKGROUNDS: tuple[Pattern, ...] = (_stripes, _gradient, _noise, _blobs)


# -- arguments --------------------------------------------------------------------------------------------------------


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="a new folder, or an empty one")
    parser.add_argument("--train", metavar="N", type=count, default=3000, help="images to train on, default 3000")
    parser.add_argument("--held-out", metavar="M", type=count, default=300, help="to measure on, default 300")
    parser.add_argument("--seed", metavar="S", type=count, default=0, help="default 0")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
