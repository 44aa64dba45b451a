"""Images that break the timed engine, by their width, and devices that do not start: what `faulty_engine` does.

A worker is made faulty by `worker_env`, a setting for tests. No other engine and no other worker knows of this.
"""
from __future__ import annotations

from enum import IntEnum
from pathlib import Path

HOARD_BYTES = 2 << 30  # that `EATS_MEMORY` takes where nobody stops it
BROKEN_DEVICES = "BLENDMASKD_BROKEN_DEVICES"  # a folder: its file `cpu:1` has the code that workers of cpu:1 exit with
BOOT_S = "BLENDMASKD_BOOT_S"  # seconds that workers take to start

FOLDER = Path(__file__).parent / "faulty_engine"
ROOT = Path(__file__).resolve().parents[2]


class Poison(IntEnum):
    """Widths of images, in pixels, and what each does to its worker."""

    CRASHES_DECODING = 11  # SIGSEGV on a host thread, before the lease is started
    KILLS = 12  # SIGKILL on the device
    RAISES = 13  # an exception on the device
    HANGS = 14  # the device never comes back
    EATS_MEMORY = 15  # until it is refused or the kernel ends it
    EXITS = 16  # exit code 3 in the middle of a run


def worker_env(broken_devices: Path | None = None, boot_s: float = 0.0) -> dict[str, str]:
    """The setting that makes workers faulty; `boot_s` makes them slow to start, as with real weights."""
    env = {"PYTHONPATH": f"{FOLDER}:{ROOT}/tests:{ROOT}/daemon:{ROOT}/workers", BOOT_S: f"{boot_s:g}"}
    return env if broken_devices is None else env | {BROKEN_DEVICES: str(broken_devices)}
