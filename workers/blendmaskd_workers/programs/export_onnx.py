"""Write a BlendMask as two ONNX files, for runtimes and compilers without torch, and compare them with it at once.

    python scripts/export_onnx.py --config configs/demo/demo.yaml --weights configs/demo/model_final.pth --output demo
    blendmaskd --devices cpu:0 --set engine=onnx --set model.config=configs/demo/demo.yaml --set model.weights=demo

propose.onnx finds candidates, of which the host chooses boxes; blend.onnx makes their masks, for a fixed number of
boxes. docs/onnx.md says what goes in and out. Both take any number of images of any size, which is what the daemon's
engine onnx needs. Compilers of fixed shapes, such as Ascend's atc, want one of each:

    python scripts/export_onnx.py --config configs/BlendMask/R_50_1x.yaml --weights R_50_1x.pth --output fixed \\
        --batch 1 --size 800 1088

and the command lines for atc are printed. The comparison needs onnxruntime (pip install 'blendmaskd[onnx]').
Exit code: 0 when the files agree with torch or could not be compared, 1 when they do not or could not be made.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blendmaskd import files
from blendmaskd.output import Help
from blendmaskd.programs.errors import EXIT_FAILED, reason

OPSETS = range(13, 21)  # that torch's tracer writes
AGREES = 1e-4  # of a tensor's largest value: what the goldens allow for rounding
COMPARED = ((1, 800, 1088), (3, 352, 256))  # images: levels of more and fewer cells than there may be candidates
SIZE_DIVISOR = 32  # see `blendmask.config`


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
    from blendmaskd_workers.engines import EngineError

    try:
        return _run(arguments)
    except (OSError, ValueError, EngineError) as error:
        print(f"export_onnx: {reason(error)}", file=sys.stderr)
        return EXIT_FAILED


def _run(arguments: argparse.Namespace) -> int:
    from blendmaskd_workers import blendmask
    from blendmaskd_workers.engines.on_device import digest
    from blendmaskd_workers.engines.onnx import PARTS, file_of, open_network
    from blendmaskd_workers.engines.onnx_export import atc_commands, export

    config = blendmask.load_config(arguments.config)
    trained = blendmask.build(config)
    blendmask.load_weights(trained, arguments.weights)
    network = blendmask.for_inference(trained)
    size = tuple(arguments.size) if arguments.size else None
    models = export(network, digest(trained), arguments.opset, arguments.batch, size)
    contents = [models[part].SerializeToString() for part in PARTS]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for part, content in zip(PARTS, contents):
        with files.whole(arguments.output / file_of(part)) as beside:
            beside.write_bytes(content)
        print(f"{arguments.output / file_of(part)}: opset {arguments.opset}, {len(content) / 1e6:.1f} MB")
    if arguments.batch and size:
        print(*atc_commands(models), sep="\n")
    if importlib.util.find_spec("onnxruntime") is None:
        print("not compared with torch: onnxruntime is not installed (pip install 'blendmaskd[onnx]')")
        return 0
    exported = open_network(arguments.output, contents, config, ["CPUExecutionProvider"])
    return _compare(network, exported, _shapes(arguments.batch, size))


def _shapes(batch: int | None, size: tuple[int, int] | None) -> list[tuple[int, int, int]]:
    return list(dict.fromkeys((batch or some, *(size or (height, width))) for some, height, width in COMPARED))


def _compare(network: Any, exported: Any, shapes: Sequence[tuple[int, int, int]]) -> int:
    import torch

    from blendmaskd_workers.engines.onnx_export import differences

    worst = 0.0
    for count, height, width in shapes:
        images = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))
        found = differences(network, exported, images)
        name = max(found, key=lambda each: found[each])
        worst = max(worst, found[name])
        print(f"{count} images of {height}x{width}: differs from torch by at most {found[name]:.1e} of the largest "
              f"value, in the {name}")  # fmt: skip
    if worst <= AGREES:
        return 0
    print(f"export_onnx: that is more than rounding explains ({AGREES:g}): do not use the files", file=sys.stderr)
    return EXIT_FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", metavar="FILE", required=True, help="the network: AdelaiDet's YAML keys")
    add("--weights", metavar="FILE", required=True, help="its checkpoint, as for model.weights")
    add("--output", metavar="FOLDER", type=Path, required=True, help="for both files; it is made if missing")
    add("--opset", metavar="N", type=int, default=OPSETS[0], choices=OPSETS,
        help=f"version of ONNX's operators, {OPSETS[0]} to {OPSETS[-1]}; default {OPSETS[0]}, for most compilers")
    add("--batch", metavar="N", type=_count, help="exactly so many images; default: any number")
    add("--size", metavar=("HEIGHT", "WIDTH"), type=_side, nargs=2,
        help="exactly this size after padding, in multiples of 32 pixels; default: any size")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


def _side(text: str) -> int:
    side = _count(text)
    if side % SIZE_DIVISOR:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of {SIZE_DIVISOR}")
    return side
