"""The engine native, and the timed one that does the native one's work on the host."""
from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from blendmaskd.coco import categories
from blendmaskd.images.decoding import Photograph
from blendmaskd.protocol import IDLE, Options
from blendmaskd.settings import Settings
from blendmaskd_workers import blendmask, results
from blendmaskd_workers.blendmask.inference import Graphs
from blendmaskd_workers.devices import Device, Part, Staged, Timeline, UnsupportedError
from blendmaskd_workers.engines import EngineError, Times
from blendmaskd_workers.engines.on_device import OnDevice, digest
from blendmaskd_workers.engines.timed import TimedEngine

log = logging.getLogger("blendmaskd.worker")

COPIES = 2  # of the graphs of each shape: what they return lives until their next call, and two runs are in flight


@dataclass(frozen=True, slots=True)
class Sent:
    """An image on its way to the device, as bytes, and what `blendmaskd_workers.blendmask.finish` needs of it."""

    staged: Staged  # (3, h, w) uint8
    image_size: tuple[int, int]
    net_size: tuple[int, int]
    padded_size: tuple[int, int]


class NativeRun:
    """A batch on the device of the engine native.

    `release` is called when the last that reads what the graphs return has been asked for, or is not going to be.
    """

    def __init__(self, network: Any, timeline: Timeline, images: Sequence[Any], graphs: Graphs,
                 release: Callable[[], None]) -> None:
        self._network, self._timeline, self._device, self._release = network, timeline, timeline.device, release
        self._parts: list[Part] = []
        begin, self._complete, self._blend = graphs
        # shapes that depend on what images show would make an accelerator compile, and no graph
        self._places = blendmask.places(network, len(images)) if self._device.overlaps else 0
        with self._or_release(), timeline.part(self._parts):
            self._begun = blendmask.begin(network, images, begin)

    @contextlib.contextmanager
    def _or_release(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._release()
            raise

    def complete(self) -> None:
        with self._or_release(), self._timeline.part(self._parts):
            self._proposals = blendmask.complete(self._begun, self._complete)
            self._candidates = self._device.fetch(self._proposals.packed)
        del self._begun

    def arrived(self) -> bool:
        return self._candidates.arrived.passed()

    def choose(self) -> None:
        try:
            candidates = self._candidates.take().numpy()
            self._kept = blendmask.choose(self._network, self._proposals, candidates)
            with self._timeline.part(self._parts):
                masks = blendmask.blend(
                    self._network, self._proposals, self._kept, self._device.upload, self._places, self._blend
                )
                kept = sum(map(len, self._kept))
                self._masks = None if masks is None else self._device.fetch(masks[:kept])
        finally:
            self._release()
        del self._proposals

    def collect(self) -> list[Any]:
        self._parts[-1].end.wait()
        masks = None if self._masks is None else self._masks.take().numpy()
        return list(blendmask.instances(self._network, self._kept, masks))

    def times(self) -> Times:
        idle_s = {reason: part.begin.since(part.before) for reason, part in zip(IDLE, self._parts, strict=True)}
        begun_s, completed_s, blended_s = (part.end.since(part.begin) for part in self._parts)
        return Times(begun_s + completed_s, begun_s + completed_s + blended_s, idle_s)


class NativeEngine(OnDevice):
    """`blendmaskd_workers.blendmask` on one device."""

    def load(self) -> None:
        weights = self._weights()
        try:
            self._config = blendmask.load_config(self._settings.config)
            trained = blendmask.build(self._config)
            blendmask.load_weights(trained, weights)
        except (OSError, blendmask.ConfigError, blendmask.WeightsError) as error:
            raise EngineError(str(error)) from error
        self._categories = self._resolve_categories(self._config.num_classes)
        self.model = digest(trained, self._config, self._categories)
        self._open()
        self._serve(network_for(trained, self.device, self._settings.exact))

    def _serve(self, network: Any) -> None:
        """From now on with this network, on the device that is open."""
        self._network = network
        self.exact = bool(network.attends_everywhere)
        self.overlaps = self.device.overlaps
        self._timeline = Timeline(self.device)
        self._eager: Graphs = (self._network.begin, self._network.complete, None)
        self._graphs: dict[tuple[int, ...], list[Graphs]] = {}  # that no run uses, by the shape of a batch

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        if self._settings.graphs:
            before = self.device.held_bytes()
            for height, width in image_sizes:
                image = self.prepare(np.full((height, width, 3), 127, np.uint8)).staged.take()
                for size in sorted({1, batch}):
                    images = blendmask.collate([image] * size, self._config)
                    self._graphs[tuple(images.shape)] = [self._capture(images) for _ in range(COPIES)]
            megabytes = (self.device.held_bytes() - before) / 1e6
            log.info("graphs of %d shapes, each twice: %.0f MB on the device", len(self._graphs), megabytes)
        super().warm_up(image_sizes, batch)

    def _capture(self, images: Any) -> Graphs:
        try:
            return blendmask.capture(self._network, self.device.graph, images)
        except UnsupportedError as error:
            raise EngineError(f"model.graphs = True: {error}") from error

    def prepare(self, photograph: Photograph) -> Sent:
        prepared = blendmask.prepare(photograph, self._config, self._settings.resize == "fast")
        return Sent(self.device.stage(prepared.tensor), prepared.image_size, prepared.net_size, prepared.padded_size)

    def launch(self, batch: Sequence[Sent]) -> NativeRun:
        self.device.use()
        images = [item.staged.take() for item in batch]
        spare = self._graphs.get((len(images), 3, *batch[0].padded_size))
        if not spare:
            return NativeRun(self._network, self._timeline, images, self._eager, lambda: None)
        graphs = spare.pop()
        return NativeRun(self._network, self._timeline, images, graphs, lambda: spare.append(graphs))

    def finish(self, output: Any, prepared: Any, options: Options, deadline: float = math.inf) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, self._settings.exact, deadline)


def network_for(trained: Any, device: Device, exact: bool) -> Any:
    """The network as `device` runs it: as it was trained, or made for inference."""
    network = trained if exact else blendmask.for_inference(trained, device.dtype, device.channels_last)
    return network.to(device.torch_device)


def to_coco(output: Any, prepared: Any, names: Sequence[categories.Category], options: Options, exact: bool,
            deadline: float = math.inf) -> list[dict[str, Any]]:
    """The COCO results of what our network said about an image; `exact` and `deadline` see `masks_of`."""
    found = blendmask.finish(output, prepared)
    return results.to_coco(found.boxes, found.scores, found.classes, masks_of(found, exact, deadline), names, options)


def masks_of(found: Any, exact: bool, deadline: float = math.inf) -> results.Masks:
    """The masks of `blendmask.Detections`; `exact`: pasted, so that also values of one half are rounded as there."""
    probabilities, boxes, size = found.probabilities, found.boxes, found.image_size
    if not exact:
        return results.Stretched(probabilities, boxes, size)
    return results.Pasted(lambda n: blendmask.paste_window(probabilities[n], boxes[n], size), size, deadline)


class ReplayEngine(TimedEngine):
    """The timed engine with the native one's work on the host: images are prepared, candidates chosen from, operators
    launched and outputs finished.

    `timed.outputs` is what `blendmaskd_workers.benchmark.replay` wrote; every image gets the same.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.timed)
        self._settings = settings

    def load(self) -> None:
        try:
            self._config = blendmask.load_config(self._settings.model.config)
            with np.load(self._settings.timed.outputs or "") as arrays:
                self._recorded = Recorded(**arrays)
            self._categories = categories.resolve(
                self._config.num_classes, self._settings.model.weights, self._settings.model.categories
            )
        except (OSError, TypeError, ValueError) as error:
            raise EngineError(f"timed.outputs, model.config: {error}") from error

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        for height, width in image_sizes:
            prepared = self.prepare(np.full((height, width, 3), 127, np.uint8))
            self.finish(self.output(prepared), prepared, Options())

    def prepare(self, photograph: Photograph) -> Any:
        return blendmask.prepare(photograph, self._config, self._settings.model.resize == "fast")

    def output(self, prepared: Any) -> Any:
        recorded = self._recorded
        kept = blendmask.select(recorded.packed, recorded.level_sizes, self._config)
        return blendmask.Instances(
            kept.boxes, kept.scores, kept.classes, recorded.probabilities, kept.locations, kept.levels
        )

    def launch_operators(self, part: int) -> None:
        one = torch.ones(1)
        for _ in range(1 if self._settings.model.graphs else int(self._recorded.launches[part])):
            one.mean()  # some 4 microseconds, which is what dispatching an operator takes

    def finish(self, output: Any, prepared: Any, options: Options, deadline: float = math.inf) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, exact=False)


@dataclass(frozen=True)
class Recorded:
    """What a network said of an image: the fields of `timed.outputs`."""

    packed: Any  # (sum of M, FIELDS) float32: the candidates
    level_sizes: Any  # (levels, 2) heights and widths in cells
    probabilities: Any  # (n, R, R) float32: the masks of those that are kept
    launches: Any  # (2,) operators that were launched in each visit
