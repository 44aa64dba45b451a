"""Engines: what turns a batch of images into detections.

==========  =========================================================================================
native      `blendmaskd_workers.blendmask`: our own network, torch only
adelaidet   the original, where detectron2 and adelaidet are installed
timed       sleeps a latency table and answers with a checksum of the image, or with given outputs: for load tests
==========  =========================================================================================

`prepare` and `finish` are host work, and safe to call from several threads; `segment` is the device's, and never called
by two threads at once. So a worker can prepare the next image, send it to the device, and finish the last one while the
device runs.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings
from blendmaskd_workers.batching import Batching

if TYPE_CHECKING:
    from blendmaskd_workers.devices import Device

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) BGR


class EngineError(RuntimeError):
    """An engine that cannot be loaded; the text says what to do. `exit_code` says whether starting again can help."""

    def __init__(self, reason: str, exit_code: int = EXIT_CANNOT_BOOT) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


class Prepared(Protocol):
    """An image on its way to the device."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the photograph."""

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width that the network sees; only images in which these agree are batched together."""


class Engine(Protocol):
    """See the module."""

    @property
    def device(self) -> Device | None:
        """What it computes on, once loaded; None: it uses none."""

    @property
    def exact(self) -> bool | None:
        """Whether the network runs as it was trained, once loaded; None: there is none of ours."""

    @property
    def model(self) -> str | None:
        """A digest of the configuration, categories and weights, once loaded; None: it loads none."""

    def load(self) -> None:
        """Open the device and load the network. Raises `EngineError`."""

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        """Run once for each image size (height, width), alone and in a full batch, so that no job pays for it."""

    def prepare(self, image: Pixels) -> Any:
        """The network's input, a `Prepared`."""

    def segment(self, batch: Sequence[Any]) -> list[Any]:
        """What the network says of each image of a batch."""

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
        """One image's output as COCO results, see `blendmaskd_workers.results`."""


def make(settings: Settings, device: str) -> Engine:
    """The engine that the settings name, for `device` as this process sees it (npu:0, cuda:0, cpu)."""
    match settings.engine:
        case "native":
            from blendmaskd_workers.engines.native import NativeEngine

            return NativeEngine(settings, device)
        case "adelaidet":
            from blendmaskd_workers.engines.adelaidet import AdelaidetEngine

            return AdelaidetEngine(settings, device)
        case "timed" if settings.timed.outputs is not None:
            from blendmaskd_workers.engines.native import ReplayEngine

            return ReplayEngine(settings)
        case "timed":
            from blendmaskd_workers.engines.timed import TimedEngine

            return TimedEngine(settings.timed.latency_ms)


def batching(settings: Settings) -> Batching:
    """What decides how many images are run at once, with what the settings know of the device's latency."""
    table = settings.batch_latency_ms
    if not table and settings.engine == "timed":
        table = settings.timed.latency_ms
    longest_ms = settings.latency_target_ms
    return Batching(
        batch_size(settings),
        {size: latency / 1000 for size, latency in table.items()},
        None if longest_ms is None else longest_ms / 1000,
    )


def batch_size(settings: Settings) -> Literal["auto"] | int:
    """What the setting `batch` comes to: with `model.exact` each image by itself, for a batch is summed otherwise."""
    return 1 if settings.model.exact else settings.batch


def best_batch(settings: Settings) -> int:
    """The batch size that a worker begins with."""
    return batching(settings).target()
