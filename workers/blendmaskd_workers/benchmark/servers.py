"""What is loaded: a daemon of our own, one that runs already, or the plain ZeroMQ path; and what its processes use.

A server of our own is there, with all its devices, when the ``with`` is entered, and gone when it is left.
"""
from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from blendmaskd.client.blocking import Client
from blendmaskd.client.connection import Keys
from blendmaskd.programs.connecting import wait_for_daemon
from blendmaskd.programs.errors import NoDaemonError
from blendmaskd.settings import Settings
from blendmaskd_workers import engines
from blendmaskd_workers.process import end_with_parent

STOP_S = 60.0  # for a daemon of our own to drain; its own bound is `drain_s`
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Server:
    """Processes are psutil's; none where they are not of this host or not known."""

    endpoint: str
    broker: psutil.Process | None
    workers: tuple[psutil.Process, ...]
    tells_stats: bool = True
    keys: Keys | None = None  # of its clients

    @property
    def parts(self) -> dict[str, list[psutil.Process]]:
        """Those that are known."""
        parts = {"broker": [self.broker] if self.broker else [], "workers": list(self.workers)}
        return {name: part for name, part in parts.items() if part}


@contextmanager
def own_daemon(overrides: Sequence[str], settings: Settings, checkout: Path | None = None) -> Iterator[Server]:
    """A daemon with these settings, of another checkout where one is named. Raises `NoDaemonError` when it, or one of
    its devices, does not come up.
    """
    packages = {"PYTHONPATH": f"{checkout}/daemon:{checkout}/workers"} if checkout else {}
    with tempfile.TemporaryDirectory(prefix="blendmaskd-benchmark-") as folder:
        endpoint = f"ipc://{folder}/client.sock"
        argv = [sys.executable, "-P", "-m", "blendmaskd", "--log-level", "warning"]
        for override in [*overrides, f"endpoints.clients=[{endpoint}]", "endpoints.metrics=null"]:
            argv += ["--set", override]
        drain_with_parent = functools.partial(end_with_parent, signal.SIGTERM)  # however this program dies
        process = subprocess.Popen(argv, env={**os.environ, **packages}, preexec_fn=drain_with_parent)
        try:
            pids = _wait_for_devices(endpoint, process, settings)
            yield Server(endpoint, psutil.Process(process.pid), tuple(map(psutil.Process, pids)))
        finally:
            _end(process)


def running_daemon(client: Client, wait_s: float) -> Server:
    """The one that runs already where this client connects. Raises `NoDaemonError` when nobody answers there."""
    with client:
        wait_for_daemon(client, wait_s)
        pids = [device["pid"] for device in client.stats()["devices"] if device["pid"]]
    workers = tuple(psutil.Process(pid) for pid in pids if _is_a_worker(pid))
    if len(workers) < len(pids):
        return Server(client.endpoint, None, (), keys=client.keys)  # of another host
    return Server(client.endpoint, workers[0].parent() if workers else None, workers, keys=client.keys)


@contextmanager
def bare_path(settings: Settings, answer_bytes: int, kind: str) -> Iterator[Server]:
    """The plain ZeroMQ path with a sleeping process for each device, see `blendmaskd_workers.benchmark.bare`."""
    with tempfile.TemporaryDirectory(prefix="blendmaskd-benchmark-") as folder:
        front, back = (f"ipc://{folder}/{name}.sock" for name in ("front", "back"))
        program_argv = [sys.executable, "-P", "-m", "blendmaskd_workers.benchmark.bare"]
        worker = [*program_argv, "worker", back, json.dumps(seconds_by_batch(settings)), str(answer_bytes)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for argv in [[*program_argv, kind, front, back], *([worker] * len(settings.devices))]:
                processes.append(subprocess.Popen(argv, stdout=subprocess.PIPE))
            for process in processes:
                _wait_for_line(process)
            broker, *workers = (psutil.Process(process.pid) for process in processes)
            yield Server(front, broker, tuple(workers), tells_stats=False)
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def seconds_by_batch(settings: Settings) -> list[float]:
    """What the timed engine takes for 1, 2, … images, up to the batch that its worker begins with."""
    table = settings.timed.latency_ms
    sizes = sorted(table)
    batch = engines.best_batch(settings)
    return [float(np.interp(size, sizes, [table[each] for each in sizes])) / 1000 for size in range(1, batch + 1)]


def cpu_seconds(server: Server) -> dict[str, float]:
    """CPU time so far of ``broker`` and ``workers``, as far as known. Raises `NoDaemonError` when one has ended."""
    return {name: sum(map(_cpu_seconds, part)) for name, part in server.parts.items()}


def memory_mb(server: Server) -> dict[str, float | str]:
    """Memory of ``broker`` and ``workers`` in MB, as far as known: ``kind`` is pss (shared pages shared out) or rss."""
    parts = server.parts.items()
    try:
        return {"kind": "pss", **{name: sum(one.memory_full_info().pss for one in part) / 1e6 for name, part in parts}}
    except psutil.AccessDenied:  # another user's
        return {"kind": "rss", **{name: sum(one.memory_info().rss for one in part) / 1e6 for name, part in parts}}


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        raise NoDaemonError(f"process {process.pid} of the server ended while it was measured; see its log") from None
    return float(times.user + times.system)


def _wait_for_devices(endpoint: str, process: subprocess.Popen[bytes], settings: Settings) -> list[int]:
    deadline = time.monotonic() + settings.restarts.start_timeout_s
    with Client(endpoint, timeout_s=1.0) as client:
        while True:
            if process.poll() is not None:
                raise NoDaemonError(f"the daemon ended with {process.returncode}; see above")
            devices = _devices(client)
            if devices and all(device["state"] == "ready" for device in devices):
                return [device["pid"] for device in devices]
            down = [f"{device['device']} {device['state']}: {device['reason']}" for device in devices
                    if device["state"] not in ("starting", "ready")]  # fmt: skip
            if down or time.monotonic() >= deadline:
                raise NoDaemonError(f"a device does not come up: {'; '.join(down) or 'still starting'}")
            time.sleep(POLL_S)


def _devices(client: Client) -> list[dict[str, Any]]:
    """Empty while nobody answers."""
    try:
        return list(client.stats().get("devices", []))
    except TimeoutError:
        return []


def _wait_for_line(process: subprocess.Popen[bytes]) -> None:
    assert process.stdout is not None
    if not process.stdout.readline():
        raise NoDaemonError(f"{' '.join(map(str, process.args))} ended; see above")  # type: ignore[arg-type]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _is_a_worker(pid: int) -> bool:
    try:
        return "blendmaskd_workers" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
