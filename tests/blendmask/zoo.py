"""The networks that these tests build: AdelaiDet's zoo as shipped, and small ones."""

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = {
    path.stem: path
    for path in (*sorted(GOLDEN.glob("small_*.yaml")), *sorted((ROOT / "configs" / "BlendMask").glob("*.yaml")))
    if not path.stem.startswith("Base-")
}


def crc32(weights) -> int:
    """Return the CRC-32 of all tensors' bytes, in the order of their keys."""
    crc = 0
    for key in sorted(weights):
        crc = zlib.crc32(weights[key].numpy(), crc)
    return crc


@contextlib.contextmanager
def two_threads() -> Iterator[None]:
    """As many as recorded the goldens: PyTorch sums otherwise with another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(before)
