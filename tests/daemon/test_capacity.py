"""docs/capacity.md: its tables follow from its inputs, and its inputs from where it says."""
from __future__ import annotations

import math
import re
from typing import NamedTuple

import pytest

from blendmaskd.settings import Settings
from checkout import ROOT

PAGE = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
RATES = (100, 10_000, 1_000_000)
FUNCTIONS = {"ceil": math.ceil, "sqrt": math.sqrt, "log": math.log}


class Input(NamedTuple):
    name: str
    value: str
    origin: str


class Cell(NamedTuple):
    """What a table shows for a formula at a rate."""

    formula: str
    rate: int
    shown: str


def rows(heading: str) -> list[list[str]]:
    """Of the table below a heading, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ") for line in section.splitlines() if line.startswith("|")]
    return [re.split(r"\s+\|\s*", line) for line in lines[2:]]


INPUTS = [Input(cells[0].strip("`"), cells[1], [*cells, ""][4]) for cells in rows("What an image costs")]
VALUES = {name: float(value) for name, value, _ in INPUTS}
CELLS = [Cell(formula.strip("`"), 0, shown) for _, formula, shown in rows("One host of two NPUs")] + [
    Cell(formula.strip("`"), rate, shown)
    for _, formula, *row in rows("Three sizes") for rate, shown in zip(RATES, row, strict=True)
]  # fmt: skip


def test_the_tables_are_found() -> None:
    assert len(INPUTS) >= 15
    assert len(CELLS) >= 11 + 3 * 15


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_what_is_shown_is_what_the_formula_gives(cell: Cell) -> None:
    names = {**VALUES, **FUNCTIONS, "rate": cell.rate, "__builtins__": {}}
    value = eval(cell.formula, names)  # the page's own arithmetic
    decimals = len(cell.shown.partition(".")[2])
    assert f"{value:,.{decimals}f}".replace(",", "") == cell.shown.replace(",", "")


@pytest.mark.parametrize("each", [each for each in INPUTS if each.origin.startswith("BENCHMARKS")], ids=str)
def test_inputs_are_in_the_benchmarks(each: Input) -> None:
    text = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    title = {"load": "Throughput against latency"}.get(each.origin.split()[1], f"{each.origin.split()[1]}. ")
    section = text.split(f"\n## {title}")[1].split("\n## ")[0]
    assert re.search(rf"(?<![\d.]){re.escape(each.value)}(?![\d.]*\d)", section), each


def test_the_other_inputs_are_what_they_are_elsewhere() -> None:
    settings = Settings()
    assert settings.timed.latency_ms[int(VALUES["batch"])] == VALUES["batch_ms"]
    assert settings.queue.max_jobs == VALUES["queue_jobs"]
    assert settings.limits.max_image_pixels == VALUES["largest_pixels"]
    assert VALUES["raw_bytes"] == 800 * 800 * 3


def test_the_text_says_what_the_tables_say() -> None:
    """Its percentages and its numbers of five digits and more."""
    text = PAGE.split("## What breaks first")[1]
    said = set(re.findall(r"(\d+)%", text)) | set(re.findall(r"\d+,\d{3}(?:,\d{3})?", text))
    ours = {"5", "1", "4", *(f"{rate:,}" for rate in RATES)}  # maxUnavailable, of the device's time, of 99.4
    assert len(said) > 8
    assert said - ours <= {cell.shown for cell in CELLS}
