"""Outputs of a network for the timed engine to give back, so that the host's work is real without a device.

`python -m blendmaskd_workers.benchmark.replay IMAGE FILE CONFIG HEIGHT WIDTH` is a process of its own, because it
imports torch, which has no place beside the generator; not for people. The weights are seeded: a hundred instances,
of no meaning. What is written is the fields of `blendmaskd_workers.engines.native.Recorded`.
"""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError, Photograph
from blendmaskd.programs.errors import UsageError

if TYPE_CHECKING:
    from blendmaskd_workers.blendmask import BlendMask

T = TypeVar("T")


def write(image: Path, file: Path, config: str, size: tuple[int, int]) -> None:
    """What the network of `config` says of the image, resized to `size` (height, width). Raises `UsageError`."""
    argv = [sys.executable, "-P", "-m", "blendmaskd_workers.benchmark.replay", str(image), str(file), config]
    if subprocess.run([*argv, *map(str, size)]).returncode:
        raise UsageError(f"--replay {image}: the network could not be run on it; see above")


def main(argv: list[str]) -> int:
    from blendmaskd_workers import blendmask

    image, file, config_path, height, width = argv
    try:
        photograph = images.read(image)
        config = blendmask.load_config(config_path)
    except (OSError, ImageError, blendmask.ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    resized = photograph.resize((int(width), int(height)))
    network = blendmask.build(config)
    blendmask.load_into(network, blendmask.random_weights(network))
    record(network, resized, Path(file))
    return 0


def record(trained: BlendMask, image: Photograph, file: Path) -> None:
    """Write what the network says of an image, as it is made for inference."""
    from blendmaskd_workers import blendmask

    network = blendmask.for_inference(trained, channels_last=True)
    images = [blendmask.prepare(image, network.config).tensor]
    begun, first = _counted(lambda: blendmask.begin(network, images, network.begin))
    proposals, second = _counted(lambda: blendmask.complete(begun, network.complete))
    packed = proposals.packed.numpy()
    kept = blendmask.choose(network, proposals, packed)
    masks, third = _counted(lambda: blendmask.blend(network, proposals, kept, lambda tensor: tensor))
    assert masks is not None
    np.savez(file, packed=packed[0], level_sizes=proposals.level_sizes, probabilities=masks.numpy(),
             launches=(first, second, third))  # fmt: skip


def _counted(compute: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and how many operators torch dispatched for it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        operators = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.operators += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:  # type: ignore[no-untyped-call]
        result = compute()
    return result, counting.operators


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
