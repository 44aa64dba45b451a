"""The two sides of a comparison, the reference and the device, and the report on how far they are apart.

`load` makes them, `evaluate` compares them on scenes. Both are of one network with one set of weights, as it was
trained, which is what `model.exact` serves; the reference computes in float32.
"""
from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from blendmaskd_workers import blendmask, devices
from blendmaskd_workers.blendmask import BlendMask, Config, Instances, Prepared
from blendmaskd_workers.devices import Device, DeviceError, Precision
from blendmaskd_workers.evaluation import comparison, double_benchmark, ladder, scenes
from blendmaskd_workers.evaluation.arithmetic import LADDER, Emulated
from blendmaskd_workers.evaluation.comparison import BAR, Difference
from blendmaskd_workers.evaluation.ladder import Likeness
from blendmaskd_workers.evaluation.scenes import Scene
from blendmaskd_workers.training.initial import initialise
from blendmaskd_workers.training.losses import losses

# the program's switch, and what a device is opened for
HF32: Mapping[str, Precision] = {"off": "fp32", "on": "hf32", "native": "native"}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # that autocast computes in; fp32 needs none
FIRST_LEVEL = 3  # p3
PRIOR = 0.01  # of each class at each location before training: AdelaiDet's default of MODEL.FCOS.PRIOR_PROB
UNTRAINED = ("loss_fcos_ctr", "loss_mask")  # ln 2 where logits are 0, whatever the target is
NEAR = (0.92, 1.22)  # of ln 2: initial weights of 25 seeds are within; who has learnt is below, on data of its kind

T = TypeVar("T")


class SubjectError(ValueError):
    """A network or device that cannot be had; the text says why."""


@dataclass(frozen=True)
class Subject:
    name: str  # npu:0
    device: Device
    model: BlendMask
    dtype: str = "fp32"  # or a key of DTYPES

    def run(self, compute: Callable[[], T]) -> T:
        """Call a function that computes with the network, in this thread."""
        self.device.use()
        place = self.device.torch_device
        enabled = self.dtype != "fp32"
        with torch.no_grad(), torch.autocast(place.type, DTYPES.get(self.dtype, torch.bfloat16), enabled=enabled):
            return compute()


@dataclass(frozen=True)
class Initial:
    """AdelaiDet's weights before any training, with frozen batch norms as the identity."""

    seed: int


Weights = str | int | Initial  # a checkpoint's path, the seed of random weights, initial ones


@dataclass(frozen=True)
class Depth:
    """What is compared beyond values and losses."""

    trace: bool = False  # module by module, each on the reference's input
    double_benchmark: bool = False  # with float64 as the truth
    ladder: bool = False  # with the arithmetics that a CPU can emulate


def load(config: Config, weights: Weights, name: str, precision: Precision = "fp32", dtype: str = "fp32") -> Subject:
    """The network on the device `name`. Raises `SubjectError`."""
    if isinstance(weights, Initial):
        torch.manual_seed(weights.seed)  # some layers keep what building them draws
    model = blendmask.build(config)
    try:
        if isinstance(weights, Initial):
            initialise(model, PRIOR)
        elif isinstance(weights, int):
            blendmask.load_into(model, blendmask.random_weights(model, weights))
        else:
            blendmask.load_weights(model, weights)
        device = devices.open_device("cpu" if name.startswith("cpu") else name, precision)
    except (blendmask.WeightsError, DeviceError) as error:
        raise SubjectError(f"{name}: {error}") from error
    return Subject(name, device, model.to(device.torch_device), dtype)


def arithmetic(subject: Subject) -> dict[str, str]:
    """What decides how a device multiplies float32, as far as it is known, for the header of a log."""
    switches = subject.device.arithmetic()
    return switches | cube_math_type(subject.device.name(), switches)


def cube_math_type(chip: str, switches: Mapping[str, str]) -> dict[str, str]:
    """``cubeMathType`` of a convolution of an NPU's aclnn kernels, by torch_npu's rule; else nothing.

    Chips before the 910B, and private formats, go another way, that of `ACL_PRECISION_MODE`.
    """
    if not chip.startswith(("Ascend910B", "Ascend910_93")) or switches.get("internal_formats") != "disable":
        return {}
    return {"cube_math_type": "3 (USE_HF32)" if switches["conv_hf32"] == "on" else "0 (KEEP_DTYPE)"}


def evaluate(reference: Subject, device: Subject, on: Sequence[Scene], depth: Depth = Depth()) -> dict[str, Any]:
    """The report without its header; `logs.write_precision` gives it as text."""
    differences: dict[str, Difference] = {}
    likenesses: dict[str, Likeness] = {}
    rows = [_compare_on(scene, reference, device, depth, differences, likenesses) for scene in on]
    report = {
        "scenes": rows,
        "trace": _trace(differences) if depth.trace else None,
        "ladder": ladder.summary(likenesses) if depth.ladder else None,
        "warnings": _warnings(rows),
    }
    return {**report, "failures": _failures(rows, differences)}


def _compare_on(
    scene: Scene, reference: Subject, device: Subject, depth: Depth, differences: dict[str, Difference],
    likenesses: dict[str, Likeness],
) -> dict[str, Any]:
    prepared = blendmask.prepare(scene.pixels, reference.model.config)
    models = reference.model, device.model, device.run
    with comparison.traced(*models, differences) if depth.trace else contextlib.nullcontext():
        expected, right = observe(reference, prepared)
    if depth.ladder:
        with ladder.climbed(*models, likenesses):
            observe(reference, prepared)
    actual, found = observe(device, prepared)
    expected_losses, actual_losses = (train_losses(one, scene, prepared) for one in (reference, device))
    rows = comparison.compare_losses(expected_losses, actual_losses)
    return {
        "scene": scene.name,
        "size": "{}x{}".format(*prepared.image_size),
        "network_input": "{}x{}".format(*prepared.padded_size),
        "losses": rows,
        **_summed(rows),
        "tensors": [{"name": name, **comparison.compare(right[name], found[name])} for name in right],
        "detections": comparison.compare_detections(expected, actual, prepared),
        "double_benchmark": _double_benchmark(reference, prepared, right, found) if depth.double_benchmark else None,
        "ladder": _rungs(reference, scene, prepared, right, expected_losses) if depth.ladder else None,
    }


def _summed(losses: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    relative = [row["rel_diff"] for row in losses]
    return {"mean_rel_diff": sum(relative) / len(relative), "max_rel_diff": max(relative)}


def _double_benchmark(
    reference: Subject, prepared: Prepared, right: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """A row for each tensor; the truth is what the CPU computes in float64."""
    _, truth = observe(replace(reference, model=copy.deepcopy(reference.model).double()), prepared)
    return [{"name": name, **double_benchmark.compare(truth[name], right[name], found[name])} for name in right]


def _rungs(
    reference: Subject, scene: Scene, prepared: Prepared, right: Mapping[str, Tensor], expected: dict[str, float]
) -> list[dict[str, Any]]:
    """What the whole network, its convolutions in each arithmetic of the ladder, differs by from the reference.

    ``levels`` are the percentages of p3, p4, … over the bar; the rest is the mean over the levels.
    """
    rows = []
    for name, arithmetic in LADDER.items():
        with Emulated(arithmetic):
            _, found = observe(reference, prepared)
            losses = train_losses(reference, scene, prepared)
        levels = []
        for level in (level for level in right if level.startswith("p")):
            levels.append(Difference())
            levels[-1].add(right[level], found[level])
        rows.append({
            "name": name,
            "levels": [100 * level.share_over for level in levels],
            "rmse_over_std": sum(level.rmse_over_std for level in levels) / len(levels),
            "scale_bias": sum(level.scale_bias for level in levels) / len(levels),
            "max_rel_diff": _summed(comparison.compare_losses(expected, losses))["max_rel_diff"],
        })  # fmt: skip
    return rows


def observe(subject: Subject, prepared: Prepared) -> tuple[Instances, dict[str, Tensor]]:
    """What the network says of an image, and by name what it computes on the way: levels, bases, head outputs."""
    seen: dict[str, Any] = {}
    model = subject.model
    modules = {"backbone": model.backbone, "bases": model.basis_module, "head": model.proposal_generator}
    with comparison.watched(modules.items(), lambda name, _module, _args, _kwargs, output: seen.update({name: output})):
        [instances] = subject.run(lambda: blendmask.segment(model, [prepared], subject.device.upload))
    features, bases, head = seen["backbone"], seen["bases"], seen["head"]
    attentions = subject.run(lambda: [model.top_layer(output.box_features) for output in head])  # segment: few cells
    kinds = {"p": features, "logits.p": [output.logits for output in head],
             "distances.p": [output.distances for output in head],
             "centreness.p": [output.centreness for output in head], "attentions.p": attentions}  # fmt: skip
    tensors = {
        f"{kind}{level}": tensor
        for kind, levels in kinds.items()
        for level, tensor in enumerate(levels, start=FIRST_LEVEL)
    }
    return instances, {**tensors, "bases": bases}


def train_losses(subject: Subject, scene: Scene, prepared: Prepared) -> dict[str, float]:
    """The training losses on a scene, with the batch norms in training mode; the network stays as it was."""
    model = copy.deepcopy(subject.model).train()  # which changes running statistics
    place = subject.device.torch_device
    images = blendmask.collate([prepared.tensor.to(place)], model.config)
    truth = scenes.ground_truth(scene, prepared, model.config).to(place)
    computed = subject.run(lambda: losses(model, images, [truth]))
    return {name: float(value) for name, value in computed.items()}


def _trace(differences: dict[str, Difference]) -> dict[str, Any]:
    modules = [{"name": name, "tensors": one.tensors, **one.figures()} for name, one in differences.items()]
    return {
        "modules": modules,
        "first": next(iter(comparison.blamed(differences)), None),
        "worst": comparison.worst(differences),
    }


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Where equal losses prove nothing, a sentence each."""
    return [
        f"{loss['name']} on {row['scene']} is {loss['reference']:.6f}, near ln 2 = 0.693147: the network has learnt "
        "nothing there, its losses barely depend on what it computes, and equal ones prove nothing"
        for row in rows for loss in row["losses"]
        if loss["name"] in UNTRAINED and NEAR[0] <= loss["reference"] / math.log(2) <= NEAR[1]
    ]  # fmt: skip


def _failures(rows: Sequence[dict[str, Any]], differences: dict[str, Difference]) -> list[str]:
    found = []
    for row in rows:
        found += [f"{loss['name']} on {row['scene']} differs by {100 * loss['rel_diff']:.2f}%"
                  for loss in row["losses"] if loss["over"]]  # fmt: skip
        found += [f"{one['name']} on {row['scene']}: {100 * one['over'] / one['of']:.2f}% of elements are off"
                  for one in row["tensors"] if one["over"] > BAR * one["of"]]  # fmt: skip
        found += [f"{one['name']} on {row['scene']}: {figure} against float64 is {one[figure]:.2f} times the "
                  f"reference's, over {double_benchmark.LIMITS[figure]:g}"
                  for one in row["double_benchmark"] or [] for figure in one["over"]]  # fmt: skip
    guilty = comparison.blamed(differences)
    if guilty:
        share = 100 * differences[guilty[0]].share_over
        found.append(f"module {guilty[0]}: {share:.2f}% of its own output is off; {len(guilty)} such modules")
    return found
