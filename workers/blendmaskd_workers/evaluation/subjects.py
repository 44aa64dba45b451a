"""The two sides of a comparison, the reference and the device, and the report on how far they are apart.

`load` makes them, `evaluate` compares them on scenes. Both are of one network with one set of weights, as it was
trained, which is what `model.exact` serves; the reference computes in float32.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from blendmaskd.images.decoding import Pixels
from blendmaskd_workers import blendmask, devices
from blendmaskd_workers.blendmask import BlendMask, Config, Instances, Prepared
from blendmaskd_workers.devices import Device, DeviceError
from blendmaskd_workers.evaluation import comparison, scenes
from blendmaskd_workers.evaluation.comparison import BAR, Difference
from blendmaskd_workers.evaluation.scenes import Scene
from blendmaskd_workers.training.losses import losses

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}  # that autocast computes in; fp32 needs none
FIRST_LEVEL = 3  # p3

T = TypeVar("T")


class SubjectError(ValueError):
    """A network or device that cannot be had; the text says why."""


@dataclass(frozen=True)
class Subject:
    """A network on a device."""

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


def load(
    config: Config, weights: str | int, name: str, hf32: bool = False, dtype: str = "fp32"
) -> Subject:
    """The network on the device `name`, with the weights of a checkpoint, or random ones of a seed.

    Raises `SubjectError`.
    """
    model = blendmask.build(config)
    try:
        if isinstance(weights, int):
            blendmask.load_into(model, blendmask.random_weights(model, weights))
        else:
            blendmask.load_weights(model, weights)
        device = devices.open_device("cpu" if name.startswith("cpu") else name, "hf32" if hf32 else "fp32")
    except (blendmask.WeightsError, DeviceError) as error:
        raise SubjectError(f"{name}: {error}") from error
    return Subject(name, device, model.to(device.torch_device), dtype)


def scenes_of(names: Sequence[str], photographs: Sequence[Pixels], seed: int) -> list[Scene]:
    """The scenes over these photographs, or painted ones where there are none."""
    return scenes.photographed(names, photographs, seed) if photographs else scenes.painted(seed)


def evaluate(
    reference: Subject, device: Subject, on: Sequence[Scene], config: Config, trace: bool = False
) -> dict[str, Any]:
    """The report without its header; `logs.write_precision` gives it as text."""
    differences: dict[str, Difference] = {}
    rows = [_compare_on(scene, reference, device, config, differences if trace else None) for scene in on]
    report = {"scenes": rows, "trace": _trace(differences) if trace else None}
    return {**report, "failures": _failures(rows, differences)}


def _compare_on(
    scene: Scene, reference: Subject, device: Subject, config: Config, differences: dict[str, Difference] | None
) -> dict[str, Any]:
    prepared = blendmask.prepare(scene.pixels, config)
    tracing = contextlib.nullcontext() if differences is None else comparison.traced(
        reference.model, device.model, device.run, differences)  # fmt: skip
    with tracing:
        expected, right = observe(reference, prepared)
    actual, found = observe(device, prepared)
    rows = comparison.compare_losses(
        *(train_losses(subject, scene, prepared, config) for subject in (reference, device)))
    relative = [row["rel_diff"] for row in rows]
    return {
        "scene": scene.name,
        "size": "{}x{}".format(*prepared.image_size),
        "network_input": "{}x{}".format(*prepared.padded_size),
        "losses": rows,
        "mean_rel_diff": sum(relative) / len(relative),
        "max_rel_diff": max(relative),
        "tensors": [{"name": name, **comparison.compare(right[name], found[name])} for name in right],
        "detections": comparison.compare_detections(expected, actual, prepared),
    }


def observe(subject: Subject, prepared: Prepared) -> tuple[Instances, dict[str, Tensor]]:
    """What the network says of an image, and by name what it computes on the way: levels, bases, head outputs."""
    seen: dict[str, list[Any]] = {}
    model = subject.model
    watched = {"backbone": model.backbone, "bases": model.basis_module, "head": model.proposal_generator}
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: seen.setdefault(name, []).append(output))
        for name, module in watched.items()
    ]
    try:
        [instances] = subject.run(lambda: blendmask.segment(model, [prepared], subject.device.upload))
    finally:
        for handle in handles:
            handle.remove()
    [features], [bases], [head] = seen["backbone"], seen["bases"], seen["head"]
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


def train_losses(subject: Subject, scene: Scene, prepared: Prepared, config: Config) -> dict[str, float]:
    """The training losses on a scene, with the batch norms in training mode; the network stays as it was."""
    place = subject.device.torch_device
    images = blendmask.collate([prepared.tensor.to(place)], config)
    truth = scenes.ground_truth(scene, prepared, config).to(place)
    with _training(subject.model):
        computed = subject.run(lambda: losses(subject.model, images, [truth]))
    return {name: float(value) for name, value in computed.items()}


@contextlib.contextmanager
def _training(model: BlendMask) -> Iterator[None]:
    """Training mode, whose running statistics are put back."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    try:
        yield
    finally:
        model.eval()
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])


def _trace(differences: dict[str, Difference]) -> dict[str, Any]:
    modules = [{"name": name, "tensors": one.tensors, **one.figures()} for name, one in differences.items()]
    return {
        "modules": modules,
        "first": next(iter(comparison.blamed(differences)), None),
        "worst": comparison.worst(differences),
    }


def _failures(rows: Sequence[dict[str, Any]], differences: dict[str, Difference]) -> list[str]:
    """What is over the bar, a sentence each."""
    found = []
    for row in rows:
        found += [f"{loss['name']} on {row['scene']} differs by {100 * loss['rel_diff']:.2f}%"
                  for loss in row["losses"] if loss["over"]]  # fmt: skip
        found += [f"{one['name']} on {row['scene']}: {100 * one['over'] / one['of']:.2f}% of elements are off"
                  for one in row["tensors"] if one["over"] > BAR * one["of"]]  # fmt: skip
    guilty = comparison.blamed(differences)
    if guilty:
        share = 100 * differences[guilty[0]].share_over
        found.append(f"module {guilty[0]}: {share:.2f}% of its own output is off; {len(guilty)} such modules")
    return found
