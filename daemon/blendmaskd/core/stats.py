"""Stats: what was served, by device and together. Pure: reports and answers in, a snapshot out.

Workers report each second how many images they finished and how long the device was busy since their last report.
The FPS of a device are the images in the reports of the last `window_s`, over the time that those reports span, up to
now if they have stopped: an idle device has 0, a silent one falls to 0. **combined FPS = the sum of the devices' FPS**,
exactly: each is rounded to 0.01 first.

The shell takes one snapshot per second. It has a sequence number, and is what `stats` clients, Prometheus and the
systemd status line all show, so that they agree. docs/wire.md has its form, and what of it clients may see.
"""
from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, chain
from typing import Any

import msgspec

from blendmaskd.core.health import ILL
from blendmaskd.protocol import IDLE, STAGE_BOUNDS_S, STAGES, Report

FRESH_S = 2.5  # a report older than this is no longer the present
RESOLUTION = 1.04  # latencies are told apart when one is this many times the other
_LOG_RESOLUTION = math.log(RESOLUTION)
NO_SECONDS: Mapping[str, Any] = {"count": 0, "sum": 0.0}  # of a stage
FAILURES_OF_A_CODE, FAILURES = 5, 20  # that are remembered: a flood of `busy` must not wash the others away
HIDDEN_OF_A_DEVICE: Mapping[str, Any] = {"pid": None, "reason": "", "shapes": [], "card": {}, "wanted": {},
                                             "actual": {}}  # fmt: skip
SHOWN_OF_A_DEVICE = (
    "device", "slot", "generation", "state", "fps", "images", "busy_seconds", "busy_share", "idle_seconds", "restarts",
    "memory_bytes", "device_memory_bytes",
)  # fmt: skip
SHOWN = (
    "seq", "time", "started", "engine", "window_s", "combined_fps", "degraded", "draining", "serving", "queue",
    "leased", "regions", "answered", "failures", "stages", "latency",
)  # fmt: skip
LONGEST_TEXT = 160  # of what is remembered of a failure: a snapshot is the header of one message


class DeviceStats(msgspec.Struct):
    """Counters of one device over all generations, and the window of its present worker."""

    images: int = 0
    busy_s: float = 0.0
    idle_s: Counter[str] = msgspec.field(default_factory=Counter)
    window: deque[Report] = msgspec.field(default_factory=deque)

    def add(self, report: Report) -> None:
        self.images += report.images
        self.busy_s += report.busy_s
        self.idle_s.update(report.idle_s)
        self.window.append(report)

    def rates(self, now: float, window_s: float) -> tuple[float, float]:
        """Images per second and busy share (0 to 1) over the window."""
        while self.window and self.window[0].end <= now - window_s:
            self.window.popleft()
        if not self.window:
            return 0.0, 0.0
        newest = self.window[-1].end
        end = newest if now - newest < FRESH_S else now
        span = max(end - self.window[0].start, 1e-9)
        images = sum(report.images for report in self.window)
        busy = sum(report.busy_s for report in self.window)
        return images / span, min(busy / span, 1.0)


class Histogram(msgspec.Struct):
    """Seconds, counted by `STAGE_BOUNDS_S`; the last bucket is everything above."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * (len(STAGE_BOUNDS_S) + 1))
    sum: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(STAGE_BOUNDS_S, seconds)] += 1
        self.sum += seconds

    def as_dict(self) -> dict[str, Any]:
        return {"buckets": list(accumulate(self.counts)), "count": sum(self.counts), "sum": self.sum}


class Second(msgspec.Struct):
    """The answers between two snapshots."""

    end: float = math.inf
    totals: Counter[int] = msgspec.field(default_factory=Counter)  # by the power of `RESOLUTION` that is just above
    stages: Mapping[str, Any] = {}  # as a snapshot shows them, at its end


class Latency:
    """How long the answers of the last `window_s` took."""

    def __init__(self) -> None:
        self._seconds = deque([Second()])  # the last one is not over
        self._before: Mapping[str, Any] = {}  # `stages` of the second before the first of these

    def add(self, total_s: float) -> None:
        self._seconds[-1].totals[math.ceil(math.log(max(total_s, 1e-6)) / _LOG_RESOLUTION)] += 1

    def take(self, now: float, window_s: float, stages: Mapping[str, Any]) -> dict[str, Any]:
        """The window up to now, as a snapshot's `latency`. `stages` are those of the same snapshot."""
        self._seconds[-1].end, self._seconds[-1].stages = now, stages
        while self._seconds[0].end <= now - window_s:
            self._before = self._seconds.popleft().stages
        totals: Counter[int] = Counter()
        for second in self._seconds:
            totals.update(second.totals)
        self._seconds.append(Second())
        count = totals.total()
        ordered = sorted(totals.items())
        return {
            "count": count,
            "p50": _quantile(ordered, count * 0.5),
            "p99": _quantile(ordered, count * 0.99),
            "stages": dict(self._means(stages, count)),
        }

    def _means(self, stages: Mapping[str, Any], answers: int) -> Iterator[tuple[str, float]]:
        for stage, present in stages.items():
            before = self._before.get(stage, NO_SECONDS)
            if present["count"] > before["count"]:
                yield stage, (present["sum"] - before["sum"]) / answers


def _quantile(ordered: Iterable[tuple[int, int]], rank: float) -> float | None:
    """The upper bound of the bucket that holds the `rank`-th latency, in seconds; None when there is none."""
    for power, count in ordered:
        rank -= count
        if rank <= 0:
            return float(f"{RESOLUTION**power:.3g}")
    return None


class Stats:
    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._seq = 0
        self._devices: dict[str, DeviceStats] = {}
        self._stages = {stage: Histogram() for stage in STAGES}
        self._latency = Latency()
        self._answered = 0
        self.failures: Counter[str] = Counter()  # by code, of accepted and refused jobs alike
        self._recent: dict[str, deque[tuple[bytes, dict[str, Any]]]] = {}  # by code, with the client

    def report(self, device: str, report: Report) -> None:
        self._devices.setdefault(device, DeviceStats()).add(report)

    def answered(self, timings: Mapping[str, float]) -> None:
        """Count a result."""
        self._answered += 1
        for stage, seconds in timings.items():
            if stage in self._stages:
                self._stages[stage].observe(seconds)
        self._latency.add(timings.get("total", 0.0))

    def failed(self, unix_time: float, job: str, code: str, reason: str, owner: bytes = b"") -> None:
        """Count a failure, and remember it for people to look at."""
        self.failures[code] += 1
        shown = {"time": unix_time, "job": job[:LONGEST_TEXT], "code": str(code), "reason": reason[:LONGEST_TEXT]}
        self._recent.setdefault(code, deque(maxlen=FAILURES_OF_A_CODE)).append((owner, shown))

    def exited(self, device: str) -> None:
        """A worker of the device has exited: what it did is no rate any more."""
        if device in self._devices:
            self._devices[device].window.clear()

    def snapshot(
        self, now: float, unix_time: float, slots: Iterable[Mapping[str, Any]], **totals: Any
    ) -> dict[str, Any]:
        """The next snapshot; docs/wire.md has its keys. `slots` and `totals` bring what broker and supervisor know."""
        self._seq += 1
        stages = {stage: histogram.as_dict() for stage, histogram in self._stages.items()}
        devices = [{**slot, **self._device(slot["device"], now)} for slot in slots]
        serving = sum(device["state"] == "ready" for device in devices)
        return {
            "seq": self._seq,
            "time": unix_time,
            "window_s": self.window_s,
            "combined_fps": round(sum(device["fps"] for device in devices), 2),
            "degraded": serving < len(devices) or any(map(is_ill, devices)),
            "serving": serving,
            "stages": stages,
            "latency": self._latency.take(now, self.window_s, stages),
            "answered": self._answered,
            "failures": dict(self.failures),
            "recent_failures": self._recent_failures(None),
            "devices": devices,
            **totals,
        }

    def for_client(self, snapshot: Mapping[str, Any], client: bytes) -> dict[str, Any]:
        """What any client may see of a snapshot: no paths, no processes, nothing of another client's jobs."""
        if not snapshot:
            return {}
        spool = snapshot["spool"]
        trouble = "it cannot be written" if spool and spool["trouble"] else ""
        return {
            **{key: snapshot[key] for key in SHOWN},
            "spool": spool and {**spool, "trouble": trouble},
            "recent_failures": self._recent_failures(client),
            "last_image": None,
            "missing": [],
            "devices": [{**{key: device[key] for key in SHOWN_OF_A_DEVICE}, **HIDDEN_OF_A_DEVICE}
                        for device in snapshot["devices"]],
        }  # fmt: skip

    def _recent_failures(self, client: bytes | None) -> list[dict[str, Any]]:
        """Of this client; None: of all."""
        kept = [failure for owner, failure in chain(*self._recent.values()) if client in (None, owner)]
        return sorted(kept, key=lambda failure: -failure["time"])[:FAILURES]

    def _device(self, device: str, now: float) -> dict[str, Any]:
        stats = self._devices.get(device, DeviceStats())
        fps, busy_share = stats.rates(now, self.window_s)
        newest = stats.window[-1] if stats.window else None
        return {
            "fps": round(fps, 2),
            "images": stats.images,
            "busy_seconds": stats.busy_s,
            "busy_share": round(busy_share, 4),
            "idle_seconds": {reason: stats.idle_s[reason] for reason in IDLE},
            "memory_bytes": newest.memory_bytes if newest else 0,
            "device_memory_bytes": newest.device_memory_bytes if newest else 0,
            "shapes": [list(shape) for shape in newest.shapes] if newest else [],
        }


def is_ill(device: Mapping[str, Any]) -> bool:
    """Whether a device of a snapshot serves with a card that is ill."""
    return device["state"] == "ready" and device.get("card", {}).get("health") in ILL


def status_line(snapshot: Mapping[str, Any]) -> str:
    """One line for people: `98.17 FPS = npu:0 49.10 + npu:1 49.07, 3 waiting, seq 17`."""
    devices = snapshot["devices"]
    parts = " + ".join(f"{device['device']} {device['fps']:.2f}" for device in devices)
    line = f"{snapshot['combined_fps']:.2f} FPS = {parts}, {snapshot['queue']['jobs']} waiting, seq {snapshot['seq']}"
    down = [f"{device['device']} {device['state']}" for device in devices if device["state"] != "ready"]
    down += [f"{device['device']} health {device['card']['health']}" for device in devices if is_ill(device)]
    if down:
        line += f"; {'degraded' if snapshot['serving'] else 'not serving'}: {', '.join(down)}"
    return line
