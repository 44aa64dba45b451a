"""Which images a submit run has, what they are called in its results, and where their overlays go."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon import photographs
from daemon.program import UsageError


@dataclass(frozen=True, slots=True)
class Source:
    """An image to submit, and what it is called afterwards."""

    place: int  # among all, from 0
    path: Path
    file_name: str  # in results.json
    image_id: int
    overlay: Path


def plan(paths: Sequence[Path], out: Path, annotations: Path | None) -> list[Source]:
    """What each image is called in results.json, its id there, and where its overlay goes.

    The id is the one of its name in the COCO annotations, else its place, from 1. Raises `UsageError` for an image that
    is not in the annotations and for an overlay that would take the place of an image.
    """
    names = overlay_names(photographs.below_common_folder(paths), _longest_name(out))
    overlays = [out / name for name in names]
    originals = {os.path.realpath(path): path for path in paths}
    for target in overlays:
        if os.path.realpath(target) in originals:
            remedy = "choose another --out, or leave that image out"
            raise UsageError(f"the overlay {target} would take the place of that image: {remedy}")
    ids = _annotated_ids(paths, annotations) if annotations else range(1, len(paths) + 1)
    return [Source(*each) for each in zip(range(len(paths)), paths, photographs.names(paths), ids, overlays)]


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
    return photographs.unique(names) and folders.isdisjoint(names)


def _longest_name(folder: Path) -> int:
    """How many bytes a file's name may have there; `folder` need not be there yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return os.pathconf(existing, "PC_NAME_MAX")


def _annotated_ids(paths: Sequence[Path], annotations: Path) -> list[int]:
    try:
        entries = json.loads(annotations.read_text(encoding="utf-8"))["images"]
        ids = {str(entry["file_name"]): int(entry["id"]) for entry in entries}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{annotations}: not COCO annotations: {type(error).__name__}: {error}") from None
    return [_annotated_id(path, ids, annotations) for path in paths]


def _annotated_id(path: Path, ids: dict[str, int], annotations: Path) -> int:
    """By the longest end of its path that is named: an annotation's file_name may have folders in front."""
    parts = Path(os.path.abspath(path)).parts
    for start in range(1, len(parts)):
        name = "/".join(parts[start:])
        if name in ids:
            return ids[name]
    raise UsageError(f"{path}: not among the images of {annotations}")
