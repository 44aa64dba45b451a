"""The engine timed with given outputs: the native one's work on the host, and a sleep."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from blendmaskd import categories
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings
from blendmaskd_workers import blendmask
from blendmaskd_workers.engines import EngineError, Pixels
from blendmaskd_workers.engines.native import to_coco
from blendmaskd_workers.engines.timed import TimedEngine


class ReplayEngine:
    """The timed engine with the native one's work on the host: images are prepared, and given outputs finished.

    The outputs are the fields of `blendmaskd_workers.blendmask.Instances` in an .npz; every image gets the same.
    """

    device = None

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
        return to_coco(output, prepared, self._categories, options)
