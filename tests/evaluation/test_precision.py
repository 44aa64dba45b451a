"""The precision program: zeros where a device is equal, a module's name where it is not."""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blendmaskd_workers import blendmask
from blendmaskd_workers.evaluation import logs, outputs, precision, scenes, subjects
from blendmaskd_workers.evaluation.accelerator.sections import deviations
from blendmaskd_workers.evaluation.arithmetic import LADDER
from blendmaskd_workers.evaluation.subjects import Depth, Initial, Subject
from checkout import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

EMULATED = {"PYTHONPATH": str(ROOT / "tests" / "emulated")}
LOSSES = {"loss_basis_sem", "loss_mask", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


@pytest.fixture
def run(config: Path, tmp_path: Path, read_report: Callable[..., Any]) -> Callable[..., tuple[int, Any]]:
    """``run("--device", "cpu", …)``: exit code and report of the program in this process."""

    def run(*arguments: str) -> tuple[int, Any]:
        common = ["--config", str(config), "--random-weights", "0", "--output-dir", str(tmp_path)]
        code = precision.main([*common, *arguments])
        return code, read_report(tmp_path, "precision", logs.write_precision)

    return run


@contextlib.contextmanager
def planted(subject: Subject, module: str, factor: float) -> Iterator[None]:
    """A network with an error in one module."""
    hooked = subject.model.get_submodule(module)
    handle = hooked.register_forward_hook(lambda _module, _args, output: output * factor)
    yield
    handle.remove()


TRACED = Depth(trace=True)


def evaluate(reference: Subject, device: Subject, depth: Depth = TRACED) -> Any:
    """The report on one scene."""
    [scene, _] = scenes.painted(0)
    return subjects.evaluate(reference, device, [scene], depth)


@pytest.mark.slow
def test_the_cpu_agrees_with_itself(run, tmp_path) -> None:
    code, report = run("--device", "cpu", "--trace")
    assert code == 0
    assert report["failures"] == []
    for scene in report["scenes"]:
        assert {row["name"] for row in scene["losses"]} == LOSSES
        assert all(row["abs_diff"] == 0 and row["reference"] > 0 for row in scene["losses"])
        assert [row["name"] for row in scene["tensors"]][:5] == LEVELS
        assert len(scene["tensors"]) == 26  # and logits, distances, centre-ness, attentions of each, and the bases
        assert all(row["abs_max"] == row["over"] == 0 and row["of"] > 0 for row in scene["tensors"])
        found = scene["detections"]
        assert found["reference"] == found["device"] == found["matched"] > 0
        assert (found["box_diff_px"], found["iou_min"]) == (0, 1)
    assert report["trace"]["first"] is None
    assert report["trace"]["worst"] is None
    with Image.open(tmp_path / "precision_eval.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 20  # it shows something


@pytest.mark.slow
def test_a_layer_with_a_planted_error_is_named(run, monkeypatch) -> None:
    module, load = "backbone.bottom_up.res3.0.conv2", subjects.load

    def load_and_plant(config: Any, weights: Any, name: str, *options: Any) -> Subject:
        subject = load(config, weights, name, *options)
        if name == "cpu:1":
            stack.enter_context(planted(subject, module, 1.02))
        return subject

    monkeypatch.setattr(subjects, "load", load_and_plant)
    with contextlib.ExitStack() as stack:
        code, report = run("--device", "cpu:1", "--trace")
    assert code == 1
    assert report["trace"]["first"] == report["trace"]["worst"] == module
    assert any(failure.startswith(f"module {module}:") for failure in report["failures"])
    for name in LEVELS:
        assert any(failure.startswith(f"{name} on scene 1") for failure in report["failures"])


@pytest.mark.slow
def test_an_error_that_a_norm_takes_back_is_found_by_the_trace_alone(pair) -> None:
    module = "proposal_generator.fcos_head.cls_tower.0"
    with planted(pair[1], module, 1.02):
        report = evaluate(*pair)
    assert [failure.partition(":")[0] for failure in report["failures"]] == [f"module {module}"]


def test_an_error_below_the_bar_is_no_failure_but_reported(pair) -> None:
    with planted(pair[1], "basis_module.tower.3", 1.004):
        report = evaluate(*pair)
    assert report["failures"] == []
    assert report["trace"]["first"] is None
    assert report["trace"]["worst"] == "basis_module.tower.3"
    bases = report["scenes"][0]["tensors"][-1]
    assert bases["name"] == "bases"
    assert bases["p50"] == pytest.approx(0.004, rel=0.01)


def test_a_loss_that_differs_is_a_failure_by_itself(pair) -> None:
    with planted(pair[1], "basis_module.seg_head.6", 1.5):  # inference does not run it, nor does the trace
        report = evaluate(*pair)
    assert {failure.split()[0] for failure in report["failures"]} == {"loss_basis_sem"}


@pytest.mark.parametrize("factor", [math.nan, 1e30])
def test_a_device_that_overflows_is_told_and_drawn(pair, tmp_path, factor: float) -> None:
    with planted(pair[1], "basis_module.tower.0", factor):
        report = evaluate(*pair, Depth(trace=True, double_benchmark=True))
    assert report["trace"]["first"] == "basis_module.tower.0"
    assert report["scenes"][0]["max_rel_diff"] > 0.01
    run = dict.fromkeys(("reference", "device", "model", "dtype", "hf32", "weights"), "cpu")
    outputs.write(tmp_path, "precision", {"run": run, **report}, "")
    written = json.loads((tmp_path / "precision_eval.json").read_text())
    assert deviations(written)["loss_diff"] > 0.01


def test_bfloat16_enters_at_the_first_convolution(pair) -> None:
    report = evaluate(pair[0], dataclasses.replace(pair[1], dtype="bf16"))
    assert report["trace"]["first"] == "backbone.bottom_up.stem.conv1"
    norms = [row for row in report["trace"]["modules"] if row["name"].endswith(".norm")]
    assert norms
    assert all(row["over"] == 0 for row in norms)  # they are computed in float32, from the reference's input


def test_the_losses_are_those_of_training_and_leave_the_network_as_it_was(pair) -> None:
    subject = pair[0]
    network = subject.model.config
    before = {name: buffer.clone() for name, buffer in subject.model.named_buffers()}
    [scene, _] = scenes.painted(0)
    prepared = blendmask.prepare(scene.pixels, network)
    first, second = (subjects.train_losses(subject, scene, prepared) for _ in range(2))
    assert first == second
    assert not subject.model.training
    for name, buffer in subject.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_the_double_benchmark_passes_float32_and_fails_bfloat16(pair) -> None:
    depth = Depth(double_benchmark=True)
    assert evaluate(*pair, depth)["failures"] == []
    report = evaluate(pair[0], dataclasses.replace(pair[1], dtype="bf16"), depth)
    rows = report["scenes"][0]["double_benchmark"]
    assert [row["name"] for row in rows] == [row["name"] for row in report["scenes"][0]["tensors"]]
    assert all({"rmse", "rel_mean"} <= set(row["over"]) for row in rows)
    assert any("rmse against float64 is" in failure for failure in report["failures"])


def test_float32_in_another_order_passes_the_double_benchmark(pair) -> None:
    device = dataclasses.replace(pair[1], model=copy.deepcopy(pair[1].model).to(memory_format=torch.channels_last))
    report = evaluate(pair[0], device, Depth(double_benchmark=True))
    rows = [row for row in report["scenes"][0]["double_benchmark"] if not row["name"].endswith("p7")]  # one cell here
    assert [row["name"] for row in rows if row["over"]] == []
    assert any(row["rmse"] != 1 for row in rows)


def test_the_ladder_grows_with_the_coarseness_of_the_arithmetic(run) -> None:
    code, report = run("--device", "cpu", "--ladder")
    assert code == 0
    assert report["ladder"]["verdict"] == "fp32 in all 42 convolutions"
    for scene in report["scenes"]:
        rungs = {row["name"]: row for row in scene["ladder"]}
        assert list(rungs) == list(LADDER)
        errors = [rungs[name]["rmse_over_std"] for name in ("hf32", "10 bits", "9 bits", "bf16")]
        assert errors == sorted(errors)
        assert all(row["scale_bias"] < -10 * abs(rungs["hf32"]["scale_bias"])
                   for name, row in rungs.items() if name.endswith("truncated"))  # fmt: skip
        assert all(len(row["levels"]) == 5 for row in rungs.values())


@pytest.mark.slow
def test_initial_weights_give_the_losses_of_a_network_that_has_learnt_nothing(tmp_path) -> None:
    config = tmp_path / "R_50.yaml"
    config.write_text(f"_BASE_: {ROOT / 'configs' / 'BlendMask' / 'R_50_1x.yaml'}\nINPUT:\n  MIN_SIZE_TEST: 320\n")
    code = precision.main(["--config", str(config), "--initial-weights", "0", "--device", "cpu",
                           "--output-dir", str(tmp_path)])  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "precision_eval.json").read_text())
    assert report["run"]["weights"] == "initial, seed 0"
    for scene in report["scenes"]:
        losses = {row["name"]: row["reference"] for row in scene["losses"]}
        assert 1.0 < losses["loss_fcos_cls"] < 1.3
        assert 0.95 < losses["loss_fcos_loc"] < 1.0
        assert 0.64 < losses["loss_fcos_ctr"] < 0.75
        assert 0.62 < losses["loss_mask"] < 0.75
    assert any("loss_fcos_ctr" in warning and "prove nothing" in warning for warning in report["warnings"])
    assert any("loss_mask" in warning for warning in report["warnings"])
    assert f"WARNING: {report['warnings'][0]}" in (tmp_path / "precision_eval.log").read_text().splitlines()


def test_frozen_norms_are_the_identity_before_training_and_seeds_differ(config) -> None:
    network = blendmask.load_config(config)
    first, again, other = (subjects.load(network, Initial(seed), "cpu").model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["basis_module.tower.3.weight"], other["basis_module.tower.3.weight"])
    norms = [values for name, values in first.items() if ".bottom_up." in name and ".norm." in name]
    assert norms
    assert all(bool((values == values[0]).all()) for values in norms)


@pytest.mark.parametrize(("loss", "warned"), [(0.6, False), (0.65, True), (0.84, True), (0.9, False)])
def test_a_loss_is_warned_of_where_initial_weights_have_it(loss: float, warned: bool) -> None:
    rows = [{"scene": "scene", "losses": [{"name": "loss_fcos_ctr", "reference": loss}]}]
    assert bool(subjects._warnings(rows)) == warned


def test_a_network_that_has_learnt_is_not_warned_of() -> None:
    network = blendmask.load_config(ROOT / "configs" / "demo" / "demo.yaml")
    subject = subjects.load(network, str(ROOT / "configs" / "demo" / "model_final.pth"), "cpu")
    assert evaluate(subject, subject, Depth())["warnings"] == []


@pytest.mark.parametrize(("chip", "switches", "found"), [
    ("Ascend910B3", {"conv_hf32": "off", "internal_formats": "disable"}, {"cube_math_type": "0 (KEEP_DTYPE)"}),
    ("Ascend910_9382", {"conv_hf32": "on", "internal_formats": "disable"}, {"cube_math_type": "3 (USE_HF32)"}),
    ("Ascend910B3", {"conv_hf32": "off", "internal_formats": "not set"}, {}),
    ("Ascend910A", {"conv_hf32": "off", "internal_formats": "disable"}, {}),
    ("Ascend310P3", {"conv_hf32": "off", "internal_formats": "disable"}, {}),
    ("cpu", {}, {}),
])  # fmt: skip
def test_the_arithmetic_of_a_chip_is_told_only_where_it_is_known(chip, switches, found) -> None:
    assert subjects.cube_math_type(chip, switches) == found


@pytest.mark.slow
def test_a_photograph_can_be_the_scene(run) -> None:
    code, report = run("--device", "cpu", "--images", str(ROOT / "tests" / "golden" / "images" / "chelsea.png"))
    assert code == 0
    [scene] = report["scenes"]
    assert (scene["scene"], scene["size"]) == ("chelsea.png", "300x451")


@pytest.mark.slow
def test_an_emulated_npu_agrees(config, script, read_report, tmp_path) -> None:
    weights = tmp_path / "weights.pth"
    network = blendmask.build(blendmask.load_config(config))
    torch.save({"model": blendmask.random_weights(network)}, weights)
    done = script("eval_precision", "--config", config, "--weights", weights, "--device", "npu:1", "--trace",
                  "--output-dir", tmp_path, environment=EMULATED)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path, "precision", logs.write_precision)
    assert report["run"]["model"] == "Ascend910-emulated physical 1"
    assert (report["run"]["conv_hf32"], report["run"]["matmul_hf32"]) == ("off", "off")
    assert {row["abs_max"] for scene in report["scenes"] for row in scene["tensors"]} == {0}
    assert {row["abs_max"] for row in report["trace"]["modules"]} == {0}
    lines = done.stdout.splitlines()
    assert lines[:3] == ["=" * 60, "Precision evaluation", "=" * 60]
    assert any(line.startswith("[loss_fcos_cls] CPU=") and " NPU=" in line for line in lines)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "npu:0"], "torch_npu"),
    (["--device", "cpu", "--images", "missing.png"], "missing.png"),
    (["--device", "cpu", "--images", __file__], "test_precision.py: not a JPEG"),
    (["--device", "cpu", "--output-dir", __file__], "--output-dir"),
    (["--device", "cpu", "--output-dir", "/proc"], "--output-dir /proc: "),
])  # fmt: skip
def test_what_cannot_be_had_is_said(config, tmp_path, capsys, arguments, said) -> None:
    code = precision.main(["--config", str(config), "--random-weights", "0", "--output-dir", str(tmp_path), *arguments])
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "precision_eval.log").exists()


@pytest.mark.parametrize("arguments", [
    ["--device", "gpu"],
    ["--device", "npu:1", "--reference", "npu:0", "--hf32", "on"],
    ["--device", "npu:1", "--reference", "npu:0", "--ladder"],
    ["--device", "cpu", "--reference", "cuda:0", "--double-benchmark"],
    ["--device", "cpu", "--initial-weights", "0"],
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(config, arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        precision.main(["--config", str(config), "--random-weights", "0", *arguments])
    assert ended.value.code == 2
