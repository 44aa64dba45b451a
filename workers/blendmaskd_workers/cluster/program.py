"""Segment a folder or Parquet files with every accelerator of a Ray cluster, or of this machine.

    python scripts/segment_dataset.py --input photos/ --output out/ --settings configs/daemon.yaml
    python scripts/segment_dataset.py --input 'train/*.parquet' --output out/ --format parquet --address ray-head:6379
    python scripts/segment_dataset.py --input photos/ --output out/ --resume

Writes to --output results.json, the list of all COCO results (or results.parquet, one row per image), failures.json,
the images without a result and the reasons, and the journal. Images are files, folders (the images directly in them),
quoted globs, or Parquet files with a column of encoded images. All nodes must see --input and --output under the same
paths.

--resume continues a run that ended early, for whatever reason: images in the journal are not repeated unless their file
has changed; images that failed for reasons of their own stay failed, and so do images that killed workers (worker-lost)
unless --retry-lost is given. Without --address a cluster running on this machine is used, otherwise one is started for
the run.

Exit codes: 0 all done · 1 an image failed, listed at the end · 2 wrong arguments · 3 no cluster, or no device in it ·
4 --output cannot be written · 130 Ctrl-C.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from blendmaskd.output import Help
from blendmaskd.programs.arguments import add_results, parse_resuming, positive
from blendmaskd.programs.errors import guarded


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("segment_dataset", lambda: _run(_parse(argv)))


def _run(arguments: argparse.Namespace) -> int:
    from blendmaskd_workers.cluster import dataset  # needs the extra ray, help and mistakes do not

    return dataset.run(arguments)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--input", metavar="IMAGES", nargs="+", required=True,
        help="files, folders, quoted globs, or Parquet files or folders of them")
    add("--output", metavar="DIR", type=Path, required=True)
    add("--settings", metavar="FILE", help="a settings file as the daemon's; default: its defaults")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override one setting")
    add("--devices", metavar="DEVICE", nargs="+", help="the kind of devices: npu:0, cuda:0 or cpu:0")
    add("--address", metavar="HOST:PORT", help="the Ray cluster's; default: the one on this machine")
    add("--workers", metavar="N", type=positive, help="at most N; default: as many as fit")
    add("--format", choices=["coco", "parquet"], default="coco", help="results.json or results.parquet")
    add("--column", metavar="NAME", default="image", help="Parquet column with encoded images; default image")
    add("--name-column", metavar="NAME", help="column with the images' file names; default: FILE#ROW")
    add_results(parser)
    return parse_resuming(parser, argv, "--output")
