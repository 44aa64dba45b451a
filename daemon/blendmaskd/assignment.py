"""What a worker process is told, and what its exit codes mean.

The only module of the start that both sides read: `blendmaskd.core.launch_plan` writes an assignment into the
environment of the worker, which reads it back.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from blendmaskd.settings import Settings
from blendmaskd.wanted import Wanted

ASSIGNMENT = "BLENDMASKD_ASSIGNMENT"
EXIT_CANNOT_BOOT = 78  # sysexits' EX_CONFIG: starting again cannot help
EXIT_OVERTIME = 65  # sysexits' EX_DATAERR: an image took more of a CPU than `limits.max_decode_s`
EXIT_DEVICE_BROKEN = 69  # sysexits' EX_UNAVAILABLE: a fault that no new process mends, by the runtime's error code
EXIT_HOST_LACKS = 75  # sysexits' EX_TEMPFAIL: a file, a CPU, a process that the host may have again later


class AssignmentError(RuntimeError):
    """A process that the daemon did not start as a worker."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker process is told. It travels as JSON in one variable of its environment, out of sight of `ps`."""

    device: str  # the slot: npu:1
    local_device: str  # the same device as the worker sees it: npu:0, cuda:0 or cpu
    generation: int  # which life of the slot
    endpoint: str  # of the broker's socket for workers
    token: str  # proves to the broker that the daemon started this worker
    daemon_pid: int  # whose death ends the worker
    settings: Settings
    wanted: Wanted

    @property
    def identity(self) -> str:
        return identity(self.device, self.generation)


def identity(slot: str, generation: int) -> str:
    """A worker's on the wire, never used twice while the daemon lives: ``npu:1.3``."""
    return f"{slot}.{generation}"


def read(environment: Mapping[str, str]) -> Assignment:
    """What the daemon told this worker. Raises `AssignmentError`."""
    try:
        return msgspec.json.decode(environment[ASSIGNMENT], type=Assignment)
    except KeyError:
        raise AssignmentError(f"{ASSIGNMENT} is not set: workers are started by the daemon") from None
    except msgspec.MsgspecError as error:
        raise AssignmentError(f"{ASSIGNMENT} is malformed: {error}") from None
