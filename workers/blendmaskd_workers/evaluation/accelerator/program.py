"""Check an accelerator with one command: is it right, how fast is it, and does the daemon keep it busy?

    python scripts/accelerator_check.py --device cuda:0 --out out/check        # or npu:0, cpu
    python scripts/accelerator_check.py --device npu:0 --weights R_50_1x.pth --config configs/BlendMask/R_50_1x.yaml
    python scripts/accelerator_check.py --device cuda:0 --sections times,daemon --budget-s 240

It takes less than eight minutes (--budget-s) on a host with one device and 16 cores, from a checkout, which need not be
installed. Sections:

  goldens    AdelaiDet's recorded answers of three networks, with the network as it was trained, as it is served and by
             graphs; training losses and gradients. "as a CPU": within what the tests allow a CPU (scores 1e-5, boxes
             5e-3 pixels, no mask pixel); "near": ten times that (and 2 of 100 instances, 0.01% of mask pixels, 0.1% of
             a loss or gradient); else "off"
  precision  eval_precision.py against the host's CPU, in fp32 (with --trace), hf32 (TF32), bf16 and fp16 (autocast)
  times      the engine, by precision, without and with model.graphs, by batch size: images/s, both visits,
             idle time and its reasons, peak memory
  daemon     benchmark.py with JPEGs of 800x800 and of 12 megapixels, 8 and 32 clients: images/s, and the share of the
             devices' own time; in fp32 and as the device was fastest

Each section has a share of the time, and what it leaves passes to the next. What there was no time or memory for, or
what the device does not support, is said. Sections run in processes of their own: one that fails stops no other.

Writes accelerator_check.json, accelerator_check.md (the tables) and accelerator_check.log (what the processes said) to
--out, anew after each row. Exit codes: 0 nothing is wrong (what is unsupported or was left out is in the report) · 1
something failed, or is off · 2 wrong arguments · 3 no such device, or it cannot be used · 4 --out cannot be written ·
130 Ctrl-C, with the report so far.

Without a package index: the host needs Python 3.11 or later, and torch 2.1 or later with what it needs for its device
(torch_npu and CANN for an NPU), but not torchvision. Where there is an index, for the Python and the processor of that
host:

    python3 -m pip download --only-binary=:all: --no-deps --python-version 3.12 --implementation cp \\
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
      -d wheels markdown-it-py mdurl msgpack msgspec pillow prometheus_client psutil pycocotools pygments \\
      pyyaml pyzmq rich

Bring `wheels` and the checkout over, and there:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 scripts/accelerator_check.py --device cuda:0 --out out/check

Those that are there already may be left out (`python3 -m pip list` tells); numpy, which most have with torch, is to be
brought too where it is not.
"""
from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from blendmaskd import files
from blendmaskd.output import Help
from blendmaskd.programs.arguments import positive, seconds, size
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NO_DAEMON, OutputError, UsageError, guarded
from blendmaskd.settings.checks import DEVICE
from blendmaskd_workers.benchmark.report import machine, plain
from blendmaskd_workers.evaluation.accelerator import GOLDEN, ROOT, report, sections
from blendmaskd_workers.evaluation.accelerator.children import END_S, ChildError, Row
from blendmaskd_workers.evaluation.accelerator.sections import SECTIONS, WEIGHTS, Check

EXIT_NO_DEVICE = EXIT_NO_DAEMON
FACTS_S = 60.0  # for a process to open the device
NAME = "accelerator_check"
Tree = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # processes are ended, and the report is written
    return guarded(NAME, lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    begun = time.monotonic()
    _make(arguments.out)
    with tempfile.TemporaryDirectory(prefix="blendmaskd-check-") as folder:
        check = _check(arguments, Path(folder))
        tree: Tree = {"run": _describe(arguments), "machine": machine(), "device": {}, "sections": {}, "seconds": 0.0}
        try:
            _run(check, arguments, tree, begun)
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        finally:
            _write(arguments.out, tree, begun)
    problems = report.problems(tree)
    for problem in problems:
        print(problem)
    print(f"{arguments.out / NAME}.md, .json, .log: {tree['seconds']:.0f} s")
    if "failed" in tree:
        return EXIT_NO_DEVICE
    return EXIT_FAILED if problems else 0


def _run(check: Check, arguments: argparse.Namespace, tree: Tree, begun: float) -> None:
    until = begun + arguments.budget_s - END_S
    with _progress(arguments.budget_s) as progress:
        try:
            tree["device"] = sections.facts(check, min(until, begun + FACTS_S))
        except ChildError as error:
            tree["failed"] = str(error)
            return
        left = list(arguments.sections)
        while left:
            name, now = left[0], time.monotonic()
            share = WEIGHTS[name] / sum(WEIGHTS[each] for each in left)
            _run_section(check, name, now + share * (until - now), tree, progress, begun)
            left = left[1:]


def _run_section(check: Check, name: str, until: float, tree: Tree, progress: Progress, begun: float) -> None:
    start = time.monotonic()
    section: Tree = {"rows": [], "seconds": 0.0}
    tree["sections"][name] = section
    timed = tree["sections"].get("times", {"rows": []})["rows"]
    [task] = progress.task_ids
    progress.update(task, description=name, completed=start - begun)
    for row in _kept(SECTIONS[name](check, until, timed)):
        section["rows"].append(row)
        progress.console.print(escape(report.line(name, row)))
        progress.update(task, completed=time.monotonic() - begun)
        _write(check.log.parent, tree, begun)
    section["seconds"] = time.monotonic() - start


def _kept(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows; where a section cannot go on, a last one says why: the other sections are worth having."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {error}"}


def _progress(budget_s: float) -> Progress:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn(f"of {budget_s:g} s"))
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task("opening the device", total=budget_s)
    return progress


def _write(out: Path, tree: Tree, begun: float) -> None:
    """Raises `OutputError`."""
    tree["seconds"] = time.monotonic() - begun
    try:
        files.write_json(out / f"{NAME}.json", plain(tree))
        with files.whole(out / f"{NAME}.md") as beside:
            beside.write_text(report.markdown(tree), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from None


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{NAME}.log").write_bytes(b"")
    except OSError as error:
        raise OutputError(f"{out}: {error.strerror or error}") from None


def _check(arguments: argparse.Namespace, folder: Path) -> Check:
    return Check(
        device=arguments.device,
        config=str(arguments.config.absolute()),
        weights=arguments.weights and str(arguments.weights.absolute()),
        goldens=arguments.goldens,
        sizes=arguments.sizes,
        batch_sizes=arguments.batch_sizes,
        folder=folder,
        log=arguments.out.absolute() / f"{NAME}.log",
        environment=_environment(os.environ, folder),
    )


def _environment(base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """That of all processes: libraries' caches go into `folder` where there is no home to write to."""
    writable = os.access(base.get("HOME", ""), os.W_OK)
    return {
        **base,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",  # an installed torch_npu without CANN breaks torch
        "PYTHONFAULTHANDLER": "1",
        "CUDA_DEVICE_ORDER": base.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"),  # as for workers: cuda:1 is one card
        **({} if writable else {"HOME": str(folder)}),
    }


def _describe(arguments: argparse.Namespace) -> Tree:
    return {
        "device": arguments.device,
        "config": str(arguments.config),
        "weights": arguments.weights and str(arguments.weights),
        "sections": arguments.sections,
        "budget_s": arguments.budget_s,
    }


# ---- command line -----------------------------------------------------------------------------------------------

def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--device", type=_device, required=True, metavar="DEVICE", help="cuda:0, npu:0 or cpu")
    add("--out", type=Path, default=Path("out/accelerator_check"), metavar="FOLDER",
        help="default: out/accelerator_check")
    add("--sections", type=_sections, default=list(SECTIONS), metavar="A,B", help=f"default: {','.join(SECTIONS)}")
    add("--budget-s", type=seconds, default=480.0, metavar="S", help="for all of it; default 480")
    add("--config", type=Path, default=ROOT / "configs/BlendMask/R_50_1x.yaml", metavar="FILE",
        help="the network of precision, times and daemon: AdelaiDet's YAML keys; default R_50_1x")
    add("--weights", type=Path, metavar="FILE", help="an AdelaiDet checkpoint of it; default: seeded random weights")
    add("--goldens", nargs="+", default=list(sections.CHOSEN), metavar="NAME",
        help=f"files of tests/golden of one whole image; default: {' '.join(sections.CHOSEN)}")
    add("--batch-sizes", type=positive, nargs="+", default=[1, 2, 4, 8], metavar="N", help="of times; default: 1 2 4 8")
    add("--sizes", type=size, nargs="+", default=[(800, 800), (3000, 4000)], metavar="HxW",
        help="photographs of the daemon's load, times are of the first; default: 800x800 3000x4000")
    arguments = parser.parse_args(argv)
    _refuse_what_is_not_there(arguments)
    return arguments


def _refuse_what_is_not_there(arguments: argparse.Namespace) -> None:
    goldens = arguments.goldens if "goldens" in arguments.sections else ()
    recorded = (GOLDEN / f"{golden}.npz" for golden in goldens)
    for path in filter(None, (arguments.config, arguments.weights, *recorded)):
        if not path.is_file():
            raise UsageError(f"{path}: no such file")


def _device(text: str) -> str:
    if text != "cpu" and (not DEVICE.fullmatch(text) or text.startswith("cpu")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected cuda:N, npu:N or cpu")
    return text


def _sections(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {','.join(SECTIONS)}")
    return [name for name in SECTIONS if name in names]
