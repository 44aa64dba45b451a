"""Lines about jobs: each change of a job's state where that is asked for, else only failures by no fault of a client.

A line is about its ``job`` and ``client`` (a digest of its identity), and where there is one its ``slot`` and
``lease``, the ``code`` of its answer (``ok`` for a result), and the ``seconds`` from its arrival to that. The steps
come from the broker's core, which logs nothing itself.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable

from blendmaskd.core.actions import DURABLE
from blendmaskd.core.jobs import Step
from blendmaskd.logs import about, shown
from blendmaskd.protocol import Code, shown_job

log = logging.getLogger("blendmaskd")

CLIENTS_FAULT = frozenset(
    {Code.BAD_REQUEST, Code.UNKNOWN_JOB, Code.BAD_IMAGE, Code.TOO_LARGE, Code.BUSY, Code.CANCELLED, Code.UNAUTHORISED}
)
FAILURES_PER_S = 10  # lines; of the others only the number is told
CLIENTS_PER_S = 10  # lines about clients that come and go, or do what they may not


class JobLog:
    """`tracing`: a line for every step. Call `tick` each second."""

    def __init__(self, tracing: bool) -> None:
        self.tracing = tracing
        self._failures = 0  # since the last tick
        self._clients = 0  # lines

    def tell(self, steps: Iterable[Step], now: float) -> None:
        for step in steps:
            failed = step.what == "failed" and step.code not in CLIENTS_FAULT
            self._failures += failed
            if self.tracing or (failed and self._failures <= FAILURES_PER_S):
                _line(logging.WARNING if failed else logging.INFO, step, now)

    def tell_of(self, client: bytes, level: int, text: str, *values: object) -> None:
        """A line about a client, if there were not too many in this second."""
        self._clients += 1
        if self._clients <= CLIENTS_PER_S:
            log.log(level, text, *values, extra=about(client=shown(client)))

    def tick(self) -> None:
        if self._clients > CLIENTS_PER_S:
            log.warning("%d more lines about clients were left out within a second", self._clients - CLIENTS_PER_S)
        self._clients = 0
        untold = 0 if self.tracing else self._failures - FAILURES_PER_S
        if untold > 0:
            log.warning("%d more jobs failed within a second", untold)
        self._failures = 0


def _line(level: int, step: Step, now: float) -> None:
    ended = step.what in ("refused", "answered", "failed", "dropped")
    fields = about(
        job=shown_job(step.job),
        client="durable" if step.client == DURABLE else shown(step.client),
        slot=step.worker,
        lease=step.lease or None,
        code=str(step.code),
        seconds=round(now - step.accepted, 6) if ended else None,
    )
    log.log(level, "%s: %s" if step.reason else "%s%s", step.what, step.reason, extra=fields)
