"""Pictures of the reports of the evaluation programs; imports matplotlib, which is optional.

`precision` and `performance` each take a report and return figures by file name. A picture shows the bar that a figure
is held against, and says in its title what was compared with what.
"""
from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, GREY, GREEN, RED, ORANGE = "#2b6cb0", "#8a8f98", "#2f855a", "#c53030", "#dd8a1c"
SMALLEST_ERROR, LARGEST_ERROR = 1e-9, 1e6  # what is drawn of an error of zero, and of infinity and NaN
SMALLEST_SHARE = 0.01  # likewise, in percent
BAR = 0.01
LONGEST_TICK = 22  # characters of a module's name
STABLE_PERCENT = 5.0
Report = Mapping[str, Any]


def precision(report: Report) -> dict[str, Figure]:
    """``precision_eval``: losses, relative errors, shares over the bar, and ladder and trace where there are such."""
    run, below = report["run"], [panel for panel in (_ladder, _trace) if report[panel.__name__[1:]]]
    figure = Figure(figsize=(15, 9 + 4 * len(below)), layout="constrained")
    grid = figure.add_gridspec(2 + len(below), 2, width_ratios=(1, 2.4))
    verdict = "over the bar" if report["failures"] else "within the bar"
    figure.suptitle(f"{run['device']} ({run['model']}) against {run['reference']}: {verdict}\n"
                    f"dtype {run['dtype']}, HF32 {run['hf32']}, weights {run['weights']}, "
                    f"{len(report['scenes'])} scenes", fontsize=13)  # fmt: skip
    _losses(figure.add_subplot(grid[0, 0]), report)
    _errors(figure.add_subplot(grid[0, 1]), report)
    _detections(figure.add_subplot(grid[1, 0]), report)
    _shares(figure.add_subplot(grid[1, 1]), report)
    for row, panel in enumerate(below, start=2):
        panel(figure.add_subplot(grid[row, :]), report)
    return {"precision_eval": figure}


def _losses(axes: Axes, report: Report) -> None:
    rows = [row for scene in report["scenes"] for row in scene["losses"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    errors = [max(row["rel_diff"] for row in rows if row["name"] == name) for name in names]
    bars = axes.barh(names, [_within(error) for error in errors], left=SMALLEST_ERROR / 2,
                     color=[RED if error > BAR else BLUE for error in errors])  # fmt: skip
    axes.bar_label(bars, [f"{error:.1e}" if error else "equal" for error in errors], padding=4, fontsize=9)
    axes.set(xscale="log", xlim=(SMALLEST_ERROR / 2, 10))
    axes.invert_yaxis()
    _bar(axes.axvline, BAR)
    if report["warnings"]:
        axes.set_xlabel("some are near ln 2, where equal losses prove nothing", color=RED)
    _titled(axes, "Training losses: relative difference (largest of the scenes)")


def _errors(axes: Axes, report: Report) -> None:
    names, rows = _worst_scene(report)
    places = np.arange(len(names))
    for key, label, marker, colour in (("rel_max", "largest", "_", RED), ("p99", "99% are below", "^", ORANGE),
                                       ("p90", "90%", "s", BLUE), ("p50", "half", "o", GREEN)):  # fmt: skip
        axes.plot(places, _drawn(rows, key), marker, color=colour, label=label, markersize=6)
    axes.vlines(places, _drawn(rows, "p50"), _drawn(rows, "rel_max"), color=GREY, alpha=0.4, lw=1)
    axes.set(yscale="log", ylim=(SMALLEST_ERROR / 2, 100 * max(1.0, *_drawn(rows, "rel_max"))))
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    _bar(axes.axhline, BAR)
    if not any(row["abs_max"] for row in rows):
        axes.text(0.5, 0.5, "all equal, bit for bit", transform=axes.transAxes, ha="center", fontsize=14, color=GREEN)
    _titled(axes, "Relative error of features and head outputs (worst scene)")
    axes.legend(fontsize=8, ncol=4, loc="upper right")


def _shares(axes: Axes, report: Report) -> None:
    names, rows = _worst_scene(report)
    shares = [100 * _share(row) for row in rows]
    bars = axes.bar(names, shares, color=[RED if share > 100 * BAR else GREEN for share in shares])
    axes.bar_label(bars, [f"{share:.3g}" for share in shares], fontsize=8)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set(ylim=(0, max(2.0, 1.15 * max(shares))), ylabel="% of elements")
    _bar(axes.axhline, 100 * BAR)
    _titled(axes, "Elements with more than 1% relative error (worst scene)")


def _detections(axes: Axes, report: Report) -> None:
    axes.axis("off")
    head = ["", *(scene["scene"] for scene in report["scenes"])]
    found = [scene["detections"] for scene in report["scenes"]]
    lines = [
        ["instances, reference", *(str(one["reference"]) for one in found)],
        ["instances, device", *(str(one["device"]) for one in found)],
        ["matched", *(str(one["matched"]) for one in found)],
        ["box, largest diff, px", *(f"{one['box_diff_px']:.2g}" for one in found)],
        ["score, largest diff", *(f"{one['score_diff']:.2g}" for one in found)],
        ["mask IoU, mean", *(f"{one['iou_mean']:.4f}" for one in found)],
        ["mask IoU, least", *(f"{one['iou_min']:.4f}" for one in found)],
    ]
    table = axes.table(lines, colLabels=head, loc="center", cellLoc="left",
                       colWidths=[1.6 / (len(found) + 1.6), *[1 / (len(found) + 1.6)] * len(found)])  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    table.scale(1, 1.6)
    axes.set_title("Final boxes and masks", fontsize=10)


def _ladder(axes: Axes, report: Report) -> None:
    """Share over the bar of each level in each arithmetic, and the device's, the first scene's."""
    scene = report["scenes"][0]
    levels = [row for row in scene["tensors"] if row["name"].startswith("p")]
    names = [row["name"] for row in levels]
    for rung, style in zip(scene["ladder"], itertools.cycle(("o-", "s-", "^-", "d-"))):
        axes.plot(names, [max(share, SMALLEST_SHARE) for share in rung["levels"]], style, ms=5, lw=1,
                  label=f"{rung['name']} (scale {100 * rung['scale_bias']:+.2f}%)")  # fmt: skip
    shares = [max(100 * _share(row), SMALLEST_SHARE) for row in levels]
    axes.plot(names, shares, "*-", color="black", ms=13, lw=2.5, label=f"the device, {report['run']['device']}")
    axes.set(yscale="log", ylim=(SMALLEST_SHARE / 2, 200), ylabel="% of elements")
    _titled(axes, f"Ladder: elements over 1% with convolutions in each arithmetic ({scene['scene']})\n"
                  f"Nearest, convolution by convolution: {report['ladder']['verdict']}")  # fmt: skip
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _trace(axes: Axes, report: Report) -> None:
    trace = report["trace"]
    modules = trace["modules"]
    places = np.arange(len(modules))
    means = _drawn(modules, "rel_mean")
    colours = [RED if _share(row) > BAR else BLUE for row in modules]
    axes.vlines(places, means, _drawn(modules, "rel_max"), color=GREY, alpha=0.35, lw=1)
    axes.scatter(places, means, s=16, c=colours, zorder=3)
    axes.set(yscale="log", ylim=(SMALLEST_ERROR / 2, 1e3), xlim=(-1, len(modules)))
    _bar(axes.axhline, BAR)
    names = [row["name"] for row in modules]
    for key, height in (("first", 0.93), ("worst", 0.82)):
        if trace[key]:
            place = names.index(trace[key])
            axes.annotate(f"{key}: {trace[key]}", (place, means[place]),
                          xytext=(min(place / len(modules) + 0.02, 0.7), height), textcoords="axes fraction",
                          color=colours[place], fontsize=10, arrowprops={"arrowstyle": "->", "color": GREY})
    step = max(1, len(names) // 45)
    axes.set_xticks(places[::step], [_short(name) for name in names[::step]], rotation=90, fontsize=7)
    _titled(axes, "Trace: each module's own relative error on the reference's input (dot: mean, line: up to the "
                  "largest; red: more than 1% of its elements are off)")  # fmt: skip


def _worst_scene(report: Report) -> tuple[list[str], list[Report]]:
    """For each tensor the row of the scene with the most elements over the bar, then the largest error."""
    rows = [row for scene in report["scenes"] for row in scene["tensors"]]
    names = list(dict.fromkeys(row["name"] for row in rows))
    return names, [
        max((row for row in rows if row["name"] == name), key=lambda row: (_share(row), row["p99"])) for name in names
    ]


def _share(row: Report) -> float:
    """Of the elements that count, those over the bar: 0 to 1."""
    return float(row["over"] / max(row["of"], 1))


def _drawn(rows: Sequence[Report], key: str) -> list[float]:
    return [_within(row[key]) for row in rows]


def _within(error: float) -> float:
    """An error on a logarithmic axis, which has no place for 0 or infinity."""
    return min(max(error, SMALLEST_ERROR), LARGEST_ERROR) if error == error else LARGEST_ERROR


def _short(name: str) -> str:
    """The end of a module's name, whole parts of it."""
    while len(name) > LONGEST_TICK and "." in name:
        name = name.partition(".")[2]
    return name


# ---- performance ------------------------------------------------------------------------------------------------

def performance(report: Report) -> dict[str, Figure]:
    """``performance``, and ``large_batch``, ``operators`` and ``dual_device`` where these were measured."""
    figures = {"performance": _performance(report)}
    if any("fps" in row for row in report["batches"]):
        figures["large_batch"] = _large_batch(report)
    if report["profile"]:
        figures["operators"] = _operators(report)
    if report["together"]:
        figures["dual_device"] = _dual_device(report)
    return figures


def _performance(report: Report) -> Figure:
    dtypes = [row for row in report["dtypes"] if "fps" in row]
    options = [row for row in report["runtime_options"] if "fps" in row]
    panels = 2 + bool(dtypes) + bool(options)
    figure = Figure(figsize=(14, 9 if panels > 2 else 5), layout="constrained")
    figure.suptitle(_title("Performance", report), fontsize=13)
    axes = iter(figure.subplots(1 + (panels > 2), 2).flat)
    _latencies(next(axes), report)
    _summary(next(axes), report)
    if dtypes:
        _rates(next(axes), dtypes, "dtype", "Data types: FPS of the first device, and gain")
    if options:
        _rates(next(axes), options, "options", "Runtime options: FPS of the first device, and gain")
    for left in axes:
        left.axis("off")
    return figure


def _latencies(axes: Axes, report: Report) -> None:
    rows = [row for row in report["latency"] if row["device"] != "CPU"]
    for row, colour in zip(rows, _colours(rows)):
        axes.plot(row["latencies_ms"], ".-", color=colour, lw=0.8, ms=4,
                  label=f"{row['device']}: CoV {row['cv_percent']:.2f}% ({'stable' if row['stable'] else 'unstable'})")
        median = row["median_ms"]
        axes.axhspan(median * (1 - STABLE_PERCENT / 100), median * (1 + STABLE_PERCENT / 100), color=colour, alpha=0.1)
        axes.axhline(median, color=colour, lw=1, ls="--")
    axes.set(xlabel="iteration", ylabel="ms", ylim=(0, 1.35 * max(max(row["latencies_ms"]) for row in rows)))
    axes.legend(fontsize=8)
    _titled(axes, "Latency at batch 1 in order (dashed: median, band: 5% around it)")


def _summary(axes: Axes, report: Report) -> None:
    rows = report["latency"]
    names = [row["device"] for row in rows]
    medians = [row["median_ms"] for row in rows]
    spread = [[row["median_ms"] - row["min_ms"] for row in rows], [row["max_ms"] - row["median_ms"] for row in rows]]
    bars = axes.bar(names, medians, yerr=spread, capsize=6, color=_colours(rows), width=0.55, ecolor="#444")
    speedups = {row["device"]: f"\n{row['speedup']:.2f}x the CPU" for row in report["speedups"]}
    labels = [f"{row['median_ms']:.2f} ms\n{row['fps']:.2f} FPS{speedups.get(row['device'], '')}" for row in rows]
    axes.bar_label(bars, labels, padding=6, fontsize=10)
    if max(medians) > 10 * min(medians):
        axes.set(yscale="log", ylim=(min(medians) / 3, 8 * max(medians)))
    else:
        axes.set_ylim(0, 1.45 * max(row["max_ms"] for row in rows))
    axes.set_ylabel("ms")
    _titled(axes, "Median latency at batch 1 (whiskers: least and largest)")


def _rates(axes: Axes, rows: Sequence[Report], name: str, title: str) -> None:
    names = [row[name].replace(" + ", "\n+ ") for row in rows]
    colours = [GREY if index == 0 else GREEN if row["gain_percent"] >= 0 else RED for index, row in enumerate(rows)]
    bars = axes.bar(names, [row["fps"] for row in rows], color=colours, width=0.55)
    labels = [f"{row['fps']:.2f} FPS\n{row['median_ms']:.2f} ms\n{row['gain_percent']:+.1f}%" for row in rows]
    axes.bar_label(bars, labels, padding=4, fontsize=9)
    axes.set(ylim=(0, 1.35 * max(row["fps"] for row in rows)), ylabel="images/s")
    _titled(axes, title)


def _large_batch(report: Report) -> Figure:
    rows = [row for row in report["batches"] if "fps" in row]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle(_title("Large batches", report, first=True), fontsize=13)
    axes = figure.subplots()
    names = [f"batch {row['batch']}" for row in rows]
    best = report["best_batch"]
    bars = axes.bar(names, [row["fps"] for row in rows], width=0.55,
                    color=[GREEN if row["batch"] == best else BLUE for row in rows])  # fmt: skip
    labels = [f"{row['fps']:.2f}{' best' if row['batch'] == best else ''}\n{row['fps'] / rows[0]['fps']:.2f}x"
              for row in rows]  # fmt: skip
    axes.bar_label(bars, labels, padding=4, fontsize=10)
    axes.axhline(rows[0]["fps"], color=GREY, ls="--", lw=1)
    axes.set(ylim=(0, 1.3 * max(row["fps"] for row in rows)), ylabel="images/s")
    _titled(axes, f"Throughput (bars; factor against batch {rows[0]['batch']}) and latency of a batch (line)")
    waits = axes.twinx()
    waits.plot(names, [row["median_ms"] for row in rows], "o-", color=ORANGE)
    waits.set_ylim(0, 1.3 * max(row["median_ms"] for row in rows))
    waits.set_ylabel("median latency of a batch, ms", color=ORANGE)
    return figure


def _operators(report: Report) -> Figure:
    profile = report["profile"]
    batches, rows = profile["batches"], profile["operators"]
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle(_title("Operators", report, first=True), fontsize=13)
    axes = figure.subplots()
    places, height = np.arange(len(rows)), 0.8 / len(batches)
    for number, (batch, colour) in enumerate(zip(batches, (GREY, BLUE) if len(batches) > 1 else (BLUE,))):
        cells = [row["cells"][number] for row in rows]
        bars = axes.barh(places + height * number, [cell["ms"] for cell in cells], height, color=colour,
                         label=f"batch {batch['batch']}: {batch['ms']:.2f} ms of all operators")  # fmt: skip
        labels = [f"{cell['ms']:.2f} ms, {cell['share_percent']:.1f}%" for cell in cells]
        if number:
            labels = [f"{label}, excess {row['excess_ms']:+.2f} ms" for label, row in zip(labels, rows)]
        axes.bar_label(bars, labels, padding=4, fontsize=8)
    axes.set_yticks(places + height * (len(batches) - 1) / 2, [f"{row['operator']} ({row['core']})" for row in rows],
                    fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("ms of a batch")
    axes.legend(fontsize=9, loc="lower right")
    _titled(axes, "The longest first; excess: beyond the smaller batch's time per image")
    return figure


def _dual_device(report: Report) -> Figure:
    """Each device's rate alone and beside the others, and their sum against one and against the ideal."""
    together = report["together"]
    rows = together["devices"]
    alone = {row["device"]: row["fps"] for row in report["latency"]}
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    figure.suptitle(_title(f"{len(rows)} devices together", report), fontsize=13)
    axes = figure.subplots()
    places = np.arange(len(rows))
    first = axes.bar(places - 0.2, [alone[row["device"]] for row in rows], 0.38, color=GREY, label="alone")
    second = axes.bar(places + 0.2, [row["fps"] for row in rows], 0.38, color=BLUE, label="together")
    axes.bar_label(first, fmt="%.2f", padding=3)
    axes.bar_label(second, fmt="%.2f", padding=3)
    bottom = 0.0
    for row, colour in zip(rows, _colours(rows)):
        axes.bar(len(rows) + 0.1, row["fps"], 0.55, bottom=bottom, color=colour, alpha=0.85, edgecolor="white")
        axes.text(len(rows) + 0.1, bottom + row["fps"] / 2, row["device"], ha="center", va="center", color="white")
        bottom += row["fps"]
    ideal = len(rows) * together["single_fps"]
    axes.text(len(rows) + 0.1, bottom, f"{bottom:.2f}\n{together['speedup']:.2f}x one", ha="center", va="bottom",
              fontsize=12, weight="bold")  # fmt: skip
    axes.axhline(ideal, color=GREEN, ls="--", lw=1, label=f"ideal: {len(rows)}x {together['single']} alone")
    axes.set_xticks([*places, len(rows) + 0.1], [*(f"{row['device']}\nCPUs {row['cpus']}" for row in rows), "combined"])
    axes.set(ylim=(0, 1.3 * max(ideal, bottom)), ylabel="FPS, batch 1 each")
    axes.legend(loc="upper left")
    _grid(axes)
    return figure


def _title(what: str, report: Report, first: bool = False) -> str:
    run = report["run"]
    device = run["devices"].split()[0] if first else run["devices"]
    model = next(row["model"] for row in report["latency"] if row["device"] == run["devices"].split()[0])
    lines = [f"{what}: {device} ({model}), network input {run['network_input']}"]
    return "\n".join([*lines, run["note"]] if "note" in run else lines)


def _colours(rows: Sequence[Report]) -> list[str]:
    """Grey for the CPU baseline, blues and others for devices."""
    palette = iter((BLUE, ORANGE, GREEN, RED) * len(rows))
    return [GREY if row["device"] == "CPU" else next(palette) for row in rows]


def _bar(line: Any, value: float) -> None:
    line(value, color=RED, ls="--", lw=1.2)


def _titled(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    _grid(axes)


def _grid(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
