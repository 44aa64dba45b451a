"""The engine native, and the timed one that does the native one's work on the host."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blendmaskd.coco import categories
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings
from blendmaskd_workers import blendmask, results
from blendmaskd_workers.devices import Device, Staged
from blendmaskd_workers.engines import EngineError, Pixels
from blendmaskd_workers.engines.on_device import OnDevice, digest
from blendmaskd_workers.engines.timed import TimedEngine


@dataclass(frozen=True, slots=True)
class Sent:
    """An image that is on its way to the device, padded, and what `blendmaskd_workers.blendmask.finish` needs of it."""

    staged: Staged  # (1, 3, H, W) float32
    image_size: tuple[int, int]
    net_size: tuple[int, int]
    padded_size: tuple[int, int]


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
        self._network = network_for(trained, self.device, self._settings.exact)
        self.exact = bool(self._network.attends_everywhere)
        self._graphs: dict[tuple[int, ...], Any] = {}  # by the shape of a batch

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        if self._settings.graphs:
            for height, width in image_sizes:
                image = self.prepare(np.full((height, width, 3), 127, np.uint8)).staged.take()
                for size in sorted({1, batch}):
                    images = image.expand(size, -1, -1, -1)
                    self._graphs[images.shape] = blendmask.capture(self._network, self.device.graph, images)
        super().warm_up(image_sizes, batch)

    def prepare(self, image: Pixels) -> Sent:
        prepared = blendmask.prepare(image, self._config)
        staged = self.device.stage(blendmask.collate([prepared]))
        return Sent(staged, prepared.image_size, prepared.net_size, prepared.padded_size)

    def segment(self, batch: Sequence[Sent]) -> list[Any]:
        self.device.use()
        images = [item.staged.take() for item in batch]
        return list(blendmask.segment_images(self._network, images, self.device.upload, self._propose))

    def _propose(self, images: Any) -> Any:
        return self._graphs.get(images.shape, self._network.propose)(images)

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, self._settings.exact)


def network_for(trained: Any, device: Device, exact: bool) -> Any:
    """The network as `device` runs it: as it was trained, or made for inference."""
    network = trained if exact else blendmask.for_inference(trained, device.dtype, device.channels_last)
    return network.to(device.torch_device)


def to_coco(
    output: Any, prepared: Any, names: Sequence[categories.Category], options: Options, exact: bool
) -> list[dict[str, Any]]:
    """The COCO results of what our network said about an image; `exact` is of the masks, see `masks_of`."""
    found = blendmask.finish(output, prepared)
    return results.to_coco(found.boxes, found.scores, found.classes, masks_of(found, exact), names, options)


def masks_of(found: Any, exact: bool) -> results.Masks:
    """The masks of `blendmask.Detections`; `exact`: pasted, so that also values of one half are rounded as there."""
    probabilities, boxes, size = found.probabilities, found.boxes, found.image_size
    if not exact:
        return results.Stretched(probabilities, boxes, size)
    return results.Pasted(lambda index: blendmask.paste_window(probabilities[index], boxes[index], size), size)


class ReplayEngine:
    """The timed engine with the native one's work on the host: images are prepared, and given outputs finished.

    The outputs are the fields of `blendmaskd_workers.blendmask.Instances` in an .npz; every image gets the same.
    """

    device = exact = model = None

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timed = TimedEngine(settings.timed.latency_ms)

    def load(self) -> None:
        try:
            self._config = blendmask.load_config(self._settings.model.config)
            with np.load(self._settings.timed.outputs or "") as arrays:
                self._output = blendmask.Instances(**arrays)
            self._categories = categories.resolve(
                self._config.num_classes, self._settings.model.weights, self._settings.model.categories
            )
        except (OSError, TypeError, ValueError) as error:
            raise EngineError(f"timed.outputs, model.config: {error}") from error

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        for height, width in image_sizes:
            prepared = self.prepare(np.full((height, width, 3), 127, np.uint8))
            self.finish(self._output, prepared, Options())

    def prepare(self, image: Pixels) -> Any:
        prepared = blendmask.prepare(image, self._config)
        blendmask.collate([prepared])  # what the native engine sends to the device
        return prepared

    def segment(self, batch: Sequence[Any]) -> list[Any]:
        self._timed.sleep(len(batch))
        return [self._output] * len(batch)

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, exact=False)
