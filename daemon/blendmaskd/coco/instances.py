"""Ground truth in COCO's format: what an annotation file says, checked whole before anything is done with it.

Who measures, trains or names images by such a file reads it here, so that all understand the same, and so that no
library that trusts its input meets what nobody has looked at: pycocotools ends with a segmentation fault, takes all
memory or gives a wrong number for files that it was not written for.

Rules: what COCO defines is mended (an annotation's id is only a name, a missing `iscrowd` is 0, a missing `area` that
of the mask); what has one meaning is understood (whole numbers written as 1.0, ids that are texts); everything else is
refused. A complaint names the file, the annotation by its id and place, the image by its id and name; all of them come
at once. A mask of which nothing can be drawn, such as a polygon of two points, is unusable: who measures refuses it,
who trains leaves it out. What one value may be is decided in `blendmaskd.coco.values`. Must never import torch.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from blendmaskd.coco import categories, json_file
from blendmaskd.coco import values as coco_values
from blendmaskd.coco.categories import CategoriesError, Category
from blendmaskd.coco.values import LONGEST_SIDE, Box, Fault, Id, Polygon, Rle, identity, show

LISTED = 20  # complaints; of the others only the number is told

Segmentation = tuple[Polygon, ...] | Rle

T = TypeVar("T")


class InstancesError(ValueError):
    """An annotation file that cannot be used; the text names it and says why, with a line for each complaint."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that the file names."""

    id: Id
    file_name: str  # relative, and inside the folder of the images
    width: int  # pixels
    height: int


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object, in pixels of its image."""

    id: Any  # as the file has it: a name for people, nothing else
    place: int  # in the file's list, from 0
    picture: int  # place among the pictures
    category_id: int
    box: Box
    segmentation: Segmentation | None  # None where the whole file has none
    area: float | None  # square pixels; None where the file does not say
    crowd: bool


@dataclass(frozen=True, slots=True)
class Instances:
    """What a COCO instances file says, fit for use."""

    path: Path
    pictures: tuple[Picture, ...]  # in the order of the file
    categories: tuple[Category, ...]  # in ascending id
    annotations: tuple[Annotation, ...]  # in the order of the file
    has_masks: bool  # whether the annotations have a segmentation: all of them or none
    dropped: int  # annotations left out because nothing can be drawn of their mask
    dropped_parts: int  # polygons left out of masks that have others

    def where(self, annotation: Annotation) -> str:
        """What a message calls it."""
        return _where(annotation.id, annotation.place, self.pictures[annotation.picture])


class Complaints:
    """What is wrong with a file, of which the first are listed and the others counted."""

    def __init__(self, head: str) -> None:
        self._head = head
        self._listed: list[str] = []
        self._count = 0

    def add(self, text: str) -> None:
        self._count += 1
        if self._count <= LISTED:
            self._listed.append(text)

    def end(self) -> None:
        """Raises `InstancesError` when there were any."""
        if self._count == 1:
            raise InstancesError(f"{self._head}: {self._listed[0]}")
        if self._count:
            rest = [f"and {self._count - LISTED} more"] if self._count > LISTED else []
            raise InstancesError("\n  ".join([f"{self._head}: {self._count} faults:", *self._listed, *rest]))


def read(path: Path, *, for_training: bool) -> Instances:
    """Read a COCO instances file. Raises `InstancesError`.

    For training, annotations with an unusable mask (no polygon, or none of three points that enclose anything) are left
    out and counted, as detectron2 does. Else, for measuring, they are refused, and so is what makes a number
    meaningless: a box outside its image, two images with one file, each of which would have a part of its objects.
    """
    complaints = Complaints(f"{path}: not COCO instances")
    tree = _tree(path, complaints)
    images, annotations, names = (_entries(tree, key, complaints) for key in ("images", "annotations", "categories"))
    for key, entries in (("images", images), ("categories", names)):
        if not entries and isinstance(tree.get(key), list):
            complaints.add(f'the list under "{key}" is empty')
    complaints.end()
    reader = _Reader(complaints, for_training)
    reader.take_pictures(images)
    reader.take_categories(names)
    reader.take_annotations(annotations)
    complaints.end()
    return Instances(
        path, tuple(reader.pictures), tuple(sorted(reader.categories.values(), key=lambda category: category.id)),
        tuple(reader.annotations), reader.has_masks, reader.dropped, reader.dropped_parts,
    )  # fmt: skip


def read_names(path: Path) -> list[tuple[Id, str]]:
    """Id and `file_name` of each image of a COCO file, whatever else is in it; no two ids are the same.

    Raises `InstancesError`.
    """
    complaints = Complaints(f"{path}: not COCO annotations")
    named = list(_named(_entries(_tree(path, complaints), "images", complaints), complaints))
    complaints.end()
    return [(image_id, name) for _, _, image_id, name in named if image_id is not None and name is not None]


# -- the file ---------------------------------------------------------------------------------------------------------


def _tree(path: Path, complaints: Complaints) -> dict[str, Any]:
    try:
        tree = json_file.read(path)
    except json_file.JsonFileError as error:
        complaints.add(str(error))
        complaints.end()
    if not isinstance(tree, dict):
        found = "a list, as in result files" if isinstance(tree, list) else show(tree)
        complaints.add(f'found {found}: expected an object with "images", "annotations" and "categories"')
    complaints.end()
    return dict(tree)


def _entries(tree: dict[str, Any], key: str, complaints: Complaints) -> list[Any]:
    if isinstance(value := tree.get(key), list):
        return value
    complaints.add(f'expected a list of objects under "{key}", found {show(value) if key in tree else "no such key"}')
    return []


def _named(
    images: Sequence[Any], complaints: Complaints
) -> Iterator[tuple[dict[str, Any], str, Id | None, str | None]]:
    """Each entry of "images" that is an object: what a message calls it, its id and `file_name`, None where refused."""
    seen: dict[Id, int] = {}
    for place, item in enumerate(images):
        if not isinstance(item, dict):
            complaints.add(f'images[{place}]: {show(item)}: expected an object under "images"')
            continue
        image_id, name = identity(item.get("id")), item.get("file_name")
        where = f"image {show(item.get('id'))} (images[{place}])"
        if image_id is None:
            complaints.add(f"images[{place}], {show(name)}: id {show(item.get('id'))}: expected a number or a string")
        elif seen.setdefault(image_id, place) != place:
            complaints.add(f"{where}: its id is used twice: images[{seen[image_id]}] has it too")
        if not _is_file_name(name):
            complaints.add(f'{where}: expected a "file_name", found {show(name)}')
        yield item, where, image_id, name if _is_file_name(name) else None


def _is_file_name(value: Any) -> bool:
    """Whether a file can be called so."""
    try:
        return isinstance(value, str) and value != "" and b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _leaves(file_name: str) -> bool:
    """Whether a path leads out of the folder that it starts in, or does not start there."""
    return file_name.startswith("/") or os.path.normpath(file_name).split("/")[0] == ".."


def _where(annotation_id: Any, place: int, picture: Picture | None = None) -> str:
    own = f"annotation {show(annotation_id)} (annotations[{place}])"
    if picture is None:
        return own
    name = picture.file_name if picture.file_name.isprintable() else show(picture.file_name)
    return f"{own} of image {show(picture.id)}, {name}"


class _Reader:
    """Takes the lists of a file, one after the other."""

    def __init__(self, complaints: Complaints, for_training: bool) -> None:
        self.pictures: list[Picture] = []
        self.categories: dict[int, Category] = {}
        self.annotations: list[Annotation] = []
        self.has_masks = False
        self.dropped = self.dropped_parts = 0
        self._complaints = complaints
        self._for_training = for_training
        self._refused: set[str] = set()  # lists with entries that may be those that others refer to
        self._owners: dict[str, str] = {}  # of files: which image has it
        self._places: dict[Id, int | None] = {}  # of pictures; None: refused

    def take_pictures(self, images: Sequence[Any]) -> None:
        for item, where, image_id, name in _named(images, self._complaints):
            width, height = coco_values.side(item.get("width")), coco_values.side(item.get("height"))
            if width is None or height is None:
                found = f"{show(item.get('height'))} and {show(item.get('width'))}"
                self._complaints.add(f'{where}: expected a "height" and a "width" of 1 to {LONGEST_SIDE} pixels, found '
                                     f"{found}")  # fmt: skip
            if name is not None:
                self._check_file(where, name)
            if image_id is None:
                continue
            if name is None or width is None or height is None:
                self._places.setdefault(image_id, None)
            else:
                self._places.setdefault(image_id, len(self.pictures))
                self.pictures.append(Picture(image_id, name, width, height))
        if len(self._places) < len(images):
            self._refused.add("images")

    def take_categories(self, entries: Sequence[Any]) -> None:
        for place, entry in enumerate(entries):
            try:
                category = categories.parse(entry)
            except CategoriesError as error:
                self._complaints.add(f"categories[{place}]: {error}")
                self._refused.add("categories")
                continue
            if (earlier := self.categories.setdefault(category.id, category)) is not category:
                self._complaints.add(f"categories[{place}]: id {category.id} is given to both {show(earlier.name)} and "
                                     f"{show(category.name)}")  # fmt: skip

    def take_annotations(self, items: Sequence[Any]) -> None:
        self.has_masks = any(isinstance(item, dict) and item.get("segmentation") for item in items)
        for place, item in enumerate(items):
            if isinstance(item, dict):
                self._take(item, place)
            else:
                self._complaints.add(f'annotations[{place}]: {show(item)}: expected an object under "annotations"')

    def _check_file(self, where: str, name: str) -> None:
        if _leaves(name):
            self._complaints.add(f"{where}: file_name {show(name)}: expected a path inside the folder of the images, "
                                 "relative to it")  # fmt: skip
        elif not self._for_training and (owner := self._owners.setdefault(os.path.normpath(name), where)) != where:
            self._complaints.add(f"{where}: its file {show(name)} is that of {owner} too")

    def _take(self, item: dict[str, Any], place: int) -> None:
        annotation_id = item.get("id")
        try:
            at = self._picture(item.get("image_id"))
        except Fault as fault:
            self._complaints.add(f"{_where(annotation_id, place)}: {fault}")
            return
        if at is None:  # its image is refused, and the size not known
            return
        picture = self.pictures[at]
        faults: list[str] = []
        category_id = _checked(faults, lambda: self._category(item.get("category_id")))
        box = _checked(faults, lambda: self._box(item.get("bbox"), picture))
        crowd = _checked(faults, lambda: coco_values.crowd(item.get("iscrowd")))
        area = _checked(faults, lambda: coco_values.area(item.get("area")))
        segmentation = _checked(faults, lambda: self._segmentation(item.get("segmentation"), picture))
        for fault_text in faults:
            self._complaints.add(f"{_where(annotation_id, place, picture)}: {fault_text}")
        if segmentation == () and not faults:
            self.dropped += 1
        elif category_id is not None and box is not None and crowd is not None:
            self.annotations.append(
                Annotation(annotation_id, place, at, category_id, box, segmentation, area, crowd)
            )

    def _picture(self, value: Any) -> int | None:
        image_id = identity(value)
        if image_id is not None and image_id in self._places:
            return self._places[image_id]
        if "images" in self._refused:
            return None
        raise Fault(f"image_id {show(value)} is not among the images{self._as_other_type(image_id)}")

    def _as_other_type(self, image_id: Id | None) -> str:
        """A hint: tools that compare a number with a text find nothing, and say nothing."""
        if isinstance(image_id, int) and str(image_id) in self._places:
            return f", where the id is a string: {show(str(image_id))}"
        if isinstance(image_id, str) and image_id.isdecimal() and len(image_id) < 20 and int(image_id) in self._places:
            return f", where the id is a number: {int(image_id)}"
        return ""

    def _category(self, value: Any) -> int | None:
        category_id = coco_values.whole(value)
        if category_id not in self.categories and "categories" not in self._refused:
            raise Fault(f"category_id {show(value)} is not among the categories")
        return category_id

    def _box(self, value: Any, picture: Picture) -> Box:
        box = coco_values.box(value, picture.width, picture.height)
        if not self._for_training and coco_values.is_outside(box, picture.width, picture.height):
            raise Fault(f"bbox {show(value)} lies outside the image of {picture.width} x {picture.height} pixels")
        return box

    def _segmentation(self, value: Any, picture: Picture) -> Segmentation | None:
        """None where the file has no masks; empty: to be left out."""
        if not self.has_masks:
            return None
        match value:
            case list():
                return self._polygons(value, picture)
            case dict():
                return coco_values.rle(value, picture.width, picture.height)
            case None:
                raise Fault("segmentation is missing, and other annotations have one")
        raise Fault(f"segmentation {show(value)}: expected a list of polygons, or an RLE")

    def _polygons(self, parts: list[Any], picture: Picture) -> tuple[Polygon, ...]:
        if parts and all(map(coco_values.is_number, parts)):
            raise Fault(f"segmentation {show(parts)} is one polygon: expected a list of polygons")
        found = [
            coco_values.polygon(part, f"segmentation[{number}]", picture.width, picture.height)
            for number, part in enumerate(parts)
        ]
        if self._for_training:
            usable = tuple(part for part in found if not isinstance(part, str) and not coco_values.is_flat(part))
            self.dropped_parts += len(found) - len(usable) if usable else 0
            return usable
        if unusable := [part for part in found if isinstance(part, str)]:
            raise Fault("; ".join(unusable))
        if not found:
            raise Fault("segmentation is empty, and other annotations have one: complete or remove the annotation")
        return tuple(part for part in found if not isinstance(part, str))


def _checked(faults: list[str], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except Fault as fault:
        faults.append(str(fault))
        return None
