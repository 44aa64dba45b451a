"""The flags that say what the settings are, of all programs that have settings."""
from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable

from blendmaskd import settings
from blendmaskd.output import Help


def parser(program: str, description: str | None) -> argparse.ArgumentParser:
    """With the flags that `loader` reads."""
    made = argparse.ArgumentParser(prog=program, description=description, formatter_class=Help)
    made.add_argument("--settings", metavar="FILE", help="YAML file; without it the defaults apply")
    made.add_argument("--devices", metavar="DEVICE", nargs="+", help="override devices, such as npu:0 cuda:0 cpu:0")
    made.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting, such as batch=2")
    return made


def loader(arguments: argparse.Namespace) -> Callable[[], settings.Settings]:
    """Reads the settings that the flags mean, anew at each call."""
    return functools.partial(settings.load, arguments.settings, os.environ, arguments.set, devices=arguments.devices)
