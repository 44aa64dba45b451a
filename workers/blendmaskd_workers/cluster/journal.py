"""The journal of an offline run: each worker keeps a part of it, so that nothing that is done is done again.

``run.json`` says what the run is about, and is locked by the program that runs it. ``journal/`` has a part for each
worker that there ever was, lines of JSON:

    {"image": 3, "stamp": [bytes, mtime in ns], "node": "a", "device": "npu:0", "width": 640, "height": 480,
     "detections": [...]}
    {"image": 4, "stamp": [...], "node": "a", "device": "npu:0", "code": "bad-image", "reason": "..."}

A line is written the moment its image is done. Of several lines of an image any counts; one that is torn or damaged
does not. The folder must be one that all nodes share.

``journal/tries/`` has an empty file for each time that a task was begun, which tells a worker that others had it.
"""
from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd.programs import lines
from blendmaskd.programs.errors import OutputError, UsageError
from blendmaskd.programs.lines import Lines, Stamp
from blendmaskd.protocol import Code

VERSION = 1
FINAL = {Code.BAD_IMAGE, Code.TOO_LARGE, Code.BAD_REQUEST, Code.WORKER_LOST}  # of an image that stays as it is


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    image: int  # its place
    stamp: Stamp
    node: str
    device: str
    width: int = 0
    height: int = 0
    code: Code | None = None  # of a failure
    reason: str = ""
    detections: msgspec.Raw = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a line is, and what must be known of it without reading it again."""

    part: Path
    offset: int
    length: int
    code: Code | None

    @property
    def final(self) -> bool:
        """Whether trying again would bring the same."""
        return self.code is None or self.code in FINAL


def open_part(folder: Path, name: str) -> Lines:
    """A worker's part of a run, for `Line`s as JSON. Raises `OutputError` where this node does not see the run."""
    if not (folder / "run.json").is_file():
        raise OutputError(f"{folder}: this node does not see the run there: --output must be on storage that all "
                          "nodes share")  # fmt: skip
    return Lines(folder / "journal" / f"{name}-{os.getpid()}-{time.time_ns()}.jsonl", os.O_EXCL)


def tries(folder: Path, name: str) -> int:
    """How often a task or an image was begun in a run."""
    return len(list((folder / "journal" / "tries").glob(f"{name}.*")))


def begin(folder: Path, name: str) -> int:
    """The number of this try, from 1."""
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder / "journal" / "tries" / f"{name}.{number}").touch(exist_ok=False)
            return number
    raise AssertionError("numbers do not end")


def open_run(folder: Path, about: Mapping[str, Any], *, resume: bool, anew: bool) -> int:
    """Continue the run of a folder with `resume`, else begin one; `about` tells runs apart: what answers depend on.

    The descriptor returned keeps others off until it is closed. Raises `UsageError` for another run's folder, one
    in use, and, unless `anew`, one whose answers would be lost; `OutputError` where it cannot be written.
    """
    about = {"version": VERSION, **about}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        lines.lock(held, folder, "--output")
        found = _about(folder / "run.json")
        if found and not anew:
            try:
                _check(folder, found, about, resume=resume)
            except UsageError:
                os.close(held)
                raise
        if not resume or not found:
            shutil.rmtree(folder / "journal", ignore_errors=True)
        shutil.rmtree(folder / "journal" / "tries", ignore_errors=True)
        (folder / "journal" / "tries").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{error.filename}: {error.strerror}") from None
    return held


def _check(folder: Path, found: Mapping[str, Any], about: Mapping[str, Any], *, resume: bool) -> None:
    if not resume:
        if any((folder / "journal").glob("*.jsonl")):
            raise UsageError(f"{folder}/ holds a run: --resume continues it, --anew discards it")
        return
    for name, wanted in about.items():
        if found.get(name) != wanted:
            raise UsageError(f"--resume: {folder}/ was started with {name} {found.get(name)!r}, not with {wanted!r}: "
                             "--anew begins anew, or choose another --output")  # fmt: skip


def index(folder: Path, stamps: Mapping[int, Stamp]) -> dict[int, Entry]:
    """What is done of the images in `stamps`, by place, as far as they were not changed since."""
    found: dict[int, Entry] = {}
    for part in sorted((folder / "journal").glob("*.jsonl")):
        for offset, line in lines.read(part):
            try:
                read = msgspec.json.decode(line, type=Line)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue  # damaged: its image is done again
            if stamps.get(read.image, ()) != read.stamp:
                continue
            if read.image not in found or read.code is None:  # a result rather than a failure where there are both
                found[read.image] = Entry(part, offset, len(line), read.code)
    return found


def recall(entry: Entry) -> Line:
    """A line of the index."""
    with entry.part.open("rb") as file:
        file.seek(entry.offset)
        return msgspec.json.decode(file.read(entry.length), type=Line)


def _about(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise UsageError(f"{path} is not of this program: choose another --output")
    return tree
