"""How far a device's values are from the reference's: element by element, detection by detection, module by module.

The reference's values are taken to be right. A relative error counts only where the reference is larger than `SMALL`;
more than `BAR` of it is too much, and a value that is not finite where the reference is, always.
"""
from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import BlendMask, Instances, Prepared

BAR = 0.01  # of relative error, and of the share of elements that may exceed it
SMALL = 1e-3  # of a reference value, whose relative error does not count

Run = Callable[[Callable[[], Any]], Any]  # calls a function as the device needs it: current device, data type
Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]


class Difference:
    """The difference between two sets of values, which may come in parts."""

    def __init__(self) -> None:
        self.tensors = 0
        self.elements = 0
        self.of = 0  # elements that are not small
        self.over = 0  # of these, those whose relative error is over the bar
        self._abs_sum = self._rel_sum = 0.0
        self.abs_max = self.rel_max = 0.0
        self._sum = self._right_right = self._found_found = self._right_found = self._squares = 0.0

    def add(self, reference: Tensor, device: Tensor) -> Floats:
        """Take in a tensor of each; returns the relative errors."""
        right = reference.detach().double().flatten().cpu().numpy()
        found = device.detach().double().flatten().cpu().numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            absolute = np.where(right == found, 0.0, np.abs(found - right))
            self._found_found += float(found @ found)
            self._right_found += float(right @ found)
            self._squares += float(absolute @ absolute)
        large = ~(np.abs(right) <= SMALL)
        relative: Floats = absolute[large] / np.abs(right[large])
        self.tensors += 1
        self.elements += right.size
        self.of += relative.size
        self.over += int((~(relative <= BAR)).sum())  # also NaN
        self._abs_sum += float(absolute.sum())
        self._rel_sum += float(relative.sum())
        self.abs_max = max(self.abs_max, float(absolute.max(initial=0)), key=_nan_last)
        self.rel_max = max(self.rel_max, float(relative.max(initial=0)), key=_nan_last)
        self._sum += float(right.sum())
        self._right_right += float(right @ right)
        return relative

    @property
    def abs_mean(self) -> float:
        return self._abs_sum / max(self.elements, 1)

    @property
    def rel_mean(self) -> float:
        return self._rel_sum / max(self.of, 1)

    @property
    def share_over(self) -> float:
        """Of the elements that count, from 0 to 1."""
        return self.over / max(self.of, 1)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, taken as vectors: 1 where they are one another's multiple."""
        lengths = math.sqrt(self._right_right) * math.sqrt(self._found_found)
        return self._right_found / lengths if lengths else float(self._right_right == self._found_found)

    @property
    def rmse_over_std(self) -> float:
        """Root of the mean squared error, in terms of the reference's standard deviation."""
        count = max(self.elements, 1)
        variance = self._right_right / count - (self._sum / count) ** 2
        if self._squares == 0:
            return 0.0
        return math.sqrt(self._squares / count / variance) if variance > 0 else math.inf

    @property
    def scale_bias(self) -> float:
        """By how much the device's values are too large as a whole: 0.01 is 1%.

        Rounding leaves it near 0; truncation makes values smaller.
        """
        return self._right_found / self._right_right - 1 if self._right_right else 0.0

    def figures(self) -> dict[str, Any]:
        names = ("abs_mean", "abs_max", "rel_mean", "rel_max", "cosine", "rmse_over_std", "scale_bias", "over", "of")
        return {name: getattr(self, name) for name in names}


def compare(reference: Tensor, device: Tensor) -> dict[str, Any]:
    """The figures of `Difference`, with the shape and percentiles of the relative error."""
    difference = Difference()
    relative = difference.add(reference, device)
    errors = relative if relative.size else np.zeros(1)
    p50, p90, p99 = np.percentile(errors, [50, 90, 99], method="inverted_cdf").tolist()
    return {"shape": list(reference.shape), **difference.figures(), "p50": p50, "p90": p90, "p99": p99}


def compare_losses(reference: dict[str, float], device: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each loss; a loss over the bar is ``over`` 1 ``of`` 1. What is no number differs infinitely."""
    rows = []
    for name in sorted(reference):
        right, found = reference[name], device[name]
        absolute = abs(found - right)
        relative = _nan_last(absolute / max(abs(right), 1e-12))
        rows.append({"name": name, "reference": right, "device": found, "abs_diff": absolute, "rel_diff": relative,
                     "over": int(relative > BAR), "of": 1})  # fmt: skip
    return rows


def compare_detections(reference: Instances, device: Instances, prepared: Prepared) -> dict[str, Any]:
    """How many of each there are and how far matched ones are apart; those match that one cell predicted as one class.

    Boxes differ in network pixels, masks are compared as pasted into the photograph, by intersection over union.
    """
    left, right = matched(reference, device)
    overlaps = [_overlap(_mask(reference, i, prepared), _mask(device, j, prepared)) for i, j in zip(left, right)]
    return {
        "reference": len(reference.scores),
        "device": len(device.scores),
        "matched": len(left),
        "box_diff_px": float(np.abs(reference.boxes[left] - device.boxes[right]).max(initial=0)),
        "score_diff": float(np.abs(reference.scores[left] - device.scores[right]).max(initial=0)),
        "iou_mean": float(np.mean(overlaps)) if overlaps else 1.0,
        "iou_min": min(overlaps, default=1.0),
    }


def matched(reference: Instances, device: Instances) -> tuple[Places, Places]:
    """The places of those instances that both have: what one cell predicted as one class is one instance."""
    ours = {key: index for index, key in enumerate(_keys(device))}
    pairs = [(index, ours[key]) for index, key in enumerate(_keys(reference)) if key in ours]
    left, right = (np.array([pair[side] for pair in pairs], np.int64) for side in (0, 1))
    return left, right


def only(found: Instances, places: Places | slice) -> Instances:
    return Instances(**{field.name: getattr(found, field.name)[places] for field in dataclasses.fields(found)})


def _keys(found: Instances) -> list[tuple[float, ...]]:
    places = zip(found.levels.tolist(), found.locations.tolist(), found.classes.tolist())
    return [(level, *location, class_) for level, location, class_ in places]


def _mask(found: Instances, index: int, prepared: Prepared) -> npt.NDArray[np.bool_]:
    """One mask of the photograph; empty where the box lies outside it."""
    masks = blendmask.finish(only(found, slice(index, index + 1)), prepared).masks()
    return next(masks, np.zeros(prepared.image_size, np.bool_))


def _overlap(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


# ---- module by module -------------------------------------------------------------------------------------------

@contextlib.contextmanager
def traced(
    reference: BlendMask, device: BlendMask, on_device: Run, differences: dict[str, Difference]
) -> Iterator[None]:
    """While the reference computes, give each of its modules' input to the device's own one, and compare the outputs.

    Adds to `differences` by the modules' names, in the order in which they first finish; inner modules finish before
    the outer ones, and `blend`, which is no module, comes last. Errors of earlier modules do not reach later ones.
    """
    def compare_call(name: str, own: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> None:
        for right, wrong in zip(tensors(output), again(own, args, kwargs, device, on_device), strict=True):
            differences.setdefault(name, Difference()).add(right, wrong)

    def watch(name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        compare_call(name, device.get_submodule(name), args, kwargs, output)

    def blend(*args: Any) -> Tensor:
        output = BlendMask.blend(reference, *args)
        compare_call("blend", device.blend, args, {}, output)
        return output

    reference.__dict__["blend"] = blend  # before the class's own, which no hook can reach
    try:
        with watched([(name, module) for name, module in reference.named_modules() if name], watch):
            yield
    finally:
        del reference.__dict__["blend"]


Watch = Callable[[str, nn.Module, Any, Any, Any], None]  # name, module, positional and keyword arguments, output


@contextlib.contextmanager
def watched(modules: Iterable[tuple[str, nn.Module]], watch: Watch) -> Iterator[None]:
    """While the context lasts, call `watch` after each call of a module."""
    with contextlib.ExitStack() as hooks:
        for name, module in modules:
            hooks.enter_context(module.register_forward_hook(partial(watch, name), with_kwargs=True))
        yield


def again(own: Callable[..., Any], args: Any, kwargs: Any, device: BlendMask, on_device: Run) -> list[Tensor]:
    """The tensors that the device's network makes of the reference's input."""
    place = next(device.parameters()).device
    return tensors(on_device(lambda: own(*_moved(args, place), **_moved(kwargs, place))))


def blamed(differences: dict[str, Difference]) -> list[str]:
    """The modules over the bar by themselves: none that they contain is over it too."""
    over = [name for name, difference in differences.items() if difference.share_over > BAR]
    return [name for name in over if not any(other.startswith(f"{name}.") for other in over)]


def worst(differences: dict[str, Difference]) -> str | None:
    """Of the blamed modules, or where there is none of the innermost ones, the farthest off; None if none is off."""
    inner = [name for name in differences if not any(other.startswith(f"{name}.") for other in differences)]
    candidates = [name for name in blamed(differences) or inner if differences[name].abs_max != 0]
    return max(candidates, key=lambda name: (differences[name].share_over, _nan_last(differences[name].rel_mean)),
               default=None)  # fmt: skip


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _moved(value: Any, place: torch.device) -> Any:
    """The same structure with its tensors on `place`."""
    if isinstance(value, Tensor):
        return value.to(place)
    if isinstance(value, dict):
        return {key: _moved(item, place) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, place) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), place) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a structure, in its order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in tensors(getattr(value, field.name))]
    return []
