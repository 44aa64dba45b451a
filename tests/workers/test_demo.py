"""The demo model that the quickstart serves segments what it has never seen, through the daemon."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shapes
from blendmaskd.programs import evaluate_coco
from blendmaskd_workers import devices

pytestmark = pytest.mark.slow

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"
FALLS_AT_MOST = 0.3  # of 100, in bfloat16


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "shapes"
    assert shapes.main(["--output", str(folder), "--train", "1", "--held-out", "60", "--seed", "0"]) == 0
    return folder


@pytest.fixture(scope="module")
def measured(start_daemons, data, tmp_path_factory) -> dict[str, Any]:
    """The report of a daemon that computes in float32."""
    return measure(start_daemons, data, tmp_path_factory.mktemp("demo") / "ap.json", "fp32", box_ap=60, mask_ap=55)


def measure(
    start: Any, data: Path, report: Path, precision: str, box_ap: float, mask_ap: float
) -> dict[str, Any]:
    model = {"config": str(DEMO / "demo.yaml"), "weights": str(DEMO / "model_final.pth"), "precision": precision}
    server = start(engine="native", model=model, warm_up=[])
    wanted = "bfloat16" if precision == "bf16" else "float32"
    assert {device["actual"]["dtype"] for device in server.devices().values()} == {wanted}
    code = evaluate_coco.main([
        server.endpoint, "--images", str(data / "images" / "held_out"), "--annotations", str(data / "held_out.json"),
        "--json", str(report), "--require-box-ap", str(box_ap), "--require-mask-ap", str(mask_ap),
    ])  # fmt: skip
    found: dict[str, Any] = json.loads(report.read_text())
    assert code == 0, found
    return found


def test_average_precision_on_held_out_images(measured) -> None:
    assert set(measured["images_by_device"]) == {"cpu:0", "cpu:1"}


@pytest.mark.skipif(not devices.cpu_multiplies_bf16(), reason="needs a CPU with AVX512-BF16 or AMX")
def test_bfloat16_keeps_the_average_precision(measured, start_daemons, data, tmp_path) -> None:
    lowest = {kind: measured[kind]["AP"] - FALLS_AT_MOST for kind in ("box", "mask")}
    measure(start_daemons, data, tmp_path / "ap.json", "bf16", lowest["box"], lowest["mask"])
