"""Child processes of the daemon: the workers, and the process that tries new settings before they are taken on.

A `Launcher` knows everything that a start needs; a `Child` is a process with a descriptor that tells of its end.
Whether and when one is started or killed is not decided here.
"""
from __future__ import annotations

import os
import secrets
import signal
import tempfile
from collections.abc import Mapping
from typing import IO

from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan
from blendmaskd.shell import launch
from blendmaskd.wanted import Actual


class Child:
    """A process of ours; `pidfd` becomes readable when it has ended."""

    def __init__(self, plan: LaunchPlan, stderr: IO[bytes] | None = None) -> None:
        self.name = plan.assignment.identity
        self.slot = plan.assignment.device
        self.generation = plan.assignment.generation
        self.wanted = plan.assignment.wanted
        self.warnings = plan.warnings
        self._stderr = stderr
        self.process = launch.launch(plan, stderr=stderr)
        self.actual: Actual | None = None  # not up yet
        try:
            self.pidfd = os.pidfd_open(self.process.pid)
        except OSError:  # out of descriptors, say: nobody would hear of its end
            self.process.kill()
            self.process.wait()
            raise

    def reap(self) -> int:
        """Its exit code, negative for a signal; waits for its end."""
        os.close(self.pidfd)
        return self.process.wait()

    def complaint(self) -> str:
        """The end of what it said, where it has a stderr of its own."""
        assert self._stderr is not None
        with self._stderr as file:
            file.seek(0)
            return file.read().decode(errors="replace").strip()[-2000:]


class Launcher:
    """Starts processes. Raises `HostError`; OSError where the host has no process, memory or descriptor left."""

    def __init__(self, base_environment: Mapping[str, str]) -> None:
        self.token = secrets.token_hex(16)  # a worker proves with it that this run of the daemon started it
        self._environment = base_environment

    def worker(self, slot: str, generation: int, basis: Basis, endpoint: str) -> Child:
        """Start a worker, which connects to `endpoint`."""
        plan = launch_plan.plan(
            slot, basis, self._environment, generation=generation, endpoint=endpoint, token=self.token
        )
        return Child(plan)

    def check(self, basis: Basis) -> Child:
        """Start a process that loads settings and weights on the CPU; it ends with 0 when both are good."""
        arguments = ("-m", "blendmaskd_workers", "--check")
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 - its own; a pipe would keep it waiting
        return Child(launch_plan.plan("cpu:0", basis, self._environment, arguments=arguments), stderr)


def how_it_ended(code: int) -> str:
    """An exit code, as of `subprocess`, in words."""
    if -code in list(signal.Signals):
        return f"killed by {signal.Signals(-code).name}"
    if code < 0:
        return f"killed by signal {-code}"
    return f"exited with code {code}"
