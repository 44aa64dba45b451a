"""The precision program: does a device compute what the reference computes, and if not, where does it deviate?

    python scripts/eval_precision.py --config configs/BlendMask/R_50_1x.yaml --weights model.pth --device npu:0 --trace
    python scripts/eval_precision.py … --device npu:0 --hf32 on           # what HF32 costs
    python scripts/eval_precision.py … --device npu:0 --dtype bf16        # what autocast to bfloat16 costs
    python scripts/eval_precision.py --config … --random-weights 0 --device cuda:0 --images photo.jpg

Both sides run the network as it was trained, as the daemon does with model.exact; the reference's answers are exact.
It compares the training losses, the features p3 to p7, bases, head outputs, and the final boxes and masks, on fixed
scenes or on --images. A value is off if its relative error exceeds 1%; values of at most 0.001 are ignored. With
--trace each module of the device's network is given the reference's input and its output is compared, so that errors
appear where they originate and not where they have accumulated; modules over the threshold are named.

Writes precision_eval.log, precision_eval.json and precision_eval.png to --output-dir. Exit code: 0 the device
agrees; 1 a loss is off, or more than 1% of the elements of a tensor or a module's output are; 2 could not start.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels
from blendmaskd.programs.arguments import device
from blendmaskd.programs.errors import EXIT_FAILED, UsageError, guarded
from blendmaskd_workers.evaluation import logs, outputs


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with these arguments (default: the process's); returns its exit code."""
    return guarded("eval_precision", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
    from blendmaskd_workers.blendmask import ConfigError, load_config
    from blendmaskd_workers.evaluation import subjects
    from blendmaskd_workers.evaluation.subjects import SubjectError

    weights = arguments.weights if arguments.random_weights is None else arguments.random_weights
    try:
        photographs = [_read(path) for path in arguments.images]
        config = load_config(arguments.config)
        reference = subjects.load(config, weights, arguments.reference)
        device = subjects.load(config, weights, arguments.device, arguments.hf32 == "on", arguments.dtype)
    except (ConfigError, SubjectError, OSError, ImageError) as error:
        raise UsageError(str(error)) from None
    scenes = subjects.scenes_of([path.name for path in arguments.images], photographs, arguments.seed)
    report = {"run": _describe(arguments, device.device.name()),
              **subjects.evaluate(reference, device, scenes, config, arguments.trace)}  # fmt: skip
    outputs.write(arguments.output_dir, "precision", report, logs.write_precision(report))
    return EXIT_FAILED if report["failures"] else 0


def _read(path: Path) -> Pixels:
    try:
        return images.bgr(images.read(path))
    except ImageError as error:
        raise ImageError(error.code, f"{path}: {error}") from error


def _describe(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    weights = f"random, seed {arguments.random_weights}" if arguments.weights is None else arguments.weights
    return {
        "config": arguments.config,
        "weights": weights,
        "reference": arguments.reference,
        "device": arguments.device,
        "model": model,
        "hf32": arguments.hf32,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_precision", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the network: a YAML file with AdelaiDet's keys")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="FILE", help="an AdelaiDet checkpoint of that network (.pth)")
    weights.add_argument("--random-weights", type=int, metavar="SEED", help="seeded random weights instead")
    add("--reference", type=device, default="cpu", metavar="DEVICE", help="device to compare with (default: cpu)")
    add("--device", type=device, required=True, metavar="DEVICE", help="npu:0, cuda:0, cpu")
    add("--images", type=Path, nargs="+", default=[], metavar="FILE",
        help="photographs, annotated with seeded shapes as instances (default: painted scenes)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the scenes (default: 0)")
    add("--hf32", choices=("on", "off"), default="off",
        help="on: let an NPU use HF32 and CUDA TF32; off: float32 throughout, also on an Ascend 910A (default)")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="data type of the device's convolutions and matrix products, with autocast (default: fp32)")
    add("--trace", action="store_true", help="compare module by module, each on the reference's input")
    add("--output-dir", type=Path, default=Path("out/precision"), metavar="FOLDER", help="default: out/precision")
    arguments = parser.parse_args(argv)
    kinds = {name.partition(":")[0] for name in (arguments.reference, arguments.device)}
    if arguments.hf32 == "on" and kinds in ({"npu"}, {"cuda"}):
        parser.error("--hf32 on: is one switch for all devices of a process; the reference must be of another kind")
    return arguments
