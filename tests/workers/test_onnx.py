"""The network as ONNX: what is in the files, and how the engine onnx refuses others; its answers are test_golden's."""
from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from blendmaskd import settings
from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd_workers import __main__ as worker
from blendmaskd_workers import blendmask, engines
from blendmaskd_workers.engines import EngineError, onnx_export
from blendmaskd_workers.engines import onnx as onnx_engine
from blendmaskd_workers.programs import export_onnx
from checkout import ROOT

GOLDEN, DEMO, ZOO = ROOT / "tests" / "golden", ROOT / "configs" / "demo", ROOT / "configs" / "BlendMask"
CONFIG, WEIGHTS = DEMO / "demo.yaml", DEMO / "model_final.pth"
# Those that CANN 8.0.0 lists for ONNX, of all that we might use: hiascend.com, canncommercial/800/apiref/aolapi,
# operatorlist_00176
CANN = frozenset({
    "Abs", "Add", "And", "Cast", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Conv", "Div", "Equal",
    "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "Gemm", "Greater", "GreaterOrEqual", "Identity",
    "InstanceNormalization", "IsInf", "IsNaN", "Less", "MatMul", "MaxPool", "Min", "Mod", "Mul", "Not", "Pow", "Range",
    "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax",
    "Split", "Sqrt", "Squeeze", "Sub", "TopK", "Transpose", "Unsqueeze", "Where", "Xor",
})  # fmt: skip


def network(config: Path, seed: int = 0) -> blendmask.BlendMask:
    trained = blendmask.build(blendmask.load_config(config))
    blendmask.load_into(trained, blendmask.random_weights(trained, seed))
    return blendmask.for_inference(trained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In `any` the demo model's files for all sizes."""
    path = tmp_path_factory.mktemp("onnx")
    assert run_export(path / "any") == 0
    return path


def run_export(output: Path, *arguments: str, weights: Path = WEIGHTS) -> int:
    given = ["--config", str(CONFIG), "--weights", str(weights), "--output", str(output)]
    return export_onnx.main([*given, *arguments])


# -- what is in the files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [
    CONFIG, GOLDEN / "small_R18_naivegn.yaml", GOLDEN / "small_R18_scale.yaml",
    pytest.param(ZOO / "R_101_dcni3_5x.yaml", marks=pytest.mark.slow),
], ids=lambda path: path.stem)  # fmt: skip
def test_files_of_one_size_have_fixed_shapes_and_no_operator_that_a_compiler_may_lack(config: Path) -> None:
    models = onnx_export.export(network(config), "", 13, 2, (64, 96))
    for part, model in models.items():
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 13)]
        assert {node.domain for node in model.graph.node} == {""}
        assert {node.op_type for node in model.graph.node} - CANN == set()
        known = onnx_export.known_shapes(model)
        computed = [name for node in model.graph.node for name in node.output]
        assert [name for name in computed if name not in known] == [], part


def test_the_second_visit_has_a_fixed_number_of_places_whatever_images_it_takes() -> None:
    small = network(CONFIG)
    for batch, places in ((None, 25), (3, 300)):
        graph = onnx_export.export(small, "", 13, batch, None)["blend"].graph
        sides = {
            each.name: [axis.dim_value or axis.dim_param for axis in each.type.tensor_type.shape.dim]
            for each in (*graph.input, *graph.output)
        }
        resolution = small.config.resolution
        assert sides["kept"] == [places, 14]
        assert sides["masks"] == [places, resolution, resolution]
        assert sides["bases"] == [batch or "batch", small.config.num_bases, "bases_height", "bases_width"]


@pytest.mark.parametrize("opset", [13, 17, export_onnx.OPSETS[-1]])
def test_a_file_says_what_it_was_made_of(opset: int) -> None:
    small = network(CONFIG)
    for part, model in onnx_export.export(small, "0123", opset, None, (64, 96)).items():
        found = {each.key: each.value for each in model.metadata_props}
        assert found == onnx_engine.metadata(part, small.config, "0123", "N,3,64,96")
        assert found["channel_order"] == '"BGR"'
        assert model.opset_import[0].version == opset


def test_more_are_kept_than_there_are_places() -> None:
    small = network(CONFIG)
    models = onnx_export.export(small, "", 13, None, None)
    contents = [models[part].SerializeToString() for part in onnx_engine.PARTS]
    exported = onnx_engine.open_network(Path(), contents, small.config, ["CPUExecutionProvider"])
    images = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
    kept = torch.rand(60, 14, generator=torch.Generator().manual_seed(0)) * 60
    kept[:, :9], kept[:, 9] = kept[:, :9].floor(), torch.arange(60) % 2
    with torch.inference_mode():
        masks = exported.blend(exported.propose(images), kept)
        expected = small.blend(small.propose(images), kept)
    assert (masks - expected).abs().max() < 1e-5


# -- the program ------------------------------------------------------------------------------------------------------


def test_the_program_compares_with_torch_and_says_how_to_compile(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_export(folder / "fixed", "--batch", "2", "--size", "64", "96", "--opset", "14") == 0
    said = capsys.readouterr()
    assert f"{folder}/fixed/propose.onnx: opset 14, " in said.out
    assert re.search(r"2 images of 64x96: differs from torch by at most \d\.\de-0[5-7] of the largest value", said.out)
    assert 'atc --framework=5 --model=propose.onnx ' in said.out
    assert '--input_shape="images:2,3,64,96" ' in said.out
    assert said.err == ""


def test_without_onnxruntime_nothing_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run_export(tmp_path / "files", "--batch", "1", "--size", "64", "64") == 0
    assert "not compared with torch: onnxruntime is not installed" in capsys.readouterr().out
    assert len(list((tmp_path / "files").iterdir())) == 2


def test_files_that_differ_from_torch_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = [onnx_engine.read(folder / "any" / onnx_engine.file_of(part)) for part in onnx_engine.PARTS]
    exported = onnx_engine.open_network(folder, contents, blendmask.load_config(CONFIG), ["CPUExecutionProvider"])
    other = network(CONFIG, seed=1)
    assert export_onnx._compare(other, exported, [(1, 64, 64)]) == 1
    assert "do not use the files" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--size", "800", "1080"], "1080: expected a multiple of 32"),
    (["--batch", "0"], "0: expected a whole number from 1 on"),
    (["--opset", "12"], "invalid choice"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_told(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run_export(folder / "none", *arguments)
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_export(tmp_path / "none", weights=tmp_path / "weights.pth") == 1
    assert "weights.pth: cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_documented_command_lines_are_the_programs() -> None:
    page = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    config = blendmask.load_config(ZOO / "R_50_1x.yaml")
    shallow = blendmask.build(replace(config, depth=18, res2_channels=64))  # of the same shapes in a fifth of the time
    models = onnx_export.export(blendmask.for_inference(shallow), "", 13, 1, (800, 1088))
    written = " ".join(page.replace("\\\n", " ").split())
    for command in onnx_export.atc_commands(models):
        assert command in written


# -- the engine -------------------------------------------------------------------------------------------------------


def make(weights: Path, *overrides: str) -> engines.Engine:
    given = ["engine=onnx", f"model.weights={weights}", f"model.config={CONFIG}", *overrides]
    return engines.make(settings.load(None, None, given, ["cpu:0"]), "cpu")


def without_metadata(path: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


def of_other_weights(path: Path) -> None:
    model = onnx_export.export(network(CONFIG, seed=1), "another", 13, None, None)[path.stem]
    onnx.save(model, path)


def of_half_precision(path: Path) -> None:
    """As converters leave it that keep the metadata."""
    model = onnx.load(path)
    [images] = model.graph.input
    images.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    cast = onnx.helper.make_node("Cast", ["halves"], [images.name], to=onnx.TensorProto.FLOAT)
    images.name = "halves"
    model.graph.node.insert(0, cast)
    onnx.save(model, path)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one is missing": (lambda files: (files / "blend.onnx").unlink(), r"blend\.onnx: cannot be read: No such file"),
    "cut short": (
        lambda files: os.truncate(files / "propose.onnx", 1000), r"propose\.onnx: onnxruntime does not run it: .*onnx"
    ),
    "something else": (
        lambda files: (files / "propose.onnx").write_text("<html>"), r"propose\.onnx: onnxruntime does not run it"
    ),
    "empty": (lambda files: (files / "blend.onnx").write_bytes(b""), r"blend\.onnx: .*(part|onnxruntime)"),
    "not ours": (lambda files: without_metadata(files / "propose.onnx"), "was not made by scripts/export_onnx.py"),
    "in half precision": (
        lambda files: of_half_precision(files / "propose.onnx"), r"takes halves as tensor\(float16\), expected float32"
    ),
    "swapped": (
        lambda files: shutil.copy(files / "blend.onnx", files / "propose.onnx"),
        r"propose\.onnx: was exported with part = blend, its name says propose",
    ),
    "of two exports": (
        lambda files: of_other_weights(files / "blend.onnx"),
        r"blend\.onnx: was exported with weights = another, propose\.onnx beside it says [0-9a-f]{16}",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_serve_are_refused_at_start_and_before_a_reload(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    spoil, complaint = FAULTS[fault]
    files = Path(shutil.copytree(folder / "any", tmp_path / "files"))
    spoil(files)
    engine = make(files)
    with pytest.raises(EngineError, match=complaint) as raised:
        engine.load()
    assert raised.value.exit_code == EXIT_CANNOT_BOOT
    assert "\n" not in str(raised.value)
    given = {"engine": "onnx", "devices": ["cpu:0"], "model": {"config": str(CONFIG), "weights": str(files)}}
    assert worker._check(settings.from_tree(given)) == EXIT_CANNOT_BOOT
    assert re.search(complaint, capsys.readouterr().err)


@pytest.mark.parametrize(("weights", "overrides", "complaint"), [
    ("any", [f"model.config={GOLDEN}/small_R18.yaml"], r"was exported with \w+ = .*, model\.config says"),
    ("any", ["model.providers=[NoExecutionProvider]"], r"model\.providers: NoExecutionProvider is not in the"),
    (WEIGHTS, [], r"model_final\.pth: is a file: the engine onnx takes the folder that this writes"),
    ("nowhere", [], r"nowhere/propose\.onnx: cannot be read: No such file"),
    ("any", ["model.weights=null"], "model.weights is not set: name the folder"),
    ("any", ["model.config=nowhere.yaml"], r"nowhere\.yaml: cannot be read"),
], ids=["another network", "no such provider", "a checkpoint", "no folder", "not set", "no config"])  # fmt: skip
def test_settings_that_do_not_fit_the_files_are_told(
    folder: Path, weights: str | Path, overrides: list[str], complaint: str
) -> None:
    with pytest.raises(EngineError, match=complaint):
        make(folder / weights, *overrides).load()


def test_files_of_one_size_are_for_compilers(folder: Path) -> None:
    assert run_export(folder / "one", "--size", "64", "96") == 0
    with pytest.raises(EngineError, match=r"takes N,3,64,96 images only"):
        make(folder / "one").load()


def test_the_digest_is_of_what_was_loaded(folder: Path, tmp_path: Path) -> None:
    """A copy is the same, other weights are not, nor is another list of categories."""
    copy = Path(shutil.copytree(folder / "any", tmp_path / "copy"))
    first, same, other = make(folder / "any"), make(copy), make(copy)
    first.load()
    same.load()
    assert first.model == same.model
    assert re.fullmatch("[0-9a-f]{16}", first.model or "")
    for part in onnx_engine.PARTS:
        of_other_weights(copy / onnx_engine.file_of(part))
    other.load()
    assert other.model != first.model


def test_answers_do_not_depend_on_company_or_warm_up(folder: Path) -> None:
    engine = make(folder / "any")
    engine.load()
    engine.warm_up([(64, 96)], 3)
    images = [np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8) for seed in range(3)]
    prepared = [engine.prepare(image) for image in images]
    together = engines.segment(engine, prepared)
    for one, found in zip(prepared, together):
        [alone] = engines.segment(engine, [one])
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-6)
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-3)
