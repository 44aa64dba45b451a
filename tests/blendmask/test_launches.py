"""How many operators the device is asked for, and that fewer and larger ones answer what many small ones did."""

from dataclasses import replace

import level_by_level
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CONFIGS, GOLDEN

from blendmaskd_workers.blendmask import build, collate, for_inference, load_config, load_into, prepare, random_weights
from blendmaskd_workers.blendmask.blender import roi_align
from blendmaskd_workers.blendmask.fcos import NOT_A_CANDIDATE, Fcos, LevelOutput
from blendmaskd_workers.blendmask.inference import blend, choose, instances, places
from blendmaskd_workers.blendmask.model import KEPT_FIELDS, Proposals, pack

SIZES = [(9, 13), (5, 7), (3, 4), (2, 2), (1, 1)]
SMALL = replace(load_config(GOLDEN / "small_R18.yaml"), fpn_channels=32)
TOPK = 20  # fewer than the cells of two levels, and than the pairs of three


def stay(tensor):
    """How a network that lives on the host gets its input."""
    return tensor


class Counting(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


# ---- how many ----

@pytest.fixture(scope="module")
def trained():
    network = build(load_config(CONFIGS["R_50_1x"]))
    load_into(network, random_weights(network))
    return network


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", [1, 3])
def test_a_batch_takes_few_launches(trained, dtype, images):
    network = for_inference(trained, dtype)
    noise = np.random.default_rng(0).integers(0, 256, (images, 96, 128, 3), np.uint8)
    config = replace(network.config, min_size=96)
    batch = collate([prepare(image, config).tensor for image in noise], config)
    with torch.inference_mode():
        with Counting() as proposing:
            proposals = network.propose(batch)
        kept = choose(network, proposals, proposals.packed.numpy())
        with Counting() as blending:
            masks = blend(network, proposals, kept, stay)
    assert len(masks) == sum(map(len, kept)) > images
    assert proposing.operators <= 360
    assert blending.operators <= 80


@torch.inference_mode()
def test_masks_have_a_fixed_number_of_places_where_that_is_asked_for(small_model, photograph):
    """But one more for each that ties with the last, and none at all when nothing was kept."""
    prepared = prepare(photograph("chelsea.png"), small_model.config)
    proposals = small_model.propose(collate([prepared.tensor], small_model.config))
    [kept] = choose(small_model, proposals, proposals.packed.numpy())
    assert len(kept) == places(small_model, 1) == 100
    few = kept.take(np.arange(7))
    exact = blend(small_model, proposals, [few], stay)
    for fewest, expected in ((0, 7), (6, 7), (7, 7), (100, 100)):
        masks = blend(small_model, proposals, [few], stay, fewest)
        assert len(masks) == expected
        torch.testing.assert_close(masks[:7], exact)
    [found] = instances(small_model, [few], masks.numpy())
    np.testing.assert_array_equal(found.probabilities, masks[:7])
    assert blend(small_model, proposals, [kept.take(np.arange(0))], stay, 100) is None


def test_a_captured_blend_is_called_for_its_number_of_places_only(small_model, photograph):
    prepared = prepare(photograph("chelsea.png"), small_model.config)
    with torch.inference_mode():
        proposals = small_model.propose(collate([prepared.tensor], small_model.config))
    [kept] = choose(small_model, proposals, proposals.packed.numpy())
    shapes = []

    def captured(kept):
        shapes.append(kept.shape)
        return small_model.blend(proposals, kept)

    for count in (5, 8, 9):
        masks = blend(small_model, proposals, [kept.take(np.arange(count))], stay, 8, captured)
        assert len(masks) == max(count, 8)
    assert shapes == [(8, KEPT_FIELDS)] * 2


# ---- candidates ----

@st.composite
def outputs(draw):
    """What a head may say of two images: many equal values, values at the threshold, and some that are no numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    layout = draw(st.sampled_from([torch.contiguous_format, torch.channels_last]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    steps, nans = draw(st.sampled_from([1, 4, 1000])), draw(st.sampled_from([0, 0, 0.02, 0.5]))

    def noise(channels, size):
        values = torch.randn(2, channels, *size, generator=generator).mul(3 * steps).round().div(steps)
        values[torch.rand(values.shape, generator=generator) < nans] = torch.nan
        return values.to(dtype).contiguous(memory_format=layout)

    return [LevelOutput(noise(3, size), noise(4, size).relu(), noise(1, size), torch.empty(0)) for size in SIZES]


@settings(max_examples=200)
@given(outputs(), st.booleans(), st.booleans(), st.sampled_from([0.05, 0.5]))
def test_candidates_are_the_best_of_each_level(outputs, with_centreness, as_trained, threshold):
    fcos = Fcos(replace(
        SMALL, score_threshold=threshold, threshold_with_centreness=with_centreness, pre_nms_topk=TOPK))
    fcos.squashes_levels_apart = as_trained
    rounding = 0 if as_trained else 1e-6  # of the sigmoid, which on a CPU depends on an element's place
    packed = fcos.candidates(outputs)
    for level, output in enumerate(outputs):
        expected = level_by_level.candidates(fcos, output)
        found, packed = packed.split([expected.shape[1], packed.shape[1] - expected.shape[1]], dim=1)
        confidences = level_by_level.marked(fcos, output)
        distances = output.distances.flatten(2).float()
        for image in range(2):
            same(found[image, :, 0].sort().values, expected[image, :, 0].sort().values, rounding)
            candidates = found[image][found[image, :, 0] != NOT_A_CANDIDATE]
            label, cell = candidates[:, 1].long(), candidates[:, 2].long()
            assert len(set(zip(label.tolist(), cell.tolist()))) == len(candidates), level
            same(candidates[:, 0], confidences[image, cell, label], rounding)
            same(candidates[:, 3:], distances[image, :, cell].T, 0)
    assert packed.shape[1] == 0


def same(found, expected, rounding):
    torch.testing.assert_close(found, expected, rtol=rounding, atol=0, equal_nan=True)


# ---- masks ----

@pytest.fixture(scope="module")
def small():
    network = build(SMALL)
    load_into(network, random_weights(network))
    return network


@st.composite
def detections(draw):
    where = st.sampled_from([(level, cell) for level, (h, w) in enumerate(SIZES) for cell in range(h * w)])
    side = st.floats(-200, 400, width=32)
    row = st.tuples(st.integers(0, 1), where, st.tuples(side, side, side, side))
    return draw(st.lists(row, min_size=1, max_size=12))


@settings(max_examples=60, deadline=None)
@given(detections(), st.integers(0, 99), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
@torch.inference_mode()
def test_masks_are_those_of_each_level_by_itself(small, detections, seed, as_trained, dtype):
    generator = torch.Generator().manual_seed(seed)
    layout = torch.contiguous_format if as_trained else torch.channels_last
    maps = [torch.randn(2, 32, *size, generator=generator).to(dtype).contiguous(memory_format=layout) for size in SIZES]
    bases = torch.randn(2, 4, 33, 21, generator=generator).to(dtype).contiguous(memory_format=layout)
    attentions = [small.top_layer(level.float()) for level in maps] if as_trained else None
    proposals = Proposals(torch.empty(0), bases, maps, attentions)
    images = np.array([image for image, _, _ in detections])
    levels, cells = np.array([where for _, where, _ in detections]).T
    boxes = np.array([box for _, _, box in detections], np.float32)
    found = small.blend(proposals, torch.from_numpy(pack(images, levels, cells, boxes, SIZES)))
    expected = level_by_level.blend(small, proposals, *map(torch.from_numpy, (images, levels, cells, boxes)))
    assert torch.equal(found, expected)


@settings(max_examples=200)
@given(st.integers(0, 2**32), st.sampled_from([0.125, 1.0, 7.3, 1e6]), st.integers(1, 6), st.integers(1, 6))
def test_roi_align_is_that_of_each_corner_by_itself(seed, scale, height, width):
    """On whole numbers, which meet borders exactly, and others; beyond the map it may be zero of either sign."""
    generator = torch.Generator().manual_seed(seed)
    bases = torch.randn(2, 3, height, width, generator=generator)
    boxes = torch.randint(-8, 40, (20, 4), generator=generator) * scale
    boxes[torch.rand(boxes.shape, generator=generator) < 0.02] = torch.inf
    images = torch.randint(0, 2, (20,), generator=generator)
    assert torch.equal(roi_align(bases, images, boxes, 7), level_by_level.roi_align(bases, images, boxes, 7))
