"""The network for inference: the trained one's answers with fewer operations; its precision, and what that needs."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from zoo import CONFIGS

from blendmaskd_workers.blendmask import (
    BlendMask,
    build,
    collate,
    for_inference,
    load_config,
    load_into,
    prepare,
    random_weights,
    segment,
)
from blendmaskd_workers.blendmask.norms import FrozenBatchNorm, NaiveGroupNorm

SMALL = load_config(CONFIGS["small_R18"])
NETWORKS = {
    "FrozenBN and GN": SMALL,
    "BN, and BN of each level": replace(SMALL, backbone_norm="BN", head_norm="SyncBN", num_share_convs=1),
    "NaiveGN": load_config(CONFIGS["small_R18_naivegn"]),
    "factors of levels": load_config(CONFIGS["small_R18_scale"]),
    "deformable bottlenecks": replace(load_config(CONFIGS["R_101_dcni3_5x"]), depth=50, num_classes=3, fpn_channels=64,
                                      res2_channels=64, res2_width=16, min_size=96),
    "DLA": replace(load_config(CONFIGS["DLA_34_syncbn_4x"]), fpn_channels=64, num_classes=3, min_size=96),
}  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda name: name.replace(" ", "_"))
def trained(request) -> BlendMask:
    network = build(replace(NETWORKS[request.param], min_size=96))
    load_into(network, random_weights(network))
    return network


def run(network: BlendMask):
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    images = collate([prepare(image, network.config).tensor], network.config)
    with torch.inference_mode():
        features = network.backbone(images.to(network.backbone.fpn_lateral3.weight.dtype))
        return [*features, network.basis_module(features[:3]), network.propose(images).packed]


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_norms_vanish_and_answers_stay(trained, channels_last):
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    optimised = for_inference(trained, channels_last=channels_last)
    assert trained.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    inference = [part for name, part in optimised.named_modules() if "seg_head" not in name]
    assert not any(isinstance(part, (nn.BatchNorm2d, FrozenBatchNorm)) for part in inference)
    kept = [part for part in optimised.modules() if isinstance(part, nn.GroupNorm)]
    assert len(kept) == sum(isinstance(part, nn.GroupNorm) for part in trained.modules())
    *maps, packed = run(optimised)
    *right_maps, right_packed = run(trained)
    for found, expected in zip(maps, right_maps):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
        assert found.is_contiguous(memory_format=torch.channels_last) is channels_last or found.shape[2:] == (1, 1)
    ours, theirs = (candidates[0, :, 0].sort().values for candidates in (packed, right_packed))  # may have swapped
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_what_chooses_and_attends_in_float32(trained):
    optimised = for_inference(trained, torch.bfloat16, channels_last=True)
    half = run(optimised)
    assert {tensor.dtype for tensor in half[:-1]} == {torch.bfloat16}
    assert half[-1].dtype == torch.float32
    assert optimised.top_layer.weight.dtype == torch.float32
    assert all(factor.dtype == torch.float32 for factor in optimised.proposal_generator.fcos_head.scales.parameters())
    with torch.inference_mode():
        outputs = optimised.proposal_generator(half[:-2])
    confidences = [(output.logits.float().sigmoid() * output.centreness.float().sigmoid()).max() for output in outputs]
    assert half[-1][..., 0].max() == max(confidences)
    for found, expected in zip(half[:-1], run(trained)):
        error = (found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.1


def test_half_precision_finds_the_same_instances(photograph):
    network = build(SMALL)
    load_into(network, random_weights(network))
    prepared = prepare(photograph("chelsea.png"), SMALL)
    [exact] = segment(network, [prepared])
    [half] = segment(for_inference(network, torch.bfloat16, channels_last=True), [prepared])
    assert len(half.scores) == len(exact.scores) == 100
    assert half.probabilities.dtype == np.float32
    same = 0
    for box, label, probability in zip(exact.boxes, exact.classes, exact.probabilities):
        near = np.flatnonzero((np.abs(half.boxes - box).max(axis=1) < 8) & (half.classes == label))
        same += any(((half.probabilities[i] > 0.5) == (probability > 0.5)).mean() > 0.9 for i in near)
    assert same >= 80


def test_naive_group_norm_squares_in_float32_at_least():
    """Its variance is a difference of large numbers, which half precision would lose. In float64 it is a truth."""
    norm = NaiveGroupNorm(1, 2)
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)) + 30
    expected = norm(x.bfloat16().float())
    found = norm.bfloat16()(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    double = x.double()
    torch.testing.assert_close(norm.double()(double), torch.nn.functional.group_norm(double, 1), rtol=1e-9, atol=1e-9)
