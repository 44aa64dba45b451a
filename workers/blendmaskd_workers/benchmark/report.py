"""Report: rows of measurements as tables for people, Markdown and JSON; medians and ratios. Pure, but for printing.

A row is what `blendmaskd_workers.benchmark.measure` gives, and ``round`` (from 1), ``variant`` (its name) and, where
the devices' limit was measured, ``limit_fps`` (of all ``limit_devices``), ``limit_ms_per_image``, ``limit_batch``,
``utilisation``.
"""
from __future__ import annotations

import contextlib
import functools
import math
import platform
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import zmq
from rich import box
from rich.markup import escape
from rich.table import Table

from blendmaskd.protocol import IDLE

Row = Mapping[str, Any]
MOST_OF_DEVICE_TIME = 1.02  # answers are counted over other seconds than those that the daemon's stats are of
ENOUGH_IMAGES = 200  # for that difference to be small
RATIOS = {"images/s": "fps", "p50": "p50_ms", "p99": "p99_ms", "server CPU": "server_cpu", "broker CPU": "broker_cpu"}


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")), "")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpus": len(psutil.Process().cpu_affinity()),
        "cpu": model or platform.machine(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "zeromq": zmq.zmq_version(),
        "load_average": psutil.getloadavg()[0],
        "command": sys.argv,
    }


def medians(rows: Sequence[Row]) -> list[Row]:
    """One row for each variant and load: the median of each number over the rounds."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["variant"], load_text(row)), []).append(row)
    return [_median(group) for group in groups.values()]


def ratios(rows: Sequence[Row], above: str, below: str) -> list[dict[str, Any]]:
    """One variant over another, by load: for each of `RATIOS` the pairs, round by round, and their median."""
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in rows:
        for other in rows:
            if (row["variant"], other["variant"]) == (above, below) and row["round"] == other["round"]:
                if row["load"] == other["load"]:
                    pairs.setdefault(load_text(row), []).append((row, other))
                elif _only(rows, above) == _only(rows, below) == 1:  # they differ in the load itself
                    pairs.setdefault(f"{load_text(row)} / {load_text(other)}", []).append((row, other))
    return [{"above": above, "below": below, "load": text, **_ratios(both)} for text, both in pairs.items()]


def load_text(row: Row) -> str:
    load = row["load"]
    return f"{load['rate']:g} jobs/s" if "rate" in load else plural(load["clients"], "client")


def plural(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def line(row: Row) -> str:
    """A row as a sentence, told when it is measured."""
    parts = [f"{row['fps']:.2f} images/s"]
    if "utilisation" in row:
        parts[0] += f" = {100 * row['utilisation']:.2f}% of the devices' {row['limit_fps']:.2f}"
    parts.append(f"p50 {row['p50_ms']:.2f} ms, p99 {row['p99_ms']:.2f}")
    if "busy_ms_per_image" in row:
        parts.append(f"{100 * row['of_device_time']:.2f}% of the devices' time, {row['busy_ms_per_image']:.2f} ms per "
                     "image")  # fmt: skip
    if "idle_share" in row:
        idle = ", ".join(f"{reason} {100 * share:.1f}%" for reason, share in row["idle_share"].items())
        parts.append(f"they waited for {idle}")
    cpu = ", ".join(f"{name} {spent:.3f}" for name, spent in row["cpu_s_per_1000"].items())
    parts.append(f"CPU s per 1000: {cpu}")
    return f"round {row['round']}, {row['variant']}, {load_text(row)}: {'; '.join([*parts, *remarks(row)])}"


def remarks(row: Row) -> list[str]:
    """What a reader must know of a row before believing its figures."""
    texts = [f"{number} {code}" for code, number in row["failures"].items()]
    if visits_overlapped(row):
        texts.append("MORE WORK THAN THE DEVICES HAVE TIME FOR: their visits overlapped")
    if row["wrong"]:
        texts.append(f"{row['wrong']} WRONG ANSWERS")
    if row["late_sends"]:
        share = 100 * row["late_sends"] / row["jobs"]
        texts.append(f"{share:.1f}% of sends late, at most {row['latest_send_ms']:.1f} ms")
    return texts


def visits_overlapped(row: Row) -> bool:
    """Whether devices did more than one thing at a time, which makes the figures worthless."""
    return bool(row["images"] >= ENOUGH_IMAGES and row.get("of_device_time", 0.0) > MOST_OF_DEVICE_TIME)


Columns = Mapping[str, Callable[[Row], str]]  # by title; of a row that has no such value they may raise KeyError


def cells(row: Row, columns: Columns) -> dict[str, str]:
    """What there is to read of a row."""
    found = {}
    for name, cell in columns.items():
        with contextlib.suppress(KeyError):
            found[name] = cell(row)
    return {name: text for name, text in found.items() if text}


def grid(rows: Sequence[Row], columns: Columns) -> tuple[list[str], list[list[str]]]:
    """The columns in which there is something to read, and the rows' cells in these."""
    known = [cells(row, columns) for row in rows]
    shown = [name for name in columns if any(name in each for each in known)]
    return shown, [[each.get(name, "") for name in shown] for each in known]


def _idle(row: Row, reason: str) -> str:
    return f"{100 * row['idle_share'][reason]:.1f}%"


def _stage(row: Row, stage: str) -> str:
    return f"{row['stages_ms'][stage]:.2f}"


NAMES: Columns = {"variant": lambda row: row["variant"], "load": load_text}
ROUND: Columns = {"round": lambda row: str(row["round"])}
SEEN: Columns = {
    "images/s": lambda row: f"{row['fps']:.2f}",
    "of the limit": lambda row: f"{100 * row['utilisation']:.2f}%",
    "p50 ms": lambda row: _ms(row["p50_ms"]),
    "p90": lambda row: _ms(row["p90_ms"]),
    "p99": lambda row: _ms(row["p99_ms"]),
    "max": lambda row: _ms(row["max_ms"]),
}
COST: Columns = {
    "of device time": lambda row: f"{100 * row['of_device_time']:.2f}%",
    "ms per image": lambda row: f"{row['busy_ms_per_image']:.2f}",
    **{f"idle: {reason}": functools.partial(_idle, reason=reason) for reason in IDLE},
    "CPU: broker": lambda row: f"{row['cpu_s_per_1000']['broker']:.3f}",
    "workers": lambda row: f"{row['cpu_s_per_1000']['workers']:.3f}",
    "generator": lambda row: f"{row['cpu_s_per_1000']['generator']:.3f} ({100 * row['generator_share']:.0f}%)",
    "MB: broker": lambda row: f"{row['memory_mb']['broker']:.0f}",
    "MB: workers": lambda row: f"{row['memory_mb']['workers']:.0f}",
}
REMARKS: Columns = {"remarks": lambda row: "; ".join(remarks(row))}
LEFT = ("variant", "load", "remarks")


def tables(rows: Sequence[Row]) -> list[Table]:
    """Of medians, for a terminal: what clients saw, what it cost, and where an image's time went."""
    kind = next((row["memory_mb"]["kind"] for row in rows if row["memory_mb"]), "")
    stages = list(dict.fromkeys(stage for row in rows for stage in row.get("stages_ms", {})))
    times: Columns = {stage: functools.partial(_stage, stage=stage) for stage in stages}
    names = _names(rows) or {"load": load_text}
    made = [
        _table(rows, {**names, **SEEN, **REMARKS}, "medians: what clients saw", "limit: the engine in a bare loop"),
        _table(rows, {**names, **COST}, "what it cost", f"CPU: seconds for 1000 images; generator: its share of a core "
                                                        f"in brackets; MB: {kind}"),
    ]  # fmt: skip
    if times:
        made.append(_table(rows, {**names, **times}, "where an image's time went", "mean ms, by the daemon's stats"))
    return made


def _table(rows: Sequence[Row], columns: Columns, title: str, caption: str) -> Table:
    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
                 pad_edge=False, collapse_padding=True)  # fmt: skip
    shown, body = grid(rows, columns)
    for name in shown:
        made.add_column(name, justify="left" if name in LEFT else "right")
    for texts in body:
        made.add_row(*map(escape, texts))
    return made


def markdown(rows: Sequence[Row], found: Sequence[Mapping[str, Any]]) -> str:
    """A row for each round and the medians, and the ratios below; for `BENCHMARKS.md`. p90 and max are left out."""
    everything = [*rows, *medians(rows)]
    seen = {name: cell for name, cell in SEEN.items() if name not in ("p90", "max")}
    columns = {**_names(rows), **ROUND, **seen, **COST, **REMARKS}
    shown, body = grid(everything, columns)
    lines = [shown, ["---" if name in LEFT else "---:" for name in shown]]
    for row, texts in zip(everything, body):
        bold = "**" if row["round"] == "median" else ""
        lines.append([f"{bold}{text}{bold}" if text else "" for text in texts])
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {ratio_text(each)}" for each in found)]).rstrip()


def ratio_text(found: Mapping[str, Any]) -> str:
    parts = []
    for name, key in RATIOS.items():
        if found[key]["median"] is not None:
            pairs = ", ".join(f"{value:.3f}" for value in found[key]["pairs"])
            parts.append(f"{name} {found[key]['median']:.3f} ({pairs})")
    return f"{found['above']} / {found['below']}, {found['load']}: {'; '.join(parts)}"


def plain(value: Any) -> Any:
    """For JSON, which has no nan: None instead."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _only(rows: Sequence[Row], variant: str) -> int:
    return len({load_text(row) for row in rows if row["variant"] == variant})


def _median(group: Sequence[Row]) -> Row:
    """Of numbers the median, of maps each key's; the sum of failures and of what is wrong."""
    row: dict[str, Any] = {**group[0], "round": "median"}
    for key, value in group[0].items():
        if isinstance(value, Mapping) and key not in ("load", "failures"):
            row[key] = {name: _middle([each.get(key, {}).get(name) for each in group]) for name in value}
        elif key not in ("load", "failures", "variant", "round"):
            row[key] = _middle([each.get(key) for each in group])
    row["failures"] = dict(sum((Counter(each["failures"]) for each in group), Counter()))
    return row | {key: sum(each[key] for each in group) for key in ("wrong", "late_sends", "jobs", "checked")}


def _middle(values: Sequence[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, int | float)]
    return statistics.median(numbers) if numbers else values[0]


def _ratios(both: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    found = {}
    for key in RATIOS.values():
        pairs = [_quotient(*(_value(row, key) for row in pair)) for pair in both]
        known = [value for value in pairs if value is not None]
        found[key] = {"pairs": known, "median": statistics.median(known) if known else None}
    return found


def _value(row: Row, key: str) -> float | None:
    spent: Mapping[str, float] = row["cpu_s_per_1000"]
    parts = {"broker_cpu": ("broker",), "server_cpu": ("broker", "workers")}.get(key)
    if parts is None:
        value: float = row[key]
        return value
    return sum(spent[part] for part in parts) if spent.keys() >= set(parts) else None


def _quotient(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below and math.isfinite(above) and math.isfinite(below) else None


def _names(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """The columns that tell rows apart."""
    return {name: cell for name, cell in NAMES.items() if len({cell(row) for row in rows}) > 1}


def _ms(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}" if value < 100 else f"{value:.1f}"
