"""Annotation files of every kind: read right, or refused by name, never a wrong number.

A file that is right is changed at any place to any odd value. What is still read must be what pycocotools reads, fed
with the file as it is but for what COCO defines: numbers for annotations, areas, `iscrowd`.
"""
import contextlib
import copy
import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from blendmaskd.coco import values as coco_values
from blendmaskd.coco.average_precision import METRICS, Kind, Reference, labels, score
from blendmaskd.coco.categories import Category
from blendmaskd.coco.instances import LISTED, InstancesError, read, read_names
from blendmaskd.coco.values import LONGEST_OUTLINE, Fault, outline

Tree = Any


def rle_of(mask: np.ndarray[Any, Any], *, compressed: bool = True) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    if compressed:
        return {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0] * bool(flat[0]) + runs}


def disc(height: int, width: int, x: float, y: float, radius: float) -> np.ndarray[Any, Any]:
    rows, columns = np.mgrid[:height, :width]
    return ((rows - y) ** 2 + (columns - x) ** 2 < radius**2).astype(np.uint8)


def right() -> Tree:
    """A file that is right: polygons, an RLE of each form, a crowd."""
    square, triangle = [10, 10, 30, 10, 30, 30, 10, 30], [40.5, 5, 55, 20.25, 38, 22]
    big, small = disc(60, 80, 30, 30, 22), disc(60, 80, 60, 15, 6)
    bar = np.zeros((30, 50), np.uint8)
    bar[:, 10:14] = 1
    shapes: list[tuple[int, int, Any, list[float], int]] = [
        (7, 2, [square, triangle], [10, 5, 45, 25], 0),
        (7, 5, rle_of(big), coco_mask.toBbox(coco_mask.encode(np.asfortranarray(big))).tolist(), 0),
        (7, 2, rle_of(small, compressed=False), [54, 9, 12, 12], 0),
        (7, 2, rle_of(disc(60, 80, 70, 40, 12), compressed=False), [58, 28, 22, 24], 1),
        (3, 2, [[-3, 4, 20, 2, 24, 28]], [-3, 2, 27, 26], 0),
        (3, 9, rle_of(bar), [10, 0, 4, 30], 0),
    ]
    return {
        "info": {"year": 2026},
        "images": [
            {"id": 7, "file_name": "a/1.jpg", "width": 80, "height": 60},
            {"id": 3, "file_name": "b/1.jpg", "width": 50, "height": 30},
            {"id": 4, "file_name": "2.jpg", "width": 9, "height": 9},
        ],
        "categories": [{"id": 5, "name": "disc"}, {"id": 2, "name": "square"}, {"id": 9, "name": "bar"}],
        "annotations": [
            {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, "bbox": bbox,
             "area": 100.5 * number, "iscrowd": crowd}
            for number, (image_id, category_id, segmentation, bbox, crowd) in enumerate(shapes, 1)
        ],
    }  # fmt: skip


def answers() -> list[dict[str, Any]]:
    """Results that agree with that file in part; `image_id` is the place of the image, from 1."""
    found = []
    for place, (height, width, category_id, x, y, radius) in enumerate([
        (60, 80, 2, 20, 20, 11), (60, 80, 5, 31, 29, 21), (60, 80, 2, 61, 15, 6), (60, 80, 2, 70, 42, 9),
        (30, 50, 2, 14, 12, 11), (30, 50, 9, 12, 15, 9), (9, 9, 9, 4, 4, 3), (60, 80, 9, 40, 30, 20),
    ]):  # fmt: skip
        mask = rle_of(disc(height, width, x, y, radius))
        found.append({
            "image_id": {60: 1, 30: 2, 9: 3}[height], "category_id": category_id, "score": 0.9 - place / 16,
            "segmentation": mask, "bbox": coco_mask.toBbox(mask | {"counts": mask["counts"].encode()}).tolist(),
        })  # fmt: skip
    return found


ANSWERS = answers()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("annotations")


def write(folder: Path, tree: Tree) -> Path:
    path = folder / "truth.json"
    path.write_text(json.dumps(tree))
    return path


def measured(path: Path) -> dict[str, dict[str, float | None]]:
    """AP and AR of `ANSWERS`, as this project computes them."""
    truth = read(path, for_training=False)
    reference = Reference(truth)
    kinds: list[Kind] = ["bbox", "segm"] if truth.has_masks else ["bbox"]
    everything = range(1, len(truth.pictures) + 1)
    results = [each for each in ANSWERS if each["image_id"] in everything]
    return {kind: score(reference, results, everything, kind).metrics for kind in kinds}


def as_pycocotools_has_it(tree: Tree, kinds: list[str]) -> dict[str, dict[str, float | None]]:
    """The same by pycocotools alone."""
    tree = json.loads(json.dumps(tree))
    places = {image["id"]: place for place, image in enumerate(tree["images"], 1)}
    sizes = {places[image["id"]]: (int(image["height"]), int(image["width"])) for image in tree["images"]}
    for image in tree["images"]:
        image |= {"id": places[image["id"]], "height": int(image["height"]), "width": int(image["width"])}
    for number, item in enumerate(tree["annotations"], 1):
        item |= {"id": number, "image_id": places[item["image_id"]], "iscrowd": item.get("iscrowd") or 0}
        item["bbox"] = [float(value) for value in item["bbox"]]
        drawn = None
        if "segm" in kinds:
            item["segmentation"] = drawn = drawn_by_pycocotools(item["segmentation"], *sizes[item["image_id"]])
        if item.get("area") is None:
            item["area"] = float(coco_mask.area(drawn)) if drawn else item["bbox"][2] * item["bbox"][3]
    return {kind: _by_pycocotools(tree, kind) for kind in kinds}


def drawn_by_pycocotools(segmentation: Any, height: int, width: int) -> Any:
    """As COCO.annToRLE does."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], str):
        return {"size": [height, width], "counts": segmentation["counts"].encode()}
    return coco_mask.frPyObjects({"size": [height, width], "counts": list(map(int, segmentation["counts"]))}, height,
                                 width)  # fmt: skip


def _by_pycocotools(tree: Tree, kind: str) -> dict[str, float | None]:
    left_out = "bbox" if kind == "segm" else "segmentation"
    everything = {image["id"] for image in tree["images"]}
    results = [
        {key: value for key, value in result.items() if key != left_out}
        for result in ANSWERS
        if result["image_id"] in everything
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(tree)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: None if value == -1 else value * 100 for name, value in zip(METRICS, evaluation.stats.tolist())}


def agree(ours: dict[str, dict[str, float | None]], theirs: dict[str, dict[str, float | None]]) -> bool:
    return all(
        (value is None) == (theirs[kind][name] is None)
        and (value is None or math.isclose(value, theirs[kind][name], abs_tol=1e-9))  # type: ignore[arg-type]
        for kind, metrics in ours.items()
        for name, value in metrics.items()
    )


def test_a_file_that_is_right_is_measured_as_pycocotools_does(folder: Path) -> None:
    ours = measured(write(folder, right()))
    assert 20 < ours["segm"]["AP"] < 80  # type: ignore[operator]  # it can go either way
    assert agree(ours, as_pycocotools_has_it(right(), ["bbox", "segm"]))


# -- any change at any place ------------------------------------------------------------------------------------------

ODD = [
    None, True, False, 0, 1, -1, 2, 3, 7, 1.0, 1.5, -0.0, 1e9, 3.5e8, -3.5e8, 3e5, 1e308, 10**30, -(10**400), 2**31,
    2**64, math.nan, math.inf, -math.inf, "", "0", "1", "7", "é", "\ud800", "\0", "../1.jpg", "/etc/passwd", "2.jpg",
    [], [[]], [[[]]], {}, [None], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]],
    [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 5, 2, 9, 2]], [[1, 2, 8, 3, 5, 9]], [[-200, -200, 300, -200, 30, 400]],
    [[0, 0, 3.5e8, 0, 0, 9]], [[0, 0, math.nan, 0, 0, 9]], [["1", 2, 8, 3, 5, 9]], [[True, 2, 8, 3, 5, 9]],
    [[10**400, 2, 8, 3, 5, 9]], [1e9, 1, 1, 1], [-5, -5, 3, 3], [500, 500, 9, 9], [5, 5, -3, 3], [5, 5, 0, 0],
    ["1", 1, 1, 1], {"size": [60, 80], "counts": "garbage~"}, {"size": [60, 80], "counts": ""},
    {"size": [60, 80], "counts": "o"}, {"size": [60, 80], "counts": "PPPPPPPPPPPPPPPP1"},
    {"size": [60, 80], "counts": [4800]}, {"size": [60, 80], "counts": [0, 4800]},
    {"size": [60, 80], "counts": [10, 0, 0, 0, 90, 4700]}, {"size": [60.0, 80.0], "counts": [100.0, 4700]},
    {"size": [60, 80], "counts": [-1, 4801]}, {"size": [60, 80], "counts": [4799]},
    {"size": [60, 80], "counts": [2**32 + 4800]}, {"size": [80, 60], "counts": [4800]}, {"size": [60, 80]},
    {"counts": [4800]}, {"size": "60", "counts": 1},
]  # fmt: skip


def places(tree: Tree) -> Iterator[tuple[Any, ...]]:
    """The way to each value of a tree."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (key,)
        yield from ((key, *rest) for rest in places(value))


PLACES = [place for place in places(right()) if place[0] != "info"]


def changed(place: tuple[Any, ...], how: str, value: Any) -> Tree:
    tree = right()
    holder = tree
    for key in place[:-1]:
        holder = holder[key]
    match how:
        case "replace":
            holder[place[-1]] = value
        case "remove":
            del holder[place[-1]]
        case "as text":
            holder[place[-1]] = str(holder[place[-1]])
        case "as float" if isinstance(holder[place[-1]], int):
            holder[place[-1]] = float(holder[place[-1]])
        case "twice" if isinstance(holder, list):
            holder.append(holder[place[-1]])
    return tree


HOW = st.sampled_from(["replace"] * 6 + ["remove", "as text", "as float", "twice"])


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from(PLACES), how=HOW, value=st.sampled_from(ODD))
@example(place=("annotations", 1, "segmentation", "counts"), how="replace", value="")
@example(place=("annotations", 0, "id"), how="replace", value=0)
@example(place=("annotations", 1, "area"), how="replace", value=0)
@example(place=("images", 0, "id"), how="as text", value=None)
@example(place=("annotations", 0), how="twice", value=None)
@example(place=("annotations", 2, "segmentation"), how="replace",
         value={"size": [60, 80], "counts": [10, 0, 0, 0, 90, 4700]})  # fmt: skip
def test_a_changed_file_is_measured_right_or_refused_by_name(
    folder: Path, place: tuple[Any, ...], how: str, value: Any
) -> None:
    tree = changed(place, how, value)
    path = write(folder, tree)
    try:
        ours = measured(path)
    except InstancesError as error:
        names_the_fault(str(error), path, place, how)
        return
    assert agree(ours, as_pycocotools_has_it(tree, list(ours)))


def names_the_fault(text: str, path: Path, place: tuple[Any, ...], how: str) -> None:
    """Where the file was changed, or what refers to it."""
    assert text.startswith(f"{path}: not COCO instances: ")
    assert len(text.splitlines()) <= LISTED + 2
    assert text.isprintable() or "\n" in text
    key, index = place[0], place[1] if len(place) > 1 else 0
    if how in ("remove", "twice") or (len(place) == 2 and key != "annotations"):  # places are others then
        assert any(part in text for part in ("annotations[", "images[", "categories[", f'"{key}"'))
    elif key == "annotations":
        assert f"annotations[{index}]" in text or f'"{key}"' in text
        if len(place) > 2 and place[2] != "image_id":
            assert ("a/1.jpg" if index < 4 else "b/1.jpg") in text
    else:
        assert any(part in text for part in (f"{key}[{index}]", "annotations[", f'"{key}"'))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.sampled_from([place for place in PLACES if place[0] == "annotations"]), how=HOW,
       value=st.sampled_from(ODD))  # fmt: skip
def test_for_training_what_is_not_refused_can_be_drawn(
    folder: Path, place: tuple[Any, ...], how: str, value: Any
) -> None:
    tree = changed(place, how, value)
    path = write(folder, tree)
    try:
        truth = read(path, for_training=True)
    except InstancesError as error:
        names_the_fault(str(error), path, place, how)
        return
    assert len(truth.annotations) + truth.dropped == len(tree["annotations"])
    for item in truth.annotations:
        if isinstance(item.segmentation, tuple):
            assert item.segmentation
            assert all(outline(part) <= LONGEST_OUTLINE for part in item.segmentation)
        elif item.segmentation:
            assert item.segmentation.counts.sum() == item.segmentation.height * item.segmentation.width


def test_all_complaints_come_at_once_and_the_rest_is_counted(folder: Path) -> None:
    tree = right()
    tree["images"][2]["width"] = 0
    del tree["categories"][2]["name"]
    tree["annotations"] += [right()["annotations"][0] | {"bbox": [1, 2, 3], "iscrowd": 2} for _ in range(30)]
    with pytest.raises(InstancesError) as refusal:
        read(write(folder, tree), for_training=False)
    first, *lines = str(refusal.value).splitlines()
    assert first.endswith("not COCO instances: 62 faults:")  # not of what refers to a category that is refused
    assert lines[0].startswith("  image 4 (images[2]): expected a \"height\" and a \"width\"")
    assert lines[1].startswith("  categories[2]: ")
    assert lines[2].startswith("  annotation 1 (annotations[6]) of image 7, a/1.jpg: bbox [1, 2, 3]: expected")
    assert lines[3].startswith("  annotation 1 (annotations[6]) of image 7, a/1.jpg: iscrowd 2: expected 0 or 1")
    assert lines[LISTED:] == [f"  and {62 - LISTED} more"]


@pytest.mark.parametrize(("content", "reason"), [
    (b"", "is empty"), (b" \n", "is empty"), (b"{", "no JSON"), (b'{"images": [', "no JSON"),
    (b"\xff\xfe\0", "no JSON"), (b'{"images": "\xff"}', "not utf-8"),
    (b"[" * 100_000, "nested too deeply"), (b"1" * 10_000, "no JSON"),
    (b"[]", "a list, as in result files"), (b"null", "found None"), (b"3", "found 3"), (b'"a"', "found 'a'"),
    (b"{}", 'under "annotations", found no such key'), (b'{"images": {}}', 'under "images", found {}'),
    (b'{"images": [], "annotations": [], "categories": []}', 'the list under "categories" is empty'),
])  # fmt: skip
def test_a_file_of_another_form_is_refused_with_the_reason(folder: Path, content: bytes, reason: str) -> None:
    path = folder / "truth.json"
    path.write_bytes(content)
    with pytest.raises(InstancesError) as refusal:
        read(path, for_training=False)
    assert str(refusal.value).startswith(f"{path}: not COCO instances: ")
    assert reason in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(folder: Path) -> None:
    for path, reason in ((folder / "none.json", "No such file"), (folder, "Is a directory")):
        for reading in (lambda path: read(path, for_training=True), read_names):
            with pytest.raises(InstancesError, match=reason):
                reading(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_any_encoding_of_json_is_read(folder: Path, encoding: str) -> None:
    tree = right()
    tree["categories"][0]["name"] = "Scheibe für Bäume"
    path = folder / "truth.json"
    path.write_bytes(json.dumps(tree, ensure_ascii=False).encode(encoding))
    assert read(path, for_training=False).categories[1] == Category(5, "Scheibe für Bäume")


# -- what is understood -----------------------------------------------------------------------------------------------


def test_ids_of_annotations_are_only_names(folder: Path) -> None:
    expected = measured(write(folder, right()))
    for ids in ([0, 1, 2, 3, 4, 5], [1, 1, 2, 2, 1, 2], list("abcdef"), [None] * 6, [[], {}, 1.5, -1, 0, 0]):
        tree = right()
        for item, each in zip(tree["annotations"], ids):
            item["id"] = each
        assert measured(write(folder, tree)) == expected
    for item in tree["annotations"]:
        del item["id"]
    assert measured(write(folder, tree)) == expected


@pytest.mark.parametrize("ids", [
    [0, 1, 2], ["0007", "3", "x"], ["7", 7, "07"], [7.0, 3.0, 4.0], [-1, 10**30, "\ud800"],
])  # fmt: skip
def test_ids_of_images_may_be_numbers_and_texts(folder: Path, ids: list[Any]) -> None:
    tree = right()
    named = dict(zip([image["id"] for image in tree["images"]], ids))
    for image in tree["images"]:
        image["id"] = named[image["id"]]
    for item in tree["annotations"]:
        item["image_id"] = named[item["image_id"]]
    assert measured(write(folder, tree)) == measured(write(folder, right()))


def test_areas_that_are_missing_are_those_of_the_masks(folder: Path) -> None:
    without, null, given_them = right(), right(), right()
    sizes = {7: (60, 80), 3: (30, 50)}
    for item in without["annotations"]:
        del item["area"]
    for item in null["annotations"]:
        item["area"] = None
    for item in given_them["annotations"]:
        item["area"] = float(coco_mask.area(drawn_by_pycocotools(item["segmentation"], *sizes[item["image_id"]])))
    expected = measured(write(folder, given_them))
    assert measured(write(folder, without)) == measured(write(folder, null)) == expected
    assert expected != measured(write(folder, right()))


def test_boxes_alone_are_measured_as_boxes(folder: Path) -> None:
    expected = measured(write(folder, right()))
    for missing in ({}, {"segmentation": None}, {"segmentation": []}):
        tree = right()
        tree["annotations"] = [
            {key: value for key, value in item.items() if key != "segmentation"} | missing
            for item in tree["annotations"]
        ]
        assert measured(write(folder, tree)) == {"bbox": expected["bbox"]}


def test_a_mask_without_a_pixel_is_an_object_that_nothing_finds(folder: Path) -> None:
    """As in COCO's own files: a few of their polygons are lines."""
    tree = right()
    tree["annotations"][0] |= {"segmentation": [[1.1, 1.1, 1.2, 1.1, 1.2, 1.1]]}
    tree["annotations"][1] |= {"segmentation": {"size": [60, 80], "counts": [4800]}}
    assert Reference(read(write(folder, tree), for_training=False)).without_pixels == 2
    assert agree(measured(write(folder, tree)), as_pycocotools_has_it(tree, ["bbox", "segm"]))


def test_categories_of_one_name_are_told_apart() -> None:
    assert labels([Category(1, "mouse"), Category(2, "cat"), Category(5, "mouse")]) == [
        "mouse (id 1)", "cat", "mouse (id 5)"
    ]  # fmt: skip


# -- polygons and runs ------------------------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 40), st.integers(1, 40))
def test_runs_are_those_of_pycocotools_in_each_form(data: st.DataObject, height: int, width: int) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits, np.uint8).reshape(height, width)
    for compressed in (False, True):
        value = rle_of(mask, compressed=compressed)
        found = coco_values.rle(value, width, height)
        again = coco_mask.frPyObjects(found.uncompressed(), height, width)
        assert again["counts"].decode() == rle_of(mask)["counts"]
        assert found.counts[1::2].sum() == mask.sum()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_runs_of_no_pixels_change_nothing(runs: list[int]) -> None:
    pixels = sum(runs)
    if not pixels:
        return
    found = coco_values.rle({"size": [pixels, 1], "counts": runs}, 1, pixels)
    assert found.counts[1:].all()
    flat = np.repeat(np.arange(len(runs)) % 2, runs)
    assert np.array_equal(np.repeat(np.arange(len(found.counts)) % 2, found.counts), flat)


@given(st.text(st.sampled_from("".join(map(chr, range(46, 114)))), max_size=12), st.integers(1, 9), st.integers(1, 9))
def test_a_text_is_an_rle_or_refused(text: str, height: int, width: int) -> None:
    """Garbage that passes means to pycocotools what it means here."""
    try:
        found = coco_values.rle({"size": [height, width], "counts": text}, width, height)
    except Fault:
        return
    decoded = coco_mask.decode({"size": [height, width], "counts": text.encode()})
    assert decoded.sum() == found.counts[1::2].sum()


@pytest.mark.parametrize("points", [[0, 0, 3.5e8, 0, 0, 9], [0, 0, 0, -1e6, 9, 9], [0, 0, 9, 9, 1e400, 3],
                                    [0, 0, 500, 500] * 4001, [5501, 0, 5505, 0, 5505, 9],
                                    [4.3e9, 4.3e9, 4.3e9 + 9, 4.3e9, 4.3e9, 4.3e9 + 9]])  # fmt: skip
def test_polygons_that_cannot_be_drawn_are_refused(points: list[float]) -> None:
    with pytest.raises(Fault, match=r"^segmentation\[2\]: "):
        coco_values.polygon(points, "segmentation[2]", 500, 500)


@pytest.mark.parametrize("box", [[0, 0, 5501, 1], [-5001, 0, 1, 1], [0, -1e9, 1, 1], [0, 0, 1, 1e308]])
def test_boxes_far_outside_are_refused(box: list[float]) -> None:
    with pytest.raises(Fault, match=r"^bbox: reaches from"):
        coco_values.box(box, 500, 400)


@given(st.lists(st.floats(-4000, 4300), min_size=6, max_size=40).filter(lambda points: len(points) % 2 == 0))
def test_polygons_that_reach_out_of_the_image_are_drawn(points: list[float]) -> None:
    found = coco_values.polygon(points, "segmentation[0]", 400, 300)
    assert not isinstance(found, str)
    assert found.tolist() == points
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([points], 300, 400)))
    assert drawn.shape == (300, 400)


def test_a_file_that_would_take_all_memory_is_refused_within_a_gigabyte(folder: Path) -> None:
    tree = right()
    tree["annotations"][0]["segmentation"] = [[-164.1, -221.8, 208000000.0, 350000000.0, 226.0, 236.6, 272.0, 384.3]]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30));"
        "from blendmaskd.programs.evaluate_coco import main; sys.exit(main(sys.argv[1:]))"
    )
    given_arguments = ["ipc:///nowhere", "--images", str(folder), "--annotations", str(write(folder, tree))]
    run = subprocess.run(
        [sys.executable, "-c", code, *given_arguments], cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False, env={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 2
    assert "annotation 1 (annotations[0]) of image 7, a/1.jpg: segmentation[0]" in run.stderr
    assert len(run.stderr.splitlines()) == 1
