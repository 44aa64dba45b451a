"""FCOS (Tian et al., arXiv:1904.01355), the part that runs on the device: p3.. in, a fixed number of candidates out.

Axes: N images, C channels, H x W one level, S cells of all levels, K classes, M candidates of a level (fixed by its
size and the config).
Rules: no shape depends on data and nothing is read back: no boolean-mask indexing, `nonzero` or `.item()`, each of
which makes an accelerator wait. Candidates below the threshold are marked, not removed; `selection` drops them on
the host. Module names are AdelaiDet's, so that its checkpoints load unchanged.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blendmaskd_workers.blendmask.config import Config
from blendmaskd_workers.blendmask.norms import NaiveGroupNorm

GROUPS = 32  # of GroupNorm in the towers
NOT_A_CANDIDATE = -1.0  # in place of the confidence: a product of probabilities is never negative
FIELDS = 7  # of a packed candidate: confidence, class, cell, then left, top, right, bottom in strides
LARGEST_EXACT_INTEGER = 2**24  # float32 carries whole numbers below this exactly; cells travel as float32


@dataclass(frozen=True)
class LevelOutput:
    """What the head says about each cell of one level."""

    logits: Tensor  # (N, K, H, W) class scores before the sigmoid
    distances: Tensor  # (N, 4, H, W) to the left, top, right, bottom side, in strides, >= 0
    centreness: Tensor  # (N, 1, H, W) before the sigmoid
    box_features: Tensor  # (N, C, H, W) of the box tower: the top layer reads them


class Tower(nn.ModuleList):
    """`convs` times: 3x3 convolution, norm, ReLU; without any it is the identity.

    Group norm ("GN", "NaiveGN") sees the padding of a batch. Batch norm ("BN", "SyncBN") has weights and statistics
    of its own for each of the `levels`, while they share the convolutions.
    """

    def __init__(self, channels: int, convs: int, norm: str, levels: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(convs):
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            layers += [conv, tower_norm(norm, channels, levels), nn.ReLU(inplace=True)]
        super().__init__(layers)

    def forward(self, x: Tensor, level: int) -> Tensor:
        for layer in self:
            x = layer[level](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return x


def tower_norm(norm: str, channels: int, levels: int) -> nn.Module:
    """Return one norm for all levels, or a list with one for each level."""
    if norm == "GN":
        return nn.GroupNorm(GROUPS, channels)
    if norm == "NaiveGN":
        return NaiveGroupNorm(GROUPS, channels)
    assert norm in ("BN", "SyncBN"), norm
    return nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels))


class Scale(nn.Module):
    """A factor that is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class FcosHead(nn.Module):
    """One head for all levels: towers with one beginning, then four outputs. Centre-ness hangs on the box tower."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, levels = config.fpn_channels, len(config.strides)
        self.share_tower, self.cls_tower, self.bbox_tower = (
            Tower(channels, convs, config.head_norm, levels)
            for convs in (config.num_share_convs, config.num_cls_convs, config.num_box_convs))
        self.cls_logits = nn.Conv2d(channels, config.num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() if config.use_scale else nn.Identity() for _ in range(levels))

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        return [self._level(level, feature) for level, feature in enumerate(features)]

    def _level(self, level: int, feature: Tensor) -> LevelOutput:
        shared = self.share_tower(feature, level)
        box_features = self.bbox_tower(shared, level)
        return LevelOutput(
            logits=self.cls_logits(self.cls_tower(shared, level)),
            distances=F.relu(self.scales[level](self.bbox_pred(box_features))),
            centreness=self.ctrness(box_features),
            box_features=box_features,
        )


class Fcos(nn.Module):
    """The head and the choice of candidates from its output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.fcos_head = FcosHead(config)
        self.squashes_levels_apart = True  # as the reference: on a CPU a sigmoid's rounding depends on its place

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        return self.fcos_head(features)

    def candidates(self, outputs: Sequence[LevelOutput]) -> Tensor:
        """Return each level's best (cell, class) pairs, (N, sum of M, FIELDS) float32; pairs that miss the threshold
        carry NOT_A_CANDIDATE. The order within a level is undefined, as is which of equal pairs are the last."""
        classes = outputs[0].logits.shape[1]
        cells = [output.logits.shape[2] * output.logits.shape[3] for output in outputs]
        assert sum(cells) < LARGEST_EXACT_INTEGER
        probability, centreness, distances = self._maps(outputs).split_with_sizes([classes, 1, 4], dim=1)
        if not self.squashes_levels_apart:
            probability, centreness = probability.sigmoid(), centreness.sigmoid()
        confidence = probability * centreness  # (N, K, S)
        thresholded = confidence if self.config.threshold_with_centreness else probability
        passes = thresholded > self.config.score_threshold  # NaN does not either
        marked = confidence.masked_fill(~passes, NOT_A_CANDIDATE)
        best, label, cell, place = best_pairs(marked, cells, self.config.pre_nms_topk)
        distances = distances.gather(2, place[:, None].expand(-1, 4, -1))  # (N, 4, sum of M)
        fields = [best[:, None], label[:, None].float(), cell[:, None].float(), distances]
        return torch.cat(fields, dim=1).transpose(1, 2)  # (N, sum of M, FIELDS)

    def _maps(self, outputs: Sequence[LevelOutput]) -> Tensor:
        """Return logits, or what the sigmoid makes of them, centre-ness alike, and distances: (N, K + 1 + 4, S)."""
        parts = [(output.logits, output.centreness, output.distances) for output in outputs]
        if self.squashes_levels_apart:
            parts = [(a.float().sigmoid(), b.float().sigmoid(), distances.float()) for a, b, distances in parts]
        return torch.cat([torch.cat(part, dim=1).flatten(2) for part in parts], dim=2).float()


def best_pairs(values: Tensor, cells: Sequence[int], topk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return value, class, cell within its level and cell among all, each (N, sum of M), of each level's best pairs.

    `values` (N, K, S) are those of all levels' cells; `cells` says how many each level has. A level's best `topk` pairs
    of cell and class lie in its `topk` cells of the best classes, so those are sought first: K times fewer values.
    """
    classes = values.shape[1]
    kept = [at_most(topk, count) for count in cells]
    bests = values.amax(dim=1).split_with_sizes(list(cells), dim=1)
    cell_of = [best.topk(count, dim=1).indices for best, count in zip(bests, kept)]
    place_of = _joined(cell_of, cells)  # (N, sum of kept)
    pairs = values.gather(2, place_of[:, None].expand(-1, classes, -1)).transpose(1, 2).flatten(1)
    of_levels = pairs.split_with_sizes([count * classes for count in kept], dim=1)
    counts = [candidates_of_level(count, classes, topk) for count in cells]
    found = [level.topk(count, dim=1) for level, count in zip(of_levels, counts)]
    index = _joined([level.indices for level in found], [count * classes for count in kept])
    best = pairs.gather(1, index)  # an Ascend 910A's topk gives values rounded to float16
    narrow = index.int()  # it divides int64 on a CPU of its own
    row = torch.div(narrow, classes, rounding_mode="floor").long()
    return best, narrow % classes, torch.cat(cell_of, dim=1).gather(1, row), place_of.gather(1, row)


def _joined(indices: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return indices into parts of these sizes as indices into the whole."""
    moved = [index + start for index, start in zip(indices[1:], itertools.accumulate(sizes))]
    return torch.cat([indices[0], *moved], dim=1)


def candidates_of_level(cells: int, classes: int, topk: int) -> int:
    """Return M, the number of candidates that a level of so many cells gives, whatever the image shows."""
    return at_most(topk, cells * classes)


def at_most(limit: int, count: int) -> int:
    """Return the smaller one. While the network is traced, sizes are tensors, which `min` would make constants of."""
    return count.clamp(max=limit) if isinstance(count, Tensor) else min(limit, count)
