"""Losses and gradients against recorded ones of the real AdelaiDet; tests/golden/README.md says what they hold."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import two_threads

from blendmaskd_workers.blendmask import BlendMask, build, load_config, load_into, random_weights
from blendmaskd_workers.evaluation.accelerator import recorded
from blendmaskd_workers.training.losses import losses
from blendmaskd_workers.training.targets import GroundTruth, assign
from checkout import ROOT

GOLDEN = ROOT / "tests" / "golden"
CONFIGS = {"small_R18": GOLDEN / "small_R18.yaml", "R_50_1x": ROOT / "configs/BlendMask/R_50_1x.yaml"}
EMPTY = {"sem": (), "nosem": (), "sem_img1_empty": (1,), "nosem_all_empty": (0, 1)}
RELATIVE = 1e-5

CASES = [
    pytest.param((network, kind), id=f"{network}-{kind}", marks=[pytest.mark.slow] * (network == "R_50_1x"))
    for network in CONFIGS for kind in EMPTY
]


@dataclass
class Step:
    """One golden case: what was recorded, and what one step backwards through the network gives now."""

    recorded: dict
    model: BlendMask
    losses: dict[str, Tensor]

    def gradient_norm(self, name: str) -> float | None:
        """Of a parameter, None where it got no gradient; in float64, as float32 sums of millions are too coarse."""
        parameter = dict(self.model.named_parameters()).get(name)
        return None if parameter is None or parameter.grad is None else parameter.grad.double().norm().item()


def ground_truths(network: str, kind: str, resolution: int) -> list[GroundTruth]:
    return recorded.ground_truths(network, resolution, EMPTY[kind], not kind.startswith("nosem"))


@pytest.fixture(scope="module", params=CASES)
def step(request) -> Step:
    network, kind = request.param
    config = load_config(CONFIGS[network])
    model = build(replace(config, semantic_classes=None) if kind.startswith("nosem") else config)
    load_into(model, random_weights(model))
    model.train()
    want = recorded.training(network)[0]["results"][kind]
    for name in want["frozen_params"]:
        model.get_parameter(name).requires_grad_(False)
    with two_threads():
        images = recorded.training_images(network, model.config)
        found = losses(model, images, ground_truths(network, kind, config.resolution))
        torch.stack(list(found.values())).sum().backward()
    return Step(want, model, found)


def test_losses(step):
    assert list(step.losses) == list(step.recorded["losses"])
    for name, value in step.losses.items():
        assert value.item() == pytest.approx(step.recorded["losses"][name], rel=RELATIVE, abs=1e-12), name


def test_gradients(step):
    for name, norm in step.recorded["grad_norms"].items():
        expected = norm if norm is None else pytest.approx(norm, rel=RELATIVE, abs=1e-12)
        assert step.gradient_norm(name) == expected, name
    norms = [norm for name, _ in step.model.named_parameters() if (norm := step.gradient_norm(name)) is not None]
    assert np.linalg.norm(norms) == pytest.approx(step.recorded["grad_total_norm"], rel=RELATIVE)


def test_parameters_without_gradient(step):
    missing = {name for name, value in step.model.named_parameters() if value.requires_grad and value.grad is None}
    without_semantic_head = {name for name in step.recorded["params_without_grad"] if "seg_head" not in name}
    assert missing == without_semantic_head


def test_running_statistics(step):
    norm = step.model.basis_module.refine[0][1]
    assert norm.running_mean[:4].tolist() == pytest.approx(step.recorded["running_mean_refine0_after"], rel=1e-4)
    assert norm.running_var[:4].tolist() == pytest.approx(step.recorded["running_var_refine0_after"], rel=1e-4)


@pytest.mark.parametrize("network", CONFIGS)
def test_targets(network):
    config = load_config(CONFIGS[network])
    data, arrays = recorded.training(network)
    truths = ground_truths(network, "sem", config.resolution)
    height, width = (max(-(-image["hw"][i] // 32) * 32 for image in data["inputs"]) for i in (0, 1))
    sizes = [(-(-height // stride), -(-width // stride)) for stride in config.strides]
    targets = assign(truths, sizes, config.strides, (64, 128, 256, 512), 1.5, config.num_classes)
    assert targets.positives.tolist() == arrays["pos_inds"].tolist()
    assert targets.labels[targets.positives].tolist() == arrays["pos_labels"].tolist()
    assert targets.instances.tolist() == arrays["pos_gt_inds"].tolist()
    np.testing.assert_array_equal(targets.distances.numpy(), arrays["pos_reg_targets"])
    np.testing.assert_allclose(targets.centreness.numpy(), arrays["pos_gt_ctrs"], rtol=1e-6)
    negatives = np.delete(targets.labels.numpy(), arrays["pos_inds"])
    assert (negatives == config.num_classes).all()
    for i, truth in enumerate(truths):
        np.testing.assert_array_equal(truth.masks.numpy(), arrays[f"img{i}_gt_mask_crops"])
