"""Which images a submit run has, what they are called in its results, and where their overlays go."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blendmaskd.programs import photographs
from blendmaskd.programs.program import UsageError


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
    overlays = [out / name for name in overlay_names(photographs.below_common_folder(paths))]
    originals = {os.path.realpath(path): path for path in paths}
    for target in overlays:
        if os.path.realpath(target) in originals:
            raise UsageError(f"the overlay {target} would take the place of that image: choose another --out")
    ids = _annotated_ids(paths, annotations) if annotations else range(1, len(paths) + 1)
    return [Source(*each) for each in zip(range(len(paths)), paths, photographs.names(paths), ids, overlays)]


def overlay_names(below: Sequence[Path]) -> list[Path]:
    """A file name for each image's overlay, no two the same.

    Its base name and .jpg; if two images share that, with the folders in front (a/1.jpg, b/1.jpg); if two in one
    folder do, with the old suffix as well (1.png.jpg, 1.tif.jpg).
    """
    choices = (
        [Path(path.stem + ".jpg") for path in below],
        [path.with_suffix(".jpg") for path in below],
        [path.with_name(path.name + ".jpg") for path in below],
    )
    return next(names for names in choices if photographs.unique(names))


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
