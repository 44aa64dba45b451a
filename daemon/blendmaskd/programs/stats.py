"""Show the state of a running daemon: devices, FPS, queue, failures, where the time goes.

    python scripts/stats.py                                   the daemon of the systemd unit
    python scripts/stats.py ipc:///tmp/x/client.sock --watch  every second, until Ctrl-C
    python scripts/stats.py tcp://host:5555 --json | jq .combined_fps

All figures come from one snapshot, which the daemon takes every second and numbers (seq); /metrics and systemd's status
line show the same one. FPS, busy share and the latency shown by --watch cover the last 10 s (window_s); everything else
counts from the daemon's start. CPUs, preload and task queue are what the worker actually found, in red where that
differs from its plan.

--watch also shows the history of combined FPS, recent failures and, if the daemon is on this host and npu-smi is
installed, each NPU's temperature, power and health, for which this program runs npu-smi every few seconds.

Exit codes: 0 shown · 1 into a pipe that was closed · 2 wrong arguments · 3 no daemon · 4 the output cannot be written.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live

from blendmaskd.client.blocking import DEFAULT_ENDPOINT, Client, HandshakeError
from blendmaskd.output import Help
from blendmaskd.programs.connecting import ANSWER_S, add_keys, make_client
from blendmaskd.programs.errors import NoDaemonError, guarded
from blendmaskd.programs.readings import Readings
from blendmaskd.programs.tables import Snapshot, tables
from blendmaskd.programs.watch import View

REFRESH_S = 1.0  # the daemon takes a snapshot each second


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("stats", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    show = _print_json if arguments.json else _print_tables
    try:
        with make_client(arguments, ANSWER_S) as client, contextlib.suppress(KeyboardInterrupt):
            snapshot = first_snapshot(client)
            if arguments.watch:
                _watch(client, snapshot, show)
            else:
                show(snapshot)
    except (TimeoutError, HandshakeError) as error:
        raise NoDaemonError(str(error)) from None
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
        _watch_on_terminal(client, snapshot)
    else:
        show(snapshot)
        _follow(client, lambda found, note: None if note else show(found), snapshot)


def _watch_on_terminal(client: Client, snapshot: Snapshot) -> None:
    with contextlib.ExitStack() as stack:
        here = client.endpoint.startswith("ipc://") and shutil.which("npu-smi")  # the devices are this host's
        view = View(stack.enter_context(Readings()) if here else None)
        view.update(snapshot)
        live = stack.enter_context(Live(view, screen=True, auto_refresh=False))
        live.refresh()

        def show(found: Snapshot, note: str) -> None:
            view.update(found, note)
            live.refresh()

        _follow(client, show, snapshot)


def _follow(client: Client, show: Callable[[Snapshot, str], None], snapshot: Snapshot) -> None:
    """`show` the latest snapshot each second, and why there is no newer one."""
    while True:
        time.sleep(REFRESH_S)
        note = ""
        try:
            snapshot = client.stats() or snapshot
        except TimeoutError as error:
            note = str(error)
        show(snapshot, note)


def _print_json(snapshot: Snapshot) -> None:
    print(json.dumps(snapshot), flush=True)


def _print_tables(snapshot: Snapshot) -> None:
    Console().print(tables(snapshot))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("endpoint", metavar="ENDPOINT", nargs="?", default=DEFAULT_ENDPOINT,
                        help=f"the daemon's, default {DEFAULT_ENDPOINT}")  # fmt: skip
    add_keys(parser)
    parser.add_argument("--watch", action="store_true", help="refresh every second until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="print the snapshot as one line of JSON")
    return parser.parse_args(argv)
