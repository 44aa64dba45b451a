"""Segmenting a batch: device, host, device, with one packed copy each way between the stages.

What the device does before the host is cut once more, in `begin` and `complete`: a device that has begun with the next
batch does not stand still while the host chooses what is kept of the last.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blendmaskd_workers.blendmask.model import KEPT_FIELDS, BlendMask, Proposals, pack
from blendmaskd_workers.blendmask.postprocess import Instances
from blendmaskd_workers.blendmask.preprocess import Prepared, collate
from blendmaskd_workers.blendmask.selection import Floats, Selection, select

Upload = Callable[[Tensor], Tensor]  # from the host to where the network lives
Begin = Callable[[Tensor], Tensor]
Complete = Callable[[Tensor], Proposals]
Blend = Callable[[Tensor], Tensor]
Graphs = tuple[Begin, Complete, Blend | None]  # None: as `BlendMask.blend`
Graph = Callable[[Callable[[Tensor], Any], Tensor], Callable[[Tensor], Any]]  # the same for inputs like an example


@torch.inference_mode()
def segment(model: BlendMask, batch: Sequence[Prepared], upload: Upload = lambda tensor: tensor) -> list[Instances]:
    """Run the network on a batch; returns each image's instances, on the host.

    For one thread per device. Batch images of equal `padded_size` only, see `collate`.
    """
    proposals = model.propose(collate([upload(prepared.tensor) for prepared in batch], model.config))
    selections = choose(model, proposals, proposals.packed.cpu().numpy())
    masks = blend(model, proposals, selections, upload)
    return instances(model, selections, None if masks is None else masks.cpu().numpy())


@torch.inference_mode()
def capture(model: BlendMask, graph: Graph, images: Tensor) -> tuple[Begin, Complete, Blend]:
    """Return `model.begin`, `model.complete` and `model.blend` as `graph` records them, for images of this shape.

    `blend` is of the last that this `complete` returned, for as many detections as there are `places`. What they return
    lives until their next call.
    """
    begin: Begin = graph(model.begin, images)
    complete: Complete = graph(model.complete, begin(images))
    proposals = complete(begin(images))
    kept = proposals.packed.new_zeros(places(model, len(images)), KEPT_FIELDS)
    return begin, complete, graph(partial(model.blend, proposals), kept)


@torch.inference_mode()
def begin(model: BlendMask, images: Sequence[Tensor], network: Begin) -> Tensor:
    """Begin with prepared images (3, h, w) uint8, where the network lives. `network`: `model.begin`, or captured."""
    return network(collate(images, model.config))


@torch.inference_mode()
def complete(begun: Tensor, network: Complete) -> Proposals:
    """Go on with what `begin` returned. `network`: `BlendMask.complete`, or captured."""
    return network(begun)


def choose(model: BlendMask, proposals: Proposals, packed: Floats) -> list[Selection]:
    """Return what is kept of each image; `packed` is the host's copy of the proposals' candidates. Host only."""
    return [select(candidates, proposals.level_sizes, model.config) for candidates in packed]


def places(model: BlendMask, images: int) -> int:
    """Return how many boxes are kept of a batch of so many images, at most, unless some tie with an image's last."""
    return images * model.config.post_nms_topk


@torch.inference_mode()
def blend(model: BlendMask, proposals: Proposals, selections: Sequence[Selection], upload: Upload,
          fewest: int = 0, network: Blend | None = None) -> Tensor | None:
    """Return mask probabilities (max(D, fewest), R, R) float32 of all D that was kept, where the network lives.

    Those beyond D are of no meaning: with `places` as `fewest`, shapes do not depend on what the images show. `network`
    is what `capture` returned for `proposals` and as many; where more are kept, `BlendMask.blend` is called.
    None, and the device is left alone, when nothing was kept.
    """
    counts = [len(kept) for kept in selections]
    if sum(counts) == 0:
        return None
    levels, cells, boxes = (np.concatenate([getattr(each, name) for each in selections])
                            for name in ("levels", "cells", "boxes"))
    kept = np.zeros((max(sum(counts), fewest), KEPT_FIELDS), np.float32)
    images = np.repeat(np.arange(len(counts)), counts)
    kept[:len(images)] = pack(images, levels, cells, boxes, proposals.level_sizes)
    if network is None or len(kept) > fewest:
        network = partial(model.blend, proposals)
    return network(upload(torch.from_numpy(kept)))


def instances(model: BlendMask, selections: Sequence[Selection], probabilities: Floats | None) -> list[Instances]:
    """Return each image's instances; `probabilities` is the host's copy of what `blend` returned, or its first D."""
    side = model.config.resolution
    masks = np.zeros((0, side, side), np.float32) if probabilities is None else probabilities
    ends = np.cumsum([len(kept) for kept in selections])
    return [
        Instances(kept.boxes, kept.scores, kept.classes, each, kept.locations, kept.levels)
        for kept, each in zip(selections, np.split(masks, ends))
    ]
