"""Compare what an image costs the host with Pillow's own work on it, one thread each.

Before the device: from a JPEG's bytes to what is uploaded, checks included, against Pillow's decoding and resizing of
the same bytes to the same size, by the same filter, without draft mode and without anything else. Behind it: from what
a network says of an image to the answer's bytes, a hundred masks encoded. Pillow and ours take turns; a ratio is the
median of the rounds' ratios, of CPU time. Ratios can be compared between machines, milliseconds cannot.

  python scripts/benchmark_host.py
  python scripts/benchmark_host.py --sizes 3000x4000 --rounds 25
  python scripts/benchmark_host.py --images photos/*.jpg --require 1.2  # your own photographs; exit code 1 above 1.2
  python scripts/benchmark_host.py --json host.json

A synthetic photograph is smooth with a little noise, of quality 90, about as large as a camera's. The masks are those
of a network with seeded weights on --replay; finishing them is said as a multiple of Pillow's time for 800x800.

Exit codes: 0 measured · 1 other pixels than Pillow's, or a ratio above --require · 2 wrong arguments · 130 Ctrl-C.
"""
from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from blendmaskd import files, settings
from blendmaskd.images import decoding as images
from blendmaskd.images.decoding import ImageError
from blendmaskd.output import Help
from blendmaskd.programs import input_images
from blendmaskd.programs.arguments import output_file, positive, size
from blendmaskd.programs.errors import EXIT_FAILED, UsageError, guarded
from blendmaskd.protocol import Options
from blendmaskd.settings import Limits
from blendmaskd_workers import blendmask
from blendmaskd_workers.benchmark import pictures, replay, report
from blendmaskd_workers.engines.native import ReplayEngine

ROOT = Path(__file__).resolve().parents[3]
SIZES = ((800, 800), (960, 1280), (1080, 1920), (3000, 4000))
REPLAYED = (800, 800)  # what the masks are of, and what their time is a multiple of


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmark_host", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--sizes", nargs="+", type=size, default=SIZES, metavar="HEIGHTxWIDTH", help="of synthetic photographs")
    add("--images", nargs="+", metavar="IMAGE", help="files, folders or globs instead")
    add("--config", default=str(ROOT / "configs/BlendMask/R_50_1x.yaml"), help="of the network: its input's size")
    add("--replay", type=Path, default=ROOT / "tests/golden/images/chelsea.png", metavar="IMAGE",
        help="what the masks are of")
    add("--rounds", type=positive, default=15, help="default 15")
    add("--require", type=float, metavar="RATIO", help="exit with code 1 when a photograph's ratio is above")
    add("--json", type=output_file, metavar="FILE", help="write all figures")
    arguments = parser.parse_args(argv)
    return guarded("benchmark_host", lambda: _main(arguments))


def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    try:
        config = blendmask.load_config(arguments.config)
    except blendmask.ConfigError as error:
        raise UsageError(str(error)) from None
    rows = [compare(name, encoded, config, arguments.rounds) for name, encoded in _photographs(arguments)]
    masks = finishing(arguments, config)
    Console(soft_wrap=True).print(_table(rows), _sentence(masks), sep="\n")
    if arguments.json:
        files.write_json(arguments.json, {"machine": report.machine(), "rows": rows, "masks": masks})
    too_slow = arguments.require and max(row["ratio"] for row in rows) > arguments.require
    return EXIT_FAILED if too_slow or not all(row["same"] for row in rows) else 0


def _photographs(arguments: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    if not arguments.images:
        for height, width in arguments.sizes:
            yield f"{width}x{height}", pictures.synthetic((height, width), "jpeg").payload or b""
    for path in input_images.find(arguments.images or ()):
        yield path.name, path.read_bytes()


# ---- before the device ------------------------------------------------------------------------------------------

def compare(name: str, encoded: bytes, config: blendmask.Config, rounds: int) -> dict[str, Any]:
    """One row: medians in milliseconds, and the median of the rounds' ratios. Raises `UsageError`."""
    try:
        prepared = prepare(encoded, config)
    except ImageError as error:
        raise UsageError(f"{name}: {error}") from None
    height, width = prepared.net_size
    return {
        "photograph": name,
        "bytes": len(encoded),
        "resized": f"{width}x{height}",
        **in_turns(lambda: resize(encoded, height, width), lambda: prepare(encoded, config), rounds),
        "same": _same(prepared, resize(encoded, height, width), config),
    }


def prepare(encoded: bytes, config: blendmask.Config) -> blendmask.Prepared:
    """As a worker does it."""
    return blendmask.prepare(images.decode(encoded, Limits()), config)


def resize(encoded: bytes, height: int, width: int) -> Image.Image:
    """As Pillow does it."""
    return Image.open(io.BytesIO(encoded)).resize((width, height), Image.Resampling.BILINEAR)


def _same(prepared: blendmask.Prepared, resized: Image.Image, config: blendmask.Config) -> bool:
    if resized.mode != "RGB" or resized.getexif():
        return True  # ours is converted and turned, too
    planes = np.asarray(resized).transpose(2, 0, 1)[:: 1 if config.channel_order == "RGB" else -1]
    return bool((prepared.tensor.numpy() == planes).all())


# ---- behind the device ------------------------------------------------------------------------------------------

def finishing(arguments: argparse.Namespace, config: blendmask.Config) -> dict[str, Any]:
    """What it costs to finish and encode the replayed network's masks, in turns with Pillow's work for 800x800."""
    with tempfile.TemporaryDirectory(prefix="blendmaskd-benchmark-") as folder:
        file = Path(folder) / "outputs.npz"
        replay.write(arguments.replay, file, arguments.config, REPLAYED)
        engine = ReplayEngine(settings.from_tree({
            "engine": "timed", "model": {"config": arguments.config}, "timed": {"outputs": str(file)},
        }))  # fmt: skip
        engine.load()
    encoded = pictures.synthetic(REPLAYED, "jpeg").payload or b""
    prepared = prepare(encoded, config)
    output = engine.output(prepared)

    def finish() -> bytes:
        packed: bytes = msgpack.packb(engine.finish(output, prepared, Options()))
        return packed

    times = in_turns(lambda: resize(encoded, *prepared.net_size), finish, arguments.rounds)
    return {"masks": len(output.scores), "bytes": len(finish()), **times}


# ---- measuring and telling --------------------------------------------------------------------------------------

def in_turns(pillow: Callable[[], object], ours: Callable[[], object], rounds: int) -> dict[str, float]:
    """Medians of the CPU time of both, and of their ratio by round; a round more goes first, which is not counted."""
    pairs = [(_cpu_ms(pillow), _cpu_ms(ours)) for _ in range(rounds + 1)][1:]
    return {
        "pillow_ms": statistics.median(their for their, _ in pairs),
        "ms": statistics.median(our for _, our in pairs),
        "ratio": statistics.median(our / their for their, our in pairs),
    }


def _cpu_ms(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return 1000 * (time.process_time() - start)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("photograph", "bytes", "resized to", "Pillow, ms", "ours", "ratio", title="ms of CPU, one thread")
    for row in rows:
        ratio = f"{row['ratio']:.2f}x" + ("" if row["same"] else " and other pixels")
        table.add_row(row["photograph"], f"{row['bytes']}", row["resized"], f"{row['pillow_ms']:.1f}",
                      f"{row['ms']:.1f}", ratio)  # fmt: skip
    return table


def _sentence(masks: Mapping[str, Any]) -> str:
    done = f"finishing and encoding {masks['masks']} masks, {masks['bytes']} bytes: {masks['ms']:.1f} ms of CPU"
    return f"{done}, {masks['ratio']:.2f} times Pillow's {masks['pillow_ms']:.1f} ms for {REPLAYED[1]}x{REPLAYED[0]}"
