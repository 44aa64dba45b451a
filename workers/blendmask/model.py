"""BlendMask (Chen et al., arXiv:2001.00309): the whole network, cut where the device needs the host.

Axes: N images, H x W the padded image, K bases, A side of an attention map, D detections of the batch, R side of a
mask. Inference runs `propose` on the device, `selection.select` on the host with the one packed copy that came back,
`blend` on the device. Module names are AdelaiDet's, so that its checkpoints load unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.blendmask.backbone import ResNet
from workers.blendmask.basis import BasisModule
from workers.blendmask.blender import blend
from workers.blendmask.config import SIZE_DIVISOR, Config
from workers.blendmask.dla import Dla34
from workers.blendmask.fcos import Fcos, FcosHead
from workers.blendmask.fpn import Fpn
from workers.blendmask.norms import BACKBONE_NORMS


def build(config: Config) -> "BlendMask":
    """Build the network that `config` describes, in evaluation mode, on the CPU, with PyTorch's initial weights."""
    bottom_up, channels = build_bottom_up(config), config.fpn_channels
    head = FcosHead(channels, config.num_classes, config.num_share_convs, config.num_cls_convs, config.num_box_convs,
                    config.head_norm, len(config.strides), config.use_scale)
    return BlendMask(
        config,
        backbone=Fpn(bottom_up, bottom_up.channels, channels, coarse_levels=len(config.strides) - 3),
        proposal_generator=Fcos(head, config.score_threshold, config.threshold_with_centreness, config.pre_nms_topk),
        basis_module=BasisModule(channels, config.basis_channels, config.basis_convs, config.num_bases,
                                 config.semantic_classes),
        top_layer=nn.Conv2d(channels, config.num_bases * config.attention_size**2, 3, padding=1),
    ).eval()


def build_bottom_up(config: Config) -> Dla34 | ResNet:
    norm = BACKBONE_NORMS[config.backbone_norm]
    if config.backbone == "dla":
        return Dla34(norm)
    return ResNet(config.depth, norm, config.stem_channels, config.res2_channels, config.res2_width,
                  config.stride_in_1x1, config.deformable, config.deformable_interval)


@dataclass(frozen=True)
class Proposals:
    """What `propose` leaves on the device."""

    packed: Tensor  # (N, sum of M, FIELDS) float32: the candidates, the only thing that the host reads
    bases: Tensor  # (N, K, H/4, W/4)
    attentions: list[Tensor]  # per level (N, K * A * A, H_l, W_l)

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths of the levels in cells."""
        return [(level.shape[2], level.shape[3]) for level in self.attentions]


class BlendMask(nn.Module):
    """The network. Images are float32 (N, 3, H, W), normalised, then padded with zeros to multiples of 32.

    There is no `forward`: between `propose` and `blend` the host chooses the boxes.
    """

    def __init__(self, config: Config, backbone: Fpn, proposal_generator: Fcos, basis_module: BasisModule,
                 top_layer: nn.Conv2d) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.proposal_generator = proposal_generator
        self.basis_module = basis_module
        self.top_layer = top_layer

    def propose(self, images: Tensor) -> Proposals:
        """Run everything that does not depend on which boxes are kept."""
        assert images.ndim == 4, images.shape
        assert images.shape[1] == 3, images.shape
        assert all(side % SIZE_DIVISOR == 0 for side in images.shape[2:]), images.shape
        features = self.backbone(images)  # p3 to p5, p6 or p7
        bases = self.basis_module(features[:3])  # (N, K, H/4, W/4)
        outputs = self.proposal_generator(features)
        attentions = [self.top_layer(output.box_features) for output in outputs]
        return Proposals(self.proposal_generator.candidates(outputs), bases, attentions)

    def blend(self, proposals: Proposals, images: Tensor, levels: Tensor, cells: Tensor, boxes: Tensor) -> Tensor:
        """Return mask probabilities (D, R, R) of the kept detections of a batch.

        images, levels, cells (D,) int64 say which cell predicted each detection; boxes (D, 4) network pixels.
        """
        size = self.config.attention_size
        attentions = _gather(proposals.attentions, images, levels, cells)  # (D, K * A * A)
        attentions = attentions.view(-1, self.config.num_bases, size, size)
        return blend(proposals.bases, attentions, images, boxes, self.config.resolution)


def _gather(maps: Sequence[Tensor], images: Tensor, levels: Tensor, cells: Tensor) -> Tensor:
    """Return the feature vectors (D, C) at `cells` of `levels` of `images`; maps are (N, C, H_l, W_l).

    Every level is read for every detection, at cell 0 where it is not the detection's: shapes stay fixed.
    """
    gathered = maps[0].new_zeros(len(cells), maps[0].shape[1])
    for level, features in enumerate(maps):
        here = levels == level
        found = features.flatten(2)[images, :, cells.masked_fill(~here, 0)]  # (D, C)
        gathered = torch.where(here[:, None], found, gathered)
    return gathered
