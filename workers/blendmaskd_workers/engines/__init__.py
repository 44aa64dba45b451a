"""Engines: what turns a batch of images into detections.

==========  =========================================================================================
native      `blendmaskd_workers.blendmask`: our own network, torch only
onnx        the same network from exported files, by onnxruntime
adelaidet   the original, where detectron2 and adelaidet are installed
timed       sleeps a latency table and answers with a checksum of the image, or with given outputs: for load tests
==========  =========================================================================================

`prepare` and `finish` are host work, and safe to call from several threads. A batch makes two visits to the device,
with the host's choice of boxes between them, and the first visit is cut in two. `launch` asks for the beginning and
returns a `Run`, whose `complete` asks for the rest, whose `choose` waits for the candidates and asks for the second
visit, and whose `collect` waits for the end. These belong to one thread at a time; each step is called in the order of
the launches. Where the engine `overlaps`, the next batch is launched before a run's `choose`: so the device has work
while the host chooses, and the second visit does not wait for all of the next batch's first.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.images.decoding import Photograph
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings
from blendmaskd_workers.batching import Batching

if TYPE_CHECKING:
    from blendmaskd_workers.devices import Device


class EngineError(RuntimeError):
    """An engine that cannot be loaded; the text says what to do. `exit_code` says whether starting again can help."""

    def __init__(self, reason: str, exit_code: int = EXIT_CANNOT_BOOT) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds that a device was busy with a run, and idle before its parts, by the reasons of `protocol.IDLE`."""

    first_s: float  # in the first visit
    busy_s: float  # in both
    idle_s: Mapping[str, float]


class Run(Protocol):
    """A batch on its way through the device."""

    def complete(self) -> None:
        """Ask for the rest of the first visit."""

    def arrived(self) -> bool:
        """Whether `choose` would not wait."""

    def choose(self) -> None:
        """Wait for the first visit, choose on the host what is kept, and ask for the second visit."""

    def collect(self) -> list[Any]:
        """Wait for the second visit; what the network says of each image."""

    def times(self) -> Times:
        """What the device did meanwhile, by its own clock. After `collect`."""


class Engine(Protocol):
    """See the module."""

    @property
    def device(self) -> Device | None:
        """What it computes on, once loaded; None: it uses none."""

    @property
    def exact(self) -> bool | None:
        """Whether the network runs as it was trained, once loaded; None: there is none of ours."""

    @property
    def overlaps(self) -> bool:
        """Whether the device works while the host does something else, once loaded."""

    @property
    def model(self) -> str | None:
        """A digest of the configuration, categories and weights, once loaded; None: it loads none."""

    def load(self) -> None:
        """Open the device and load the network. Raises `EngineError`."""

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        """Run once for each image size (height, width), alone and in a full batch, so that no job pays for it."""

    def prepare(self, photograph: Photograph) -> Any:
        """The network's input.

        Its `image_size` is the photograph's (height, width), its `padded_size` what the network sees: only images in
        which these agree are batched together.
        """

    def launch(self, batch: Sequence[Any]) -> Run:
        """Ask for the beginning of a batch's first visit."""

    def finish(self, output: Any, prepared: Any, options: Options, deadline: float = math.inf) -> list[dict[str, Any]]:
        """One image's output as COCO results; raises what `blendmaskd_workers.results` does.

        What takes long looks at `deadline` (time.monotonic).
        """


def segment(engine: Engine, batch: Sequence[Any]) -> list[Any]:
    """What the network says of each image of a batch, with nothing else on the device."""
    run = engine.launch(batch)
    run.complete()
    run.choose()
    return run.collect()


def make(settings: Settings, device: str) -> Engine:
    """The engine that the settings name, for `device` as this process sees it (npu:0, cuda:0, cpu)."""
    match settings.engine:
        case "native":
            from blendmaskd_workers.engines.native import NativeEngine

            return NativeEngine(settings, device)
        case "onnx":
            from blendmaskd_workers.engines.onnx import OnnxEngine

            return OnnxEngine(settings, device)
        case "adelaidet":
            from blendmaskd_workers.engines.adelaidet import AdelaidetEngine

            return AdelaidetEngine(settings, device)
        case "timed" if settings.timed.outputs is not None:
            from blendmaskd_workers.engines.native import ReplayEngine

            return ReplayEngine(settings)
        case "timed":
            from blendmaskd_workers.engines.timed import TimedEngine

            return TimedEngine(settings.timed)


def batching(settings: Settings) -> Batching:
    """What decides how many images are run at once, with what the settings know of the device's latency."""
    table_ms = settings.batch_latency_ms or (settings.timed.latency_ms if settings.engine == "timed" else {})
    table = {size: latency / 1000 for size, latency in table_ms.items()}
    return Batching(batch_size(settings), table, (settings.latency_target_ms or math.inf) / 1000)


def batch_size(settings: Settings) -> Literal["auto"] | int:
    """What the setting `batch` comes to: with `model.exact` each image by itself, for a batch is summed otherwise."""
    return 1 if settings.model.exact else settings.batch


def best_batch(settings: Settings) -> int:
    """The batch size that a worker begins with."""
    return batching(settings).target()
