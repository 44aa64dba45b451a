"""The networks that these tests build: AdelaiDet's zoo as shipped, and small ones."""

import zlib
from pathlib import Path

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
