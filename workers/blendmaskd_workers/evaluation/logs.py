"""The logs of the evaluation programs: text that people compare, line by line, with the logs of other runs.

Each report is a tree of plain values, which is also saved as JSON; its log holds all that the JSON holds.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

BANNER = "=" * 60
NONE = "none"
Row = Mapping[str, Any]
Report = Mapping[str, Any]

LOSS = """\
[{name}] {reference_kind}={reference:.6f} {device_kind}={device:.6f}
  abs_diff={abs_diff:.3e} rel_diff={rel_diff:.3e}
  >1% rel error: {over:d}/{of:d} ({percent:.2f}%)"""
OVERALL = "Overall Training losses: mean_rel_diff={mean_rel_diff:.3e} max_rel_diff={max_rel_diff:.3e}"
TENSOR = """\
[{name}] shape={shape}
  abs_diff mean/max: {abs_mean:.3e}/{abs_max:.3e}
  rel_diff mean/max (|{kind}|>1e-3): {rel_mean:.3e}/{rel_max:.3e}
  rel_diff p50/p90/p99: {p50:.3e}/{p90:.3e}/{p99:.3e}
  cosine={cosine:.6f} rmse/std={rmse_over_std:.3e} scale_bias={scale_bias:+.3e}
  >1% rel error (masked): {over:d}/{of:d} ({percent:.2f}%)"""
DETECTIONS = """\
detections: {reference_kind}={reference:d} {device_kind}={device:d} matched={matched:d}
  max diff of matched: box {box_diff_px:.3e} px, score {score_diff:.3e}
  mask IoU of matched mean/min: {iou_mean:.6f}/{iou_min:.6f}"""
MODULE = """\
[{name}] tensors={tensors:d}
  abs_diff mean/max: {abs_mean:.3e}/{abs_max:.3e}
  rel_diff mean/max (|{kind}|>1e-3): {rel_mean:.3e}/{rel_max:.3e}
  cosine={cosine:.6f} rmse/std={rmse_over_std:.3e} scale_bias={scale_bias:+.3e}
  >1% rel error (masked): {over:d}/{of:d} ({percent:.2f}%)"""
DOUBLE = "[{name}] rmse={rmse:.2f} mean_rel={rel_mean:.2f} max_rel={rel_max:.2f} small_values={small:.2f}"
RUNG = """\
[{name}] >1% rel error, p3 to the last: {shares}%
  rmse/std={rmse_over_std:.3e} scale_bias={scale_bias:+.3e} losses max_rel_diff={max_rel_diff:.3e}"""
CONVOLUTION = ("[{name}] {nearest}: explains {explained_percent:.2f}% of the squared errors, as large as {size}, "
               "factor {factor:.6f}")  # fmt: skip

LATENCY = """\
[{device}] {model}, CPUs {cpus}
  Avg latency: {avg_ms:.2f} ms
  Median latency: {median_ms:.2f} ms
  Std latency: {std_ms:.2f} ms
  Min latency: {min_ms:.2f} ms
  Max latency: {max_ms:.2f} ms
  FPS: {fps:.2f}
  Coefficient of variation: {cv_percent:.2f}% (bar 5%: {verdict})
  Latencies (ms): {all_ms}"""
SPEEDUP = "{kind} vs CPU speedup: {speedup:.2f}x ({device})"
BATCH = "batch={batch:2d}: {median_ms:.2f}ms | throughput={fps:.2f} imgs/s"
DTYPE = "{dtype}: {median_ms:.2f}ms | FPS={fps:.2f} | {gain_percent:+.2f}% against {base}"
CELL = "batch {batch}: {ms:.2f} ms, {share_percent:.2f}%, {calls:.2f} calls"
OPERATORS = "batch {batch}: {ms:.2f} ms in {calls:.2f} calls of operators"
TOGETHER = "{device}: avg={avg_ms:.2f}ms, FPS={fps:.2f}, median={median_ms:.2f}ms, CPUs {cpus}"
TOTALS = """\
Single FPS: {single_fps:.2f} ({single} alone)
Combined FPS: {combined_fps:.2f}
Speedup vs single: {speedup:.2f}x"""
OPTIONS = ("{options}: {median_ms:.2f}ms | FPS={fps:.2f} | {gain_percent:+.2f}% against {base} | "
           "CPUs {cpus}, task queue {task_queue}, preload {preload}")  # fmt: skip


def write_precision(report: Report) -> str:
    kinds = {name: report["run"][name].partition(":")[0].upper() for name in ("reference", "device")}
    named = {"reference_kind": kinds["reference"], "device_kind": kinds["device"], "kind": kinds["reference"].lower()}

    def rows(form: str, rows: Sequence[Row]) -> list[str]:
        return [form.format(percent=100 * row["over"] / max(row["of"], 1), **named, **row) for row in rows]

    lines = _section("Precision evaluation", _run(report))
    for scene in report["scenes"]:
        title = "Training losses: {scene} ({size}, network input {network_input})".format_map(scene)
        lines += _section(title, [*rows(LOSS, scene["losses"]), OVERALL.format_map(scene)])
        lines += _section(f"Features and head outputs: {scene['scene']}", rows(TENSOR, scene["tensors"]))
        found = DETECTIONS.format(**scene["detections"], **named)
        lines += _section(f"Boxes and masks: {scene['scene']}", [found])
        if scene["double_benchmark"]:
            title = f"Double benchmark, {kinds['device']}'s errors over {kinds['reference']}'s: {scene['scene']}"
            lines += _section(title, map(_double, scene["double_benchmark"]))
        if scene["ladder"]:
            lines += _section(f"Ladder, what convolutions in other arithmetics differ by: {scene['scene']}",
                              map(_rung, scene["ladder"]))  # fmt: skip
    if report["trace"]:
        trace = report["trace"]
        blame = [f"First module over the bar: {trace['first'] or NONE}", f"Worst module: {trace['worst'] or NONE}"]
        title = "Trace: each module of the device on the reference's input"
        lines += _section(title, [*rows(MODULE, trace["modules"]), *blame])
    if report["ladder"]:
        nearest = map(CONVOLUTION.format_map, report["ladder"]["convolutions"])
        lines += _section("Ladder: the arithmetic nearest to each convolution's errors on the reference's input",
                          [*nearest, f"Nearest: {report['ladder']['verdict']}"])  # fmt: skip
    warnings = [f"WARNING: {warning}" for warning in report["warnings"]]
    failures = [f"FAILED: {failure}" for failure in report["failures"]]
    return "\n".join([*lines, *_section("Result", [*warnings, *(failures or ["PASSED"])])])


def _double(row: Row) -> str:
    return DOUBLE.format_map(row) + (f" | over: {', '.join(row['over'])}" if row["over"] else "")


def _rung(row: Row) -> str:
    return RUNG.format(**row, shares="/".join(f"{share:.2f}" for share in row["levels"]))


def write_performance(report: Report) -> str:
    """The log of a report of the performance program; it has the sections of what was measured."""
    lines = _section("Performance evaluation", _run(report))
    latencies = [_latency(row) for row in report["latency"]]
    lines += _section("Latency, batch 1", [*latencies, *map(SPEEDUP.format_map, report["speedups"])])
    if report["batches"]:
        lines += _section("Batch sizes", [_batch(row, report["best_batch"]) for row in report["batches"]])
    if report["dtypes"]:
        lines += _section("Data types", [_tried(DTYPE, row, row["dtype"]) for row in report["dtypes"]])
    if report["profile"]:
        title = "Operators, the longest first" + (", and their excess" if len(report["profile"]["batches"]) > 1 else "")
        lines += _section(title, _operators(report["profile"]))
    if report["together"]:
        together = report["together"]
        devices = map(TOGETHER.format_map, together["devices"])
        lines += _section("Devices together, batch 1 each", [*devices, TOTALS.format_map(together)])
    if report["runtime_options"]:
        rows = [_tried(OPTIONS, row, row["options"]) for row in report["runtime_options"]]
        lines += _section("Runtime options, batch 1", rows)
    return "\n".join(lines)


def _latency(row: Row) -> str:
    verdict = "stable" if row["stable"] else "unstable"
    return LATENCY.format(**row, verdict=verdict, all_ms=" ".join(f"{one:.2f}" for one in row["latencies_ms"]))


def _batch(row: Row, best: int | None) -> str:
    text = _tried(BATCH, row, f"batch={row['batch']:2d}")
    return f"{text} | best" if row["batch"] == best else text


def _tried(form: str, row: Row, name: str) -> str:
    """A measurement, or why there is none."""
    if "failed" in row:
        return f"{name}: failed: {row['failed']}"
    return f"{name}: not measured: {row['skipped']}" if "skipped" in row else form.format_map(row)


def _operators(profile: Report) -> list[str]:
    """Two batch sizes have an excess: what the larger takes beyond the smaller one's time per image."""
    two = len(profile["batches"]) > 1

    def line(row: Row) -> str:
        excess = [f"excess {row['excess_ms']:+.2f} ms"] if two else []
        return f"{row['operator']} ({row['core']}): " + " | ".join([*map(CELL.format_map, row["cells"]), *excess])

    total = [f"Excess of all: {profile['excess_ms']:+.2f} ms"] if two else []
    return [*map(line, profile["operators"]), *map(OPERATORS.format_map, profile["batches"]), *total]


def _section(title: str, body: Iterable[str]) -> list[str]:
    return [BANNER, title, BANNER, *body, ""]


def _run(report: Report) -> list[str]:
    return [f"{key}: {value}" for key, value in report["run"].items()]
