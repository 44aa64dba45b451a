"""What an offline run leaves: results.json or results.parquet, and failures.json, written from the journal.

An image at a time, in the order of the images: a run's results need not fit in memory.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from blendmaskd import files
from blendmaskd.programs.failures import Failure
from blendmaskd_workers.cluster import journal
from blendmaskd_workers.cluster.journal import Entry, Line

ROWS = 256  # of a row group

SEGMENTATION = {
    "rle": pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())]),
    "polygon": pa.list_(pa.list_(pa.float64())),
    "none": pa.null(),
}


def write(
    folder: Path, names: Sequence[str], done: Mapping[int, Entry], *, parquet: bool, mask_format: str
) -> list[Failure]:
    """Write all that is done; returns the failures. `image_id` is the place from 1."""
    failures = [journal.recall(done[place]) for place in sorted(done) if done[place].code]
    files.write_json(folder / "failures.json", [
        {"image_id": line.image + 1, "file_name": names[line.image], "code": line.code, "reason": line.reason}
        for line in failures
    ])  # fmt: skip
    results = (journal.recall(done[place]) for place in sorted(done) if not done[place].code)
    if parquet:
        _write_parquet(folder / "results.parquet", names, results, mask_format)
    else:
        _write_json(folder / "results.json", names, results)
    return [Failure(Path(names[line.image]), str(line.code), line.reason) for line in failures]


def _write_json(path: Path, names: Sequence[str], lines: Iterator[Line]) -> None:
    with files.whole(path) as beside, beside.open("wb") as file:
        separator = b"["
        for line in lines:
            for detection in _detections(line):
                named = {"image_id": line.image + 1, "file_name": names[line.image], **detection}
                file.write(separator + msgspec.json.encode(named))
                separator = b",\n"
        file.write(b"]\n" if separator != b"[" else b"[]\n")


def _write_parquet(path: Path, names: Sequence[str], lines: Iterator[Line], mask_format: str) -> None:
    schema = _schema(mask_format)
    with files.whole(path) as beside, pq.ParquetWriter(beside, schema, compression="zstd") as writer:
        while some := list(islice(lines, ROWS)):
            rows = [
                {
                    "image_id": line.image + 1, "file_name": names[line.image], "width": line.width,
                    "height": line.height, "node": line.node, "device": line.device, "detections": _detections(line),
                }
                for line in some
            ]  # fmt: skip
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _schema(mask_format: str) -> Any:
    detection = pa.struct([
        ("bbox", pa.list_(pa.float64())), ("score", pa.float64()), ("class_index", pa.int32()),
        ("category_id", pa.int64()), ("category_name", pa.string()), ("segmentation", SEGMENTATION[mask_format]),
    ])  # fmt: skip
    return pa.schema([
        ("image_id", pa.int64()), ("file_name", pa.string()), ("width", pa.int32()), ("height", pa.int32()),
        ("node", pa.string()), ("device", pa.string()), ("detections", pa.list_(detection)),
    ])  # fmt: skip


def _detections(line: Line) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.json.decode(line.detections)
    return found
