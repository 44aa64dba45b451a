"""The demo model that the quickstart serves segments what it has never seen, through the daemon."""
from __future__ import annotations

import json
from pathlib import Path

from daemon import evaluate_coco
from workers import shapes

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo"


def test_average_precision_on_held_out_images(daemon, tmp_path) -> None:
    data, report = tmp_path / "shapes", tmp_path / "ap.json"
    assert shapes.main(["--output", str(data), "--train", "1", "--held-out", "60", "--seed", "0"]) == 0
    model = {"config": str(DEMO / "demo.yaml"), "weights": str(DEMO / "model_final.pth")}
    server = daemon(engine="native", model=model, warm_up=[])
    code = evaluate_coco.main([
        server.endpoint, "--images", str(data / "images" / "held_out"), "--annotations", str(data / "held_out.json"),
        "--json", str(report), "--require-box-ap", "60", "--require-mask-ap", "55",
    ])  # fmt: skip
    assert code == 0, json.loads(report.read_text())
    assert set(json.loads(report.read_text())["images_by_device"]) == {"cpu:0", "cpu:1"}
