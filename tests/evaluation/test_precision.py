"""The precision program: zeros where a device is equal, a module's name where it is not."""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blendmaskd_workers import blendmask
from blendmaskd_workers.evaluation import logs, precision, subjects
from blendmaskd_workers.evaluation.subjects import Depth, Subject
from checkout import ROOT

EMULATED = {"PYTHONPATH": str(ROOT / "tests" / "emulated")}
LOSSES = {"loss_basis_sem", "loss_mask", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
LEVELS = ["p3", "p4", "p5", "p6", "p7"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="module")
def pair(config: Path) -> tuple[Subject, Subject]:
    """A reference, and a device equal to it."""
    network = blendmask.load_config(config)
    return subjects.load(network, 0, "cpu"), subjects.load(network, 0, "cpu")


def evaluate(reference: Subject, device: Subject) -> Any:
    """The report on one scene, with the trace."""
    [scene, _] = subjects.scenes_of([], [], 0)
    return subjects.evaluate(reference, device, [scene], reference.model.config, Depth(trace=True))


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
    [scene, _] = subjects.scenes_of([], [], 0)
    prepared = blendmask.prepare(scene.pixels, network)
    first, second = (subjects.train_losses(subject, scene, prepared, network) for _ in range(2))
    assert first == second
    assert not subject.model.training
    for name, buffer in subject.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


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
    assert {row["abs_max"] for scene in report["scenes"] for row in scene["tensors"]} == {0}
    assert {row["abs_max"] for row in report["trace"]["modules"]} == {0}
    lines = done.stdout.splitlines()
    assert lines[:3] == ["=" * 60, "Precision evaluation", "=" * 60]
    assert any(line.startswith("[loss_fcos_cls] CPU=") and " NPU=" in line for line in lines)


@pytest.mark.parametrize(("arguments", "said"), [
    (["--device", "npu:0"], "torch_npu"),
    (["--device", "cpu", "--images", "missing.png"], "missing.png"),
    (["--device", "cpu", "--images", __file__], "test_precision.py: not a JPEG"),
])  # fmt: skip
def test_what_cannot_be_had_is_said(config, tmp_path, capsys, arguments, said) -> None:
    code = precision.main(["--config", str(config), "--random-weights", "0", "--output-dir", str(tmp_path), *arguments])
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "precision_eval.log").exists()


@pytest.mark.parametrize("arguments", [
    ["--device", "gpu"],
    ["--device", "npu:1", "--reference", "npu:0", "--hf32", "on"],
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(config, arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        precision.main(["--config", str(config), "--random-weights", "0", *arguments])
    assert ended.value.code == 2
