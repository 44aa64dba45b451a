"""Watch: the live view of `stats --watch` on a terminal. It shows; asking the daemon is
`blendmaskd.programs.stats`'s.

Columns that do not fit give way, the least important first; the sparkline of combined FPS takes what width is left. A
second in which the daemon did not answer is a gap in it.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from blendmaskd.output import in_a_line
from blendmaskd.programs.readings import Reading, Readings
from blendmaskd.programs.tables import BAD, CELLS, GOOD, WARN, Cells, Device, Snapshot, clock, duration, notes, size

HISTORY = 600  # seconds
BARS = " ▁▂▃▄▅▆▇█"
BUSY_CELLS = 8
HOT_C = 80  # an Ascend 910 throttles some degrees above it
LATEST_FAILURES = 4
IMPORTANCE = {  # of columns, in their order: of those that do not fit, the smallest gives way first
    "device": 99, "state": 90, "FPS": 98, "busy": 80, "": 20, "memory": 60, "temp": 78, "power": 45, "health": 76,
    "restarts": 75, "CPUs": 70, "task queue": 30, "preload": 25, "images": 40, "pid": 50,
}  # fmt: skip
TO_THE_LEFT = ("device", "state", "", "health", "CPUs", "preload")


class View:
    """What is on the screen: the last snapshot, and the combined FPS of the seconds before it."""

    def __init__(self, readings: Readings | None = None) -> None:
        self._readings = readings
        self._fps: deque[float | None] = deque(maxlen=HISTORY)
        self._snapshot: Snapshot = {}
        self._note = ""

    def update(self, snapshot: Snapshot, note: str = "") -> None:
        """A second has passed. `note`: why there is no newer snapshot than this one."""
        self._fps.append(None if note else snapshot["combined_fps"])
        self._snapshot, self._note = snapshot, note

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot, width = self._snapshot, options.max_width
        yield self._headline(width)
        if self._note:
            yield Text(f"{self._note}; showing the last figures", BAD)
        yield Text(" · ").join(_totals(snapshot))
        yield _fitting(_columns(snapshot["devices"], self._readings), snapshot["devices"], console, options)
        for note in (note for device in snapshot["devices"] for note in notes(device)):
            yield Text(note, BAD, overflow="ellipsis", no_wrap=True)
        yield from _stages(snapshot["latency"]["stages"])
        yield from _failures(snapshot["recent_failures"])

    def _headline(self, width: int) -> Text:
        """State, combined FPS and its history."""
        word, style = _verdict(self._snapshot)
        line = Text.assemble((f"{self._snapshot['combined_fps']:.2f} FPS", "bold"), "  ", (word, style), "  ")
        line.append(sparkline(self._fps, width - line.cell_len), "cyan")
        return line


def sparkline(values: Iterable[float | None], width: int) -> str:
    """The last `width` values as bars between 0 and their largest; None is a gap. Empty where there is no room."""
    shown = list(values)[-width:] if width > 0 else []
    most = max((value for value in shown if value is not None), default=0.0) or 1.0
    steps = len(BARS) - 1
    return "".join(" " if value is None else BARS[max(1, round(value / most * steps))] for value in shown)


def _verdict(snapshot: Snapshot) -> tuple[str, str]:
    if snapshot["draining"]:
        return "draining", WARN
    if not snapshot["serving"]:
        return "not serving", BAD
    if snapshot["degraded"]:
        return f"degraded, {snapshot['serving']} of {len(snapshot['devices'])}", BAD
    return "ok", GOOD


def _totals(snapshot: Snapshot) -> list[Text]:
    queue, latency = snapshot["queue"], snapshot["latency"]
    full = queue["jobs"] > 0.8 * queue["max_jobs"]
    failures = ", ".join(f"{count} {code}" for code, count in sorted(snapshot["failures"].items()))
    times = " ".join(f"{name} {duration(latency[name])}" for name in ("p50", "p99") if latency["count"])
    return [
        Text(f"latency {times or 'not known: no answers'}"),
        Text(f"{queue['jobs']} of {queue['max_jobs']} waiting ({size(queue['bytes'])})", BAD if full else ""),
        Text(f"{snapshot['leased']} leased"),
        Text(f"{snapshot['answered']} answered"),
        Text(failures or "no failures", BAD if failures else ""),
        Text(f"seq {snapshot['seq']}", "dim"),
    ]


def _columns(devices: Sequence[Device], readings: Readings | None) -> Cells:
    """Of all columns that there are."""
    cells = {**CELLS, "": lambda device: _bar(device["busy_share"])}
    if readings is not None and any(readings.of(device) for device in devices):
        cells["temp"] = lambda device: _temperature(readings.of(device))
        cells["power"] = lambda device: _power(readings.of(device))
        cells["health"] = lambda device: _health(readings.of(device))
    return {name: cells[name] for name in IMPORTANCE if name in cells}


def _bar(share: float) -> Text:
    filled = round(share * BUSY_CELLS)
    return Text.assemble(("━" * filled, "cyan"), ("━" * (BUSY_CELLS - filled), "bright_black"))


def _temperature(reading: Reading | None) -> Text:
    if reading is None or reading.temperature_c is None:
        return Text("-")
    return Text(f"{reading.temperature_c:.0f} °C", BAD if reading.temperature_c >= HOT_C else "")


def _power(reading: Reading | None) -> str:
    return "-" if reading is None or reading.power_w is None else f"{reading.power_w:.0f} W"


def _health(reading: Reading | None) -> Text:
    return Text("-") if reading is None else Text(reading.health, GOOD if reading.health == "OK" else BAD)


def _fitting(cells: Cells, devices: Sequence[Device], console: Console, options: ConsoleOptions) -> Table:
    """The devices, in as many columns as the terminal has room for; the name and the FPS stay."""
    while True:
        table = Table(box=SIMPLE_HEAD)
        for name in cells:
            table.add_column(name, justify="left" if name in TO_THE_LEFT else "right", no_wrap=True)
        for device in devices:
            table.add_row(*(cell(device) for cell in cells.values()))
        wide = options.update(max_width=10_000)
        if len(cells) <= 2 or Measurement.get(console, wide, table).maximum <= options.max_width:
            return table
        del cells[min(cells, key=IMPORTANCE.__getitem__)]


def _stages(means: Mapping[str, float]) -> Iterable[Text]:
    """Where the time of the window's answers went."""
    told = [f"{stage} {duration(mean)}" for stage, mean in means.items() if stage != "total"]
    if told:
        yield Text.assemble(("an image's time  ", "dim"), " · ".join(told))


def _failures(failures: Sequence[Mapping[str, Any]]) -> Iterable[Text]:
    for failure in failures[:LATEST_FAILURES]:
        line = Text.assemble((clock(failure["time"]), "dim"), " ", (failure["code"], BAD), " ",
                             in_a_line(failure["reason"]), (f"  {in_a_line(failure['job'])}", "dim"))  # fmt: skip
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line
