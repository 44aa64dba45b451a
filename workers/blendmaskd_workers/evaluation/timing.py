"""Timing devices in processes of their own, started as the daemon starts workers; torch is never imported here.

`Stopwatch` is one such process, at the other end of which `blendmaskd_workers.evaluation.stopwatch` runs;
`time_together` asks one or several at the same time; `figures` sums up. Latencies are in milliseconds.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from blendmaskd.core import launch_plan
from blendmaskd.core.launch_plan import Basis
from blendmaskd.shell import launch
from blendmaskd.wanted import Actual, differences
from blendmaskd_workers.evaluation.operators import Operator

END_S = 30.0  # for a process to end by itself


class CannotTime(Exception):
    """A device that cannot be timed, or not in this way; the text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    iterations: int
    warm_up: int
    batch: int = 1
    dtype: str = "fp32"
    profile: bool = False  # the operators' times instead of the latencies


class Stopwatch:
    """A process that times one device, for as long as the context lasts."""

    actual: Actual  # what took effect; known once `ready`

    def __init__(self, device: str, basis: Basis, size: str) -> None:
        """Plan it; `size` is the photograph's, HEIGHTxWIDTH. Raises `HostError` for a device that is hidden."""
        self.device = device
        self.plan = launch_plan.plan(
            device, basis, os.environ, generation=1,
            arguments=("-m", "blendmaskd_workers.evaluation.stopwatch", size),
        )  # fmt: skip
        self.network_input = ""  # what the network sees of a photograph of that size, HEIGHTxWIDTH

    def __enter__(self) -> Self:
        """Start it; it is `ready` later. Raises `HostError` or OSError."""
        self.process = launch.launch(self.plan, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.process.kill()  # nobody wants what it measures
        try:
            self.process.communicate(timeout=END_S)  # which ends its input
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def ready(self) -> None:
        """Wait until the network is loaded. Raises `CannotTime`."""
        answer = self.answer()
        self.actual, self.network_input = msgspec.convert(answer["actual"], Actual), answer["network_input"]

    def warnings(self) -> list[str]:
        """Where the process is not as it was planned, a sentence each; once it is ready."""
        assignment = self.plan.assignment
        found = differences(assignment.wanted, self.actual, assignment.settings.worker_env)
        return [*self.plan.warnings, *(f"{self.device}: {text}" for text in found)]

    def ask(self, **request: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died, and the missing answer tells how
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The answer to a step of a request. Raises `CannotTime`."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise CannotTime(f"{self.device}: its process ended with exit code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise CannotTime(f"{self.device}: {answer['failed']}")
        return answer


def profile(one: Stopwatch, request: Request) -> list[Operator]:
    """The operators of a batch on a device, the longest first. Raises `CannotTime`."""
    one.ask(**dataclasses.asdict(dataclasses.replace(request, profile=True)))
    return [Operator(**operator) for operator in one.answer()["operators"]]


def time_together(stopwatches: Sequence[Stopwatch], request: Request) -> list[list[float]]:
    """The latencies of each device, all of which are busy until the last has finished. Raises `CannotTime`."""
    _step(stopwatches, **dataclasses.asdict(request))  # to warm up
    answers = _step(stopwatches)
    _step(stopwatches)
    return [answer["latencies_ms"] for answer in answers]


def _step(stopwatches: Sequence[Stopwatch], **request: Any) -> list[dict[str, Any]]:
    for one in stopwatches:
        one.ask(**request)
    return [one.answer() for one in stopwatches]


def figures(latencies_ms: Sequence[float], batch: int = 1) -> dict[str, float]:
    """What a measurement comes to: milliseconds, images per second, coefficient of variation in percent.

    Images per second are by the median: what else happens on the host for a moment does not count.
    """
    average, deviation = statistics.fmean(latencies_ms), statistics.pstdev(latencies_ms)
    median = statistics.median(latencies_ms)
    return {
        "avg_ms": average,
        "median_ms": median,
        "std_ms": deviation,
        "min_ms": min(latencies_ms),
        "max_ms": max(latencies_ms),
        "fps": 1000 * batch / median,
        "cv_percent": 100 * deviation / average,
    }
