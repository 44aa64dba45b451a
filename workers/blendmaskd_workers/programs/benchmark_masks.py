"""Compare mask encoding with pasting: RLEs from edges against a bitmap per mask and pycocotools' encode, one thread.

    python scripts/benchmark_masks.py

The masks are those of R_50_1x with seeded weights on a photograph scaled to 800x1200, with the boxes as found, and
enlarged to a tenth and a quarter of the image. The baseline evaluates only each box's window, as detectron2 does on a
CPU. Pixels can differ only where the value is exactly 0.5, which the reference leaves to rounding. Both are timed in
turns in one run; the result is the ratio of the medians.
"""
from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.table import Table

from blendmaskd.output import Help
from blendmaskd.programs.arguments import positive
from blendmaskd.programs.errors import guarded
from blendmaskd_workers import blendmask, masks
from blendmaskd_workers.masks import Floats
from blendmaskd_workers.programs.benchmark_network import ROOT, Rles, encode, photograph, seeded, timed

SIZE = (800, 1200)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--config", default=str(ROOT / "configs/BlendMask/R_50_1x.yaml"))
    parser.add_argument("--image", default=str(ROOT / "tests/golden/images/chelsea.png"))
    parser.add_argument("--rounds", type=positive, default=7)
    arguments = parser.parse_args(argv)
    return guarded("benchmark_masks", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    boxes, probabilities = instances(arguments.config, arguments.image)
    table = Table("boxes", "masks", "pasting", "edges", "ratio", "pixels that differ", title="ms per mask, one thread")
    for name, resized in sized(boxes).items():
        table.add_row(name, *compare(resized, probabilities, arguments.rounds))
    Console().print(table)
    return 0


def instances(config_path: str, image_path: str) -> tuple[Floats, Floats]:
    """Boxes (n, 4) in an image of `SIZE`, and mask probabilities (n, R, R), of a network with seeded weights.

    Raises `UsageError`, and OSError.
    """
    network = seeded(config_path)
    prepared = blendmask.prepare(photograph(image_path, *SIZE), network.config)
    [found] = blendmask.segment(network, [prepared])
    detections = blendmask.finish(found, prepared)
    return detections.boxes, detections.probabilities


def sized(boxes: Floats) -> dict[str, Floats]:
    """The boxes as they are, and moved and stretched to a tenth and a quarter of the image's area."""
    cases = {"as they are": boxes}
    rng = np.random.default_rng(0)
    for name, share in {"a tenth of the image": 0.1, "a quarter of the image": 0.25}.items():
        side = np.array(SIZE[::-1]) * share**0.5
        corner = rng.uniform(0, np.array(SIZE[::-1]) - side, (len(boxes), 2))
        cases[name] = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
    return cases


def compare(boxes: Floats, probabilities: Floats, rounds: int) -> list[str]:
    """One row of the table."""

    def paste() -> Rles:
        return [encode(blendmask.paste_one(*pair, SIZE)) for pair in zip(probabilities, boxes)]

    slow: list[float] = []
    fast: list[float] = []
    for _ in range(rounds):
        pasted = timed(slow, paste)
        found = timed(fast, masks.encode, probabilities, boxes, SIZE)
    differ = sum(int((coco_mask.decode(ours) != coco_mask.decode(theirs)).sum()) for ours, theirs in zip(found, pasted))
    before, after = (1000 * statistics.median(times) / len(boxes) for times in (slow, fast))
    return [str(len(boxes)), f"{before:.3f}", f"{after:.3f}", f"{before / after:.1f}x", str(differ)]
