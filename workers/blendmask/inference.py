"""Segmenting a batch: device, host, device, with one packed copy back from each device stage."""

from collections.abc import Sequence

import numpy as np
import torch

from workers.blendmask.model import BlendMask, Proposals
from workers.blendmask.postprocess import Instances
from workers.blendmask.preprocess import Prepared, collate
from workers.blendmask.selection import Floats, Selection, select


@torch.inference_mode()
def segment(model: BlendMask, batch: Sequence[Prepared], device: torch.device | str) -> list[Instances]:
    """Run the network, which lives on `device`, on a batch; returns each image's instances, on the host.

    For one thread per device. Batch images of equal `padded_size` only, see `collate`.
    """
    proposals = model.propose(collate(batch).to(device))
    packed = proposals.packed.cpu().numpy()
    selections = [select(candidates, proposals.level_sizes, model.config) for candidates in packed]
    probabilities = _masks(model, proposals, selections)
    return [
        Instances(kept.boxes, kept.scores, kept.classes, masks, kept.locations, kept.levels)
        for kept, masks in zip(selections, probabilities)
    ]


def _masks(model: BlendMask, proposals: Proposals, selections: Sequence[Selection]) -> list[Floats]:
    """Return mask probabilities (n, R, R) of each image; the device is left alone when nothing was kept."""
    counts = [len(kept) for kept in selections]
    side = model.config.resolution
    if sum(counts) == 0:
        return [np.zeros((0, side, side), np.float32) for _ in selections]
    device = proposals.bases.device
    where = np.stack([
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([kept.levels for kept in selections]),
        np.concatenate([kept.cells for kept in selections]),
    ])
    images, levels, cells = torch.from_numpy(where).to(device)
    boxes = torch.from_numpy(np.concatenate([kept.boxes for kept in selections])).to(device)
    masks = model.blend(proposals, images, levels, cells, boxes).float().cpu().numpy()
    return np.split(masks, np.cumsum(counts)[:-1])
