"""Measure what a second node gains, and what Ray costs: one node against two, online and offline, timed engine.

    python scripts/benchmark_cluster.py
    python scripts/benchmark_cluster.py --latency-ms 100 --images 150 --rounds 2

Starts a Ray cluster of its own on this machine, nodes with a declared NPU each, and takes turns: one node, two nodes.
Online, as many HTTP clients as fill the windows post images in a closed loop, and what was answered is counted; offline
it is the run's own combined FPS. The devices sleep, so what is measured is whether Ray keeps them busy; the CPU time
of an image is shown beside it.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from ray import serve
from rich.console import Console
from rich.table import Table

from blendmaskd.output import Help
from blendmaskd.programs.arguments import output_file
from blendmaskd.programs.errors import guarded
from blendmaskd_workers.benchmark.http_load import spent_cpu_s
from blendmaskd_workers.cluster.serve import application
from cluster_trial import Trial, processes, trial

ROOT = Path(__file__).resolve().parents[1]
PORT = 18700
NODES = ("a", "b")
CLIENTS_OF_A_NODE = 4
SETTLE_S = 4.0
WANTED = 1.9  # two nodes against one


@dataclass(frozen=True, slots=True)
class Row:
    way: str  # online or offline
    nodes: int
    fps: float
    idle_share: float | None = None  # of one core, all of the cluster's processes without load
    cpu_s: float | None = None  # what they took more under load, for 1000 images


def main(argv: Sequence[str] | None = None) -> int:
    return guarded("benchmark_cluster", lambda: _main(_parse(argv)))


def _main(arguments: argparse.Namespace) -> int:
    rows: list[Row] = []
    image = _image(arguments.size)
    with trial({NODES[0]: {"cpus": 2}}) as cluster:
        for _ in range(arguments.rounds):
            for nodes in (1, 2):
                if nodes == 2:
                    cluster.add(NODES[1])
                rows.append(_online(cluster, nodes, arguments, image))
                rows.append(_offline(cluster, nodes, arguments, image))
            cluster.kill(NODES[1])
    return _tell(rows, arguments)


def _online(cluster: Trial, nodes: int, arguments: argparse.Namespace, image: bytes) -> Row:
    settings = {"devices": ["npu:0"], "engine": "timed", "batch": 1, "timed": {"latency_ms": {1: arguments.latency_ms}}}
    serve.start(proxy_location="EveryNode", http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(application({"settings": settings, "replicas": nodes, "fronts": nodes}), name="bench", route_prefix="/")
    try:
        time.sleep(SETTLE_S)
        idle_share, _ = _watch(cluster, arguments.seconds, [])
        with _clients(CLIENTS_OF_A_NODE * nodes, image) as answered:
            time.sleep(SETTLE_S)
            busy_share, fps = _watch(cluster, arguments.seconds, answered)
    finally:
        serve.delete("bench")
    return Row("online", nodes, fps, idle_share, 1000 * (busy_share - idle_share) / max(fps, 1e-9))


def _watch(cluster: Trial, seconds: float, answered: list[None]) -> tuple[float, float]:
    """The share of one core that the cluster took, but for this process, and images per second."""
    begun, before_s, images = time.monotonic(), spent_cpu_s(processes(cluster.folder)), len(answered)
    time.sleep(seconds)
    took = time.monotonic() - begun
    return (spent_cpu_s(processes(cluster.folder)) - before_s) / took, (len(answered) - images) / took


@contextlib.contextmanager
def _clients(number: int, image: bytes) -> Iterator[list[None]]:
    """So many clients that each have one request under way; grows by what was answered."""
    answered: list[None] = []
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/segment", data=image)
            with urllib.request.urlopen(request, timeout=60) as response:
                response.read()
            answered.append(None)

    with ThreadPoolExecutor(number) as pool:
        for _ in range(number):
            pool.submit(run)
        try:
            yield answered
        finally:
            over.set()


def _offline(cluster: Trial, nodes: int, arguments: argparse.Namespace, image: bytes) -> Row:
    with tempfile.TemporaryDirectory(prefix="bmd-") as folder:
        inputs = Path(folder, "in")
        inputs.mkdir()
        for number in range(arguments.images * nodes):
            (inputs / f"{number:06d}.jpg").write_bytes(image)
        done = subprocess.run(
            [sys.executable, ROOT / "scripts" / "segment_dataset.py", "--address", cluster.address, "--input", inputs,
             "--output", Path(folder, "out"), "--devices", "npu:0", "--set", "engine=timed", "--set", "batch=1",
             "--set", f"timed.latency_ms={{1: {arguments.latency_ms}}}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    [line] = [line for line in done.stdout.splitlines() if line.startswith("combined:")]
    return Row("offline", nodes, float(line.split(" FPS")[0].split()[-1]))


def _image(size: str) -> bytes:
    width, height = map(int, size.split("x"))
    pixels = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def _tell(rows: Sequence[Row], arguments: argparse.Namespace) -> int:
    table = Table("", "nodes", "images/s", "of the devices' limit", "idle, of a core", "CPU s per 1000")
    ratios: dict[str, float] = {}
    for way in ("online", "offline"):
        fps = {nodes: [row.fps for row in rows if (row.way, row.nodes) == (way, nodes)] for nodes in (1, 2)}
        for row in rows:
            if row.way == way:
                limit = row.nodes * 1000 / arguments.latency_ms
                idle = "" if row.idle_share is None else f"{row.idle_share:.0%}"
                cpu_s = "" if row.cpu_s is None else f"{row.cpu_s:.1f}"
                table.add_row(way, str(row.nodes), f"{row.fps:.2f}", f"{row.fps / limit:.1%}", idle, cpu_s)
        ratios[way] = statistics.median(two / one for one, two in zip(fps[1], fps[2]))
    console = Console()
    console.print(table)
    for way, ratio in ratios.items():
        console.print(f"{way}: two nodes / one node = {ratio:.3f} (wanted: {WANTED})")
    if arguments.json:
        found: dict[str, Any] = {"rows": [dataclasses.asdict(row) for row in rows], "ratios": ratios}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if min(ratios.values()) >= WANTED else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--latency-ms", type=float, default=200.0, help="of an image on a device, default 200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="that the online load is measured, default 10")
    parser.add_argument("--images", type=int, default=80, help="of an offline run, for each node; default 80")
    parser.add_argument("--size", metavar="WxH", default="640x480", help="of the images, default 640x480")
    parser.add_argument("--json", metavar="FILE", type=output_file, help="save the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
