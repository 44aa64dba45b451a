"""Types of arguments, for argparse, and the flags that programs share."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)


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


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    return checked(text, value, 0 <= value <= 1, "a number from 0 to 1")


def seconds(text: str) -> float:
    """More than 0, at most a day."""
    value = float(text)
    return checked(text, value, 0 < value <= 86400, "seconds, more than 0 and at most 86400")


def count(text: str) -> int:
    """0 or more."""
    return checked(text, int(text), int(text) >= 0, "0 or more")


def positive(text: str) -> int:
    """1 or more."""
    return checked(text, int(text), int(text) >= 1, "1 or more")


def percentage(text: str) -> float:
    """A number from 0 to 100."""
    value = float(text)
    return checked(text, value, 0 <= value <= 100, "percent, 0 to 100")


def checked(text: str, value: Number, good: bool, expected: str) -> Number:
    """The value if it is good. Raises argparse's error, which says what was expected instead of `text`."""
    if not good:
        raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
    return value
