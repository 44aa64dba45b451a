"""Trials: processes that do what a worker would, all at once, each with the launch plan of its device.

torch is only ever loaded by these processes.
"""
from __future__ import annotations

import functools
import subprocess
import time
from collections.abc import Callable, Mapping

from blendmaskd import discovery
from blendmaskd.check.endpoints import Holder
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan, Preload
from blendmaskd.probe import Probe, among
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd.topology import Cpus, HostError

WEIGHTS = "weights"


class Trial:
    """A process of `python -m blendmaskd_workers`, started by a launch plan as a worker is; or why none could be."""

    def __init__(self, start: Callable[[], LaunchPlan], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self.took_s = 0.0
        self.printed = ""
        self.complaint: str | None = None
        self.plan: LaunchPlan | None = None
        try:
            self.plan = start()
            self._process = launch.launch(self.plan, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except (HostError, OSError) as error:
            self.complaint = str(error)

    def end(self) -> Trial:
        """Wait for it: `printed` or `complaint` hold what came of it."""
        if self.complaint is not None:
            return self
        try:
            printed, complaint = self._process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            self.complaint = f"not finished after restarts.start_timeout_s = {self._timeout_s:g} s"
            return self
        self.took_s = time.monotonic() - self._began
        self.printed = printed.decode(errors="replace")
        code = self._process.returncode
        if code != 0:
            last = (complaint.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]
            self.complaint = last if code > 0 else f"the process that tried it was killed by signal {-code}: {last}"
        return self


def start(
    settings: Settings,
    plan: Mapping[str, Cpus],
    preload: Preload | None,
    serving: Holder | None,
    environment: Mapping[str, str],
) -> dict[str, Trial]:
    """All at once, by device, and `WEIGHTS`; the engine timed loads nothing and opens nothing."""
    if settings.engine == "timed" or not plan:
        return {}

    basis = Basis(settings, plan, preload or Preload(None), discovery.available_cpus(), discovery.cpu_quota())

    def trial(device: str, argument: str) -> Trial:
        arguments = ("-m", "blendmaskd_workers", argument)
        start = functools.partial(launch_plan.plan, device, basis, environment, arguments=arguments)
        return Trial(start, settings.restarts.start_timeout_s)

    tried = [device for device in settings.devices if device.startswith("cpu") or not serving]
    return {WEIGHTS: trial("cpu:0", "--check"), **{device: trial(device, "--probe") for device in tried}}


def probe(trial: Trial) -> Probe:
    """Waits for the trial of a device."""
    trial.end()
    if trial.complaint is not None:
        return Probe(error=trial.complaint)
    return among(trial.printed)
