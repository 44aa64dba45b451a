"""Show what a running daemon does: devices, FPS, queue, failures, where the time goes.

    python scripts/stats.py                                   the daemon of the systemd unit
    python scripts/stats.py ipc:///tmp/x/client.sock --watch  each second, until Ctrl-C
    python scripts/stats.py tcp://host:5555 --json | jq .combined_fps

All figures are of one snapshot, which the daemon takes each second and numbers (seq); /metrics and systemd's status
line show the same. FPS and busy share are those of the last 10 s (window_s), the rest is since the daemon started.
CPUs, preload and task queue are what a worker found in place; red where its plan wanted something else.

Exit codes: 0 shown · 2 wrong arguments · 3 no daemon.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daemon.client import DEFAULT_ENDPOINT, Client, HandshakeError
from daemon.program import add_keys, make_client
from daemon.spawn import differences
from daemon.stats import STAGE_BOUNDS_S

ANSWER_S = 3.0  # a daemon that runs answers at once
REFRESH_S = 1.0  # the daemon takes a snapshot each second

EXIT_USAGE, EXIT_NO_DAEMON = 2, 3

GOOD, WARN, BAD = "green", "yellow", "bold red"
STATE_STYLES = {"ready": GOOD, "starting": WARN, "stopping": WARN, "backoff": BAD, "failed": BAD, "silent": BAD}

Snapshot = Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    show = _print_json if arguments.json else _print_tables
    try:
        with make_client(arguments, ANSWER_S) as client, contextlib.suppress(KeyboardInterrupt):
            snapshot = first_snapshot(client)
            if arguments.watch:
                _watch(client, snapshot, show)
            else:
                show(snapshot)
    except ValueError as error:
        print(f"stats: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (TimeoutError, HandshakeError) as error:
        print(f"stats: {error}", file=sys.stderr)
        return EXIT_NO_DAEMON
    return 0


def first_snapshot(client: Client) -> Snapshot:
    """The latest snapshot; waits for a daemon in its first second, which has none yet. Raises TimeoutError."""
    deadline = time.monotonic() + client.timeout_s
    while not (snapshot := client.stats()):
        if time.monotonic() >= deadline:
            raise TimeoutError(f"the daemon at {client.endpoint} takes no snapshots")
        time.sleep(0.1)
    return snapshot


def _watch(client: Client, snapshot: Snapshot, show: Callable[[Snapshot], None]) -> None:
    """Each second anew, on a terminal in place. A daemon that is restarted meanwhile is waited for."""
    if show is _print_tables and Console().is_terminal:
        with Live(tables(snapshot), auto_refresh=False) as live:
            _follow(client, lambda found, note: live.update(Group(tables(found), note), refresh=True), snapshot)
    else:
        show(snapshot)
        _follow(client, lambda found, note: None if note else show(found), snapshot)


def _follow(client: Client, show: Callable[[Snapshot, Text], None], snapshot: Snapshot) -> None:
    while True:
        time.sleep(REFRESH_S)
        note = Text()
        try:
            snapshot = client.stats() or snapshot
        except TimeoutError as error:
            note = Text(str(error), BAD)
        show(snapshot, note)


def _print_json(snapshot: Snapshot) -> None:
    print(json.dumps(snapshot), flush=True)


def _print_tables(snapshot: Snapshot) -> None:
    Console().print(tables(snapshot))


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(snapshot: Snapshot) -> RenderableType:
    """A snapshot for people."""
    parts: list[RenderableType] = [_headline(snapshot), _devices(snapshot["devices"]), _processes(snapshot["devices"])]
    parts += [Text(note, BAD) for device in snapshot["devices"] for note in _notes(device)]
    if any(histogram["count"] for histogram in snapshot["stages"].values()):
        parts.append(_stages(snapshot["stages"]))
    return Group(*parts)


def _headline(snapshot: Snapshot) -> Text:
    queue, failures = snapshot["queue"], snapshot["failures"]
    line = Text.assemble(
        "combined ", (f"{snapshot['combined_fps']:.2f} FPS", "bold"), f" over {snapshot['window_s']:g} s · ",
        f"{queue['jobs']} waiting ({_bytes(queue['bytes'])}), {snapshot['leased']} leased · ",
        f"{snapshot['answered']} answered · ",
    )  # fmt: skip
    told = ", ".join(f"{count} {code}" for code, count in sorted(failures.items()))
    line.append(told or "no failures", BAD if told else "")
    line.append(f" · seq {snapshot['seq']}")
    if snapshot["degraded"]:
        line.append(" · degraded" if snapshot["serving"] else " · not serving", BAD)
    return line


def _devices(devices: Iterable[Mapping[str, Any]]) -> Table:
    table = _table("device", "state", numbers=("FPS", "busy", "images", "memory", "restarts", "pid"))
    for device in devices:
        table.add_row(
            device["device"],
            Text(device["state"], STATE_STYLES.get(device["state"], "")),
            f"{device['fps']:.2f}",
            f"{device['busy_share']:.0%}",
            str(device["images"]),
            _memory(device),
            Text(str(device["restarts"]), WARN if device["restarts"] else ""),
            str(device["pid"] or "-"),
        )
    return table


def _processes(devices: Iterable[Mapping[str, Any]]) -> Table:
    """What each worker's process was to have, and has."""
    table = _table("device", "CPUs", "preload", "task queue")
    for device in devices:
        table.add_row(device["device"], *(_effect(device, key) for key in ("cpus", "preload", "task_queue")))
    return table


def _table(*names: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory(device: Mapping[str, Any]) -> str:
    text = _bytes(device["memory_bytes"])
    return f"{text} + {_bytes(device['device_memory_bytes'])} on device" if device["device_memory_bytes"] else text


def _effect(device: Mapping[str, Any], key: str) -> Text:
    """What is in place, and beside it what was wanted where that is something else."""
    wanted, actual = _short(device["wanted"].get(key)), _short(device["actual"].get(key))
    if not device["actual"]:
        return Text(wanted, "dim")  # not up yet
    # What is not wanted is not set: it is no difference when the environment has it all the same.
    if wanted in (actual, "-"):
        return Text(actual)
    return Text(f"{actual}, wanted {wanted}", BAD)


def _short(value: Any) -> str:
    return "-" if value is None else PurePath(value).name if isinstance(value, str) else str(value)


def _notes(device: Mapping[str, Any]) -> list[str]:
    """Why a device is not ready, and what of its plan did not take effect."""
    found = [f"{device['state']}: {device['reason']}"] if device["reason"] else []
    if device["actual"]:
        found += differences(device["wanted"], device["actual"])
    return [f"{device['device']} {note}" for note in found]


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _table("stage", numbers=("mean", "about p50", "about p99"))
    for stage, histogram in stages.items():
        if histogram["count"]:
            mean = _duration(histogram["sum"] / histogram["count"])
            table.add_row(stage, mean, *(_quantile_text(histogram["buckets"], share) for share in (0.5, 0.99)))
    return table


def quantile(buckets: Sequence[int], share: float) -> float | None:
    """Estimate of the time in seconds that `share` (0 to 1) of the observations stayed below, as Prometheus does.

    `buckets` are cumulative counts at `STAGE_BOUNDS_S` and above; between two bounds the times are taken as spread
    evenly. None where it lies above the last bound. There must be an observation.
    """
    rank = share * buckets[-1]
    place = next(place for place, count in enumerate(buckets) if count >= rank and count)
    if place == len(STAGE_BOUNDS_S):
        return None
    low, below = (STAGE_BOUNDS_S[place - 1], buckets[place - 1]) if place else (0.0, 0)
    return low + (STAGE_BOUNDS_S[place] - low) * (rank - below) / (buckets[place] - below)


def _quantile_text(buckets: Sequence[int], share: float) -> str:
    seconds = quantile(buckets, share)
    return f"> {_duration(STAGE_BOUNDS_S[-1])}" if seconds is None else _duration(seconds)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", metavar="ENDPOINT", nargs="?", default=DEFAULT_ENDPOINT,
                        help=f"of the daemon, default {DEFAULT_ENDPOINT}")  # fmt: skip
    add_keys(parser)
    parser.add_argument("--watch", action="store_true", help="refresh each second until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="the snapshot as one line of JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
