"""BlendMask's five training losses (FCOS, arXiv:1904.01355; BlendMask, arXiv:2001.00309), those of AdelaiDet.

Axes: N images, S locations of the batch (order: see `targets`), P positive ones, G instances, C channels, K bases,
A side of an attention map, R side of a mask. Inference never imports this.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blendmaskd_workers.blendmask.blender import combine, roi_align
from blendmaskd_workers.blendmask.fcos import LevelOutput
from blendmaskd_workers.blendmask.model import BlendMask
from blendmaskd_workers.blendmask.patches import convolve, patches_at
from blendmaskd_workers.training.config import LossConfig
from blendmaskd_workers.training.targets import GroundTruth, Targets, assign

SMALLEST_NORMALISER = 1e-6  # of losses weighted by centre-ness
SEMANTIC_STRIDE = 8  # the semantic head reads p3


def losses(model: BlendMask, images: Tensor, ground_truths: Sequence[GroundTruth],
           config: LossConfig | None = None) -> dict[str, Tensor]:
    """Return the losses of a batch by AdelaiDet's names: scalars whose sum is to be minimised.

    images (N, 3, H, W) as `collate` makes them; the ground truth of each, on the same device. `loss_basis_sem` is
    there when the network has a semantic head; each ground truth then needs its semantic map. Without any positive
    location the losses of boxes and masks are zero, and the top layer gets no gradient.
    """
    config = config or LossConfig()
    features = model.backbone(images)
    bases = model.basis_module(features[:3])  # (N, K, H/4, W/4)
    outputs = model.proposal_generator(features)
    targets = assign(ground_truths, [(output.logits.shape[2], output.logits.shape[3]) for output in outputs],
                     model.config.strides, config.size_bounds, config.centre_radius, model.config.num_classes)
    result = {}
    if model.config.semantic_classes is not None:
        logits = model.basis_module.seg_head(features[0])  # (N, classes + 1, H/8, W/8)
        result["loss_basis_sem"] = config.semantic_weight * semantic_loss(logits, ground_truths)
    size = model.config.attention_size
    attentions = convolve(model.top_layer, _patches(outputs, targets.positives))  # (P, K * A * A)
    attentions = attentions.view(-1, model.config.num_bases, size, size)
    result["loss_mask"] = config.mask_weight * mask_loss(bases, attentions, targets, ground_truths)
    return result | fcos_losses(outputs, targets, config)


def fcos_losses(outputs: Sequence[LevelOutput], targets: Targets, config: LossConfig) -> dict[str, Tensor]:
    """Return the losses of classes, boxes and centre-ness (FCOS, equation 2, with generalised IoU)."""
    positives = targets.positives
    logits = _flatten([output.logits for output in outputs])  # (S, classes)
    distances = _flatten([output.distances for output in outputs])[positives]  # (P, 4)
    centreness = _flatten([output.centreness for output in outputs])[positives, 0]  # (P,)
    count = max(len(positives), 1)
    classes = logits.shape[1]
    wanted = F.one_hot(targets.labels, classes + 1)[:, :classes].to(logits.dtype)  # (S, classes)
    class_loss = focal_loss(logits, wanted, config.focal_alpha, config.focal_gamma).sum() / count
    box_loss = (giou_loss(distances, targets.distances) * targets.centreness).sum() / _normaliser(targets)
    centre_loss = F.binary_cross_entropy_with_logits(centreness, targets.centreness, reduction="sum") / count
    return {"loss_fcos_cls": config.class_weight * class_loss, "loss_fcos_loc": box_loss, "loss_fcos_ctr": centre_loss}


def focal_loss(logits: Tensor, wanted: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the focal loss (arXiv:1708.02002, equation 5) of each logit; `wanted` is 0 or 1."""
    probability = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    miss = 1 - (probability * wanted + (1 - probability) * (1 - wanted))
    return cross_entropy * miss**gamma * (alpha * wanted + (1 - alpha) * (1 - wanted))


def giou_loss(distances: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 - generalised IoU (arXiv:1902.09630) of boxes around the same places, (P,).

    Both are distances (P, 4) to left, top, right, bottom, in strides. As in the reference, intersection and union are
    each one larger than they are.
    """
    low, high = torch.minimum(distances, wanted), torch.maximum(distances, wanted)
    intersection = _area(low)
    union = _area(distances) + _area(wanted) - intersection
    hull = _area(high)
    giou = (intersection + 1) / (union + 1) - (hull - union) / hull
    return 1 - giou


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(dim=1)
    return (left + right) * (top + bottom)


def mask_loss(bases: Tensor, attentions: Tensor, targets: Targets, ground_truths: Sequence[GroundTruth]) -> Tensor:
    """Return the mean cross entropy of each positive's mask within its instance's box, weighted by centre-ness.

    bases (N, K, H/4, W/4); attentions (P, K, A, A), those of the positive locations. Predicted boxes play no role.
    """
    if len(attentions) == 0:
        return 0 * bases.sum()
    boxes = torch.cat([truth.boxes for truth in ground_truths])  # (G, 4), G of the batch
    masks = torch.cat([truth.masks for truth in ground_truths])  # (G, R, R)
    counts = torch.tensor([len(truth.boxes) for truth in ground_truths])
    images = torch.arange(len(ground_truths)).repeat_interleave(counts).to(bases.device)  # (G,)
    crops = roi_align(bases, images, boxes, masks.shape[1])[targets.instances]  # (P, K, R, R)
    logits = combine(crops, attentions)  # (P, R, R)
    wanted = masks[targets.instances].to(logits.dtype)
    per_mask = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
    return (per_mask * targets.centreness).sum() / _normaliser(targets)


def _normaliser(targets: Targets) -> Tensor:
    return targets.centreness.sum().clamp(min=SMALLEST_NORMALISER)


def semantic_loss(logits: Tensor, ground_truths: Sequence[GroundTruth]) -> Tensor:
    """Return the mean cross entropy of the semantic head (N, classes + 1, H/8, W/8); padding is background.

    A cell's class is that of its top left pixel.
    """
    wanted = torch.zeros(len(logits), *logits.shape[2:], dtype=torch.int64, device=logits.device)
    for cells, truth in zip(wanted, ground_truths):
        assert truth.semantic is not None, "a network with a semantic head needs semantic maps"
        sampled = truth.semantic[::SEMANTIC_STRIDE, ::SEMANTIC_STRIDE]
        cells[: sampled.shape[0], : sampled.shape[1]] = sampled
    return F.cross_entropy(logits, wanted)


def _patches(outputs: Sequence[LevelOutput], positives: Tensor) -> Tensor:
    """Return what the top layer reads at the positive locations, (P, 9, C): few locations are positive."""
    start, found = 0, []
    for output in outputs:
        images, _, height, width = output.box_features.shape
        end = start + images * height * width
        here = positives[(positives >= start) & (positives < end)] - start
        found.append(patches_at(output.box_features, here // (height * width), here % (height * width)))
        start = end
    return torch.cat(found)


def _flatten(levels: Sequence[Tensor]) -> Tensor:
    """Return (S, C) from the levels' (N, C, H_l, W_l), in the order of `targets`."""
    return torch.cat([level.permute(0, 2, 3, 1).flatten(0, 2) for level in levels])
