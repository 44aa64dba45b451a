"""A data set in COCO's format as training samples: what AdelaiDet's DatasetMapperWithBasis makes, without files beside.

Rules: reading checks everything that can be wrong with the annotation file, so that hours of training do not end in a
traceback; whatever is wrong leaves as a `DataError` that names file and image. A sample depends on its image and the
random generator only. Boxes are xyxy in network pixels, those of the resized image.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from blendmaskd import categories
from blendmaskd.categories import Category
from blendmaskd.settings import Limits
from blendmaskd_workers import images
from blendmaskd_workers.blendmask import Config, Prepared, prepare
from blendmaskd_workers.training.config import TrainingConfig
from blendmaskd_workers.training.targets import GroundTruth, bitmap_mask, polygon_mask

SMALLEST_SIDE = 1e-5  # network pixels: instances with a narrower box are dropped
LIMITS = Limits()

Id = int | float | str  # of an image


class DataError(ValueError):
    """Annotations or images that cannot be trained on; the text names the file and says why."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One instance, in pixels of the photograph."""

    class_index: int  # from 0
    box: tuple[float, float, float, float]  # x, y, width, height
    segmentation: Any  # COCO's: polygons, or an RLE with compressed counts
    crowd: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """One image and its instances, in the order of the file."""

    path: Path
    height: int
    width: int
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """All images of an annotation file that can be trained on."""

    entries: tuple[Entry, ...]
    categories: tuple[Category, ...]  # by class index


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as the network sees it, and what it should say."""

    prepared: Prepared
    truth: GroundTruth


# ---- reading ----------------------------------------------------------------------------------------------------

def read_dataset(annotations: Path, folder: Path, config: TrainingConfig) -> Dataset:
    """Read a COCO instances file whose images lie in `folder`. Classes are the categories in ascending id.

    Raises `DataError`.
    """
    try:
        names = tuple(categories.load(annotations))
        tree = json.loads(annotations.read_text(encoding="utf-8"))
    except categories.CategoriesError as error:
        raise DataError(str(error)) from error
    index_of = {category.id: index for index, category in enumerate(names)}
    pictures = _list(annotations, tree, "images")
    grouped: dict[Id, list[Annotation]] = {}
    sizes: dict[Id, list[Any]] = {}  # height, width
    for image in pictures:
        image_id = _id(str(annotations), image, "id")
        if image_id in grouped:
            raise DataError(f"{annotations}: image {image_id!r} is there twice")
        grouped[image_id], sizes[image_id] = [], [image.get("height"), image.get("width")]
    for number, item in enumerate(_list(annotations, tree, "annotations")):
        where = f"{annotations}: annotation {item.get('id', f'number {number}')}"
        image_id = _id(where, item, "image_id")
        if image_id not in grouped:
            raise DataError(f"{where}: image_id {image_id!r} is not among the images")
        grouped[image_id].append(_annotation(where, item, index_of, config.mask_format, sizes[image_id]))
    entries = [_entry(annotations, folder, image, grouped[image["id"]]) for image in pictures]
    if config.filter_empty:
        entries = [entry for entry in entries if any(not item.crowd for item in entry.annotations)]
    if not entries:
        raise DataError(f"{annotations}: no image with instances")
    return Dataset(tuple(entries), names)


def _list(path: Path, tree: Any, name: str) -> list[dict[str, Any]]:
    value = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f'{path}: expected a list of objects under "{name}", as COCO\'s instances files have it')
    return value


def _id(where: str, item: Mapping[str, Any], name: str) -> Id:
    value = item.get(name)
    if not isinstance(value, int | float | str):
        raise DataError(f"{where}: {name} {value!r} is neither a number nor a text, in {json.dumps(item)[:200]}")
    return value


def _entry(path: Path, folder: Path, image: dict[str, Any], annotations: list[Annotation]) -> Entry:
    match image:
        case {"file_name": str(name), "height": int(height), "width": int(width)} if min(height, width) > 0:
            place = folder / name
            if not place.is_file():
                raise DataError(f"{path}: image {image['id']}: there is no file {place}")
            return Entry(place, height, width, tuple(annotations))
    raise DataError(f'{path}: image {image["id"]}: expected a "file_name", a "height" and a "width"')


def _annotation(where: str, item: dict[str, Any], index_of: Mapping[int, int], mask_format: str,
                size: list[Any]) -> Annotation:
    category = item.get("category_id")
    if not isinstance(category, int) or category not in index_of:
        raise DataError(f"{where}: category_id {category!r} is not among the categories")
    crowd = bool(item.get("iscrowd", 0))
    return Annotation(index_of[category], _box(where, item.get("bbox")),
                      _segmentation(where, item.get("segmentation"), crowd, mask_format, size), crowd)


def _box(where: str, box: Any) -> tuple[float, float, float, float]:
    match box:
        case [int() | float() as x, int() | float() as y, int() | float() as width, int() | float() as height] if (
            all(math.isfinite(value) for value in box)
        ):
            return float(x), float(y), float(width), float(height)
    raise DataError(f"{where}: bbox {box!r}: expected [x, y, width, height]")


def _segmentation(where: str, value: Any, crowd: bool, mask_format: str, size: list[Any]) -> Any:
    """Polygons, or the RLE of an image of `size`, height and width."""
    match value:
        case [list(), *_] if all(_is_polygon(part) for part in value):
            return [np.array(part, np.float64) for part in value]
        case {"size": _, "counts": _} if mask_format != "bitmask" and not crowd:
            raise DataError(f'{where}: its mask is an RLE, which needs INPUT.MASK_FORMAT: "bitmask"')
        case {"size": [int(), int()] as found, "counts": str() | [*_]} if found != size:
            raise DataError(f"{where}: segmentation: its RLE has size {found}, the image {size}")
        case {"size": [int(height), int(width)], "counts": [*runs]} if not _fill(runs, height * width):
            raise DataError(f"{where}: segmentation: the counts of its RLE do not add up to {height} x {width} pixels")
        case {"size": [int(), int()], "counts": str() | [*_]}:
            return value
    raise DataError(f"{where}: segmentation: expected polygons of at least three points, or an RLE")


def _is_polygon(part: Any) -> bool:
    return (isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0
            and all(isinstance(value, int | float) and math.isfinite(value) for value in part))


def _fill(runs: list[Any], pixels: int) -> bool:
    return all(isinstance(run, int) and run >= 0 for run in runs) and sum(runs) == pixels


# ---- samples ----------------------------------------------------------------------------------------------------

def make_sample(entry: Entry, network: Config, config: TrainingConfig, min_size: int, flip: bool) -> Sample:
    """Read, resize and perhaps flip an image, with its targets. Raises `DataError`."""
    prepared = prepare(_pixels(entry), replace(network, min_size=min_size, max_size=config.max_size))
    if flip:
        prepared = replace(prepared, tensor=prepared.tensor.flip(2).contiguous())
    scene = _Scene(entry, prepared.net_size, flip)
    side = network.resolution
    kept = [(item, box) for item in entry.annotations if not item.crowd and _is_wide_enough(box := scene.box(item))]
    masks = [scene.mask(item, box, side, config.mask_format) for item, box in kept]
    kept_masks = [(item, box, mask) for (item, box), mask in zip(kept, masks) if mask is not None]
    semantic = None if network.semantic_classes is None else torch.from_numpy(scene.semantic_map())
    truth = GroundTruth(
        boxes=torch.from_numpy(np.array([box for _, box, _ in kept_masks], np.float32).reshape(-1, 4)),
        classes=torch.tensor([item.class_index for item, _, _ in kept_masks], dtype=torch.int64),
        masks=torch.from_numpy(np.array([mask for *_, mask in kept_masks], np.float32).reshape(-1, side, side)),
        semantic=semantic,
    )
    return Sample(prepared, truth)


def _pixels(entry: Entry) -> images.Pixels:
    try:
        pixels = images.decode(entry.path.read_bytes(), LIMITS)
    except OSError as error:
        raise DataError(f"{entry.path}: {error.strerror}") from error
    except images.ImageError as error:
        raise DataError(f"{entry.path}: {error.reason}") from error
    if pixels.shape[:2] != (entry.height, entry.width):
        raise DataError(f"{entry.path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, the annotations say "
                        f"{entry.width} x {entry.height}")
    return pixels


def _is_wide_enough(box: npt.NDArray[np.float32]) -> bool:
    return bool((box[2:] - box[:2]).min() > SMALLEST_SIDE)


class _Scene:
    """An image's annotations, moved to the network's pixels."""

    def __init__(self, entry: Entry, net_size: tuple[int, int], flip: bool) -> None:
        self.entry = entry
        self.height, self.width = net_size
        self.flip = flip
        self.scale = np.array([self.width / entry.width, self.height / entry.height])  # x, y

    def box(self, item: Annotation) -> npt.NDArray[np.float32]:
        """xyxy, clipped to the image."""
        x, y, width, height = item.box
        corners = np.array([[x, y], [x + width, y + height]]) * self.scale
        if self.flip:
            corners[:, 0] = self.width - corners[::-1, 0]
        box: npt.NDArray[np.float32] = corners.clip(0, (self.width, self.height)).ravel().astype(np.float32)
        return box

    def mask(self, item: Annotation, box: npt.NDArray[np.float32], side: int,
             mask_format: str) -> npt.NDArray[np.float32] | None:
        """The instance's mask within its box, (side, side); None where the resized mask is empty."""
        if mask_format == "polygon":
            return polygon_mask([self._points(polygon).ravel() for polygon in item.segmentation], box, side)
        bitmap = self._bitmap(item)
        return bitmap_mask(bitmap, box, side) if bitmap.any() else None

    def semantic_map(self) -> npt.NDArray[np.int32]:
        """Class + 1 of each pixel, crowds included; a later annotation covers an earlier one, (height, width)."""
        painted = np.zeros((self.entry.height, self.entry.width), np.int32)
        for item in self.entry.annotations:
            painted[self._original(item)] = item.class_index + 1
        return self._resize(painted)

    def _points(self, polygon: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        points: npt.NDArray[np.float64] = polygon.reshape(-1, 2) * self.scale
        if self.flip:
            points[:, 0] = self.width - points[:, 0]
        return points

    def _bitmap(self, item: Annotation) -> npt.NDArray[np.bool_]:
        """The instance's mask in network pixels: polygons are moved and then drawn, an RLE is resized."""
        if isinstance(item.segmentation, dict):
            return self._resize(self._original(item).astype(np.uint8)).astype(np.bool_)
        parts = [self._points(polygon).ravel() for polygon in item.segmentation]
        return _draw(parts, self.height, self.width)

    def _original(self, item: Annotation) -> npt.NDArray[np.bool_]:
        """The instance's mask in pixels of the photograph."""
        height, width = self.entry.height, self.entry.width
        if not isinstance(item.segmentation, dict):
            return _draw(item.segmentation, height, width)
        rle = item.segmentation
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects(rle, height, width)
        try:
            mask: npt.NDArray[np.bool_] = coco_mask.decode(rle).astype(np.bool_)
        except ValueError as error:
            raise DataError(f"{self.entry.path}: the RLE of an instance is damaged: {error}") from error
        return mask

    def _resize(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        resized = np.asarray(Image.fromarray(values).resize((self.width, self.height), Image.Resampling.NEAREST))
        return np.ascontiguousarray(resized[:, ::-1]) if self.flip else resized.copy()


def _draw(polygons: Sequence[npt.NDArray[np.float64]], height: int, width: int) -> npt.NDArray[np.bool_]:
    parts = coco_mask.frPyObjects([polygon.tolist() for polygon in polygons], height, width)
    drawn: npt.NDArray[np.bool_] = coco_mask.decode(coco_mask.merge(parts)).astype(np.bool_)
    return drawn
