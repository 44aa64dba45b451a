"""The adelaidet engine, where detectron2 and AdelaiDet are installed: its answers through the daemon are native's."""
from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from blendmaskd_workers import blendmask

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONFIG = GOLDEN / "small_R18.yaml"
PHOTOGRAPHS = ["chelsea.png", "astronaut.png"]

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("adet") and importlib.util.find_spec("detectron2")),
    reason="needs detectron2 and AdelaiDet (adet), built from their sources for this torch",
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "small_R18.pth"
    torch.save({"model": blendmask.random_weights(blendmask.build(blendmask.load_config(CONFIG)))}, path)
    return path


def test_both_engines_give_the_same_answers(daemon, weights) -> None:
    answers: dict[str, list[Any]] = {}
    for engine in ("native", "adelaidet"):
        server = daemon(
            engine=engine, model={"config": str(CONFIG), "weights": str(weights)}, warm_up=[], runtime={"threads": 1}
        )
        answers[engine] = list(server.client.map([GOLDEN / "images" / name for name in PHOTOGRAPHS]))
    for ours, theirs in zip(answers["native"], answers["adelaidet"], strict=True):
        assert (ours.width, ours.height) == (theirs.width, theirs.height)
        assert [d["category_id"] for d in ours.detections] == [d["category_id"] for d in theirs.detections]
        for mine, reference in zip(ours.detections, theirs.detections, strict=True):
            np.testing.assert_allclose(mine["score"], reference["score"], rtol=1e-4)
            np.testing.assert_allclose(mine["bbox"], reference["bbox"], atol=1e-4 * max(ours.width, ours.height))
            if inside(mine["bbox"], ours.width, ours.height):
                assert differing(mine["segmentation"], reference["segmentation"]) == 0


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    return int((coco_mask.decode(ours) != coco_mask.decode(theirs)).sum())


def inside(bbox: list[float], width: int, height: int) -> bool:
    """Beyond the image the bases are 0, and masks have areas of exactly 0.5, which the reference leaves to rounding."""
    x, y, w, h = bbox
    return x > 0 and y > 0 and x + w < width and y + h < height
