"""The engine adelaidet: AdelaiDet's own BlendMask, where it is installed."""
from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blendmaskd.images.decoding import Photograph, bgr
from blendmaskd.protocol import Options
from blendmaskd_workers import results
from blendmaskd_workers.engines import EngineError
from blendmaskd_workers.engines.on_device import OnDevice, WholeRun, digest


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
            raise EngineError(f"engine adelaidet: {error}. It needs detectron2 and AdelaiDet (adet), built from their "
                              "sources for this torch; engine native needs neither, and with model.exact computes what "
                              "they do") from error
        weights = self._weights()
        self._open()
        config = adet_config.get_cfg()
        config.merge_from_file(self._settings.config)
        config.MODEL.WEIGHTS = weights
        config.MODEL.DEVICE = str(self.device.torch_device)
        self._predictor = engine.DefaultPredictor(config)
        self._categories = self._resolve_categories(config.MODEL.FCOS.NUM_CLASSES)
        self.model = digest(self._predictor.model, config, self._categories)

    def prepare(self, photograph: Photograph) -> AdelaidetInput:
        image = bgr(photograph)
        height, width = image.shape[:2]
        original = image[:, :, ::-1] if self._predictor.input_format == "RGB" else image
        resized = self._predictor.aug.get_transform(original).apply_image(original)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        padded = (-(-tensor.shape[1] // 32) * 32, -(-tensor.shape[2] // 32) * 32)
        return AdelaidetInput(tensor, (height, width), padded)

    def launch(self, batch: Sequence[AdelaidetInput]) -> WholeRun:
        return WholeRun(lambda: self._segment(batch))

    def _segment(self, batch: Sequence[AdelaidetInput]) -> list[Any]:
        self.device.use()
        inputs = [{"image": item.image, "height": item.image_size[0], "width": item.image_size[1]} for item in batch]
        with torch.inference_mode():
            return [output["instances"].to("cpu") for output in self._predictor.model(inputs)]

    def finish(self, output: Any, prepared: AdelaidetInput, options: Options,
               deadline: float = math.inf) -> list[dict[str, Any]]:
        masks = output.pred_masks.numpy()
        pasted = results.Pasted(lambda index: (masks[index], (0, 0)), prepared.image_size, deadline)
        boxes, scores, classes = output.pred_boxes.tensor.numpy(), output.scores.numpy(), output.pred_classes.numpy()
        return results.to_coco(boxes, scores, classes, pasted, self._categories, options)
