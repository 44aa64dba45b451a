"""What scripts/benchmark_host.py says; its figures are its own."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blendmaskd_workers import blendmask
from blendmaskd_workers.benchmark import host, pictures

CONFIG = Path(__file__).parents[1] / "golden/small_R18.yaml"
ARGUMENTS = ["--config", str(CONFIG), "--rounds", "1"]


@pytest.fixture(autouse=True)
def _threads_of_others():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_tells_each_photograph_and_the_masks(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    sizes = ["--sizes", "300x400", "512x512"]
    assert host.main([*ARGUMENTS, *sizes, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["photograph"] for row in found["rows"]] == ["400x300", "512x512"]
    assert all(row["same"] and row["ms"] > 0 and row["ratio"] > 0 for row in found["rows"])
    assert found["masks"]["masks"] == 100
    assert host.main([*ARGUMENTS, *sizes, "--require", "0.01"]) == 1


def test_other_pixels_than_pillows_are_noticed() -> None:
    config = blendmask.load_config(str(CONFIG))
    encoded = pictures.synthetic((300, 400), "jpeg").payload or b""
    prepared = host.prepare(encoded, config)
    prepared.tensor[0, 5, 7] += 1
    assert not host._same(prepared, host.resize(encoded, *prepared.net_size), config)


def test_what_is_no_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert host.main([*ARGUMENTS, "--images", str(tmp_path)]) == 2
    assert "broken.jpg: not a JPEG" in capsys.readouterr().err
