"""What the command-line programs around a daemon share: exit codes, connecting, argument types, telling of failures."""
from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.markup import escape

from blendmaskd import files
from blendmaskd.client.blocking import Client, HandshakeError
from blendmaskd.logs import in_a_line

SERVER_KEY_VARIABLE, KEY_VARIABLE = "BLENDMASKD_SERVER_KEY", "BLENDMASKD_KEY"
ANSWER_S = 3.0  # a daemon that runs answers at once

EXIT_FAILED, EXIT_USAGE, EXIT_NO_DAEMON, EXIT_OUTPUT, EXIT_INTERRUPTED = 1, 2, 3, 4, 130

T = TypeVar("T")


class UsageError(ValueError):
    """Arguments that cannot be followed; the text says why."""


class NoDaemonError(RuntimeError):
    """Nobody serves at the endpoint; the text says what was found."""


class OutputError(RuntimeError):
    """What a program should keep cannot be written; the text says which file and why."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An image without a result or without an overlay."""

    path: Path
    code: str  # of `blendmaskd.protocol.Code`, or `overlay`, or `no-answer`
    reason: str


def guarded(name: str, run: Callable[[], int]) -> int:
    """The exit code of a program: what `run` returns, or what its error means, told on stderr."""
    print_anything()
    try:
        return run()
    except UsageError as error:
        code = EXIT_USAGE
        print(f"{name}: {error}", file=sys.stderr)
    except NoDaemonError as error:
        code = EXIT_NO_DAEMON
        print(f"{name}: {error}", file=sys.stderr)
    except OutputError as error:
        code = EXIT_OUTPUT
        print(f"{name}: {error}", file=sys.stderr)
    except OSError as error:
        code = EXIT_FAILED
        print(f"{name}: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    return code


def print_anything() -> None:
    """From now on all text can be printed: what the terminal's encoding lacks is escaped, as on Python's stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def add_connection(parser: argparse.ArgumentParser) -> None:
    """The arguments of `connect`, and how many jobs to keep in flight."""
    parser.add_argument("--window", metavar="N", type=positive, default=16, help="jobs in flight, default 16")
    parser.add_argument("--timeout", metavar="S", type=seconds, default=60.0, help="for an image's answer, default 60")
    parser.add_argument("--wait", metavar="S", type=seconds, default=ANSWER_S,
                        help=f"for a daemon that is starting, default {ANSWER_S:g}")  # fmt: skip
    add_keys(parser)


def add_keys(parser: argparse._ActionsContainer) -> None:
    """The keys among the arguments of `make_client`."""
    parser.add_argument("--server-key", metavar="FILE", help="the daemon's public key, server.key, for a tcp endpoint; "
                        f"default: ${SERVER_KEY_VARIABLE}")  # fmt: skip
    parser.add_argument("--key", metavar="FILE", help="your own secret key, NAME.key_secret, see blendmaskd-keys; "
                        f"default: ${KEY_VARIABLE}")  # fmt: skip


def make_client(arguments: argparse.Namespace, timeout_s: float) -> Client:
    """A client with the keys of flags, or for a tcp endpoint of the environment. Raises ValueError as `Client` does."""
    tcp = arguments.endpoint.startswith("tcp://")
    return Client(
        arguments.endpoint,
        timeout_s=timeout_s,
        server_key=arguments.server_key or (os.environ.get(SERVER_KEY_VARIABLE) if tcp else None),
        key=arguments.key or (os.environ.get(KEY_VARIABLE) if tcp else None),
    )


def connect(arguments: argparse.Namespace) -> Client:
    """A client of a daemon that can serve. Raises `UsageError` for a bad endpoint or key, and `NoDaemonError`."""
    try:
        client = make_client(arguments, arguments.wait)
    except ValueError as error:
        raise UsageError(str(error)) from None
    try:
        wait_for_daemon(client, arguments.wait)
    except BaseException:
        client.close()
        raise
    client.timeout_s = arguments.timeout
    return client


def wait_for_daemon(client: Client, wait_s: float) -> None:
    """Return when a device can serve, or after `wait_s` when one still may: the daemon keeps the jobs until then.

    Raises `NoDaemonError` when nobody answers within `client.timeout_s`, or when all devices have failed.
    """
    deadline = time.monotonic() + wait_s
    try:
        while not (snapshot := client.stats()).get("serving"):
            _refuse_hopeless(client.endpoint, snapshot)
            if time.monotonic() >= deadline:
                return
            time.sleep(0.2)
    except TimeoutError:
        raise NoDaemonError(
            f"no daemon answers at {client.endpoint} within {client.timeout_s:g} s: start one, or check the endpoint "
            f"(endpoints.clients in its settings); --wait S waits longer for one that is starting{client.hint}"
        ) from None
    except HandshakeError as error:
        raise NoDaemonError(str(error)) from None


def _refuse_hopeless(endpoint: str, snapshot: dict[str, Any]) -> None:
    devices = snapshot.get("devices", [])
    if devices and all(device["state"] in ("failed", "ended") for device in devices):
        reasons = "; ".join(f"{device['device']} {device['state']}: {device['reason']}" for device in devices)
        raise NoDaemonError(f"the daemon at {endpoint} has no device that can serve: {reasons}")


class Interruptible:
    """Within it Ctrl-C raises KeyboardInterrupt only in what `wait` runs; what comes elsewhere is kept for the next.

    So it cannot land between the parts of a step, such as an answer's result and its overlay. For main threads.
    """

    def __init__(self) -> None:
        self._waiting = self._interrupted = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def wait(self, run: Callable[[], T]) -> T:
        """What `run` returns, unless Ctrl-C comes or has come."""
        self._waiting = True
        try:
            if self._interrupted:
                raise KeyboardInterrupt
            return run()
        finally:
            self._waiting = False

    def _on_signal(self, *_: object) -> None:
        self._interrupted = True
        if self._waiting:
            raise KeyboardInterrupt


def write_json(path: Path, tree: Any) -> None:
    """Write it whole or not at all: a reader never sees half a file. Floats keep all their digits."""
    with files.whole(path) as beside:
        beside.write_text(json.dumps(tree), encoding="utf-8")


def text_of(path: Path) -> str:
    r"""A path as text that every encoding of Unicode has: bytes of a name that are no UTF-8 are written as ``\xe9``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def tell_failures(console: Console, failures: Iterable[Failure]) -> None:
    """A line for each, whatever its file is called."""
    listed = [
        f"  {escape(in_a_line(text_of(each.path)))}: [red]{each.code}[/]: {escape(in_a_line(each.reason))}"
        for each in failures
    ]
    if listed:
        console.print("\n".join([f"[red]{len(listed)} failed:", *listed]))


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a number from 0 to 1")
    return value


def seconds(text: str) -> float:
    """More than 0, at most a day."""
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text}: expected seconds, more than 0 and at most 86400")
    return value


def count(text: str) -> int:
    """0 or more."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return value


def positive(text: str) -> int:
    """1 or more."""
    if not count(text):
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return int(text)


def percentage(text: str) -> float:
    """A number from 0 to 100."""
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text}: expected percent, 0 to 100")
    return value
