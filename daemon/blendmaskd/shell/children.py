"""Child processes of the daemon: the workers, and the process that tries new settings before they are taken on.

A `Launcher` knows everything that a start needs; a `Child` is a process with a descriptor that tells of its end.
Whether and when one is started or killed is not decided here.
"""
from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from blendmaskd import discovery, spawn, topology
from blendmaskd.settings import Settings


class Child:
    """A process of ours; `pidfd` becomes readable when it has ended."""

    def __init__(self, slot: str, generation: int, plan: spawn.LaunchPlan, stderr: IO[bytes] | None = None) -> None:
        self.name = worker_name(slot, generation)
        self.slot = slot
        self.generation = generation
        self.process = spawn.launch(plan, stderr=stderr)
        self.wanted = plan.wanted
        self.warnings = plan.warnings
        self.actual: dict[str, Any] = {}
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


@dataclasses.dataclass(frozen=True, slots=True)
class Basis:
    """What workers are started by: settings, and what they come to on this host."""

    settings: Settings
    cpus: dict[str, topology.Cpus]
    preload: spawn.Preload


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """What workers may be started by, and the process that tries it together with the weights."""

    basis: Basis
    child: Child
    stderr: IO[bytes]  # a file, which never keeps it waiting
    deadline: float

    def complaint(self) -> str:
        """The end of what it said."""
        with self.stderr as file:
            file.seek(0)
            return file.read().decode(errors="replace").strip()[-2000:]


class Launcher:
    """Starts workers by its `basis`, which may be changed. Raises what `spawn` and `topology` raise, also when it is
    made; OSError where the host has no process, memory or descriptor left.
    """

    def __init__(self, settings: Settings, base_environment: dict[str, str]) -> None:
        self.token = secrets.token_hex(16)  # a worker proves with it that this run of the daemon started it
        self._environment = base_environment
        cpus = discovery.host_plan(settings.devices, settings.runtime.cpus)
        self.basis = Basis(settings, cpus, spawn.resolve_preload(settings.runtime.preload))

    def worker(self, slot: str, generation: int, endpoint: str) -> Child:
        """Start a worker, which connects to `endpoint`."""
        return Child(slot, generation, self._plan(slot, generation, endpoint, self.basis))

    def try_out(self, settings: Settings, endpoint: str, now: float) -> Candidate:
        """Start a process that loads these settings and weights on the CPU; it ends with 0 when both are good."""
        preload = spawn.resolve_preload(settings.runtime.preload)
        cpus, old = self.basis.cpus, self.basis.settings
        if (settings.devices, settings.runtime.cpus) != (old.devices, old.runtime.cpus):
            # only then: npu-smi can take seconds, in which no job would move
            cpus = discovery.host_plan(settings.devices, settings.runtime.cpus)
        basis = Basis(settings, cpus, preload)
        plan = self._plan("cpu:0", 0, endpoint, basis, ["--check"])
        stderr = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            child = Child("check", 0, plan, stderr)
        except BaseException:
            stderr.close()
            raise
        return Candidate(basis, child, stderr, now + settings.restarts.start_timeout_s)

    def _plan(
        self, slot: str, generation: int, endpoint: str, basis: Basis, arguments: Sequence[str] = ()
    ) -> spawn.LaunchPlan:
        return spawn.plan(
            slot,
            generation,
            basis.settings,
            basis.cpus.get(slot) or discovery.available_cpus(),
            base_environment=self._environment,
            endpoint=endpoint,
            token=self.token,
            preload=basis.preload,
            arguments=("-m", "blendmaskd_workers", *arguments),
        )


def worker_name(slot: str, generation: int) -> str:
    """Its identity on the wire, never used twice."""
    return f"{slot}.{generation}"


def how_it_ended(code: int) -> str:
    """An exit code, as of `subprocess`, in words."""
    if -code in list(signal.Signals):
        return f"killed by {signal.Signals(-code).name}"
    if code < 0:
        return f"killed by signal {-code}"
    return f"exited with code {code}"
