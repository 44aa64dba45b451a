"""The training itself: optimiser, schedule, one step after the other, and the state that a checkpoint holds.

Rules: as detectron2 does it, number for number. Owns no file, clock or terminal.
"""
from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blendmaskd_workers.blendmask import BlendMask, WeightsError, load_into
from blendmaskd_workers.training.batches import Batch
from blendmaskd_workers.training.config import TrainingConfig
from blendmaskd_workers.training.losses import losses

NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


class TrainingError(RuntimeError):
    """A training that cannot go on."""


class Diverged(TrainingError):
    """Its losses are not finite any more: its weights are not worth keeping."""


class Trainer:
    """A network that learns. `iteration` is the number of steps done."""

    def __init__(self, model: BlendMask, config: TrainingConfig) -> None:
        """Take a network that lives on its device, with the weights to start from."""
        self.model: BlendMask = model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = config
        self.iteration = 0
        for part in _frozen_parts(model, config.freeze_at):
            part.requires_grad_(False)
            part.eval()
        self.optimizer = torch.optim.SGD(
            list(_parameter_groups(model, config)), lr=config.base_lr, momentum=config.momentum,
            nesterov=config.nesterov,
        )

    def step(self, batch: Batch) -> dict[str, float]:
        """Learn from one batch; returns its losses. Raises `Diverged` when one of them is not finite."""
        device_type = batch.images.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.config.mixed_precision):
            found = losses(self.model, batch.images, batch.truths, self.config.losses)
        values = dict(zip(found, torch.stack([loss.detach() for loss in found.values()]).tolist()))
        if not all(math.isfinite(value) for value in values.values()):
            raise Diverged(f"iteration {self.iteration}: the losses are no longer finite: {values}; a lower "
                                "SOLVER.BASE_LR, a longer SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS may help")
        rate = learning_rate(self.iteration, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        total: Tensor = torch.stack(list(found.values())).sum()
        total.backward()  # type: ignore[no-untyped-call]
        if self.config.clip:
            self._clip()
        self.optimizer.step()
        self.iteration += 1
        return values

    def _clip(self) -> None:
        for parameter in self.model.parameters():
            if parameter.grad is None:
                continue
            if self.config.clip_type == "value":
                nn.utils.clip_grad_value_(parameter, self.config.clip_value)
            else:
                nn.utils.clip_grad_norm_(parameter, self.config.clip_value, self.config.clip_norm_type)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs; the network's weights are under "model", as in every checkpoint."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "iteration": self.iteration}

    def restore(self, state: Any) -> None:
        """Go on where `state` was taken. Raises `TrainingError` when it is not of this training."""
        parts = ("model", "optimizer", "iteration")
        if not isinstance(state, Mapping) or (missing := [part for part in parts if part not in state]):
            raise TrainingError("is not the state of a training: it has no " + (
                ", ".join(missing) if isinstance(state, Mapping) else f"parts, it is a {type(state).__name__}"))
        try:
            load_into(self.model, state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.iteration = int(state["iteration"])
        except (WeightsError, AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise TrainingError(f"is not a checkpoint of this training: {' '.join(str(error).split())}") from error


def learning_rate(iteration: int, config: TrainingConfig) -> float:
    """The rate of an iteration: a linear warm-up to where the schedule is when it ends, then the schedule."""
    if iteration >= config.warmup_iters:
        return _scheduled(iteration, config)
    progress = iteration / config.warmup_iters
    start = config.warmup_factor * _scheduled(0, config)
    return start + (_scheduled(config.warmup_iters, config) - start) * progress


def _scheduled(iteration: int, config: TrainingConfig) -> float:
    if config.schedule == "WarmupCosineLR":
        cosine = (1 + math.cos(math.pi * min(iteration / config.max_iter, 1))) / 2
        return config.base_lr_end + (config.base_lr - config.base_lr_end) * cosine
    return config.base_lr * config.gamma ** bisect.bisect_right(config.steps, iteration)


# The parts of a backbone by stage, as far as FREEZE_AT counts; stages of one number have one stride.
STAGES = {
    "resnet": (("stem",), ("res2",), ("res3",), ("res4",), ("res5",)),
    "dla": (("base_layer", "level0", "level1"), ("level2",), ("level3",), ("level4",), ("level5",)),
}


def _frozen_parts(model: BlendMask, freeze_at: int) -> list[nn.Module]:
    stages = STAGES[model.config.backbone][: max(freeze_at, 0)]
    return [getattr(model.backbone.bottom_up, name) for names in stages for name in names]


def _parameter_groups(model: BlendMask, config: TrainingConfig) -> Iterator[dict[str, Any]]:
    bias_decay = config.weight_decay if config.weight_decay_bias is None else config.weight_decay_bias
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            decay = config.weight_decay_norm if isinstance(module, NORMS) else (
                bias_decay if name == "bias" else config.weight_decay)
            yield {"params": [parameter], "weight_decay": decay}
