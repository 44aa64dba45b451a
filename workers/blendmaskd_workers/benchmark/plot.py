"""A picture of a sweep: latency over throughput, with the devices' limit; imports matplotlib, which is optional.

Each load of a variant is a point, the median of its rounds; bars span the rounds. A server is as good as its curve
stays low until it meets the limit.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from blendmaskd_workers.benchmark import report

BLUE, ORANGE, GREEN, GREY, INK = "#2b6cb0", "#dd8a1c", "#2f855a", "#6b7280", "#1f2937"
COLOURS = (BLUE, ORANGE, GREY)
STEEP = 8.0  # over this factor between latencies the axis is logarithmic
Row = Mapping[str, Any]


def save(path: Path, tree: Mapping[str, Any]) -> None:
    """Write the picture of a run, the tree that ``--json`` writes; the file's suffix says in which format."""
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        draw(tree).savefig(path, dpi=160)


def draw(tree: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["variant"] for row in tree["medians"]))
    for number, name in enumerate(names):
        middle = [row for row in tree["medians"] if row["variant"] == name]
        rounds = [row for row in tree["rows"] if row["variant"] == name]
        _curve(axes, middle, rounds, number, f"{name}, " if len(names) > 1 else "")
    _scales(axes, tree)
    _limits(axes, tree["medians"])
    axes.set_title("Throughput against latency", loc="left", fontsize=17, color=INK, weight="bold", pad=26)
    axes.text(0, 1.025, _subtitle(tree), transform=axes.transAxes, fontsize=10, color=GREY)
    axes.legend(fontsize=10.5, loc="upper left", frameon=False, labelcolor=INK)
    return figure


def _curve(axes: Axes, middle: Sequence[Row], rounds: Sequence[Row], number: int, name: str) -> None:
    """p50 with its loads named, p99, and what lies between. Variants have their labels on different sides."""
    colour = COLOURS[number % len(COLOURS)]
    fps = [row["fps"] for row in middle]
    p50, p99 = ([row[key] for row in middle] for key in ("p50_ms", "p99_ms"))
    axes.fill_between(fps, p50, p99, color=colour, alpha=0.10, lw=0)
    axes.plot(fps, p50, "o-", color=colour, lw=2.4, ms=7, label=f"{name}p50: half of the images are faster", zorder=3)
    axes.plot(fps, p99, "o--", color=colour, lw=1.3, ms=5, mfc="white", label=f"{name}p99: 99 of 100 are faster")
    side: dict[str, Any] = {"xytext": (-9, 6), "ha": "right"} if number % 2 == 0 else {"xytext": (9, -13), "ha": "left"}
    for row in middle:
        same = [each["fps"] for each in rounds if each["load"] == row["load"]]
        axes.plot([min(same), max(same)], [row["p50_ms"]] * 2, color=colour, lw=6, alpha=0.30, solid_capstyle="butt")
        text = report.load_text(row) if row is middle[0] else report.load_text(row).split()[0]
        axes.annotate(text, (row["fps"], row["p50_ms"]), textcoords="offset points", fontsize=9.5, color=colour, **side)


def _scales(axes: Axes, tree: Mapping[str, Any]) -> None:
    latencies = [row[key] for row in tree["medians"] for key in ("p50_ms", "p99_ms")]
    limits = [row.get("limit_fps", 0.0) for row in tree["medians"]]
    axes.set_xlim(0, 1.12 * max(*limits, *(row["fps"] for row in tree["rows"])))
    if max(latencies) > STEEP * min(latencies):
        axes.set(yscale="log", ylim=(min(latencies) / 1.8, max(latencies) * 2.5))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.35 * max(latencies))
    axes.set_xlabel("images per second", fontsize=12, color=INK)
    axes.set_ylabel("latency, ms", fontsize=12, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.22)


def _limits(axes: Axes, middle: Sequence[Row]) -> None:
    """The devices' own rate: right of it nobody can be."""
    seen: list[float] = []
    for row in middle:
        limit = row.get("limit_fps")
        if limit is None or any(abs(limit - other) < 0.03 * limit for other in seen):
            continue
        seen.append(limit)
        axes.axvline(limit, color=GREEN, lw=1.6, ls=(0, (5, 3)))
        name = f"{report.plural(row['limit_devices'], 'device')} alone, batch {row['limit_batch']:g}: {limit:.1f}/s"
        axes.annotate(name, (limit, 0.98), xycoords=axes.get_xaxis_transform(), xytext=(6, 0), ha="left", va="top",
                      textcoords="offset points", rotation=90, fontsize=10, color=GREEN)  # fmt: skip


def _subtitle(tree: Mapping[str, Any]) -> str:
    rounds = max(row["round"] for row in tree["rows"])
    [sent, *_] = (variant["load"] for variant in tree["variants"].values())
    height, width = sent["size"]
    what = f"{len(sent['images'])} given images" if sent["images"] else f"{height}x{width} {sent['encoding'] or 'raw'}"
    kind = "Poisson arrivals" if sent["rate"] else "closed loop"
    machine = tree["machine"]
    return (f"{kind}, {what}, masks {sent['mask_format']}; medians of {report.plural(rounds, 'round')} of "
            f"{sent['seconds']:g} s, bars span them; {machine['cpus']} x {machine['cpu']}")  # fmt: skip
