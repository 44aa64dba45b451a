"""The rendered data set: what is in it, that its annotations say the truth, that it can be made again."""
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.coco import COCO

import shapes
from blendmaskd.coco import categories
from blendmaskd_workers import blendmask
from shapes import CATEGORIES, Scene

DEMO = Path(__file__).resolve().parents[2] / "configs/demo"
COUNTS = {"train": 6, "held_out": 3}

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "new"
    shapes.make(folder, COUNTS, seed=3)
    return folder


@cache
def scenes() -> list[Scene]:
    return [shapes.render(1, "train", number) for number in range(1, 41)]


def lying_on_top() -> list[tuple[str, Mask]]:
    """Category and mask of shapes that nothing hides and no border cuts."""
    last = [scene.instances[-1] for scene in scenes()]
    whole = [each for each in last if not frame(each.visible).any()]
    return [(CATEGORIES[each.category], each.visible) for each in whole]


def frame(mask: Mask) -> Mask:
    """The pixels at the border."""
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


def hole(mask: Mask) -> int:
    """Pixels that the mask encloses."""
    image = Image.fromarray(np.pad(mask, 1).astype(np.uint8)).copy()  # the array's own memory is read-only
    ImageDraw.floodfill(image, (0, 0), 1)
    return int((np.asarray(image) == 0).sum())


# -- what is in an image ----------------------------------------------------------------------------------------------


def test_sizes_and_counts_are_as_announced() -> None:
    for scene in scenes():
        height, width = scene.pixels.shape[:2]
        assert 240 <= height <= 400
        assert 240 <= width <= 400
        assert 2 <= len(scene.instances) <= 8
    assert {scene.pixels.shape[0] > scene.pixels.shape[1] for scene in scenes()} == {True, False}
    assert {each.category for scene in scenes() for each in scene.instances} == set(range(len(CATEGORIES)))


def test_a_whole_shape_is_28_to_170_pixels_long() -> None:
    longest = [max(np.ptp(np.nonzero(mask), axis=1)) + 1 for _, mask in lying_on_top()]
    assert 27 <= min(longest) < 45
    assert 100 < max(longest) <= 171


def test_what_one_shape_hides_belongs_to_no_other() -> None:
    hidden = 0
    for scene in scenes():
        assert np.sum([each.visible for each in scene.instances], axis=0).max() == 1
        boxes = [shapes.annotate(each)["bbox"] for each in scene.instances]
        hidden += sum(rle.iou([box], [other], [0]).item() > 0 for box, other in pairwise(boxes))
    assert hidden, "no shapes overlap"


def test_enough_of_every_shape_is_visible() -> None:
    """A square of 28 pixels, turned, covers 28² / 2; a thin star less; half of that must be left."""
    assert min(each.visible.sum() for scene in scenes() for each in scene.instances) > 28**2 / 8


@pytest.mark.slow
def test_the_hole_of_a_ring_is_no_part_of_its_mask_and_nothing_else_has_one() -> None:
    holes = [(name, hole(mask) / mask.sum()) for name, mask in lying_on_top()]
    assert all(share > 0.2 if name == "ring" else share == 0 for name, share in holes), holes
    assert {name for name, _ in holes} == set(CATEGORIES)


def test_the_picture_changes_where_the_masks_end() -> None:
    """Twice as much as two pixels further in: a mask that is off by a pixel fails."""
    at_edge: list[float] = []
    inside: list[float] = []
    for scene in scenes():
        brightness = scene.pixels.astype(float)
        change = np.abs(np.diff(brightness, axis=1)).sum(axis=-1)  # between a pixel and the next in its row
        for each in scene.instances:
            ends = np.diff(each.visible.astype(int), axis=1) == -1
            at_edge += list(change[ends])
            inside += list(change[:, :-2][ends[:, 2:]])
    assert np.mean(at_edge) > 2 * np.mean(inside)


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", COUNTS)
def test_annotations_are_coco_and_say_the_truth(made: Path, split: str) -> None:
    truth = COCO(made / f"{split}.json")
    assert sorted(file.name for file in (made / "images" / split).iterdir()) == [
        f"{number:04}.jpg" for number in range(1, COUNTS[split] + 1)
    ]
    assert [truth.cats[number]["name"] for number in sorted(truth.cats)] == list(CATEGORIES)
    for image in truth.imgs.values():
        with Image.open(made / "images" / split / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
    assert {annotation["image_id"] for annotation in truth.anns.values()} == set(truth.imgs)
    for annotation in truth.anns.values():
        rows, columns = np.nonzero(truth.annToMask(annotation))
        left, top, width, height = annotation["bbox"]
        assert (columns.min(), rows.min()) == (left, top)
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (width, height)
        assert annotation["area"] == len(rows)
        assert annotation["iscrowd"] == 0


def test_the_pictures_in_the_files_are_the_annotated_ones(made: Path) -> None:
    tree = json.loads((made / "train.json").read_text())
    for image in tree["images"]:
        scene = shapes.render(3, "train", image["id"])
        with Image.open(made / "images/train" / image["file_name"]) as opened:
            assert np.abs(np.asarray(opened).astype(int) - scene.pixels).mean() < 8  # of 255: JPEG's loss
        given = [each for each in tree["annotations"] if each["image_id"] == image["id"]]
        expected = [shapes.annotate(instance) for instance in scene.instances]
        assert [{key: each[key] for key in expected[0]} for each in given] == expected
        names = {each["id"]: each["name"] for each in tree["categories"]}
        assert [names[each["category_id"]] for each in given] == [CATEGORIES[each.category] for each in scene.instances]


def test_the_same_seed_makes_the_same_bytes_and_more_images_change_none(made: Path, tmp_path: Path) -> None:
    shapes.make(tmp_path, {"train": 7, "held_out": 3}, seed=3)
    for path in [*made.glob("images/*/*.jpg"), made / "held_out.json"]:
        assert (tmp_path / path.relative_to(made)).read_bytes() == path.read_bytes()
    assert (tmp_path / "train.json").read_bytes() != (made / "train.json").read_bytes()


def test_seeds_splits_and_numbers_differ() -> None:
    scenes = [shapes.render(*each) for each in [(3, "train", 1), (4, "train", 1), (3, "held_out", 1), (3, "train", 2)]]
    assert len({scene.pixels.tobytes() for scene in scenes}) == 4


def test_nothing_is_overwritten(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shapes.main(["--output", str(made), "--train", "1", "--held-out", "1"]) == 1
    assert "images/train" in capsys.readouterr().err
    assert len(list(made.glob("images/train/*"))) == COUNTS["train"]


# -- the demo that learns from it -------------------------------------------------------------------------------------


def test_the_demo_knows_these_categories() -> None:
    found = categories.load(DEMO / "categories.json")
    assert [(each.id, each.name) for each in found] == list(enumerate(CATEGORIES, 1))
    config = yaml.safe_load((DEMO / "demo.yaml").read_text())
    assert config["MODEL"]["FCOS"]["NUM_CLASSES"] == len(CATEGORIES)
    assert config["MODEL"]["BASIS_MODULE"]["NUM_CLASSES"] == len(CATEGORIES)


def test_the_weights_of_the_demo_are_at_most_12_megabytes() -> None:
    with torch.device("meta"):
        network = blendmask.build(blendmask.load_config(DEMO / "demo.yaml"))
    sizes = [each.numel() * each.element_size() for each in network.state_dict().values()]
    assert 5e6 < sum(sizes) < 12e6
