"""Segmenting a batch: device, host, device, with one packed copy each way between the stages.

What the device does before the host is cut once more, in `begin` and `complete`: a device that has begun with the next
batch does not stand still while the host chooses what is kept of the last.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blendmaskd_workers.blendmask.model import BlendMask, Proposals, pack
from blendmaskd_workers.blendmask.postprocess import Instances
from blendmaskd_workers.blendmask.preprocess import Prepared, collate
from blendmaskd_workers.blendmask.selection import Floats, Selection, select

Upload = Callable[[Tensor], Tensor]  # from the host to where the network lives
Begin = Callable[[Tensor], Tensor]
Complete = Callable[[Tensor], Proposals]
Graph = Callable[[Callable[[Tensor], Any], Tensor], Callable[[Tensor], Any]]  # the same for inputs like an example


def stay(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the `Upload` of a network that lives on the host."""
    return tensor


@torch.inference_mode()
def segment(model: BlendMask, batch: Sequence[Prepared], upload: Upload = stay) -> list[Instances]:
    """Run the network on a batch; returns each image's instances, on the host.

    For one thread per device. Batch images of equal `padded_size` only, see `collate`.
    """
    proposals = model.propose(upload(collate(batch)))
    selections = choose(model, proposals, proposals.packed.cpu().numpy())
    masks = blend(model, proposals, selections, upload)
    return instances(model, selections, None if masks is None else masks.cpu().numpy())


@torch.inference_mode()
def capture(model: BlendMask, graph: Graph, images: Tensor) -> tuple[Begin, Complete]:
    """Return `model.begin` and `model.complete` as `graph` records them, for images of this shape.

    What they return lives until their next call.
    """
    begin: Begin = graph(model.begin, images)
    return begin, graph(model.complete, begin(images))


@torch.inference_mode()
def begin(images: Sequence[Tensor], network: Begin) -> Tensor:
    """Begin with images (N, 3, H, W) of one size, in any number of parts. `network`: `BlendMask.begin`, or captured."""
    return network(images[0] if len(images) == 1 else torch.cat(list(images)))


@torch.inference_mode()
def complete(begun: Tensor, network: Complete) -> Proposals:
    """Go on with what `begin` returned. `network`: `BlendMask.complete`, or captured."""
    return network(begun)


def choose(model: BlendMask, proposals: Proposals, packed: Floats) -> list[Selection]:
    """Return what is kept of each image; `packed` is the host's copy of the proposals' candidates. Host only."""
    return [select(candidates, proposals.level_sizes, model.config) for candidates in packed]


@torch.inference_mode()
def blend(model: BlendMask, proposals: Proposals, selections: Sequence[Selection], upload: Upload) -> Tensor | None:
    """Return mask probabilities (D, R, R) float32 of all that was kept in the batch, where the network lives.

    None, and the device is left alone, when nothing was kept.
    """
    counts = [len(kept) for kept in selections]
    if sum(counts) == 0:
        return None
    levels, cells, boxes = (np.concatenate([getattr(each, name) for each in selections])
                            for name in ("levels", "cells", "boxes"))
    kept = pack(np.repeat(np.arange(len(counts)), counts), levels, cells, boxes, proposals.level_sizes)
    return model.blend(proposals, upload(torch.from_numpy(kept)))


def instances(model: BlendMask, selections: Sequence[Selection], probabilities: Floats | None) -> list[Instances]:
    """Return each image's instances; `probabilities` is the host's copy of what `blend` returned."""
    side = model.config.resolution
    masks = np.zeros((0, side, side), np.float32) if probabilities is None else probabilities
    ends = np.cumsum([len(kept) for kept in selections])
    return [
        Instances(kept.boxes, kept.scores, kept.classes, each, kept.locations, kept.levels)
        for kept, each in zip(selections, np.split(masks, ends[:-1]))
    ]
