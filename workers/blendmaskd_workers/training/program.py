"""Train BlendMask on a data set in COCO's format.

    python scripts/train.py --config configs/demo/demo.yaml --images shapes/images/train \\
        --annotations shapes/train.json --output-dir out/demo

Writes to the output folder: checkpoint.pth (the last state, from which --resume continues), model_final.pth (the
weights in AdelaiDet's form), categories.json (the names of the classes, which inference finds beside the weights),
log.jsonl (losses, one line for every 20 iterations) and losses.png. All hyperparameters come from the configuration,
under AdelaiDet's keys.

The annotations are validated as a whole first, and refused with a list of all faults, by annotation and image. Polygons
with fewer than three points, with an odd number of coordinates or without an interior are ignored, and so are
annotations that have no others; their number is reported.

With --weights, training starts from a checkpoint of the same network. Its number of classes may differ: the layers that
depend on it are initialised anew, and listed. However training ends early (Ctrl-C, SIGTERM, SIGHUP, an image that
cannot be read, a full disk), the progress is in checkpoint.pth, and --resume continues from there. Only a state whose
losses are not finite is not saved: checkpoint.pth is then that of the last SOLVER.CHECKPOINT_PERIOD.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blendmaskd import files
from blendmaskd.output import Help
from blendmaskd.programs.arguments import positive, seed, threads
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, UsageError, guarded

if TYPE_CHECKING:
    from blendmaskd_workers.blendmask import BlendMask
    from blendmaskd_workers.training.batches import Batches
    from blendmaskd_workers.training.trainer import Trainer

LOG_PERIOD = 20  # iterations
CHECKPOINT, FINAL, LOG, CATEGORIES = "checkpoint.pth", "model_final.pth", "log.jsonl", "categories.json"


class CannotSave(RuntimeError):
    """A checkpoint that cannot be written; the text says which and why."""


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("train", lambda: _main(_parser().parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # loading threads, and whoever else, need the cores
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        trainer, batches = prepare(arguments, console)
    except KeyboardInterrupt:
        console.print("train: interrupted before the first iteration")
        return EXIT_INTERRUPTED
    from blendmaskd_workers.training.dataset import DataError

    for note in batches.dataset.notes:
        console.print(f"train: {arguments.annotations}: {note}")
    expected = (DataError, RuntimeError, OSError, MemoryError)  # RuntimeError: PyTorch's, of devices and their memory
    checkpoint = Checkpoint(arguments.output_dir / CHECKPOINT, trainer.iteration)
    with _stop_signals() as stopped:
        try:
            finished = run(trainer, batches, checkpoint, console, stopped)
        except Exception as error:
            console.print(f"train: {_reason(error)}; {checkpoint.keep(trainer, error)}")
            if not isinstance(error, expected):
                raise
            return EXIT_FAILED
    if not finished:
        console.print(f"train: interrupted after {trainer.iteration} iterations; --resume goes on")
        return EXIT_INTERRUPTED
    print(f"{trainer.iteration} iterations done, weights in {arguments.output_dir / FINAL}")
    return 0


def prepare(arguments: argparse.Namespace, console: Console) -> tuple[Trainer, Batches]:
    """The network on its device and its data, ready to train, from scratch or where it was. Raises `UsageError`."""
    import torch

    from blendmaskd.settings import Limits
    from blendmaskd_workers import blendmask, devices
    from blendmaskd_workers.training.batches import Batches
    from blendmaskd_workers.training.config import load_training_config
    from blendmaskd_workers.training.dataset import LIMITS, DataError, read_dataset
    from blendmaskd_workers.training.initial import initialise
    from blendmaskd_workers.training.trainer import Trainer, TrainingError

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    output = arguments.output_dir
    checkpoint = output / CHECKPOINT
    if arguments.resume and not checkpoint.exists():
        raise UsageError(f"--resume: there is no {checkpoint}")
    if not arguments.resume and checkpoint.exists():
        raise UsageError(f"{checkpoint} exists: --resume goes on with it, another --output-dir starts anew")
    try:
        network = blendmask.load_config(arguments.config)
        config = load_training_config(arguments.config)
        dataset = read_dataset(arguments.annotations, arguments.images, config)
        for what, count in (("MODEL.FCOS", network.num_classes), ("MODEL.BASIS_MODULE", network.semantic_classes)):
            if count not in (None, len(dataset.categories)):
                raise UsageError(f"{arguments.annotations}: has {len(dataset.categories)} categories, but "
                                 f"{what}.NUM_CLASSES is {count}")
        torch.manual_seed(arguments.seed)
        model = blendmask.build(network)
        initialise(model, config.prior)
        if arguments.weights and not arguments.resume:
            _start_from(model, arguments.weights, console)
        device = devices.open_device(arguments.device, "auto" if arguments.device.startswith("npu") else "fp32")
        trainer = Trainer(model.to(device.torch_device), config)
        if arguments.resume:
            trainer.restore(blendmask.read_checkpoint(checkpoint))
        output.mkdir(parents=True, exist_ok=True)
        _write_categories(output, dataset.categories)
        _rewind_log(output, trainer.iteration)
    except (blendmask.ConfigError, blendmask.WeightsError, DataError, devices.DeviceError, OSError) as error:
        raise UsageError(str(error)) from error
    except TrainingError as error:
        raise UsageError(f"{checkpoint}: {error}") from error
    limits = Limits(max_image_bytes=LIMITS.max_image_bytes, max_image_pixels=arguments.max_image_pixels)
    return trainer, Batches(dataset, network, config, arguments.seed, limits)


def _start_from(model: BlendMask, weights: str, console: Console) -> None:
    from blendmaskd_workers import blendmask

    anew = blendmask.load_to_fine_tune(model, weights)
    if anew:
        console.print(f"train: {weights}: of another number of classes; these layers start anew, all others are taken: "
                      f"{', '.join(anew)}")


def run(trainer: Trainer, batches: Batches, checkpoint: Checkpoint, console: Console, stopped: Sequence[int]) -> bool:
    """Train to the end, or until something is in `stopped`; returns whether the end was reached.

    Raises `DataError`, `TrainingError`, `CannotSave`, OSError, and what a device raises.
    """
    output = checkpoint.path.parent
    device = next(trainer.model.parameters()).device
    max_iter = trainer.config.max_iter
    report = Report(output, console, max_iter)
    with report.progress, contextlib.closing(batches.ahead(range(trainer.iteration, max_iter))) as loader:
        for batch in loader:
            losses = trainer.step(batch.to(device))
            report.add(trainer, losses, len(batch.truths))
            if trainer.iteration % trainer.config.checkpoint_period == 0 or stopped:
                checkpoint.save(trainer)
                report.plot()
            if stopped and trainer.iteration < max_iter:
                return False
    checkpoint.save(trainer)
    _save(output / FINAL, {"model": trainer.model.state_dict()})
    report.plot()
    return True


class Checkpoint:
    """The last state of a training, from which it can go on, as a file."""

    def __init__(self, path: Path, iteration: int) -> None:
        self.path = path
        self.iteration = iteration  # that the file is of; 0: there is none

    def save(self, trainer: Trainer) -> None:
        """Replace it by the state of now. Raises `CannotSave`: then it stays as it was."""
        if trainer.iteration != self.iteration:
            _save(self.path, trainer.state())
            self.iteration = trainer.iteration

    def keep(self, trainer: Trainer, error: Exception) -> str:
        """Save what was learnt before `error` ended the training; returns what is there now, in words."""
        from blendmaskd_workers.training.trainer import Diverged

        also = ""
        try:
            if not isinstance(error, Diverged | CannotSave):
                self.save(trainer)
        except CannotSave as unsaved:
            also = f"{unsaved}; "
        if self.iteration:
            return f"{also}{self.iteration} iterations are kept in {self.path}, from which --resume goes on"
        return f"{also}there is no checkpoint yet"


class Report:
    """What people see of a training: the bar or lines, the log, the picture."""

    def __init__(self, output: Path, console: Console, max_iter: int) -> None:
        self.output = output
        self.console = console
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
                   TimeRemainingColumn(elapsed_when_finished=True))
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=max_iter)
        self.max_iter = max_iter
        self.losses: list[dict[str, float]] = []  # since the last line
        self.images = 0
        self.since = time.monotonic()

    def add(self, trainer: Trainer, losses: dict[str, float], images: int) -> None:
        """Count an iteration; write a line where one is due."""
        self.losses.append(losses)
        self.images += images
        self.progress.update(self.task, completed=trainer.iteration)
        if trainer.iteration % LOG_PERIOD == 0 or trainer.iteration == self.max_iter:
            self._line(trainer)

    def _line(self, trainer: Trainer) -> None:
        from blendmaskd_workers.training.trainer import learning_rate

        now = time.monotonic()
        rate = self.images / (now - self.since)
        means = {name: sum(losses[name] for losses in self.losses) / len(self.losses) for name in self.losses[0]}
        left = (self.max_iter - trainer.iteration) * (now - self.since) / len(self.losses)
        entry: dict[str, Any] = {"iteration": trainer.iteration, "total_loss": sum(means.values()), **means,
                                 "lr": learning_rate(trainer.iteration - 1, trainer.config),
                                 "images_per_s": rate, "eta_s": left}
        with (self.output / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        parts = " ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in means.items())
        text = f"loss {entry['total_loss']:.3f} ({parts}) {rate:.1f} images/s"
        self.progress.update(self.task, description=text)
        if not self.console.is_terminal:
            self.console.print(f"{trainer.iteration}/{self.max_iter} {text}, {left / 60:.0f} min left")
        self.losses, self.images, self.since = [], 0, now

    def plot(self) -> None:
        """Draw losses.png from the log, where matplotlib is installed."""
        try:
            from blendmaskd_workers.training import plot
        except ModuleNotFoundError as error:
            if error.name != "matplotlib":
                raise
            self.console.print("train: no losses.png without matplotlib (pip install matplotlib)")
            return
        plot.draw(self.output / LOG, self.output / "losses.png")


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that signals to stop add themselves to: the step that runs is finished and saved."""
    received: list[int] = []
    stops = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        stops.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in stops}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, whole or not at all. Raises `CannotSave`."""
    import torch

    try:
        # Given a path, torch would write the file's name into it.
        with files.whole(path) as beside, beside.open("wb") as file:
            torch.save(content, file)
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        refused = error.__context__ if isinstance(error.__context__, OSError) else error  # PyTorch trips over it
        raise CannotSave(f"{path} cannot be saved: {_reason(refused)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _write_categories(output: Path, categories: Sequence[Any]) -> None:
    names = [{"id": category.id, "name": category.name} for category in categories]
    (output / CATEGORIES).write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


def _rewind_log(output: Path, iteration: int) -> None:
    """Drop what the log says about iterations that a resumed training does again."""
    log = output / LOG
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        log.write_text("".join(line for line in lines if _iteration_of(line) <= iteration), encoding="utf-8")


def _iteration_of(line: str) -> float:
    """Beyond all where a full disk or a kill cut the line."""
    try:
        return float(json.loads(line)["iteration"])
    except ValueError:
        return float("inf")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="network and training: a YAML file with AdelaiDet's keys")
    add("--images", required=True, type=Path, metavar="DIR", help="folder that file names are relative to")
    add("--annotations", required=True, type=Path, metavar="FILE", help="COCO instances (.json)")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="created if missing")
    add("--weights", metavar="FILE", help="a checkpoint of the same network, of any number of classes, to start from "
        "(default: from scratch)")
    add("--resume", action="store_true", help="continue from the output folder's checkpoint.pth")
    add("--device", default="cpu", help="npu, npu:1, cuda, cuda:0 or cpu (default: cpu)")
    add("--threads", type=threads, metavar="N", help="CPU threads for computation (default: PyTorch's choice)")
    add("--max-image-pixels", type=positive, default=500_000_000, metavar="N",
        help="an image with more pixels ends the training (default: 500000000)")
    add("--seed", type=seed, default=0, metavar="N", help="seed of initial weights and image order (default: 0)")
    return parser
