"""The device against recorded outputs of AdelaiDet, through the engine that serves; not for people.

    python -m blendmaskd_workers.evaluation.accelerator.goldens DEVICE FOLDER NAME,… WAY,…

tells a row for each golden of that name and way of computing it; two where it is a network, of a step of its training;
and before them, with ``begun``, that it begins:

========================  =========================================================================
golden, way               ``cpu`` is the control: the same host, as served
recorded, matched         instances that were recorded, and that were found of these
score_diff, box_diff_px   the largest of these
mask_pixels, mask_off     of those that are certain; what is wrong of them
relative_diff             of training losses, of parameters' gradients: the largest
verdict                   see `judge`
========================  =========================================================================

Recorded masks leave pixels open whose value is within .0001 of one half.
"""
from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from blendmaskd import settings as settings_module
from blendmaskd_workers import blendmask, devices, engines, process
from blendmaskd_workers.blendmask import BlendMask, Instances
from blendmaskd_workers.engines import native
from blendmaskd_workers.evaluation import comparison
from blendmaskd_workers.evaluation.accelerator import GOLDEN, recorded
from blendmaskd_workers.evaluation.accelerator.children import Row, telling
from blendmaskd_workers.evaluation.accelerator.visits import why
from blendmaskd_workers.training.losses import losses

WAYS = {"cpu": "", "exact": "model.exact=true", "served": "model.exact=false", "graphs": "model.graphs=true"}
AS_A_CPU, NEAR, OFF = "as a CPU", "near", "off"


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """How far a device may be from what was recorded."""

    lacking: int  # instances: where two are about as good, rounding decides which is kept
    score: float
    box_px: float
    mask: float  # share of certain pixels
    training: float  # relative


BOUNDS = {  # the first are those to which CPUs are held
    AS_A_CPU: Bounds(lacking=0, score=1e-5, box_px=5e-3, mask=0.0, training=1e-5),
    NEAR: Bounds(lacking=2, score=1e-4, box_px=5e-2, mask=1e-4, training=1e-3),
}


def main(argv: list[str]) -> int:
    process.end_with_parent()
    device, folder, names, ways = argv
    with telling() as tell:
        for name in names.split(","):
            tell(golden=name, begun=True)
            for row in _rows(name, ways.split(","), device, Path(folder)):
                tell(**row)
    return 0


def _rows(name: str, ways: Sequence[str], device: str, folder: Path) -> Iterator[Row]:
    """Of a golden, or of the training of a network."""
    if not (GOLDEN / f"{name}.npz").exists():
        for way, compute in {"losses": _losses, "gradients": _gradients}.items():
            yield {"golden": f"{name}_train", "way": way, **_tried(compute, name, device)}
        return
    weights = _weights(name, folder)
    for way in ways:
        yield {"golden": name, "way": way, **_tried(_compare, name, way, device, weights)}


def judge(row: Row) -> str:
    """The first of `BOUNDS` that a row keeps to, or that it is off."""
    return next((verdict for verdict, bounds in BOUNDS.items() if _within(row, bounds)), OFF)


def _within(row: Row, bounds: Bounds) -> bool:
    if "relative_diff" in row:
        return bool(row["relative_diff"] <= bounds.training)
    return bool(
        row["recorded"] - row["matched"] <= bounds.lacking
        and row["score_diff"] <= bounds.score
        and row["box_diff_px"] <= bounds.box_px
        and row["mask_off"] <= bounds.mask * row["mask_pixels"]
    )


def _tried(compute: Callable[..., Row], *arguments: Any) -> Row:
    try:
        row = compute(*arguments)
    except Exception as error:  # whatever a driver raises
        return why(error)
    return {**row, "verdict": judge(row)}


# ---- detections -------------------------------------------------------------------------------------------------

def _weights(golden: str, folder: Path) -> Path:
    """The checkpoint with which a golden was recorded."""
    path = folder / f"{golden}.pth"
    if path.exists():
        return path
    model = blendmask.build(blendmask.load_config(_config(golden)))
    torch.save({"model": blendmask.random_weights(model)}, path)
    return path


def _config(golden: str) -> Path:
    return recorded.config_of(golden.rpartition("_")[0])


def _compare(golden: str, way: str, device: str, weights: Path) -> Row:
    name = "cpu:0" if way == "cpu" or device == "cpu" else device
    overrides = [f"model.config={_config(golden)}", f"model.weights={weights}", *filter(None, [WAYS[way]])]
    settings = settings_module.load(None, None, overrides, [name])
    engine = engines.make(settings, "cpu" if name == "cpu:0" else name)
    engine.load()
    arrays = recorded.answer(golden)
    pixels = recorded.photograph(str(arrays["file"]))
    prepared = engine.prepare(pixels)
    if settings.model.graphs:
        engine.warm_up([pixels.shape[:2]], 1)
    [found] = engines.segment(engine, [prepared])
    return compare(arrays, found, prepared, settings.model.exact)


def compare(arrays: recorded.Arrays, found: Instances, prepared: Any, exact: bool) -> Row:
    """How far what was found is from what was recorded."""
    names = ("boxes", "scores", "classes", "locations", "levels")
    known = Instances(probabilities=np.zeros(0, np.float32), **{name: arrays[f"raw_{name}"] for name in names})
    left, right = comparison.matched(known, found)
    return {
        "recorded": len(known.scores),
        "matched": len(left),
        "score_diff": float(np.abs(known.scores[left] - found.scores[right]).max(initial=0)),
        "box_diff_px": float(np.abs(known.boxes[left] - found.boxes[right]).max(initial=0)),
        **_masks(arrays, left, comparison.only(found, right), prepared, exact),
    }


def _masks(arrays: recorded.Arrays, places: comparison.Places, found: Instances, prepared: Any, exact: bool) -> Row:
    """What is wrong of the masks in the photograph; a box outside of it, whose mask is left out there, is refused."""
    detections = blendmask.finish(found, prepared)
    if not len(detections.scores) == len(places) or len(arrays["scores"]) != len(arrays["raw_scores"]):
        raise ValueError("a box lies outside the photograph: its masks cannot be told apart")
    size = [int(side) for side in arrays["rle_size"]]
    rles = native.masks_of(detections, exact).rles(range(len(places)))
    pixels = off = 0
    for place, rle in zip(places, rles):
        mask = coco_mask.decode(rle).astype(bool)
        counts = (bytes(arrays[f"rle_counts_{name}"][place]) for name in ("hi", "lo"))
        at_least, at_most = (coco_mask.decode({"size": size, "counts": each}).astype(bool) for each in counts)
        pixels += int(at_least.sum() + (~at_most).sum())
        off += int((at_least & ~mask).sum() + (mask & ~at_most).sum())
    return {"mask_pixels": pixels, "mask_off": off}


# ---- training ---------------------------------------------------------------------------------------------------

def _losses(network: str, device: str) -> Row:
    with torch.no_grad():
        _, found = _step(network, device)
    return {"relative_diff": _largest({name: float(value) for name, value in found.items()}, _known(network)["losses"])}


def _gradients(network: str, device: str) -> Row:
    model, found = _step(network, device)
    torch.stack(list(found.values())).sum().backward()  # type: ignore[no-untyped-call]
    return {"relative_diff": _largest(norms(model), _known(network)["grad_norms"])}


def _step(network: str, name: str) -> tuple[BlendMask, dict[str, Tensor]]:
    """The network in training mode on the device, and the losses of its first step."""
    config = blendmask.load_config(recorded.config_of(network))
    device = devices.open_device(name)
    model = blendmask.build(config)
    blendmask.load_into(model, blendmask.random_weights(model))
    model.to(device.torch_device).train()
    for frozen in _known(network)["frozen_params"]:
        model.get_parameter(frozen).requires_grad_(False)
    truths = [each.to(device.torch_device) for each in recorded.ground_truths(network, config.resolution)]
    images = recorded.training_images(network, config).to(device.torch_device)
    return model, losses(model, images, truths)


def _known(network: str) -> Any:
    return recorded.training(network)[0]["results"]["sem"]


def norms(model: BlendMask) -> dict[str, float]:
    """Of all gradients; in float64 on the host, as float32 sums of millions are too coarse."""
    return {
        name: parameter.grad.cpu().double().norm().item()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def _largest(found: dict[str, float], known: dict[str, float | None]) -> float:
    """Relative difference of the worst of these; infinite where there is nothing to compare with, or no number."""
    differences = [abs(found.get(name, np.inf) - value) / max(abs(value), 1e-12)
                   for name, value in known.items() if value is not None]  # fmt: skip
    return max((value if value == value else np.inf for value in differences), default=np.inf)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
