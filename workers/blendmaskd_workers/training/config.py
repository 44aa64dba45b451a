"""The numbers of one training, read from the same YAML file as the network's, by AdelaiDet's own keys.

Rules: as in `blendmaskd_workers.blendmask.config`: a key that a training reads is honoured or refused by name, and a
key of SOLVER that nobody knows is refused. Values that a file leaves out take AdelaiDet's defaults.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendmaskd_workers.blendmask import config as keys
from blendmaskd_workers.blendmask.config import ConfigError, Key, is_int, is_number, of_key


def _number(name: str, default: float) -> Any:
    return of_key(Key(name, default, lambda value: is_number(value) and value >= 0, "a number from 0"))


def _ascending(name: str, default: tuple[int, ...]) -> Any:
    return of_key(Key(name, default, lambda value: _are_ints(value) and list(value) == sorted(value),
                      "a list of whole numbers, ascending"))


def _are_ints(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_int(item, 1) for item in value)


@dataclass(frozen=True)
class LossConfig:
    """The numbers of targets and losses."""

    # pixels: farthest sides that p3, p4, ... are for
    size_bounds: tuple[float, ...] = _ascending("MODEL.FCOS.SIZES_OF_INTEREST", (64, 128, 256, 512))
    # strides: how far from a box's centre its positive locations lie
    centre_radius: float = _number("MODEL.FCOS.POS_RADIUS", 1.5)
    focal_alpha: float = _number("MODEL.FCOS.LOSS_ALPHA", 0.25)
    focal_gamma: float = _number("MODEL.FCOS.LOSS_GAMMA", 2.0)
    class_weight: float = _number("MODEL.FCOS.LOSS_WEIGHT_CLS", 1.0)
    mask_weight: float = _number("MODEL.BLENDMASK.INSTANCE_LOSS_WEIGHT", 1.0)
    semantic_weight: float = _number("MODEL.BASIS_MODULE.LOSS_WEIGHT", 0.3)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Data, optimiser and schedule of a training, and its losses."""

    # data
    # pixels; one is drawn for each batch
    min_sizes: tuple[int, ...] = of_key(Key("INPUT.MIN_SIZE_TRAIN", (800,), lambda value: _are_ints(value) and value,
                                            "a list of whole numbers from 1"))
    max_size: int = keys.whole("INPUT.MAX_SIZE_TRAIN", 1333)  # pixels
    flip: bool = keys.flag("INPUT.HFLIP_TRAIN", True)  # half of the images, left to right
    mask_format: str = keys.one_of("INPUT.MASK_FORMAT", "polygon", ("polygon", "bitmask"))  # bitmask: for RLE
    filter_empty: bool = keys.flag("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True)  # leave out images without instances
    batch: int = keys.whole("SOLVER.IMS_PER_BATCH", 16)
    # optimiser: stochastic gradient descent
    base_lr: float = _number("SOLVER.BASE_LR", 0.001)
    momentum: float = _number("SOLVER.MOMENTUM", 0.9)
    nesterov: bool = keys.flag("SOLVER.NESTEROV", False)
    weight_decay: float = _number("SOLVER.WEIGHT_DECAY", 0.0001)
    weight_decay_norm: float = _number("SOLVER.WEIGHT_DECAY_NORM", 0.0)
    # None: as weight_decay
    weight_decay_bias: float | None = of_key(Key("SOLVER.WEIGHT_DECAY_BIAS", None, lambda value: value is None or (
        is_number(value) and value >= 0), "a number from 0, or nothing"))
    clip: bool = keys.flag("SOLVER.CLIP_GRADIENTS.ENABLED", False)  # each parameter's gradient by itself
    clip_type: str = keys.one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value", ("value", "norm"))
    clip_value: float = _number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0)
    clip_norm_type: float = _number("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 2.0)
    # stages of the backbone that stay as they are: 1 the stem, 2 res2 or level2 too, ...; 0, -1: none
    freeze_at: int = keys.whole("MODEL.BACKBONE.FREEZE_AT", 2, -1)
    prior: float = keys.share("MODEL.FCOS.PRIOR_PROB", 0.01)  # of each class everywhere, when trained from scratch
    # schedule
    schedule: str = keys.one_of("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR",
                                ("WarmupMultiStepLR", "WarmupCosineLR"))
    steps: tuple[int, ...] = _ascending("SOLVER.STEPS", (30000,))  # iterations at which the rate is multiplied by gamma
    gamma: float = _number("SOLVER.GAMMA", 0.1)
    base_lr_end: float = _number("SOLVER.BASE_LR_END", 0.0)  # of the cosine
    max_iter: int = keys.whole("SOLVER.MAX_ITER", 40000)
    warmup_iters: int = keys.whole("SOLVER.WARMUP_ITERS", 1000, 0)
    warmup_factor: float = _number("SOLVER.WARMUP_FACTOR", 0.001)  # of the rate at iteration 0
    checkpoint_period: int = keys.whole("SOLVER.CHECKPOINT_PERIOD", 5000)  # iterations
    mixed_precision: bool = keys.flag("SOLVER.AMP.ENABLED", False)  # convolutions in bfloat16: not weights, not losses
    losses: LossConfig = LossConfig()


_FIXED = (
    keys.fixed("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice"),
    keys.fixed("INPUT.CROP.ENABLED", False),
    keys.fixed("INPUT.IS_ROTATE", False),
    keys.fixed("SOLVER.BIAS_LR_FACTOR", 1.0),
    keys.fixed("SOLVER.REFERENCE_WORLD_SIZE", 0),
    keys.fixed("SOLVER.RESCALE_INTERVAL", False),
    keys.fixed("SOLVER.WARMUP_METHOD", "linear"),
    keys.fixed("MODEL.FCOS.CENTER_SAMPLE", True),
    keys.fixed("MODEL.FCOS.LOC_LOSS_TYPE", "giou"),
    keys.fixed("MODEL.FCOS.LOSS_NORMALIZER_CLS", "fg"),
    keys.fixed("MODEL.BASIS_MODULE.COMMON_STRIDE", 8),
)
_WITHOUT_EFFECT = ("SOLVER.NUM_DECAYS",)  # of a schedule that is refused


def load_training_config(path: str | Path) -> TrainingConfig:
    """Read what a training needs from a YAML file in AdelaiDet's form, with `_BASE_` files merged below it.

    Raises `ConfigError` naming the key, its value and what is supported.
    """
    given = keys.given_keys(path)
    known = {key.name for key in (*_FIXED, *keys.keys_of(TrainingConfig).values())}.union(_WITHOUT_EFFECT)
    for key in given:
        if key.startswith("SOLVER.") and key not in known:
            raise ConfigError(f"{path}: unknown key {key} = {given[key]!r}: the training does not know it")
    for fixed_key in _FIXED:
        fixed_key.value(path, given)
    values, losses = keys.read(TrainingConfig, path, given), LossConfig(**keys.read(LossConfig, path, given))
    levels = 3 + given.get("MODEL.FCOS.TOP_LEVELS", 2)
    if len(losses.size_bounds) != levels - 1:
        raise ConfigError(f"{path}: MODEL.FCOS.SIZES_OF_INTEREST = {losses.size_bounds!r} is not supported; supported: "
                          f"{levels - 1} numbers, as it has {levels} levels (MODEL.FCOS.TOP_LEVELS)")
    return TrainingConfig(**values, losses=losses)
