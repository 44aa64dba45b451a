"""The benchmark of the network: its plain side is the reference's arithmetic, and it notices other answers."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blendmaskd_workers import blendmask, devices
from blendmaskd_workers.programs import benchmark_masks, benchmark_network
from blendmaskd_workers.programs.benchmark_network import check_equal, multiplications, plain, served

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG, CHELSEA = str(GOLDEN / "small_R18.yaml"), str(GOLDEN / "images" / "chelsea.png")


@pytest.fixture(scope="module")
def sides() -> tuple[Any, ...]:
    """What both sides say of a photograph: instances and detections, instances and RLEs."""
    network = blendmask.build(blendmask.load_config(CONFIG))
    blendmask.load_into(network, blendmask.random_weights(network))
    pixels = benchmark_network.photograph(CHELSEA, 256)
    return (*plain(network, pixels), *served(blendmask.for_inference(network, channels_last=True), pixels))


def test_both_sides_say_the_same_and_another_answer_is_noticed(sides: tuple[Any, ...]) -> None:
    right, detections, found, rles = sides
    assert len(rles) > 10
    check_equal(right, detections, found, rles)
    blurred = replace(found, probabilities=found.probabilities + np.float32(2e-3))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check_equal(right, detections, blurred, rles)
    assert len(rles) == len(found.scores), "no box outside the image, or masks would not be compared"
    with pytest.raises(AssertionError, match="mask 0 differs"):
        check_equal(right, detections, found, [rles[1], *rles[1:]])
    with pytest.raises(AssertionError, match="other instances"):
        check_equal(right, detections, replace(found, classes=found.classes + 1), rles)


def test_pasting_everywhere_is_pasting_into_the_box(sides: tuple[Any, ...]) -> None:
    _, detections, *_ = sides
    everywhere = benchmark_network.pasted_everywhere(detections)
    assert everywhere == benchmark_network.pasted_into_windows(detections)


def test_multiplications_are_counted_by_hand() -> None:
    """The top layer of R_50_1x: 784 outputs of 9 x 256 inputs in 13343 cells of p3 to p7, or in 100 of them."""
    config = blendmask.load_config(Path(__file__).parents[2] / "configs/BlendMask/R_50_1x.yaml")
    dense, left = multiplications(config, (800, 800))
    assert dense - left == 784 * 9 * 256 * (100 * 100 + 50 * 50 + 25 * 25 + 13 * 13 + 7 * 7 - 100)
    assert 0.14 < 1 - left / dense < 0.16


def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_network, "BEST_CONVOLUTION", (16, 8, 8))
    monkeypatch.setattr(devices, "cpu_multiplies_bf16", lambda: False)
    threads = torch.get_num_threads()
    common = ["--config", CONFIG, "--image", CHELSEA, "--size", "128", "--rounds", "1", "--threads", "1"]
    try:
        assert benchmark_network.main([*common, "--json", str(tmp_path / "out.json")]) == 0
        assert benchmark_network.main([*common, "--require", "fp32=1000"]) == 1
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "bf16: skipped, this CPU has neither AVX512-BF16 nor AMX" in output
    assert "required are 1000x" in output
    [line] = json.loads((tmp_path / "out.json").read_text())["lines"]
    assert (line["precision"], line["same"]) == ("fp32", 1.0)
    assert min(line[key] for key in ("plain_ms", "exact_ms", "served_ms", "limit_ms", "ratio")) > 0


@pytest.mark.parametrize("main", [benchmark_network.main, benchmark_masks.main])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["--config", CONFIG, "--image", "nowhere.png"], "nowhere.png: No such file or directory"),
    ],
)
def test_a_file_that_is_not_there_is_told_in_one_line(
    main: Any, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    said = capsys.readouterr().err
    assert said.endswith(f"{reason}\n")
    assert said.count("\n") == 1
    assert "Errno" not in said
