"""The network end to end on odd inputs, its independence of the batch, and what its device part may not do."""

import ast
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from zoo import CONFIGS

import blendmaskd_workers.blendmask
from blendmaskd_workers.blendmask import (
    build,
    collate,
    finish,
    load_config,
    load_into,
    prepare,
    random_weights,
    segment,
)
from blendmaskd_workers.blendmask.fcos import FIELDS
from blendmaskd_workers.blendmask.model import KEPT_FIELDS, Proposals, pack


def noise(height: int, width: int, seed: int = 0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3000), (3000, 2), (31, 33)])
def test_odd_sizes(small_model, small_config, height, width):
    prepared = prepare(noise(height, width), small_config)
    [instances] = segment(small_model, [prepared])
    found = finish(instances, prepared)
    assert len(found.scores) > 0
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [width, height, width, height]).all()
    assert all(mask.shape == (height, width) for mask in found.masks())


def less_sure(weights, by):
    weights["proposal_generator.fcos_head.cls_logits.bias"] -= by
    return weights


def test_an_image_on_which_nothing_is_found(small_config):
    model = build(small_config)
    load_into(model, less_sure(random_weights(model), 47.0))
    prepared = prepare(noise(40, 50), small_config)
    for instances in segment(model, [prepared, prepared]):
        assert instances.boxes.shape == (0, 4)
        assert instances.probabilities.shape == (0, 28, 28)
        found = finish(instances, prepared)
        assert list(found.masks()) == []


def test_a_batch_in_which_only_some_images_have_detections(small_config):
    model = build(small_config)
    load_into(model, less_sure(random_weights(model), 2.5))
    images = [prepare(noise(64, 64, seed), small_config) for seed in range(4)]
    alone = [segment(model, [image])[0] for image in images]
    assert [len(one.scores) for one in alone] == [0, 1, 1, 0]
    for one, together in zip(alone, segment(model, images)):
        assert_same(one, together)


def test_images_of_equal_padded_size_do_not_depend_on_their_batch(small_model, small_config, photograph):
    photo = photograph("chelsea.png")
    images = [prepare(photo[:, :width], small_config) for width in (451, 445, 430)]
    assert len({image.net_size for image in images}) == 3
    assert {image.padded_size for image in images} == {(256, 384), (256, 416)}
    images = [image for image in images if image.padded_size == (256, 384)]
    for image, together in zip(images, segment(small_model, images)):
        assert_same(segment(small_model, [image])[0], together)


def assert_same(one, other) -> None:
    assert one.classes.tolist() == other.classes.tolist()
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)
    np.testing.assert_allclose(one.probabilities, other.probabilities, atol=1e-4)


@pytest.mark.parametrize("with_centreness", [True, False])
def test_candidates_are_what_the_head_says(small_model, small_config, photograph, with_centreness):
    """All pairs above the threshold and no others while they are fewer than the fixed number; else the best."""
    config = replace(small_config, threshold_with_centreness=with_centreness)
    model = build(config)
    load_into(model, small_model.state_dict())
    images = collate([prepare(photograph("coffee.png"), config).tensor], config)
    with torch.inference_mode():
        outputs = model.proposal_generator(model.backbone(images))
        packed = model.propose(images).packed[0].numpy()
    start = 0
    for output in outputs:
        probability = output.logits[0].permute(1, 2, 0).reshape(-1, 3).sigmoid().numpy()
        confidence = probability * output.centreness[0].flatten().sigmoid().numpy()[:, None]
        chosen = (confidence if with_centreness else probability) > np.float32(0.05)
        expected = sorted(zip(confidence[chosen], *np.nonzero(chosen)), reverse=True)[:1000]
        rows = packed[start: start + min(1000, chosen.size)]
        start += len(rows)
        found = sorted(((row[0], int(row[2]), int(row[1])) for row in rows if row[0] >= 0), reverse=True)
        assert [row[1:] for row in found] == [row[1:] for row in expected]
        distances = output.distances[0].flatten(1).numpy()
        for row in rows:
            assert row[3:].tolist() == distances[:, int(row[2])].tolist()
    assert start == len(packed)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_device_part_reads_nothing_back_and_has_no_shape_that_depends_on_data(name):
    """The meta device has shapes and no values: `nonzero`, `.item()` and boolean-mask indexing fail on it."""
    config = load_config(CONFIGS[name])
    with torch.device("meta"):
        model = build(config)
        images = torch.zeros(2, 3, 256, 320)
        kept = torch.zeros(3, KEPT_FIELDS)
    with torch.inference_mode():
        proposals = model.propose(images)
        masks = model.blend(proposals, kept)
    sizes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)][: len(config.strides)]
    candidates = sum(min(1000, height * width * config.num_classes) for height, width in sizes)
    assert proposals.packed.shape == (2, candidates, FIELDS)
    assert proposals.packed.dtype == torch.float32
    assert proposals.bases.shape == (2, 4, 64, 80)
    assert proposals.level_sizes == sizes
    assert masks.shape == (3, config.resolution, config.resolution)


def test_blend_reads_each_detections_own_image_level_and_cell(small_model, small_config):
    """And the top layer there is what it is everywhere, at corners, at borders and inside.

    As trained it has been run everywhere, as the reference does it: then the answer is the same to the last bit.
    """
    sizes = [(6, 5), (4, 3), (3, 3), (2, 1), (1, 1)]
    generator = torch.Generator().manual_seed(1)
    features = [torch.randn(2, 64, *size, generator=generator) for size in sizes]
    bases = torch.randn(2, 4, 32, 32, generator=generator)
    where = [(image, level, cell) for image in range(2) for level, (h, w) in enumerate(sizes) for cell in range(h * w)]
    boxes = torch.tensor([[8.0, 8.0, 64.0, 64.0]]).expand(len(where), 4)
    kept = torch.from_numpy(pack(*np.array(where).T, boxes.numpy(), sizes))
    images = torch.tensor(where)[:, 0]
    with torch.inference_mode():
        everywhere = [small_model.top_layer(level).flatten(2) for level in features]
        together = small_model.blend(Proposals(torch.empty(0), bases, features), kept)
        attended = [small_model.top_layer(level) for level in features]
        exact = small_model.blend(Proposals(torch.empty(0), bases, features, attended), kept)
        read = torch.stack([everywhere[level][image, :, cell] for image, level, cell in where]).view(-1, 4, 7, 7)
        assert torch.equal(exact, blendmaskd_workers.blendmask.model.blend(bases, read, images, boxes, 28))
    for i, (image, level, cell) in enumerate(where):
        attention = everywhere[level][image, :, cell].view(1, 4, 7, 7)
        alone = blendmaskd_workers.blendmask.model.blend(bases, attention, images[i: i + 1], boxes[i: i + 1], 28)
        torch.testing.assert_close(together[i], alone[0])


def test_host_functions_may_run_in_several_threads(small_model, small_config, photograph):
    image = photograph("chelsea.png")
    prepared = prepare(image, small_config)
    [instances] = segment(small_model, [prepared])
    expected = [mask.sum() for mask in finish(instances, prepared).masks()]

    def work(_: int) -> bool:
        again = prepare(image, small_config)
        assert torch.equal(again.tensor, prepared.tensor)
        return [mask.sum() for mask in finish(instances, again).masks()] == expected

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(8)))


def test_the_network_imports_nothing_but_its_few_libraries():
    allowed = {"torch", "numpy", "yaml", "PIL", "pycocotools", "blendmaskd_workers"}
    for path in Path(blendmaskd_workers.blendmask.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in allowed or top in sys.stdlib_module_names, f"{path.name} imports {name}"
                own = name.startswith("blendmaskd_workers.blendmask")
                assert top != "blendmaskd_workers" or own, f"{path.name} imports {name}"
