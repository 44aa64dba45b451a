"""Start the daemon, or first check whether this host can serve.

    blendmaskd check --settings configs/daemon.yaml        # see blendmaskd check --help
    blendmaskd --settings configs/daemon.yaml              # or python -m blendmaskd
    blendmaskd --devices cpu:0 cpu:1 --set model.weights=R_50_1x.pth

Settings are read from the file, then from the environment (BLENDMASKD__QUEUE__MAX_JOBS=64), then from flags, each
overriding the one before; docs/settings.md lists them.
Signals: SIGTERM and SIGINT drain and stop (another one, a second later or more, stops at once), SIGHUP reloads settings
and weights. What the parent ignored or blocked is reset.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from blendmaskd import commands, flags, logs, settings
from blendmaskd.assignment import EXIT_CANNOT_BOOT

if TYPE_CHECKING:
    from blendmaskd.shell.signals import Signals


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    from blendmaskd.shell import signals  # of Linux; this module can be imported anywhere

    signals.reset()
    if argv[:1] == ["check"]:
        return _check(argv[1:])
    arguments = _parse(argv)
    if arguments.log_level:
        arguments.set.append(f"log.level={arguments.log_level}")
    with signals.Signals() as caught:
        return _serve(flags.loader(arguments), arguments.check_settings, caught)


def _serve(load: Callable[[], settings.Settings], only_check: bool, signals: Signals) -> int:
    try:
        loaded = load()
    except settings.SettingsError as error:
        return _refused(error)
    if only_check:
        return 0
    from blendmaskd.shell import server  # what it needs, a check of settings does not

    logs.configure(loaded.log)
    try:
        return server.Server(loaded, load, signals).run()
    except server.CANNOT_START as error:
        return _refused(error)


def _refused(error: Exception) -> int:
    with contextlib.suppress(OSError):  # a stderr that takes no more changes nothing
        print(f"blendmaskd: {error}", file=sys.stderr)
    return EXIT_CANNOT_BOOT


def _check(argv: list[str]) -> int:
    from blendmaskd.check import program as check
    from blendmaskd.programs.errors import guarded

    parser = flags.parser("blendmaskd check", check.__doc__)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
    return guarded("blendmaskd check", lambda: check.main(flags.loader(arguments), arguments.json))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = flags.parser("blendmaskd", __doc__)
    parser.add_argument("--check-settings", action="store_true", help="only check them; exit code 78 if invalid")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], help="override log.level")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(commands.serve())
