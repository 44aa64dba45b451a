"""Load a daemon and compare it with the bare device: what of the devices' own rate does a client see?

    python scripts/benchmark.py                          # two timed devices, batch 1, 8 clients, 800x800 raw frames
    python scripts/benchmark.py --batch 2 --clients 16 --seconds 20
    python scripts/benchmark.py --kill                   # kill -9 a worker under load: what do clients see?
    python scripts/benchmark.py --engine native --devices cpu:0 cpu:1 --set model.weights=random.pth

It starts a daemon of its own. The baseline is measured in the same run, before and after: the same engine in a bare
loop, without daemon, transport, decoding and masks. Ratios are worth quoting, absolute figures are this machine's.
"""
from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from rich.console import Console

from daemon import settings as settings_module
from daemon.client import Client, JobFailed
from daemon.settings import Settings
from workers import engines

WARM_UP_S = 2.0


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    overrides = [f"engine={arguments.engine}", f"batch={arguments.batch}", *arguments.set]
    settings = settings_module.load(None, None, overrides, arguments.devices)
    console = Console(highlight=False)
    image = np.random.default_rng(0).integers(0, 256, (arguments.height, arguments.width, 3), np.uint8)
    one_round = kill_round if arguments.kill else load_round
    rounds = [one_round(settings, overrides, image, arguments, console) for _ in range(arguments.rounds)]
    share = statistics.median(one["share"] for one in rounds)
    what = "the rate before the kill" if arguments.kill else "the bare loops' rate"
    console.print(f"median of {len(rounds)}: {100 * share:.2f}% of {what}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rounds": rounds}, indent=1) + "\n")
    return 0


def load_round(
    settings: Settings, overrides: list[str], image: engines.Pixels, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """A closed loop, between two measurements of the bare loop."""
    before = bare_rate(settings, image)
    with running_daemon(overrides, arguments.devices) as (endpoint, process), Load(
        endpoint, image, arguments.clients
    ) as load:
        time.sleep(WARM_UP_S)
        start, cpu = time.perf_counter(), _cpu_seconds(process)
        time.sleep(arguments.seconds)
        end, spent = time.perf_counter(), _cpu_seconds(process) - cpu
    bare = statistics.mean([before, bare_rate(settings, image)])
    fps, ranked = load.rate(start, end), sorted(load.latencies(start, end))
    share = fps / (bare * len(settings.devices))
    figures = {
        "fps": fps,
        "bare_fps": bare,
        "share": share,
        "p50_s": ranked[len(ranked) // 2],
        "p99_s": ranked[int(len(ranked) * 0.99)],
        "server_cpu_s_per_1000": 1000 * spent / len(ranked),
    }
    console.print(
        f"{fps:.2f} FPS = {100 * share:.2f}% of {len(settings.devices)} x {bare:.2f} (bare loop); "
        f"p50 {1000 * figures['p50_s']:.1f} ms, p99 {1000 * figures['p99_s']:.1f} ms; "
        f"server CPU {figures['server_cpu_s_per_1000']:.2f} s per 1000 images"
    )
    return figures


def kill_round(
    settings: Settings, overrides: list[str], image: engines.Pixels, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """kill -9 of the first device's worker under load, watched until 10 s after its successor is ready."""
    with running_daemon(overrides, arguments.devices) as (endpoint, _), Load(
        endpoint, image, arguments.clients
    ) as load, Client(endpoint) as client:
        time.sleep(WARM_UP_S)
        start = time.perf_counter()
        time.sleep(arguments.seconds)
        killed = time.perf_counter()
        os.kill(client.stats()["devices"][0]["pid"], signal.SIGKILL)
        while client.stats()["devices"][0]["generation"] == 1 or client.stats()["degraded"]:
            time.sleep(0.02)
        ready = time.perf_counter()
        time.sleep(10)
    before, meanwhile = load.rate(start, killed), load.rate(killed, ready)
    first, then = load.rate(ready, ready + 5), load.rate(ready + 5, ready + 10)
    console.print(
        f"before {before:.2f} FPS; successor ready (and seen so) after {ready - killed:.2f} s, meanwhile "
        f"{meanwhile:.2f}; first 5 s {first:.2f}, next 5 s {then:.2f}; {len(load.failures)} failures, "
        f"{len(load.done)} images, each answer right by its checksum: {not load.wrong}"
    )
    return {"share": first / before, "before": before, "first_5_s": first, "next_5_s": then,
            "failures": load.failures, "wrong": load.wrong}  # fmt: skip


def bare_rate(settings: Settings, image: engines.Pixels, seconds: float = 3.0) -> float:
    """Images per second of the engine alone: batches of one prepared image, one after the other."""
    device = "cpu" if settings.devices[0].startswith("cpu") else settings.devices[0]
    engine = engines.make(settings, device)
    engine.load()
    batch = [engine.prepare(image)] * engines.best_batch(settings)
    engine.segment(batch)
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        engine.segment(batch)
        images += len(batch)
    return images / (time.perf_counter() - start)


@contextmanager
def running_daemon(overrides: list[str], devices: list[str]) -> Iterator[tuple[str, psutil.Process]]:
    """A daemon of our own; gives its endpoint and process, stops it at the end."""
    with tempfile.TemporaryDirectory(prefix="blendmaskd-benchmark-") as folder:
        endpoint = f"ipc://{folder}/client.sock"
        argv = [sys.executable, "-m", "daemon", "--log-level", "warning", "--devices", *devices]
        for override in [*overrides, f"endpoints.clients=[{endpoint}]", "endpoints.metrics=null"]:
            argv += ["--set", override]
        process = subprocess.Popen(argv)
        try:
            yield endpoint, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


class Load:
    """`clients` in a closed loop, each with one job in flight, from entry to exit."""

    def __init__(self, endpoint: str, image: engines.Pixels, clients: int) -> None:
        self.endpoint = endpoint
        self.image = image
        self.done: list[tuple[float, float]] = []  # time of each answer, and its latency
        self.failures: list[str] = []
        self.wrong = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def __enter__(self) -> Self:
        with Client(self.endpoint, timeout_s=900) as client:
            client.segment(self.image)  # waits for the first worker
            _wait_for_all_devices(client)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def rate(self, start: float, end: float) -> float:
        """Answers per second in an interval of `time.perf_counter`."""
        return len(self.latencies(start, end)) / (end - start)

    def latencies(self, start: float, end: float) -> list[float]:
        return [latency for when, latency in self.done if start <= when < end]

    def _run(self) -> None:
        checksum = zlib.crc32(self.image.data)
        with Client(self.endpoint, timeout_s=900, retries=0) as client:
            while not self._stop.is_set():
                start = time.perf_counter()
                try:
                    answer = client.segment(self.image)
                except JobFailed as error:
                    self.failures.append(str(error))
                    continue
                end = time.perf_counter()
                self.done.append((end, end - start))
                self.wrong += any(found.get("checksum", checksum) != checksum for found in answer.detections)


def _wait_for_all_devices(client: Client) -> None:
    while (snapshot := client.stats())["degraded"]:
        if not any(device["state"] == "starting" for device in snapshot["devices"]):
            raise RuntimeError(f"a device is down: {snapshot['devices']}")
        time.sleep(0.2)


def _cpu_seconds(process: psutil.Process) -> float:
    """CPU time of the daemon and its workers so far."""
    family = [process, *process.children(recursive=True)]
    return float(sum(sum(member.cpu_times()[:2]) for member in family))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="+", default=["cpu:0", "cpu:1"], metavar="DEVICE")
    parser.add_argument("--engine", default="timed", choices=["native", "adelaidet", "timed"])
    parser.add_argument("--batch", default="1", help="as the setting: auto or a number")
    parser.add_argument("--clients", type=int, default=8, help="each with one job in flight")
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=800)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured, after a warm-up")
    parser.add_argument("--kill", action="store_true", help="kill a worker under load instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon")
    parser.add_argument("--json", metavar="FILE", help="save all figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
