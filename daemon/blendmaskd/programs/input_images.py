"""Which images a command line means, and what they are called in its results; the same for all programs."""
from __future__ import annotations

import glob
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any

from blendmaskd import files
from blendmaskd.programs.errors import UsageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def find(inputs: Iterable[str]) -> list[Path]:
    """The files that files, folders and globs name, each once, in order; a folder's and a glob's sorted.

    Links to folders are followed, and a file that is reached in several ways is taken once; links to files are files of
    their own name. A named file is taken as it is, and fails later if it is no image; so does what only looks like one
    among others, a broken link or a file that may not be read. Raises `UsageError` for a folder or a glob with no
    images, and for what is no file at all, such as a pipe.
    """
    found: dict[tuple[str, str], Path] = {}
    for text in inputs:
        for path in _expand(text):
            found.setdefault((os.path.realpath(path.parent), path.name), path)
    return list(found.values())


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if _looks_like_image(file))
        if not inside:
            raise UsageError(f"{text}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
        return inside
    if os.path.lexists(path) or not glob.has_magic(text):
        if not _may_be_file(path):
            raise UsageError(f"{text}: not a regular file: an image is read more than once; save it to a file first")
        return [path]
    matched = sorted(file for file in map(Path, _matches(text)) if _looks_like_image(file))
    if not matched:
        raise UsageError(f"{text}: matches no images")
    return matched


def _looks_like_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and _may_be_file(path)


def _may_be_file(path: Path) -> bool:
    """Whether it is a file; what cannot be found out is said when it is read."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _matches(pattern: str) -> Iterator[str]:
    """What `glob.glob` finds with ``recursive``, but no folder twice: links may lead round in circles."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    rest = list(dropwhile("**".__eq__, parts[at:])) or ["*"]
    for top in glob.glob("/".join([*parts[:at], ""]) if at else "."):
        for folder in _folders(top):
            yield from _matches("/".join([glob.escape(folder.rstrip("/")), *rest]))


def _folders(top: str) -> Iterator[str]:
    """A folder and all below it but hidden ones, each once, the nearest first. One that may not be read has none."""
    seen: set[tuple[int, int]] = set()
    waiting = deque([top])
    while waiting:
        folder = waiting.popleft()
        try:
            status, inside = os.stat(folder), sorted(os.listdir(folder))
        except OSError:
            continue
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder
            below = (os.path.join(folder, name) for name in inside if not name.startswith("."))
            waiting += filter(os.path.isdir, below)


def names(paths: Sequence[Path]) -> list[str]:
    """The file's own name when no two are the same, else the path below the folder that all images share; as text."""
    below = below_common_folder(paths)
    own = [files.text_of(Path(path.name)) for path in below]
    return own if unique(own) else [files.text_of(path) for path in below]


def unique(names: Sequence[Any]) -> bool:
    return len(set(names)) == len(names)


def below_common_folder(paths: Sequence[Path]) -> list[Path]:
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [Path(os.path.relpath(path, common)) for path in absolute]
