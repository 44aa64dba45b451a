"""Outputs of a network for the timed engine to give back, so that the host's work is real without a device.

`python -m blendmaskd_workers.benchmark.replay IMAGE FILE CONFIG HEIGHT WIDTH` is a process of its own, because it
imports torch, which has no place beside the generator; not for people. The weights are seeded: a hundred instances,
of no meaning.
"""
from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError
from blendmaskd.programs.errors import UsageError


def write(image: Path, file: Path, config: str, size: tuple[int, int]) -> None:
    """What the network of `config` says of the image, resized to `size` (height, width). Raises `UsageError`."""
    argv = [sys.executable, "-P", "-m", "blendmaskd_workers.benchmark.replay", str(image), str(file), config]
    if subprocess.run([*argv, *map(str, size)]).returncode:
        raise UsageError(f"--replay {image}: the network could not be run on it; see above")


def main(argv: list[str]) -> int:
    from blendmaskd_workers import blendmask

    image, file, config_path, height, width = argv
    try:
        pixels = images.read(image)
        config = blendmask.load_config(config_path)
    except (OSError, ImageError, blendmask.ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    resized = np.asarray(Image.fromarray(pixels).resize((int(width), int(height))))
    network = blendmask.build(config)
    blendmask.load_into(network, blendmask.random_weights(network))
    [found] = blendmask.segment(network, [blendmask.prepare(resized, config)])
    np.savez(file, **{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
