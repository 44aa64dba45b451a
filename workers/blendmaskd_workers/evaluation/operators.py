"""Which operators a device spends its time in, and which of them grow faster than the batch; pure.

`read_kernel_details` reads the table of torch_npu's profiler, `table` compares batch sizes. Times are in milliseconds.
"""
from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TYPE, NAME, CORE, DURATION = "Type", "Name", "Accelerator Core", "Duration(us)"  # columns that all its versions have
NOT_TOLD = ("N/A", "")
SHOWN = 15  # operators by name; the rest is summed up
OTHERS = "all others"

Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Operator:
    """One kind of operator: all its calls in a run of a batch."""

    name: str  # Conv2D, aten::mkldnn_convolution
    core: str  # what it ran on: AI_CORE, AI_CPU, cpu, cuda
    calls: float
    ms: float


def read_kernel_details(text: str) -> list[Operator]:
    """The operators of a ``kernel_details.csv``, in which each launch has a row; columns differ by version.

    An operator without a type, as profiler level 0 leaves it, goes by its name. Raises ValueError for another file.
    """
    rows = csv.DictReader(text.splitlines())
    missing = {TYPE, NAME, CORE, DURATION} - set(rows.fieldnames or ())
    if missing:
        raise ValueError(f"this is no kernel_details.csv: no column {', '.join(sorted(missing))}")
    return summed(
        Operator(row[NAME] if row[TYPE] in NOT_TOLD else row[TYPE], row[CORE], 1, float(row[DURATION]) / 1000)
        for row in rows
    )


def summed(operators: Iterable[Operator]) -> list[Operator]:
    """One operator of each name and core, the longest first."""
    total: dict[Key, Operator] = {}
    for one in operators:
        before = total.get((one.name, one.core), Operator(one.name, one.core, 0, 0.0))
        total[one.name, one.core] = Operator(one.name, one.core, before.calls + one.calls, before.ms + one.ms)
    return sorted(total.values(), key=lambda one: -one.ms)


def table(by_batch: Mapping[int, Sequence[Operator]]) -> dict[str, Any]:
    """``batches`` with their sums, and ``operators`` with what they take in each, the longest in any first.

    ``excess_ms`` is what the last batch takes of an operator beyond the first one's time per image: 0 where it grows
    with the batch, less where larger batches are worth it.
    """
    found = {batch: {(one.name, one.core): one for one in operators} for batch, operators in by_batch.items()}
    longest_first = sorted(itertools.chain(*by_batch.values()), key=lambda one: -one.ms)
    keys = list(dict.fromkeys((one.name, one.core) for one in longest_first))
    totals = {batch: sum(one.ms for one in operators) for batch, operators in by_batch.items()}
    shown = [_row(name, core, [(name, core)], found, totals) for name, core in keys[:SHOWN]]
    others = [_row(OTHERS, f"{len(keys) - SHOWN} kinds", keys[SHOWN:], found, totals)] if len(keys) > SHOWN else []
    batches = [{"batch": batch, "ms": totals[batch], "calls": sum(one.calls for one in found[batch].values())}
               for batch in found]  # fmt: skip
    rows = [*shown, *others]
    return {"batches": batches, "operators": rows, "excess_ms": sum(row["excess_ms"] for row in rows)}


def _row(
    name: str, core: str, keys: Sequence[Key], found: Mapping[int, Mapping[Key, Operator]], totals: Mapping[int, float]
) -> dict[str, Any]:
    cells = []
    for batch, operators in found.items():
        ones = [operators[key] for key in keys if key in operators]
        ms = sum(one.ms for one in ones)
        cells.append({"batch": batch, "ms": ms, "calls": sum(one.calls for one in ones),
                      "share_percent": 100 * ms / totals[batch] if totals[batch] else 0.0})  # fmt: skip
    first, last = min(found), max(found)
    time = {cell["batch"]: cell["ms"] for cell in cells}
    return {"operator": name, "core": core, "cells": cells, "excess_ms": time[last] - time[first] * last / first}
