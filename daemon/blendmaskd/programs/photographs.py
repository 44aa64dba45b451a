"""Which images a command line means, and what they are called in its results; the same for all programs."""
from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from blendmaskd.programs.program import UsageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find(inputs: Iterable[str]) -> list[Path]:
    """The files that files, folders and globs name, each once, in order; a folder's and a glob's sorted.

    A named file is taken as it is, and fails later if it is no image. Raises `UsageError` for a folder or a glob with
    no images.
    """
    found: dict[str, Path] = {}
    for text in inputs:
        for path in _expand(text):
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if _looks_like_image(file))
        if not inside:
            raise UsageError(f"{text}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
        return inside
    if path.exists() or not glob.has_magic(text):
        return [path]
    matched = sorted(file for file in map(Path, glob.glob(text, recursive=True)) if _looks_like_image(file))
    if not matched:
        raise UsageError(f"{text}: matches no images")
    return matched


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def names(paths: Sequence[Path]) -> list[str]:
    """The file's own name when no two are the same, else the path below the folder that all images share."""
    below = below_common_folder(paths)
    own = [path.name for path in below]
    return own if unique(own) else [str(path) for path in below]


def unique(names: Sequence[Any]) -> bool:
    return len(set(names)) == len(names)


def below_common_folder(paths: Sequence[Path]) -> list[Path]:
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, common)) for path in absolute]
