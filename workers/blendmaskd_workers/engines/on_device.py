"""What the engines that compute share: a device, opened when the network is loaded."""
from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blendmaskd.assignment import EXIT_CANNOT_BOOT
from blendmaskd.coco import categories
from blendmaskd.coco.categories import CategoriesError
from blendmaskd.probe import Cause
from blendmaskd.settings import Settings
from blendmaskd_workers import devices
from blendmaskd_workers.engines import Engine, EngineError, Times, segment


class OnDevice:
    device: devices.Device
    exact: bool | None = None
    overlaps = False
    model: str | None = None

    def __init__(self, settings: Settings, device: str) -> None:
        self._settings = settings.model
        self._device_name = device

    def warm_up(self: Engine, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        for height, width in image_sizes:
            prepared = self.prepare(np.full((height, width, 3), 127, np.uint8))
            for size in sorted({1, batch}):
                segment(self, [prepared] * size)

    def _open(self) -> None:
        try:
            self.device = devices.open_device(self._device_name, self._settings.precision)
        except devices.UnsupportedError as error:
            raise EngineError(f"model.precision = {self._settings.precision}: {error}") from error
        except devices.DeviceError as error:
            for_good = error.cause is Cause.NO_TORCH_NPU  # else a driver may come back
            raise EngineError(str(error), exit_code=EXIT_CANNOT_BOOT if for_good else 1) from error

    def _weights(self) -> str:
        if self._settings.weights is None:
            raise EngineError("model.weights is not set: name a checkpoint of AdelaiDet's BlendMask, or make one of "
                              "seeded random weights for a trial: python scripts/random_weights.py --config CONFIG "
                              "--output random.pth")
        return self._settings.weights

    def _resolve_categories(self, classes: int) -> Sequence[categories.Category]:
        try:
            return categories.resolve(classes, self._settings.weights, self._settings.categories)
        except CategoriesError as error:
            raise EngineError(str(error)) from error


class WholeRun:
    """A run of an engine that is not cut: all of it happens in `collect`, while the host waits."""

    def __init__(self, compute: Callable[[], list[Any]]) -> None:
        self._compute = compute
        self._seconds = 0.0

    def complete(self) -> None:
        pass

    def arrived(self) -> bool:
        return True

    def choose(self) -> None:
        pass

    def collect(self) -> list[Any]:
        start = time.monotonic()
        outputs = self._compute()
        self._seconds = time.monotonic() - start
        return outputs

    def times(self) -> Times:
        return Times(self._seconds, self._seconds, {})


def digest(network: Any, *others: object) -> str:
    """16 hex digits of what was loaded: a `torch.nn.Module`'s weights, and others by what they print as."""
    found = hashlib.sha256(repr(others).encode())
    for name, tensor in network.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy())
    return found.hexdigest()[:16]
