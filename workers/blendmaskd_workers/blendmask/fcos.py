"""FCOS (Tian et al., arXiv:1904.01355), the part that runs on the device: p3.. in, a fixed number of candidates out.

Axes: N images, C channels, H x W one level, K classes, M candidates of a level (fixed by its size and the config).
Rules: no shape depends on data and nothing is read back: no boolean-mask indexing, `nonzero` or `.item()`, each of
which makes an accelerator wait. Candidates below the threshold are marked, not removed; `selection` drops them on
the host. Module names are AdelaiDet's, so that its checkpoints load unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """One head for all levels: towers that share their beginning, then four outputs. Centre-ness hangs on the box
    tower. With `scaled`, each level multiplies its distances by a factor of its own."""

    def __init__(self, channels: int, classes: int, share_convs: int, cls_convs: int, box_convs: int, norm: str,
                 levels: int, scaled: bool) -> None:
        super().__init__()
        self.share_tower, self.cls_tower, self.bbox_tower = (
            Tower(channels, convs, norm, levels) for convs in (share_convs, cls_convs, box_convs))
        self.cls_logits = nn.Conv2d(channels, classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, 3, padding=1)
        self.ctrness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ModuleList(Scale() if scaled else nn.Identity() for _ in range(levels))

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

    def __init__(self, head: FcosHead, score_threshold: float, threshold_with_centreness: bool, topk: int) -> None:
        super().__init__()
        self.fcos_head = head
        self.score_threshold = score_threshold
        self.threshold_with_centreness = threshold_with_centreness
        self.topk = topk

    def forward(self, features: Sequence[Tensor]) -> list[LevelOutput]:
        return self.fcos_head(features)

    def candidates(self, outputs: Sequence[LevelOutput]) -> Tensor:
        """Return each level's best (cell, class) pairs, (N, sum of M, FIELDS) float32; pairs that miss the threshold
        carry NOT_A_CANDIDATE. The order within a level is undefined."""
        return torch.cat([self._level_candidates(output) for output in outputs], dim=1)

    def _level_candidates(self, output: LevelOutput) -> Tensor:
        images, classes, height, width = output.logits.shape
        assert height * width < LARGEST_EXACT_INTEGER
        probability = output.logits.permute(0, 2, 3, 1).reshape(images, -1, classes).float().sigmoid()  # (N, HW, K)
        centreness = output.centreness.flatten(1).float().sigmoid()[:, :, None]  # (N, HW, 1)
        confidence = probability * centreness  # (N, HW, K)
        thresholded = confidence if self.threshold_with_centreness else probability
        marked = confidence.masked_fill(~(thresholded > self.score_threshold), NOT_A_CANDIDATE)  # NaN is none either
        count = candidates_of_level(height * width, classes, self.topk)
        best, index = marked.flatten(1).topk(count, dim=1)  # (N, M) each
        cell = torch.div(index, classes, rounding_mode="floor")
        distances = output.distances.flatten(2).gather(2, cell[:, None].expand(-1, 4, -1)).float()  # (N, 4, M)
        fields = [best[:, None], (index - cell * classes)[:, None].float(), cell[:, None].float(), distances]
        return torch.cat(fields, dim=1).transpose(1, 2)  # (N, M, FIELDS)


def candidates_of_level(cells: int, classes: int, topk: int) -> int:
    """Return M, the number of candidates that a level of so many cells gives, whatever the image shows."""
    return min(topk, cells * classes)
