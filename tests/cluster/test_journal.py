"""The journal of an offline run: what is in it, what counts, who may write."""
from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from blendmaskd.programs.errors import OutputError, UsageError
from blendmaskd.protocol import Code
from blendmaskd_workers.cluster import journal
from blendmaskd_workers.cluster.journal import Line, open_part, open_run

STAMP = (10, 20)
ABOUT = {"images": 3, "engine": "timed"}


@pytest.fixture
def run(tmp_path) -> Path:
    open_run(tmp_path / "out", ABOUT, resume=False, anew=False)
    return tmp_path / "out"


def line(image: int, *, code: Code | None = None, stamp: tuple[int, int] | None = STAMP) -> Line:
    found = msgspec.Raw(b"null" if code else b'[{"score":0.25}]')
    return Line(image=image, stamp=stamp, node="a", device="npu:0", width=4, height=3, code=code, detections=found)


def test_what_was_written_is_found_again(run) -> None:
    part = open_part(run, "a-npu:0")
    for each in (line(0), line(2, code=Code.BAD_IMAGE)):
        part.write(msgspec.json.encode(each))
    found = journal.index(run, dict.fromkeys(range(3), STAMP))
    assert sorted(found) == [0, 2]
    assert (found[0].code, found[0].final, found[2].code, found[2].final) == (None, True, Code.BAD_IMAGE, True)
    assert journal.recall(found[0]) == line(0)
    assert msgspec.json.decode(journal.recall(found[0]).detections) == [{"score": 0.25}]


def test_a_torn_and_a_damaged_line_do_not_count(run) -> None:
    part = open_part(run, "a-npu:0")
    for number in range(3):
        part.write(msgspec.json.encode(line(number)))
    [path] = run.glob("journal/*.jsonl")
    text = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(text[0] + b'{"image": 1, "st\n' + text[2][:-5])
    assert sorted(journal.index(run, dict.fromkeys(range(3), STAMP))) == [0]


def test_a_result_counts_more_than_a_failure_and_a_changed_file_is_not_done(run) -> None:
    first, second = open_part(run, "a-npu:0"), open_part(run, "b-npu:0")
    first.write(msgspec.json.encode(line(0, code=Code.WORKER_LOST)))
    second.write(msgspec.json.encode(line(0)))
    first.write(msgspec.json.encode(line(1)))
    second.write(msgspec.json.encode(line(1, code=Code.ENGINE_FAILED)))
    first.write(msgspec.json.encode(line(2, stamp=(11, 20))))
    found = journal.index(run, dict.fromkeys(range(3), STAMP))
    assert {place: entry.code for place, entry in found.items()} == {0: None, 1: None}


@pytest.mark.parametrize(("code", "final"), [(Code.WORKER_LOST, True), (Code.ENGINE_FAILED, False)])
def test_what_may_go_better_next_time_is_not_final(run, code, final) -> None:
    open_part(run, "a").write(msgspec.json.encode(line(0, code=code)))
    assert journal.index(run, {0: STAMP})[0].final is final


def test_a_run_in_a_folder_is_resumed_thrown_away_or_refused(run, tmp_path) -> None:
    with pytest.raises(UsageError, match="another run is writing"):
        open_run(run, ABOUT, resume=True, anew=False)
    folder = tmp_path / "other"
    kept = tmp_path / "kept"
    begun = open_run(folder, ABOUT, resume=False, anew=False)
    open_part(folder, "a").write(msgspec.json.encode(line(0)))
    os.close(begun)
    folder.rename(kept)
    with pytest.raises(UsageError, match="--resume continues it, --anew discards it"):
        open_run(kept, ABOUT, resume=False, anew=False)


def test_a_run_of_other_images_is_not_continued(tmp_path) -> None:
    begun = open_run(tmp_path, ABOUT, resume=False, anew=False)
    open_part(tmp_path, "a").write(msgspec.json.encode(line(0)))
    os.close(begun)
    with pytest.raises(UsageError, match="started with engine 'timed', not with 'native'"):
        open_run(tmp_path, {**ABOUT, "engine": "native"}, resume=True, anew=False)
    again = open_run(tmp_path, {**ABOUT, "engine": "native"}, resume=False, anew=True)
    assert json.loads((tmp_path / "run.json").read_text())["engine"] == "native"
    assert journal.index(tmp_path, {0: STAMP}) == {}
    os.close(again)


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path) -> None:
    with pytest.raises(OutputError, match="storage that all nodes share"):
        open_part(tmp_path, "a")


def test_tries_are_counted_across_workers(run) -> None:
    assert [journal.begin(run, name) for name in ("task-1", "task-1", "task-2")] == [1, 2, 1]
