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

import functools
import importlib
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from blendmaskd import spawn
from blendmaskd.coco import categories
from blendmaskd.coco.categories import CategoriesError
from blendmaskd.core.supervisor import EXIT_CANNOT_BOOT
from blendmaskd.protocol import Options
from blendmaskd.settings import Settings
from blendmaskd_workers import results
from blendmaskd_workers.batching import Batching

CHECKED_BYTES = 64 << 10
LARGEST_BATCH = 64  # that the settings allow
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

    def load(self) -> None:
        """Open the device and load the network. Raises `EngineError`."""

    def actual(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """What took effect in this process of what was wanted at spawn, see `spawn.observe`."""

    def device_memory_bytes(self) -> int:
        """Bytes held on the device; 0 where that is the host's memory."""

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
            return NativeEngine(settings, device)
        case "adelaidet":
            return AdelaidetEngine(settings, device)
        case "timed" if settings.timed.outputs is not None:
            return ReplayEngine(settings)
        case "timed":
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


class OnDevice:
    """What the engines that compute share: a device, opened when the network is loaded."""

    def __init__(self, settings: Settings, device: str) -> None:
        self._settings = settings.model
        self._device_name = device

    def actual(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        observed: dict[str, Any] = devices().actual(wanted, self.device)
        return observed

    def device_memory_bytes(self) -> int:
        return 0 if self._device_name == "cpu" else int(self.device.memory().used)

    def prepare(self, image: Pixels) -> Any:
        raise NotImplementedError

    def segment(self, batch: Sequence[Any]) -> list[Any]:
        raise NotImplementedError

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        for height, width in image_sizes:
            prepared = self.prepare(np.full((height, width, 3), 127, np.uint8))
            for size in sorted({1, batch}):
                self.segment([prepared] * size)

    def _open(self) -> None:
        try:
            self.device = devices().open_device(self._device_name, self._settings.precision)
        except devices().UnsupportedError as error:
            raise EngineError(f"model.precision = {self._settings.precision}: {error}") from error
        except devices().DeviceError as error:
            raise EngineError(str(error), exit_code=1) from error  # a driver may come back

    def _weights(self) -> str:
        if self._settings.weights is None:
            raise EngineError(
                "model.weights is not set: name a checkpoint of AdelaiDet's BlendMask, or make one of seeded random "
                "weights for a trial: python scripts/random_weights.py --config CONFIG --output random.pth"
            )
        return self._settings.weights

    def _resolve_categories(self, classes: int) -> Sequence[categories.Category]:
        try:
            return categories.resolve(classes, self._settings.weights, self._settings.categories)
        except CategoriesError as error:
            raise EngineError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Sent:
    """An image that is on its way to the device, padded, and what `blendmaskd_workers.blendmask.finish` needs of it."""

    staged: Any  # blendmaskd_workers.devices.Staged, (1, 3, H, W) float32
    image_size: tuple[int, int]
    net_size: tuple[int, int]
    padded_size: tuple[int, int]


class NativeEngine(OnDevice):
    """`blendmaskd_workers.blendmask` on one device."""

    def load(self) -> None:
        from blendmaskd_workers import blendmask

        weights = self._weights()
        try:
            self._config = blendmask.load_config(self._settings.config)
            trained = blendmask.build(self._config)
            blendmask.load_weights(trained, weights)
        except (OSError, blendmask.ConfigError, blendmask.WeightsError) as error:
            raise EngineError(str(error)) from error
        self._categories = self._resolve_categories(self._config.num_classes)
        self._open()
        self._network = network_for(trained, self.device, self._settings.exact)
        self._graphs: dict[tuple[int, ...], Any] = {}  # by the shape of a batch
        self._blendmask = blendmask

    def actual(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return super().actual(wanted) | {"exact": self._network.attends_everywhere}

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        if self._settings.graphs:
            for height, width in image_sizes:
                image = self.prepare(np.full((height, width, 3), 127, np.uint8)).staged.take()
                for size in sorted({1, batch}):
                    images = image.expand(size, -1, -1, -1)
                    self._graphs[images.shape] = self._blendmask.capture(self._network, self.device.graph, images)
        super().warm_up(image_sizes, batch)

    def prepare(self, image: Pixels) -> Sent:
        prepared = self._blendmask.prepare(image, self._config)
        staged = self.device.stage(self._blendmask.collate([prepared]))
        return Sent(staged, prepared.image_size, prepared.net_size, prepared.padded_size)

    def segment(self, batch: Sequence[Sent]) -> list[Any]:
        self.device.use()
        images = [item.staged.take() for item in batch]
        return list(self._blendmask.segment_images(self._network, images, self.device.upload, self._propose))

    def _propose(self, images: Any) -> Any:
        return self._graphs.get(images.shape, self._network.propose)(images)

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, self._settings.exact)


def network_for(trained: Any, device: Any, exact: bool) -> Any:
    """The network as `device`, a `blendmaskd_workers.devices.Device`, runs it: as it was trained, or made for
    inference."""
    from blendmaskd_workers import blendmask

    network = trained if exact else blendmask.for_inference(trained, device.dtype, device.channels_last)
    return network.to(device.torch_device)


def to_coco(
    output: Any, prepared: Any, names: Sequence[categories.Category], options: Options, exact: bool
) -> list[dict[str, Any]]:
    """The COCO results of what our network said about an image; `exact` is of the masks, see `masks_of`."""
    from blendmaskd_workers import blendmask

    found = blendmask.finish(output, prepared)
    return results.to_coco(found.boxes, found.scores, found.classes, masks_of(found, exact), names, options)


def masks_of(found: Any, exact: bool) -> results.Masks:
    """The masks of `blendmask.Detections`; `exact`: pasted, so that also values of one half are rounded as there."""
    from blendmaskd_workers import blendmask

    probabilities, boxes, size = found.probabilities, found.boxes, found.image_size
    if not exact:
        return results.Stretched(probabilities, boxes, size)
    return results.Pasted(lambda index: blendmask.paste_window(probabilities[index], boxes[index], size), size)


@dataclass(frozen=True, slots=True)
class AdelaidetInput:
    """An image resized by detectron2."""

    image: Any  # tensor (3, h, w) float32
    image_size: tuple[int, int]
    padded_size: tuple[int, int]


class AdelaidetEngine(OnDevice):
    """AdelaiDet's own BlendMask: the reference that the native engine equals but for rounding."""

    def load(self) -> None:
        try:
            adet_config = importlib.import_module("adet.config")
            engine = importlib.import_module("detectron2.engine")
        except ImportError as error:
            raise EngineError(
                f"engine adelaidet: {error}. It needs detectron2 and AdelaiDet (adet), built from their sources for "
                "this torch; engine native needs neither, and with model.exact computes what they do"
            ) from error
        weights = self._weights()
        self._open()
        config = adet_config.get_cfg()
        config.merge_from_file(self._settings.config)
        config.MODEL.WEIGHTS = weights
        config.MODEL.DEVICE = str(self.device.torch_device)
        self._predictor = engine.DefaultPredictor(config)
        self._categories = self._resolve_categories(config.MODEL.FCOS.NUM_CLASSES)

    def prepare(self, image: Pixels) -> AdelaidetInput:
        import torch

        height, width = image.shape[:2]
        original = image[:, :, ::-1] if self._predictor.input_format == "RGB" else image
        resized = self._predictor.aug.get_transform(original).apply_image(original)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        padded = (-(-tensor.shape[1] // 32) * 32, -(-tensor.shape[2] // 32) * 32)
        return AdelaidetInput(tensor, (height, width), padded)

    def segment(self, batch: Sequence[AdelaidetInput]) -> list[Any]:
        import torch

        self.device.use()
        inputs = [
            {"image": item.image, "height": item.image_size[0], "width": item.image_size[1]} for item in batch
        ]
        with torch.inference_mode():
            return [output["instances"].to("cpu") for output in self._predictor.model(inputs)]

    def finish(self, output: Any, prepared: AdelaidetInput, options: Options) -> list[dict[str, Any]]:
        masks = output.pred_masks.numpy()
        return results.to_coco(
            output.pred_boxes.tensor.numpy(),
            output.scores.numpy(),
            output.pred_classes.numpy(),
            results.Pasted(lambda index: (masks[index], (0, 0)), prepared.image_size),
            self._categories,
            options,
        )


@dataclass(frozen=True, slots=True)
class TimedInput:
    """An image of which only the `checksum` is kept."""

    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    checksum: int


class TimedEngine:
    """Takes the time that the table says, in full from the moment it gets a batch.

    Sizes between entries are interpolated; beyond the last, each image takes as long as in the last.
    """

    def __init__(self, latency_ms: dict[int, float]) -> None:
        sizes = sorted(latency_ms)
        counts = np.arange(LARGEST_BATCH + 1)
        milliseconds = np.interp(counts, sizes, [latency_ms[size] for size in sizes])
        milliseconds[sizes[-1] :] = latency_ms[sizes[-1]] / sizes[-1] * counts[sizes[-1] :]
        self._seconds: list[float] = (milliseconds / 1000).tolist()

    def load(self) -> None:
        pass

    def actual(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return spawn.observe(wanted)

    def device_memory_bytes(self) -> int:
        return 0

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        pass

    def prepare(self, image: Pixels) -> TimedInput:
        height, width = image.shape[:2]
        return TimedInput((height, width), (height, width), checksum(image))

    def segment(self, batch: Sequence[TimedInput]) -> list[int]:
        self.sleep(len(batch))
        return [item.checksum for item in batch]

    def sleep(self, images: int) -> None:
        """What the device does for a batch of so many images."""
        if self._seconds[images]:  # sleeping for no time takes 0.08 ms
            time.sleep(self._seconds[images])

    def finish(self, output: int, prepared: TimedInput, options: Options) -> list[dict[str, Any]]:
        """One detection, the whole image, with the key `checksum` beside the usual ones."""
        return [{**detection, "checksum": output} for detection in _whole_image(prepared.image_size, options)]


def checksum(image: Pixels) -> int:
    """zlib.crc32 of the BGR pixels, of a large image every n-th row: enough to know it by, and cheap beside serving."""
    step = max(image.nbytes // CHECKED_BYTES, 1)
    return zlib.crc32(np.ascontiguousarray(image[::step]).data)


class ReplayEngine:
    """The timed engine with the native one's work on the host: images are prepared, and given outputs finished.

    The outputs are the fields of `blendmaskd_workers.blendmask.Instances` in an .npz; every image gets the same.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._timed = TimedEngine(settings.timed.latency_ms)

    def load(self) -> None:
        from blendmaskd_workers import blendmask

        try:
            self._config = blendmask.load_config(self._settings.model.config)
            with np.load(self._settings.timed.outputs or "") as arrays:
                self._output = blendmask.Instances(**arrays)
            self._categories = categories.resolve(
                self._config.num_classes, self._settings.model.weights, self._settings.model.categories
            )
        except (OSError, TypeError, ValueError) as error:
            raise EngineError(f"timed.outputs, model.config: {error}") from error

    def actual(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        return self._timed.actual(wanted)

    def device_memory_bytes(self) -> int:
        return 0

    def warm_up(self, image_sizes: Sequence[tuple[int, int]], batch: int) -> None:
        for height, width in image_sizes:
            prepared = self.prepare(np.full((height, width, 3), 127, np.uint8))
            self.finish(self._output, prepared, Options())

    def prepare(self, image: Pixels) -> Any:
        from blendmaskd_workers import blendmask

        prepared = blendmask.prepare(image, self._config)
        blendmask.collate([prepared])  # what the native engine sends to the device
        return prepared

    def segment(self, batch: Sequence[Any]) -> list[Any]:
        self._timed.sleep(len(batch))
        return [self._output] * len(batch)

    def finish(self, output: Any, prepared: Any, options: Options) -> list[dict[str, Any]]:
        return to_coco(output, prepared, self._categories, options, exact=False)


@functools.lru_cache(maxsize=64)
def _whole_image(image_size: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    height, width = image_size
    return results.to_coco(
        np.array([[0, 0, width, height]], np.float32),
        np.ones(1, np.float32),
        np.zeros(1, np.int64),
        results.Pasted(lambda _: (np.ones(image_size, np.bool_), (0, 0)), image_size),
        [categories.Category(1, "image")],
        options,
    )


def devices() -> Any:
    """`blendmaskd_workers.devices`, which imports torch: not before an engine needs it."""
    return importlib.import_module("blendmaskd_workers.devices")
