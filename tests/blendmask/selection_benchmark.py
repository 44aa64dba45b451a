"""What selection on the host takes, beside the same one survivor at a time, in turns; both must choose the same.

    python scripts/benchmark_selection.py --require 0.25

The candidates are those of a network with seeded weights, R_50_1x by default, for a photograph stretched to a square.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import one_at_a_time
import torch

from blendmaskd.output import Help
from blendmaskd.programs.errors import guarded
from blendmaskd_workers import blendmask
from blendmaskd_workers.blendmask import selection
from blendmaskd_workers.programs.benchmark_network import photograph, seeded

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("benchmark_selection", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)  # as the thread of a device has it
    config, proposals = propose(arguments)
    [packed] = proposals.packed.numpy()
    now, before = [], []
    for _ in range(arguments.rounds):
        expected = timed(before, one_at_a_time.select, packed, proposals.level_sizes, config)
        found = timed(now, selection.select, packed, proposals.level_sizes, config)
    for name in selection.Selection.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    ratio = statistics.median(now) / statistics.median(before)
    print(f"{(packed[:, 0] >= 0).sum()} candidates, {len(found)} kept: {1000 * statistics.median(now):.2f} ms, one "
          f"survivor at a time {1000 * statistics.median(before):.2f} ms, ratio {ratio:.2f}; {arguments.rounds} rounds")
    return int(ratio > arguments.require)


@torch.inference_mode()
def propose(arguments):
    network = seeded(arguments.config)
    config = network.config
    prepared = blendmask.prepare(photograph(arguments.image, arguments.size), config)
    images = blendmask.collate([prepared.tensor], config)
    return config, blendmask.for_inference(network, channels_last=True).propose(images)


def timed(seconds: list[float], select, *arguments):
    start = time.perf_counter()
    result = select(*arguments)
    seconds.append(time.perf_counter() - start)
    return result


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark_selection", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", default=str(ROOT / "configs" / "BlendMask" / "R_50_1x.yaml"))
    add("--image", default=str(ROOT / "tests" / "golden" / "images" / "chelsea.png"))
    add("--size", type=int, default=800, help="side of the square that the image is stretched to (default: 800)")
    add("--rounds", type=int, default=200)
    add("--require", type=float, default=float("inf"), metavar="RATIO", help="fail when it takes a larger share")
    return parser.parse_args(argv)
