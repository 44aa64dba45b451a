"""What AdelaiDet said of photographs with seeded weights, in tests/golden, which only a checkout has."""
from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blendmaskd_workers.blendmask import Config, collate, prepare
from blendmaskd_workers.evaluation.accelerator import GOLDEN, ROOT
from blendmaskd_workers.training.targets import GroundTruth, polygon_mask

PHOTOGRAPHS = GOLDEN / "images"

Arrays = dict[str, Any]


def config_of(network: str) -> Path:
    """The configuration of a network of `configs` or of the recorded small ones. Raises FileNotFoundError."""
    for folder in (GOLDEN, ROOT / "configs" / "BlendMask"):
        if (folder / f"{network}.yaml").exists():
            return folder / f"{network}.yaml"
    raise FileNotFoundError(f"{network}: neither in tests/golden nor in configs/BlendMask")


def photograph(name: str) -> Any:
    """Its pixels (H, W, 3) BGR."""
    return np.asarray(Image.open(PHOTOGRAPHS / name).convert("RGB"))[:, :, ::-1]


def answer(name: str) -> Arrays:
    """Of a golden of one whole image, named NETWORK_IMAGE: its arrays, without prefix. Raises OSError, ValueError."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    if "img1_file" in arrays or "img0_crop" in arrays:
        raise ValueError(f"{name}: not of one whole image")
    return {key.removeprefix("img0_"): value for key, value in arrays.items() if key.startswith("img0_")}


# ---- training ---------------------------------------------------------------------------------------------------

@functools.cache
def training(network: str) -> tuple[dict[str, Any], Arrays]:
    """Inputs and results of a training's step, and its arrays. Raises OSError."""
    with np.load(GOLDEN / f"{network}_train.npz") as arrays:
        return json.loads((GOLDEN / f"{network}_train.json").read_text()), dict(arrays)


def training_images(network: str, config: Config) -> Tensor:
    """The batch (2, 3, H, W) on the host. AssertionError where Pillow resizes otherwise than it did."""
    prepared = []
    for image in training(network)[0]["inputs"]:
        height, width = image["hw"]
        whole = Image.open(PHOTOGRAPHS / image["file"]).convert("RGB")
        pixels = np.asarray(whole.resize((width, height), Image.Resampling.BILINEAR))[:, :, ::-1]
        assert zlib.crc32(pixels.tobytes()) == image["bgr_uint8_crc32"], "Pillow resizes differently here"
        prepared.append(prepare(pixels, replace(config, min_size=min(height, width))).tensor)
    return collate(prepared, config)


def ground_truths(network: str, resolution: int, empty: Sequence[int] = (), semantic: bool = True) -> list[GroundTruth]:
    """The instances of each image, of those in `empty` none; `semantic`: with the map of the semantic loss."""
    recorded, arrays = training(network)
    return [
        _ground_truth([] if i in empty else image["instances"], resolution,
                      torch.from_numpy(arrays[f"img{i}_basis_sem"] * (i not in empty)) if semantic else None)
        for i, image in enumerate(recorded["inputs"])
    ]  # fmt: skip


def _ground_truth(instances: Sequence[dict[str, Any]], resolution: int, semantic: Tensor | None) -> GroundTruth:
    boxes = np.array([instance["box"] for instance in instances], np.float32).reshape(-1, 4)
    masks = [polygon_mask([np.array(part) for part in instance["polygons"]], box, resolution)
             for instance, box in zip(instances, boxes)]  # fmt: skip
    classes = torch.tensor([instance["class"] for instance in instances], dtype=torch.int64)
    masks_of_all = np.array(masks, np.float32).reshape(-1, resolution, resolution)
    return GroundTruth(torch.from_numpy(boxes), classes, torch.from_numpy(masks_of_all), semantic)
