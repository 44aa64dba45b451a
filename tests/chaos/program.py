"""Make a daemon's life hard for a while, and account for every job that its clients sent.

Starts a daemon of its own with the `timed` engine, loads it from several clients (closed loop, images of 9 KB to 1.9
MB, half of them by shared memory), and injects faults at random times, the same ones for the same seed. At the end
no job may be lost, answered twice or wrongly, and the daemon may hold no more memory or descriptors than before.

  python scripts/chaos.py --minutes 10                          # all faults
  python scripts/chaos.py --minutes 2 --seed 7 --faults kill,stop,hang --every 0.5
  python scripts/chaos.py --minutes 30 --faults none            # the soak: does memory grow?
  python scripts/chaos.py --minutes 10 --json chaos.json --log daemon.log

{faults}
The clients do the accounting; they do not use this package's client library, and retry nothing. Lost: no answer after
{lost:g} times the deadline that a job was sent with. Jobs of clients that left or never read are abandoned, which is
no loss. Recovery: from a fault of a worker until all devices are ready, as the statistics show each second. Memory
grows if the least-squares line through what is held in the quietest moment of each {window:g} s after --warm-up rises
by more than {slope:g} MB a minute, and by more than {noise:g} MB in all; a run of one minute is too short to show a
slope.

Ctrl-C ends the run early, and the report covers it until then.

Exit codes: 0 nothing lost, duplicated or wrong, nothing grows · 1 something is · 2 wrong arguments · 3 the daemon did
not start · 130 Ctrl-C, and nothing was wrong until then.
"""
from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from blendmaskd import files
from blendmaskd.output import Help
from blendmaskd.programs.arguments import checked, output_file, positive, seconds
from blendmaskd.programs.errors import EXIT_FAILED, EXIT_INTERRUPTED, guarded
from blendmaskd.programs.interruption import Interruptible
from chaos import growth, injector
from chaos.clients import LOST_AFTER_DEADLINES, Clients
from chaos.growth import Growth
from chaos.host import Held, Host, all_ready, own_host
from chaos.injector import CLIENT_FAULTS, IMAGE_FAULTS, KINDS, WORKER_FAULTS, Fault

SAMPLE_S = 1.0
STATS_S = 0.2
PAUSE_S = 1.0  # between SIGSTOP and SIGCONT
MENDED_AFTER_S = 3.0  # a broken device
SETTLE_S = 60.0  # for devices, descriptors and answers at the end
LINE_S = 10.0  # between progress lines where there is no terminal
HARMFUL = {*WORKER_FAULTS, *IMAGE_FAULTS, "reload"} - {"raise", "bad-image", "pause"}  # a worker goes


class Chaos:
    """One run. What is known so far, and the clients' ledger, can be read at any time.

    `first` and `last` are as `Host.held` tells, `held` samples of MB by process: ``broker``, or a worker's generation.
    """

    def __init__(self, host: Host, clients: Clients, faults: Iterator[Fault], warm_up_s: float, first: Held) -> None:
        self.host = host
        self.clients = clients
        self.began = time.monotonic()
        self.warm_up_s = warm_up_s
        self.injected: Counter[str] = Counter()
        self.recoveries_s: list[float] = []
        self.unrecovered = self.interrupted = False
        self.died: int | None = None  # the daemon's exit code, when it ended by itself
        self.first = self.last = first
        self.held: dict[str, list[tuple[float, float]]] = {}
        self._faults = faults
        self._next = next(faults, None)
        self._later: list[tuple[float, Callable[[], object]]] = []  # what undoes a fault
        self._broken_since: float | None = None
        self._broken_seq = 0
        self._next_sample = self._next_stats = 0.0

    def run(self, seconds: float, tick: Callable[[], None]) -> None:
        """Load and faults for so long, then until all is answered and all devices are ready. Ctrl-C ends it early."""
        try:
            self._serve(lambda: time.monotonic() >= self.began + seconds, tick)
        except KeyboardInterrupt:
            self.interrupted = True
        self._next = None
        self.clients.submitting = False
        with contextlib.suppress(KeyboardInterrupt):  # a second one: what is owed now counts as lost
            self._settle(tick)

    def look_at_the_end(self) -> None:
        """When the clients have left: every descriptor has to come back."""
        end = time.monotonic() + SETTLE_S
        while True:
            self.last = self.host.held()
            complete = len(self.last) == len(self.first)  # a reload may be replacing the last one
            if (complete and self.leaked <= 0) or time.monotonic() >= end:
                return
            time.sleep(0.1)

    def growths(self) -> dict[str, Growth]:
        """Of the broker, and of every worker that was watched for long enough."""
        found = {name: growth.of(samples, self.warm_up_s) for name, samples in self.held.items()}
        return {name: each for name, each in found.items() if each is not None}

    @property
    def failures(self) -> list[str]:
        """What must not be, in words."""
        ledger = self.clients.ledger
        found = [
            (self.died is not None, f"the daemon ended by itself with {self.died}"),
            (ledger.owed > 0, f"{ledger.owed} jobs lost"),
            (ledger.duplicated > 0, f"{ledger.duplicated} answers to jobs that had one"),
            (ledger.strays > 0, f"{ledger.strays} answers that nobody asked for"),
            (bool(ledger.wrong), f"{len(ledger.wrong)} wrong answers, such as {ledger.wrong[:1]}"),
            (self.unrecovered, f"not all devices ready {SETTLE_S:g} s after the last fault"),
            (self.leaked > 0, f"the broker has {self.leaked} descriptors more than at the start"),
        ]
        growing = [(name, each) for name, each in self.growths().items() if each.grows]
        found += [(True, f"{name} grows by {each.mb_per_min:.2f} MB a minute") for name, each in growing]
        return [text for wrong, text in found if wrong]

    @property
    def leaked(self) -> int:
        if "broker" not in self.last:
            return 0
        return self.last["broker"][2] - self.first["broker"][2]

    # -- inside -----------------------------------------------------------------------------------------------------

    def _serve(self, over: Callable[[], bool], tick: Callable[[], None]) -> None:
        with Interruptible() as ctrl_c:  # never in the midst of a message or a fault
            while not ctrl_c.wait(over) and self.died is None:
                now = time.monotonic()
                if self._next is not None and now >= self.began + self._next.at:
                    self._inject(self._next, now)
                    self._next = next(self._faults, None)
                for due in [each for each in self._later if each[0] <= now]:
                    self._later.remove(due)
                    due[1]()
                self._look(now)
                if now >= self._next_sample:
                    self._next_sample = now + SAMPLE_S
                    self._sample(now)
                    tick()
                self.clients.turn(0.02)

    def _settle(self, tick: Callable[[], None]) -> None:
        """Until nothing is owed and all devices are ready."""
        end = time.monotonic() + self.clients.lost_s + SETTLE_S
        self._serve(lambda: self._is_quiet() or time.monotonic() >= end, tick)
        self.unrecovered = not all_ready(self.clients.stats)

    def _is_quiet(self) -> bool:
        quiet = self.clients.settled and not self._later and self._broken_since is None
        return quiet and all_ready(self.clients.stats)

    def _sample(self, now: float) -> None:
        self.died = self.host.process.poll()
        for name, (_, megabytes, _) in self.host.held().items():
            self.held.setdefault(name, []).append((now - self.began, megabytes))

    def _look(self, now: float) -> None:
        if now >= self._next_stats:
            self._next_stats = now + STATS_S
            self.clients.ask_stats()
        stats = self.clients.stats
        # Snapshots come each second: only the second one after a fault has surely seen it.
        if self._broken_since is not None and stats.get("seq", 0) >= self._broken_seq + 2 and all_ready(stats):
            self.recoveries_s.append(now - self._broken_since)
            self._broken_since = None

    def _inject(self, fault: Fault, now: float) -> None:
        self.injected[fault.kind] += 1
        device = self.host.devices[fault.device]
        if fault.kind in HARMFUL and self._broken_since is None:
            self._broken_since, self._broken_seq = now, self.clients.stats.get("seq", 0)
        match fault.kind:
            case "kill":
                self.host.signal_worker(device, signal.SIGKILL)
            case "stop":
                self.host.signal_worker(device, signal.SIGSTOP)
            case "pause":
                pid = self.host.signal_worker(device, signal.SIGSTOP)
                if pid is not None:
                    self._later.append((now + PAUSE_S, lambda: self.host.go_on(pid)))
            case "device":
                self.host.break_device(device)
                self._later.append((now + MENDED_AFTER_S, self._mend))
            case "reload" | "bad-reload":
                self.host.reload(good=fault.kind == "reload")
            case _:
                assert fault.kind in IMAGE_FAULTS + CLIENT_FAULTS
                self.clients.misbehave(fault.kind, now)

    def _mend(self) -> None:
        """Again and again, until no device has failed: it may be broken anew before the reload comes to it."""
        self.host.mend_devices()
        self.host.reload(good=True)
        self._later.append((time.monotonic() + MENDED_AFTER_S, self._mend_what_failed))

    def _mend_what_failed(self) -> None:
        if any(device["state"] == "failed" for device in self.clients.stats.get("devices", [])):
            self._mend()


# -- the program ------------------------------------------------------------------------------------------------------


Through = Callable[[str], contextlib.AbstractContextManager[str]]


def main(argv: Sequence[str] | None = None, through: Through = contextlib.nullcontext) -> int:
    """Run it; the exit code. `through` gives the endpoint that clients use for the daemon's: for tests."""
    return guarded("chaos", lambda: _main(_parse(argv), through))


def _main(arguments: argparse.Namespace, through: Through) -> int:
    console = Console(highlight=False, soft_wrap=True)
    faults = injector.faults(arguments.seed, arguments.faults, arguments.devices, arguments.every)
    with own_host(arguments.devices, arguments.log, {"timed": {"latency_ms": arguments.latency_ms}}) as host:
        first, seconds = host.held(), arguments.minutes * 60
        with (
            through(host.endpoint) as endpoint,
            Clients(endpoint, arguments.clients, arguments.seed, arguments.deadline) as clients,
        ):
            chaos = Chaos(host, clients, faults, arguments.warm_up, first)
            with _told(chaos, seconds, console) as tick:
                chaos.run(seconds, tick)
        chaos.look_at_the_end()
        summary = _summary(chaos, arguments)
        _tell(summary, console)
    if arguments.json:
        files.write_json(arguments.json, summary)
    if summary["failures"]:
        return EXIT_FAILED
    return EXIT_INTERRUPTED if summary["interrupted"] else 0


@contextlib.contextmanager
def _told(chaos: Chaos, seconds: float, console: Console) -> Iterator[Callable[[], None]]:
    """Progress: in place on a terminal, else a line now and then."""
    if console.is_terminal:
        with Live(_progress(chaos, seconds), console=console, auto_refresh=False, transient=True) as live:
            yield lambda: live.update(_progress(chaos, seconds), refresh=True)
        return
    due = 0.0

    def tick() -> None:
        nonlocal due
        passed, ledger = time.monotonic() - chaos.began, chaos.clients.ledger
        if passed >= due:
            due += LINE_S
            console.print(f"{passed:.0f} s: {ledger.submitted} sent, {ledger.answered} answered, "
                          f"{ledger.owed} owed, {ledger.duplicated} duplicated, {chaos.injected.total()} faults")

    yield tick


def _progress(chaos: Chaos, seconds: float) -> Table:
    ledger, stats = chaos.clients.ledger, chaos.clients.stats
    passed = time.monotonic() - chaos.began
    table = Table.grid(padding=(0, 2))
    table.add_row("time", f"{passed:.0f} of {seconds:.0f} s" if passed < seconds else "settling")
    table.add_row("jobs", f"{ledger.submitted} sent, {ledger.answered} answered, {ledger.refused} of them refused, "
                          f"{ledger.owed} owed, {ledger.abandoned} abandoned")  # fmt: skip
    lost = ledger.overdue(time.monotonic(), chaos.clients.lost_s)
    table.add_row("bad", f"{lost} lost, {ledger.duplicated} duplicated, {len(ledger.wrong)} wrong")
    table.add_row("faults", _counts(chaos.injected))
    table.add_row("devices", ", ".join(f"{d['device']} {d['state']}" for d in stats.get("devices", [])))
    table.add_row("FPS", f"{stats.get('combined_fps', 0.0)}")
    table.add_row("MB", ", ".join(f"{name} {held[1]:.0f}" for name, held in chaos.host.held().items()))
    return table


def _summary(chaos: Chaos, arguments: argparse.Namespace) -> dict[str, Any]:
    ledger = chaos.clients.ledger
    # The first second is not whole, and in the last ones nothing new is sent.
    seconds = range(min(chaos.clients.seconds, default=0) + 1, max(chaos.clients.seconds, default=0) + 1)
    rates = [chaos.clients.seconds[second] for second in seconds[: int(arguments.minutes * 60)]] or [0]
    return {
        "seed": arguments.seed,
        "minutes": arguments.minutes,
        "devices": arguments.devices,
        "clients": arguments.clients,
        "interrupted": chaos.interrupted,
        "jobs": {
            "sent": ledger.submitted,
            "accepted": ledger.accepted,
            "answered": ledger.answered,
            "abandoned": ledger.abandoned,
            "lost": ledger.owed,
            "duplicated": ledger.duplicated,
            "strays": ledger.strays,
            "wrong": ledger.wrong,
        },
        "codes": dict(ledger.codes),
        "faults": dict(chaos.injected),
        "recoveries_s": chaos.recoveries_s,
        "fps": {
            "median": statistics.median(rates),
            "lowest_second": min(rates),
            "lowest_10_s": min(_means(rates, 10)),
        },
        "held": {
            name: {
                "mb": [chaos.first.get(name, (0, None, 0))[1], held[1]],
                "descriptors": [chaos.first.get(name, (0, 0, None))[2], held[2]],
            }
            for name, held in chaos.last.items()
        },
        "growth": {
            name: {"mb_per_min": each.mb_per_min, "seconds": each.seconds, "rise_mb": each.rise_mb,
                   "grows": each.grows}
            for name, each in chaos.growths().items()
        },
        "failures": chaos.failures,
    }  # fmt: skip


def _means(values: Sequence[int], length: int) -> Iterator[float]:
    """Of all runs of so many."""
    length = min(length, len(values))
    yield from (statistics.fmean(values[start : start + length]) for start in range(len(values) - length + 1))


def _tell(summary: dict[str, Any], console: Console) -> None:
    jobs, fps, recoveries = summary["jobs"], summary["fps"], summary["recoveries_s"]
    lines = {
        "jobs": f"{jobs['sent']} sent, {jobs['accepted']} accepted, {jobs['answered']} answered, "
                f"{jobs['abandoned']} abandoned by their clients",
        "answers": _counts(summary["codes"]),
        "lost": str(jobs["lost"]),
        "duplicated": str(jobs["duplicated"] + jobs["strays"]),
        "wrong": str(len(jobs["wrong"])),
        "faults": f"{sum(summary['faults'].values())}: {_counts(summary['faults'])}",
    }  # fmt: skip
    if recoveries:
        median, longest = statistics.median(recoveries), max(recoveries)
        lines["recovery"] = f"{len(recoveries)} times, median {median:.1f} s, longest {longest:.1f} s"
    lines["images/s"] = (f"median {fps['median']:g}, lowest second {fps['lowest_second']:g}, "
                         f"lowest 10 s {fps['lowest_10_s']:.1f}")  # fmt: skip
    for name, held in summary["held"].items():
        lines[name] = _held_line(held, summary["growth"].get(name))
    for name, each in summary["growth"].items():
        if name not in summary["held"] and each["grows"]:
            lines[name] = f"{each['mb_per_min']:+.2f} MB a minute over {each['seconds']:.0f} s, then it ended"
    for name, text in lines.items():
        console.print(f"{name:<12}{text}")
    for failure in summary["failures"]:
        console.print(f"[bold red]{failure}")
    console.print("[red]failed" if summary["failures"] else
                  f"[green]nothing lost, nothing duplicated, nothing grows{' (interrupted)' * summary['interrupted']}")


def _held_line(held: dict[str, Any], grown: dict[str, Any] | None) -> str:
    first, last = held["mb"]
    text = f"{last:.1f} MB" if first is None else f"{first:.1f} -> {last:.1f} MB"
    first, last = held["descriptors"]
    text += f", {last} descriptors" if first is None else f", {first} -> {last} descriptors"
    return text if grown is None else f"{text}, {grown['mb_per_min']:+.2f} MB a minute over {grown['seconds']:.0f} s"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(counts.items())) or "none"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    kinds = (injector.__doc__ or "").split("\n\n", 1)[1]
    text = (__doc__ or "").format(faults=kinds, lost=LOST_AFTER_DEADLINES, slope=growth.MOST_MB_PER_MIN,
                                  window=growth.WINDOW_S, noise=growth.NOISE_MB)  # fmt: skip
    parser = argparse.ArgumentParser(prog="chaos", description=text, formatter_class=Help)
    parser.add_argument("--minutes", metavar="N", type=_minutes, default=1.0, help="default 1")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the faults, default 0")
    parser.add_argument("--faults", metavar="KIND,…", type=_kinds, default=KINDS, help="all (default), none, or some")
    parser.add_argument("--every", metavar="S", type=seconds, default=2.0,
                        help="between two faults, on average; default 2")  # fmt: skip
    parser.add_argument("--devices", metavar="N", type=positive, default=2, help="default 2")
    parser.add_argument("--clients", metavar="N", type=positive, default=8, help="good ones, default 8")
    parser.add_argument("--latency", metavar="MS", dest="latency_ms", type=_latency, default={1: 21.79, 2: 38.9},
                        help="of a device for an image; default that of an Ascend 910, batches of 2 too")  # fmt: skip
    parser.add_argument("--deadline", metavar="S", type=seconds, default=30.0, help="of a job, default 30")
    parser.add_argument("--warm-up", metavar="S", type=seconds, default=60.0,
                        help="not looked at for growth, default 60")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=output_file, help="all figures")
    parser.add_argument("--log", metavar="FILE", type=output_file, help="keep the daemon's log")
    return parser.parse_args(argv)


_minutes = checked(float, lambda value: 0 < value <= 24 * 60, "minutes, more than 0 and at most a day")


def _latency(text: str) -> dict[int, float]:
    return {1: checked(float, lambda value: 0 <= value <= 10_000, "milliseconds, 0 to 10000")(text)}


def _kinds(text: str) -> Sequence[str]:
    if text in ("all", "none"):
        return KINDS if text == "all" else ()
    kinds = text.split(",")
    for kind in kinds:
        if kind not in KINDS:
            raise argparse.ArgumentTypeError(f"{kind!r}: expected all, none, or some of {', '.join(KINDS)}")
    return kinds
