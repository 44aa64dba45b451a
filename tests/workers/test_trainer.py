"""Training's steps: the learning rate, the optimiser, initial weights, and the configuration that says so."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_training import configure, small_trainer

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import ConfigError
from blendmaskd_workers.training.config import TrainingConfig, load_training_config
from blendmaskd_workers.training.initial import initialise
from blendmaskd_workers.training.trainer import Trainer, TrainingError, learning_rate
from checkout import ROOT


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


@pytest.mark.parametrize(("key", "value"), [
    ("SOLVER.BASE_LR", -1), ("SOLVER.STEPS", [20, 10]), ("SOLVER.LR_SCHEDULER_NAME", "Poly"),
    ("SOLVER.BIAS_LR_FACTOR", 2.0), ("INPUT.CROP.ENABLED", True), ("INPUT.MASK_FORMAT", "rle"),
    ("SOLVER.IMS_PER_BATCH", 0),
])  # fmt: skip
def test_refused_values_are_named(tmp_path, key, value) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_training_config(configure(tmp_path, {key: value}))


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
