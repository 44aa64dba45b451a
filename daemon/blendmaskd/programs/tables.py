"""Tables: a snapshot for people, on a terminal. Pure: snapshots in, what rich prints out."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from blendmaskd.output import in_a_line
from blendmaskd.protocol import STAGE_BOUNDS_S
from blendmaskd.wanted import differences_shown, models_shown

GOOD, WARN, BAD = "green", "yellow", "bold red"
STATE_STYLES = {"ready": GOOD, "starting": WARN, "stopping": WARN, "backoff": BAD, "failed": BAD, "resting": BAD,
                "silent": BAD}  # fmt: skip

Snapshot = Mapping[str, Any]
Device = Mapping[str, Any]  # of a snapshot
Cells = dict[str, Callable[[Device], str | Text]]  # by the head of their column


def tables(snapshot: Snapshot) -> RenderableType:
    devices = snapshot["devices"]
    parts: list[RenderableType] = [
        _headline(snapshot),
        _devices(devices, "device", "state", numbers=("FPS", "busy", "images", "memory", "restarts", "pid")),
        _devices(devices, "device", "CPUs", "preload", "task queue", "model"),
    ]
    parts += [Text(in_a_line(f"removed or replaced by others: {path}"), BAD) for path in snapshot.get("missing", ())]
    parts += [Text(note, BAD) for device in devices for note in notes(device)]
    if len(models := models_shown(devices)) > 1:
        parts.append(Text(f"different models are served: {', '.join(models)}; reload, unless one is under way", BAD))
    if any(histogram["count"] for histogram in snapshot["stages"].values()):
        parts.append(_stages(snapshot["stages"]))
    return Group(*parts)


def _headline(snapshot: Snapshot) -> Text:
    queue, failures = snapshot["queue"], snapshot["failures"]
    line = Text.assemble(
        "combined ", (f"{snapshot['combined_fps']:.2f} FPS", "bold"), f" over {snapshot['window_s']:g} s · ",
        f"{queue['jobs']} waiting ({size(queue['bytes'])}), {snapshot['leased']} leased · ",
        f"{snapshot['answered']} answered · ",
    )  # fmt: skip
    told = ", ".join(f"{count} {code}" for code, count in sorted(failures.items()))
    line.append(told or "no failures", BAD if told else "")
    line.append(f" · seq {snapshot['seq']}")
    if snapshot["draining"]:
        line.append(" · draining", WARN)
    if snapshot["degraded"]:
        line.append(" · degraded" if snapshot["serving"] else " · not serving", BAD)
    return line


def _devices(devices: Iterable[Device], *names: str, numbers: Sequence[str] = ()) -> Table:
    table = _new_table(*names, numbers=numbers)
    for device in devices:
        table.add_row(*(CELLS[name](device) for name in (*names, *numbers)))
    return table


def _new_table(*names: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _memory(device: Device) -> str:
    text = size(device["memory_bytes"])
    return f"{text} + {size(device['device_memory_bytes'])} on device" if device["device_memory_bytes"] else text


def _effect(device: Device, key: str) -> Text:
    """What is in place, and beside it what was wanted where that is something else."""
    wanted, actual = _short(device["wanted"].get(key)), _short(device["actual"].get(key))
    if not device["actual"]:
        return Text(wanted, "dim")  # not up yet
    # What is not wanted is not set: it is no difference when the environment has it all the same.
    if wanted in (actual, "-"):
        return Text(actual)
    return Text(f"{actual}, wanted {wanted}", BAD)


def _short(value: Any) -> str:
    return "-" if value is None else PurePath(value).name if isinstance(value, str) else str(value)


CELLS: Cells = {
    "device": lambda device: str(device["device"]),
    "state": lambda device: Text(device["state"], STATE_STYLES.get(device["state"], "")),
    "FPS": lambda device: f"{device['fps']:.2f}",
    "busy": lambda device: f"{device['busy_share']:.0%}",
    "images": lambda device: str(device["images"]),
    "memory": _memory,
    "restarts": lambda device: Text(str(device["restarts"]), WARN if device["restarts"] else ""),
    "pid": lambda device: str(device["pid"] or "-"),
    "CPUs": lambda device: _effect(device, "cpus"),
    "preload": lambda device: _effect(device, "preload"),
    "task queue": lambda device: _effect(device, "task_queue"),
    "model": lambda device: _effect(device, "model"),
}


def notes(device: Device) -> list[str]:
    """Why a device is not ready, and what of its plan did not take effect."""
    found = [f"{device['state']}: {device['reason']}"] if device["reason"] else []
    card = device.get("card") or {"health": "OK"}
    if card["health"] != "OK":
        found.append(f"health {card['health']}" + (f": {card['error']}" if card["error"] else ""))
    return [in_a_line(f"{device['device']} {note}") for note in (*found, *differences_shown(device))]


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Table:
    table = _new_table("stage", numbers=("mean", "about p50", "about p99"))
    for stage, histogram in stages.items():
        if histogram["count"]:
            mean = duration(histogram["sum"] / histogram["count"])
            table.add_row(stage, mean, *(_quantile_text(histogram["buckets"], share) for share in (0.5, 0.99)))
    return table


def quantile(buckets: Sequence[int], share: float) -> float | None:
    """Estimate of the time in seconds that `share` (0 to 1) of the observations stayed below, as Prometheus does.

    `buckets` are cumulative counts at `STAGE_BOUNDS_S` and above; between two bounds the times are taken as spread
    evenly. None where it lies above the last bound. There must be an observation.
    """
    rank = share * buckets[-1]
    place = next(place for place, count in enumerate(buckets) if count >= rank and count)
    if place == len(STAGE_BOUNDS_S):
        return None
    low, below = (STAGE_BOUNDS_S[place - 1], buckets[place - 1]) if place else (0.0, 0)
    return low + (STAGE_BOUNDS_S[place] - low) * (rank - below) / (buckets[place] - below)


def _quantile_text(buckets: Sequence[int], share: float) -> str:
    seconds = quantile(buckets, share)
    return f"> {duration(STAGE_BOUNDS_S[-1])}" if seconds is None else duration(seconds)


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    digits = 2 if seconds < 0.01 else 1 if seconds < 0.1 else 0
    return f"{seconds * 1000:.{digits}f} ms"


def clock(unix_time: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(unix_time))


def size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
