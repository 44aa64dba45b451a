"""This process: whose death ends it, what took effect of the plan that it was started by, how many threads it has."""
from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from blendmaskd.settings import Settings
from blendmaskd.settings.schema import MOST_HOST_THREADS
from blendmaskd.topology import format_cpus
from blendmaskd.wanted import Actual, Wanted, number

if TYPE_CHECKING:
    from blendmaskd_workers.devices import Device

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """From now on the kernel sends `number` when the parent dies, however it dies: no orphan keeps a device."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def observe(
    wanted: Wanted, device: Device | None, exact: bool | None = None, model: str | None = None
) -> Actual:
    """What took effect in this process, by the libraries' own account where `device` gives one."""
    cpus = format_cpus(os.sched_getaffinity(os.getpid()))
    actual = Actual(
        cpus=cpus,
        thread_cpus={thread: mask for thread, mask in thread_masks().items() if mask != cpus},
        threads=number(os.environ, "OMP_NUM_THREADS"),
        task_queue=number(os.environ, "TASK_QUEUE_ENABLE"),
        preload=wanted.preload if wanted.preload and _mapped(wanted.preload) else None,
        env={name: os.environ[name] for name in wanted.env if name in os.environ},
    )
    effects = {} if device is None else device.effects()
    return msgspec.structs.replace(actual, exact=exact, model=model, **effects)


def thread_masks() -> dict[str, str]:
    """``name/tid`` of every thread of this process to its CPU list."""
    masks = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            status = (task / "status").read_text()
        except OSError:  # it ended meanwhile
            continue
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        masks[f"{fields['Name']}/{task.name}"] = fields["Cpus_allowed_list"]
    return masks


def _mapped(library: str) -> bool:
    """Whether a library is in this process's memory; the kernel names the file behind links."""
    real = os.fsencode(os.path.realpath(library))
    return any(line.endswith(real) for line in Path("/proc/self/maps").read_bytes().splitlines())


def host_threads(settings: Settings, cpus: int, quota: float) -> int:
    """What `runtime.host_threads` comes to with so many CPUs, and so many CPUs' time for all workers together."""
    if settings.runtime.host_threads != "auto":
        return settings.runtime.host_threads
    share = int(min(cpus, quota / len(settings.devices)))
    return min(max(share, 2), MOST_HOST_THREADS)  # one to decode the next image, one to finish the last
