"""The inference program, end to end on the small network with its reproducible weights."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO as CocoDataset
from pycocotools.cocoeval import COCOeval

from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import build, load_config, random_weights
from blendmaskd_workers.programs.inference import UsageError, main, plan
from checkout import ROOT

# pycocotools 2.0.11 hands numpy an array by a protocol that numpy 2.4 warns about.

GOLDEN = ROOT / "tests" / "golden"
CONFIG = str(GOLDEN / "small_R18.yaml")
CHELSEA = str(GOLDEN / "images" / "chelsea.png")
CLASSES = [{"id": 4, "name": "bolt"}, {"id": 7, "name": "nut"}, {"id": 9, "name": "gear"}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint as AdelaiDet saves it, with the weights of the recorded reference."""
    path = tmp_path_factory.mktemp("weights") / "model_final.pth"
    torch.save({"model": random_weights(build(load_config(CONFIG))), "iteration": 1}, path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small photographs, one of them no image."""
    folder = tmp_path / "photos"
    folder.mkdir()
    with Image.open(CHELSEA) as chelsea:
        chelsea.crop((100, 50, 260, 170)).save(folder / "a.png")
        chelsea.resize((150, 100)).save(folder / "c.jpg")
    (folder / "b.jpg").write_bytes(b"this is no photograph")
    (folder / "notes.txt").write_text("not an image either")
    return folder


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "inference.py"), *arguments],
        cwd="/", env={**os.environ, **environment}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def install_a_torch_npu_that_cannot_be_imported(folder: Path) -> None:
    """As on a host with torch_npu but without CANN, where `import torch` by itself fails."""
    distribution = folder / "torch_npu-2.13.0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (distribution / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    (folder / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file')\n")


@pytest.mark.slow
def test_the_script_of_a_clone_gives_what_the_reference_gives(weights: str, tmp_path: Path) -> None:
    drawn, results = tmp_path / "result.jpg", tmp_path / "out.json"
    install_a_torch_npu_that_cannot_be_imported(tmp_path)
    run = script("--config", CONFIG, "--weights", weights, "--input", CHELSEA, "--output", str(drawn),
                 "--json", str(results), "--score-threshold", "0", PYTHONPATH=str(tmp_path))  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "chelsea.png: 100 instances" in run.stderr
    found = json.loads(results.read_text())
    golden = np.load(GOLDEN / "small_R18_chelsea.npz")
    scores = np.array([result["score"] for result in found])
    np.testing.assert_allclose(scores, golden["img0_scores"], rtol=1e-4)
    assert (np.diff(scores) <= 0).all()
    boxes = np.array([result["bbox"] for result in found])
    boxes[:, 2:] += boxes[:, :2]
    close = np.abs(boxes - golden["img0_pred_boxes"]).max(axis=1) < 0.05
    assert close.mean() >= 0.9  # neighbours whose scores differ by rounding may have swapped
    assert [found[0][key] for key in ("file_name", "image_id")] == ["chelsea.png", 1]
    assert {(r["class_index"], r["category_id"], r["category_name"]) for r in found} <= {
        (index, index + 1, f"class_{index}") for index in range(3)
    }
    with Image.open(CHELSEA) as original, Image.open(drawn) as overlay:
        assert overlay.size == original.size
        assert overlay.format == "JPEG"
        assert np.abs(np.asarray(overlay).astype(int) - np.asarray(original.convert("RGB"))).mean() > 5


@pytest.mark.slow
def test_an_npu_gives_what_the_cpu_gives(weights: str, folder: Path, tmp_path: Path) -> None:
    on_cpu, on_npu = tmp_path / "cpu.json", tmp_path / "npu.json"
    common = ["--config", CONFIG, "--weights", weights, "--input", str(folder / "c.jpg")]
    assert main([*common, "--json", str(on_cpu)]) == 0
    run = script(*common, "--json", str(on_npu), "--device", "npu:1", PYTHONPATH=str(ROOT / "tests" / "emulated"))
    assert run.returncode == 0, run.stderr
    theirs, ours = json.loads(on_cpu.read_text()), json.loads(on_npu.read_text())
    assert len(theirs) > 10
    for key in ("score", "bbox"):  # a CPU sums in another order: it keeps channels together
        np.testing.assert_allclose([one[key] for one in ours], [one[key] for one in theirs], rtol=1e-3, atol=0.01)
    assert [one["category_id"] for one in ours] == [one["category_id"] for one in theirs]


@pytest.mark.slow
def test_precision_is_what_was_asked_for_or_refused(weights: str, folder: Path, tmp_path: Path) -> None:
    common = ["--config", CONFIG, "--weights", weights, "--input", str(folder / "c.jpg"), "--score-threshold", "0"]
    assert main([*common, "--json", str(tmp_path / "auto.json"), "--precision", "auto"]) == 0
    assert len(json.loads((tmp_path / "auto.json").read_text())) > 10
    run = script(*common, "--json", str(tmp_path / "half.json"), "--precision", "fp16")
    assert run.returncode == 2
    assert "--precision fp16: cpu: float16 is some forty times slower" in run.stderr


def test_exact_results_are_the_trained_networks_to_the_last_bit(weights: str, tmp_path: Path) -> None:
    """And so their masks are the reference's, but where that one's value is one half."""
    common = ["--config", CONFIG, "--weights", weights, "--input", str(CHELSEA), "--score-threshold", "0"]
    assert main([*common, "--json", str(tmp_path / "exact.json"), "--exact"]) == 0
    found = json.loads((tmp_path / "exact.json").read_text())
    network = blendmask.build(blendmask.load_config(CONFIG))
    blendmask.load_into(network, blendmask.load_checkpoint(weights))
    pixels = np.asarray(Image.open(CHELSEA).convert("RGB"))[:, :, ::-1]
    prepared = blendmask.prepare(pixels, network.config)
    right = blendmask.finish(*blendmask.segment(network, [prepared]), prepared)
    assert [one["score"] for one in found] == right.scores.tolist()
    assert [one["bbox"][:2] for one in found] == right.boxes[:, :2].tolist()
    for one, mask in zip(found, right.masks(), strict=True):
        assert (coco_mask.decode(one["segmentation"]) == mask).all()


@pytest.mark.parametrize("precision", ["hf32", "bf16", "fp16", "auto"])
def test_exact_is_of_fp32(weights: str, precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--config", CONFIG, "--weights", weights, "--input", str(CHELSEA), "--json", str(tmp_path / "out.json")]
    assert main([*asked, "--exact", "--precision", precision]) == 2
    assert f"--precision {precision}: --exact computes in fp32; leave one of them out" in capsys.readouterr().err


def test_a_bad_image_among_many_is_reported_and_the_rest_is_done(
    weights: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, results, drawn = tmp_path / "parts.json", tmp_path / "deep" / "out.json", tmp_path / "drawn"
    names.write_text(json.dumps(CLASSES))
    code = main(["--config", CONFIG, "--weights", weights, "--input", str(folder), str(folder / "gone.png"),
                 "--output", str(drawn), "--json", str(results), "--categories", str(names)])  # fmt: skip
    written = capsys.readouterr()
    assert code == 1
    assert "b.jpg: FAILED: not a JPEG, PNG, WebP, BMP or TIFF image" in written.err
    assert "gone.png: FAILED: No such file or directory" in written.err
    assert "2 of 4 images" in written.out
    assert sorted(file.name for file in drawn.iterdir()) == ["a.png", "c.jpg"]
    found = json.loads(results.read_text())
    assert {(result["file_name"], result["image_id"]) for result in found} == {("a.png", 1), ("c.jpg", 3)}
    assert all(result["score"] >= 0.3 for result in found)
    assert {(r["class_index"], r["category_id"], r["category_name"]) for r in found} <= {
        (0, 4, "bolt"), (1, 7, "nut"), (2, 9, "gear"),
    }  # fmt: skip
    evaluate(found)


def evaluate(found: list[dict[str, Any]]) -> None:
    """pycocotools takes the list as it is, and scores it perfectly against itself."""
    truth = CocoDataset()
    sizes = {result["image_id"]: result["segmentation"]["size"] for result in found}
    truth.dataset = {
        "info": {},
        "images": [{"id": number, "height": size[0], "width": size[1]} for number, size in sizes.items()],
        "annotations": [
            result | {"id": number, "iscrowd": 0, "area": result["bbox"][2] * result["bbox"][3]}
            for number, result in enumerate(found, start=1)
        ],
        "categories": CLASSES,
    }
    truth.createIndex()
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in found]), kind)
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
        recall = evaluation.eval["recall"][0, :, 0, -1]  # IoU 0.5, all areas
        assert (recall[recall > -1] == 1).all()


def test_random_weights_are_said_to_mean_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for seed in ([], ["5"]):
        results = tmp_path / "out.json"
        code = main(["--config", CONFIG, "--input", str(folder / "c.jpg"), "--json", str(results),
                     "--random-weights", *seed])  # fmt: skip
        assert code == 0
        assert f"Random weights (seed {seed[0] if seed else 0}): the results mean nothing" in capsys.readouterr().err
        found.append(json.loads(results.read_text()))
    assert found[0] != found[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the program says on ending with code 2."""
    try:
        assert main(arguments) == 2
    except SystemExit as ended:
        assert ended.code == 2  # noqa: PT017 - argparse's own way out
    return capsys.readouterr().err


def test_without_weights_it_says_what_is_missing_and_how_to_get_it(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--config", "configs/BlendMask/R_50_1x.yaml", "--input", CHELSEA, "--output", "result.jpg")
    assert "--weights is missing" in said
    assert "table row R_50_1x" in said
    assert "https://github.com/aim-uofa/AdelaiDet/blob/master/configs/BlendMask/README.md" in said
    assert "--random-weights" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "absent.pth"], "--weights absent.pth: no such file"),
        (["--weights", CHELSEA], "is not a PyTorch checkpoint"),
        (["--weights", "W", "--random-weights"], "not allowed with"),
        (["--weights", "W", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["--weights", "W", "--config", str(ROOT / "configs/BlendMask/R_50_1x.yaml")], "do not fit the network"),
        (["--weights", "W", "--input", "absent.jpg"], "--input absent.jpg: no such file or folder"),
        (["--weights", "W", "--input", "absent/*.jpg"], "matches no images"),
        (["--weights", "W", "--input", str(ROOT / "daemon")], "no images in this folder"),
        (["--weights", "W", "--categories", "absent.json"], "absent.json"),
        (["--weights", "W", "--device", "tpu"], "expected npu, npu:N"),
        (["--weights", "W", "--device", "cuda:99"], "--device cpu runs everywhere"),
        (["--weights", "W", "--score-threshold", "1.5"], "expected a number from 0 to 1"),
        (["--weights", "W", "--score-threshold", "high"], "expected a number from 0 to 1"),
        (["--weights", "W", "--json", str(ROOT)], "is a folder"),
        (["--weights", "W", "--output", "/proc/none/result.jpg"], "/proc/none"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    given = [weights if argument == "W" else argument for argument in arguments]
    defaults = ["--config", CONFIG, "--input", CHELSEA, "--output", str(tmp_path / "result.jpg")]
    assert said in refused(capsys, *defaults, *given)
    assert not (tmp_path / "result.jpg").exists()


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    code = (
        "import sys, blendmaskd_workers.programs.inference as i;"
        "print(i.main(['--config=c', '--input=i']), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["2", "False"]


def test_with_nothing_to_write_nothing_is_computed(weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--config", CONFIG, "--weights", weights, "--input", CHELSEA)
    assert "nothing to write" in said


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """one/a.jpg, one/b.PNG, one/deep/a.jpg, two/photo, two/notes.txt below the current folder."""
    for name in ("one/a.jpg", "one/b.PNG", "one/deep/a.jpg", "two/photo", "two/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["one/a.jpg"], ["a.jpg"]),
        (["one"], ["a.jpg", "b.PNG"]),
        (["one/", "one/b.PNG", "./one/a.jpg"], ["a.jpg", "b.PNG"]),
        (["one/b.PNG", "one"], ["b.PNG", "a.jpg"]),
        (["one/*.jpg", "two/photo"], ["a.jpg", "photo"]),
        (["one/**/*.jpg"], ["a.jpg", "deep/a.jpg"]),
        (["one/deep", "two/photo", "one/a.jpg"], ["one/deep/a.jpg", "two/photo", "one/a.jpg"]),
    ],
)
def test_inputs_are_files_folders_and_patterns_each_image_once(tree: Path, inputs: list[str], names: list[str]) -> None:
    found = plan(inputs, None)
    assert [photograph.name for photograph in found] == names
    assert [photograph.image_id for photograph in found] == list(range(1, len(names) + 1))
    assert all(photograph.path.is_file() for photograph in found)


@pytest.mark.parametrize(
    ("inputs", "output", "outputs"),
    [
        (["one/a.jpg"], "result.png", ["result.png"]),
        (["one/a.jpg"], "out", ["out/a.jpg"]),
        (["one/a.jpg"], "out.d/", ["out.d/a.jpg"]),
        (["one/a.jpg"], "two", ["two/a.jpg"]),
        (["one"], "out", ["out/a.jpg", "out/b.PNG"]),
        (["one", "two/photo"], "v1.2", ["v1.2/a.jpg", "v1.2/b.PNG", "v1.2/photo.png"]),
        (["one/**/*.jpg"], "out", ["out/a.jpg", "out/deep/a.jpg"]),
    ],
)
def test_overlays_go_to_a_file_or_a_folder(tree: Path, inputs: list[str], output: str, outputs: list[str]) -> None:
    assert [str(photograph.output) for photograph in plan(inputs, output)] == outputs


@pytest.mark.parametrize(
    ("inputs", "output", "said"),
    [
        (["one"], "result.jpg", "is one file, but there are 2 images"),
        (["one/a.jpg"], "result.gif", "cannot write .gif"),
        (["one/a.jpg"], "one/a.jpg", "is an input"),
        (["one/a.jpg"], "two/../one/a.jpg", "is an input"),
        (["one"], "one", "is an input"),
    ],
)
def test_an_output_that_cannot_be_meant_is_refused(tree: Path, inputs: list[str], output: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan(inputs, output)


def test_two_overlays_never_share_a_file(tree: Path) -> None:
    (tree / "two" / "photo.png").touch()
    with pytest.raises(UsageError, match="the overlay of another input"):
        plan(["two/photo", "two/photo.png"], "out")


@pytest.mark.parametrize(("suffix", "lossless"), [(".webp", False), (".bmp", True), (".TIFF", True)])
def test_overlays_have_the_photographs_colours_in_every_format(
    weights: str, folder: Path, tmp_path: Path, suffix: str, lossless: bool
) -> None:
    drawn = tmp_path / f"result{suffix}"
    code = main(["--config", CONFIG, "--weights", weights, "--input", str(folder / "a.png"), "--output", str(drawn),
                 "--score-threshold", "1"])  # fmt: skip
    assert code == 0
    with Image.open(folder / "a.png") as original, Image.open(drawn) as overlay:
        difference = np.abs(np.asarray(overlay).astype(int) - np.asarray(original))
    assert difference.max() == 0 if lossless else difference.mean() < 4
