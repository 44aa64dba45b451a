"""Submit runs that end early, however they do, and go on: processes of their own against a real daemon."""
from __future__ import annotations

import functools
import json
import os
import resource
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blendmaskd.programs import journal
from blendmaskd.programs.errors import UsageError
from blendmaskd.programs.journal import Journal
from blendmaskd.programs.lines import stamp

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "submit.py"
IMAGES = 60
SLOW = {"timed": {"latency_ms": {1: 25}}}


def photo(path: Path, seed: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.name.encode()) if seed is None else seed
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return path


def start(folder: Path, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def run(folder: Path, *arguments: Any, **options: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(folder, *arguments, **options)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def results(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "results.json").read_text())
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    """The journal's lines after the first, but for a torn last one."""
    text = (out / "journal.jsonl").read_bytes() if (out / "journal.jsonl").exists() else b""
    return [json.loads(line) for line in text.split(b"\n")[1:-1]]


def answers(out: Path) -> Counter[int]:
    """How often each image was answered with a result."""
    return Counter(line["image"] for line in lines(out) if "detections" in line)


def check_whole(out: Path, images: Path) -> None:
    """As a run without an interruption leaves it."""
    assert answers(out) == dict.fromkeys(range(IMAGES), 1)
    found = results(out)
    assert [result["image_id"] for result in found] == list(range(1, IMAGES + 1))
    assert [result["file_name"] for result in found] == sorted(path.name for path in images.iterdir())
    pixels = [np.asarray(Image.open(images / result["file_name"]))[:, :, ::-1] for result in found]
    assert [result["checksum"] for result in found] == [zlib.crc32(np.ascontiguousarray(each)) for each in pixels]
    for result in found:
        with Image.open(out / Path(result["file_name"]).with_suffix(".jpg")) as overlay:
            overlay.load()
    assert sorted(path.suffix for path in out.iterdir()) == [".jpg"] * IMAGES + [".json", ".jsonl"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(IMAGES):
        photo(tmp_path / f"in/{number:02}.png")
    return tmp_path / "in"


# -- the daemon dies --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_of_the_daemon_and_a_restart_go_unnoticed(
    daemon: Any, wait_until: Any, tmp_path: Path, images: Path
) -> None:
    running = daemon(**SLOW)
    submitting = start(tmp_path, running.endpoint, "in", "--out", "o", "--window", 8)
    for seen in (5, 20, 35):
        wait_until(lambda seen=seen: len(answers(tmp_path / "o")) >= seen)
        running.kill()
        wait_until(lambda: not running.processes())
        running.start()
    out, err = submitting.communicate(timeout=60)
    assert submitting.returncode == 0, err + out
    check_whole(tmp_path / "o", images)


@pytest.mark.slow
def test_a_daemon_that_is_gone_for_long_is_resumed_with(
    daemon: Any, wait_until: Any, tmp_path: Path, images: Path
) -> None:
    running = daemon(**SLOW)
    submitting = start(tmp_path, running.endpoint, "in", "--out", "o", "--timeout", 1)
    wait_until(lambda: len(answers(tmp_path / "o")) >= 5)
    running.kill()
    out, _ = submitting.communicate(timeout=60)
    assert submitting.returncode == 1
    assert "--resume continues from here once a daemon answers again" in out
    kept = len(answers(tmp_path / "o"))
    code, _, err = run(tmp_path, running.endpoint, "in", "--out", "o", "--resume", "--wait", 0.2)
    assert (code, len(answers(tmp_path / "o"))) == (3, kept), err
    wait_until(lambda: not running.processes())
    running.start()
    code, out, err = run(tmp_path, running.endpoint, "in", "--out", "o", "--resume", "--wait", 30)
    assert code == 0, err
    assert out.startswith(f"{kept} images were done before\n")
    check_whole(tmp_path / "o", images)


# -- submit ends early ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_a_signal_ended_goes_on_where_it_was(
    daemon: Any, wait_until: Any, tmp_path: Path, images: Path, number: signal.Signals
) -> None:
    running = daemon(**SLOW)
    command = (running.endpoint, "in", "--out", "o")
    for seen in (5, 30):
        submitting = start(tmp_path, *command, "--resume")
        wait_until(lambda seen=seen: len(answers(tmp_path / "o")) >= seen)
        submitting.send_signal(number)
        out, err = submitting.communicate(timeout=30)
        assert submitting.returncode == (130 if number == signal.SIGINT else -number), err + out
        assert "Traceback" not in err
        assert len(answers(tmp_path / "o")) < IMAGES
    kept = len(answers(tmp_path / "o"))
    with (tmp_path / "o/journal.jsonl").open("ab") as file:
        file.write(b'{"image": 59, "stamp": [1, 2], "detec')  # as a machine that loses its power may leave it
    code, _, err = run(tmp_path, *command)
    assert code == 2
    assert err == (
        f"submit: o/ holds an unfinished run, {kept} of {IMAGES} images are answered: --resume continues it, --anew "
        "discards it\n"
    )
    code, out, err = run(tmp_path, *command, "--resume")
    assert code == 0, err
    assert f"{kept} images were done before\n" in out
    assert f"combined: {IMAGES - kept} images" in out
    check_whole(tmp_path / "o", images)


def test_a_full_disk_is_said_and_resumed_from(
    shared_daemon: Any, small_disk: Any, tmp_path: Path, images: Path
) -> None:
    small_disk(tmp_path / "o", "64k")
    code, out, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o")
    assert code == 4, out + err
    assert "Traceback" not in err
    kept = len(answers(tmp_path / "o"))
    assert 1 <= kept < IMAGES
    assert f": No space left on device: stopped. {kept} of 60 images are done and kept in the journal" in err
    code, _, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o", "--resume")
    assert code == 4, "full as before"
    assert len(answers(tmp_path / "o")) >= kept
    subprocess.run(["mount", "-o", "remount,size=10m", tmp_path / "o"], check=True)
    code, _, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o", "--resume")
    assert code == 0, err
    check_whole(tmp_path / "o", images)


def test_a_limit_on_files_is_said_and_resumed_from(shared_daemon: Any, tmp_path: Path, images: Path) -> None:
    """As a full disk, where nobody is root: the journal may not grow, its last line is torn."""
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (8192, 8192))
    code, out, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o", preexec_fn=limit)
    assert code == 4, out + err
    kept = len(answers(tmp_path / "o"))
    assert 1 <= kept < IMAGES
    assert f"cannot write o/journal.jsonl: File too large: stopped. {kept} of 60 images are done and kept" in err
    assert not (tmp_path / "o/journal.jsonl").read_bytes().endswith(b"\n")
    assert len({result["image_id"] for result in results(tmp_path / "o")}) == kept
    code, _, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o", "--resume")
    assert code == 0, err
    check_whole(tmp_path / "o", images)


def test_a_disk_that_is_full_at_once_is_said(shared_daemon: Any, tmp_path: Path, images: Path) -> None:
    (tmp_path / "o").mkdir()
    os.symlink("/dev/full", tmp_path / "o/journal.jsonl")
    code, out, err = run(tmp_path, shared_daemon.endpoint, "in", "--out", "o")
    assert (code, out, err) == (4, "", "submit: o/journal.jsonl: No space left on device\n")


# -- what is done again, and what is not ------------------------------------------------------------------------------


def test_failed_and_changed_images_are_done_again_and_lost_overlays_drawn(shared_daemon: Any, tmp_path: Path) -> None:
    for name in "acd":
        photo(tmp_path / f"in/{name}.png")
    (tmp_path / "in/b.png").write_text("no image")
    command = (shared_daemon.endpoint, "in", "--out", "o", "--resume")
    assert run(tmp_path, *command)[0] == 1
    first = results(tmp_path / "o")
    photo(tmp_path / "in/b.png")
    photo(tmp_path / "in/c.png", seed=99)
    (tmp_path / "o/a.jpg").unlink()
    code, out, err = run(tmp_path, *command)
    assert code == 0, err
    assert "2 images were done before\n" in out
    assert answers(tmp_path / "o") == {0: 1, 1: 1, 2: 2, 3: 1}
    found = results(tmp_path / "o")
    assert [result["file_name"] for result in found] == ["a.png", "b.png", "c.png", "d.png"]
    assert found[0] == first[0]
    assert found[2]["checksum"] != first[1]["checksum"]
    assert sorted(path.stem for path in (tmp_path / "o").glob("*.jpg")) == ["a", "b", "c", "d"]


def test_what_is_done_needs_no_daemon(shared_daemon: Any, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    assert run(tmp_path, shared_daemon.endpoint, "a.png", "--out", "o", "--no-overlays")[0] == 0
    (tmp_path / "o/results.json").unlink()
    code, out, err = run(tmp_path, "ipc:///nobody", "a.png", "--out", "o", "--resume")
    assert code == 0, err
    assert out.startswith("1 images were done before\n")
    assert len(results(tmp_path / "o")) == 1
    assert (tmp_path / "o/a.jpg").exists()


def test_a_run_that_is_over_is_begun_anew(shared_daemon: Any, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no image")
    for _ in range(2):
        code, out, _ = run(tmp_path, shared_daemon.endpoint, "a.png", "b.png", "--out", "o")
        assert code == 1
        assert "combined: 1 images" in out
        assert len(lines(tmp_path / "o")) == 3


def test_a_run_that_never_began_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    for _ in range(2):
        assert run(tmp_path, f"ipc://{tmp_path}/nobody", "a.png", "--out", "o", "--wait", 0.2)[0] == 3
        assert list((tmp_path / "o").iterdir()) == []


# -- the journal by itself --------------------------------------------------------------------------------------------

NAMES = [("a.png", 1), ("b.png", 2), ("c.png", 3)]
OPTIONS = {"score_threshold": 0.3, "max_detections": None, "mask_format": "rle"}


def unfinished(path: Path) -> Path:
    with Journal(path, NAMES, OPTIONS).open(resume=False, anew=False) as begun:
        begun.answered(1, (10, 20), "npu:0", [{"score": 0.1 + 0.2}])
        begun.drew(1)
        begun.failed(2, (10, 20), "timeout", "late")
    return path


def test_a_journal_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "j")
    with Journal(path, NAMES, OPTIONS).open(resume=True, anew=False) as found:
        assert found.contents.answers == {1: journal.Answer((10, 20), "npu:0", [{"score": 0.1 + 0.2}])}
        assert found.contents.failed == {2: journal.Failed((10, 20), "timeout", "late")}
        assert found.contents.drawn == {1}
        assert not found.contents.over


def test_what_the_daemon_gave_up_is_not_left_until_its_file_is_changed(tmp_path: Path) -> None:
    paths = [photo(tmp_path / name) for name in ("0.png", "1.png", "2.png")]
    images = [(path.name, number) for number, path in enumerate(paths, 1)]
    with Journal(tmp_path / "j", images, OPTIONS).open(resume=False, anew=False) as begun:
        begun.failed(0, stamp(paths[0]), "worker-lost", "killed")
        begun.failed(1, stamp(paths[1]), "worker-lost", "killed")
        begun.failed(2, stamp(paths[2]), "engine-failed", "raised")
    photo(paths[1], seed=7).write_bytes(paths[1].read_bytes() + b"more")
    with Journal(tmp_path / "j", images, OPTIONS).open(resume=True, anew=False) as found:
        assert journal.settled(found.contents, paths, retry_lost=False) == {0}
    lines = [line for line in (tmp_path / "j").read_text().splitlines() if '"stamp"' in line]
    earlier = (tmp_path / "j").read_text().replace(lines[0], lines[0].replace('"stamp"', '"earlier"'))
    (tmp_path / "j").write_text(earlier)  # a journal of before there were stamps of failures
    with Journal(tmp_path / "j", images, OPTIONS).open(resume=True, anew=False) as found:
        assert journal.settled(found.contents, paths, retry_lost=False) == set()


def test_a_journal_cut_anywhere_loses_what_was_cut_and_no_more(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "j")
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path, NAMES, OPTIONS).open(resume=True, anew=False) as found:
            assert len(found.contents.answers) == (whole[:end].count(b"\n") >= 2)
            found.answered(0, None, "npu:1", [])
        assert sorted(answers_of(path)) == sorted([*found.contents.answers])


def answers_of(path: Path) -> set[int]:
    with Journal(path, NAMES, OPTIONS).open(resume=True, anew=False) as found:
        return set(found.contents.answers)


def test_a_damaged_line_costs_its_own_image_only(tmp_path: Path) -> None:
    path = unfinished(tmp_path / "j")
    with path.open("ab") as file:
        file.write(b'\0\0\0\n{"image": 7, "code": "x"}\n[]\n{"image": "x"}\n{"image": 0}\n')
    assert answers_of(path) == {1}


@pytest.mark.parametrize(
    ("images", "options", "complaint"),
    [
        (NAMES[:2], OPTIONS, "belongs to other images: 3, not 2; --anew begins anew"),
        ([*NAMES[:2], ("d.png", 3)], OPTIONS, r"other images: c.png \(id 3\), not d.png \(id 3\)"),
        ([*NAMES[:2], ("c.png", 9)], OPTIONS, r"other images: c.png \(id 3\), not c.png \(id 9\)"),
        (NAMES, OPTIONS | {"mask_format": "none"}, "was started with .* mask-format rle, not with .* mask-format none"),
    ],
)
def test_another_run_s_journal_is_refused(tmp_path: Path, images: Any, options: Any, complaint: str) -> None:
    path = unfinished(tmp_path / "j")
    before = path.read_bytes()
    with pytest.raises(UsageError, match=complaint):
        Journal(path, images, options).open(resume=True, anew=False)
    assert path.read_bytes() == before
    with Journal(path, images, options).open(resume=False, anew=True) as begun:
        assert not begun.contents.answers


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("hello\n", "is not a journal"), ("[1]\n", "is not a journal"), ('{"journal": 1}\n', "is not a journal"),
     ('{"journal": 2, "options": {}, "images": []}\n', "is of a newer version")],
)  # fmt: skip
def test_what_is_no_journal_is_left_alone(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "j"
    path.write_text(text)
    for resume in (True, False):
        with pytest.raises(UsageError, match=complaint):
            Journal(path, NAMES, OPTIONS).open(resume=resume, anew=False)
    assert path.read_text() == text


def test_two_runs_do_not_share_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path, NAMES, OPTIONS).open(resume=False, anew=False) as first:
        first.answered(0, None, "npu:0", [])
        for options in ({"resume": True, "anew": False}, {"resume": False, "anew": True}):
            with pytest.raises(UsageError, match="another run is writing to"):
                Journal(path, NAMES, OPTIONS).open(**options)
    assert answers_of(path) == {0}
