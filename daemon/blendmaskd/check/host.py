"""What more than one area asks of the host: whose a process is, and this one."""
from __future__ import annotations

import itertools
import os
import pwd
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil


def own_user() -> tuple[str, set[int]]:
    """This process's user by name, or by number where no entry names it, and the groups that it has at its next login.
    """
    try:
        entry = pwd.getpwuid(os.geteuid())
    except KeyError:  # usual in a container
        return str(os.geteuid()), set(os.getgroups())
    return entry.pw_name, set(os.getgrouplist(entry.pw_name, entry.pw_gid))


def is_ours(pid: int) -> bool:
    """Whether a process is a daemon of ours, a worker of one, or an HTTP front."""
    try:
        process = psutil.Process(pid)
        return any(_is_daemon(each.cmdline()) for each in (process, *process.parents()))
    except psutil.Error:
        return False


def devices_of(pid: int | None, wanted: Iterable[str]) -> frozenset[str]:
    """Those that a daemon of ours has workers for; where this user may not see that, those that are wanted."""
    try:
        workers = [worker.cmdline() for worker in psutil.Process(pid).children()] if pid else None
    except psutil.Error:
        workers = None
    if workers is None:
        return frozenset(wanted)
    return frozenset(argv[-1].rpartition(".")[0] for argv in workers if "blendmaskd_workers" in argv)


def _is_daemon(argv: Sequence[str]) -> bool:
    modules = [argument for option, argument in itertools.pairwise(argv) if option == "-m"]
    named = any(Path(argument).name in ("blendmaskd", "blendmaskd-http") for argument in argv[:2])
    return named or not {"blendmaskd", "blendmaskd.http.program"}.isdisjoint(modules)
