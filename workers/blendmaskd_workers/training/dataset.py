"""A data set in COCO's format as training samples: what AdelaiDet's DatasetMapperWithBasis makes, without files beside.

Rules: the annotation file is checked whole before anything is learnt (`blendmaskd.coco.instances`), so that hours of
training do not end in a traceback; whatever is wrong leaves as a `DataError` that names file and image. What nothing
can be learnt from is left out and told in `notes`. A sample depends on its image and the random generator only. Boxes
are xyxy in network pixels, those of the resized image.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from blendmaskd.coco import instances as coco_instances
from blendmaskd.coco import values as coco_values
from blendmaskd.coco.categories import Category
from blendmaskd.coco.instances import Complaints, Instances, InstancesError
from blendmaskd.coco.values import LONGEST_OUTLINE, Box, Polygon, Rle
from blendmaskd.images import decoding as images
from blendmaskd.settings import Limits
from blendmaskd_workers.blendmask import Config, Prepared, prepare
from blendmaskd_workers.blendmask.selection import Booleans, Floats
from blendmaskd_workers.training import targets
from blendmaskd_workers.training.config import TrainingConfig
from blendmaskd_workers.training.targets import Doubles, GroundTruth, bitmap_mask, polygon_mask

SMALLEST_SIDE = 1e-5  # network pixels: instances with a narrower box are dropped
MAX_IMAGE_PIXELS = 500_000_000
LIMITS = Limits(max_image_bytes=sys.maxsize, max_image_pixels=MAX_IMAGE_PIXELS)  # the images are the user's own


class DataError(ValueError):
    """Annotations or images that cannot be trained on; the text names the file and says why."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One instance, in pixels of the photograph."""

    class_index: int  # from 0
    box: Box
    segmentation: tuple[Polygon, ...] | dict[str, Any]  # the second is an RLE with compressed counts
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
    notes: tuple[str, ...]  # what was left out, a line each


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as the network sees it, and what it should say."""

    prepared: Prepared
    truth: GroundTruth


# ---- reading ----------------------------------------------------------------------------------------------------

def read_dataset(annotations: Path, folder: Path, config: TrainingConfig) -> Dataset:
    """Read a COCO instances file whose images lie in `folder`. Classes are the categories in ascending id.

    Raises `DataError` with all that is wrong.
    """
    try:
        truth = coco_instances.read(annotations, for_training=True)
        _check(truth, folder, config)
    except InstancesError as error:
        raise DataError(str(error)) from error
    index_of = {category.id: index for index, category in enumerate(truth.categories)}
    grouped: list[list[Annotation]] = [[] for _ in truth.pictures]
    for item in truth.annotations:
        taken = Annotation(index_of[item.category_id], item.box, _compressed(item.segmentation), item.crowd)
        grouped[item.picture].append(taken)
    entries = [
        Entry(folder / picture.file_name, picture.height, picture.width, tuple(its_annotations))
        for picture, its_annotations in zip(truth.pictures, grouped)
    ]
    if config.filter_empty:
        entries = [entry for entry in entries if any(not item.crowd for item in entry.annotations)]
    if not entries:
        raise DataError(": ".join([f"{annotations}: no image with instances", *_notes(truth)]))
    return Dataset(tuple(entries), truth.categories, tuple(_notes(truth)))


def _check(truth: Instances, folder: Path, config: TrainingConfig) -> None:
    """What a training needs besides annotations that are right. Raises `InstancesError`."""
    complaints = Complaints(f"{truth.path}: cannot be trained on")
    if truth.annotations and not truth.has_masks:
        complaints.add("no annotation has a segmentation: training needs masks")
    for picture in truth.pictures:
        if not (place := folder / picture.file_name).is_file():
            complaints.add(f"image {coco_values.show(picture.id)}: there is no file {place}")
    for item in truth.annotations:
        if isinstance(item.segmentation, Rle) and config.mask_format != "bitmask" and not item.crowd:
            complaints.add(f'{truth.where(item)}: its mask is an RLE, which needs INPUT.MASK_FORMAT: "bitmask"')
    complaints.end()


def _compressed(segmentation: coco_instances.Segmentation | None) -> tuple[Polygon, ...] | dict[str, Any]:
    assert segmentation is not None, "a file without masks is refused"
    if not isinstance(segmentation, Rle):
        return segmentation
    found: dict[str, Any] = coco_mask.frPyObjects(segmentation.uncompressed(), segmentation.height, segmentation.width)
    return found


def _notes(truth: Instances) -> Iterator[str]:
    if truth.dropped:
        yield (f"{truth.dropped} of {truth.dropped + len(truth.annotations)} annotations are left out: they have no "
               "polygon of three points that enclose anything")  # fmt: skip
    if truth.dropped_parts:
        yield f"{truth.dropped_parts} polygons are left out of masks that have others: they enclose nothing"
    boxless = sum(not item.crowd and _is_empty(item.box, truth.pictures[item.picture]) for item in truth.annotations)
    if boxless:
        yield f"{boxless} annotations are no instances: their boxes have no width or no height inside the image"


def _is_empty(box: Box, picture: coco_instances.Picture) -> bool:
    x, y, width, height = box
    across, down = min(x + width, picture.width) - max(x, 0), min(y + height, picture.height) - max(y, 0)
    return across <= 0 or down <= 0


# ---- samples ----------------------------------------------------------------------------------------------------

def make_sample(entry: Entry, network: Config, config: TrainingConfig, min_size: int, flip: bool,
                limits: Limits = LIMITS) -> Sample:
    """Read, resize and perhaps flip an image, with its targets. Raises `DataError`."""
    prepared = prepare(_photograph(entry, limits), replace(network, min_size=min_size, max_size=config.max_size))
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


def _photograph(entry: Entry, limits: Limits) -> Image.Image:
    try:
        image = images.decode(entry.path.read_bytes(), limits)
    except OSError as error:
        raise DataError(f"{entry.path}: {error.strerror}") from error
    except images.ImageError as error:
        reason = error.reason.replace("limits.max_image_pixels", "--max-image-pixels")  # a training has no settings
        raise DataError(f"{entry.path}: {reason}") from error
    if image.size != (entry.width, entry.height):
        raise DataError(f"{entry.path}: is {image.width} x {image.height} pixels, the annotations say "
                        f"{entry.width} x {entry.height}")
    return image


def _is_wide_enough(box: Floats) -> bool:
    return bool((box[2:] - box[:2]).min() > SMALLEST_SIDE)


class _Scene:
    """An image's annotations, moved to the network's pixels."""

    def __init__(self, entry: Entry, net_size: tuple[int, int], flip: bool) -> None:
        self.entry = entry
        self.height, self.width = net_size
        self.flip = flip
        self.scale = np.array([self.width / entry.width, self.height / entry.height])  # x, y

    def box(self, item: Annotation) -> Floats:
        """xyxy, clipped to the image."""
        x, y, width, height = item.box
        corners = np.array([[x, y], [x + width, y + height]]) * self.scale
        if self.flip:
            corners[:, 0] = self.width - corners[::-1, 0]
        box: Floats = corners.clip(0, (self.width, self.height)).ravel().astype(np.float32)
        return box

    def mask(self, item: Annotation, box: Floats, side: int, mask_format: str) -> Floats | None:
        """The instance's mask within its box, (side, side); None where the resized mask is empty.

        And where a box of no width beside a large polygon would enlarge that beyond what can be drawn.
        """
        if isinstance(item.segmentation, dict):
            bitmap = self._resize(self._original(item).astype(np.uint8)).astype(np.bool_)
        else:
            parts = [self._points(polygon).ravel() for polygon in item.segmentation]
            narrow = max(float((box[2:] - box[:2]).min()), targets.SMALLEST_SIDE)
            enlarged = side / narrow if mask_format == "polygon" else 1.0
            if max(map(coco_values.outline, parts)) * enlarged > LONGEST_OUTLINE:
                return None
            if mask_format == "polygon":
                return polygon_mask(parts, box, side)
            bitmap = _draw(parts, self.height, self.width)
        return bitmap_mask(bitmap, box, side) if bitmap.any() else None

    def semantic_map(self) -> npt.NDArray[np.int32]:
        """Class + 1 of each pixel, crowds included; a later annotation covers an earlier one, (height, width)."""
        painted = np.zeros((self.entry.height, self.entry.width), np.int32)
        for item in self.entry.annotations:
            painted[self._original(item)] = item.class_index + 1
        return self._resize(painted)

    def _points(self, polygon: Doubles) -> Doubles:
        points: Doubles = polygon.reshape(-1, 2) * self.scale
        if self.flip:
            points[:, 0] = self.width - points[:, 0]
        return points

    def _original(self, item: Annotation) -> Booleans:
        """The instance's mask in pixels of the photograph."""
        return _draw(item.segmentation, self.entry.height, self.entry.width)

    def _resize(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        resized = np.asarray(Image.fromarray(values).resize((self.width, self.height), Image.Resampling.NEAREST))
        return np.ascontiguousarray(resized[:, ::-1]) if self.flip else resized.copy()


def _draw(segmentation: Sequence[Doubles] | dict[str, Any], height: int, width: int) -> Booleans:
    if not isinstance(segmentation, dict):
        parts = coco_mask.frPyObjects([polygon.tolist() for polygon in segmentation], height, width)
        segmentation = coco_mask.merge(parts)
    drawn: Booleans = coco_mask.decode(segmentation).astype(np.bool_)
    return drawn
