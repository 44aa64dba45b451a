"""The picture of a training: its losses and learning rate over the iterations. Needs matplotlib."""
from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

NOT_LOSSES = {"iteration", "lr", "images_per_s", "eta_s"}
FEW = 10


def draw(log: Path, picture: Path) -> None:
    """Draw `log`, as the training program writes it, into a PNG."""
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    if not entries:
        return
    iterations = [entry["iteration"] for entry in entries]
    marker = "." if len(entries) < FEW else None  # a single point makes no line
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for name in sorted(set(entries[0]) - NOT_LOSSES, key=lambda name: -entries[0][name]):
        above.plot(iterations, [entry[name] for entry in entries], label=name, marker=marker,
                   linewidth=2 if "total" in name else 1)
    above.set_yscale("log")
    above.set_ylabel("loss, mean of the iterations since the last point")
    above.legend()
    above.grid(alpha=0.3, which="both")
    below.plot(iterations, [entry["lr"] for entry in entries], color="black", marker=marker, linewidth=1)
    below.set_ylabel("learning rate")
    below.set_xlabel("iteration")
    below.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)
