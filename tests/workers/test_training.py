"""The program that trains: real trainings that are interrupted and go on, what ends one early, what it refuses."""
from __future__ import annotations

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_training import configure, small_trainer

import shapes
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_USAGE
from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import ConfigError
from blendmaskd_workers.training import program
from blendmaskd_workers.training.batches import Batches
from blendmaskd_workers.training.config import load_training_config
from blendmaskd_workers.training.dataset import read_dataset
from blendmaskd_workers.training.initial import initialise
from blendmaskd_workers.training.trainer import Diverged, learning_rate
from checkout import ROOT

KEYS: dict[str, Any] = {
    "MODEL.FCOS.NUM_CLASSES": len(shapes.CATEGORIES),
    "MODEL.BASIS_MODULE.NUM_CLASSES": len(shapes.CATEGORIES),
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "BN",  # whose running statistics must survive an interruption too
    "INPUT.MASK_FORMAT": "bitmask",
    "INPUT.MIN_SIZE_TRAIN": [64, 96],
    "INPUT.MAX_SIZE_TRAIN": 128,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.STEPS": [4],
    "SOLVER.CHECKPOINT_PERIOD": 2,
}
INTERRUPTED = 130
KEPT, DONE_AGAIN = 123.0, 456.0  # losses in the log of the training that is resumed


@pytest.fixture(scope="module", autouse=True)
def _process():
    """What the program sets for its process is undone."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)


@dataclass
class Trained:
    """The same training three times: interrupted, resumed to its end, and never interrupted."""

    exit_code: int  # of the one that was interrupted
    told: str
    interrupted_at: int  # iterations
    max_iter: int
    resumed: Path
    whole: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    assert shapes.main(["--output", str(folder), "--train", "6", "--held-out", "1", "--seed", "5"]) == 0
    return folder


def arguments(data: Path, config: Path, output: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--images", str(data / "images" / "train"), "--annotations",
            str(data / "train.json"), "--output-dir", str(output), "--threads", "1", "--seed", "3", *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory, wait_until) -> Trained:
    """The process is interrupted some iterations after its first checkpoint; the end is two iterations later."""
    folder = tmp_path_factory.mktemp("trained")
    resumed, whole = folder / "resumed", folder / "whole"
    endless = configure(folder, KEYS | {"SOLVER.MAX_ITER": 100_000}, "endless.yaml")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments(data, endless, resumed)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: (resumed / program.CHECKPOINT).exists() or process.poll() is not None, 60)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (resumed / program.CHECKPOINT).exists(), told
    done = torch.load(resumed / program.CHECKPOINT, weights_only=True)["iteration"]
    with (resumed / program.LOG).open("a") as log:  # as if it had been killed, one iteration later
        for iteration, loss in ((done, KEPT), (done + 1, DONE_AGAIN)):
            log.write(json.dumps({"iteration": iteration, "total_loss": loss, "lr": 0.1}) + "\n")
    config = configure(folder, KEYS | {"SOLVER.MAX_ITER": done + 2}, "ending.yaml")
    assert program.main(arguments(data, config, resumed, "--resume")) == 0
    assert program.main(arguments(data, config, whole)) == 0
    return Trained(process.returncode, told, done, done + 2, resumed, whole)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / program.FINAL, weights_only=True)["model"]
    return found


@pytest.mark.slow
def test_an_interrupted_training_says_how_to_go_on(trained) -> None:
    assert trained.exit_code == INTERRUPTED
    assert f"interrupted after {trained.interrupted_at} iterations; --resume goes on" in trained.told
    assert "Traceback" not in trained.told


@pytest.mark.slow
def test_a_resumed_training_equals_an_uninterrupted_one(trained) -> None:
    resumed, whole = weights(trained.resumed), weights(trained.whole)
    assert resumed.keys() == whole.keys()
    assert [key for key in whole if not torch.equal(resumed[key], whole[key])] == []
    states = [torch.load(folder / program.CHECKPOINT, weights_only=True) for folder in (trained.resumed, trained.whole)]
    momenta = [{key: value["momentum_buffer"] for key, value in state["optimizer"]["state"].items()}
               for state in states]  # fmt: skip
    assert momenta[0].keys() == momenta[1].keys() != set()
    assert all(torch.equal(momenta[0][key], momenta[1][key]) for key in momenta[0])
    assert [state["iteration"] for state in states] == [trained.max_iter] * 2


def test_a_resumed_training_forgets_log_lines_of_what_it_does_again(trained) -> None:
    lines = [json.loads(line) for line in (trained.resumed / "log.jsonl").read_text().splitlines()]
    assert KEPT in [line["total_loss"] for line in lines]
    assert DONE_AGAIN not in [line["total_loss"] for line in lines]
    assert lines[-1]["iteration"] == trained.max_iter


def test_training_changes_the_weights(trained) -> None:
    state, final = torch.load(trained.whole / program.CHECKPOINT, weights_only=True)["model"], weights(trained.whole)
    assert all(torch.equal(state[key], final[key]) for key in final)
    torch.manual_seed(3)
    model = blendmask.build(blendmask.load_config(trained.whole.parent / "ending.yaml"))
    initialise(model, 0.01)
    assert [key for key, value in model.state_dict().items() if torch.equal(value, final[key])] == []


def test_final_weights_load_strictly(trained) -> None:
    model = blendmask.build(blendmask.load_config(trained.whole.parent / "ending.yaml"))
    model.load_state_dict(weights(trained.whole), strict=True)
    blendmask.load_into(model, blendmask.load_checkpoint(trained.whole / program.FINAL))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_output_files(trained) -> None:
    names = json.loads((trained.whole / "categories.json").read_text())
    assert names == [{"id": number, "name": name} for number, name in enumerate(shapes.CATEGORIES, 1)]
    [entry] = [json.loads(line) for line in (trained.whole / "log.jsonl").read_text().splitlines()]
    losses = {name for name in entry if "loss" in name}
    assert losses == {"total_loss", "loss_basis_sem", "loss_mask", "loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"}
    assert all(math.isfinite(value) for value in entry.values())
    assert entry["total_loss"] == pytest.approx(sum(entry[name] for name in losses - {"total_loss"}))
    assert entry["iteration"] == trained.max_iter
    assert entry["lr"] == pytest.approx(learning_rate(trained.max_iter - 1, load_training_config(
        trained.whole.parent / "ending.yaml")))
    assert {path.name for path in trained.whole.iterdir()} - {"losses.png"} == {
        "checkpoint.pth", "model_final.pth", "categories.json", "log.jsonl"}  # nothing half written is left


def test_losses_are_drawn(trained) -> None:
    pytest.importorskip("matplotlib", reason="losses.png needs matplotlib")
    with Image.open(trained.whole / "losses.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


# -- what ends it early -----------------------------------------------------------------------------------------------


class DiskQuota:
    """Files of this process end at a mebibyte: a checkpoint is longer, as on a disk that is full."""

    def __enter__(self) -> None:
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, self.before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path) -> None:
    trainer, _ = small_trainer(tmp_path)
    checkpoint = program.Checkpoint(tmp_path / "out.pth", 0)
    trainer.iteration = 4
    checkpoint.save(trainer)
    before, there = checkpoint.path.read_bytes(), set(tmp_path.iterdir())
    trainer.iteration = 6
    with DiskQuota():
        with pytest.raises(program.CannotSave, match=r"out\.pth cannot be saved: File too large$"):
            checkpoint.save(trainer)
        told = checkpoint.keep(trainer, OSError("the log cannot be written"))
    kept = f"4 iterations are kept in {checkpoint.path}, from which --resume goes on"
    assert told == f"{checkpoint.path} cannot be saved: File too large; {kept}"
    assert checkpoint.path.read_bytes() == before
    assert set(tmp_path.iterdir()) == there
    assert checkpoint.keep(trainer, RuntimeError("out of memory")) == kept.replace("4", "6", 1)
    assert torch.load(checkpoint.path, weights_only=True)["iteration"] == 6


def test_weights_of_losses_that_are_not_finite_do_not_replace_good_ones(tmp_path) -> None:
    trainer, _ = small_trainer(tmp_path)
    checkpoint = program.Checkpoint(tmp_path / "out.pth", 0)
    trainer.iteration = 4
    assert checkpoint.keep(trainer, Diverged("nan")) == "there is no checkpoint yet"
    assert not checkpoint.path.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_stop_wait_for_the_end_of_a_step(number) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with program._stop_signals() as stopped:
            signal.raise_signal(number)
            assert stopped == [number]
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_terminal_that_goes_does_not_stop_what_nohup_started() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with program._stop_signals() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert stopped == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def own(data, tmp_path) -> Path:
    """A copy of the data set, to damage."""
    return Path(shutil.copytree(data, tmp_path / "own"))


def ended(capsys, *given: str) -> str:
    """What a training that fails says: one line."""
    assert program.main(given) == EXIT_FAILED
    told: str = capsys.readouterr().err
    assert "Traceback" not in told
    [line] = [line for line in told.splitlines() if line.startswith("train: ") and "losses.png" not in line]
    return line


def picture_of(data: Path, config: Path, iteration: int) -> Path:
    """One that iterations before this one do not need."""
    dataset = read_dataset(data / "train.json", data / "images" / "train", load_training_config(config))
    batches = Batches(dataset, blendmask.load_config(config), load_training_config(config), 3)
    before = {index for earlier in range(iteration) for index in batches.indices(earlier)}
    return next(dataset.entries[index].path for index in batches.indices(iteration) if index not in before)


def test_a_broken_picture_is_named_and_nothing_that_was_learnt_is_lost(own, tmp_path, capsys) -> None:
    config = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 3, "SOLVER.CHECKPOINT_PERIOD": 100})
    picture = picture_of(own, config, 2)
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    told = ended(capsys, *arguments(own, config, out))
    assert f"{picture}: cannot be decoded" in told
    assert f"2 iterations are kept in {out / 'checkpoint.pth'}, from which --resume goes on" in told
    assert torch.load(out / program.CHECKPOINT, weights_only=True)["iteration"] == 2
    before = (out / program.CHECKPOINT).read_bytes()
    assert "2 iterations are kept" in ended(capsys, *arguments(own, config, out, "--resume"))  # and again
    assert (out / program.CHECKPOINT).read_bytes() == before
    picture.write_bytes(whole)
    assert program.main(arguments(own, config, out, "--resume")) == 0
    assert program.main(arguments(own, config, tmp_path / "never")) == 0
    resumed, never = weights(out), weights(tmp_path / "never")
    assert [key for key in never if not torch.equal(resumed[key], never[key])] == []


@pytest.mark.parametrize(
    ("name", "value"), [("--seed", "-1"), ("--seed", "9" * 40), ("--threads", "-5"), ("--threads", "99999999")]
)
def test_numbers_that_torch_does_not_take_are_refused(name: str, value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        program.main(["--config", "c", "--images", "i", "--annotations", "a", "--output-dir", "o", name, value])
    assert f"argument {name}: {value}: expected a whole number from" in capsys.readouterr().err


def test_a_picture_over_the_limit_names_an_option_that_there_is(data, tmp_path, capsys) -> None:
    config, out = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 1}), tmp_path / "out"
    told = ended(capsys, *arguments(data, config, out, "--max-image-pixels", "1000"))
    assert "pixels are over the limit of 1000 (--max-image-pixels); there is no checkpoint yet" in told
    assert not (out / program.CHECKPOINT).exists()  # which would be in the way of starting again
    assert program.main(arguments(data, config, out, "--max-image-pixels", "1000000")) == 0


def test_a_disk_that_is_full_from_the_start_is_told(data, tmp_path, capsys) -> None:
    config, out = configure(tmp_path, KEYS | {"SOLVER.MAX_ITER": 1}), tmp_path / "out"
    with DiskQuota():
        told = ended(capsys, *arguments(data, config, out))
    assert told == f"train: {out / 'checkpoint.pth'} cannot be saved: File too large; there is no checkpoint yet"


def test_a_line_that_a_full_disk_cut_is_forgotten(tmp_path) -> None:
    whole = json.dumps({"iteration": 20, "total_loss": 1.0}) + "\n"
    (tmp_path / program.LOG).write_text(whole + whole.replace("20", "40") + whole[:9])
    program._rewind_log(tmp_path, 40)
    assert (tmp_path / program.LOG).read_text() == whole + whole.replace("20", "40")


# -- from other weights -----------------------------------------------------------------------------------------------


@pytest.fixture
def three(data, tmp_path) -> list[str]:
    """Arguments that replace the data set by one of three classes."""
    tree = json.loads((data / "train.json").read_text())
    tree["categories"] = tree["categories"][:3]
    for each in tree["annotations"]:
        each["category_id"] = each["category_id"] % 3 + 1
    (tmp_path / "three.json").write_text(json.dumps(tree))
    return ["--annotations", str(tmp_path / "three.json")]


THREE = KEYS | {"MODEL.FCOS.NUM_CLASSES": 3, "MODEL.BASIS_MODULE.NUM_CLASSES": 3, "SOLVER.MAX_ITER": 1}


def test_weights_of_another_number_of_classes_are_fine_tuned(trained, data, three, tmp_path, capsys) -> None:
    start, out = trained.whole / program.FINAL, tmp_path / "out"
    config = configure(tmp_path, THREE | {"SOLVER.BASE_LR": 0.0})
    assert program.main([*arguments(data, config, out, "--weights", str(start)), *three]) == 0
    [told] = [line for line in capsys.readouterr().err.splitlines() if "start anew" in line]
    before, after = weights(trained.whole), weights(out)
    others = [key for key in before if before[key].shape != after[key].shape]
    assert len(others) == 4
    assert all(f"{key} {tuple(before[key].shape)}" in told for key in others)
    kept = [key for key in before if key not in others and "running" not in key and "num_batches" not in key]
    assert [key for key in kept if not torch.equal(before[key], after[key])] == []
    bias = after["proposal_generator.fcos_head.cls_logits.bias"]
    assert bias.tolist() == pytest.approx([-math.log(99)] * 3)


def test_weights_of_another_network_are_refused_for_training_too(trained, data, three, tmp_path, capsys) -> None:
    start, config = trained.whole / program.FINAL, configure(tmp_path, THREE | {"MODEL.FPN.OUT_CHANNELS": 32})
    told = refusal(capsys, *arguments(data, config, tmp_path / "out", "--weights", str(start)), *three)
    assert f"{start}: the weights do not fit the network" in told
    assert not (tmp_path / "out").exists()


# -- what the program refuses -----------------------------------------------------------------------------------------


def refusal(capsys, *given: str) -> str:
    assert program.main(given) == EXIT_USAGE
    told: str = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_unknown_solver_key_is_named(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS | {"SOLVER.MAX_ITERS": 9})
    with pytest.raises(ConfigError, match=r"SOLVER\.MAX_ITERS = 9"):
        load_training_config(config)
    assert "SOLVER.MAX_ITERS" in refusal(capsys, *arguments(data, config, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_use_is_refused(trained, data, capsys) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in trained.whole.iterdir()}
    told = refusal(capsys, *arguments(data, trained.whole.parent / "ending.yaml", trained.whole))
    assert str(trained.whole / "checkpoint.pth") in told
    assert "--resume" in told
    assert {path.name: path.stat().st_mtime_ns for path in trained.whole.iterdir()} == before


def test_nothing_to_resume_is_refused(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS)
    told = refusal(capsys, *arguments(data, config, tmp_path / "out", "--resume"))
    assert str(tmp_path / "out" / "checkpoint.pth") in told


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "of another network"])
def test_checkpoint_that_cannot_be_resumed_is_named(trained, tmp_path, data, capsys, content) -> None:
    checkpoint = tmp_path / "checkpoint.pth"
    keys = KEYS if content is not None else KEYS | {"MODEL.FPN.OUT_CHANNELS": 32}
    whole = (trained.whole / "checkpoint.pth").read_bytes()
    checkpoint.write_bytes(whole if content is None else content)
    told = refusal(capsys, *arguments(data, configure(tmp_path, keys), tmp_path, "--resume"))
    assert str(checkpoint) in told


def test_weights_alone_cannot_be_resumed(trained, tmp_path, data, capsys) -> None:
    shutil.copy(trained.whole / program.FINAL, tmp_path / "checkpoint.pth")
    told = refusal(capsys, *arguments(data, configure(tmp_path, KEYS), tmp_path, "--resume"))
    assert f"{tmp_path / 'checkpoint.pth'}: is not the state of a training: it has no optimizer, iteration" in told


def test_bad_annotations_end_the_program_before_it_starts(tmp_path, data, capsys) -> None:
    tree = json.loads((data / "train.json").read_text())
    del tree["annotations"][3]["segmentation"]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(tree))
    given = arguments(data, configure(tmp_path, KEYS), tmp_path / "out", "--annotations", str(bad))
    told = refusal(capsys, *given)
    assert f"{bad}: not COCO instances: annotation 4 (annotations[3]) of image 1, 0001.jpg: segmentation" in told
    assert not (tmp_path / "out").exists()


def test_number_of_classes_that_is_not_the_data_sets_is_refused(tmp_path, data, capsys) -> None:
    config = configure(tmp_path, KEYS | {"MODEL.FCOS.NUM_CLASSES": 3})
    told = refusal(capsys, *arguments(data, config, tmp_path / "out"))
    assert "has 5 categories, but MODEL.FCOS.NUM_CLASSES is 3" in told
