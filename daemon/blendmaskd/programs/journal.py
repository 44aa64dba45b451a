"""The journal of a submit run: every answer as it came, so that a run that ended early goes on where it was.

Lines of JSON in ``journal.jsonl`` beside results.json. The first says which images, by ``file_name`` and ``image_id``,
and which options; the others what came of an image, named by its place among those from 0:

    {"image": 3, "stamp": [bytes, mtime in ns], "device": "npu:0", "detections": [...]}
    {"image": 4, "stamp": [bytes, mtime in ns], "code": "bad-image", "reason": "..."}
    {"image": 3, "overlay": true}

An image that was answered `worker-lost` is done, as one with a result is: the daemon has tried it again itself.
A later line of an image counts more, a damaged one not at all. A last line that is torn is taken off before more is
written. One program at a time holds the journal, by a lock on it.
"""
from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from blendmaskd.coco.values import Id
from blendmaskd.programs import lines
from blendmaskd.programs.errors import UsageError
from blendmaskd.programs.lines import Lines, Stamp, stamp
from blendmaskd.protocol import Code

VERSION = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A segmentation, as far as the run needs it again."""

    stamp: Stamp  # of the image when it was submitted
    device: str
    detections: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Failed:
    """An image that has no segmentation."""

    stamp: Stamp
    code: str
    reason: str


@dataclass(slots=True)
class Contents:
    """What a journal says of its images, by place."""

    images: list[tuple[str, Id]]  # file name, id
    options: dict[str, Any]
    answers: dict[int, Answer] = field(default_factory=dict)
    failed: dict[int, Failed] = field(default_factory=dict)
    drawn: set[int] = field(default_factory=set)

    @property
    def over(self) -> bool:
        """Whether nothing would be lost but what can be had again as easily."""
        return not self.answers or len(self.answers) + len(self.failed) == len(self.images)


class Journal:
    """Open for writing. `contents` is what was there before, and grows with it."""

    def __init__(self, path: Path, images: Sequence[tuple[str, Id]], options: dict[str, Any]) -> None:
        self.path = path
        self.contents = Contents(list(images), options)

    def open(self, *, resume: bool, anew: bool) -> Self:
        """Continue what is there with `resume`, else begin anew.

        Raises `UsageError` for a journal of other images or options, of another program that runs, that cannot be read,
        and, unless `anew`, for one whose answers would be lost; `OutputError` where it cannot be written.
        """
        self._lines = Lines(self.path)
        try:
            lines.lock(self._lines.fd, self.path.parent, "--out")
            found, end = (None, 0) if anew else _read(self.path)
            if resume and found:
                self._continue(found, end)
            else:
                self._refuse_loss(found)
                self._begin()
        except BaseException:
            os.close(self._lines.fd)
            raise
        return self

    def answered(self, place: int, image: Stamp, device: str, detections: list[dict[str, Any]]) -> None:
        """Keep an answer. Raises `OutputError`, as all that write here."""
        self._keep({"image": place, "stamp": image, "device": device, "detections": detections})

    def failed(self, place: int, image: Stamp, code: str, reason: str) -> None:
        self._keep({"image": place, "stamp": image, "code": code, "reason": reason})

    def drew(self, place: int) -> None:
        """The image's overlay is whole."""
        self._keep({"image": place, "overlay": True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """One that says nothing is not left."""
        try:
            if not self.contents.answers and not self.contents.failed:
                self.path.unlink(missing_ok=True)
            else:
                self._lines.sync()
        finally:
            os.close(self._lines.fd)

    def _begin(self) -> None:
        if os.fstat(self._lines.fd).st_size:
            os.ftruncate(self._lines.fd, 0)
        head = {"journal": VERSION, "options": self.contents.options, "images": self.contents.images}
        self._lines.write(json.dumps(head).encode())
        self._lines.sync()

    def _continue(self, found: Contents, end: int) -> None:
        if found.options != self.contents.options:
            raise UsageError(f"--resume: {self.path} was started with {_told(found.options)}, not with "
                             f"{_told(self.contents.options)}: {_REMEDY}")  # fmt: skip
        if found.images != self.contents.images:
            raise UsageError(f"--resume: {self.path} belongs to other images: "
                             f"{_difference(found.images, self.contents.images)}; {_REMEDY}")  # fmt: skip
        os.ftruncate(self._lines.fd, end)
        self.contents = found

    def _refuse_loss(self, found: Contents | None) -> None:
        if found and not found.over:
            raise UsageError(
                f"{self.path.parent}/ holds an unfinished run, {len(found.answers)} of {len(found.images)} images are "
                "answered: --resume continues it, --anew discards it"
            )

    def _keep(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line).encode())
        _add(self.contents, line)


_REMEDY = "--anew begins anew, or choose another --out"


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in options.items())


def _difference(found: Sequence[tuple[str, Id]], wanted: Sequence[tuple[str, Id]]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)}, not {len(wanted)}"
    old, new = next(pair for pair in zip(found, wanted) if pair[0] != pair[1])
    return f"{old[0]} (id {old[1]!r}), not {new[0]} (id {new[1]!r})"


def _read(path: Path) -> tuple[Contents | None, int]:
    """What is there, None for nothing, and where the last whole line ends. Raises `UsageError` for no journal."""
    whole = [line for _, line in lines.read(path)] if path.is_file() else []
    if not whole:
        return None, 0
    contents = _first(whole[0], path)
    for line in whole[1:]:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # damaged: its image is submitted again
            _add(contents, json.loads(line))
    return contents, sum(map(len, whole))


def _first(line: bytes, path: Path) -> Contents:
    try:
        tree = json.loads(line)
        version, options = int(tree["journal"]), dict(tree["options"])
        images: list[tuple[str, Id]] = [
            (str(name), image_id if isinstance(image_id, str) else int(image_id)) for name, image_id in tree["images"]
        ]
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{path} is not a journal of this program: {_REMEDY}") from None
    if version > VERSION:
        raise UsageError(f"{path} is of a newer version of this program: {_REMEDY}")
    return Contents(images, options)


def _add(contents: Contents, tree: Any) -> None:
    place = int(tree["image"])
    if not 0 <= place < len(contents.images):
        raise ValueError(place)
    image = (int(tree["stamp"][0]), int(tree["stamp"][1])) if tree.get("stamp") else None
    if "detections" in tree:
        contents.answers[place] = Answer(image, str(tree["device"]), list(tree["detections"]))
        contents.failed.pop(place, None)
        contents.drawn.discard(place)
    elif "code" in tree:
        contents.failed[place] = Failed(image, str(tree["code"]), str(tree["reason"]))
        contents.answers.pop(place, None)
    elif tree["overlay"]:
        contents.drawn.add(place)


def settled(contents: Contents, paths: Sequence[Path], *, retry_lost: bool) -> set[int]:
    """Places of the images that are answered as they are now, or, without `retry_lost`, that the daemon gave up."""
    lost = {} if retry_lost else {
        place: failed for place, failed in contents.failed.items() if failed.code == Code.WORKER_LOST and failed.stamp
    }  # fmt: skip
    known: dict[int, Answer | Failed] = {**contents.answers, **lost}
    return {place for place, each in known.items() if each.stamp == stamp(paths[place])}
