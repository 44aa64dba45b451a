"""Starting worker processes: asks the host what a plan needs to know, and does what `blendmaskd.core.launch_plan` says.

The environment of the calling process is never edited, torch is never imported.
"""
from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blendmaskd import discovery, files
from blendmaskd.core.launch_plan import TCMALLOC_PACKAGES, Basis, LaunchPlan, Preload
from blendmaskd.settings import Settings
from blendmaskd.topology import HostError, format_cpus

TCMALLOC_NAMES = ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4", "libtcmalloc.so")
LIBRARY_FOLDERS = tuple(
    Path("/usr", folder)
    for folder in (f"lib/{platform.machine()}-linux-gnu", "lib64", "lib", "local/lib64", "local/lib")
)


def basis(
    settings: Settings,
    environment: Mapping[str, str] = os.environ,
    devices: Sequence[str] = (),
    old: Basis | None = None,
) -> Basis:
    """What `devices`, those of the settings unless given, come to on this host. Raises `HostError`."""
    unmoved = old and (settings.devices, settings.runtime.cpus) == (old.settings.devices, old.settings.runtime.cpus)
    known = old.near if old and unmoved else None
    cpus, near = discovery.places(devices or settings.devices, settings.runtime.placed, environment, known)
    preload = resolve_preload(settings.runtime.preload)
    return Basis(settings, cpus, preload, discovery.available_cpus(), discovery.cpu_quota(), near)


def follow_host(basis: Basis) -> Basis:
    """The same by what this process may use now: a cpuset or a quota may be others than when `basis` was made.

    Of the CPUs that the settings name those that are left are used, of a device that has none left its even share.
    """
    available, quota = discovery.available_cpus(), discovery.cpu_quota()
    if (available, quota) == (basis.available, basis.quota):
        return basis
    named = basis.settings.runtime.placed
    left = {device: tuple(sorted(set(cpus).intersection(available))) for device, cpus in named.items()}
    placed = {device: cpus for device, cpus in left.items() if cpus}
    cpus, _ = discovery.places(basis.settings.devices, placed, {}, basis.near)
    return dataclasses.replace(basis, cpus=cpus, available=available, quota=quota)


def launch(plan: LaunchPlan, **popen: Any) -> subprocess.Popen[bytes]:
    """Start the planned process; it has its CPU set from before its first instruction.

    A child inherits the affinity of the thread that starts it, so a thread of its own takes on the worker's CPUs, and
    no code runs between fork and exec (ARCHITECTURE.md: CPU sets by inheritance). That thread lives as long as this
    process, as a worker asks the kernel to end it with the thread that started it.

    Raises `HostError` when the CPUs are gone, OSError when the program cannot be started.
    """
    try:
        _STARTER.submit(int)  # with the first one comes the thread, or does not: what is asked of it stays asked
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    return _STARTER.submit(_start, plan, popen).result()


_STARTER = ThreadPoolExecutor(1, thread_name_prefix="starter")


def _start(plan: LaunchPlan, popen: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, plan.cpus)
    except OSError as error:
        raise HostError(f"{plan.assignment.device}: cannot run on CPUs {format_cpus(plan.cpus)}: {error}") from None
    try:
        return subprocess.Popen(plan.argv, env=plan.environment, **popen)
    finally:
        with contextlib.suppress(OSError):  # these CPUs may be gone meanwhile, and the next start sets its own
            os.sched_setaffinity(0, before)


def resolve_preload(choice: str, folders: Iterable[Path] = LIBRARY_FOLDERS) -> Preload:
    """The library that the setting `runtime.preload` means: ``auto``, ``required``, ``off`` or a path.

    ld.so only warns of a library that it cannot preload, so it is looked for here, first in ld.so's cache, then in
    `folders`. Raises `HostError` when a required or named library is missing.
    """
    if choice == "off":
        return Preload(None, "runtime.preload is off")
    if choice not in ("auto", "required"):
        if not _loadable(Path(choice)):
            raise HostError(f"runtime.preload = {choice}: no such library for this machine ({TCMALLOC_PACKAGES})")
        if re.search("[ :]", choice):
            raise HostError(f"runtime.preload = {choice}: ld.so takes a space or colon for the end of a path: move it")
        return Preload(choice)
    listed = _ldconfig()
    for name in TCMALLOC_NAMES:
        for path in (*listed.get(name, ()), *(folder / name for folder in folders)):
            if _loadable(path):
                return Preload(str(path))
    if choice == "required":
        raise HostError(f"runtime.preload = required: tcmalloc is not installed ({TCMALLOC_PACKAGES})")
    return Preload(None, f"tcmalloc is not installed ({TCMALLOC_PACKAGES})")


def _ldconfig() -> dict[str, list[Path]]:
    """ld.so's cache: soname to paths."""
    listed = discovery.ask_tool(["ldconfig", "-p"], {"PATH": "/sbin:/usr/sbin"})
    found: dict[str, list[Path]] = {}
    for name, path in re.findall(r"^\s+(\S+) \(.*\) => (/.+)$", listed, re.MULTILINE):
        found.setdefault(name, []).append(Path(path))
    return found


def _loadable(path: Path) -> bool:
    """Whether a file is an ELF library of this interpreter's word size, byte order and machine."""
    ours = _elf_identity(Path(sys.executable))
    return ours is not None and _elf_identity(path) == ours


def _elf_identity(path: Path) -> tuple[bytes, bytes] | None:
    try:
        with open(files.open_file(path), "rb") as file:
            head = file.read(20)
    except OSError:
        return None
    return (head[4:6], head[18:20]) if head.startswith(b"\x7fELF") else None
