"""The engine onnx in a whole daemon, against recorded outputs of the real AdelaiDet."""
from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from test_golden import CASES, Case, align, decoded
from zoo import CONFIGS, GOLDEN

from blendmaskd.wanted import differences_shown
from blendmaskd_workers import blendmask
from blendmaskd_workers.programs import export_onnx
from checkout import ROOT

DEMO = ROOT / "configs" / "demo"
SERVED = ("small_R18_chelsea", "small_R18_scale_rocket", "DLA_34_syncbn_4x_chelsea")
BY_NAME = {case.name: case for case in CASES}


def exported(folder: Path, config: Path, weights: Path) -> dict[str, str]:
    """The section `model` for the files of a checkpoint."""
    given = ["--config", str(config), "--weights", str(weights), "--output", str(folder)]
    assert export_onnx.main(given) == 0
    return {"config": str(config), "weights": str(folder)}


def seeded(path: Path, config: Path, seed: int) -> Path:
    torch.save({"model": blendmask.random_weights(blendmask.build(blendmask.load_config(config)), seed)}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", [BY_NAME[name] for name in SERVED], ids=str)
def test_answers_are_adelaidets(daemon, tmp_path: Path, case: Case) -> None:
    config = CONFIGS[case.network]
    model = exported(tmp_path / "files", config, seeded(tmp_path / "weights.pth", config, case.seed))
    server = daemon(devices=["cpu:0"], engine="onnx", model=model, warm_up=[[64, 64]], runtime={"threads": 1})
    with np.load(GOLDEN / f"{case.name}.npz") as file:
        golden = {name.removeprefix("img0_"): values for name, values in file.items()}
    answer = server.client.segment(GOLDEN / "images" / str(golden["file"]))
    x, y, width, height = np.array([each["bbox"] for each in answer.detections]).T
    found = {
        "scores": np.array([each["score"] for each in answer.detections]),
        "classes": np.array([each["class_index"] for each in answer.detections]),
        "boxes": np.stack([x, y, x + width, y + height], axis=1),
    }
    wanted = {"scores": golden["scores"], "classes": golden["pred_classes"], "boxes": golden["pred_boxes"]}
    size = [int(side) for side in golden["rle_size"]]
    for place, index in enumerate(align(found, wanted, to_the_bit=False)):
        mask = coco_mask.decode(answer.detections[index]["segmentation"]).astype(bool)
        low, high = (decoded(size, golden[key][place]) for key in ("rle_counts_lo", "rle_counts_hi"))
        assert not (high & ~mask).any(), f"mask {place} lacks pixels"
        assert not (mask & ~low).any(), f"mask {place} has pixels too many"


@pytest.mark.slow
def test_a_reload_takes_other_files_and_refuses_those_that_cannot_serve(daemon, tmp_path: Path, wait_until) -> None:
    """The digest in the statistics tells which are served; native answers are the same but for rounding."""
    config, checkpoint = DEMO / "demo.yaml", DEMO / "model_final.pth"
    first = exported(tmp_path / "first", config, checkpoint)
    second = exported(tmp_path / "second", config, seeded(tmp_path / "second.pth", config, 1))
    server = daemon(devices=["cpu:0"], engine="onnx", model=first, warm_up=[[64, 64]], runtime={"threads": 1})
    photograph = DEMO / "images" / "0003.jpg"

    def served() -> str | None:
        return server.devices()["cpu:0"]["actual"].get("model")

    def scores() -> list[float]:
        return [each["score"] for each in server.client.segment(photograph).detections]

    device, answer, before = server.devices()["cpu:0"], server.client.segment(photograph), scores()
    assert len(before) > 3
    assert differences_shown(device) == [], "threads and CPUs are the plan's"
    assert (device["actual"]["exact"], device["actual"]["dtype"]) == (False, "float32")
    (tmp_path / "first" / "blend.onnx").rename(tmp_path / "second" / "propose.onnx")
    server.rewrite(model=second)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload refused, nothing changed" in server.log, 60)
    assert "second/propose.onnx: was exported with part = blend, its name says propose" in server.log
    assert server.client.segment(photograph).detections == answer.detections, "it still has what it loaded"
    server.rewrite(model=exported(tmp_path / "second", config, tmp_path / "second.pth"))
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: served() not in (None, device["actual"]["model"]), 60)
    server.wait_ready()
    assert scores() != before
    server.rewrite(engine="native", model={"config": str(config), "weights": str(checkpoint)})
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: scores() == pytest.approx(before, abs=1e-5), 60)
