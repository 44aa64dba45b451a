"""The performance program: how fast is the network on each device, in batches, in data types, on all devices together?

    python scripts/eval_performance.py --config configs/BlendMask/R_50_1x.yaml --weights R_50_1x.pth \\
        --devices npu:0 npu:1 --batch-sizes 1 2 4 8 --dtypes fp32 fp16 bf16 --runtime-options --cpu-baseline
    python scripts/eval_performance.py --config … --random-weights 0 --devices cpu:0 cpu:1 --iterations 5 --warm-up 1
    python scripts/eval_performance.py … --devices npu:0 --profile 2 4        # which operators grow beyond the batch?
    python scripts/eval_performance.py --engine timed --devices npu:0 npu:1   # the program itself

It times the network alone: from the prepared image on the host to boxes and mask probabilities on the host, without
decoding, mask pasting or transport, which the daemon overlaps with the device (scripts/benchmark.py shows how well).
Each device is timed in its own process, started as the daemon starts workers: pinned, with its task queue and
allocator. The figures are the median latency, and FPS, throughput and speed-up derived from it.

--profile lists the operators that take the most time on the first device, by torch_npu's profiler on an NPU and by
torch's elsewhere, with their share. With two batch sizes it says what each takes in the larger one beyond its time per
image in the smaller one: there throughput gets lost. AI_CPU behind a name means that the chip has no kernel for it.

Writes performance_eval.log, performance_eval.json and plots to --output-dir. Exit code: 0 measured, 2 not measured.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd import settings as settings_module
from blendmaskd.core.launch_plan import Basis, Preload
from blendmaskd.output import Help
from blendmaskd.programs.arguments import positive, seed, size
from blendmaskd.programs.errors import UsageError, guarded
from blendmaskd.settings import Settings, SettingsError
from blendmaskd.shell import launch
from blendmaskd.topology import HostError
from blendmaskd_workers.evaluation import logs, operators, outputs, timing
from blendmaskd_workers.evaluation.timing import CannotTime, Request, Stopwatch, figures, time_together
from blendmaskd_workers.programs import random_weights

STABLE_PERCENT = 5.0  # bar for the coefficient of variation of latency
BASELINE_ITERATIONS = 10  # at most: what takes milliseconds on a device takes seconds on the host's CPUs
PROFILED = 5  # iterations at most: a profiler keeps every launch
TURNS = 5  # of each choice of runtime options
TASK_QUEUE_DEFAULT = 1  # torch_npu's own
TIMED = "engine timed sleeps a latency table: the figures show this program, not a device"
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("eval_performance", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    outputs.make(arguments.output_dir)
    try:
        with tempfile.TemporaryDirectory(prefix="eval-performance-") as folder:
            report = measure(arguments, _settings(arguments, Path(folder) / "random.pth"))
    except (CannotTime, SettingsError, HostError, OSError, ValueError) as error:
        raise UsageError(str(error)) from None
    outputs.write(arguments.output_dir, "performance", report, logs.write_performance(report))
    return 0


def measure(arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The report; the log's form is that of `logs.write_performance`."""
    basis = launch.basis(settings)
    request = Request(arguments.iterations, arguments.warm_up)
    with contextlib.ExitStack() as running:
        stopwatches = [running.enter_context(Stopwatch(device, basis, arguments.size)) for device in settings.devices]
        for one in stopwatches:
            _wait_until_ready(one)
        alone = [_latency(one, request) for one in stopwatches]
        [first, *_] = stopwatches
        batches = [{"batch": size, **_try(first, replace(request, batch=size))} for size in arguments.batch_sizes]
        dtypes = [{"dtype": dtype, **_try(first, replace(request, dtype=dtype))} for dtype in arguments.dtypes]
        profiled = _profile(first, request, arguments.profile) if arguments.profile else None
        together = _together(stopwatches, request, alone[0]) if len(stopwatches) > 1 else None
        run = _describe(arguments, first)
    baseline = _baseline(basis, arguments.size, request) if arguments.cpu_baseline else []
    options = _runtime_options(basis, arguments.size, request) if arguments.runtime_options else []
    return {
        "run": run,
        "latency": [*baseline, *alone],
        "speedups": [_speedup(baseline[0], row) for row in alone if baseline],
        "batches": batches,
        "best_batch": _best(batches),
        "dtypes": _with_gain(dtypes, "dtype"),
        "profile": profiled,
        "together": together,
        "runtime_options": options,
    }


def _latency(one: Stopwatch, request: Request, label: str = "") -> Row:
    _progress(f"{one.device}: batch 1")
    [latencies_ms] = time_together([one], request)
    found = figures(latencies_ms)
    return {
        "device": label or one.device,
        "model": one.actual.device_name or "no device",
        "cpus": one.actual.cpus,
        **found,
        "stable": found["cv_percent"] < STABLE_PERCENT,
        "latencies_ms": latencies_ms,
    }


def _baseline(basis: Basis, size: str, request: Request) -> list[Row]:
    """The same on all CPUs of the host."""
    few = replace(request, iterations=min(request.iterations, BASELINE_ITERATIONS), warm_up=1)
    with Stopwatch("cpu:0", replace(basis, cpus={}), size) as one:
        _wait_until_ready(one)
        return [_latency(one, few, label="CPU")]


def _speedup(baseline: Row, row: Row) -> Row:
    kind = row["device"].partition(":")[0].upper()
    return {"kind": kind, "device": row["device"], "speedup": baseline["median_ms"] / row["median_ms"]}


def _best(batches: Sequence[Row]) -> int | None:
    """The batch size of most images per second; None where none was measured."""
    rates = {int(row["batch"]): float(row["fps"]) for row in batches if "fps" in row}
    return max(rates, key=lambda size: rates[size], default=None)


def _try(one: Stopwatch, request: Request) -> Row:
    """Median and FPS of a measurement, or why the device cannot do it: no memory, no kernel for the type."""
    _progress(f"{one.device}: batch {request.batch}, {request.dtype}")
    try:
        [latencies_ms] = time_together([one], request)
    except CannotTime as error:
        return {"failed": str(error)}
    return _quoted(figures(latencies_ms, request.batch))


def _quoted(found: Mapping[str, float]) -> Row:
    return {name: found[name] for name in ("median_ms", "fps")}


def _with_gain(rows: list[Row], name: str) -> list[Row]:
    """Adds to each row its FPS in percent over those of the first that was measured."""
    measured = [row for row in rows if "fps" in row]
    for row in measured:
        row |= {"gain_percent": 100 * (row["fps"] / measured[0]["fps"] - 1), "base": measured[0][name]}
    return rows


def _profile(one: Stopwatch, request: Request, batches: Sequence[int]) -> Row:
    few = replace(request, iterations=min(request.iterations, PROFILED))
    found = {}
    for batch in batches:
        _progress(f"{one.device}: operators of batch {batch}")
        found[batch] = timing.profile(one, replace(few, batch=batch))
    return operators.table(found)


def _together(stopwatches: Sequence[Stopwatch], request: Request, single: Row) -> Row:
    _progress(" and ".join(one.device for one in stopwatches) + " together")
    rows = []
    for one, latencies_ms in zip(stopwatches, time_together(stopwatches, request)):
        found = figures(latencies_ms)
        rows.append({"device": one.device, "avg_ms": found["avg_ms"], **_quoted(found), "cpus": one.actual.cpus})
    combined = sum(row["fps"] for row in rows)
    return {
        "devices": rows,
        "single": single["device"],
        "single_fps": single["fps"],
        "combined_fps": combined,
        "speedup": combined / single["fps"],
    }


# ---- runtime options --------------------------------------------------------------------------------------------

def _runtime_options(basis: Basis, size: str, request: Request) -> list[Row]:
    """The first device without any option, with each alone, and with all; a process each, timed in turns."""
    device = basis.settings.devices[0]
    skipped = _without_effect(device, basis)
    options = [option for option in ("affinity", "task_queue", "tcmalloc") if option not in skipped]
    choices = [(), *((option,) for option in options), *([tuple(options)] if len(options) > 1 else [])]
    with contextlib.ExitStack() as running:
        stopwatches = {
            " + ".join(chosen) or "none": running.enter_context(_with_options(chosen, device, basis, size))
            for chosen in choices
        }
        timed = _in_turns(stopwatches, request)
        rows = [{"options": name, **row, **_took_effect(stopwatches[name])} for name, row in timed.items()]
    return [*_with_gain(rows, "options"), *({"options": name, "skipped": why} for name, why in skipped.items())]


def _with_options(chosen: Sequence[str], device: str, basis: Basis, size: str) -> Stopwatch:
    """A process with these options; it has the same number of threads with any."""
    affinity, settings = "affinity" in chosen, basis.settings
    runtime = msgspec.structs.replace(
        settings.runtime,
        threads=len(basis.cpus[device]) if settings.runtime.threads == "auto" else settings.runtime.threads,
        cpu_affinity_conf=settings.runtime.cpu_affinity_conf if affinity else None,
        task_queue=settings.runtime.task_queue if "task_queue" in chosen else TASK_QUEUE_DEFAULT,
    )
    chosen_basis = replace(
        basis,
        settings=msgspec.structs.replace(settings, runtime=runtime),
        cpus=basis.cpus if affinity else {},
        preload=basis.preload if "tcmalloc" in chosen else Preload(None, "not chosen"),
    )
    return Stopwatch(device, chosen_basis, size)


def _in_turns(stopwatches: Mapping[str, Stopwatch], request: Request) -> dict[str, Row]:
    """A measurement of each in several rounds, so that what else the host does meets all alike."""
    turns = min(TURNS, request.iterations)
    one_turn = replace(request, iterations=-(-request.iterations // turns))
    latencies: dict[str, list[float]] = {name: [] for name in stopwatches}
    for turn, (name, one) in itertools.product(range(turns), stopwatches.items()):
        _progress(f"{one.device} with options: {name} ({turn + 1} of {turns})")
        if turn == 0:
            _wait_until_ready(one)
        [latencies_ms] = time_together([one], one_turn)
        latencies[name] += latencies_ms
    return {name: _quoted(figures(latencies_ms)) for name, latencies_ms in latencies.items()}


def _took_effect(one: Stopwatch) -> Row:
    """What the process itself says of its options."""
    return {
        "cpus": one.actual.cpus,
        "task_queue": str(one.actual.task_queue),
        "preload": os.path.basename(one.actual.preload or logs.NONE),
    }


def _without_effect(device: str, basis: Basis) -> dict[str, str]:
    """The options that would change nothing here, and why."""
    skipped = {}
    if basis.cpus[device] == basis.available:
        skipped["affinity"] = f"{device} has all CPUs to itself"
    if not device.startswith("npu"):
        skipped["task_queue"] = "only an NPU has one"
    elif basis.settings.runtime.task_queue == TASK_QUEUE_DEFAULT:
        skipped["task_queue"] = f"runtime.task_queue is torch_npu's default, {TASK_QUEUE_DEFAULT}"
    if basis.preload.path is None:
        skipped["tcmalloc"] = basis.preload.reason
    return skipped


# ---- command line -----------------------------------------------------------------------------------------------

def _settings(arguments: argparse.Namespace, drawn: Path) -> Settings:
    """`drawn` is where random weights go, if these are wanted."""
    if arguments.random_weights is not None:
        random_weights.save(arguments.config, drawn, arguments.random_weights)
    weights = arguments.weights if arguments.random_weights is None else drawn
    overrides = [f"engine={arguments.engine}", f"model.precision={'hf32' if arguments.hf32 == 'on' else 'fp32'}"]
    if arguments.engine != "timed":
        overrides += [f"model.config={arguments.config}", f"model.weights={weights}"]
    return settings_module.load(None, os.environ, [*overrides, *arguments.set], arguments.devices)


def _describe(arguments: argparse.Namespace, one: Stopwatch) -> Row:
    seed = arguments.random_weights
    weights = arguments.weights if seed is None else f"random, seed {seed}"
    timed = arguments.engine == "timed"
    return {
        "engine": arguments.engine,
        **({"note": TIMED} if timed else {"config": arguments.config, "weights": weights}),
        "devices": " ".join(arguments.devices),
        "hf32": arguments.hf32,
        "image": arguments.size,
        "network_input": one.network_input,
        "iterations": arguments.iterations,
        "warm_up": arguments.warm_up,
        "quoted": "medians; FPS, throughput and speed-ups are by the median latency",
    }


def _wait_until_ready(one: Stopwatch) -> None:
    one.ready()
    for warning in one.warnings():
        print(f"warning: {warning}", file=sys.stderr)


def _progress(text: str) -> None:
    print(f"timing {text}", file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval_performance", description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--config", metavar="FILE", help="the network: a YAML file with AdelaiDet's keys")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", metavar="FILE", help="an AdelaiDet checkpoint of that network (.pth)")
    weights.add_argument("--random-weights", type=seed, metavar="SEED", help="seeded random weights instead")
    add("--devices", nargs="+", required=True, metavar="DEVICE",
        help="npu:0 npu:1, cuda:0, cpu:0; batches, data types and options are timed on the first")
    add("--engine", default="native", choices=["native", "adelaidet", "timed"], help="default: native")
    add("--batch-sizes", type=positive, nargs="+", default=[], metavar="N", help="such as 1 2 4 8")
    add("--dtypes", nargs="+", default=[], choices=["fp32", "fp16", "bf16"],
        help="data types of convolutions and matrix products, with autocast")
    add("--profile", type=positive, nargs="*", metavar="N",
        help="what the operators take in batches of one size, or of two and how they grow (default: 1)")
    add("--runtime-options", action="store_true",
        help="time CPU affinity, task queue and tcmalloc: none, each alone, all")
    add("--cpu-baseline", action="store_true", help="compare with all CPUs of the host")
    add("--size", type=size, default="800x800", metavar="HxW",
        help="size of the random image (default: 800x800); the network resizes it as its configuration says")
    add("--hf32", choices=("on", "off"), default="off", help="on: let an NPU use HF32 and CUDA TF32 (default: off)")
    add("--iterations", type=positive, default=50, metavar="N", help="per measurement (default: 50)")
    add("--warm-up", type=positive, default=10, metavar="N", help="iterations before each (default: 10)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon, such as runtime.cpus")
    add("--output-dir", type=Path, default=Path("out/performance"), metavar="FOLDER", help="default: out/performance")
    arguments = parser.parse_args(argv)
    arguments.profile = sorted(set(arguments.profile or [1])) if arguments.profile is not None else []
    arguments.size = "{}x{}".format(*arguments.size)
    _check(parser, arguments)
    return arguments


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if len(arguments.profile) > 2:
        parser.error("--profile: takes one batch size, or two to compare")
    if arguments.engine == "timed":
        if arguments.dtypes or arguments.cpu_baseline or arguments.runtime_options or arguments.profile:
            parser.error("engine timed sleeps: it has no data types, operators, CPU baseline or runtime options")
    elif arguments.config is None or (arguments.weights is None and arguments.random_weights is None):
        parser.error("--config and --weights (or --random-weights) are needed")
