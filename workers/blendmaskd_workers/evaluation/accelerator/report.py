"""The check's report as Markdown, and a line for each row as it comes. Pure."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blendmaskd_workers.benchmark.report import Columns, cells, grid
from blendmaskd_workers.evaluation.accelerator.children import Row

BY_THEMSELVES = ("golden", "computed", "precision")  # what they are of goes without saying
NOT_MEASURED = ("unsupported", "skipped", "failed")
RANDOM = ("seeded random ones, which have learnt nothing: what is found in a photograph means nothing, nor would an "
          "accuracy on photographs. Times are those of trained weights that find a hundred instances")  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _idle_ms(row: Mapping[str, Any]) -> str:
    reasons = ", ".join(f"{reason} {milliseconds:.2f}" for reason, milliseconds in row["idle_ms"].items())
    return f"{_percent(row['idle_share'])} ({reasons})"


OF: Columns = {  # what a row is of
    "golden": lambda row: row["golden"],
    "computed": lambda row: row["way"],
    "size": lambda row: row["size"],
    "precision": lambda row: row["precision"],
    "graphs": lambda row: "yes" if row["graphs"] else "no",
    "batch": lambda row: str(row["batch"]),
    "clients": lambda row: str(row["clients"]),
}
FOUND: Mapping[str, Columns] = {
    "goldens": {
        "found": lambda row: f"{row['matched']} of {row['recorded']}",
        "scores to": lambda row: f"{row['score_diff']:.1e}",
        "boxes to, px": lambda row: f"{row['box_diff_px']:.1e}",
        "mask pixels off": lambda row: f"{row['mask_off']} of {row['mask_pixels'] / 1e6:.1f} million",
        "relative": lambda row: f"{row['relative_diff']:.1e}",
        "verdict": lambda row: row["verdict"],
    },
    "precision": {
        "losses to": lambda row: f"{100 * row['loss_diff']:.4f}%",
        "features over 1%": lambda row: _percent(row["features_over"]),
        "heads over 1%": lambda row: _percent(row["heads_over"]),
        "same instances": lambda row: f"{row['matched']} of {row['reference']}",
        "scores to": lambda row: f"{row['score_diff']:.1e}",
        "boxes to, px": lambda row: f"{row['box_diff_px']:.1e}",
        "mask IoU": lambda row: f"{row['iou_mean']:.4f}",
        "first module off": lambda row: row["first_module_off"] or "",
    },
    "times": {
        "images/s": lambda row: f"{row['images_per_s']:.1f}",
        "if never idle": lambda row: f"{row['device_images_per_s']:.1f}",
        "first visit ms": lambda row: f"{row['first_ms']:.2f}",
        "second": lambda row: f"{row['second_ms']:.2f}",
        "idle (ms by reason)": _idle_ms,
        "alone ms": lambda row: f"{row['alone_ms']:.2f}",
        "peak MB": lambda row: f"{row['peak_mb']:.0f}",
        "of all": lambda row: f"{row['taken_mb']:.0f}",
    },
    "daemon": {
        "images/s": lambda row: f"{row['fps']:.1f}",
        "of device time": lambda row: _percent(row["of_device_time"]),
        "device ms per image": lambda row: f"{row['busy_ms_per_image']:.2f}",
        "idle": lambda row: ", ".join(f"{reason} {_percent(share)}" for reason, share in row["idle_share"].items()),
        "p50 ms": lambda row: f"{row['p50_ms']:.1f}",
        "p99": lambda row: f"{row['p99_ms']:.1f}",
        "worker CPU s per 1000": lambda row: f"{row['cpu_s_per_1000']['workers']:.1f}",
        "failed jobs": lambda row: str(sum(row["failures"].values()) + row["wrong"]),
    },
}
TITLES = {
    "goldens": "Goldens: against what AdelaiDet computed on a CPU, float32",
    "precision": "Precision: against this host's CPU in float32, the network as it was trained",
    "times": "Times of the engine, two runs in flight",
    "daemon": "The daemon under JPEGs, closed loop, batch auto",
}


def problems(tree: Mapping[str, Any]) -> list[str]:
    """What failed, is off, or was answered wrong; a sentence each."""
    found = [f"device: {tree['failed']}"] if "failed" in tree else []
    for name, section in tree["sections"].items():
        found += [line(name, row) for row in section["rows"] if is_bad(row)]
    return found


def is_bad(row: Row) -> bool:
    """A device in float32 that computes something else, an answer that is wrong or was not given, any failure."""
    off = row.get("verdict") == "off" or (row.get("precision") == "fp32" and row.get("off"))
    return bool("failed" in row or off or row.get("wrong") or row.get("failures"))


def line(section: str, row: Row) -> str:
    of = ", ".join(text if name in BY_THEMSELVES else f"{name} {text}" for name, text in cells(row, OF).items())
    found = [f"{reason}: {row[reason]}" for reason in NOT_MEASURED if reason in row]
    found += [f"{name} {text}" for name, text in cells(row, FOUND[section]).items()]
    if is_bad(row):
        found += [f"off: {each}" for each in row.get("off", ())]
    return ": ".join(filter(None, [section, of, ", ".join(found)]))


def markdown(tree: Mapping[str, Any]) -> str:
    """The whole report; its tree is that of the JSON."""
    device, machine = tree["device"], tree["machine"]
    about = {
        "device": f"{tree['run']['device']}, {device.get('name', 'not opened')}, {device.get('memory_gb', '?')} GB",
        "driver": device.get("driver", ""),
        "torch": ", ".join(filter(None, [device.get("torch", ""), device.get("runtime", "")])),
        "CPU": f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gb']} GB",
        "Python, kernel": f"{machine['python']}, {machine['kernel']}",
        "network": tree["run"]["config"],
        "weights": tree["run"]["weights"] or RANDOM,
        "when": f"{machine['time']}, {tree['seconds']:.0f} s of {tree['run']['budget_s']:g}",
    }
    lines = [f"# Accelerator check: {device.get('name', tree['run']['device'])}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in about.items() if text]
    bad = problems(tree)
    lines += ["", "Problems:" if bad else "No problem was found.", *[""] * bool(bad)]
    lines += [f"- {_cell(each)}" for each in bad]
    for name, section in tree["sections"].items():
        lines += ["", *_section(name, section)]
    return "\n".join(lines) + "\n"


def _section(name: str, section: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {TITLES[name]}"
    yield ""
    measured = [row for row in section["rows"] if not any(reason in row for reason in NOT_MEASURED)]
    yield from _table(measured, {**OF, **FOUND[name]})
    reasons = [line(name, row) for row in section["rows"] if any(reason in row for reason in NOT_MEASURED)]
    yield from [""] * bool(measured and reasons)
    yield from (f"- {_cell(reason.removeprefix(f'{name}: '))}" for reason in reasons)


def _table(rows: Sequence[Row], columns: Columns) -> Iterator[str]:
    shown, body = grid(rows, columns)
    if shown:
        yield f"| {' | '.join(shown)} |"
        yield f"|{'---|' * len(shown)}"
    yield from (f"| {' | '.join(map(_cell, texts))} |" for texts in body)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
