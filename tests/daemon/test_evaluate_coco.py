"""Evaluation: COCOeval's arithmetic on results that are known, and the whole program against a running daemon.

The daemon's `timed` engine finds one thing in every image, the image itself: category 1, "image". So annotations can
be made that it meets wholly, in part, or not at all.
"""
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from PIL import Image
from pycocotools import mask as rle

from blendmaskd import protocol
from blendmaskd.coco import instances as coco_instances
from blendmaskd.coco.average_precision import Reference, score
from blendmaskd.programs import evaluate_coco
from blendmaskd.programs.evaluate_coco import flaw
from blendmaskd.protocol import FROM_CLIENT, GetStats, Stats
from checkout import ROOT

WIDTH, HEIGHT = 200, 100


def rectangle(left: int, top: int, width: int, height: int) -> dict[str, Any]:
    """A mask of that rectangle, and its box."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    encoded = rle.encode(mask)
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return {"bbox": [float(value) for value in (left, top, width, height)], "segmentation": segmentation}


def annotated(*things: tuple[int, int, dict[str, Any]], images: int = 3) -> dict[str, Any]:
    """COCO instances of (image id, category id, what `rectangle` gives)."""
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT}
            for number in range(1, images + 1)
        ],
        "categories": [{"id": 1, "name": "image"}, {"id": 2, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [
            {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 0, **thing,
             "area": float(rle.area(thing["segmentation"]))}
            for number, (image_id, category_id, thing) in enumerate(things, 1)
        ],
    }  # fmt: skip


def loaded(tree: dict[str, Any]) -> Reference:
    """The annotations, read from a file."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(tree, file)
        file.flush()
        return Reference(coco_instances.read(Path(file.name), for_training=False))


def found(image_id: int, category_id: int, thing: dict[str, Any], confidence: float = 0.9) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "score": confidence, **thing}


CAT, DOG, FAR = rectangle(10, 10, 40, 40), rectangle(100, 20, 50, 60), rectangle(160, 80, 30, 15)
PETS = annotated((1, 2, CAT), (1, 7, DOG), (2, 2, DOG), (3, 7, FAR))
AS_TOLD = [found(each["image_id"], each["category_id"], each) for each in PETS["annotations"]]


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_as_results_is_perfect(kind: Any) -> None:
    scores = score(loaded(PETS), AS_TOLD, [1, 2, 3], kind)
    assert scores.metrics["AP"] == pytest.approx(100)
    assert scores.metrics["AR100"] == pytest.approx(100)
    assert scores.metrics["APl"] is None  # there is nothing large
    assert scores.classes["cat"] == {"AP": pytest.approx(100), "AP50": pytest.approx(100)}
    assert scores.classes["image"] == {"AP": None, "AP50": None}
    assert len(scores.lines.splitlines()) == 12
    assert "area=   all | maxDets=100 ] = 1.000" in scores.lines


def test_results_that_overlap_by_three_quarters_count_at_the_lower_thresholds() -> None:
    truth = loaded(annotated((1, 2, rectangle(0, 0, 100, 100))))
    scores = score(truth, [found(1, 2, rectangle(0, 0, 78, 100))], [1], "bbox")
    assert scores.metrics["AP"] == pytest.approx(60)  # 0.50 to 0.75: six thresholds of ten
    assert scores.metrics["AP50"] == pytest.approx(100)
    assert scores.metrics["AP75"] == pytest.approx(100)
    assert scores.classes["cat"] == {"AP": pytest.approx(60), "AP50": pytest.approx(100)}


def test_boxes_and_masks_are_measured_apart() -> None:
    result = found(1, 2, {"bbox": CAT["bbox"], "segmentation": rectangle(10, 10, 40, 23)["segmentation"]})  # 0.575
    truth = loaded(annotated((1, 2, CAT)))
    assert score(truth, [result], [1], "bbox").metrics["AP"] == pytest.approx(100)
    assert score(truth, [result], [1], "segm").metrics["AP"] == pytest.approx(20)


def test_a_mask_is_small_by_its_own_area_not_by_its_box() -> None:
    """A better scored false alarm, thin and long: small as a mask, so it halves the precision among the small."""
    line = np.asfortranarray(np.eye(HEIGHT, WIDTH), dtype=np.uint8)  # 100 pixels in a box of 100 by 100
    encoded = rle.encode(line)
    alarm = found(1, 2, {"bbox": [0.0, 0.0, 100.0, 100.0], "segmentation": encoded}, 0.99)
    small = rectangle(150, 10, 20, 20)
    scores = score(loaded(annotated((1, 2, small))), [alarm, found(1, 2, small)], [1], "segm")
    assert scores.metrics["APs"] == pytest.approx(50)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_finding_nothing_scores_nothing(kind: Any) -> None:
    assert score(loaded(PETS), [], [1, 2, 3], kind).metrics["AP"] == 0


def test_only_the_given_images_count() -> None:
    of_first = [result for result in AS_TOLD if result["image_id"] == 1]
    assert score(loaded(PETS), of_first, [1], "segm").metrics["AP"] == pytest.approx(100)
    assert score(loaded(PETS), of_first, [1, 2, 3], "segm").metrics["AP"] < 75  # type: ignore[operator]


def test_scoring_changes_no_result() -> None:
    results = copy.deepcopy(AS_TOLD)
    for kind in ("bbox", "segm"):
        score(loaded(PETS), results, [1, 2, 3], kind)  # type: ignore[arg-type]
    assert results == AS_TOLD


# -- the program ------------------------------------------------------------------------------------------------------

WHOLE, PART = rectangle(0, 0, WIDTH, HEIGHT), rectangle(0, 0, 156, HEIGHT)  # the second is 0.78 of the first


class Data:
    """Images and annotations in a folder."""

    def __init__(self, folder: Path, thing: dict[str, Any], count: int = 3) -> None:
        self.images, self.annotations, self.json = folder / "images", folder / "truth.json", folder / "out" / "ap.json"
        self.images.mkdir()
        self.tree = annotated(*((number, 1, thing) for number in range(1, count + 1)), images=count)
        self.write()
        for image in self.tree["images"]:
            Image.new("RGB", (WIDTH, HEIGHT), (image["id"], 50, 90)).save(self.images / image["file_name"])

    def write(self) -> None:
        self.annotations.write_text(json.dumps(self.tree))

    def evaluate(self, endpoint: str, *more: str) -> int:
        given = ["--images", str(self.images), "--annotations", str(self.annotations), "--json", str(self.json)]
        return evaluate_coco.main([endpoint, *given, *more])

    @property
    def report(self) -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(self.json.read_text())
        return tree


def test_a_daemon_that_finds_everything_reaches_100(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(tmp_path, WHOLE)
    assert data.evaluate(shared_daemon.endpoint, "--require-box-ap", "99.9", "--require-mask-ap", "99.9") == 0
    assert data.report["box"]["AP"] == data.report["mask"]["AP"] == pytest.approx(100)
    assert data.report["classes"]["image"]["mask"]["AP"] == pytest.approx(100)
    assert data.report["classes"]["dog"]["mask"]["AP"] is None
    assert data.report["images"] == sum(data.report["images_by_device"].values()) == 3
    assert data.report["images_per_s"] == pytest.approx(3 / data.report["seconds"])
    printed = capsys.readouterr().out
    assert printed.count("@[ IoU=") == 24
    assert "box AP 100.00, mask AP 100.00; 3 images in" in printed
    assert "different data set" not in printed


@pytest.mark.parametrize(("flag", "required", "code"), [
    ("--require-box-ap", "59.9", 0), ("--require-box-ap", "60.1", 1),
    ("--require-mask-ap", "59.9", 0), ("--require-mask-ap", "60.1", 1),
])  # fmt: skip
def test_too_low_an_ap_fails(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, required: str, code: int
) -> None:
    data = Data(tmp_path, PART)
    assert data.evaluate(shared_daemon.endpoint, flag, required) == code
    assert data.report["box"]["AP"] == data.report["mask"]["AP"] == pytest.approx(60)
    assert (f"AP 60.00 is below the {required} that is required" in capsys.readouterr().out) == bool(code)


def test_an_image_that_fails_is_named_and_counts_as_missed(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(tmp_path, WHOLE, count=4)
    (data.images / "2.png").write_bytes(b"no image")
    (data.images / "3.png").unlink()
    assert data.evaluate(shared_daemon.endpoint) == 1
    assert [Path(each["path"]).name for each in data.report["failures"]] == ["2.png", "3.png"]
    assert data.report["images"] == 2
    assert data.report["mask"]["AR100"] == pytest.approx(50)
    printed = capsys.readouterr().out
    assert f"{data.images}/2.png: bad-image" in printed
    assert f"{data.images}/3.png: bad-image: cannot be read" in printed


def test_an_image_of_another_size_than_annotated_fails(shared_daemon: Any, tmp_path: Path) -> None:
    data = Data(tmp_path, WHOLE)
    Image.new("RGB", (HEIGHT, WIDTH)).save(data.images / "1.png")
    assert data.evaluate(shared_daemon.endpoint) == 1
    assert [(each["code"], each["reason"]) for each in data.report["failures"]] == [
        ("wrong-size", "100x200 pixels, the annotations say 200x100")
    ]


def test_a_limit_measures_the_first_images_only(shared_daemon: Any, tmp_path: Path) -> None:
    data = Data(tmp_path, WHOLE)
    (data.images / "3.png").unlink()
    assert data.evaluate(shared_daemon.endpoint, "--limit", "2") == 0
    assert data.report["images"] == 2
    assert data.report["mask"]["AP"] == pytest.approx(100)


def test_categories_of_another_data_set_are_pointed_out(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(tmp_path, WHOLE)
    data.tree["categories"][0]["name"] = "person"
    data.write()
    data.evaluate(shared_daemon.endpoint)
    assert "categories of a different data set: 1 image (person in the annotations)" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [], "annotations": [], "categories": []}',
                                  '{"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}'])
def test_annotations_that_are_none_are_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(tmp_path, WHOLE)
    data.annotations.write_text(text)
    assert data.evaluate("ipc:///nowhere") == 2
    assert "truth.json: not COCO instances" in capsys.readouterr().err


def square(left: float, right: float) -> list[float]:
    return [left, 0, right, 0, right, HEIGHT, left, HEIGHT]


@pytest.mark.parametrize(("change", "told"), [
    ({"segmentation": {"size": [HEIGHT // 2, WIDTH], "counts": [0, 10000]}}, "its RLE has size [50, 200], the image"),
    ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "garbage"}}, "counts 'garbage' of its RLE are damaged"),
    ({"segmentation": []}, "segmentation is empty"),
    ({"segmentation": None}, "segmentation is missing"),
    ({"segmentation": square(0, 9)}, "is one polygon: expected a list of polygons"),
    ({"segmentation": [square(0, 9), [1, 2, 3, 4]]}, "segmentation[1]: has 4 numbers"),
    ({"segmentation": [square(0, 3.5e8)]}, "segmentation[0]: reaches from (0, 0) to (3.5e+08, 100)"),
    ({"segmentation": [square(0, math.nan)]}, "segmentation[0]: has a number that is not finite"),
    ({"bbox": [math.nan] * 4}, "bbox [nan, nan, nan, nan]"),
    ({"bbox": [0, 0, 10]}, "bbox [0, 0, 10]"),
    ({"bbox": [0, 0, -10, 10]}, "bbox [0, 0, -10, 10]"),
    ({"bbox": [WIDTH + 1, 0, 10, 10]}, "lies outside the image of 200 x 100"),
    ({"iscrowd": "0"}, "iscrowd '0'"),
    ({"area": "9"}, "area '9'"),
    ({"area": -1}, "area -1"),
    ({"category_id": "1"}, "category_id '1' is not among the categories"),
    ({"category_id": True}, "category_id True is not among the categories"),
])  # fmt: skip
def test_an_annotation_that_cannot_be_measured_is_named_before_an_image_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], told: str
) -> None:
    data = Data(tmp_path, WHOLE)
    data.tree["annotations"][1] |= {"id": 44} | change
    data.write()
    assert data.evaluate("ipc:///nowhere") == 2
    (line,) = capsys.readouterr().err.splitlines()
    named = f"{data.annotations}: not COCO instances: annotation 44 (annotations[1]) of image 2, 2.png: "
    assert line.startswith(f"evaluate_coco: {named}")
    assert told in line


@pytest.mark.parametrize(("entries", "place", "change", "told"), [
    ("annotations", 1, {"image_id": "2"}, "annotations[1]): image_id '2' is not among the images, where the id is"),
    ("images", 1, {"width": 0}, "image 2 (images[1]): expected a \"height\" and a \"width\" of 1 to 65535 pixels"),
    ("images", 1, {"height": None}, "image 2 (images[1])"),
    ("images", 1, {"file_name": "../2.png"}, "expected a path inside the folder of the images"),
    ("images", 1, {"file_name": "/2.png"}, "expected a path inside the folder of the images"),
    ("images", 1, {"file_name": "./1.png"}, "its file './1.png' is that of image 1 (images[0]) too"),
    ("images", 1, {"id": 1}, "its id is used twice"),
    ("categories", 1, {"name": None}, "categories[1]"),
    ("categories", 1, {"id": 1}, "id 1 is given to both 'image' and 'cat'"),
])  # fmt: skip
def test_an_entry_that_cannot_be_measured_is_named_before_an_image_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], entries: str, place: int, change: dict[str, Any], told: str
) -> None:
    data = Data(tmp_path, WHOLE)
    data.tree[entries][place] |= change
    data.write()
    assert data.evaluate("ipc:///nowhere") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"evaluate_coco: {data.annotations}: not COCO instances: ")
    assert told in err


def test_what_coco_defines_is_mended(shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(tmp_path, PART)
    for place, item in enumerate(data.tree["annotations"]):
        item["id"] = 0
        del item[("area", "iscrowd", "id")[place]]
    data.tree["images"][0]["id"] = data.tree["annotations"][0]["image_id"] = "000000000001"
    data.write()
    assert data.evaluate(shared_daemon.endpoint) == 0
    assert data.report["box"]["AP"] == data.report["mask"]["AP"] == pytest.approx(60)
    assert "1 of 3 annotations have no area: that of the mask counts" in capsys.readouterr().err


@pytest.mark.parametrize("empty", [{}, {"segmentation": None}, {"segmentation": []}])
def test_of_boxes_alone_boxes_are_measured(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], empty: dict[str, Any]
) -> None:
    data = Data(tmp_path, PART)
    for item in data.tree["annotations"]:
        del item["segmentation"]
        item |= empty
    data.write()
    assert data.evaluate(shared_daemon.endpoint) == 0
    assert data.report["box"]["AP"] == pytest.approx(60)
    assert data.report["mask"] is data.report["classes"]["image"]["mask"] is None
    printed = capsys.readouterr()
    assert "no annotation has a segmentation: only boxes are measured" in printed.err
    assert "box AP 60.00, mask AP not measured; 3 images" in printed.out
    assert data.evaluate("ipc:///nowhere", "--require-mask-ap", "1") == 2
    assert "--require-mask-ap" in capsys.readouterr().err


def test_images_without_an_object_to_find_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(tmp_path, WHOLE)
    del data.tree["annotations"][0]
    data.tree["annotations"][0]["iscrowd"] = 1
    data.write()
    assert data.evaluate("ipc:///nowhere", "--limit", "2") == 2
    assert "no annotations of the first 2 images, or only of crowds" in capsys.readouterr().err


def test_boxes_of_corners_are_pointed_out(
    shared_daemon: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Data(tmp_path, rectangle(120, 60, 60, 30))
    for item in data.tree["annotations"]:
        x, y, width, height = item["bbox"]
        item["bbox"] = [x, y, x + width, y + height]
    data.write()
    data.evaluate(shared_daemon.endpoint)
    assert "3 of 3 boxes extend beyond their image: expected [x, y, width, height]" in capsys.readouterr().err


def test_names_that_the_terminal_has_not_lose_nothing(shared_daemon: Any, tmp_path: Path) -> None:
    data = Data(tmp_path, WHOLE)
    data.tree["categories"][1]["name"] = data.tree["categories"][2]["name"] = "Bär"
    data.write()
    script = ROOT / "scripts" / "evaluate_coco.py"
    given = ["--images", str(data.images), "--annotations", str(data.annotations), "--json", str(data.json)]
    command = [sys.executable, str(script), shared_daemon.endpoint, *given]
    run = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    assert b"B\\xe4r (id 7)" in run.stdout
    assert b"mask AP 100.00" in run.stdout
    assert list(data.report["classes"]) == ["image", "Bär (id 2)", "Bär (id 7)"]


@pytest.mark.parametrize("library", ["pycocotools", "numpy"])
def test_a_library_that_is_missing_is_named(tmp_path: Path, library: str) -> None:
    code = (f"import sys; sys.modules[{library!r}] = None\n"
            "from blendmaskd.programs.evaluate_coco import main; sys.exit(main())")
    given = ["ipc:///nowhere", "--images", str(tmp_path), "--annotations", str(tmp_path / "none.json")]
    run = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False,
                         cwd=Path(evaluate_coco.__file__).parents[1])  # fmt: skip
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"evaluate_coco: {library} is not installed, and average precision needs it: pip install pycocotools\n"
    )


@pytest.mark.parametrize("change", [
    {"bbox": [0.0, 0.0, math.nan, 1.0]}, {"score": math.inf}, {"segmentation": {"size": [1, 1], "counts": "1"}},
    {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PPo"}},
    {"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\x00~"}},
])  # fmt: skip
def test_a_result_that_cannot_be_measured_is_a_failure(change: dict[str, Any]) -> None:
    assert not flaw(found(1, 2, CAT), (WIDTH, HEIGHT))
    assert flaw(found(1, 2, CAT) | change, (WIDTH, HEIGHT))


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = Data(tmp_path, WHOLE)
    assert data.evaluate("ipc:///nowhere", "--images", str(tmp_path / "none")) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_without_a_daemon_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Data(tmp_path, WHOLE).evaluate(f"ipc://{tmp_path}/n", "--wait", "0.2") == 3
    assert "no daemon answers" in capsys.readouterr().err


@pytest.fixture
def deaf_endpoint(tmp_path: Path) -> Iterator[str]:
    """Somebody who says that he serves, and answers no job."""
    endpoint = f"ipc://{tmp_path}/d"
    ended = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind(endpoint)

        def answer() -> None:
            while not ended.is_set():
                if not socket.poll(20):
                    continue
                client, *frames = socket.recv_multipart()
                if isinstance(protocol.decode(frames, FROM_CLIENT)[0], GetStats):
                    socket.send_multipart([client, *protocol.encode(Stats(stats={"serving": True}))])

        thread = threading.Thread(target=answer)
        thread.start()
        yield endpoint
        ended.set()
        thread.join()


def test_images_without_an_answer_are_named(deaf_endpoint: str, tmp_path: Path) -> None:
    data = Data(tmp_path, WHOLE)
    assert data.evaluate(deaf_endpoint, "--timeout", "0.2") == 1
    assert [each["code"] for each in data.report["failures"]] == ["no-answer"] * 3
    assert data.report["mask"]["AP"] == 0
