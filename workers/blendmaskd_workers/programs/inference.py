"""The inference program: photographs in, overlays and COCO results out, without a daemon.

`python scripts/inference.py --help` explains it; installed, its name is ``blendmaskd-inference``. Exit codes: 0 all
done, 1 some images failed (they are named, the others are done), 2 nothing could be started, 130 interrupted.

Rules: every image is segmented by itself, so that its answer does not depend on its company. torch is imported when
the network is loaded, so that help and mistakes on the command line answer at once.
"""
from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from blendmaskd.coco import categories
from blendmaskd.coco.categories import Category
from blendmaskd.images import decoding as images
from blendmaskd.images import overlay
from blendmaskd.images.decoding import ImageError
from blendmaskd.images.quiet import quiet
from blendmaskd.output import Help, in_a_line
from blendmaskd.programs import input_images
from blendmaskd.programs.arguments import device, seed, share
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, UsageError, guarded
from blendmaskd.protocol import Options

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MODEL_ZOO = "https://github.com/aim-uofa/AdelaiDet/blob/master/configs/BlendMask/README.md"
LOSSY: dict[str, Any] = {"quality": 92}  # of JPEG and WebP; the other formats ignore it

EXAMPLES = """
examples:
  one photograph on the first NPU, drawn
    python scripts/inference.py --config configs/BlendMask/R_50_1x.yaml --weights model_final.pth \\
        --input photo.jpg --output result.jpg --device npu
  a folder and a pattern on a CPU, drawn into a folder, and all results as one JSON list
    python scripts/inference.py --config configs/BlendMask/R_50_1x.yaml --weights model_final.pth \\
        --input photos/ 'more/**/*.png' --output drawn/ --json results.json --device cpu
  everything that the network returns, for pycocotools' COCO.loadRes
    python scripts/inference.py ... --input val2017/ --json results.json --score-threshold 0
  your own classes: a COCO categories list, [{"id": 1, "name": "bolt"}, ...]
    python scripts/inference.py ... --categories parts.json
  no checkpoint at hand: does this machine run the network at all?
    python scripts/inference.py ... --random-weights --input photo.jpg --output result.jpg

A result has file_name (with its folders where two inputs have the same name), image_id (1, 2, ... in the order of the
inputs), bbox [x, y, width, height] in pixels, score, class_index (from 0), category_id (the dataset's own),
category_name and segmentation (RLE); an image's results come in descending score. Overlays have the same names.
Exit code: 0 all done, 1 some images failed, 2 could not start.
"""


@dataclass(frozen=True, slots=True)
class Photograph:
    """One image of the run."""

    image_id: int  # from 1
    path: Path
    name: str  # among the inputs: unique
    output: Path | None  # where its overlay goes


class Network:
    """BlendMask on a device, with the names of its classes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Raises `UsageError`."""
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
        from blendmaskd_workers import blendmask, devices
        from blendmaskd_workers.engines import native

        self.exact: bool = arguments.exact
        try:
            self.config = blendmask.load_config(arguments.config)
            self.categories: Sequence[Category] = categories.resolve(
                self.config.num_classes, arguments.weights, arguments.categories
            )
            model = blendmask.build(self.config)
            if arguments.random_weights is None:
                blendmask.load_weights(model, arguments.weights)
            else:
                blendmask.load_into(model, blendmask.random_weights(model, arguments.random_weights))
            self.device = devices.open_device(arguments.device, arguments.precision)
        except (blendmask.ConfigError, blendmask.WeightsError, categories.CategoriesError) as error:
            raise UsageError(str(error)) from error
        except devices.UnsupportedError as error:
            raise UsageError(f"--precision {arguments.precision}: {error}") from error
        except devices.DeviceError as error:
            raise UsageError(f"--device {arguments.device}: {error}; --device cpu runs everywhere") from error
        self.model = native.network_for(model, self.device, self.exact)

    def segment(self, image: images.Photograph, options: Options) -> list[dict[str, Any]]:
        """The COCO results of an image, see `blendmaskd_workers.results`."""
        from blendmaskd_workers import blendmask
        from blendmaskd_workers.engines import native

        prepared = blendmask.prepare(image, self.config)
        (instances,) = blendmask.segment(self.model, [prepared], self.device.upload)
        return native.to_coco(instances, prepared, self.categories, options, self.exact)


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("inference", lambda: _main(_parser().parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    quiet()
    _check_weights(arguments)
    if arguments.exact and arguments.precision != "fp32":
        raise UsageError(f"--precision {arguments.precision}: --exact computes in fp32; leave one of them out")
    photographs = plan(arguments.input, arguments.output)
    _check_outputs(arguments, photographs)
    network = Network(arguments)
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    if arguments.random_weights is not None:
        console.print(f"Random weights (seed {arguments.random_weights}): the results mean nothing.")
    found: list[dict[str, Any]] = []
    try:
        failures = _run(photographs, network, Options(score_threshold=arguments.score_threshold), found, console)
    except KeyboardInterrupt:
        console.print("inference: interrupted")
        return EXIT_INTERRUPTED
    finally:
        if arguments.json:
            arguments.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    written = " and ".join(str(place) for place in (arguments.output, arguments.json) if place)
    print(f"{len(photographs) - failures} of {len(photographs)} images, {len(found)} instances, written to {written}")
    return EXIT_FAILED if failures else 0


def plan(inputs: Sequence[str], output: str | None) -> list[Photograph]:
    """The photographs that `inputs` (files, folders, quoted patterns) name, each once, and where their overlays go.

    Raises `UsageError` where an input names nothing, or `output` cannot be meant.
    """
    try:
        paths = input_images.find(inputs)
    except UsageError as error:
        raise UsageError(f"--input {error}") from None
    if not any(path.exists() for path in paths):  # one that is missing among others fails when its turn comes
        raise UsageError(f"--input {' '.join(inputs)}: no such file or folder")
    names = input_images.names(paths)
    outputs = _outputs(output, names)
    taken = {path.resolve() for path in paths}
    for place in filter(None, outputs):
        if place.resolve() in taken:
            raise UsageError(f"--output {output}: {place} is an input, or the overlay of another input")
        taken.add(place.resolve())
    return [
        Photograph(number, path, name, place)
        for number, (path, name, place) in enumerate(zip(paths, names, outputs), start=1)
    ]


def _outputs(output: str | None, names: Sequence[str]) -> Sequence[Path | None]:
    if output is None:
        return [None] * len(names)
    place = Path(output)
    suffix = place.suffix.lower()
    folder = place.is_dir() or output.endswith("/") or not suffix
    if not folder and suffix in SUFFIXES:
        if len(names) > 1:
            raise UsageError(f"--output {output}: is one file, but there are {len(names)} images: name a folder")
        return [place]
    if not folder and len(names) == 1:
        raise UsageError(f"--output {output}: cannot write {suffix}, only {' '.join(SUFFIXES)}; end a folder with /")
    # A photograph without a usual suffix is drawn into a PNG.
    return [place / (name if Path(name).suffix.lower() in SUFFIXES else name + ".png") for name in names]


def _check_weights(arguments: argparse.Namespace) -> None:
    if arguments.random_weights is not None or (arguments.weights and os.path.exists(arguments.weights)):
        return
    what = f"--weights {arguments.weights}: no such file" if arguments.weights else "--weights is missing"
    name = Path(arguments.config).stem
    raise UsageError(
        f"{what}. The network needs a trained checkpoint of the same configuration ({name}): one that you trained with "
        f"AdelaiDet (its OUTPUT_DIR/model_final.pth), or one of its model zoo, table row {name}, column \"download\":\n"
        f"  {MODEL_ZOO}\n"
        "Then name it:\n"
        f"  --config {arguments.config} --weights FILE.pth\n"
        "To see only whether the network runs here: --random-weights (its results mean nothing)."
    )


def _check_outputs(arguments: argparse.Namespace, photographs: Sequence[Photograph]) -> None:
    """Find out now, not after the last image, that a folder cannot be written."""
    if arguments.output is None and arguments.json is None:
        raise UsageError("nothing to write: name --output (overlays), --json (results), or both")
    if arguments.json and arguments.json.is_dir():
        raise UsageError(f"--json {arguments.json}: is a folder")
    places = [photograph.output for photograph in photographs] + [arguments.json]
    for folder in {place.parent for place in places if place}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder}: cannot be written to")


def _run(photographs: Sequence[Photograph], network: Network, options: Options, found: list[dict[str, Any]],
         console: Console) -> int:
    """Segment all, add their results to `found`, and return how many failed."""
    failures = 0
    columns = TextColumn("segmenting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for photograph in progress.track(photographs):
            try:
                started = time.monotonic()
                instances = _segment(photograph, network, options)
                found += instances
                took = time.monotonic() - started
                console.print(f"{in_a_line(photograph.name)}: {len(instances)} instances in {took:.2f} s")
            except (ImageError, OSError) as error:
                failures += 1
                reason = error.reason if isinstance(error, ImageError) else error.strerror or str(error)
                console.print(f"{in_a_line(photograph.name)}: FAILED: {reason}")
    return failures


def _segment(photograph: Photograph, network: Network, options: Options) -> list[dict[str, Any]]:
    image = images.read(photograph.path)
    instances = network.segment(image, options)
    if photograph.output:
        overlay.draw(image, instances).save(photograph.output, **LOSSY)
    return [{"file_name": photograph.name, "image_id": photograph.image_id} | instance for instance in instances]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inference",
        description="Segment photographs with BlendMask: draw boxes, names, scores and masks, and write COCO results.",
        epilog=EXAMPLES,
        formatter_class=Help,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the network: a YAML file with AdelaiDet's keys")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="an AdelaiDet checkpoint of that network (.pth)")
    weights.add_argument("--random-weights", type=seed, nargs="?", const=0, metavar="SEED",
                         help="run with seeded random weights (default seed 0): the results mean nothing")
    add("--input", required=True, nargs="+", metavar="PLACE",
        help="files, folders, or quoted patterns such as 'photos/**/*.jpg'")
    add("--output", metavar="PLACE", help="overlays: a file for one image, a folder for several")
    add("--json", type=Path, metavar="FILE", help="file for all results, as one list")
    add("--device", type=device, default="cpu", help="npu, npu:1, cuda, cuda:0 or cpu (default: cpu)")
    add("--score-threshold", type=share, default=0.3, metavar="T",
        help="keep instances with at least this score (default: 0.3; 0: everything the network returns)")
    add("--categories", metavar="FILE", help="names of the classes, a COCO categories list (default: categories.json "
        "beside the weights, else COCO's names for 80 classes)")
    add("--precision", choices=("fp32", "hf32", "bf16", "fp16", "native", "auto"), default="fp32",
        help="hf32 lets an NPU use HF32 and CUDA TF32; bf16 and fp16 are half precision; native is what the device "
        "does by itself; auto is bf16 on a CPU that measures clearly faster in it, native on an NPU without float32 "
        "(910A, 310P), else fp32 (default: fp32)")
    add("--exact", action="store_true", help="the network as it was trained, and masks as AdelaiDet pastes them: its "
        "answers on the same host to the last bit, slower; without it fp32 may differ in a pixel of a mask's edge")
    return parser
