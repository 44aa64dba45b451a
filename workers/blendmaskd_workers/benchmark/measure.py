"""One measurement: a load on a server for a while, and everything that is to be said of it as a row.

Keys of a row beside those of `load.figures` (what is not known is missing):

=====================  ===============================================================================
load                   {"clients": n} in a closed loop, {"rate": jobs per second} in an open one
checked                results that could be compared with their image by its checksum
answer_bytes           payload of the last result
shared_memory          whether all images went by it
devices                how many
of_device_time         0 to 1: `fps` times the device time for an image, by the devices' clocks in the daemon's own
                       stats, over the number of devices
busy_ms_per_image      device time for an image, by the same
idle_share             {reason: 0 to 1} of the devices' time in which they waited, by the same
stages_ms              {stage: mean}, by the same
cpu_s_per_1000         CPU seconds for 1000 images: {"broker", "workers", "generator"}
generator_share        of one core that this program took
memory_mb              {"kind": "pss" or "rss", "broker", "workers"}
=====================  ===============================================================================
"""
from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blendmaskd.protocol import IDLE
from blendmaskd_workers.benchmark import load, servers
from blendmaskd_workers.benchmark.generator import Generator
from blendmaskd_workers.benchmark.load import ClosedLoop, OpenLoop, Schedule
from blendmaskd_workers.benchmark.servers import Server

SEED = 0

Row = dict[str, Any]
Snapshot = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """How much load: closed loop without a rate."""

    clients: int
    rate: float | None = None

    def schedule(self, start: float) -> Schedule:
        """The same gaps in each round."""
        if self.rate is None:
            return ClosedLoop(self.clients, start)
        return OpenLoop(self.rate, self.clients, start, SEED)

    def as_dict(self) -> dict[str, float]:
        return {"clients": self.clients} if self.rate is None else {"rate": self.rate}


def measure(
    server: Server, generator: Generator, point: Point, warm_up_s: float, seconds: float, tick: Callable[[], None]
) -> Row:
    """Load the server; `tick` is called each second. The row as above."""
    generator.begin(point.schedule(time.monotonic()))
    generator.run(warm_up_s, tick)
    before = generator.stats() if server.tells_stats else None
    cpu_before, own_before = servers.cpu_seconds(server), time.process_time()
    start = time.monotonic()
    generator.run(seconds, tick)
    end = time.monotonic()
    cpu = {name: spent - cpu_before[name] for name, spent in servers.cpu_seconds(server).items()}
    own = time.process_time() - own_before
    after = generator.stats() if server.tells_stats else None
    generator.drain()
    row = {"load": point.as_dict(), **load.figures(generator.samples, start, end)}
    per_1000 = 1000 / max(row["images"], 1)
    return row | {
        "checked": generator.checked,
        "answer_bytes": generator.answer_bytes,
        "shared_memory": generator.by_shared_memory,
        **({} if before is None or after is None else by_the_stats(before, after, row["fps"])),
        "cpu_s_per_1000": {name: spent * per_1000 for name, spent in {**cpu, "generator": own}.items()},
        "generator_share": own / (end - start),
        "memory_mb": servers.memory_mb(server),
    }


def by_the_stats(before: Snapshot, after: Snapshot, fps: float) -> Row:
    """What the daemon says of itself, between two snapshots.

    Workers report each second, so the snapshots' counters end at other times than the measurement. Their quotients
    don't suffer from that: device time for an image, seconds for a job in each stage.
    """
    earlier = {device["device"]: device for device in before["devices"]}
    pairs = [(earlier[now["device"]], now) for now in after["devices"] if now["device"] in earlier]
    images, busy_s = (sum(now[key] - then[key] for then, now in pairs) for key in ("images", "busy_seconds"))
    stages = {}
    for stage, now in after["stages"].items():
        then = before["stages"].get(stage, {"count": 0, "sum": 0.0})
        if now["count"] > then["count"]:
            stages[stage] = 1000 * (now["sum"] - then["sum"]) / (now["count"] - then["count"])
    devices = len(after["devices"])
    row: Row = {"devices": devices, "stages_ms": stages}
    if images:  # else the measurement was shorter than the time between two reports
        row |= {"of_device_time": busy_s / images * fps / devices, "busy_ms_per_image": 1000 * busy_s / images}
    if images and all("idle_seconds" in now for now in after["devices"]):  # older daemons do not tell it
        per_image = fps / devices / images
        row["idle_share"] = {
            reason: per_image * sum(now["idle_seconds"][reason] - then["idle_seconds"][reason] for then, now in pairs)
            for reason in IDLE
        }
    return row
