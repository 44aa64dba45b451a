"""Types of arguments, for argparse."""
from __future__ import annotations

import argparse
from typing import TypeVar

Number = TypeVar("Number", int, float)


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
