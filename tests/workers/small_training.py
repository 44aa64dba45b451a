"""The small network's configuration, and a data set of one photograph: what tests of training begin with."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import Config
from blendmaskd_workers.training.batches import Batch, Batches
from blendmaskd_workers.training.config import TrainingConfig, load_training_config
from blendmaskd_workers.training.dataset import Dataset, Sample, make_sample, read_dataset
from blendmaskd_workers.training.initial import initialise
from blendmaskd_workers.training.trainer import Trainer
from checkout import ROOT

SMALL = ROOT / "tests" / "golden" / "small_R18.yaml"
HEIGHT, WIDTH = 40, 60  # of the photograph in most tests
CATEGORIES = [{"id": 9, "name": "moth"}, {"id": 3, "name": "bee"}, {"id": 7, "name": "fly"}]  # classes 2, 0, 1


def configure(folder: Path, keys: dict[str, Any] | None = None, name: str = "network.yaml") -> Path:
    """The small network's configuration with these keys (dotted) over it, as a file."""
    tree = yaml.safe_load(SMALL.read_text())
    for key, value in (keys or {}).items():
        *above, last = key.split(".")
        section = tree
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / name
    path.write_text(yaml.safe_dump(tree))
    return path


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[list[float]]:
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def annotation(segmentation: Any, bbox: list[float], category: int = 3, **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "segmentation": segmentation, "bbox": bbox, "category_id": category, "iscrowd": 0, **more}


@dataclass
class Photograph:
    """A data set of one image."""

    folder: Path
    network: Config
    config: TrainingConfig

    def read(self, *annotations: dict[str, Any], **tree: Any) -> Dataset:
        """The data set of these annotations, with ids from 1; `tree` replaces whole lists of the file."""
        numbered = [{"id": number, **item} for number, item in enumerate(annotations, 1)]
        content = {"images": [{"id": 1, "file_name": "photo.png", "height": HEIGHT, "width": WIDTH}],
                   "annotations": numbered, "categories": CATEGORIES, **tree}  # fmt: skip
        self.file.write_text(json.dumps(content))
        return read_dataset(self.file, self.folder, self.config)

    def sample(self, *annotations: dict[str, Any], min_size: int = HEIGHT, flip: bool = False) -> Sample:
        [entry] = self.read(*annotations).entries
        return make_sample(entry, self.network, self.config, min_size, flip)

    @property
    def file(self) -> Path:
        return self.folder / "instances.json"


def photographed(folder: Path, mask_format: str) -> Photograph:
    path = configure(folder, {"INPUT.MASK_FORMAT": mask_format})
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return Photograph(folder, blendmask.load_config(path), load_training_config(path))


def small_trainer(folder: Path, **solver: Any) -> tuple[Trainer, Batch]:
    """A trainer of the small network, and a batch of one photograph."""
    path = configure(folder, {f"SOLVER.{key}": value for key, value in solver.items()})
    config = replace(load_training_config(path), batch=1, min_sizes=(64,))
    photo = photographed(folder, "polygon")
    dataset = photo.read(annotation(rectangle(10, 8, 30, 28), [10, 8, 20, 20]))
    torch.manual_seed(0)
    model = blendmask.build(photo.network)
    initialise(model, 0.01)
    return Trainer(model, config), Batches(dataset, photo.network, config, 0).load(0)
