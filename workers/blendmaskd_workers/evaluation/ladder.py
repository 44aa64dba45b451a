"""Which arithmetic a device's convolutions used: the one on the ladder that makes the same errors.

The errors of an arithmetic are no noise: they follow from the operands. So each convolution of the device is given the
reference's input, and its errors are compared, value by value, with those that the CPU makes in each arithmetic of
`arithmetic.LADDER`. The right one explains nearly all of them, the others less or nothing. Errors much smaller than the
finest arithmetic's are those of float32, summed in another order; what a factor explains is a scale. Errors of rounded
sums depend on their order, which the CPU does not know: of errors that nothing explains, at least the size is named.
"""
from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blendmaskd_workers.blendmask import BlendMask
from blendmaskd_workers.blendmask.deformable import DeformableConv
from blendmaskd_workers.evaluation.arithmetic import LADDER, Emulated
from blendmaskd_workers.evaluation.comparison import Run, again, watched

FP32, SCALE, UNLIKE, NOT_FINITE = "fp32", "scale", "unlike any", "not finite"
FINEST = next(iter(LADDER))
FINE = 1 / 16  # of the finest arithmetic's squared errors: below are float32's own
ALIKE = 0.7  # of the squared errors an arithmetic must explain; of neighbours on the ladder one gets up to 0.67
HUGE = 1e38  # for what an arithmetic makes infinite, and the device does not


class Likeness:
    """How well each arithmetic explains a device's errors; values may come in parts."""

    def __init__(self) -> None:
        self.elements = self.finite = 0
        self._errors = self._right_right = self._right_error = 0.0  # sums of squares and products
        self._unexplained = dict.fromkeys(LADDER, 0.0)
        self._sizes = dict.fromkeys(LADDER, 0.0)  # of the arithmetics' own errors

    def add(self, reference: Tensor, device: Tensor, emulated: Mapping[str, Tensor]) -> None:
        """Take in a tensor of the reference, the device, and each arithmetic."""
        found, right = device.detach().float().cpu(), reference.detach()
        finite = torch.isfinite(found)
        found, right = torch.where(finite, found, 0.0), torch.where(finite, right, 0.0)
        error = found - right
        self.elements += finite.numel()
        self.finite += int(finite.sum())
        self._errors += _square(error)
        self._right_right += _square(right)
        self._right_error += float(right.double().flatten() @ error.double().flatten())
        for name, tensor in emulated.items():
            values = torch.where(finite, tensor.detach().nan_to_num(HUGE, HUGE, -HUGE), 0.0)
            self._unexplained[name] += _square(found - values)
            self._sizes[name] += _square(values - right)

    @property
    def factor(self) -> float:
        """What the device's values are of the reference's, as a whole: 1.01 is 1% too large."""
        return 1 + self._right_error / self._right_right if self._right_right else 1.0

    def explained(self) -> dict[str, float]:
        """The share of the squared errors that each arithmetic, and a factor, explains: 1 is all of them."""
        if self._errors == 0:
            return dict.fromkeys([*LADDER, SCALE], 0.0)
        scale = self._right_error**2 / self._right_right / self._errors if self._right_right else 0.0
        return {**{name: 1 - left / self._errors for name, left in self._unexplained.items()}, SCALE: scale}

    def name(self) -> str:
        """The nearest arithmetic, or what else the errors are."""
        if not self.finite and self.elements:
            return NOT_FINITE
        if self._errors <= FINE * self._sizes[FINEST]:
            return FP32
        explained = self.explained()
        nearest = max(explained, key=lambda name: explained[name])
        return nearest if explained[nearest] >= ALIKE else UNLIKE

    def size(self) -> str:
        """The arithmetic whose errors are as large."""
        sizes = {name: size for name, size in self._sizes.items() if size}
        if self.name() == FP32 or not self._errors or not sizes:
            return FP32
        return min(sizes, key=lambda name: abs(math.log(sizes[name] / self._errors)))

    def figures(self) -> dict[str, Any]:
        """``nearest``, the percentage of the squared errors that it explains, what is as large, and the factor."""
        name = self.name()
        explained = 100 * self.explained().get(name, 0.0)
        return {"nearest": name, "explained_percent": explained, "size": self.size(), "factor": self.factor}


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


@contextlib.contextmanager
def climbed(reference: BlendMask, device: BlendMask, on_device: Run, likenesses: dict[str, Likeness]) -> Iterator[None]:
    """While the reference computes, on a CPU, compare each of its convolutions with the device's own, by name."""

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        [found] = again(_alone(device.get_submodule(name)), args, kwargs, device, on_device)
        convolve, emulated = _alone(module), {}
        for rung, arithmetic in LADDER.items():
            with Emulated(arithmetic):
                emulated[rung] = convolve(*args, **kwargs)
        likenesses.setdefault(name, Likeness()).add(convolve(*args, **kwargs), found, emulated)

    with watched(convolutions(reference), watch):
        yield


def convolutions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All of a network's by name."""
    return [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Conv2d | DeformableConv)]


def _alone(module: nn.Module) -> Callable[..., Tensor]:
    """A convolution without its norm: a shift there would hide a scale, and a rounding of its own everything."""
    return partial(nn.Conv2d.forward, module) if isinstance(module, nn.Conv2d) else module.forward


def summary(likenesses: Mapping[str, Likeness]) -> dict[str, Any]:
    """A row for each convolution, and the verdict in a sentence."""
    rows = [{"name": name, **likeness.figures()} for name, likeness in likenesses.items()]
    return {"convolutions": rows, "verdict": verdict(rows)}


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """``fp16 in all 71 convolutions``, ``scale 1.0100 in 1 of 71 convolutions, backbone.…; else fp32``."""
    named = Counter(_titled(row) for row in rows)
    parts = [_part(title, rows) for title, _ in named.most_common() if title != FP32]
    if not parts:
        return f"{FP32} in all {len(rows)} convolutions"
    return "; ".join([*parts, f"else {FP32}"] if named[FP32] else parts)


def _part(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = [row["name"] for row in rows if _titled(row) == title]
    if len(names) == len(rows):
        return f"{title} in all {len(rows)} convolutions"
    which = "the first" if len(names) > 1 else "it"
    return f"{title} in {len(names)} of {len(rows)} convolutions, {which} is {names[0]}"


def _titled(row: Mapping[str, Any]) -> str:
    more = {SCALE: f" {row['factor']:.3f}", UNLIKE: f", as large as {row['size']}"}
    return str(row["nearest"]) + more.get(row["nearest"], "")
