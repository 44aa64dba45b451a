"""The logs of the evaluation programs: text that people compare, line by line, with the logs of other runs.

Each report is a tree of plain values, which is also saved as JSON; `write_…` gives its log and `read_…` the tree again,
with numbers as exact as the log shows them. A log holds all that the JSON holds.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from blendmaskd_workers.evaluation.forms import Form

BANNER = "=" * 60
NONE = "none"
Report = dict[str, Any]

RUN = Form("{key}: {value}")
FAILURE = Form("FAILED: {failure}")
PASSED = "PASSED"

LOSS = Form(
    "[{name}] {reference_kind}={reference:.6f} {device_kind}={device:.6f}\n"
    "  abs_diff={abs_diff:.3e} rel_diff={rel_diff:.3e}\n"
    "  >1% rel error: {over:d}/{of:d} ({percent:.2f}%)"
)
OVERALL = Form("Overall Training losses: mean_rel_diff={mean_rel_diff:.3e} max_rel_diff={max_rel_diff:.3e}")
TENSOR = Form(
    "[{name}] shape={shape}\n"
    "  abs_diff mean/max: {abs_mean:.3e}/{abs_max:.3e}\n"
    "  rel_diff mean/max (|{kind}|>1e-3): {rel_mean:.3e}/{rel_max:.3e}\n"
    "  rel_diff p50/p90/p99: {p50:.3e}/{p90:.3e}/{p99:.3e}\n"
    "  >1% rel error (masked): {over:d}/{of:d} ({percent:.2f}%)"
)
DETECTIONS = Form(
    "detections: {reference_kind}={reference:d} {device_kind}={device:d} matched={matched:d}\n"
    "  max diff of matched: box {box_diff_px:.3e} px, score {score_diff:.3e}\n"
    "  mask IoU of matched mean/min: {iou_mean:.6f}/{iou_min:.6f}"
)
MODULE = Form(
    "[{name}] tensors={tensors:d}\n"
    "  abs_diff mean/max: {abs_mean:.3e}/{abs_max:.3e}\n"
    "  rel_diff mean/max (|{kind}|>1e-3): {rel_mean:.3e}/{rel_max:.3e}\n"
    "  >1% rel error (masked): {over:d}/{of:d} ({percent:.2f}%)"
)
BLAME = Form("First module over the bar: {first}\nWorst module: {worst}")
LOSSES_OF = Form("Training losses: {scene} ({size}, network input {network_input})")
TENSORS_OF = Form("Features and head outputs: {scene}")
DETECTIONS_OF = Form("Boxes and masks: {scene}")
PRECISION = "Precision evaluation"
TRACE = "Trace: each module of the device on the reference's input"
RESULT = "Result"

LATENCY = Form(
    "[{device}] {model}, CPUs {cpus}\n"
    "  Avg latency: {avg_ms:.2f} ms\n"
    "  Median latency: {median_ms:.2f} ms\n"
    "  Std latency: {std_ms:.2f} ms\n"
    "  Min latency: {min_ms:.2f} ms\n"
    "  Max latency: {max_ms:.2f} ms\n"
    "  FPS: {fps:.2f}\n"
    "  Coefficient of variation: {cv_percent:.2f}% (bar 5%: {verdict})\n"
    "  Latencies (ms): {all_ms}"
)
SPEEDUP = Form("{kind} vs CPU speedup: {speedup:.2f}x ({device})")
BATCH = Form("batch={batch:2d}: {median_ms:.2f}ms | throughput={fps:.2f} imgs/s")
BATCH_BEST = Form("batch={batch:2d}: {median_ms:.2f}ms | throughput={fps:.2f} imgs/s | best")
BATCH_FAILED = Form("batch={batch:2d}: failed: {failed}")
DTYPE = Form("{dtype}: {median_ms:.2f}ms | FPS={fps:.2f} | {gain_percent:+.2f}% against {base}")
DTYPE_FAILED = Form("{dtype}: failed: {failed}")
TOGETHER = Form("{device}: avg={avg_ms:.2f}ms, FPS={fps:.2f}, median={median_ms:.2f}ms, CPUs {cpus}")
SINGLE = Form("Single FPS: {single_fps:.2f} ({single} alone)")
COMBINED = Form("Combined FPS: {combined_fps:.2f}")
TOGETHER_SPEEDUP = Form("Speedup vs single: {speedup:.2f}x")
OPTIONS = Form(
    "{options}: {median_ms:.2f}ms | FPS={fps:.2f} | {gain_percent:+.2f}% against {base} | "
    "CPUs {cpus}, task queue {task_queue}, preload {preload}"
)
OPTIONS_SKIPPED = Form("{options}: not measured: {skipped}")
STABLE, UNSTABLE = "stable", "unstable"
PERFORMANCE = "Performance evaluation"
LATENCIES, BATCHES, DTYPES = "Latency, batch 1", "Batch sizes", "Data types"
ALL_DEVICES, RUNTIME = "Devices together, batch 1 each", "Runtime options, batch 1"


# ---- precision --------------------------------------------------------------------------------------------------

def write_precision(report: Report) -> str:
    """The log of a report of the precision program."""
    kinds = {"reference_kind": _kind(report["run"]["reference"]), "device_kind": _kind(report["run"]["device"])}
    lines = _section(PRECISION, _write_run(report["run"]))
    for scene in report["scenes"]:
        losses = [LOSS.write({**row, **kinds, "percent": _percent(row)}) for row in scene["losses"]]
        lines += _section(LOSSES_OF.write(scene), [*losses, OVERALL.write(scene)])
        lines += _section(TENSORS_OF.write(scene), [_write_difference(TENSOR, row, kinds) for row in scene["tensors"]])
        lines += _section(DETECTIONS_OF.write(scene), [DETECTIONS.write({**scene["detections"], **kinds})])
    if report["trace"]:
        trace = report["trace"]
        modules = [_write_difference(MODULE, row, kinds) for row in trace["modules"]]
        blame = {key: trace[key] or NONE for key in ("first", "worst")}
        lines += _section(TRACE, [*modules, BLAME.write(blame)])
    failures = [FAILURE.write({"failure": failure}) for failure in report["failures"]]
    return _text([*lines, *_section(RESULT, failures or [PASSED])])


def read_precision(text: str) -> Report:
    """The report of a log of the precision program."""
    sections = _sections(text)
    scenes, trace = [], None
    for title, body in sections.items():
        if of := LOSSES_OF.read(title):
            [overall] = OVERALL.read(body)
            scenes.append({**of[0], "losses": _without(LOSS.read(body), "reference_kind", "device_kind", "percent"),
                           **overall})  # fmt: skip
        elif TENSORS_OF.read(title):
            rows = _without(TENSOR.read(body), "kind", "percent")
            scenes[-1]["tensors"] = [{**row, "shape": json.loads(row["shape"])} for row in rows]
        elif DETECTIONS_OF.read(title):
            [scenes[-1]["detections"]] = _without(DETECTIONS.read(body), "reference_kind", "device_kind")
        elif title == TRACE:
            [blame] = BLAME.read(body)
            names = {key: None if name == NONE else name for key, name in blame.items()}
            trace = {"modules": _without(MODULE.read(body), "kind", "percent"), **names}
    failures = [row["failure"] for row in FAILURE.read(sections[RESULT])]
    return {"run": _read_run(sections[PRECISION]), "scenes": scenes, "trace": trace, "failures": failures}


def _write_difference(form: Form, row: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    return form.write({**row, "kind": kinds["reference_kind"].lower(), "percent": _percent(row)})


def _percent(row: Mapping[str, Any]) -> float:
    return float(100 * row["over"] / max(row["of"], 1))


# ---- performance ------------------------------------------------------------------------------------------------

def write_performance(report: Report) -> str:
    """The log of a report of the performance program; it has the sections of what was measured."""
    lines = _section(PERFORMANCE, _write_run(report["run"]))
    lines += _section(LATENCIES, [*map(_write_latency, report["latency"]), *map(SPEEDUP.write, report["speedups"])])
    if report["batches"]:
        lines += _section(BATCHES, [
            BATCH_BEST.write(row) if row["batch"] == report["best_batch"] else _any(row, BATCH, BATCH_FAILED)
            for row in report["batches"]
        ])  # fmt: skip
    if report["dtypes"]:
        lines += _section(DTYPES, [_any(row, DTYPE, DTYPE_FAILED) for row in report["dtypes"]])
    if report["together"]:
        together = report["together"]
        totals = [form.write(together) for form in (SINGLE, COMBINED, TOGETHER_SPEEDUP)]
        lines += _section(ALL_DEVICES, [*(TOGETHER.write(row) for row in together["devices"]), *totals])
    if report["runtime_options"]:
        rows = [_any(row, OPTIONS, OPTIONS_SKIPPED) for row in report["runtime_options"]]
        lines += _section(RUNTIME, rows)
    return _text(lines)


def read_performance(text: str) -> Report:
    """The report of a log of the performance program."""
    sections = _sections(text)
    batches = sections.get(BATCHES, "")
    return {
        "run": _read_run(sections[PERFORMANCE]),
        "latency": [_read_latency(row) for row in LATENCY.read(sections[LATENCIES])],
        "speedups": SPEEDUP.read(sections[LATENCIES]),
        "batches": _in_order(batches, BATCH_BEST, BATCH, BATCH_FAILED),
        "best_batch": next((row["batch"] for row in BATCH_BEST.read(batches)), None),
        "dtypes": _in_order(sections.get(DTYPES, ""), DTYPE, DTYPE_FAILED),
        "together": _read_together(sections[ALL_DEVICES]) if ALL_DEVICES in sections else None,
        "runtime_options": _in_order(sections.get(RUNTIME, ""), OPTIONS, OPTIONS_SKIPPED),
    }


def _write_latency(row: Mapping[str, Any]) -> str:
    verdict = STABLE if row["stable"] else UNSTABLE
    return LATENCY.write({**row, "verdict": verdict, "all_ms": " ".join(f"{one:.2f}" for one in row["latencies_ms"])})


def _read_latency(row: Report) -> Report:
    latencies_ms = [float(one) for one in row.pop("all_ms").split()]
    stable = row.pop("verdict") == STABLE
    return {**row, "stable": stable, "latencies_ms": latencies_ms}


def _read_together(body: str) -> Report:
    together: Report = {"devices": TOGETHER.read(body)}
    for form in (SINGLE, COMBINED, TOGETHER_SPEEDUP):
        [totals] = form.read(body)
        together |= totals
    return together


def _any(row: Mapping[str, Any], *forms: Form) -> str:
    """A row in the first form all of whose values it has."""
    return next(form for form in forms if form.names <= row.keys()).write(row)


def _in_order(body: str, *forms: Form) -> list[Report]:
    """The rows of a section, a line each, in whichever of the forms."""
    return [next(found[0] for form in forms if (found := form.read(line))) for line in body.splitlines()]


# ---- both -------------------------------------------------------------------------------------------------------

def _section(title: str, body: Iterable[str]) -> list[str]:
    return [BANNER, title, BANNER, *body, ""]


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _sections(text: str) -> dict[str, str]:
    """Titles to bodies."""
    _, *parts = text.split(f"{BANNER}\n")
    return {title.strip(): body.strip("\n") for title, body in zip(parts[::2], parts[1::2])}


def _write_run(run: Mapping[str, Any]) -> list[str]:
    return [RUN.write({"key": key, "value": value}) for key, value in run.items()]


def _read_run(body: str) -> Report:
    pairs = {row["key"]: row["value"] for row in RUN.read(body)}
    return {key: int(value) if value.isdigit() else value for key, value in pairs.items()}


def _without(rows: Iterable[Mapping[str, Any]], *names: str) -> list[Report]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def _kind(device: str) -> str:
    """``npu:0`` as NPU."""
    return device.partition(":")[0].upper()
