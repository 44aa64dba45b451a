"""The submit program as people run it: a process of its own, started from another folder."""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from blendmaskd import files, protocol
from blendmaskd.client.blocking import Client
from blendmaskd.programs import submit
from blendmaskd.programs.connecting import _refuse_hopeless, wait_for_daemon
from blendmaskd.programs.errors import NoDaemonError, UsageError
from blendmaskd.programs.input_images import find
from blendmaskd.programs.sources import overlay_names, plan
from fuzz import tiffs
from fuzz.tiffs import Layout

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "submit.py"

# pycocotools 2.0.11 hands numpy an array by a protocol that numpy 2.4 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def photo(path: Path, width: int = 40, height: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def start(folder: Path, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder: Path, *arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def results(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


# -- a run ------------------------------------------------------------------------------------------------------------


def test_folders_globs_and_files_give_overlays_results_and_fps(shared_daemon: Any, tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.jpg", "b/1.png", "b/3.bmp", "c/deep/4.webp"):
        photo(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("no image")
    code, out, err = run(
        tmp_path, shared_daemon.endpoint, "a", "b/*.png", tmp_path / "b/3.bmp", "c/**/*.webp", "a/1.png", "--out", "o"
    )
    assert code == 0, err
    found = results(tmp_path / "o")
    assert [(result["image_id"], result["file_name"]) for result in found] == [
        (1, "a/1.png"), (2, "a/2.jpg"), (3, "b/1.png"), (4, "b/3.bmp"), (5, "c/deep/4.webp")
    ]  # fmt: skip
    drawn = sorted(str(path.relative_to(tmp_path / "o")) for path in (tmp_path / "o").rglob("*.*"))
    assert drawn == ["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/3.jpg", "c/deep/4.jpg", "journal.jsonl", "results.json"]
    with Image.open(tmp_path / "o/a/1.jpg") as overlay:
        assert (overlay.format, overlay.size) == ("JPEG", (40, 30))
    assert "5/5" in err
    devices = re.findall(r"^(cpu:[01]): (\d) images, (\d+\.\d\d) FPS$", out, re.MULTILINE)
    combined = re.search(r"^combined: 5 images in \d\.\d s, (\d+\.\d\d) FPS$", out, re.MULTILINE)
    assert len(devices) + 1 == len(out.splitlines())
    assert sum(int(images) for _, images, _ in devices) == 5
    assert combined
    assert float(combined[1]) == pytest.approx(sum(float(fps) for _, _, fps in devices), abs=0.02)


def test_a_result_is_a_coco_result_with_all_its_digits(shared_daemon: Any, tmp_path: Path) -> None:
    photo(tmp_path / "a.png", 31, 17)
    assert run(tmp_path, shared_daemon.endpoint, "a.png", "--out", "o")[0] == 0
    (found,) = results(tmp_path / "o")
    assert found.pop("checksum") > 0
    rle = found.pop("segmentation")
    assert coco_mask.decode(rle).shape == (17, 31)
    assert coco_mask.decode(rle).all()
    assert found == {
        "image_id": 1, "file_name": "a.png", "bbox": [0.0, 0.0, 31.0, 17.0], "score": 1.0, "class_index": 0,
        "category_id": 1, "category_name": "image",
    }  # fmt: skip
    files.write_json(tmp_path / "x.json", [{"score": 0.30000001192092896}])
    assert (tmp_path / "x.json").read_text() == '[{"score": 0.30000001192092896}]'


def test_options_reach_the_daemon(shared_daemon: Any, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    options = ["--no-overlays", "--window", 1, "--timeout", 20, "--score-threshold", 0]
    assert run(tmp_path, shared_daemon.endpoint, "a.png", "--out", "o", "--mask-format", "polygon", *options)[0] == 0
    assert isinstance(results(tmp_path / "o")[0]["segmentation"], list)
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["journal.jsonl", "results.json"]
    assert run(tmp_path, shared_daemon.endpoint, "a.png", "--out", "p", "--max-detections", 0, *options)[0] == 0
    assert results(tmp_path / "p") == []


def test_failures_are_listed_and_the_rest_is_kept(shared_daemon: Any, tmp_path: Path) -> None:
    for name in ("in/a.png", "in/d.png"):
        photo(tmp_path / name)
    (tmp_path / "in/b.jpg").write_bytes(b"")
    (tmp_path / "in/c.jpg").write_text("[no] image")
    code, out, _ = run(tmp_path, shared_daemon.endpoint, "in", "missing.jpg", "--out", "o")
    assert code == 1
    assert "3 failed" in out
    assert "  in/b.jpg: bad-image: the image is empty (0 bytes)\n" in out
    assert "  in/c.jpg: bad-image: not a JPEG, PNG, WebP, BMP or TIFF image" in out
    assert "  missing.jpg: bad-image: cannot be read: No such file or directory\n" in out
    assert "combined: 2 images" in out
    kept = [(result["image_id"], result["file_name"]) for result in results(tmp_path / "o")]
    assert kept == [(1, "a.png"), (4, "d.png")]
    left = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert left == ["a.jpg", "d.jpg", "journal.jsonl", "results.json"]


def test_an_overlay_that_cannot_be_written_is_a_failure_and_the_result_is_kept(
    shared_daemon: Any, tmp_path: Path
) -> None:
    photo(tmp_path / "a.png")
    (tmp_path / "o/a.jpg").mkdir(parents=True)
    code, out, _ = run(tmp_path, shared_daemon.endpoint, "a.png", "--out", "o")
    assert code == 1
    assert "  a.png: overlay: IsADirectoryError" in out
    assert len(results(tmp_path / "o")) == 1


def test_overlays_are_upright_as_the_daemon_saw_the_image(shared_daemon: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg", exif=exif)
    assert run(tmp_path, shared_daemon.endpoint, "a.jpg", "--out", "o")[0] == 0
    assert results(tmp_path / "o")[0]["bbox"] == [0.0, 0.0, 30.0, 40.0]
    with Image.open(tmp_path / "o/a.jpg") as overlay:
        assert overlay.size == (30, 40)


def test_ids_are_those_of_the_annotations(shared_daemon: Any, tmp_path: Path) -> None:
    for name in ("val/a.png", "val/b.png", "train/a.png"):
        photo(tmp_path / name)
    entries = [{"id": 900, "file_name": "b.png"}, {"id": 7, "file_name": "val/a.png"}, {"id": 8, "file_name": "a.png"}]
    (tmp_path / "annotations.json").write_text(json.dumps({"images": entries, "annotations": []}))
    arguments = ["val", "train", "--out", "o", "--no-overlays", "--annotations"]
    assert run(tmp_path, shared_daemon.endpoint, *arguments, "annotations.json")[0] == 0
    assert [result["image_id"] for result in results(tmp_path / "o")] == [7, 900, 8]
    (tmp_path / "other.json").write_text(json.dumps({"images": entries[:1]}))
    code, _, err = run(tmp_path, shared_daemon.endpoint, *arguments, "other.json")
    assert code == 2
    assert err.splitlines() == [
        "submit: other.json: 2 faults:", "  val/a.png: not among its images", "  train/a.png: not among its images"
    ]  # fmt: skip


@pytest.mark.parametrize("ids", [["000000000001", "2"], ["1", 2], [1.0, 2.0], [0, 10**30], ["ä", "\ud800"]])
def test_ids_of_any_type_are_read_by_pycocotools_against_the_same_file(
    shared_daemon: Any, tmp_path: Path, ids: list[Any]
) -> None:
    names = [str(photo(tmp_path / name)) for name in ("a.png", "b.png")]
    images = [{"id": each, "file_name": Path(name).name, "width": 40, "height": 30} for each, name in zip(ids, names)]
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({"images": images, "annotations": [], "categories": [{"id": 1, "name": "image"}]}))
    for again in ([], ["--resume"]):
        code, _, err = run(tmp_path, shared_daemon.endpoint, *names, "--out", "o", "--annotations", truth, *again)
        assert code == 0, err
        found = COCO(str(truth)).loadRes(str(tmp_path / "o/results.json"))
        assert [each["image_id"] for each in found.dataset["annotations"]] == ids


def test_images_that_the_annotations_do_not_tell_apart_are_refused(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/1.png", "b/2.png"):
        photo(tmp_path / name)
    truth = tmp_path / "truth.json"

    def told(*entries: tuple[int, str]) -> list[str]:
        truth.write_text(json.dumps({"images": [{"id": number, "file_name": name} for number, name in entries]}))
        code, _, err = run(tmp_path, "ipc:///nowhere", "a", "b", "--out", "o", "--annotations", "truth.json")
        assert code == 2
        return err.splitlines()

    both = "b/1.png and a/1.png are both its image 7, '1.png'"
    assert told((7, "1.png"), (8, "2.png"))[0].startswith(f"submit: truth.json: {both}")
    assert told((7, "1.png"), (8, "b/2.png"), (9, "./b/2.png"))[1:] == [
        f"  {both}: submit one of them, or include the folders in file_name",
        "  b/2.png: 'b/2.png' occurs with the ids 8, 9",
    ]
    assert "id is used twice" in told((7, "a/1.png"), (7, "b/1.png"), (8, "2.png"))[0]
    assert "no daemon" not in told((7, "a/1.png"), (8, "c/2.png"))[0]


@pytest.mark.parametrize("entry", [
    {"id": None}, {"id": True}, {"id": 1.5}, {"id": []}, {"id": float("nan")}, {"file_name": None}, {"file_name": ""},
    {"file_name": 1}, {"file_name": "\0"}, {"file_name": "\ud800"},
])  # fmt: skip
def test_images_without_an_id_or_a_name_are_refused_by_place(tmp_path: Path, entry: dict[str, Any]) -> None:
    photo(tmp_path / "a.png")
    entries = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"} | entry]
    (tmp_path / "truth.json").write_text(json.dumps({"images": entries}))
    code, _, err = run(tmp_path, "ipc:///nowhere", "a.png", "--out", "o", "--annotations", "truth.json")
    assert code == 2
    assert err.startswith("submit: truth.json: not COCO annotations: image")
    assert "images[1]" in err
    assert "Traceback" not in err


# -- daemons that are not there, not yet, or no more ------------------------------------------------------------------


def test_no_daemon_is_said_soon(tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    code, out, err = run(tmp_path, f"ipc://{tmp_path}/nobody", "a.png", "--out", "o", "--wait", 0.2)
    assert code == 3
    assert f"no daemon answers at ipc://{tmp_path}/nobody within 0.2 s" in err
    assert "Traceback" not in err + out


def test_a_daemon_that_starts_is_waited_for(daemon: Any, wait_until: Any, tmp_path: Path) -> None:
    photo(tmp_path / "a.png")
    endpoint = f"ipc://{tmp_path}/s"
    submitting = start(tmp_path, endpoint, "a.png", "--out", "o", "--wait", 30)
    daemon(endpoints={"clients": [endpoint], "metrics": None})
    out, err = submitting.communicate(timeout=30)
    assert submitting.returncode == 0, err
    assert "combined: 1 images" in out


@pytest.mark.parametrize(("wait_s", "asked"), [(20.0, 4), (0.0, 1)])
def test_a_device_that_starts_is_waited_for_as_long_as_wished(tmp_path: Path, wait_s: float, asked: int) -> None:
    """A bare socket plays the daemon: its device serves from the fourth snapshot on."""
    endpoint = f"ipc://{tmp_path}/d"
    requests = 0

    def serve(router: zmq.Socket[Any]) -> None:
        nonlocal requests
        for requests in range(1, asked + 1):
            client = router.recv_multipart()[0]
            stats = {"serving": int(requests > 3), "devices": [{"device": "npu:0", "state": "starting"}]}
            router.send_multipart([client, *protocol.encode(protocol.Stats(stats=stats))])

    with zmq.Context.instance().socket(zmq.ROUTER) as router, Client(endpoint, timeout_s=5) as client:
        router.set(zmq.RCVTIMEO, 10_000)
        router.bind(endpoint)
        thread = threading.Thread(target=serve, args=(router,))
        thread.start()
        wait_for_daemon(client, wait_s)
        thread.join()
    assert requests == asked


def test_a_daemon_without_hope_is_not_waited_for() -> None:
    devices = [{"device": "npu:0", "state": "failed", "reason": "cannot boot: exited with code 78"}]
    with pytest.raises(NoDaemonError, match="no device able to serve: npu:0 failed: cannot boot: exited with code 78"):
        _refuse_hopeless("ipc:///x", {"devices": devices})
    _refuse_hopeless("ipc:///x", {"devices": [*devices, {"device": "npu:1", "state": "backoff", "reason": ""}]})
    _refuse_hopeless("ipc:///x", {})  # in its first second


def test_when_the_daemon_dies_what_was_answered_is_kept(daemon: Any, wait_until: Any, tmp_path: Path) -> None:
    for number in range(40):
        photo(tmp_path / f"in/{number:02}.png")
    running = daemon(timed={"latency_ms": {1: 100}})
    submitting = start(tmp_path, running.endpoint, "in", "--out", "o", "--timeout", 1, "--window", 4)
    wait_until(lambda: running.client.stats()["answered"] >= 4)
    running.kill()
    out, _ = submitting.communicate(timeout=30)
    assert submitting.returncode == 1
    kept = results(tmp_path / "o")
    assert 1 <= len(kept) < 40
    assert f"{40 - len(kept)} failed" in out
    assert f"  in/39.png: no-answer: no answer from {running.endpoint} within 1 s" in out


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_cancels_and_writes_what_there_is(
    daemon: Any, wait_until: Any, tmp_path: Path, stop: signal.Signals
) -> None:
    for number in range(60):
        photo(tmp_path / f"in/{number:02}.png")
    running = daemon(devices=["cpu:0"], timed={"latency_ms": {1: 100}})
    submitting = start(tmp_path, running.endpoint, "in", "--out", "o")
    wait_until(lambda: running.client.stats()["answered"] >= 3)
    submitting.send_signal(stop)
    out, err = submitting.communicate(timeout=30)
    assert submitting.returncode == 130
    assert "interrupted" in out
    assert "Traceback" not in err
    kept = results(tmp_path / "o")
    assert [result["image_id"] for result in kept] == list(range(1, len(kept) + 1))
    assert 1 <= len(kept) < 60
    assert f"combined: {len(kept)} images" in out
    assert len(list((tmp_path / "o").glob("*.jpg"))) == len(kept)
    idle = wait_until(lambda: (s := running.client.stats())["leased"] + s["queue"]["jobs"] == 0 and s)
    assert idle["failures"].keys() == {"cancelled"}
    assert idle["answered"] < 60


@pytest.mark.parametrize("part", ["take", "draw"])
def test_ctrl_c_cannot_part_an_answer_s_result_from_its_overlay(
    shared_daemon: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """It comes just before or just after the third answer is taken."""
    for number in range(8):
        photo(tmp_path / f"in/{number}.png")
    take, taken = submit.Run.take, []

    def take_interrupted(run: submit.Run, source: Any, *answer: Any) -> None:
        taken.append(source)
        if part == "take" and len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        take(run, source, *answer)
        if part == "draw" and len(taken) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(submit.Run, "take", take_interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert submit.main([shared_daemon.endpoint, str(tmp_path / "in"), "--out", str(tmp_path / "o")]) == 130
    assert [result["image_id"] for result in results(tmp_path / "o")] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "o").glob("*.jpg")) == ["0.jpg", "1.jpg", "2.jpg"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nonsense", "a.png", "--out", "o"], "nonsense: Invalid argument"),
        (["ipc:///x", "empty", "--out", "o"], "empty: no images in this folder"),
        (["ipc:///x", "*.tif", "--out", "o"], "*.tif: matches no images"),
        (["ipc:///x", "a.jpg", "--out", "."], "the overlay a.jpg would overwrite that image"),
        (["ipc:///x", "a.png", "--out", "a.png"], "--out a.png: File exists"),
        (["ipc:///x", "a.png", "--out", "o", "--resume", "--anew"], "not allowed with argument"),
        (["ipc:///x", "a.png", "--out", "o", "--annotations", "a.png"], "a.png: not COCO annotations"),
        (["ipc:///x", "a.png", "--out", "o", "--score-threshold", "2"], "2: expected a number from 0 to 1"),
        (["ipc:///x", "a.png", "--out", "o", "--window", "0"], "0: expected a whole number from 1"),
        (["ipc:///x", "a.png", "--out", "o", "--window", "two"], "two: expected a whole number from 1"),
        (["ipc:///x", "a.png", "--out", "o", "--max-detections", "9" * 20], "9: expected a whole number from 0 to"),
        (["ipc:///x", "a.png", "--out", "o", "--timeout", "nan"], "nan: expected seconds"),
        (["ipc:///x", "a.png"], "--out"),
        (["ipc:///x", "--out", "o"], "IMAGE"),
    ],
)
def test_wrong_arguments_are_refused_with_a_reason(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    photo(tmp_path / "a.png")
    photo(tmp_path / "a.jpg")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    try:
        code = submit.main(arguments)
    except SystemExit as exit:
        code = exit.code  # type: ignore[assignment]
    assert code == 2
    assert reason in capfd.readouterr().err


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "overlays"),
    [
        (["a/1.png", "b/2.jpeg"], ["1.jpg", "2.jpg"]),
        (["a/1.png", "b/1.png"], ["a/1.jpg", "b/1.jpg"]),
        (["a/1.png", "a/1.tif", "a/2.png"], ["a/1.png.jpg", "a/1.tif.jpg", "a/2.png.jpg"]),
        (["a.png", "a.tif", "a.png.bmp"], ["a.png.jpg", "a.tif.jpg", "a.png.bmp.jpg"]),
        (["no_suffix", "x.y.z.png"], ["no_suffix.jpg", "x.y.z.jpg"]),
    ],
)
def test_no_two_overlays_have_the_same_name(paths: list[str], overlays: list[str]) -> None:
    assert list(map(str, overlay_names(list(map(Path, paths))))) == overlays


def test_the_same_file_is_submitted_once_and_a_link_to_it_is_another(tmp_path: Path) -> None:
    image = photo(tmp_path / "a.png")
    os.symlink(image, tmp_path / "b.png")
    found = find([str(image), f"{tmp_path}/../{tmp_path.name}/a.png", str(tmp_path)])
    assert [path.name for path in found] == ["a.png", "b.png"]


def test_names_that_look_like_patterns_are_taken_as_they_are(tmp_path: Path) -> None:
    image = photo(tmp_path / "a[1].png")
    assert find([str(image)]) == [image]
    assert find([str(tmp_path / "*1*")]) == [image]


def test_file_names_are_short_where_they_can_be(tmp_path: Path) -> None:
    paths = [tmp_path / "x/a/1.png", tmp_path / "x/b/2.png"]
    assert [source.file_name for source in plan(paths, tmp_path / "o", None)] == ["1.png", "2.png"]
    paths.append(tmp_path / "x/b/1.png")
    sources = plan(paths, tmp_path / "o", None)
    assert [source.file_name for source in sources] == ["a/1.png", "b/2.png", "b/1.png"]
    assert [source.image_id for source in sources] == [1, 2, 3]
    assert sources[2].overlay == tmp_path / "o/b/1.jpg"
    with pytest.raises(UsageError):
        plan([tmp_path / "o/1.jpg"], tmp_path / "o", None)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    files.write_json(path, [1])
    with pytest.raises(TypeError):
        files.write_json(path, [object()])
    assert path.read_text() == "[1]"
    files.write_json(path, [2])
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "[2]"


# -- names and folders of every kind ----------------------------------------------------------------------------------


def found_in(folder: Path, *inputs: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in find([str(folder / each) for each in inputs])]


def test_a_link_that_leads_in_circles_shows_each_image_once(tmp_path: Path) -> None:
    photo(tmp_path / "loop/z.jpg")
    photo(tmp_path / "loop/deep/y.jpg")
    for name in ("again", "once_more", "deep/up"):  # with glob's own ** two of them are more paths than can be listed
        (tmp_path / "loop" / name).symlink_to(tmp_path / "loop")
    assert found_in(tmp_path, "loop/**/*.jpg") == ["loop/deep/y.jpg", "loop/z.jpg"]
    assert found_in(tmp_path, "loop/**/**/*.jpg") == ["loop/deep/y.jpg", "loop/z.jpg"]
    assert found_in(tmp_path, "loop/**") == ["loop/deep/y.jpg", "loop/z.jpg"]
    assert found_in(tmp_path, "**/deep/*.jpg") == ["loop/deep/y.jpg"]
    assert found_in(tmp_path, "loop", "loop/again", "loop/once_more/again/z.jpg") == ["loop/z.jpg"]
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert found_in(tmp_path, "**/z.jpg") == ["loop/z.jpg"]


def test_globs_go_into_linked_folders_but_not_hidden_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "store/a.jpg")
    photo(tmp_path / "photos/[1]/b.jpg")
    photo(tmp_path / "photos/.hidden/c.jpg")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "store")
    assert found_in(tmp_path, "photos/**/*.jpg") == ["photos/[1]/b.jpg", "photos/linked/a.jpg"]
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find(["**/*.jpg"]))) == ["photos/[1]/b.jpg", "store/a.jpg"]


def test_what_only_looks_like_an_image_is_left_out_or_fails_by_its_name(tmp_path: Path) -> None:
    photo(tmp_path / "in/a.jpg")
    (tmp_path / "in/folder.jpg").mkdir()
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/gone.jpg").symlink_to("nowhere")
    (tmp_path / "in/circle.jpg").symlink_to("circle.jpg")
    assert found_in(tmp_path, "in") == ["in/a.jpg", "in/circle.jpg", "in/gone.jpg"]
    assert found_in(tmp_path, "in/*") == ["in/a.jpg", "in/circle.jpg", "in/gone.jpg"]
    for special in (tmp_path / "in/pipe.jpg", "/dev/zero"):
        with pytest.raises(UsageError, match="not a regular file"):
            find([str(special)])


LONG = "n" * 250


@pytest.mark.parametrize(
    ("names", "longest"),
    [
        ([LONG + ".png", LONG + ".tif"], 255),
        ([LONG + "x.png", LONG + "y.png"], 255),
        (["é" * 125 + ".tiff", "é" * 125 + ".webp"], 255),
        (["n" * 255], 255),
        ([LONG + ".jpg", "a.jpg"], 143),
        (["a.jpg/1.png", "b/1.png", "a.png"], 255),
        (["a.png.jpg/x.png", "a.png.jpg/x.tif", "a.png"], 255),
    ],
)
def test_every_overlay_has_a_name_that_the_disk_takes(names: list[str], longest: int, tmp_path: Path) -> None:
    overlays = overlay_names(list(map(Path, names)), longest)
    for overlay in overlays:
        assert len(os.fsencode(overlay.name)) <= longest
        (tmp_path / overlay).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / overlay).touch(exist_ok=False)
    assert overlay_names(list(map(Path, names)), longest) == overlays


ODD_NAMES = [
    LONG.encode() + b".jpg",
    LONG.encode() + b".png",
    b"caf\xe9.jpg",
    b"caf\xff\xfe.jpg",
    "фото-é.jpg".encode(),
    b"two\nlines.jpg",
    b"\x1b[31mred.jpg",
    b"end .jpg ",
    b" [bold]start.jpg",
    "\u202egpj.exe.jpg".encode(),
]


@pytest.mark.parametrize(
    ("locale", "encoding"),
    [({"LC_ALL": "C.UTF-8"}, "utf-8"), ({"LC_ALL": "C"}, "utf-8"), ({"PYTHONIOENCODING": "ascii:strict"}, "ascii"),
     ({"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "ascii")],
)  # fmt: skip
def test_whatever_files_are_called_failures_and_summary_are_told(
    shared_daemon: Any, tmp_path: Path, locale: dict[str, str], encoding: str
) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    good = photo(tmp_path / "good.png").read_bytes()
    for name in ODD_NAMES:
        Path(os.fsdecode(os.path.join(folder, name))).write_bytes(good)
        Path(os.fsdecode(os.path.join(folder, b"bad" + name[-200:]))).write_bytes(b"no image")
    named = [os.fsdecode(os.path.join(b"in", name)) for name in sorted(os.listdir(folder))]
    process = subprocess.run(
        [sys.executable, str(SCRIPT), shared_daemon.endpoint, *named, "--out", "o"],
        cwd=tmp_path, env={**os.environ, **locale}, capture_output=True, timeout=60,
    )  # fmt: skip
    out, err = process.stdout.decode(encoding), process.stderr.decode()
    assert (process.returncode, "Traceback" in err) == (1, False), err
    lines = out.splitlines()
    assert lines[0] == "10 failed:"
    assert all(re.match(r"  in/bad.*: bad-image: not a JPEG", line) for line in lines[1:11])
    assert r"  in/badcaf\xe9.jpg: bad-image" in out
    assert r"  in/badtwo\nlines.jpg: bad-image" in out
    assert r"  in/bad\x1b[31mred.jpg: bad-image" in out
    assert lines[-1].startswith("combined: 10 images")
    found = results(tmp_path / "o")
    assert len({result["file_name"] for result in found}) == 10
    (tmp_path / "o/results.json").read_bytes().decode()
    for result in found:
        result["file_name"].encode()  # no lone surrogates, which others refuse
    drawn = [name for name in os.listdir(os.fsencode(tmp_path / "o")) if name.endswith(b".jpg")]
    assert len(drawn) == 10


def test_overlays_show_the_pixels_that_were_segmented(shared_daemon: Any, tmp_path: Path) -> None:
    """Deep grey, and planes of 16 bits: Pillow's own reading would be white, and garbled."""
    level = np.full((60, 80), 0x4020, np.uint16)
    Image.fromarray(level).save(tmp_path / "grey16.png")
    colours = np.broadcast_to([0x4020, 0x8040, 0xC060], (60, 80, 3))
    layout = Layout(bits=16, photometric=2, planar=2)
    (tmp_path / "planar.tif").write_bytes(tiffs.write(colours, layout))
    arguments = ["grey16.png", "planar.tif", "--out", "o", "--mask-format", "none", "--max-detections", 0]
    assert run(tmp_path, shared_daemon.endpoint, *arguments)[0] == 0
    for name, expected in {"grey16": (0x40,) * 3, "planar": (0x40, 0x80, 0xC0)}.items():
        with Image.open(tmp_path / f"o/{name}.jpg") as overlay:
            assert np.abs(np.asarray(overlay).astype(int) - expected).max() <= 3


def test_a_picture_that_the_daemon_refuses_by_its_format_is_told(shared_daemon: Any, tmp_path: Path) -> None:
    samples = np.zeros((4, 4, 3))
    (tmp_path / "a.tif").write_bytes(tiffs.write(samples, Layout(bits=32, kind=3, photometric=2)))
    code, out, _ = run(tmp_path, shared_daemon.endpoint, "a.tif", "--out", "o")
    assert code == 1
    assert "  a.tif: bad-image: this TIFF's pixel format is not read: 3 x 32-bit float, RGB, not compressed; " in out
