"""Arguments of the benchmark, and their types."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from blendmaskd.output import Help
from blendmaskd.programs.arguments import checked, output_file, positive, seconds, size
from blendmaskd.programs.connecting import ANSWER_S, add_keys

MOST_CLIENTS = 500
LOAD_OPTIONS = ("clients", "rate", "size", "encoding", "transport", "mask_format")
PLOTS = (".svg", ".png", ".pdf")


def parse(argv: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The arguments; exits with usage when they are wrong."""
    parser = argparse.ArgumentParser(prog="benchmark", description=description, parents=[load_parser()],
                                     formatter_class=Help)  # fmt: skip
    daemon = parser.add_argument_group("the daemon")
    add = daemon.add_argument
    add("--endpoint", metavar="E", help="a running daemon; default: start one")
    add("--devices", nargs="+", default=["cpu:0", "cpu:1"], metavar="DEVICE")
    add("--engine", default="timed", choices=["native", "onnx", "adelaidet", "timed"])
    add("--batch", default="1", help="the setting batch: auto or a number; default 1")
    add("--replay", metavar="IMAGE", type=Path, help="engine timed does the native engine's work on the host: prepares "
        "images, and finishes what a network with seeded weights says of this one")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon")
    add("--wait", metavar="S", type=seconds, default=ANSWER_S, help="seconds to wait for the daemon at --endpoint")
    add_keys(daemon)
    add = parser.add_argument_group("the run").add_argument
    add("--seconds", type=seconds, default=10.0, help="measured per load; default 10")
    add("--warm-up", metavar="S", type=seconds, default=2.0, help="seconds of load before, not counted; default 2")
    add("--rounds", type=positive, default=3, help="the median is reported; default 3")
    add("--limit-seconds", metavar="S", type=_not_negative, default=3.0,
        help="of the bare loop, before and after each round; 0: not measured; default 3")
    add("--timeout", metavar="S", type=seconds, default=60.0, help="a job's deadline, default 60")
    add("--compare", nargs=2, metavar="KEY=VALUE", help="two variants in turns: settings, options of the load, or "
        "checkout=FOLDER, whose daemon then runs; several with ; between; 'NAME: KEY=VALUE' gives one a short name")
    add("--bare", nargs="?", choices=("proxy", "poller"), const="proxy", metavar="KIND", help="also the plain ZeroMQ "
        "path to workers that only sleep: its proxy (default), or a poller loop in Python")
    add("--http", nargs="+", metavar="URL",
        help="instead, load these HTTP endpoints in turns, of any server that takes an image as the body of a POST")
    add("--http-form", metavar="FIELD", help="of a multipart form instead, as this field")
    add("--kill", action="store_true", help="instead, kill -9 a worker under load")
    add("--flood", action="store_true",
        help="latency of a client with one job at a time, alone and beside one with 1000 in flight, instead")
    add = parser.add_argument_group("results").add_argument
    add("--json", metavar="FILE", type=output_file, help="write all figures, named as in BENCHMARKS.md")
    add("--markdown", action="store_true", help="print a Markdown table with one row per round")
    add("--plot", metavar="FILE", type=output_file, help=f"plot throughput against latency ({', '.join(PLOTS)})")
    return parser.parse_args(argv)


def load_parser() -> argparse.ArgumentParser:
    """The options that a variant of --compare may have of its own."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("the load").add_argument
    add("--clients", nargs="+", type=_clients, default=[8], metavar="N",
        help="closed loop, one job in flight each; several values run one after another; default 8")
    add("--rate", nargs="+", type=_rate, metavar="R",
        help="open loop instead: random (Poisson) jobs per second over --clients connections")
    add("--size", type=size, default=(800, 800), metavar="HEIGHTxWIDTH", help="default 800x800")
    add("--encoding", choices=["raw", "jpeg", "png", "path"],
        help="how images are sent; default raw, or with --images path: the daemon reads the files")
    add("--images", nargs="+", metavar="IMAGE", help="files, folders or globs, in turn, instead of a synthetic picture")
    add("--mask-format", choices=["rle", "polygon", "none"], default="rle")
    add("--transport", choices=["auto", "socket", "shared"], default="auto",
        help="for pixels, to a daemon on this host; auto, as clients do: shared memory where it helps")
    return parser


_clients = checked(int, lambda value: 1 <= value <= MOST_CLIENTS, f"a whole number from 1 to {MOST_CLIENTS}")
_rate = checked(float, lambda value: 0 < value <= 100_000, "jobs per second, more than 0 and at most 100000")
_not_negative = checked(float, lambda value: 0 <= value <= 3600, "seconds, 0 to 3600")
