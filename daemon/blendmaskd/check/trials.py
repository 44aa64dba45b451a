"""Trials: processes that do what a worker would, all at once, each with the launch plan of its device.

torch is only ever loaded by these processes.
"""
from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from typing import IO

from blendmaskd import discovery
from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis, LaunchPlan, Preload
from blendmaskd.probe import Probe, among
from blendmaskd.settings import Settings
from blendmaskd.shell import launch
from blendmaskd.topology import Cpus, HostError

WEIGHTS = "weights"
MOST_READ = 1 << 20  # bytes of what a process printed, from its end
LONGEST_LINE = 400
ERROR_CODE = re.compile(r"\[ERROR\] .*\bERR\d{5}\b.*")  # torch_npu's
NOISE = re.compile(r"\s|Traceback \(|\[(INFO|DEBUG|EVENT|WARNING|[IW]\d*)\b|\S*Warning\b|[^ ]+:\d+: \w*Warning\b|"
                   r"\d{4}-\d\d-\d\d\S* (DEBUG|INFO|WARNING)\b|Exception ignored|Current thread")  # fmt: skip


class Trial:
    """A process of `python -m blendmaskd_workers`, started by a launch plan as a worker is; or why none could be."""

    def __init__(self, start: Callable[[], LaunchPlan], timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self.took_s = 0.0
        self.printed = ""
        self.complaint: str | None = None
        self.plan: LaunchPlan | None = None
        # Files: a pipe would last as long as any process of CANN's compiler that has it too.
        self._stdout, self._stderr = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self.plan = start()
            self._process = launch.launch(self.plan, stdout=self._stdout, stderr=self._stderr)
        except (HostError, OSError) as error:
            self.complaint = str(error)

    def end(self) -> None:
        """Wait for it: `printed` or `complaint` hold what came of it."""
        if self.complaint is not None:
            return
        try:
            code = self._process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self.complaint = f"not finished after restarts.start_timeout_s = {self._timeout_s:g} s"
            return
        self.took_s = time.monotonic() - self._began
        self.printed = _end_of(self._stdout)
        if code != 0:
            said = what_it_said(_end_of(self._stderr))
            self.complaint = said if code > 0 else f"the process that tried it was killed by signal {-code}: {said}"


def _end_of(file: IO[bytes]) -> str:
    with file:
        file.seek(max(file.seek(0, os.SEEK_END) - MOST_READ, 0))
        return file.read().decode(errors="replace")


def what_it_said(stderr: str) -> str:
    """The line that says why a process failed: of an exception its first, else the first that is no log or warning.

    torch_npu ends an exception's text with a code and the time, and CANN may say much behind it.
    """
    lines = ["".join(char if char.isprintable() else " " for char in line) for line in stderr.splitlines()]
    begin = max((number for number, line in enumerate(lines) if line.startswith("Traceback (")), default=0)
    for line in lines[begin:]:
        said = ERROR_CODE.sub("", line).rstrip()
        if said and not NOISE.match(said):
            return said[:LONGEST_LINE]
    return next((line.strip()[:LONGEST_LINE] for line in reversed(lines) if line.strip()), "it printed nothing")


def start(
    settings: Settings,
    plan: Mapping[str, Cpus],
    preload: Preload | None,
    held: Collection[str],
    environment: Mapping[str, str],
) -> dict[str, Trial]:
    """All at once, by device, and `WEIGHTS`; the engine timed loads nothing and opens nothing.

    A daemon has those that are `held`, and they are left alone.
    """
    if settings.engine == "timed" or not plan:
        return {}

    basis = Basis(settings, plan, preload or Preload(None), discovery.available_cpus(), discovery.cpu_quota())

    def trial(device: str, argument: str) -> Trial:
        arguments = ("-m", "blendmaskd_workers", argument)
        start = functools.partial(launch_plan.plan, device, basis, environment, arguments=arguments)
        return Trial(start, settings.restarts.start_timeout_s)

    tried = [device for device in settings.devices if device.startswith("cpu") or device not in held]
    return {WEIGHTS: trial("cpu:0", "--check"), **{device: trial(device, "--probe") for device in tried}}


def probe(trial: Trial) -> Probe:
    """Waits for the trial of a device."""
    trial.end()
    if trial.complaint is not None:
        return Probe(error=trial.complaint)
    return among(trial.printed)
