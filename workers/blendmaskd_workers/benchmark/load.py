"""Load: when which client sends, and what the answers amount to. Pure: times in, times and figures out.

Two kinds of load. In a **closed loop** each client has one job in flight and sends the next when it has its answer: it
shows what the server can do. In an **open loop** jobs come at random, at a mean rate, whatever the server does: it
shows what users wait. There latency counts from the time at which a job *should* have been sent, so that a server (or
this program) that falls behind cannot hide its queue by delaying the questions ("coordinated omission").

Times are seconds of one monotonic clock. No socket, clock or thread belongs in here.
"""
from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

FAILED_PAUSE_S = 0.1  # before a closed-loop client's next job: one that is refused at once must not become a flood
LATE_S = 0.001  # a send later than this is said
NO_ANSWER = "no-answer"  # beside the codes of `blendmaskd.protocol.Code`
PERCENTILES = (50, 90, 99)


class Sample(NamedTuple):
    """What became of one job."""

    intended: float  # when it should have been sent
    sent: float
    answered: float  # inf: never
    code: str = ""  # why it failed; empty: a result
    wrong: bool = False  # a result that is not this image's


class ClosedLoop:
    """`clients`, each with one job in flight, from `start` on. Nothing says when they should send: none is late."""

    def __init__(self, clients: int, start: float) -> None:
        self._idle = [(start, client) for client in range(clients)]

    def due(self, now: float) -> Iterator[tuple[int, float | None]]:
        """The jobs to send now: client (0-based), and the time at which it should have been sent; None: when it is."""
        while self._idle and self._idle[0][0] <= now:
            yield heapq.heappop(self._idle)[1], None

    def next_due(self) -> float:
        """When there is something to send next; inf: not before an answer."""
        return self._idle[0][0] if self._idle else math.inf

    def answered(self, client: int, now: float, failed: bool) -> None:
        """A job of this client has its answer."""
        heapq.heappush(self._idle, (now + (FAILED_PAUSE_S if failed else 0.0), client))


class OpenLoop:
    """A Poisson process: jobs at a mean `rate` per second with exponential gaps, the clients taking turns."""

    def __init__(self, rate: float, clients: int, start: float, seed: int) -> None:
        self._rate = rate
        self._random = random.Random(seed)
        self._clients = itertools.cycle(range(clients))
        self._next = start + self._gap()

    def due(self, now: float) -> Iterator[tuple[int, float | None]]:
        while self._next <= now:
            intended, self._next = self._next, self._next + self._gap()
            yield next(self._clients), intended

    def next_due(self) -> float:
        return self._next

    def answered(self, client: int, now: float, failed: bool) -> None:
        pass

    def _gap(self) -> float:
        return self._random.expovariate(self._rate)


Schedule = ClosedLoop | OpenLoop


def rate(samples: Sequence[Sample], start: float, end: float) -> float:
    """Results per second that came from `start` to `end`."""
    return sum(start <= sample.answered < end and not sample.code for sample in samples) / (end - start)


def figures(samples: Sequence[Sample], start: float, end: float) -> dict[str, Any]:
    """Throughput from `start` to `end`, and what became of the jobs that should have been sent in that time.

    Keys: ``images`` (results that came in that time), ``fps``, ``jobs``, ``p50_ms``, ``p90_ms``, ``p99_ms``,
    ``max_ms`` (latencies of results; nan without any), ``failures`` ({code: n}), ``wrong``, ``late_sends`` (over 1 ms)
    and ``latest_send_ms``.
    """
    jobs = [sample for sample in samples if start <= sample.intended < end]
    latencies_ms = sorted(1000 * (job.answered - job.intended) for job in jobs if not job.code)
    delays = [job.sent - job.intended for job in jobs]
    fps = rate(samples, start, end)
    return {
        "images": round(fps * (end - start)),
        "fps": fps,
        "jobs": len(jobs),
        **{f"p{percent}_ms": percentile(latencies_ms, percent) for percent in PERCENTILES},
        "max_ms": percentile(latencies_ms, 100),
        "failures": dict(Counter(job.code for job in jobs if job.code)),
        "wrong": sum(job.wrong for job in jobs),
        "late_sends": sum(delay > LATE_S for delay in delays),
        "latest_send_ms": 1000 * max(delays, default=0.0),
    }


def percentile(ranked: Sequence[float], percent: float) -> float:
    """The least value that `percent` of the ascending values do not exceed (nearest rank); nan of nothing."""
    if not ranked:
        return math.nan
    return ranked[max(math.ceil(len(ranked) * percent / 100), 1) - 1]
