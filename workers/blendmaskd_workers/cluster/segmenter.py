"""A worker inside a process of Ray's: an engine on the process's device, behind the daemon's own worker loop.

A Serve replica and a Data actor each have one. It counts what it did as the daemon does for a worker, so that
snapshots have the daemon's form.
"""
from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

import msgspec

from blendmaskd import logs, protocol
from blendmaskd.core.stats import Stats
from blendmaskd.logs import about
from blendmaskd.protocol import Failed
from blendmaskd.settings import Settings
from blendmaskd.wanted import differences, masked
from blendmaskd_workers import engines
from blendmaskd_workers.batching import LARGEST
from blendmaskd_workers.cluster import placement
from blendmaskd_workers.cluster.channel import Answer, LocalChannel, WorkerLost
from blendmaskd_workers.loop import Loop

log = logging.getLogger("blendmaskd.worker")


class Segmenter:
    """Loads the engine and warms it up. Once in a process; its loop runs until `close` or the process ends."""

    def __init__(self, settings: Settings) -> None:
        """Raises `engines.EngineError`, and what `placement.occupy` raises."""
        self._settings = settings
        self.node, plan = placement.occupy(settings)
        assigned = plan.assignment
        self.device = assigned.device
        logs.configure(settings.log, slot=f"{self.node}/{self.device}")
        for warning in plan.warnings:
            log.warning("%s", warning)
        self._lock = threading.Lock()  # for the next
        self._stats = Stats(settings.window_s)
        self._failures: Counter[str] = Counter()
        self._channel = LocalChannel(self.node, self.device, self._report, self._count)
        self.submit = self._channel.submit
        wanted, secret = assigned.wanted, settings.worker_env
        self._wanted = masked(wanted, secret, wanted.env)
        engine = engines.make(settings, assigned.local_device)
        batching = engines.batching(settings)
        engine.load()
        engine.warm_up(settings.warm_up, batching.target())
        loop = Loop(assigned, engine, batching, self._channel)
        threading.Thread(target=self._run, args=[loop], name="loop", daemon=True).start()
        self._actual = masked(self._channel.ready.result().actual, secret, wanted.env)
        for difference in self.differences():
            log.warning("%s", difference)
        log.info("ready", extra=about(slot=f"{self.node}/{self.device}"))

    def differences(self) -> list[str]:
        """Where the process is not what its plan wanted."""
        return differences(self._wanted, self._actual, self._settings.worker_env)

    def trouble(self) -> str | None:
        """Why this worker should be replaced; None while it is well."""
        stalled_s = self._channel.stalled_s()
        if stalled_s > self._settings.restarts.stall_s:
            return f"nothing was finished for {stalled_s:.0f} s although images are held (restarts.stall_s)"
        return self._channel.closed

    def snapshot(self) -> dict[str, Any]:
        """In the form of `blendmaskd.core.stats`, with one device, which has its node beside it."""
        trouble = self.trouble()
        slot = {
            "device": self.device, "node": self.node, "slot": self.device, "generation": 0, "pid": os.getpid(),
            "state": "stopping" if trouble else "ready", "reason": trouble or "", "restarts": 0,
            "wanted": msgspec.to_builtins(self._wanted), "actual": msgspec.to_builtins(self._actual),
            "differences": self.differences(),
        }  # fmt: skip
        with self._lock:
            return self._stats.snapshot(
                time.monotonic(), time.time(), [slot], leased=self._channel.held(),
                answered=0, failures=dict(self._failures),
            )  # fmt: skip

    def close(self) -> None:
        """End the loop; what it still holds is lost."""
        self._channel.stop()

    def _run(self, loop: Loop) -> None:
        reason = "its loop failed"
        try:
            reason = f"its loop ended with exit code {loop.run()}"
        except Exception:
            log.exception("the loop failed")
        finally:
            self._channel.close(reason)

    def _report(self, report: protocol.Report) -> None:
        with self._lock:
            self._stats.report(self.device, report)

    def _count(self, done: Future[Answer | Failed]) -> None:
        if done.cancelled() or isinstance(done.exception(), WorkerLost):
            return
        outcome = done.result()
        with self._lock:
            if isinstance(outcome, Failed):
                self._failures[outcome.code] += 1
            else:
                self._stats.answered(outcome.timings)


def leases_at_once(settings: Settings) -> int:
    """How many images a worker is given at once: two batches, of the largest size that it may come to try."""
    knows = engines.batch_size(settings) != "auto" or settings.batch_latency_ms or settings.engine == "timed"
    return 2 * (engines.best_batch(settings) if knows else LARGEST)
