"""Compare the network as it is served with the plain one, on a CPU: from pixels to encoded masks.

    python scripts/benchmark_network.py --threads 2

Plain is what AdelaiDet computes: float32, separate norms, the top layer everywhere, channels first, each mask pasted
over the whole image and encoded by pycocotools. Exact is what the native engine does with model.exact: the same, but
masks are pasted into their boxes only. Served is what it does without. All have the same seeded weights and the same
array of 800x800 pixels, and take turns; the result is the ratio of the medians in one run. The limit is the time that
the remaining multiplications would take at the rate of this machine's fastest convolution, measured in the same run: no
arrangement of the same arithmetic is faster. In fp32 served must find what plain finds, instances and masks,
except for rounding, whose size is reported; bf16 changes the order of such weights' meaningless scores, and thus which
instances are kept.
"""
from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.table import Table
from torch import nn

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Pixels
from blendmaskd.output import Help
from blendmaskd.programs.arguments import output_file, positive, threads
from blendmaskd.programs.errors import EXIT_FAILED, UsageError, guarded
from blendmaskd_workers import blendmask, devices, masks
from blendmaskd_workers.blendmask import BlendMask, Config, Detections, Instances
from blendmaskd_workers.blendmask.deformable import DeformableConv
from blendmaskd_workers.blendmask.postprocess import MASK_THRESHOLD
from blendmaskd_workers.engines import native
from blendmaskd_workers.masks import Floats

ROOT = Path(__file__).resolve().parents[3]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-4  # of scores; of boxes in terms of the image's longer side; of mask probabilities
HALF_ROUNDING = 1e-6  # what pasting makes of 0.5 everywhere, where a box overhangs the image
BEST_CONVOLUTION = (256, 100, 100)  # channels in and out, height, width: the head's, on p3 of an 800x800 image

Rles = list[dict[str, Any]]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Rounding:
    """How far the served network's answer is from the plain one's."""

    score: float  # largest difference
    box_px: float  # largest, in the network's pixels
    mask_pixels: int  # of the plain network's masks; 0: not compared, because a box lies outside the image
    differ: int  # pixels that are in one mask only
    differ_at_half: int  # beside these, such whose value is 0.5 in the plain mask: pasting leaves them to its rounding

    def __str__(self) -> str:
        return (f"served against plain: scores to {self.score:.1e}, boxes to {self.box_px:.1e} pixels; of "
                f"{self.mask_pixels} mask pixels {self.differ} differ, and {self.differ_at_half} whose value is 0.5")


@dataclass(frozen=True)
class Line:
    """One row of the table. Times are medians of all rounds."""

    precision: str
    plain_ms: float  # with each mask pasted over the whole image
    exact_ms: float  # with each mask pasted only into its box, as detectron2 does it on a CPU
    served_ms: float
    limit_ms: float
    instances: int
    same: float  # share of the plain network's instances that were found too
    rounding: Rounding | None = None  # of fp32

    @property
    def ratio(self) -> float:
        return self.plain_ms / self.served_ms


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("benchmark_network", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(arguments.threads)
    network = seeded(arguments.config)
    pixels = photograph(arguments.image, arguments.size)
    dense, left = multiplications(network.config, blendmask.prepare(pixels, network.config).padded_size)
    console = Console()
    console.print(f"{dense / 1e9:.1f} billion multiplications, {left / 1e9:.1f} with the top layer where it is read; "
                  f"{arguments.threads} threads, medians of {arguments.rounds} rounds")  # fmt: skip
    lines = []
    for precision in arguments.precisions:
        if precision == "bf16" and not devices.cpu_multiplies_bf16():
            console.print("bf16: skipped, this CPU has neither AVX512-BF16 nor AMX")
        else:
            lines.append(compare(network, pixels, precision, arguments.rounds, left))
    console.print(_table(lines))
    for line in lines:
        if line.rounding:
            console.print(f"{line.precision}, {line.rounding}")
    if arguments.json:
        report = {"threads": arguments.threads, "rounds": arguments.rounds, "multiplications": [dense, left],
                  "lines": [{**asdict(line), "ratio": line.ratio} for line in lines]}  # fmt: skip
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    slow = [line for line in lines if line.ratio < arguments.require.get(line.precision, 0)]
    for line in slow:
        console.print(f"{line.precision}: {line.ratio:.2f}x, required are {arguments.require[line.precision]:g}x")
    return EXIT_FAILED if slow else 0


def seeded(config: str) -> BlendMask:
    """A network with random weights. Raises `UsageError` for a configuration that cannot be built."""
    try:
        network = blendmask.build(blendmask.load_config(config))
    except blendmask.ConfigError as error:
        raise UsageError(str(error)) from None
    blendmask.load_into(network, blendmask.random_weights(network))
    return network


def photograph(path: str, height: int, width: int | None = None) -> Pixels:
    """The image as BGR pixels (height, width, 3), square by default. Raises `UsageError`, and OSError."""
    try:
        image = images.read(path)
    except ImageError as error:
        raise UsageError(f"{path}: {error}") from None
    return images.bgr(image.resize((width or height, height)))


# ---- the two sides ----------------------------------------------------------------------------------------------

def plain(network: BlendMask, pixels: Pixels) -> tuple[Instances, Detections]:
    """What the network says of an image: as it was trained, that is what AdelaiDet computes."""
    prepared = blendmask.prepare(pixels, network.config)
    [found] = blendmask.segment(network, [prepared])
    return found, blendmask.finish(found, prepared)


@torch.inference_mode()
def pasted_everywhere(found: Detections) -> Rles:
    """Encode masks that are pasted over the whole image, one at a time."""
    return [
        encode((stretched(probability, box, found.image_size) >= MASK_THRESHOLD).numpy())
        for probability, box in zip(found.probabilities, found.boxes)
    ]


def stretched(probability: Floats, box: Floats, image_size: tuple[int, int]) -> torch.Tensor:
    """The values (H, W) of a mask (R, R) over its box, 0 outside."""
    height, width = image_size
    x0, y0, x1, y1 = torch.tensor(box)
    x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2)
    return F.grid_sample(torch.from_numpy(probability)[None, None], grid[None], align_corners=False)[0, 0]


def pasted_into_windows(found: Detections) -> Rles:
    """The same, evaluated only inside each mask's box, as the native engine does it with model.exact."""
    return native.masks_of(found, exact=True).rles(range(len(found.boxes)))


def served(network: BlendMask, pixels: Pixels) -> tuple[Instances, Rles]:
    """What the native engine does with a network for inference."""
    instances, found = plain(network, pixels)
    return instances, masks.encode(found.probabilities, found.boxes, found.image_size)


def encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.view(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


# ---- comparing --------------------------------------------------------------------------------------------------

def compare(network: BlendMask, pixels: Pixels, precision: str, rounds: int, left: int) -> Line:
    """Both sides in turns; `left` are the multiplications of the served network. AssertionError: see `check_equal`."""
    dtype = DTYPES[precision]
    fast = blendmask.for_inference(network, dtype, channels_last=True)
    seconds: dict[str, list[float]] = {name: [] for name in ("network", "everywhere", "windows", "served", "limit")}
    served(fast, pixels)
    for _ in range(rounds):
        right, detections = timed(seconds["network"], plain, network, pixels)
        timed(seconds["everywhere"], pasted_everywhere, detections)
        timed(seconds["windows"], pasted_into_windows, detections)
        found, rles = timed(seconds["served"], served, fast, pixels)
        seconds["limit"].append(left / best_rate(dtype))
    return Line(
        precision,
        plain_ms=1000 * statistics.median(map(sum, zip(seconds["network"], seconds["everywhere"]))),
        exact_ms=1000 * statistics.median(map(sum, zip(seconds["network"], seconds["windows"]))),
        served_ms=1000 * statistics.median(seconds["served"]),
        limit_ms=1000 * min(seconds["limit"]),
        instances=len(rles),
        same=len(set(_keys(right)) & set(_keys(found))) / max(len(right.scores), 1),
        rounding=check_equal(right, detections, found, rles) if precision == "fp32" else None,
    )


def check_equal(right: Instances, detections: Detections, found: Instances, rles: Rles) -> Rounding:
    """How far two sides differ. AssertionError where it is more than `TOLERANCE`, or a mask does beyond rounding."""
    places = {key: index for index, key in enumerate(_keys(found))}
    assert places.keys() == set(_keys(right)), "other instances were found"
    order = [places[key] for key in _keys(right)]
    side = max(detections.image_size)
    np.testing.assert_allclose(found.scores[order], right.scores, rtol=TOLERANCE)
    np.testing.assert_allclose(found.boxes[order], right.boxes, atol=TOLERANCE * side)
    np.testing.assert_allclose(found.probabilities[order], right.probabilities, atol=TOLERANCE)
    pixels = differ = at_half = 0
    if len(rles) == len(detections.scores) == len(order):  # no box lies outside the image
        for index, probability, box in zip(order, detections.probabilities, detections.boxes):
            value = stretched(probability, box, detections.image_size).numpy()
            differs = (coco_mask.decode(rles[index]) == 1) != (value >= MASK_THRESHOLD)
            slope = 1 + float(np.abs(np.diff(probability)).max()) * len(probability)  # boxes may differ a little
            off = np.abs(value - MASK_THRESHOLD)
            assert not (differs & (off > slope * TOLERANCE)).any(), f"mask {index} differs"
            pixels += int((value >= MASK_THRESHOLD).sum())
            differ += int((differs & (off > HALF_ROUNDING)).sum())
            at_half += int((differs & (off <= HALF_ROUNDING)).sum())
    scores, boxes = (float(np.abs(ours[order] - theirs).max(initial=0)) for ours, theirs in
                     ((found.scores, right.scores), (found.boxes, right.boxes)))  # fmt: skip
    return Rounding(scores, boxes, pixels, differ, at_half)


def _keys(found: Instances) -> list[tuple[Any, ...]]:
    """What an instance is known by: the cell that predicted it, and its class."""
    return list(zip(found.levels.tolist(), map(tuple, found.locations.tolist()), found.classes.tolist()))


def multiplications(config: Config, padded_size: tuple[int, int]) -> tuple[int, int]:
    """Multiplications of all convolutions for one image: with the top layer everywhere, and where it is read."""
    with torch.device("meta"):
        network = blendmask.build(config)
        images = torch.zeros(1, 3, *padded_size)
    counts: list[int] = []

    def count(conv: Any, _: Any, output: torch.Tensor) -> None:
        counts.append(conv.weight[0].numel() * output.numel())

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, DeformableConv)):
            module.register_forward_hook(count)
    with torch.inference_mode():
        proposals = network.propose(images)
    dense = sum(counts)
    cells = sum(height * width for height, width in proposals.level_sizes)
    return dense, dense - network.top_layer.weight.numel() * max(cells - config.post_nms_topk, 0)


@torch.inference_mode()
def best_rate(dtype: torch.dtype) -> float:
    """Multiplications per second of a convolution that suits the machine."""
    channels, height, width = BEST_CONVOLUTION
    conv = nn.Conv2d(channels, channels, 3, padding=1).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    maps = torch.randn(1, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)
    seconds: list[float] = []
    for _ in range(8):
        timed(seconds, conv, maps)
    return float(conv.weight[0].numel() * maps.numel() / min(seconds))


def timed(seconds: list[float], work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    start = time.perf_counter()
    result = work(*arguments, **named)
    seconds.append(time.perf_counter() - start)
    return result


def _table(lines: Sequence[Line]) -> Table:
    table = Table("", "plain", "exact", "served", "ratio", "limit", "from the limit", "same cells")
    for line in lines:
        limit = f"{line.plain_ms / line.limit_ms:.2f}x, {line.limit_ms:.0f} ms"
        times = (f"{ms:.0f} ms" for ms in (line.plain_ms, line.exact_ms, line.served_ms))
        distance = f"{100 * (1 - line.limit_ms / line.served_ms):.0f}%"
        table.add_row(line.precision, *times, f"{line.ratio:.2f}x", limit, distance, f"{100 * line.same:.0f}%")
    return table


def _requirement(text: str) -> tuple[str, float]:
    precision, _, ratio = text.partition("=")
    if precision not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected fp32=RATIO or bf16=RATIO")
    return precision, float(ratio)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", default=str(ROOT / "configs/BlendMask/R_50_1x.yaml"))
    add("--image", default=str(ROOT / "tests/golden/images/chelsea.png"))
    add("--size", type=int, default=800, metavar="N", help="side of the square array in pixels (default 800)")
    add("--threads", type=threads, default=2)
    add("--rounds", type=positive, default=5)
    add("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--require", nargs="+", type=_requirement, default=[], metavar="P=RATIO", help="minimums, such as fp32=1.5")
    add("--json", type=output_file, metavar="FILE", help="write the figures to this file")
    arguments = parser.parse_args(argv)
    arguments.require = dict(arguments.require)
    return arguments
