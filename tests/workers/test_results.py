import contextlib
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO as CocoDataset

from blendmaskd.coco.categories import COCO
from blendmaskd.images.decoding import ImageError
from blendmaskd.protocol import Code, Options
from blendmaskd_workers import masks, outlines
from blendmaskd_workers import results as finishing
from blendmaskd_workers.results import LateError, Pasted, Stretched, Window, edges, encode_rle, keep, to_coco

# pycocotools 2.0.11 hands numpy an array by a protocol that numpy 2.4 warns about.

HEIGHT, WIDTH = 60, 80
BOXES = np.array([[1.25, 2.5, 11.0, 22.25], [0, 0, 80, 60], [30, 10, 50, 40]], np.float32)
SCORES = np.array([0.3, 0.9, 0.6], np.float32)
CLASSES = np.array([0, 11, 79])


def whole(mask: np.ndarray) -> Window:
    return mask, (0, 0)


def placed(mask: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    image = np.zeros(size, np.uint8, order="F")
    image[corner[0] : corner[0] + mask.shape[0], corner[1] : corner[1] + mask.shape[1]] = mask
    return image


def disc(height: int, width: int, radius: float) -> np.ndarray:
    rows, columns = np.ogrid[:height, :width]
    return (rows - height / 2) ** 2 + (columns - width / 2) ** 2 <= radius**2


def trace_polygons(window: Window) -> list[list[float]]:
    return [part.ravel().tolist() for part in outlines.trace(*edges(window))]


def coco(options: Options, pasted: list[int] | None = None) -> list[dict]:
    def paste(index: int) -> Window:
        if pasted is not None:
            pasted.append(index)
        return np.ones((10, 5), bool), (3, 7 * index)

    return to_coco(BOXES, SCORES, CLASSES, Pasted(paste, (HEIGHT, WIDTH)), COCO, options)


def test_a_result_says_box_score_class_and_mask_in_descending_score() -> None:
    results = coco(Options())
    assert [result["score"] for result in results] == [float(SCORES[i]) for i in (1, 2, 0)]
    assert results[2]["bbox"] == [1.25, 2.5, 9.75, 19.75]
    assert [(r["class_index"], r["category_id"], r["category_name"]) for r in results] == [
        (11, 13, "stop sign"),
        (79, 90, "toothbrush"),
        (0, 1, "person"),
    ]
    decoded = coco_mask.decode(results[1]["segmentation"])
    assert decoded.shape == (HEIGHT, WIDTH)
    assert decoded[3:13, 14:19].all()
    assert decoded.sum() == 50


def test_results_survive_json_unrounded() -> None:
    results = coco(Options())
    assert json.loads(json.dumps(results)) == results
    assert np.float32(results[0]["score"]) == SCORES[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (Options(score_threshold=0.3), [1, 2, 0]),
        (Options(score_threshold=0.31), [1, 2]),
        (Options(max_detections=1), [1]),
        (Options(max_detections=0), []),
        (Options(max_detections=9, score_threshold=1.0), []),
    ],
)
def test_masks_of_dropped_detections_are_not_computed(options: Options, wanted: list[int]) -> None:
    pasted: list[int] = []
    assert len(coco(options, pasted)) == len(wanted)
    assert pasted == wanted


def test_without_masks_nothing_is_pasted_and_the_key_is_absent() -> None:
    pasted: list[int] = []
    results = coco(Options(mask_format="none"), pasted)
    assert len(results) == 3
    assert pasted == []
    assert all("segmentation" not in result for result in results)


def test_polygons_are_flat_lists() -> None:
    for result in coco(Options(mask_format="polygon")):
        (polygon,) = result["segmentation"]
        assert len(polygon) >= 6
        assert len(polygon) % 2 == 0
        assert all(type(number) is float for number in polygon)


def test_equal_scores_keep_their_order() -> None:
    scores = np.tile(np.array([0.5, 0.7], np.float32), 50)
    assert keep(scores, Options()) == [*range(1, 100, 2), *range(0, 100, 2)]


def test_no_detections_give_no_results() -> None:
    nothing = np.zeros(0, np.float32)
    none = nothing.reshape(0, 4)
    for nowhere in (Pasted(whole, (9, 9)), Stretched(np.zeros((0, 5, 5), np.float32), none, (9, 9))):
        assert to_coco(none, nothing, nothing.astype(int), nowhere, COCO, Options()) == []


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, tuple[int, int]]:
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    shape = draw(st.integers(0, height - top)), draw(st.integers(0, width - left))
    bits = draw(st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return (np.array(bits, bool).reshape(shape), (top, left)), (height, width)


@given(windows())
def test_a_window_is_encoded_as_pycocotools_encodes_the_whole_mask(case: tuple[Window, tuple[int, int]]) -> None:
    (mask, corner), size = case
    wanted = coco_mask.encode(placed(mask, corner, size))
    assert encode_rle((mask, corner), size) == {"size": list(size), "counts": wanted["counts"].decode()}


def test_a_mask_of_the_whole_image_is_one_run() -> None:
    mask = np.ones((40, 30), bool)
    assert encode_rle(whole(mask), (40, 30))["counts"] == coco_mask.encode(np.asfortranarray(mask))["counts"].decode()


def ring() -> np.ndarray:
    return disc(100, 100, 40) & ~disc(100, 100, 25)


def scattered() -> np.ndarray:
    mask = np.zeros((100, 100), bool)
    mask[5:20, 5:40] = mask[50:90, 10:30] = mask[60:61, 40:99] = True
    return mask


def sieve() -> np.ndarray:
    mask = disc(100, 100, 48)
    mask[20:80:9, 20:80:7] = False
    return mask


def grains() -> np.ndarray:
    return np.random.default_rng(3).random((60, 90)) < 0.4


def large_disc() -> np.ndarray:
    return disc(100, 100, 40)


def filled() -> np.ndarray:
    return np.ones((30, 20), bool)


@pytest.mark.parametrize("shape", [large_disc, filled, ring, scattered, sieve, grains])
def test_polygons_cover_the_mask_holes_and_parts_included(shape: Callable[[], np.ndarray]) -> None:
    mask, corner = shape(), (7, 13)
    size = mask.shape[0] + 30, mask.shape[1] + 20
    polygons = trace_polygons((mask, corner))
    assert all(len(polygon) >= 6 for polygon in polygons)
    drawn = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
    assert coco_mask.iou([drawn], [coco_mask.encode(placed(mask, corner, size))], [0])[0, 0] > 0.98


def test_polygons_of_a_large_image_take_what_their_outlines_do() -> None:
    """A mask over fifty million pixels: as a bitmap alone it would take as many bytes."""
    ring = np.hypot(*np.mgrid[-1:1:56j, -1:1:56j])
    probabilities = ((ring < 0.9) & (ring > 0.5)).astype(np.float32)[None]
    found = Stretched(probabilities, np.array([[0, 0, 8600, 5800]], np.float32), (5800, 8600))
    tracemalloc.start()
    [result] = to_coco(found.boxes, SCORES[:1], CLASSES[:1], found, COCO, Options(mask_format="polygon"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    [polygon] = result["segmentation"]
    x, y = np.reshape(polygon, (-1, 2)).T
    area = abs(np.sum(x * np.roll(y, 1) - y * np.roll(x, 1))) / 2
    assert area == pytest.approx(coco_mask.area(found.rles([0])[0]), rel=1e-3)
    assert peak < 30 << 20


@pytest.mark.parametrize("mask_format", ["rle", "polygon"])
def test_no_bitmap_is_pasted_once_the_deadline_has_passed(mask_format: str) -> None:
    pasted: list[int] = []

    def paste(index: int) -> Window:
        pasted.append(index)
        while time.monotonic() < deadline:
            pass
        return np.ones((5, 5), bool), (0, 0)

    deadline = time.monotonic() + 0.05
    masks_until = Pasted(paste, (HEIGHT, WIDTH), deadline)
    with pytest.raises(LateError):
        to_coco(BOXES, SCORES, CLASSES, masks_until, COCO, Options(mask_format=mask_format))
    assert pasted == [1]


def test_outlines_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (np.indices((28, 28)).sum(0) % 2).astype(np.float32)[None].repeat(3, axis=0)
    boxes = np.array([[0, 0, 280, 280]] * 3, np.float32)
    most = len(masks.edges(checks[0], boxes[0], (280, 280))[0])
    found = Stretched(checks, boxes, (280, 280))
    for allowed, wanted in ((3 * most, 3), (3 * most - 1, None)):
        monkeypatch.setattr(finishing, "MOST_EDGES", allowed)
        refused = pytest.raises(ImageError, match="ask for mask_format rle")
        with contextlib.nullcontext() if wanted else refused as refusal:
            assert len(to_coco(boxes, SCORES, CLASSES, found, COCO, Options(mask_format="polygon"))) == wanted
    assert refusal.value.code is Code.TOO_LARGE
    assert len(to_coco(boxes, SCORES, CLASSES, found, COCO, Options())) == 3


def test_polygons_name_corners_only_and_stay_inside_the_image() -> None:
    (polygon,) = trace_polygons(whole(np.ones((50, 40), bool)))
    assert len(polygon) == 16  # a rectangle, its four corners cut by half a pixel
    assert min(polygon) == 0
    assert max(polygon[::2]) == 40
    assert max(polygon[1::2]) == 50


@pytest.mark.parametrize("mask", [np.zeros((5, 5), bool), np.zeros((0, 0), bool)])
def test_an_empty_mask_has_no_polygon(mask: np.ndarray) -> None:
    assert trace_polygons(whole(mask)) == []


@pytest.mark.parametrize("mask_format", ["rle", "polygon", "none"])
def test_pycocotools_loads_the_results(tmp_path: Path, mask_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = CocoDataset()
    dataset.dataset = {
        "info": {},
        "images": [{"id": 5, "height": HEIGHT, "width": WIDTH}],
        "annotations": [],
        "categories": [{"id": category.id, "name": category.name} for category in COCO],
    }
    dataset.createIndex()
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 5} | result for result in coco(Options(mask_format=mask_format))]))
    loaded = dataset.loadRes(str(path))
    annotations = loaded.loadAnns(loaded.getAnnIds(imgIds=[5], catIds=[13]))
    assert [annotation["bbox"] for annotation in annotations] == [[0, 0, 80, 60]]
    assert loaded.annToMask(annotations[0]).shape == (HEIGHT, WIDTH)
