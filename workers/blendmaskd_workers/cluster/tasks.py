"""Which images an offline run segments, and in which tasks they are given to workers.

An image is a file, or a row of a Parquet file. Its place among all, from 0, names it in the journal. A task is what one
worker reads and does in one go: some files, or one row group.
"""
from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from blendmaskd.programs import input_images
from blendmaskd.programs.errors import UsageError
from blendmaskd.programs.lines import Stamp, stamp

LARGEST = 32  # files in a task
TASKS_OF_A_WORKER = 8  # at least, so that all workers end at about the same time


class Task(msgspec.Struct, frozen=True):
    """Images that one worker does."""

    number: int
    places: list[int]
    files: list[str]  # one for each image; of a row group, its Parquet file alone
    stamps: list[Stamp]  # one for each file
    row_group: int | None = None
    rows: list[int] = []  # in the row group, one for each image
    column: str = ""


@dataclass(frozen=True, slots=True)
class Unit:
    """A file with an image, or a row group; `first` is the place of its first image."""

    path: Path
    first: int
    images: int
    row_group: int | None = None


@dataclass(frozen=True, slots=True)
class Inputs:
    """All images of a run, in order."""

    units: list[Unit]
    names: list[str]  # `file_name` in the results, by place
    column: str = ""  # of a Parquet file, with the images

    @property
    def digest(self) -> str:
        """Tells other images apart."""
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()

    def stamps(self) -> dict[int, Stamp]:
        """Of each image's file as it is now, by place."""
        found = {path: stamp(path) for path in {unit.path for unit in self.units}}
        return {place: found[unit.path] for unit in self.units for place in _places(unit)}


def find(inputs: Sequence[str], column: str, name_column: str | None) -> Inputs:
    """What `--input` names: images (files, folders, globs) or Parquet files. Raises `UsageError`."""
    parquet = _parquet_files(inputs)
    if parquet:
        return _rows(parquet, column, name_column)
    paths = input_images.find(inputs)
    return Inputs([Unit(path, place, 1) for place, path in enumerate(paths)], input_images.names(paths))


def plan(inputs: Inputs, done: Collection[int], workers: int) -> list[Task]:
    """Tasks for what is not done."""
    left = [unit for unit in inputs.units if any(place not in done for place in _places(unit))]
    files = [unit for unit in left if unit.row_group is None]
    size = max(1, min(LARGEST, len(files) // (workers * TASKS_OF_A_WORKER)))
    tasks = [
        Task(0, [unit.first for unit in some], [str(unit.path.absolute()) for unit in some],
             [stamp(unit.path) for unit in some])
        for some in _in_lots(files, size)
    ]  # fmt: skip
    tasks += [_row_group(unit, done, inputs.column) for unit in left if unit.row_group is not None]
    return [msgspec.structs.replace(task, number=number) for number, task in enumerate(tasks)]


def read(task: Task) -> Iterator[tuple[int, Stamp, bytes | OSError]]:
    """Place, stamp and bytes of each image, or why they cannot be read."""
    if task.row_group is None:
        for place, file, found in zip(task.places, task.files, task.stamps):
            try:
                yield place, found, Path(file).read_bytes()
            except OSError as error:
                yield place, found, error
        return
    table = pq.ParquetFile(task.files[0]).read_row_group(task.row_group, columns=[task.column])
    images = table.column(task.column)
    for place, row in zip(task.places, task.rows):
        yield place, task.stamps[0], _bytes(images[row].as_py())


def stamps(task: Task) -> dict[int, Stamp]:
    """By place."""
    found = task.stamps * len(task.places) if task.row_group is not None else task.stamps
    return dict(zip(task.places, found))


def _bytes(value: Any) -> bytes:
    """A binary column's value, or the `bytes` of a struct, as Hugging Face's datasets have it; empty for null."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _parquet_files(inputs: Iterable[str]) -> list[Path]:
    files: list[Path] = []
    for text in inputs:
        path = Path(text)
        files += sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.suffix == ".parquet" else []
    return files


def _rows(files: Sequence[Path], column: str, name_column: str | None) -> Inputs:
    units: list[Unit] = []
    names: list[str] = []
    for path, name in zip(files, input_images.names(files)):
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot be read as Parquet: {error}") from None
        for wanted in filter(None, (column, name_column)):
            if wanted not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise UsageError(f"{path}: has no column {wanted!r} but {columns}; --column says where the images are")
        first = len(names)
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            units.append(Unit(path, len(names), rows, group))
            if name_column:
                names += map(str, file.read_row_group(group, columns=[name_column]).column(0).to_pylist())
            else:
                start = len(names) - first
                names += [f"{name}#{start + row}" for row in range(rows)]
    if not names:
        raise UsageError("--input: no rows in these Parquet files")
    return Inputs(units, names, column)


def _row_group(unit: Unit, done: Collection[int], column: str) -> Task:
    rows = [row for row in range(unit.images) if unit.first + row not in done]
    return Task(
        0, [unit.first + row for row in rows], [str(unit.path.absolute())], [stamp(unit.path)], unit.row_group, rows,
        column,
    )  # fmt: skip


def _places(unit: Unit) -> range:
    return range(unit.first, unit.first + unit.images)


def _in_lots(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    left = iter(units)
    while some := list(islice(left, size)):
        yield some
