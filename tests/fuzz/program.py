"""Send malformed frames, headers, images, descriptors and requests to blendmaskd, and report what came of each.

Examples:
    scripts/fuzz.py                                     # one million, in all layers: about ten minutes
    scripts/fuzz.py --inputs 20000 --seed 7             # a short run of other inputs
    scripts/fuzz.py --layer images --inputs 100000      # one layer
    scripts/fuzz.py --layer images --first 4711 --inputs 1   # repeat the input that a failure named

Layers, and the share of the inputs that each gets:
    headers  40 %  frames and headers for each side of the wire, in a process of its own: a message or `ProtocolError`
    images   43 %  damaged images, raw arrays and paths, in processes of their own: pixels within limits or `ImageError`
    daemon   10 %  messages at a running daemon, with damaged images in them: each answered or dropped by the rule
    memory    3 %  descriptors and places at its socket for shared memory
    pages     2 %  requests at its metrics port
    http      2 %  requests at a `blendmaskd-http` before it, beside a polite client of that
    bombs          small files that demand much, at the default limits: memory is bounded by pixels and bytes

While a daemon gets such inputs, a well-behaved client uses it, and must get its own results throughout. In the end no
process may have died, the log must hold nothing unexpected, descriptors must be closed and memory must not have grown.
Anything else is reported with the layer, seed and number that reproduce it, and makes the exit code 1.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from blendmaskd.output import Help
from blendmaskd.programs.errors import guarded
from blendmaskd.settings import Limits
from blendmaskd.shell import launch
from fuzz import bombs, rules
from fuzz.child import Progress, input_random
from fuzz.live import Stranger, Target, target
from fuzz.rules import BrokenRuleError
from fuzz.strangers import STRANGERS

SHARES = {"headers": 0.40, "images": 0.43, "daemon": 0.10, "memory": 0.03, "pages": 0.02, "http": 0.02}
LAYERS = (*SHARES, "bombs")
CHUNK = 50_000  # inputs to a process
STUCK_S = 120.0  # without a word from a process: an input hangs
LEAK_MB = 64.0  # that a process may have grown by, from when it was warm: allocators keep what a few images took
WARM_SHARE = 0.2  # of a layer's inputs, after which the daemon is taken to be warm
BASE_BYTES = 100 << 20  # of a process that has decoded nothing
BOMB_BOUND = "16 bytes a pixel, 8 a byte, 96 MiB"
CHECK_S = 1.0
TELL_EACH = 5000


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("fuzz", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    os.chdir(Path(__file__).parents[2])  # where the demo model is, and the children find this package
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends what we started, too
    layers = [arguments.layer] if arguments.layer else list(LAYERS)
    report: dict[str, Any] = {"seed": arguments.seed, "layers": {}}
    code = 0
    for layer in layers:
        share = 1.0 if arguments.layer else SHARES.get(layer, 0.0)
        numbers = range(arguments.first, arguments.first + round(arguments.inputs * share))
        say(f"{layer}: {len(numbers) if layer != 'bombs' else len(bombs.REFUSED) + len(bombs.COSTLY)} inputs")
        try:
            report["layers"][layer] = _run(layer, numbers, arguments.seed)
        except BrokenRuleError as error:
            say(f"{layer}: BROKEN: {error}")
            report["layers"][layer] = {"broken": str(error)}
            code = 1
    print(json.dumps(report) if arguments.json else _told(report))
    return code


def bomb_bound(limits: Limits) -> int:
    """Bytes by which any image may let a process grow: `BOMB_BOUND`."""
    return 16 * limits.max_image_pixels + 8 * limits.max_image_bytes + (96 << 20)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _run(layer: str, numbers: range, seed: int) -> dict[str, Any]:
    start = time.monotonic()
    if layer == "bombs":
        found = _run_bombs(Limits())
    elif layer in rules.LAYERS:
        found = _run_children(layer, numbers, seed)
    else:
        found = _run_live(layer, numbers, seed)
    return {**found, "crashes": 0, "seconds": round(time.monotonic() - start, 1)}


# -- in processes of their own ----------------------------------------------------------------------------------------


def _run_children(layer: str, numbers: range, seed: int) -> dict[str, Any]:
    whole = Progress()
    grown = 0.0
    with tempfile.TemporaryDirectory(prefix="blendmaskd-fuzz-") as folder:
        for first in range(numbers.start, numbers.stop, CHUNK):
            progress = _run_child(layer, seed, range(first, min(first + CHUNK, numbers.stop)), folder)
            if progress.warm_bytes:
                grown = max(grown, (progress.bytes - progress.warm_bytes) / 1e6)
            whole.add(progress)
            say(f"  {whole.inputs} of {len(numbers)}: {_most(whole.outcomes, 6)}")
    if whole.peak_bytes > (most := BASE_BYTES + bomb_bound(rules.LIMITS)):
        raise BrokenRuleError(f"a process took {whole.peak_bytes} bytes, more than {most} ({BOMB_BOUND}, {BASE_BYTES})")
    if grown > LEAK_MB:
        raise BrokenRuleError(f"a process grew by {grown:.0f} MB")
    peak_mb = round(whole.peak_bytes / 1e6)
    slowest = whole.slowest_s, whole.slowest
    return _figures(whole.inputs, _most(whole.outcomes), slowest, peak_mb=peak_mb, grown_mb=round(grown, 1))


def _run_child(layer: str, seed: int, numbers: range, folder: str) -> Progress:
    """Raises `BrokenRuleError` when it dies, hangs or finds something; with the input's number."""
    at = Path(folder, f"{numbers.start}.at")
    at.write_bytes(bytes(8))
    argv = [
        sys.executable, "-m", "fuzz.child", layer, *map(str, (seed, numbers.start, numbers.stop)), folder,
    ]
    with Path(folder, "stderr").open("w+") as stderr:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, env=_as_a_worker())
        try:
            last = _last_line(process, at)
        finally:
            process.kill()  # where we are told to stop; else it has ended
        if process.wait():
            stderr.seek(0)
            number = int.from_bytes(at.read_bytes(), "little")
            raise BrokenRuleError(
                f"input {number} of seed {seed}, exit code {process.returncode}: {stderr.read()[-3000:]}"
            )
    return msgspec.json.decode(last, type=Progress)


def _as_a_worker() -> dict[str, str]:
    """The environment, with a worker's allocator: what asks for much cleared memory pays for it there at once."""
    preload = launch.resolve_preload("auto").path
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **({"LD_PRELOAD": preload} if preload else {})}


def _last_line(process: subprocess.Popen[bytes], at: Path) -> bytes:
    """What it says last. Kills it, with SIGABRT so that it tells where it hung, when it stays at one input."""
    seen, since = b"", time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        if (now := at.read_bytes()) != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            process.send_signal(signal.SIGABRT)
    assert process.stdout is not None
    with process.stdout as pipe:
        return (pipe.read().splitlines() or [b""])[-1]


def _run_bombs(limits: Limits) -> dict[str, Any]:
    """Each in a process of its own, so that none finds memory that another has left."""
    found: dict[str, dict[str, Any]] = {}
    bound = bomb_bound(limits)
    for name in [*bombs.REFUSED, *bombs.COSTLY]:
        code = _MEASURE.format(name, limits.max_image_bytes, limits.max_image_pixels)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_as_a_worker())
        if done.returncode:
            raise BrokenRuleError(f"{name}: exit code {done.returncode}: {done.stderr[-2000:]}")
        found[name] = one = json.loads(done.stdout)
        size, grown = one["size"] / 1e6, one["bytes"] / 1e6
        say(f"  {name:26} {size:7.2f} MB  {one['outcome']:10}  {one['s']:6.2f} s  +{grown:.0f} MB")
        if one["bytes"] > bound:
            raise BrokenRuleError(f"{name}: {one['bytes']} bytes, more than {bound} ({BOMB_BOUND})")
        if name in bombs.REFUSED and one["outcome"] == "pixels":
            raise BrokenRuleError(f"{name}: was decoded")
    slowest = max((one["s"], name) for name, one in found.items())
    outcomes = dict(sorted(Counter(one["outcome"] for one in found.values()).items()))
    peak_mb = round(max(one["bytes"] for one in found.values()) / 1e6)
    return _figures(len(found), outcomes, slowest, peak_mb=peak_mb, bombs=found)


_MEASURE = """
import json
from blendmaskd.settings import Limits
from fuzz import child
from blendmaskd.images.quiet import quiet
quiet()
print(json.dumps(child.measure({!r}, Limits(max_image_bytes={}, max_image_pixels={}))))
"""


# -- at a running daemon ----------------------------------------------------------------------------------------------


def _run_live(layer: str, numbers: range, seed: int) -> dict[str, Any]:
    with target() as found:
        with STRANGERS[layer](found) as stranger:
            slowest = _feed(found, stranger, layer, numbers, seed)
            grown = _grown(found)
        found.good.end()
        found.settle()
    good = {"answered": found.good.answered, "slowest_s": round(found.good.slowest_s, 3)}
    return _figures(len(numbers), _most(stranger.outcomes), slowest, grown_mb=grown, good_client=good)


def _feed(found: Target, stranger: Stranger, layer: str, numbers: range, seed: int) -> tuple[float, int]:
    """Seconds and number of the slowest input."""
    slowest, checked = (0.0, numbers.start), time.monotonic()
    for done, number in enumerate(numbers, start=1):
        start = time.monotonic()
        with _named(number, seed):
            outcome = stranger.feed(input_random(seed, layer, number))
            slowest = max(slowest, (time.monotonic() - start, number))
            if time.monotonic() - checked > CHECK_S:
                found.check()
                checked = time.monotonic()
        if outcome:
            stranger.outcomes[outcome] += 1
        if done == int(WARM_SHARE * len(numbers)):
            found.warm = found.resident()
        if done % TELL_EACH == 0:
            say(f"  {done} of {len(numbers)}: {_most(stranger.outcomes, 6)}")
    with _named(numbers.stop - 1, seed):
        stranger.settle()
        found.check()
    return slowest


@contextlib.contextmanager
def _named(number: int, seed: int) -> Iterator[None]:
    try:
        yield
    except BrokenRuleError as error:
        raise BrokenRuleError(f"at input {number} of seed {seed}: {error}") from error


def _grown(found: Target) -> dict[str, float]:
    """By process, MB from when it was warm. Raises `BrokenRuleError`."""
    grown = {name: round(now - found.warm[name], 1) for name, now in found.resident().items()}
    if max(grown.values()) > LEAK_MB:
        raise BrokenRuleError(f"memory grew, in MB: {grown}")
    return grown


# -- telling ----------------------------------------------------------------------------------------------------------


def _figures(inputs: int, outcomes: dict[str, int], slowest: tuple[float, int | str], **more: Any) -> dict[str, Any]:
    """Of a layer, for people and --json. `slowest`: the seconds of an input, and its number or name."""
    seconds, which = slowest
    return {"inputs": inputs, "outcomes": outcomes, "slowest_s": round(seconds, 3), "slowest": which, **more}


def _most(outcomes: Mapping[str, int], number: int | None = None) -> dict[str, int]:
    return dict(Counter(outcomes).most_common(number))


def _told(report: dict[str, Any]) -> str:
    lines = [f"seed {report['seed']}"]
    total = 0
    for layer, found in report["layers"].items():
        if "broken" in found:
            lines.append(f"{layer}: BROKEN: {found['broken']}")
            continue
        total += found["inputs"]
        rate = found["inputs"] / max(found["seconds"], 0.1)
        lines.append(
            f"{layer}: {found['inputs']} inputs in {found['seconds']:.0f} s ({rate:.0f}/s), {found['crashes']} crashes"
        )
        lines.append("    " + ", ".join(f"{outcome or 'sent'} {count}" for outcome, count in found["outcomes"].items()))
        facts = [f"slowest {found['slowest_s']} s ({found['slowest']})"]
        facts += [f"peak {found['peak_mb']} MB"] if "peak_mb" in found else []
        facts += [f"grown {found['grown_mb']} MB"] if "grown_mb" in found else []
        if "good_client" in found:
            good = found["good_client"]
            facts.append(f"the good client: {good['answered']} answers, slowest {good['slowest_s']} s")
        lines.append("    " + "; ".join(facts))
    broken = sum("broken" in found for found in report["layers"].values())
    return "\n".join([*lines, f"{total} inputs, {broken} rules broken"])


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("fuzz", description=__doc__, formatter_class=Help)
    parser.add_argument(
        "--inputs", type=int, default=1_000_000, metavar="N", help="in all layers together (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="all inputs follow from it (%(default)s)")
    parser.add_argument("--layer", choices=LAYERS, help="run only this one, with all inputs")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    return parser.parse_args(argv)
