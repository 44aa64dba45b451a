"""The network against recorded outputs of the real AdelaiDet; tests/golden/README.md says what they hold.

As it was trained, which is what `model.exact` serves, it gives them to the last bit, where CPU and torch sum as those
that recorded them. Elsewhere, and as it is served without, it gives them but for rounding.
"""

import contextlib
import functools
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from torch.utils.hooks import RemovableHandle
from zoo import CONFIGS, GOLDEN, crc32, two_threads

from blendmaskd_workers.blendmask import (
    Detections,
    Instances,
    Prepared,
    build,
    collate,
    finish,
    for_inference,
    load_config,
    load_into,
    prepare,
    random_weights,
    segment,
)
from blendmaskd_workers.engines import native, onnx, onnx_export

SCORE_ROUNDING = 2e-6  # scores this close may swap places
RELATIVE = 1e-4  # bound of stages, in terms of their maximum
SCORES_AGREE, BOXES_AGREE_PX = 1e-5, 5e-3  # but for rounding: what docs/optimisation.md says
ARITHMETIC = 0xF7CE4282  # of the CPU and torch that recorded: an x86 with AVX-512, two threads


@dataclass(frozen=True)
class Case:
    """A golden file, the network it was made with, the seed of its weights and their CRC-32."""

    name: str
    network: str
    crc32: int
    seed: int = 0
    exact: bool = False  # the network as it was trained; else the one that is made from it to be served
    exported: bool = False  # that one as ONNX, run by onnxruntime

    def __str__(self) -> str:
        return self.name + "-exact" * self.exact + "-onnx" * self.exported


CASES = [
    Case("small_R18_chelsea", "small_R18", 0xD2F0D8F0),
    Case("small_R18_coffee", "small_R18", 0xD2F0D8F0),
    Case("small_R18_square", "small_R18", 0xD2F0D8F0),
    Case("small_R18_batch2", "small_R18", 0xD2F0D8F0),
    Case("small_R18_seed1_batch3", "small_R18", 0x2EF1AD94, seed=1),
    Case("small_R18_scale_rocket", "small_R18_scale", 0x2CA69B06, seed=1),
    Case("small_R18_naivegn_batch2", "small_R18_naivegn", 0x926FC9F1, seed=1),
    Case("550_R_50_3x_chelsea", "550_R_50_3x", 0xB42193EC),
    Case("RT_R_50_4x_syncbn_shtw_coffee", "RT_R_50_4x_syncbn_shtw", 0x0674A809),
    Case("RT_R_50_4x_bn-head_syncbn_shtw_coffee", "RT_R_50_4x_bn-head_syncbn_shtw", 0x813B080E),
    Case("DLA_34_syncbn_4x_chelsea", "DLA_34_syncbn_4x", 0x95F24735),
    Case("R_50_1x_chelsea", "R_50_1x", 0xFDD93771),
    Case("R_101_3x_coffee", "R_101_3x", 0x34D77CAC),
    Case("R_101_dcni3_5x_chelsea", "R_101_dcni3_5x", 0xD94BD40F),
]
BOTH = [
    pytest.param(replace(case, exact=exact), marks=[pytest.mark.slow] if exact and "small" not in case.network else [])
    for exact in (False, True)
    for case in CASES
]
TRACED = (  # what can go wrong in tracing: norms of groups and levels, other factors, levels and convolutions
    "small_R18_chelsea", "small_R18_scale_rocket", "small_R18_naivegn_batch2", "RT_R_50_4x_bn-head_syncbn_shtw_coffee",
    "DLA_34_syncbn_4x_chelsea", "R_101_dcni3_5x_chelsea",
)  # fmt: skip
EXPORTED = [
    pytest.param(replace(case, exported=True), marks=[pytest.mark.slow] if "small" not in case.network else [])
    for case in CASES
    if case.name in TRACED
]


@dataclass
class Run:
    """One golden case: what was recorded and what the network says now."""

    exact: bool  # the network as it was trained
    to_the_bit: bool  # must it equal the reference's?
    golden: dict[str, np.ndarray]
    prepared: list[Prepared]
    stages: dict[str, np.ndarray]
    instances: list[Instances]
    detections: list[Detections]

    def images(self):
        for i in range(len(self.prepared)):
            prefix = f"img{i}_"
            yield i, {k.removeprefix(prefix): v for k, v in self.golden.items() if k.startswith(prefix)}


@functools.cache
@two_threads()
def arithmetic() -> int:
    """CRC-32 of what this CPU and this torch make of operations that each may sum in an order of its own."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    results = [
        F.conv2d(noise(1, before, side, side), noise(after, before, kernel, kernel), padding=kernel // 2)
        for before, after, kernel, side in (
            (3, 64, 7, 96), (64, 64, 3, 48), (256, 64, 1, 40), (512, 64, 1, 20), (64, 64, 3, 7), (64, 784, 3, 10))
    ]
    results += [F.group_norm(results[1], 32), results[1].softmax(dim=1), results[1].sigmoid()]
    return functools.reduce(lambda crc, result: zlib.crc32(result.numpy(), crc), results, 0)


def test_exact_was_held_to_the_last_bit():
    if arithmetic() != ARITHMETIC:
        pytest.skip(f"needs CPU and torch that sum as those that recorded the goldens: {arithmetic():#x}")

@pytest.fixture(scope="module", params=BOTH + EXPORTED, ids=str)
def run(request, photograph) -> Run:
    case: Case = request.param
    with np.load(GOLDEN / f"{case.name}.npz") as file:
        golden = dict(file)
    model = build(load_config(CONFIGS[case.network]))
    weights = random_weights(model, case.seed)
    assert crc32(weights) == case.crc32
    load_into(model, weights)
    if not case.exact:
        model = for_inference(model, channels_last=True)
    prepared = []
    while f"img{len(prepared)}_file" in golden:
        prefix = f"img{len(prepared)}_"
        pixels = photograph(str(golden[prefix + "file"]))
        if prefix + "crop" in golden:
            top, left, bottom, right = golden[prefix + "crop"]
            pixels = pixels[top:bottom, left:right]
        prepared.append(prepare(pixels, model.config))
    stages = {"net_input": collate([each.tensor for each in prepared], model.config).numpy()}
    hooks = record_stages(model, stages)
    with two_threads() if case.exact else contextlib.nullcontext():
        instances = segment(served(model, case.exported), prepared)
    for hook in hooks:
        hook.remove()
    # The deformable convolution of the reference that was recorded is torchvision's, and sums in another order.
    to_the_bit = case.exact and not any(model.config.deformable) and arithmetic() == ARITHMETIC
    detections = [finish(*pair) for pair in zip(instances, prepared)]
    return Run(case.exact, to_the_bit, golden, prepared, stages, instances, detections)

def served(model, exported: bool):
    """The network itself, or as it comes back from its ONNX files."""
    if not exported:
        return model
    models = onnx_export.export(model, "", 13, None, None)
    contents = [models[part].SerializeToString() for part in onnx.PARTS]
    return onnx.open_network(Path(), contents, model.config, ["CPUExecutionProvider"])

def record_stages(model, stages) -> list[RemovableHandle]:
    """Keep the outputs of the parts of `model` in `stages`, under the names of the golden file."""
    def keep(names, pick=lambda output: output):
        def hook(_module, _inputs, output):
            stages.update((name, tensor.numpy()) for name, tensor in zip(names, pick(output)))
        return hook

    levels = range(len(model.config.strides))
    stage = "level" if model.config.backbone == "dla" else "res"

    def head(name, field):
        names = [f"head_{name}_{level}" for level in levels]
        return model.proposal_generator.register_forward_hook(
            keep(names, lambda output: [getattr(level, field) for level in output]))

    def top_layer(_module, _inputs, outputs):
        """Everywhere, as the reference computes it; the network itself runs it at few cells."""
        stages.update((f"head_top_{level}", model.top_layer(outputs[level].box_features).numpy()) for level in levels)

    return [
        model.backbone.bottom_up.register_forward_hook(keep([f"{stage}{number}" for number in (3, 4, 5)])),
        *(module.register_forward_hook(keep([name], lambda output: [output]))
          for name, module in model.backbone.bottom_up.named_modules() if name.endswith("conv2_offset")),
        model.backbone.register_forward_hook(keep([f"p{3 + level}" for level in levels])),
        model.basis_module.register_forward_hook(keep(["bases"], lambda output: [output])),
        head("logits", "logits"), head("reg", "distances"), head("ctr", "centreness"),
        model.proposal_generator.register_forward_hook(top_layer),
    ]

def statistics(tensor: np.ndarray) -> np.ndarray:
    flat = tensor.astype(np.float64).ravel()
    summary = [flat.size, flat.mean(), flat.std(), np.abs(flat).max()]
    return np.concatenate([summary, flat[:8], flat[:: max(1, flat.size // 64)][:64]])

def test_resized_pixels_are_the_references(run):
    for i, golden in run.images():
        assert run.prepared[i].image_size == tuple(golden["orig_hw"])
        assert run.prepared[i].net_size == tuple(golden["net_hw"])
        pixels = run.prepared[i].tensor.numpy().transpose(1, 2, 0)
        assert zlib.crc32(pixels.tobytes()) == golden["resized_bgr_uint8_crc32"]

@pytest.mark.parametrize("run", BOTH, ids=str, indirect=True)  # a graph keeps its stages for itself
def test_every_stage_agrees(run):
    recorded = {key.removesuffix("_stats") for key in run.golden if key.endswith("_stats") and key[:3] != "img"}
    assert recorded == set(run.stages)
    for name in recorded:
        expected, found = run.golden[f"{name}_stats"], statistics(run.stages[name])
        if f"{name}_shape" in run.golden:
            assert run.stages[name].shape == tuple(run.golden[f"{name}_shape"]), name
        assert found[0] == expected[0], name
        np.testing.assert_allclose(found, expected, rtol=0, atol=RELATIVE * expected[3], err_msg=name)

def align(found, golden, to_the_bit: bool) -> list[int]:
    """Return which found detection is which golden one; only scores within rounding of each other may have swapped."""
    assert len(found["scores"]) == len(golden["scores"])
    if to_the_bit:
        for name, values in found.items():
            np.testing.assert_array_equal(values, golden[name], err_msg=name)
        return list(range(len(found["scores"])))
    unused = set(range(len(found["scores"])))
    places = []
    for i, score in enumerate(golden["scores"]):
        near = [j for j in unused if j == i or abs(golden["scores"][j] - score) <= SCORE_ROUNDING]
        same = [j for j in near if found["classes"][j] == golden["classes"][i]
                and abs(found["scores"][j] - score) <= SCORES_AGREE
                and np.abs(found["boxes"][j] - golden["boxes"][i]).max() <= BOXES_AGREE_PX]
        assert same, f"golden detection {i} is not there"
        places.append(min(same, key=lambda j: abs(i - j)))
        unused.remove(places[-1])
    return places

def test_instances_agree_in_network_pixels(run):
    for i, golden in run.images():
        found = run.instances[i]
        order = align(
            {"scores": found.scores, "classes": found.classes, "boxes": found.boxes},
            {"scores": golden["raw_scores"], "classes": golden["raw_classes"], "boxes": golden["raw_boxes"]},
            run.to_the_bit)
        np.testing.assert_array_equal(found.locations[order], golden["raw_locations"])
        np.testing.assert_array_equal(found.levels[order], golden["raw_levels"])
        probabilities = found.probabilities[order].astype(np.float64)
        assert probabilities.size == golden["raw_mask_logits_stats"][0]
        sampled = probabilities.ravel()[:: max(1, probabilities.size // 64)][:64]
        logits = golden["raw_mask_logits_stats"][12:]
        np.testing.assert_allclose(sampled, 1 / (1 + np.exp(-logits)), atol=1e-4)
        if run.to_the_bit:
            np.testing.assert_array_equal(sampled, torch.from_numpy(logits).float().sigmoid().numpy())

@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools on numpy 2
def test_detections_and_masks_agree_in_the_photograph(run):
    for i, golden in run.images():
        found = run.detections[i]
        assert found.image_size == tuple(golden["orig_hw"])
        order = align(
            {"scores": found.scores, "classes": found.classes, "boxes": found.boxes},
            {"scores": golden["scores"], "classes": golden["pred_classes"], "boxes": golden["pred_boxes"]},
            run.to_the_bit)
        pasted = [encoded_and_decoded(mask) for mask in found.masks()]
        rles = native.masks_of(found, run.exact).rles(range(len(order)))
        size = [int(side) for side in golden["rle_size"]]
        for i_golden, i_found in enumerate(order):
            low, high = (decoded(size, golden[key][i_golden]) for key in ("rle_counts_lo", "rle_counts_hi"))
            for how, mask in (("pasted", pasted[i_found]), ("answered", coco_mask.decode(rles[i_found]).astype(bool))):
                assert not (high & ~mask).any(), f"{how} mask {i_golden} lacks pixels"
                assert not (mask & ~low).any(), f"{how} mask {i_golden} has pixels too many"
                if run.to_the_bit and "rle_counts" in golden:
                    half = decoded(size, golden["rle_counts"][i_golden])
                    assert (mask == half).all(), f"{how} mask {i_golden} differs"

def decoded(size, counts) -> np.ndarray:
    return coco_mask.decode({"size": size, "counts": bytes(counts)}).astype(bool)

def encoded_and_decoded(mask: np.ndarray) -> np.ndarray:
    return coco_mask.decode(coco_mask.encode(np.asfortranarray(mask, np.uint8))).astype(bool)
