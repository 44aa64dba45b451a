"""The sections of the check: each starts processes, and yields rows as it gets them, until its time is up.

A row says what it is of, and then what was found, or instead why not: ``unsupported`` (the device has it not),
``skipped`` (no time or memory was left) or ``failed``.
"""
from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendmaskd import settings as settings_module
from blendmaskd.core import launch_plan
from blendmaskd.settings import SettingsError
from blendmaskd.shell import launch
from blendmaskd.topology import HostError
from blendmaskd_workers.evaluation.accelerator import ROOT, children
from blendmaskd_workers.evaluation.accelerator.children import TIME_IS_UP, ChildError, Row

FACTS = "blendmaskd_workers.evaluation.accelerator.facts"
GOLDENS = "blendmaskd_workers.evaluation.accelerator.goldens"
VISITS = "blendmaskd_workers.evaluation.accelerator.visits"
CHOSEN = ("R_50_1x_chelsea", "DLA_34_syncbn_4x_chelsea", "R_101_dcni3_5x_chelsea")
TRAININGS = ("R_50_1x", "small_R18")  # networks of which one was recorded
PRECISIONS = ("fp32", "hf32", "bf16", "fp16")
COMPARED = {"fp32": ["--trace"], "hf32": ["--hf32", "on"], "bf16": ["--dtype", "bf16"], "fp16": ["--dtype", "fp16"]}
CLIENTS = (8, 32)
LONGEST_WAIT_S = 5.0  # of a client that has as many beside it: after a load their jobs are waited for
LONGEST_LOAD_S, WARM_UP_S, START_S = 8.0, 2.0, 15.0  # of the daemon, for each number of clients
LEAST_LOAD_S = 3.0  # the daemon's own figures come each second


@dataclass(frozen=True)
class Check:
    device: str  # cuda:0, npu:0, cpu
    config: str
    weights: str | None  # None: seeded random ones
    goldens: Sequence[str]
    sizes: Sequence[tuple[int, int]]  # height, width of photographs
    batch_sizes: Sequence[int]
    folder: Path  # for files in between
    log: Path
    environment: Mapping[str, str]

    @property
    def slot(self) -> str:
        """The device as settings name it."""
        return "cpu:0" if self.device == "cpu" else self.device

    def checkpoint(self, until: float) -> str:
        """The weights' file; random ones are made once. Raises `ChildError`."""
        if self.weights:
            return self.weights
        path = self.folder / "random.pth"
        if not path.exists():
            self.run(["scripts/random_weights.py", "--config", self.config, "--output", str(path)], until)
        return str(path)

    def run(self, argv: Sequence[str], until: float) -> None:
        """A script of the checkout; what it prints goes into the log. Raises `ChildError`."""
        start = children.program([str(ROOT / argv[0]), *argv[1:]], self.environment)
        for line in children.lines(start, until, self.log):
            with self.log.open("ab") as log:
                log.write(line + b"\n")

    def rows(self, module: str, arguments: Sequence[str], until: float) -> Iterator[Row]:
        """What a module tells. Raises `ChildError`."""
        start = children.program(["-m", module, *arguments], self.environment)
        return children.rows(start, until - time.monotonic(), self.log)


Section = Callable[[Check, float, Sequence[Row]], Iterator[Row]]  # with the rows of `times`, if there are any


def facts(check: Check, until: float) -> Row:
    """The device, by a process that opens it. Raises `ChildError`."""
    [row] = check.rows(FACTS, [check.device], until)
    return row


# ---- is it right? -----------------------------------------------------------------------------------------------

def goldens(check: Check, until: float, _: Sequence[Row]) -> Iterator[Row]:
    """Graphs are tried in a process of their own: a device may not recover from one that it cannot record."""
    trained = [network for network in TRAININGS if any(golden.startswith(f"{network}_") for golden in check.goldens)]
    on_a_cpu = check.device == "cpu"  # which is its own control, and has no graphs
    ways = ["exact", "served"] if on_a_cpu else ["cpu", "exact", "served"]
    yield from _goldens(check, until, ways, [*check.goldens, *trained])
    if not on_a_cpu:
        yield from _goldens(check, until, ["graphs"], check.goldens)


def _goldens(check: Check, until: float, ways: Sequence[str], names: Sequence[str]) -> Iterator[Row]:
    """All in one process, and where it cannot go on, the rest in another; see `goldens`."""
    left = list(names)
    while left and time.monotonic() < until:
        begun = left[0]
        try:
            arguments = [check.device, str(check.folder), ",".join(left), ",".join(ways)]
            for row in check.rows(GOLDENS, arguments, until):
                begun = row["golden"] if "begun" in row else begun
                yield from [row] * ("begun" not in row)
            return
        except ChildError as error:
            yield {"golden": begun, **error.row}
        left = left[left.index(begun) + 1 :]
    yield from ({"golden": name, "skipped": TIME_IS_UP} for name in left)


def precision(check: Check, until: float, _: Sequence[Row]) -> Iterator[Row]:
    """The precision program for each kind of arithmetic."""
    for name, flags in COMPARED.items():
        of = {"precision": name}
        if missing := absent(check.device, name):
            yield {**of, "unsupported": missing}
        elif time.monotonic() >= until:
            yield {**of, "skipped": TIME_IS_UP}
        else:
            yield {**of, **_compared(check, until, flags, check.folder / f"precision_{name}")}


def absent(device: str, precision: str) -> str:
    """What is known before it is tried; empty if it is to be tried."""
    return "a CPU has no such arithmetic" if device == "cpu" and precision in ("hf32", "fp16") else ""


def _compared(check: Check, until: float, flags: Sequence[str], folder: Path) -> Row:
    weights = ["--weights", check.weights] if check.weights else ["--random-weights", "0"]
    try:
        check.run(["scripts/eval_precision.py", "--config", check.config, *weights, "--device", check.device,
                   "--output-dir", str(folder), *flags], until)  # fmt: skip
    except ChildError as error:  # also where the device is off, which is told in the report
        if not (folder / "precision_eval.json").exists():
            return error.row
    return deviations(json.loads((folder / "precision_eval.json").read_text()))


def deviations(report: Mapping[str, Any]) -> Row:
    """The precision program's report in a row: the worst of all scenes."""
    scenes = report["scenes"]
    tensors = [one for scene in scenes for one in scene["tensors"]]
    found = [scene["detections"] for scene in scenes]
    return {
        "loss_diff": max(scene["max_rel_diff"] for scene in scenes),
        "features_over": max((_over(one) for one in tensors if one["name"][0] == "p"), default=0.0),
        "heads_over": max((_over(one) for one in tensors if one["name"][0] != "p"), default=0.0),
        "reference": sum(one["reference"] for one in found),
        "matched": sum(one["matched"] for one in found),
        "score_diff": max(one["score_diff"] for one in found),
        "box_diff_px": max(one["box_diff_px"] for one in found),
        "iou_mean": min(one["iou_mean"] for one in found),
        "first_module_off": (report["trace"] or {}).get("first"),
        "off": report["failures"],
    }


def _over(tensor: Mapping[str, Any]) -> float:
    return float(tensor["over"] / max(tensor["of"], 1))


# ---- how fast is it? --------------------------------------------------------------------------------------------

def times(check: Check, until: float, _: Sequence[Row]) -> Iterator[Row]:
    """A process for each precision; see `visits`."""
    tried = [name for name in PRECISIONS if not absent(check.device, name)]
    yield from ({"precision": name, "unsupported": absent(check.device, name)} for name in PRECISIONS
                if name not in tried)  # fmt: skip
    for number, name in enumerate(tried):
        share = (until - time.monotonic()) / (len(tried) - number)
        if share <= 0:
            yield {"precision": name, "skipped": TIME_IS_UP}
        else:
            yield from ({"precision": name, **row} for row in _visits(check, until, share, name))


def _visits(check: Check, until: float, seconds: float, name: str) -> Iterator[Row]:
    """The rows of a precision; they should take `seconds`, and may take half as long again."""
    until = min(until, time.monotonic() + 1.5 * seconds)
    arguments = ["-m", VISITS, json.dumps([check.sizes[0], check.batch_sizes, round(seconds, 1)])]
    try:
        settings = settings_module.load(None, None, _overrides(check, until, name), [check.slot])
        plan = launch_plan.plan(check.slot, launch.basis(settings), check.environment, arguments=arguments)
        yield from children.rows(lambda **popen: launch.launch(plan, **popen), until - time.monotonic(), check.log)
    except ChildError as error:
        yield error.row
    except (HostError, SettingsError) as error:
        yield {"failed": str(error)}


def _overrides(check: Check, until: float, name: str, graphs: bool = False) -> list[str]:
    return [f"model.config={check.config}", f"model.weights={check.checkpoint(until)}", f"model.precision={name}",
            f"model.graphs={str(graphs).lower()}"]  # fmt: skip


# ---- does the daemon keep it busy? ------------------------------------------------------------------------------

def daemon(check: Check, until: float, timed: Sequence[Row]) -> Iterator[Row]:
    """The benchmark with photographs of each size: in float32, and as the device was fastest."""
    clients = clients_for(timed)
    kinds = list(itertools.product(dict.fromkeys([("fp32", False), fastest(timed)]), check.sizes))
    for number, ((name, graphs), size) in enumerate(kinds):
        of = {"size": "{}x{}".format(*size), "precision": name, "graphs": graphs}
        left = until - time.monotonic()
        each_s = (left / (len(kinds) - number) - START_S) / len(clients) - WARM_UP_S
        if left < START_S + len(clients) * (WARM_UP_S + LEAST_LOAD_S):
            yield {**of, "skipped": TIME_IS_UP}
        else:
            seconds = min(max(each_s, LEAST_LOAD_S), LONGEST_LOAD_S)
            load = ["--clients", *map(str, clients), "--seconds", f"{seconds:.1f}"]
            yield from ({**of, **row} for row in _loaded(check, until, size, load, name, graphs))


def clients_for(timed: Sequence[Row]) -> list[int]:
    """Of `CLIENTS`, those that a device as slow as float32 was can serve; at least one."""
    rate = max((row["images_per_s"] for row in timed if row.get("precision") == "fp32" and "images_per_s" in row),
               default=CLIENTS[-1])  # fmt: skip
    return [clients for clients in CLIENTS if clients <= LONGEST_WAIT_S * rate] or [1]


def fastest(timed: Sequence[Row]) -> tuple[str, bool]:
    """Precision and graphs of the row of most images per second; float32 without, where nothing was timed."""
    best = max((row for row in timed if "images_per_s" in row), key=lambda row: row["images_per_s"], default=None)
    return ("fp32", False) if best is None else (best["precision"], best["graphs"])


def _loaded(
    check: Check, until: float, size: tuple[int, int], load: Sequence[str], name: str, graphs: bool
) -> Iterator[Row]:
    file = check.folder / "benchmark.json"
    file.unlink(missing_ok=True)
    try:
        settings = [*_overrides(check, until, name, graphs), f"warm_up=[[{size[0]}, {size[1]}]]", "drain_s=5"]
        check.run(
            ["scripts/benchmark.py", "--devices", check.slot, "--engine", "native", "--batch", "auto",
             "--encoding", "jpeg", "--size", "{}x{}".format(*size), *load, "--rounds", "1",
             "--warm-up", f"{WARM_UP_S}", "--limit-seconds", "0", "--json", str(file),
             *(part for each in settings for part in ("--set", each))],
            until,
        )  # fmt: skip
    except ChildError as error:  # also where an answer is wrong, which is told in the rows
        if not file.exists():
            yield error.row
            return
    yield from map(_under_load, json.loads(file.read_text())["rows"])


def _under_load(row: Mapping[str, Any]) -> Row:
    """What is to be kept of it, as far as it is known."""
    kept = ("fps", "of_device_time", "busy_ms_per_image", "idle_share", "p50_ms", "p99_ms", "stages_ms",
            "cpu_s_per_1000", "generator_share", "memory_mb", "failures", "wrong")  # fmt: skip
    return {"clients": row["load"]["clients"], **{name: row[name] for name in kept if row.get(name) is not None}}


SECTIONS: dict[str, Section] = {"goldens": goldens, "precision": precision, "times": times, "daemon": daemon}
WEIGHTS = {"goldens": 2.0, "precision": 3.0, "times": 4.0, "daemon": 3.0}  # shares of the time
