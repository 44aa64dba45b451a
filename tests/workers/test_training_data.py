"""Training's data: the samples made of photographs and annotations, their batches, and what is bad about them."""
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from small_training import HEIGHT, WIDTH, Photograph, annotation, photographed, rectangle

from blendmaskd_workers.training.batches import Batches
from blendmaskd_workers.training.dataset import DataError, make_sample, read_dataset
from blendmaskd_workers.training.losses import semantic_loss

RESOLUTION = 28  # of masks in the small network

Mask = npt.NDArray[np.bool_]


def rle(mask: Mask, compressed: bool = True) -> dict[str, Any]:
    if compressed:
        encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}
    flat = mask.ravel(order="F")
    borders = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    runs = [end - start for start, end in pairwise(borders)]
    return {"size": list(mask.shape), "counts": [0] * bool(flat[0]) + runs}


def instance(mask: Mask, category: int = 3, compressed: bool = True, **more: Any) -> dict[str, Any]:
    """An annotation with an RLE and its tight box."""
    ys, xs = np.nonzero(mask)
    box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
    return annotation(rle(mask, compressed), box, category, **more)


def block(top: int, bottom: int, left: int, right: int) -> Mask:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


@pytest.fixture
def polygons(tmp_path) -> Photograph:
    return photographed(tmp_path, "polygon")


@pytest.fixture
def bitmaps(tmp_path) -> Photograph:
    return photographed(tmp_path, "bitmask")


def test_classes_are_the_categories_in_ascending_id(polygons) -> None:
    shape = rectangle(10, 8, 30, 28), [10, 8, 20, 20]
    sample = polygons.sample(*(annotation(*shape, category) for category in (9, 3, 7)))
    assert sample.truth.classes.tolist() == [2, 0, 1]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_targets_follow_the_resized_image(tmp_path, mask_format) -> None:
    photo = photographed(tmp_path, mask_format)
    sample = photo.sample(annotation(rectangle(10, 8, 30, 28), [10, 8, 40, 20], 7), min_size=2 * HEIGHT)
    assert sample.prepared.net_size == (2 * HEIGHT, 2 * WIDTH)
    assert sample.truth.boxes.tolist() == [[20, 16, 100, 56]]
    left_half = np.zeros((RESOLUTION, RESOLUTION))
    left_half[:, : RESOLUTION // 2] = 1
    np.testing.assert_array_equal(sample.truth.masks[0], left_half)
    painted = np.zeros((2 * HEIGHT, 2 * WIDTH))
    painted[16:56, 20:60] = 2
    np.testing.assert_array_equal(sample.truth.semantic, painted)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_flip_mirrors_everything(tmp_path, mask_format) -> None:
    photo = photographed(tmp_path, mask_format)
    # Two steps in a box of 28 x 28: exact in pixels and in the mask, and no symmetry.
    steps = [[10, 8, 38, 8, 38, 22, 17, 22, 17, 36, 10, 36]]
    item = annotation(steps, [10, 8, 28, 28], 9)
    plain, mirrored = (photo.sample(item, flip=flip) for flip in (False, True))
    assert torch.equal(mirrored.prepared.tensor, plain.prepared.tensor.flip(2))
    assert mirrored.truth.boxes.tolist() == [[WIDTH - 38, 8, WIDTH - 10, 36]]
    assert torch.equal(mirrored.truth.masks, plain.truth.masks.flip(2))
    assert not torch.equal(mirrored.truth.masks, plain.truth.masks)
    assert torch.equal(mirrored.truth.semantic, plain.truth.semantic.flip(1))
    assert mirrored.truth.classes.tolist() == plain.truth.classes.tolist()


def test_polygons_and_rle_agree(tmp_path) -> None:
    steps = block(8, 22, 10, 38) | block(22, 36, 10, 17)
    outline = annotation([[10, 8, 38, 8, 38, 22, 17, 22, 17, 36, 10, 36]], [10, 8, 28, 28])
    by_polygon = photographed(tmp_path, "polygon").sample(outline).truth
    bitmaps = photographed(tmp_path, "bitmask")
    np.testing.assert_array_equal(by_polygon.masks[0], steps[8:36, 10:38])
    for item in (outline, instance(steps), instance(steps, compressed=False)):
        truth = bitmaps.sample(item).truth
        assert torch.equal(truth.masks, by_polygon.masks)
        assert torch.equal(truth.boxes, by_polygon.boxes)
        assert torch.equal(truth.semantic, by_polygon.semantic)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_crowds_are_no_instances_but_painted(tmp_path, mask_format) -> None:
    photo = photographed(tmp_path, mask_format)
    crowd = instance(block(0, 8, 0, 60), 9, compressed=False, iscrowd=1)
    truth = photo.sample(crowd, annotation(rectangle(10, 20, 30, 30), [10, 20, 20, 10], 3)).truth
    assert truth.classes.tolist() == [0]
    assert truth.boxes.tolist() == [[10, 20, 30, 30]]
    assert len(truth.masks) == 1
    np.testing.assert_array_equal(truth.semantic, block(0, 8, 0, 60) * 3 + block(20, 30, 10, 30) * 1)


def test_empty_instances_are_dropped(bitmaps) -> None:
    good = instance(block(4, 20, 4, 20), 7)
    thin = annotation(rle(block(0, 8, 0, 8)), [5, 5, 0, 8])
    outside = annotation(rle(block(0, 8, 0, 8)), [WIDTH + 1, 5, 9, 8])
    blank = annotation(rle(block(0, 0, 0, 0)), [5, 5, 8, 8])
    truth = bitmaps.sample(thin, good, outside, blank).truth
    assert truth.classes.tolist() == [1]
    assert truth.boxes.tolist() == [[4, 4, 20, 20]]
    nothing = bitmaps.sample(thin, blank).truth
    assert nothing.boxes.shape == (0, 4)
    assert nothing.masks.shape == (0, RESOLUTION, RESOLUTION)


def test_boxes_are_clipped_to_the_image(polygons) -> None:
    truth = polygons.sample(annotation(rectangle(-5, 30, 20, 50), [-5, 30, 25, 20])).truth
    assert truth.boxes.tolist() == [[0, 30, 20, 40]]


def test_images_without_instances_are_left_out(bitmaps) -> None:
    two = [{"id": number, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH} for number in (1, 2)]
    crowd = instance(block(0, 9, 0, 9), iscrowd=1)
    item = instance(block(0, 9, 0, 9)) | {"image_id": 2}
    [entry] = bitmaps.read(crowd, item, images=two).entries
    assert [part.crowd for part in entry.annotations] == [False]
    bitmaps.config = replace(bitmaps.config, filter_empty=False)
    assert len(bitmaps.read(crowd, item, images=two).entries) == 2


def test_later_annotations_are_painted_over_earlier_ones(bitmaps) -> None:
    below, above = block(0, 20, 0, 30), block(10, 30, 10, 50)
    semantic = bitmaps.sample(instance(below, 3), instance(above, 9)).truth.semantic
    np.testing.assert_array_equal(semantic, np.where(above, 3, below * 1))
    semantic = bitmaps.sample(instance(above, 9), instance(below, 3)).truth.semantic
    np.testing.assert_array_equal(semantic, np.where(below, 1, above * 3))


def test_semantic_cells_are_their_top_left_pixel_and_padding_is_background(bitmaps) -> None:
    single = np.zeros((HEIGHT, WIDTH), bool)
    single[8, 16] = True  # alone in its cell, but at its corner
    others = block(0, 40, 33, 40)  # all of a cell but its first column
    truth = bitmaps.sample(instance(single, 7), instance(others, 9)).truth
    right = torch.zeros(1, 8, 8, dtype=torch.int64)  # of an image padded to 64 x 64
    right[0, 1, 2] = 2
    logits = torch.nn.functional.one_hot(right, 4).permute(0, 3, 1, 2) * 100.0
    assert semantic_loss(logits, [truth]).item() < 1e-6
    assert semantic_loss(logits.flip(2), [truth]).item() == pytest.approx(2 * 100 / 64)


# -- batches ----------------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_iteration_only(bitmaps) -> None:
    images = [{"id": number, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH} for number in range(1, 8)]
    items = [instance(block(0, 9, 0, number)) | {"image_id": number} for number in range(1, 8)]
    dataset = bitmaps.read(*items, images=images)
    config = replace(bitmaps.config, batch=2, min_sizes=(32, 48))
    batches, again, other = (Batches(dataset, bitmaps.network, config, seed) for seed in (1, 1, 2))
    for epoch in range(3):
        seen = [index for iteration in range(3) for index in batches.indices(epoch * 3 + iteration)]
        assert len(set(seen)) == len(seen) == 6  # each once, but what is left over
    orders = [[each.indices(iteration) for iteration in range(9)] for each in (batches, again, other)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:3] != orders[0][3:6]
    loaded = list(batches.ahead(range(4, 7)))
    for iteration, batch in zip(range(4, 7), loaded):
        alone = again.load(iteration)
        assert torch.equal(alone.images, batch.images)
        assert all(torch.equal(one.boxes, two.boxes) for one, two in zip(alone.truths, batch.truths))


def test_sizes_and_flips_are_drawn_anew(bitmaps) -> None:
    dataset = bitmaps.read(instance(block(0, 9, 0, 9)))
    config = replace(bitmaps.config, batch=1, min_sizes=(HEIGHT, 2 * HEIGHT), flip=True)
    batches = Batches(dataset, bitmaps.network, config, 0)
    boxes = [truth.boxes for iteration in range(20) for truth in batches.load(iteration).truths]
    drawn = {(int(box[0, 3]) // 9, bool(box[0, 0] > 0)) for box in boxes}  # scale, flipped
    assert drawn == {(scale, flipped) for scale in (1, 2) for flipped in (False, True)}
    never = Batches(dataset, bitmaps.network, replace(config, flip=False), 0)
    assert not any(never.load(iteration).truths[0].boxes[0, 0] > 0 for iteration in range(20))


def test_a_data_set_smaller_than_a_batch_fills_it(bitmaps) -> None:
    dataset = bitmaps.read(instance(block(0, 9, 0, 9)))
    batches = Batches(dataset, bitmaps.network, replace(bitmaps.config, batch=3), 0)
    assert batches.indices(5) == [0, 0, 0]


# -- bad data ---------------------------------------------------------------------------------------------------------

GOOD = annotation(rectangle(10, 8, 30, 28), [10, 8, 20, 20])
WRONG_RLE = {"size": [4, 5], "counts": [0, 20]}
BAD_ANNOTATIONS = [
    pytest.param({"segmentation": None}, ["annotation 2", "segmentation"], id="no segmentation"),
    pytest.param({"segmentation": [1, 2, 3, 4, 5, 6]}, ["annotation 2", "segmentation"], id="no list of polygons"),
    pytest.param({"segmentation": [[1, 2, 3, 4, 5, 3.5e8]]}, ["annotation 2", "segmentation"], id="far outside"),
    pytest.param({"segmentation": [[1, 2, 3, 4, 5, None]]}, ["annotation 2", "segmentation"], id="no number"),
    pytest.param({"category_id": 4}, ["annotation 2", "category_id 4"], id="unknown category"),
    pytest.param({"category_id": None}, ["annotation 2", "category_id None"], id="no category"),
    pytest.param({"bbox": [1, 2, 3]}, ["annotation 2", "bbox", "[1, 2, 3]"], id="short box"),
    pytest.param({"bbox": [1, 2, float("nan"), 4]}, ["annotation 2", "bbox"], id="box not finite"),
    pytest.param({"image_id": 5}, ["annotation 2", "image_id 5"], id="unknown image"),
    pytest.param({"image_id": [1]}, ["annotation 2", "image_id [1]"], id="image_id a list"),
    pytest.param({"segmentation": rle(block(0, 9, 0, 9))}, ["annotation 2", "INPUT.MASK_FORMAT"], id="RLE"),
    pytest.param({"segmentation": WRONG_RLE, "iscrowd": 1}, ["annotation 2", "[4, 5]", "[40, 60]"], id="RLE size"),
    pytest.param({"segmentation": {"size": [40, 60], "counts": [0, 20]}, "iscrowd": 1},
                 ["annotation 2", "segmentation"], id="RLE too short"),
    pytest.param({"segmentation": {"size": [40, 60], "counts": ["x"]}, "iscrowd": 1},
                 ["annotation 2", "segmentation"], id="RLE of text"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), BAD_ANNOTATIONS)
def test_bad_annotations_are_named(polygons, change, told) -> None:
    with pytest.raises(DataError) as caught:
        polygons.read(GOOD, GOOD | change)
    for part in (str(polygons.file), *told):
        assert part in str(caught.value)


@pytest.mark.parametrize("unusable", [
    pytest.param([], id="no polygon"), pytest.param([[]], id="an empty polygon"),
    pytest.param([[1, 2, 3, 4]], id="two points"), pytest.param([[1, 2, 3, 4, 5, 6, 7]], id="an odd number"),
    pytest.param([[1, 2, 3, 4, 5, 6]], id="a line"), pytest.param([[1, 2, 3, 4], [5, 6]], id="nothing in each"),
])  # fmt: skip
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_that_enclose_nothing_are_left_out_and_counted(tmp_path, mask_format, unusable) -> None:
    photo = photographed(tmp_path, mask_format)
    dataset = photo.read(GOOD, GOOD | {"segmentation": unusable}, GOOD)
    assert [len(entry.annotations) for entry in dataset.entries] == [2]
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("1 of 3 annotations are left out")
    with pytest.raises(DataError, match=r"no image with instances: 1 of 1 annotations are left out"):
        photo.read(GOOD | {"segmentation": unusable or [[]]})


def test_a_polygon_that_encloses_nothing_is_left_out_of_a_mask_that_has_others(polygons) -> None:
    parts = [[1, 2, 3, 4], *GOOD["segmentation"], [5, 5, 9, 5, 7, 5]]
    dataset = polygons.read(GOOD | {"segmentation": parts})
    assert dataset.notes == ("2 polygons are left out of masks that have others: they enclose nothing",)
    [entry] = dataset.entries
    assert [part.tolist() for part in entry.annotations[0].segmentation] == GOOD["segmentation"]


def test_boxes_without_width_or_height_are_counted(polygons) -> None:
    notes = polygons.read(GOOD, GOOD | {"bbox": [10, 8, 0, 20]}, GOOD | {"bbox": [WIDTH + 5, 0, 9, 9]}).notes
    assert [note.split(" ")[0] for note in notes] == ["2"]


def test_a_thin_box_beside_a_large_polygon_costs_no_memory(polygons) -> None:
    """Scaled to the box, the polygon would be drawn in a billion steps."""
    wide = [-500, -300, 600, -300, 600, 400] * 60
    sample = polygons.sample(GOOD, GOOD | {"bbox": [10, 8, 2e-5, 2e-5], "segmentation": [wide]})
    assert len(sample.truth.masks) == 1


IMAGE = {"id": 1, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH}
BAD_TREES = [
    pytest.param({"images": [IMAGE | {"file_name": "gone.png"}]}, ["image 1", "no file", "gone.png"], id="no file"),
    pytest.param({"images": [{"id": 1, "file_name": "photo.png"}]}, ["image 1", "height"], id="no size"),
    pytest.param({"images": [{"file_name": "photo.png"}]}, ["id None", "photo.png"], id="no id"),
    pytest.param({"images": [IMAGE | {"id": {}}, IMAGE]}, ["id {}", "photo.png"], id="id an object"),
    pytest.param({"images": [IMAGE, IMAGE]}, ["image 1", "twice"], id="the same id twice"),
    pytest.param({"images": None}, ['"images"'], id="no images"),
    pytest.param({"annotations": [1]}, ['"annotations"'], id="annotation no object"),
    pytest.param({"annotations": []}, ["no image with instances"], id="nothing to learn"),
    pytest.param({"categories": []}, ["categories"], id="no categories"),
    pytest.param({"annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]},
                 ["no annotation has a segmentation"], id="boxes alone"),
]


@pytest.mark.parametrize(("tree", "told"), BAD_TREES)
def test_bad_files_are_named(polygons, tree, told) -> None:
    with pytest.raises(DataError) as caught:
        polygons.read(GOOD, **tree)
    for part in (str(polygons.file), *told):
        assert part in str(caught.value)


@pytest.mark.parametrize("content", ['{"images": [', "\xff", ""])
def test_broken_json_is_named(polygons, content) -> None:
    polygons.file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"instances\.json"):
        read_dataset(polygons.file, polygons.folder, polygons.config)


def test_broken_photograph_is_named(polygons) -> None:
    [entry] = polygons.read(GOOD).entries
    entry.path.write_bytes(entry.path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"photo\.png: cannot be decoded"):
        make_sample(entry, polygons.network, polygons.config, HEIGHT, False)
    entry.path.unlink()
    with pytest.raises(DataError, match=r"photo\.png: No such file"):
        make_sample(entry, polygons.network, polygons.config, HEIGHT, False)


def test_photograph_of_another_size_is_named(polygons) -> None:
    [entry] = polygons.read(GOOD, images=[IMAGE | {"height": WIDTH, "width": HEIGHT}]).entries
    with pytest.raises(DataError, match=r"photo\.png: is 60 x 40 pixels, the annotations say 40 x 60"):
        make_sample(entry, polygons.network, polygons.config, HEIGHT, False)


def test_a_photograph_of_54_megapixels_is_trained_on(polygons) -> None:
    Image.new("RGB", (9000, 6000), (90, 120, 30)).save(polygons.folder / "photo.png")
    large = [IMAGE | {"height": 6000, "width": 9000}]
    [entry] = polygons.read(annotation(rectangle(900, 600, 4500, 3000), [900, 600, 3600, 2400]), images=large).entries
    sample = make_sample(entry, polygons.network, polygons.config, HEIGHT, False)
    assert sample.prepared.net_size == (HEIGHT, WIDTH)
    assert sample.truth.boxes.tolist() == [[6, 4, 30, 20]]


def test_damaged_rle_is_named(bitmaps) -> None:
    damaged = annotation(rle(np.ones((2 * HEIGHT, WIDTH), bool)) | {"size": [HEIGHT, WIDTH]}, [0, 0, 9, 9])
    with pytest.raises(DataError, match=r"photo\.png: .*RLE"):
        bitmaps.sample(damaged)
