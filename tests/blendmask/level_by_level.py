"""What the device does, as it was before it took all levels, and all four neighbours of a sample, at once."""

import torch
from torch import Tensor

from blendmaskd_workers.blendmask.blender import BASES_SCALE, combine
from blendmaskd_workers.blendmask.fcos import NOT_A_CANDIDATE, Fcos, LevelOutput, candidates_of_level
from blendmaskd_workers.blendmask.model import BlendMask, Proposals
from blendmaskd_workers.blendmask.patches import convolve, patches_at


def marked(fcos: Fcos, output: LevelOutput) -> Tensor:
    """The confidence of each pair of cell and class, (N, HW, K)."""
    images, classes = output.logits.shape[:2]
    probability = output.logits.permute(0, 2, 3, 1).reshape(images, -1, classes).float().sigmoid()
    confidence = probability * output.centreness.flatten(1).float().sigmoid()[:, :, None]
    thresholded = confidence if fcos.config.threshold_with_centreness else probability
    return confidence.masked_fill(~(thresholded > fcos.config.score_threshold), NOT_A_CANDIDATE)


def candidates(fcos: Fcos, output: LevelOutput) -> Tensor:
    """A level's best pairs, (N, M, FIELDS)."""
    classes = output.logits.shape[1]
    pairs = marked(fcos, output).flatten(1)
    best, index = pairs.topk(candidates_of_level(pairs.shape[1] // classes, classes, fcos.config.pre_nms_topk), dim=1)
    cell = torch.div(index, classes, rounding_mode="floor")
    distances = output.distances.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).float()
    fields = [best[:, None], (index - cell * classes)[:, None].float(), cell[:, None].float(), distances]
    return torch.cat(fields, dim=1).transpose(1, 2)


def blend(model: BlendMask, proposals: Proposals, images: Tensor, levels: Tensor, cells: Tensor, boxes: Tensor):
    """Mask probabilities (D, R, R)."""
    size, bases = model.config.attention_size, model.config.num_bases
    if proposals.attentions is None:
        attentions = convolve(model.top_layer, patches_of_levels(proposals.box_features, images, levels, cells))
    else:
        attentions = values_of_levels(proposals.attentions, images, levels, cells)
    crops = roi_align(proposals.bases.float(), images, boxes, model.config.resolution)
    return combine(crops, attentions.view(-1, bases, size, size)).sigmoid()


def patches_of_levels(maps, images, levels, cells):
    gathered = maps[0].new_zeros(len(cells), 9, maps[0].shape[1])
    for level, features in enumerate(maps):
        here = (levels == level)[:, None, None]
        gathered = torch.where(here, patches_at(features, images, cells), gathered)
    return gathered


def values_of_levels(maps, images, levels, cells):
    gathered = maps[0].new_zeros(len(cells), maps[0].shape[1])
    for level, values in enumerate(maps):
        at_cells = values.flatten(2)[images, :, cells.clamp(max=values.shape[2] * values.shape[3] - 1)]
        gathered = torch.where((levels == level)[:, None], at_cells, gathered)
    return gathered


def roi_align(bases, images, boxes, resolution):
    height, width = bases.shape[2:]
    corners = boxes * BASES_SCALE - 0.5
    bins = (corners[:, 2:] - corners[:, :2]) / resolution
    steps = torch.arange(resolution, dtype=boxes.dtype)
    samples = corners[:, :2, None] + steps * bins[:, :, None] + 0.5 * bins[:, :, None]
    x0, x1, right, inside_x = neighbours(samples[:, 0], width)
    y0, y1, down, inside_y = neighbours(samples[:, 1], height)
    table = bases.permute(0, 2, 3, 1).reshape(-1, bases.shape[1]).contiguous()

    def corner(y, x, weight):
        index = (images[:, None, None] * height + y[:, :, None]) * width + x[:, None, :]
        return table.index_select(0, index.flatten()).view(*index.shape, -1) * weight[..., None]

    right, down = right[:, None, :], down[:, :, None]
    value = corner(y0, x0, (1 - down) * (1 - right)) + corner(y0, x1, (1 - down) * right)
    value = value + corner(y1, x0, down * (1 - right)) + corner(y1, x1, down * right)
    inside = inside_y[:, :, None] & inside_x[:, None, :]
    return value.masked_fill(~inside[..., None], 0.0).permute(0, 3, 1, 2).contiguous()


def neighbours(position, size):
    inside = (position >= -1) & (position <= size)
    position = position.masked_fill(~inside, 0.0).clamp(0, size - 1)
    before = position.floor()
    share = position - before
    before = before.long()
    return before, (before + 1).clamp(max=size - 1), share, inside
