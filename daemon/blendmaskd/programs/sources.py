"""Which images a submit run has, what they are called in its results, and where their overlays go."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from blendmaskd.coco import instances as coco_instances
from blendmaskd.coco.instances import Complaints, InstancesError
from blendmaskd.coco.values import Id, show
from blendmaskd.programs import input_images
from blendmaskd.programs.errors import UsageError


@dataclass(frozen=True, slots=True)
class Source:
    """An image to submit, and what it is called afterwards."""

    place: int  # among all, from 0
    path: Path
    file_name: str  # in results.json
    image_id: Id  # of the annotations' own type: a text stays a text, which COCO's tools tell from a number
    overlay: Path


def plan(paths: Sequence[Path], out: Path, annotations: Path | None) -> list[Source]:
    """What each image is called in results.json, its id there, and where its overlay goes.

    The id is the one of its name in the COCO annotations, else its place, from 1. Raises `UsageError` for images that
    are not in the annotations or are there as one, and for an overlay that would take the place of an image.
    """
    names = overlay_names(input_images.below_common_folder(paths), _longest_name(out))
    overlays = [out / name for name in names]
    originals = {os.path.realpath(path): path for path in paths}
    for target in overlays:
        if os.path.realpath(target) in originals:
            remedy = "choose another --out, or omit that image"
            raise UsageError(f"the overlay {target} would overwrite that image: {remedy}")
    ids = _annotated_ids(paths, annotations) if annotations else range(1, len(paths) + 1)
    return [Source(*each) for each in zip(range(len(paths)), paths, input_images.names(paths), ids, overlays)]


def overlay_names(below: Sequence[Path], longest: int = 255) -> list[Path]:
    """A file name for each image's overlay, no two the same, none longer than `longest` bytes.

    Its base name and .jpg; if two images share that, with the folders in front (a/1.jpg, b/1.jpg); if two in one
    folder do, with the old suffix as well (1.png.jpg, 1.tif.jpg); where one would be a folder of another, numbers.
    """
    choices = (
        [Path(path.stem + ".jpg") for path in below],
        [path.with_suffix(".jpg") for path in below],
        [path.with_name(path.name + ".jpg") for path in below],
        [Path(f"{number}.jpg") for number in range(1, len(below) + 1)],
    )
    shortened = ([_shortened(name, longest) for name in names] for names in choices)
    return next(names for names in shortened if _apart(names))


def _shortened(path: Path, longest: int) -> Path:
    """The same, unless its name is too long: then the beginning of it, and a digest of the whole."""
    name = os.fsencode(path.name)
    if len(name) <= longest:
        return path
    end = f"~{hashlib.sha256(name).hexdigest()[:12]}.jpg"
    return path.with_name(name[: longest - len(end)].decode(errors="ignore") + end)


def _apart(names: Sequence[Path]) -> bool:
    """Whether all can be files at the same time."""
    folders = {folder for name in names for folder in name.parents}
    return input_images.unique(names) and folders.isdisjoint(names)


def _longest_name(folder: Path) -> int:
    """How many bytes a file's name may have there; `folder` need not be there yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return os.pathconf(existing, "PC_NAME_MAX")


def _annotated_ids(paths: Sequence[Path], annotations: Path) -> list[Id]:
    try:
        ids: dict[str, list[Id]] = {}
        for image_id, file_name in coco_instances.read_names(annotations):
            ids.setdefault(os.path.normpath(file_name), []).append(image_id)
        return _told_apart(paths, ids, Complaints(str(annotations)))
    except InstancesError as error:
        raise UsageError(str(error)) from None


def _told_apart(paths: Sequence[Path], ids: dict[str, list[Id]], complaints: Complaints) -> list[Id]:
    """The one id of each path, which no other has. Raises `InstancesError`."""
    owners: dict[str, Path] = {}
    found: list[Id] = []
    for path in paths:
        name = _annotated_name(path, ids)
        if name is None:
            complaints.add(f"{path}: not among its images")
        elif (owner := owners.setdefault(name, path)) is not path:
            complaints.add(f"{path} and {owner} are both its image {show(ids[name][0])}, {show(name)}: submit one of "
                           "them, or include the folders in file_name")  # fmt: skip
        elif len(ids[name]) > 1:
            complaints.add(f"{path}: {show(name)} occurs with the ids {', '.join(map(show, ids[name]))}")
        else:
            found.append(ids[name][0])
    complaints.end()
    return found


def _annotated_name(path: Path, names: Container[str]) -> str | None:
    """The longest end of its path that is named: an annotation's file_name may have folders in front."""
    parts = Path(os.path.abspath(path)).parts
    ends = (os.path.join(*parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in names), None)
