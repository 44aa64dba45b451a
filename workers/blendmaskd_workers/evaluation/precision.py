"""The precision program: does a device compute what the reference computes, and if not, where does it deviate, and why?

    python scripts/eval_precision.py --config configs/BlendMask/R_50_1x.yaml --weights model.pth --device npu:0 --trace
    python scripts/eval_precision.py … --device npu:0 --ladder            # which arithmetic does it use?
    python scripts/eval_precision.py … --device npu:0 --double-benchmark  # are its errors larger than a CPU's?
    python scripts/eval_precision.py … --device npu:0 --hf32 on           # what HF32 costs
    python scripts/eval_precision.py … --device npu:0 --dtype bf16        # what autocast to bfloat16 costs
    python scripts/eval_precision.py --config … --random-weights 0 --device cuda:0 --images photo.jpg
    python scripts/eval_precision.py --config … --initial-weights 0 --device cpu --ladder   # without any accelerator

Both sides run the network as it was trained, as the daemon does with model.exact; the reference's answers are exact.
It compares the training losses, the features p3 to p7, bases, head outputs, and the final boxes and masks, on fixed
scenes or on --images. A value is off if its relative error exceeds 1%; values of at most 0.001 are ignored. For each
tensor it also gives cosine similarity, the root of the mean squared error over the reference's standard deviation, and
the scale bias: rounding leaves that near 0, truncation makes values smaller.

--trace gives each module of the device's network the reference's input and compares its output, so that errors appear
where they originate and not where they have accumulated; modules over the threshold are named.

--ladder names the arithmetic of each of the device's convolutions. It too gives each one the reference's input, and
compares its errors, value by value, with those that the CPU makes with operands in HF32 (rounded, truncated), float16,
bfloat16 and in between; the right one explains nearly all of them. "10 bits" is TF32, or float16 with results in
float32; "fp16 sums" keeps sums in float16 too, "scale" is a factor; "unlike any" is none of these, with what its errors
are as large as: those of sums that are rounded in another order, say. It also lists what the whole network would be off
by in each of them, which takes about fifteen times as long as the rest.

--double-benchmark is Huawei's: a CPU in float64 is the truth, and the device's errors may be at most twice those of the
reference in float32 (RMSE, mean relative error, share of small values that are off), ten times the largest one.
Another order of summation alone may come to three times; float16 comes to thousands.

Losses near ln 2 are warned of: their network has learnt nothing, and two devices then agree whatever they compute.

Writes precision_eval.log, precision_eval.json and precision_eval.png to --output-dir. Exit code: 0 the device
agrees; 1 a loss is off, or more than 1% of the elements of a tensor or a module's output are, or errors are larger than
the double benchmark allows; 2 could not start.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels
from blendmaskd.output import Help
from blendmaskd.programs.arguments import device, seed
from blendmaskd.programs.errors import EXIT_FAILED, UsageError, guarded
from blendmaskd_workers.evaluation import logs, outputs


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("eval_precision", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
    from blendmaskd_workers.blendmask import ConfigError, load_config
    from blendmaskd_workers.evaluation import scenes, subjects
    from blendmaskd_workers.evaluation.subjects import Depth, Initial, SubjectError

    initial, random = arguments.initial_weights, arguments.random_weights
    weights = Initial(initial) if initial is not None else arguments.weights if random is None else random
    depth = Depth(arguments.trace, arguments.double_benchmark, arguments.ladder)
    outputs.make(arguments.output_dir)
    try:
        photographs = [_read(path) for path in arguments.images]
        config = load_config(arguments.config)
        reference = subjects.load(config, weights, arguments.reference)
        device = subjects.load(config, weights, arguments.device, subjects.HF32[arguments.hf32], arguments.dtype)
    except (ConfigError, SubjectError, OSError, ImageError) as error:
        raise UsageError(str(error)) from None
    names, seed = [path.name for path in arguments.images], arguments.seed
    on = scenes.photographed(names, photographs, seed) if photographs else scenes.painted(seed)
    report = {"run": {**_describe(arguments, device.device.name()), **subjects.arithmetic(device)},
              **subjects.evaluate(reference, device, on, depth)}  # fmt: skip
    outputs.write(arguments.output_dir, "precision", report, logs.write_precision(report))
    return EXIT_FAILED if report["failures"] else 0


def _read(path: Path) -> Pixels:
    try:
        return images.bgr(images.read(path))
    except ImageError as error:
        raise ImageError(error.code, f"{path}: {error}") from error


def _describe(arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    seeds = {"random": arguments.random_weights, "initial": arguments.initial_weights}
    seeded = [f"{kind}, seed {seed}" for kind, seed in seeds.items() if seed is not None]
    return {
        "config": arguments.config,
        "weights": seeded[0] if seeded else arguments.weights,
        "reference": arguments.reference,
        "device": arguments.device,
        "model": model,
        "hf32": arguments.hf32,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
    }


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_precision", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the network: a YAML file with AdelaiDet's keys")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--weights", metavar="FILE", help="an AdelaiDet checkpoint of that network (.pth)")
    weights.add_argument("--random-weights", type=seed, metavar="SEED", help="seeded random weights instead")
    weights.add_argument("--initial-weights", type=seed, metavar="SEED",
                         help="AdelaiDet's weights before training, frozen batch norms as the identity")
    add("--reference", type=device, default="cpu", metavar="DEVICE", help="device to compare with (default: cpu)")
    add("--device", type=device, required=True, metavar="DEVICE", help="npu:0, cuda:0, cpu")
    add("--images", type=Path, nargs="+", default=[], metavar="FILE",
        help="photographs, annotated with seeded shapes as instances (default: painted scenes)")
    add("--seed", type=seed, default=0, metavar="N", help="seed of the scenes (default: 0)")
    add("--hf32", choices=("on", "off", "native"), default="off",
        help="on: let an NPU use HF32 and CUDA TF32; off: float32 throughout (default); native: the device's own rule, "
        "which is all that an Ascend 910A or 310P takes")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="data type of the device's convolutions and matrix products, with autocast (default: fp32)")
    add("--trace", action="store_true", help="compare module by module, each on the reference's input")
    add("--ladder", action="store_true", help="name the arithmetic of the device's convolutions")
    add("--double-benchmark", action="store_true", help="compare errors against float64 with the reference's")
    add("--output-dir", type=Path, default=Path("out/precision"), metavar="FOLDER", help="default: out/precision")
    arguments = parser.parse_args(argv)
    kinds = {name.partition(":")[0] for name in (arguments.reference, arguments.device)}
    if arguments.hf32 == "on" and kinds in ({"npu"}, {"cuda"}):
        parser.error("--hf32 on: is one switch for all devices of a process; the reference must be of another kind")
    if (arguments.ladder or arguments.double_benchmark) and not arguments.reference.startswith("cpu"):
        parser.error("--ladder and --double-benchmark: need a CPU as the reference, which emulates and has float64")
    return arguments
