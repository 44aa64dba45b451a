"""Load a daemon and compare it with the bare device: what of the devices' own rate does a client see?

    python scripts/benchmark.py                          # two timed devices, batch 1, 8 clients, 800x800 raw frames
    python scripts/benchmark.py --batch 2 --clients 16 --seconds 20
    python scripts/benchmark.py --engine native --devices cpu:0 cpu:1 --set model.weights=random.pth

It starts a daemon of its own. The baseline is measured in the same run, before and after: the same engine in a bare
loop, without daemon, transport, decoding and masks. Ratios are worth quoting, absolute figures are this machine's.
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from daemon import settings as settings_module
from daemon.client import Client
from daemon.settings import Settings
from workers import engines

WARM_UP_S = 2.0


def main(argv: list[str] | None = None) -> int:
    arguments = _parse(argv)
    overrides = [f"engine={arguments.engine}", f"batch={arguments.batch}", *arguments.set]
    settings = settings_module.load(None, None, overrides, arguments.devices)
    console = Console(highlight=False)
    image = np.random.default_rng(0).integers(0, 256, (arguments.height, arguments.width, 3), np.uint8)
    rounds = []
    for number in range(arguments.rounds):
        before = bare_rate(settings, image)
        with running_daemon(overrides, arguments.devices) as (endpoint, process):
            measured = load(endpoint, process, image, arguments.clients, arguments.seconds)
        bare = statistics.mean([before, bare_rate(settings, image)])
        limit = bare * len(settings.devices)
        rounds.append({**measured, "bare_fps": bare, "share": measured["fps"] / limit})
        console.print(
            f"round {number + 1}: {measured['fps']:.2f} FPS = {100 * rounds[-1]['share']:.2f}% of "
            f"{len(settings.devices)} x {bare:.2f} (bare loop); p50 {1000 * measured['p50_s']:.1f} ms, "
            f"p99 {1000 * measured['p99_s']:.1f} ms; server CPU {measured['cpu_s_per_1000']:.2f} s per 1000 images"
        )
    share = statistics.median(one["share"] for one in rounds)
    console.print(f"median of {len(rounds)}: {100 * share:.2f}% of the bare loops' rate")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rounds": rounds}, indent=1) + "\n")
    return 0


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


def load(
    endpoint: str, process: psutil.Process, image: engines.Pixels, clients: int, seconds: float
) -> dict[str, Any]:
    """`clients` in a closed loop, each with one job in flight, for `seconds` after a warm-up."""
    with Client(endpoint, timeout_s=600) as client:
        client.segment(image)  # waits for the first worker
        _wait_for_all_devices(client)
    begin = time.perf_counter() + WARM_UP_S
    latencies: list[float] = []  # of the answers within the interval

    def run() -> None:
        with Client(endpoint, timeout_s=600) as client:
            while (start := time.perf_counter()) < begin + seconds:
                client.segment(image, mask_format="rle")
                if begin <= (end := time.perf_counter()) < begin + seconds:
                    latencies.append(end - start)

    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(max(begin - time.perf_counter(), 0))
    with Client(endpoint, timeout_s=60) as client:
        answered, cpu = client.stats()["answered"], _cpu_seconds(process)
        time.sleep(max(begin + seconds - time.perf_counter() - 1.5, 1))
        done, spent = client.stats()["answered"] - answered, _cpu_seconds(process) - cpu
    for thread in threads:
        thread.join()
    ranked = sorted(latencies)
    return {
        "fps": len(latencies) / seconds,
        "p50_s": ranked[len(ranked) // 2],
        "p99_s": ranked[int(len(ranked) * 0.99)],
        "images": len(latencies),
        "cpu_s_per_1000": 1000 * spent / max(done, 1),
    }


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon")
    parser.add_argument("--json", metavar="FILE", help="save all figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
