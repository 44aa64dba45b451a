"""Write a checkpoint of random weights, to try everything except the results.

    python scripts/random_weights.py --config configs/BlendMask/R_50_1x.yaml --output random.pth

It has the form of an AdelaiDet checkpoint, ``{"model": state_dict}``, and depends only on the configuration and
the seed: every machine writes the same one.
"""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from blendmaskd import files
from blendmaskd.output import Help
from blendmaskd.programs.arguments import seed
from blendmaskd.programs.errors import EXIT_FAILED, reason


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    try:
        count = save(arguments.config, arguments.output, arguments.seed)
    except (OSError, ValueError) as error:
        print(f"random_weights: {reason(error)}", file=sys.stderr)
        return EXIT_FAILED
    print(f"{arguments.output}: {count / 1e6:.1f} million random weights, seed {arguments.seed}. Nothing has been")
    print("learnt: a network with them finds many instances, and none of them means anything.")
    return 0


def save(config: str, output: Path, seed: int) -> int:
    """Write the checkpoint, whole or not at all; returns the number of weights.

    Raises OSError, and `blendmaskd_workers.blendmask.ConfigError` for a configuration that cannot be built.
    """
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # an installed torch_npu without CANN breaks torch
    import torch

    from blendmaskd_workers import blendmask

    weights = blendmask.random_weights(blendmask.build(blendmask.load_config(config)), seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Given a path, torch would write the file's name into it.
    with files.whole(output) as beside, beside.open("wb") as file:
        torch.save({"model": weights}, file)
    return sum(value.numel() for value in weights.values())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--config", metavar="FILE", required=True, help="the network: AdelaiDet's YAML keys")
    parser.add_argument("--output", metavar="FILE", type=Path, required=True, help="checkpoint, such as random.pth")
    parser.add_argument("--seed", metavar="N", type=seed, default=0, help="default 0")
    return parser.parse_args(argv)
