"""Start the daemon.

    python -m daemon --settings configs/daemon.yaml
    python -m daemon --devices cpu:0 cpu:1 --set model.weights=model_final.pth

Settings come from the file, then the environment (BLENDMASKD__QUEUE__MAX_JOBS=64), then flags; README.md lists them.
Signals: SIGTERM and SIGINT drain and stop (a second one does not wait), SIGHUP reloads settings and weights.
"""
from __future__ import annotations

import argparse
import functools
import logging
import os
import sys

from daemon import server, settings
from daemon.supervisor import EXIT_CANNOT_BOOT


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    logging.basicConfig(level=arguments.log_level.upper(), stream=sys.stderr, format=_log_format())
    load = functools.partial(
        settings.load, arguments.settings, os.environ, arguments.set, devices=arguments.devices
    )
    try:
        loaded = load()
    except settings.SettingsError as error:
        print(f"blendmaskd: {error}", file=sys.stderr)
        return EXIT_CANNOT_BOOT
    if arguments.check:
        return 0
    return server.main_loop(loaded, load)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="blendmaskd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", metavar="FILE", help="YAML settings; without it the defaults hold")
    parser.add_argument("--devices", metavar="DEVICE", nargs="+", help="instead of the file's: npu:0 cuda:0 cpu:0")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, such as batch=2")
    parser.add_argument("--check", action="store_true", help="only check the settings; exit code 78 when they are bad")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    return parser.parse_args(argv)


def _log_format() -> str:
    """The journal has times of its own."""
    return "%(levelname)s %(message)s" if "JOURNAL_STREAM" in os.environ else "%(asctime)s %(levelname)s %(message)s"


if __name__ == "__main__":
    sys.exit(main())
