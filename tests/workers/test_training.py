"""Training: its schedule, its samples, what it refuses, and a real one that is interrupted and goes on."""
from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from PIL import Image
from pycocotools import mask as coco_mask

import shapes
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_USAGE
from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import Config, ConfigError
from blendmaskd_workers.training import program
from blendmaskd_workers.training.batches import Batch, Batches
from blendmaskd_workers.training.config import TrainingConfig, load_training_config
from blendmaskd_workers.training.dataset import DataError, Dataset, Sample, make_sample, read_dataset
from blendmaskd_workers.training.initial import initialise
from blendmaskd_workers.training.losses import semantic_loss
from blendmaskd_workers.training.trainer import Diverged, Trainer, TrainingError, learning_rate
from checkout import ROOT

SMALL = ROOT / "tests" / "golden" / "small_R18.yaml"
HEIGHT, WIDTH = 40, 60  # of the photograph in most tests
CATEGORIES = [{"id": 9, "name": "moth"}, {"id": 3, "name": "bee"}, {"id": 7, "name": "fly"}]  # classes 2, 0, 1
RESOLUTION = 28  # of masks in the small network

Mask = npt.NDArray[np.bool_]


@pytest.fixture(scope="module", autouse=True)
def _process():
    """What the program sets for its process is undone."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


def configure(folder: Path, keys: dict[str, Any] | None = None, name: str = "network.yaml") -> Path:
    """The small network's configuration with these keys (dotted) over it, as a file."""
    tree = yaml.safe_load(SMALL.read_text())
    for key, value in (keys or {}).items():
        *above, last = key.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


# -- learning rate and optimiser --------------------------------------------------------------------------------------


def scheduled(folder: Path, **solver: Any) -> TrainingConfig:
    return load_training_config(configure(folder, {f"SOLVER.{key}": value for key, value in solver.items()}))


def test_learning_rate_of_warm_up_and_steps(tmp_path) -> None:
    config = scheduled(tmp_path, BASE_LR=0.01, WARMUP_ITERS=1000, WARMUP_FACTOR=0.001, STEPS="(60000, 80000)",
                       MAX_ITER=90000)  # fmt: skip
    rates = {0: 1e-5, 500: 0.005005, 999: 0.00999001, 1000: 0.01, 59999: 0.01, 60000: 0.001, 79999: 0.001,
             80000: 0.0001, 89999: 0.0001}  # fmt: skip
    assert {iteration: learning_rate(iteration, config) for iteration in rates} == pytest.approx(rates)


def test_learning_rate_without_warm_up(tmp_path) -> None:
    config = scheduled(tmp_path, BASE_LR=0.02, WARMUP_ITERS=0, STEPS=[10], GAMMA=0.5)
    assert [learning_rate(iteration, config) for iteration in (0, 9, 10)] == pytest.approx([0.02, 0.02, 0.01])


def test_learning_rate_of_the_cosine(tmp_path) -> None:
    config = scheduled(tmp_path, LR_SCHEDULER_NAME="WarmupCosineLR", BASE_LR=0.1, BASE_LR_END=0.02, MAX_ITER=100,
                       WARMUP_ITERS=20, WARMUP_FACTOR=0.5)  # fmt: skip
    at_20 = 0.02 + 0.08 * (1 + math.cos(math.pi * 0.2)) / 2  # where the warm-up meets the schedule
    rates = {0: 0.05, 10: (0.05 + at_20) / 2, 20: at_20, 50: 0.06, 100: 0.02}
    assert {iteration: learning_rate(iteration, config) for iteration in rates} == pytest.approx(rates)


def test_weight_decay_and_frozen_stages(tmp_path) -> None:
    path = configure(tmp_path, {"MODEL.BACKBONE.FREEZE_AT": 2, "SOLVER.WEIGHT_DECAY": 0.5,
                                "SOLVER.WEIGHT_DECAY_NORM": 0.25, "SOLVER.WEIGHT_DECAY_BIAS": 0.125})  # fmt: skip
    model = blendmask.build(blendmask.load_config(path))
    trainer = Trainer(model, load_training_config(path))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[group["params"][0]]: group["weight_decay"] for group in trainer.optimizer.param_groups}
    assert decay["proposal_generator.fcos_head.cls_tower.0.weight"] == 0.5
    assert decay["proposal_generator.fcos_head.cls_tower.0.bias"] == 0.125
    assert decay["proposal_generator.fcos_head.cls_tower.1.weight"] == 0.25
    assert decay["proposal_generator.fcos_head.cls_tower.1.bias"] == 0.25
    assert "backbone.bottom_up.res3.0.conv1.weight" in decay
    frozen = {name.split(".")[2] for name in names.values() if name not in decay}
    assert frozen == {"stem", "res2"}


@pytest.mark.parametrize(("freeze_at", "frozen"), [
    (-1, set()), (0, set()), (1, {"base_layer", "level0", "level1"}), (2, {"base_layer", "level0", "level1", "level2"}),
])  # fmt: skip
def test_stages_of_dla_are_frozen_by_their_stride(tmp_path, freeze_at, frozen) -> None:
    path = tmp_path / "dla.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(ROOT / "configs" / "BlendMask" / "DLA_34_syncbn_4x.yaml"),
                                    "MODEL": {"BACKBONE": {"FREEZE_AT": freeze_at}}}))
    model = blendmask.build(blendmask.load_config(path))
    Trainer(model, load_training_config(path))
    parts = dict(model.backbone.bottom_up.named_children())
    assert {name for name, part in parts.items() if not any(each.requires_grad for each in part.parameters())} == frozen
    assert {name for name, part in parts.items() if not part.training} == frozen


@pytest.mark.parametrize("name", ["R_50_1x", "R_50_3x", "RT_R_50_4x_syncbn_shtw", "DLA_34_syncbn_4x"])
def test_adelaidets_own_configurations_are_read(name) -> None:
    path = ROOT / "configs" / "BlendMask" / f"{name}.yaml"
    levels = len(blendmask.load_config(path).strides)
    assert len(load_training_config(path).losses.size_bounds) == levels - 1


@pytest.mark.parametrize("keys", [
    {"MODEL.FCOS.SIZES_OF_INTEREST": [64, 128]}, {"MODEL.FCOS.TOP_LEVELS": 0},
])  # fmt: skip
def test_sizes_of_more_or_fewer_levels_than_there_are_are_refused(tmp_path, keys) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.FCOS\.SIZES_OF_INTEREST = .* levels"):
        load_training_config(configure(tmp_path, keys))


def small_trainer(folder: Path, **solver: Any) -> tuple[Trainer, Batch]:
    """A trainer of the small network, and a batch of one photograph."""
    path = configure(folder, {f"SOLVER.{key}": value for key, value in solver.items()})
    config = replace(load_training_config(path), batch=1, min_sizes=(64,))
    photo = photographed(folder, "polygon")
    dataset = photo.read(annotation(rectangle(10, 8, 30, 28), [10, 8, 20, 20]))
    torch.manual_seed(0)
    model = blendmask.build(photo.network)
    initialise(model, 0.01)
    return Trainer(model, config), Batches(dataset, photo.network, config, 0).load(0)


@pytest.mark.parametrize(("kind", "norm"), [("value", torch.inf), ("norm", 2.0)])
def test_clipping_bounds_each_gradient(tmp_path, kind, norm) -> None:
    clip = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": 0.001, "NORM_TYPE": 2.0}
    trainer, batch = small_trainer(tmp_path, CLIP_GRADIENTS=clip)
    trainer.step(batch)
    found = [torch.linalg.vector_norm(parameter.grad, norm).item() for parameter in trainer.model.parameters()
             if parameter.grad is not None]  # fmt: skip
    assert max(found) == pytest.approx(0.001, rel=1e-2)  # PyTorch leaves a little room to divide by
    assert sum(value > 0.0005 for value in found) > len(found) / 4  # each by itself: not one norm for all of them


def test_losses_that_are_not_finite_end_the_training(tmp_path) -> None:
    trainer, batch = small_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.top_layer.weight.fill_(torch.nan)
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    with pytest.raises(TrainingError, match=r"iteration 0: .*loss_mask.*SOLVER\.BASE_LR"):
        trainer.step(batch)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.named_parameters()
               if key != "top_layer.weight")  # fmt: skip


class DiskQuota:
    """Files of this process end at a mebibyte: a checkpoint is longer, as on a disk that is full."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path) -> None:
    trainer, _ = small_trainer(tmp_path)
    checkpoint = program.Checkpoint(tmp_path / "out.pth", 0)
    trainer.iteration = 4
    checkpoint.save(trainer)
    before, there = checkpoint.path.read_bytes(), set(tmp_path.iterdir())
    trainer.iteration = 6
    with DiskQuota():
        with pytest.raises(program.CannotSave, match=r"out\.pth cannot be saved: File too large$"):
            checkpoint.save(trainer)
        told = checkpoint.keep(trainer, OSError("the log cannot be written"))
    kept = f"4 iterations are kept in {checkpoint.path}, from which --resume goes on"
    assert told == f"{checkpoint.path} cannot be saved: File too large; {kept}"
    assert checkpoint.path.read_bytes() == before
    assert set(tmp_path.iterdir()) == there
    assert checkpoint.keep(trainer, RuntimeError("out of memory")) == kept.replace("4", "6", 1)
    assert torch.load(checkpoint.path, weights_only=True)["iteration"] == 6


def test_weights_of_losses_that_are_not_finite_do_not_replace_good_ones(tmp_path) -> None:
    trainer, _ = small_trainer(tmp_path)
    checkpoint = program.Checkpoint(tmp_path / "out.pth", 0)
    trainer.iteration = 4
    assert checkpoint.keep(trainer, Diverged("nan")) == "there is no checkpoint yet"
    assert not checkpoint.path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_stop_wait_for_the_end_of_a_step(number) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with program._stop_signals() as stopped:
            signal.raise_signal(number)
            assert stopped == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_terminal_that_goes_does_not_stop_what_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with program._stop_signals() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert stopped == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_initial_weights(tmp_path) -> None:
    model = small_trainer(tmp_path)[0].model
    head = model.proposal_generator.fcos_head
    assert head.cls_logits.bias.tolist() == pytest.approx([-math.log(99)] * 3)
    for conv in (head.cls_tower[0], head.bbox_tower[0], model.top_layer):
        assert conv.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not conv.bias.any()
    spreads = {  # by fan in, uniform, and by fan out, normal
        model.backbone.fpn_lateral5: 1 / math.sqrt(512),
        model.basis_module.refine[0][0]: 1 / math.sqrt(64 * 9),
        model.backbone.bottom_up.res4[0].conv1: math.sqrt(2 / (256 * 9)),
    }
    for conv, spread in spreads.items():
        assert conv.weight.std().item() == pytest.approx(spread, rel=0.05)


def test_deformable_convolutions_start_as_ordinary_ones(tmp_path) -> None:
    model = blendmask.build(blendmask.load_config(configure(tmp_path, {
        "MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, False, False],
        "MODEL.RESNETS.DEFORM_MODULATED": True, "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    })))  # fmt: skip
    initialise(model, 0.01)
    block = model.backbone.bottom_up.res3[0]
    assert not block.conv2_offset.weight.any()
    assert not block.conv2_offset.bias.any()
    assert block.conv2.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)


# -- samples ----------------------------------------------------------------------------------------------------------


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def annotation(segmentation: Any, bbox: list[float], category: int = 3, **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "segmentation": segmentation, "bbox": bbox, "category_id": category, "iscrowd": 0, **more}


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


@dataclass
class Photograph:
    """A data set of one image."""

    folder: Path
    network: Config
    config: TrainingConfig

    def read(self, *annotations: dict[str, Any], **tree: Any) -> Dataset:
        """The data set of these annotations, with ids from 1; `tree` replaces whole lists of the file."""
        numbered = [{"id": number, **item} for number, item in enumerate(annotations, 1)]
        content = {"images": [{"id": 1, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH}],
                   "annotations": numbered, "categories": CATEGORIES, **tree}  # fmt: skip
        self.file.write_text(json.dumps(content))
        return read_dataset(self.file, self.folder, self.config)

    def sample(self, *annotations: dict[str, Any], min_size: int = HEIGHT, flip: bool = False) -> Sample:
        [entry] = self.read(*annotations).entries
        return make_sample(entry, self.network, self.config, min_size, flip)

    @property
    def file(self) -> Path:
        return self.folder / "instances.json"


def photographed(folder: Path, mask_format: str) -> Photograph:
    path = configure(folder, {"INPUT.MASK_FORMAT": mask_format})
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return Photograph(folder, blendmask.load_config(path), load_training_config(path))


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


# -- the program ------------------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {
    "MODEL.FCOS.NUM_CLASSES": len(shapes.CATEGORIES),
    "MODEL.BASIS_MODULE.NUM_CLASSES": len(shapes.CATEGORIES),
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",  # whose running statistics must survive an interruption too
    "INPUT.MASK_FORMAT": "bitmask",
    "INPUT.MIN_SIZE_TRAIN": [64, 96],
    "INPUT.MAX_SIZE_TRAIN": 128,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.STEPS": [4],
    "SOLVER.CHECKPOINT_PERIOD": 2,
}
INTERRUPTED = 130
KEPT, DONE_AGAIN = 123.0, 456.0  # losses in the log of the training that is resumed


@dataclass
class Trained:
    """The same training three times: interrupted, resumed to its end, and never interrupted."""

    exit_code: int  # of the one that was interrupted
    told: str
    interrupted_at: int  # iterations
    max_iter: int
    resumed: Path
    whole: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert shapes.main(["--output", str(folder), "--train", "6", "--held-out", "1", "--seed", "5"]) == 0
    return folder


def arguments(data: Path, config: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--images", str(data / "images" / "train"), "--annotations",
            str(data / "train.json"), "--output-dir", str(output), "--threads", "1", "--seed", "3", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, wait_until) -> Trained:
    """The process is interrupted some iterations after its first checkpoint; the end is two iterations later."""
    folder = tmp_path_factory.mktemp("trained")
    resumed, whole = folder / "resumed", folder / "whole"
    endless = configure(folder, KEYS | {"SOLVER.MAX_ITER": 100_000}, "endless.yaml")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments(data, endless, resumed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (resumed / program.CHECKPOINT).exists() or process.poll() is not None, 60)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (resumed / program.CHECKPOINT).exists(), told
    done = torch.load(resumed / program.CHECKPOINT, weights_only=True)["iteration"]
    with (resumed / program.LOG).open("a") as log:  # as if it had been killed, one iteration later
        for iteration, loss in ((done, KEPT), (done + 1, DONE_AGAIN)):
            log.write(json.dumps({"iteration": iteration, "total_loss": loss, "lr": 0.1}) + "\n")
    config = configure(folder, KEYS | {"SOLVER.MAX_ITER": done + 2}, "ending.yaml")
    assert program.main(arguments(data, config, resumed, "--resume")) == 0
    assert program.main(arguments(data, config, whole)) == 0
    return Trained(process.returncode, told, done, done + 2, resumed, whole)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / program.FINAL, weights_only=True)["model"]
    return found


@pytest.mark.slow
def test_an_interrupted_training_says_how_to_go_on(trained) -> None:
    assert trained.exit_code == INTERRUPTED
    assert f"interrupted after {trained.interrupted_at} iterations; --resume goes on" in trained.told
    assert "Traceback" not in trained.told


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(trained) -> None:
    resumed, whole = weights(trained.resumed), weights(trained.whole)
    assert resumed.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
    states = [torch.load(folder / program.CHECKPOINT, weights_only=True) for folder in (trained.resumed, trained.whole)]
    momenta = [{key: value["momentum_buffer"] for key, value in state["optimizer"]["state"].items()}
               for state in states]  # fmt: skip
    assert momenta[0].keys() == momenta[1].keys() != set()
    assert all(torch.equal(momenta[0][key], momenta[1][key]) for key in momenta[0])
    assert [state["iteration"] for state in states] == [trained.max_iter] * 2


def test_a_resumed_training_forgets_log_lines_of_what_it_does_again(trained) -> None:
    lines = [json.loads(line) for line in (trained.resumed / "log.jsonl").read_text().splitlines()]
    assert KEPT in [line["total_loss"] for line in lines]
    assert DONE_AGAIN not in [line["total_loss"] for line in lines]
    assert lines[-1]["iteration"] == trained.max_iter


def test_training_changes_the_weights(trained) -> None:
    state, final = torch.load(trained.whole / program.CHECKPOINT, weights_only=True)["model"], weights(trained.whole)
    assert all(torch.equal(state[key], final[key]) for key in final)
    torch.manual_seed(3)
    model = blendmask.build(blendmask.load_config(trained.whole.parent / "ending.yaml"))
    initialise(model, 0.01)
    assert [key for key, value in model.state_dict().items() if torch.equal(value, final[key])] == []


def test_final_weights_load_strictly(trained) -> None:
    model = blendmask.build(blendmask.load_config(trained.whole.parent / "ending.yaml"))
    model.load_state_dict(weights(trained.whole), strict=True)
    blendmask.load_into(model, blendmask.load_checkpoint(trained.whole / program.FINAL))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_output_files(trained) -> None:
    names = json.loads((trained.whole / "categories.json").read_text())
    assert names == [{"id": number, "name": name} for number, name in enumerate(shapes.CATEGORIES, 1)]
    [entry] = [json.loads(line) for line in (trained.whole / "log.jsonl").read_text().splitlines()]
    losses = {name for name in entry if "loss" in name}
    assert losses == {"total_loss", "loss_basis_sem", "loss_mask", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(math.isfinite(value) for value in entry.values())
    assert entry["total_loss"] == pytest.approx(sum(entry[name] for name in losses - {"total_loss"}))
    assert entry["iteration"] == trained.max_iter
    assert entry["lr"] == pytest.approx(learning_rate(trained.max_iter - 1, load_training_config(
        trained.whole.parent / "ending.yaml")))
    assert {path.name for path in trained.whole.iterdir()} - {"losses.png"} == {
        "checkpoint.pth", "model_final.pth", "categories.json", "log.jsonl"}  # nothing half written is left


def test_losses_are_drawn(trained) -> None:
    pytest.importorskip("matplotlib", reason="losses.png needs matplotlib")
    with Image.open(trained.whole / "losses.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


# -- what ends it early -----------------------------------------------------------------------------------------------


@pytest.fixture
def own(data, tmp_path) -> Path:
    """A copy of the data set, to damage."""
    return Path(shutil.copytree(data, tmp_path / "own"))


def ended(capsys, *given: str) -> str:
    """What a training that fails says: one line."""
    assert program.main(given) == EXIT_FAILED
    told: str = capsys.readouterr().err
    assert "Traceback" not in told
    [line] = [line for line in told.splitlines() if line.startswith("train: ") and "losses.png" not in line]
    return line


def picture_of(data: Path, config: Path, iteration: int) -> Path:
    """One that iterations before this one do not need."""
    dataset = read_dataset(data / "train.json", data / "images" / "train", load_training_config(config))
    batches = Batches(dataset, blendmask.load_config(config), load_training_config(config), 3)
    before = {index for earlier in range(iteration) for index in batches.indices(earlier)}
    return next(dataset.entries[index].path for index in batches.indices(iteration) if index not in before)


def test_a_broken_picture_is_named_and_nothing_that_was_learnt_is_lost(own, tmp_path, capsys) -> None:
    config = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 100})
    picture = picture_of(own, config, 2)
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    told = ended(capsys, *arguments(own, config, out))
    assert f"{picture}: cannot be decoded" in told
    assert f"2 iterations are kept in {out / 'checkpoint.pth'}, from which --resume goes on" in told
    assert torch.load(out / program.CHECKPOINT, weights_only=True)["iteration"] == 2
    before = (out / program.CHECKPOINT).read_bytes()
    assert "2 iterations are kept" in ended(capsys, *arguments(own, config, out, "--resume"))  # and again
    assert (out / program.CHECKPOINT).read_bytes() == before
    picture.write_bytes(whole)
    assert program.main(arguments(own, config, out, "--resume")) == 0
    assert program.main(arguments(own, config, tmp_path / "never")) == 0
    resumed, never = weights(out), weights(tmp_path / "never")
    assert [key for key in never if not torch.equal(resumed[key], never[key])] == []


def test_a_picture_over_the_limit_names_an_option_that_there_is(data, tmp_path, capsys) -> None:
    config, out = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 1}), tmp_path / "out"
    told = ended(capsys, *arguments(data, config, out, "--max-image-pixels", "1000"))
    assert "pixels are over the limit of 1000 (--max-image-pixels); there is no checkpoint yet" in told
    assert not (out / program.CHECKPOINT).exists()  # which would be in the way of starting again
    assert program.main(arguments(data, config, out, "--max-image-pixels", "1000000")) == 0


def test_a_disk_that_is_full_from_the_start_is_told(data, tmp_path, capsys) -> None:
    config, out = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 1}), tmp_path / "out"
    with DiskQuota():
        told = ended(capsys, *arguments(data, config, out))
    assert told == f"train: {out / 'checkpoint.pth'} cannot be saved: File too large; there is no checkpoint yet"


def test_a_line_that_a_full_disk_cut_is_forgotten(tmp_path) -> None:
    whole = json.dumps({"iteration": 20, "total_loss": 1.0}) + "\n"
    (tmp_path / program.LOG).write_text(whole + whole.replace("20", "40") + whole[:9])
    program._rewind_log(tmp_path, 40)
    assert (tmp_path / program.LOG).read_text() == whole + whole.replace("20", "40")


# -- from other weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def three(data, tmp_path) -> list[str]:
    """Arguments that replace the data set by one of three classes."""
    tree = json.loads((data / "train.json").read_text())
    tree["categories"] = tree["categories"][:3]
    for each in tree["annotations"]:
        each["category_id"] = each["category_id"] % 3 + 1
    (tmp_path / "three.json").write_text(json.dumps(tree))
    return ["--annotations", str(tmp_path / "three.json")]


THREE = KEYS | {"MODEL.FCOS.NUM_CLASSES": 3, "MODEL.BASIS_MODULE.NUM_CLASSES": 3, "SOLVER.MAX_ITER": 1}


def test_weights_of_another_number_of_classes_are_fine_tuned(trained, data, three, tmp_path, capsys) -> None:
    start, out = trained.whole / program.FINAL, tmp_path / "out"
    config = configure(tmp_path, THREE | {"SOLVER.BASE_LR": 0.0})
    assert program.main([*arguments(data, config, out, "--weights", str(start)), *three]) == 0
    [told] = [line for line in capsys.readouterr().err.splitlines() if "start anew" in line]
    before, after = weights(trained.whole), weights(out)
    others = [key for key in before if before[key].shape != after[key].shape]
    assert len(others) == 4
    assert all(f"{key} {tuple(before[key].shape)}" in told for key in others)
    kept = [key for key in before if key not in others and "running" not in key and "num_batches" not in key]
    assert [key for key in kept if not torch.equal(before[key], after[key])] == []
    bias = after["proposal_generator.fcos_head.cls_logits.bias"]
    assert bias.tolist() == pytest.approx([-math.log(99)] * 3)


def test_weights_of_another_network_are_refused_for_training_too(trained, data, three, tmp_path, capsys) -> None:
    start, config = trained.whole / program.FINAL, configure(tmp_path, THREE | {"MODEL.FPN.OUT_CHANNELS": 32})
    told = refusal(capsys, *arguments(data, config, tmp_path / "out", "--weights", str(start)), *three)
    assert f"{start}: the weights do not fit the network" in told
    assert not (tmp_path / "out").exists()


# -- what the program refuses -----------------------------------------------------------------------------------------


def refusal(capsys, *given: str) -> str:
    assert program.main(given) == EXIT_USAGE
    told: str = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_unknown_solver_key_is_named(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS | {"SOLVER.MAX_ITERS": 9})
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITERS = 9"):
        load_training_config(config)
    assert "SOLVER.MAX_ITERS" in refusal(capsys, *arguments(data, config, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [
    ("SOLVER.BASE_LR", -1), ("SOLVER.STEPS", [20, 10]), ("SOLVER.LR_SCHEDULER_NAME", "Poly"),
    ("SOLVER.BIAS_LR_FACTOR", 2.0), ("INPUT.CROP.ENABLED", True), ("INPUT.MASK_FORMAT", "rle"),
    ("SOLVER.IMS_PER_BATCH", 0),
])  # fmt: skip
def test_refused_values_are_named(tmp_path, key, value) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_training_config(configure(tmp_path, {key: value}))


def test_an_output_folder_in_use_is_refused(trained, data, capsys) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.whole.iterdir()}
    told = refusal(capsys, *arguments(data, trained.whole.parent / "ending.yaml", trained.whole))
    assert str(trained.whole / "checkpoint.pth") in told
    assert "--resume" in told
    assert {path.name: path.stat().st_mtime_ns for path in trained.whole.iterdir()} == before


def test_nothing_to_resume_is_refused(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS)
    told = refusal(capsys, *arguments(data, config, tmp_path / "out", "--resume"))
    assert str(tmp_path / "out" / "checkpoint.pth") in told


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "of another network"])
def test_checkpoint_that_cannot_be_resumed_is_named(trained, tmp_path, data, capsys, content) -> None:
    checkpoint = tmp_path / "checkpoint.pth"
    keys = KEYS if content is not None else KEYS | {"MODEL.FPN.OUT_CHANNELS": 32}
    whole = (trained.whole / "checkpoint.pth").read_bytes()
    checkpoint.write_bytes(whole if content is None else content)
    told = refusal(capsys, *arguments(data, configure(tmp_path, keys), tmp_path, "--resume"))
    assert str(checkpoint) in told


def test_weights_alone_cannot_be_resumed(trained, tmp_path, data, capsys) -> None:
    shutil.copy(trained.whole / program.FINAL, tmp_path / "checkpoint.pth")
    told = refusal(capsys, *arguments(data, configure(tmp_path, KEYS), tmp_path, "--resume"))
    assert f"{tmp_path / 'checkpoint.pth'}: is not the state of a training: it has no optimizer, iteration" in told


def test_bad_annotations_end_the_program_before_it_starts(tmp_path, data, capsys) -> None:
    tree = json.loads((data / "train.json").read_text())
    del tree["annotations"][3]["segmentation"]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(tree))
    given = arguments(data, configure(tmp_path, KEYS), tmp_path / "out", "--annotations", str(bad))
    told = refusal(capsys, *given)
    assert f"{bad}: not COCO instances: annotation 4 (annotations[3]) of image 1, 0001.jpg: segmentation" in told
    assert not (tmp_path / "out").exists()


def test_number_of_classes_that_is_not_the_data_sets_is_refused(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS | {"MODEL.FCOS.NUM_CLASSES": 3})
    told = refusal(capsys, *arguments(data, config, tmp_path / "out"))
    assert "has 5 categories, but MODEL.FCOS.NUM_CLASSES is 3" in told
