"""The numbers of one training, read from the same YAML file as the network's, by AdelaiDet's own keys.

Rules: as in `blendmaskd_workers.blendmask.config`: a key that a training reads is honoured or refused by name, and a
key of SOLVER that nobody knows is refused. Values that a file leaves out take AdelaiDet's defaults.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from blendmaskd_workers.blendmask.config import (
    ConfigError,
    FixedKey,
    Key,
    flag,
    given_keys,
    is_int,
    is_number,
    one_of,
    positive,
    read_keys,
    share,
)
from blendmaskd_workers.training.loss_config import LossConfig


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Data, optimiser and schedule of a training, and its losses."""

    # data
    min_sizes: tuple[int, ...]  # pixels; one is drawn for each batch
    max_size: int  # pixels
    flip: bool  # half of the images, left to right
    mask_format: str  # "polygon", or "bitmask" where the annotations hold RLE
    filter_empty: bool  # leave out images without instances
    batch: int
    # optimiser: stochastic gradient descent
    base_lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    weight_decay_norm: float
    weight_decay_bias: float | None  # None: as weight_decay
    clip: bool  # each parameter's gradient by itself
    clip_type: str  # "value" or "norm"
    clip_value: float
    clip_norm_type: float
    freeze_at: int  # stages of the backbone that stay as they are: 1 the stem, 2 res2 or level2 too, ...; 0, -1: none
    prior: float  # of each class at each location, when trained from scratch
    # schedule
    schedule: str  # "WarmupMultiStepLR" or "WarmupCosineLR"
    steps: tuple[int, ...]  # iterations at which the rate is multiplied by gamma
    gamma: float
    base_lr_end: float  # of the cosine
    max_iter: int
    warmup_iters: int
    warmup_factor: float  # of the rate at iteration 0
    checkpoint_period: int  # iterations
    mixed_precision: bool  # convolutions in bfloat16: weights and losses stay float32
    losses: LossConfig


def load_training_config(path: str | Path) -> TrainingConfig:
    """Read what a training needs from a YAML file in AdelaiDet's form, with `_BASE_` files merged below it.

    Raises `ConfigError` naming the key, its value and what is supported.
    """
    given = given_keys(path)
    for key in given:
        if key.startswith("SOLVER.") and key not in _READ and key not in _FIXED and key not in _WITHOUT_EFFECT:
            raise ConfigError(f"{path}: unknown key {key} = {given[key]!r}: the training does not know it")
    values = read_keys(path, given, _READ, _FIXED)
    bounds, levels = values["size_bounds"], 3 + given.get("MODEL.FCOS.TOP_LEVELS", 2)
    if len(bounds) != levels - 1:
        raise ConfigError(f"{path}: MODEL.FCOS.SIZES_OF_INTEREST = {bounds!r} is not supported; supported: "
                          f"{levels - 1} numbers, as it has {levels} levels (MODEL.FCOS.TOP_LEVELS)")
    losses = LossConfig(**{field.name: values.pop(field.name) for field in fields(LossConfig)})
    return TrainingConfig(**values, losses=losses)


def _number(field: str, default: float, low: float = 0.0) -> Key:
    return Key(field, default, lambda value: is_number(value) and value >= low, f"a number from {low:g}")


def _whole(field: str, default: int) -> Key:
    return Key(field, default, lambda value: is_int(value, 0), "a whole number from 0")


def _ascending(field: str, default: tuple[int, ...]) -> Key:
    def accepts(value: Any) -> bool:
        return isinstance(value, tuple) and all(is_int(item, 1) for item in value) and list(value) == sorted(value)
    return Key(field, default, accepts, "a list of whole numbers, ascending")


_READ: dict[str, Key] = {
    "INPUT.MIN_SIZE_TRAIN": Key("min_sizes", (800,), lambda value: isinstance(value, tuple) and bool(value) and all(
        is_int(item, 1) for item in value), "a list of whole numbers from 1"),
    "INPUT.MAX_SIZE_TRAIN": positive("max_size", 1333),
    "INPUT.HFLIP_TRAIN": flag("flip", True),
    "INPUT.MASK_FORMAT": one_of("mask_format", "polygon", ("polygon", "bitmask")),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": flag("filter_empty", True),
    "SOLVER.IMS_PER_BATCH": positive("batch", 16),
    "SOLVER.BASE_LR": _number("base_lr", 0.001),
    "SOLVER.MOMENTUM": _number("momentum", 0.9),
    "SOLVER.NESTEROV": flag("nesterov", False),
    "SOLVER.WEIGHT_DECAY": _number("weight_decay", 0.0001),
    "SOLVER.WEIGHT_DECAY_NORM": _number("weight_decay_norm", 0.0),
    "SOLVER.WEIGHT_DECAY_BIAS": Key("weight_decay_bias", None, lambda value: value is None or (
        is_number(value) and value >= 0), "a number from 0, or nothing"),
    "SOLVER.CLIP_GRADIENTS.ENABLED": flag("clip", False),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("clip_type", "value", ("value", "norm")),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _number("clip_value", 1.0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _number("clip_norm_type", 2.0),
    "MODEL.BACKBONE.FREEZE_AT": Key("freeze_at", 2, lambda value: is_int(value, -1), "a whole number from -1"),
    "MODEL.FCOS.PRIOR_PROB": share("prior", 0.01),
    "SOLVER.LR_SCHEDULER_NAME": one_of("schedule", "WarmupMultiStepLR", ("WarmupMultiStepLR", "WarmupCosineLR")),
    "SOLVER.STEPS": _ascending("steps", (30000,)),
    "SOLVER.GAMMA": _number("gamma", 0.1),
    "SOLVER.BASE_LR_END": _number("base_lr_end", 0.0),
    "SOLVER.MAX_ITER": positive("max_iter", 40000),
    "SOLVER.WARMUP_ITERS": _whole("warmup_iters", 1000),
    "SOLVER.WARMUP_FACTOR": _number("warmup_factor", 0.001),
    "SOLVER.CHECKPOINT_PERIOD": positive("checkpoint_period", 5000),
    "SOLVER.AMP.ENABLED": flag("mixed_precision", False),
    "MODEL.FCOS.SIZES_OF_INTEREST": _ascending("size_bounds", (64, 128, 256, 512)),
    "MODEL.FCOS.POS_RADIUS": _number("centre_radius", 1.5),
    "MODEL.FCOS.LOSS_ALPHA": _number("focal_alpha", 0.25),
    "MODEL.FCOS.LOSS_GAMMA": _number("focal_gamma", 2.0),
    "MODEL.FCOS.LOSS_WEIGHT_CLS": _number("class_weight", 1.0),
    "MODEL.BLENDMASK.INSTANCE_LOSS_WEIGHT": _number("mask_weight", 1.0),
    "MODEL.BASIS_MODULE.LOSS_WEIGHT": _number("semantic_weight", 0.3),
}

_FIXED: dict[str, FixedKey] = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": FixedKey("choice", ("choice",)),
    "INPUT.CROP.ENABLED": FixedKey(False, (False,)),
    "INPUT.IS_ROTATE": FixedKey(False, (False,)),
    "SOLVER.BIAS_LR_FACTOR": FixedKey(1.0, (1.0,)),
    "SOLVER.REFERENCE_WORLD_SIZE": FixedKey(0, (0,)),
    "SOLVER.RESCALE_INTERVAL": FixedKey(False, (False,)),
    "SOLVER.WARMUP_METHOD": FixedKey("linear", ("linear",)),
    "MODEL.FCOS.CENTER_SAMPLE": FixedKey(True, (True,)),
    "MODEL.FCOS.LOC_LOSS_TYPE": FixedKey("giou", ("giou",)),
    "MODEL.FCOS.LOSS_NORMALIZER_CLS": FixedKey("fg", ("fg",)),
    "MODEL.BASIS_MODULE.COMMON_STRIDE": FixedKey(8, (8,)),
}

_WITHOUT_EFFECT = ("SOLVER.NUM_DECAYS",)  # of a schedule that is refused
