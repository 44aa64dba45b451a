"""From network pixels back to the photograph, as detectron2's `detector_postprocess` does it. Host only.

Axes: n detections, R side of a mask, H x W the photograph. Boxes are xyxy with continuous coordinates: pixel (0, 0)
covers 0..1. Masks are pasted one at a time and only inside the box, so that memory stays small.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from blendmaskd_workers.blendmask.preprocess import Prepared
from blendmaskd_workers.blendmask.selection import Floats, Integers

Mask = npt.NDArray[np.bool_]
MASK_THRESHOLD = 0.5
PIXELS_AT_ONCE = 2**20  # of a mask, while it is pasted: bounds the memory for large photographs


@dataclass(frozen=True)
class Instances:
    """What the network says about one image: n detections in descending score, in network pixels, on the host."""

    boxes: Floats  # (n, 4) xyxy, not clipped to the image
    scores: Floats  # (n,) 0..1
    classes: Integers  # (n,) contiguous, from 0
    probabilities: Floats  # (n, R, R) masks over their unclipped boxes
    locations: Floats  # (n, 2) x, y of the cell that predicted each
    levels: Integers  # (n,) 0 is p3


@dataclass(frozen=True)
class Detections:
    """The same in pixels of the photograph; boxes that lie wholly outside it are gone."""

    boxes: Floats  # (n, 4) xyxy, clipped to the photograph
    scores: Floats  # (n,) descending
    classes: Integers  # (n,) contiguous, from 0
    probabilities: Floats  # (n, R, R): masks over these clipped boxes, for `paste_one`
    image_size: tuple[int, int]  # H, W

    def masks(self) -> Iterator[Mask]:
        """Return the masks (H, W), each pasted when its turn comes."""
        return (paste_one(*pair, self.image_size) for pair in zip(self.probabilities, self.boxes))


def finish(instances: Instances, prepared: Prepared) -> Detections:
    """Scale boxes to the photograph, clip them and drop those that become empty; the order stays.

    A mask is stretched over the clipped box although it was computed for the unclipped one: so does the reference.
    """
    height, width = prepared.image_size
    scale = np.array([width / prepared.net_size[1], height / prepared.net_size[0]] * 2).astype(np.float32)
    boxes = np.clip(instances.boxes * scale, 0, np.array([width, height] * 2, np.float32))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return Detections(boxes[keep], instances.scores[keep], instances.classes[keep], instances.probabilities[keep],
                      (height, width))


def paste_one(probability: Floats, box: Floats, image_size: tuple[int, int]) -> Mask:
    """Return one mask (H, W): where `probability` (R, R), stretched over `box`, reaches one half."""
    mask = np.zeros(image_size, bool)
    window, (top, left) = paste_window(probability, box, image_size)
    mask[top: top + window.shape[0], left: left + window.shape[1]] = window
    return mask


@torch.inference_mode()
def paste_window(probability: Floats, box: Floats, image_size: tuple[int, int]) -> tuple[Mask, tuple[int, int]]:
    """Return the only part of a mask that can be set, a pixel more than the box, and its top left corner (y, x).

    The box must be clipped to the image. Probabilities are interpolated at pixel centres, and fade to 0 outside.
    """
    height, width = image_size
    left, top = (max(int(side) - 1, 0) for side in np.floor(box[:2]))
    right, bottom = (min(int(side) + 1, limit) for side, limit in zip(np.ceil(box[2:]), (width, height)))
    x0, y0, x1, y1 = torch.tensor(box)
    x = (torch.arange(left, right, dtype=torch.float32) + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(top, bottom, dtype=torch.float32) + 0.5 - y0) / (y1 - y0) * 2 - 1
    rows = max(PIXELS_AT_ONCE // len(x), 1)
    source = torch.tensor(probability)
    return torch.cat([_reaches_half(source, x, part) for part in y.split(rows)]).numpy(), (top, left)


def _reaches_half(probability: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return where `probability` (R, R), spread over -1..1, is at least one half at columns x (w,) and rows y (h,)."""
    grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2)  # (h, w, 2)
    values = F.grid_sample(probability[None, None], grid[None], mode="bilinear", padding_mode="zeros",
                           align_corners=False)  # (1, 1, h, w)
    return values[0, 0] >= MASK_THRESHOLD
