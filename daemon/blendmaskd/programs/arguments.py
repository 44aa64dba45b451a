"""Types of arguments, for argparse, and the flags that programs share."""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MOST = 10**15  # what counts and seeds go into has 64 bits


def add_results(parser: argparse.ArgumentParser) -> None:
    """What of an image's results is wanted."""
    parser.add_argument("--score-threshold", metavar="S", type=share, default=0.3, help="0 to 1, default 0.3")
    parser.add_argument("--max-detections", metavar="N", type=count, help="the best ones; default: all")
    parser.add_argument("--mask-format", choices=["rle", "polygon", "none"], default="rle")


def parse_resuming(parser: argparse.ArgumentParser, argv: Sequence[str] | None, out: str) -> argparse.Namespace:
    """The arguments of a program whose runs can be continued; `out` is the flag that names a run's folder."""
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue a run that ended early")
    again.add_argument("--anew", action="store_true", help=f"begin anew although {out} holds a run")
    parser.add_argument("--retry-lost", action="store_true", help="with --resume: what failed as worker-lost, too")
    arguments = parser.parse_args(argv)
    if arguments.retry_lost and not arguments.resume:
        parser.error("--retry-lost: only with --resume")
    return arguments


def checked(convert: Callable[[str], T], good: Callable[[T], object], expected: str) -> Callable[[str], T]:
    """A type of argument: what is good of it. Raises argparse's error, which says what was expected instead."""

    def parse(text: str) -> T:
        with contextlib.suppress(ValueError):
            if good(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")

    return parse


share = checked(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
seconds = checked(float, lambda value: 0 < value <= 86400, "seconds, more than 0 and at most 86400")
percentage = checked(float, lambda value: 0 <= value <= 100, "percent, 0 to 100")
count = checked(int, lambda value: 0 <= value <= MOST, "a whole number from 0 to 10^15")
positive = checked(int, lambda value: 1 <= value <= MOST, "a whole number from 1 to 10^15")
seed = count
threads = checked(int, lambda value: 1 <= value <= 1024, "a whole number from 1 to 1024")
# Of a process that computes by itself.
device = checked(str, re.compile(r"(npu|cuda|cpu)(:\d+)?").fullmatch, "npu, npu:N, cuda, cuda:N or cpu")


def size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: expected HEIGHTxWIDTH in pixels, such as 800x1200")
    return int(found[1]), int(found[2])


def output_file(text: str) -> Path:
    """A file that a program writes at its end; whether it can is found out before."""
    path, folder = Path(text), Path(text).absolute().parent
    if not os.path.isdir(folder):
        raise argparse.ArgumentTypeError(f"{text}: the folder {folder} does not exist")
    if os.path.exists(path) and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: exists, and is no regular file")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: nothing can be written there: {error.strerror}") from None
    return path
