"""Segmenting a batch: device, host, device, with one packed copy each way between the stages."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from blendmaskd_workers.blendmask.model import BlendMask, Proposals
from blendmaskd_workers.blendmask.postprocess import Instances
from blendmaskd_workers.blendmask.preprocess import Prepared, collate
from blendmaskd_workers.blendmask.selection import Floats, Selection, select

Upload = Callable[[Tensor], Tensor]  # from the host to where the network lives
Propose = Callable[[Tensor], Proposals]
Graph = Callable[[Propose, Tensor], Propose]  # the same function for inputs like an example, recorded


def stay(tensor: Tensor) -> Tensor:
    """Return the tensor itself: the `Upload` of a network that lives on the host."""
    return tensor


def segment(model: BlendMask, batch: Sequence[Prepared], upload: Upload = stay) -> list[Instances]:
    """Run the network on a batch; returns each image's instances, on the host.

    For one thread per device. Batch images of equal `padded_size` only, see `collate`.
    """
    return segment_images(model, [upload(collate(batch))], upload)


@torch.inference_mode()
def segment_images(model: BlendMask, images: Sequence[Tensor], upload: Upload = stay,
                   propose: Propose | None = None) -> list[Instances]:
    """As `segment`, for images (N, 3, H, W) of one size that are where the network lives, in any number of parts.

    `propose` takes the place of the network's own, such as what `capture` returned.
    """
    proposals = (propose or model.propose)(batch_of(images))
    selections = choose(model, proposals, proposals.packed.cpu().numpy())
    masks = blend(model, proposals, selections, upload)
    return instances(model, selections, None if masks is None else masks.cpu().numpy())


@torch.inference_mode()
def capture(model: BlendMask, graph: Graph, images: Tensor) -> Propose:
    """Return `model.propose` as `graph` records it, for images of this shape. Its result lives until the next call."""
    return graph(model.propose, images)


def batch_of(parts: Sequence[Tensor]) -> Tensor:
    """Return the images as one tensor (N, 3, H, W)."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


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
    kept = np.empty((sum(counts), 7), np.float32)  # whole numbers up to 2^24 are exact in it
    kept[:, 0] = np.repeat(np.arange(len(counts)), counts)
    kept[:, 1] = np.concatenate([each.levels for each in selections])
    kept[:, 2] = np.concatenate([each.cells for each in selections])
    kept[:, 3:] = np.concatenate([each.boxes for each in selections])
    on_device = upload(torch.from_numpy(kept))
    images, levels, cells = on_device[:, :3].long().unbind(1)
    return model.blend(proposals, images, levels, cells, on_device[:, 3:]).float()


def instances(model: BlendMask, selections: Sequence[Selection], probabilities: Floats | None) -> list[Instances]:
    """Return each image's instances; `probabilities` is the host's copy of what `blend` returned."""
    side = model.config.resolution
    masks = np.zeros((0, side, side), np.float32) if probabilities is None else probabilities
    ends = np.cumsum([len(kept) for kept in selections])
    return [
        Instances(kept.boxes, kept.scores, kept.classes, each, kept.locations, kept.levels)
        for kept, each in zip(selections, np.split(masks, ends[:-1]))
    ]
