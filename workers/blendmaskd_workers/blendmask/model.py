"""BlendMask (Chen et al., arXiv:2001.00309): the whole network, cut where the device needs the host.

Axes: N images, H x W the padded image, K bases, A side of an attention map, D detections of the batch, R side of a
mask. Inference runs `propose` on the device, `selection.select` on the host with the one packed copy that came back,
`blend` on the device. Module names are AdelaiDet's, so that its checkpoints load unchanged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from blendmaskd_workers.blendmask.backbone import ResNet
from blendmaskd_workers.blendmask.basis import BasisModule
from blendmaskd_workers.blendmask.blender import blend
from blendmaskd_workers.blendmask.config import SIZE_DIVISOR, Config
from blendmaskd_workers.blendmask.dla import Dla34
from blendmaskd_workers.blendmask.fcos import Fcos
from blendmaskd_workers.blendmask.fpn import Fpn
from blendmaskd_workers.blendmask.norms import BACKBONE_NORMS
from blendmaskd_workers.blendmask.patches import convolve, rows_of_patches, table_of_levels, values_of_levels
from blendmaskd_workers.blendmask.selection import Floats, Integers

KEPT_FIELDS = 14  # of a packed detection: the rows of its 3x3 cells, see `patches`, its image, its box


def build(config: Config) -> "BlendMask":
    """Build the network that `config` describes, in evaluation mode, on the CPU, with PyTorch's initial weights."""
    return BlendMask(config).eval()


@dataclass(frozen=True)
class Proposals:
    """What `propose` leaves on the device."""

    packed: Tensor  # (N, sum of M, FIELDS) float32: the candidates, the only thing that the host reads
    bases: Tensor  # (N, K, H/4, W/4)
    box_features: list[Tensor]  # per level (N, C, H_l, W_l): what the top layer reads
    attentions: list[Tensor] | None = None  # per level (N, K * A * A, H_l, W_l); None: only where they are read

    @property
    def level_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths of the levels in cells."""
        return [(level.shape[2], level.shape[3]) for level in self.box_features]


class BlendMask(nn.Module):
    """The network. Images are float32 (N, 3, H, W), normalised, then padded with zeros to multiples of 32.

    There is no `forward`: between `propose` and `blend` the host chooses the boxes. As it is built and trained it runs
    the reference's operations in the reference's order; `for_inference` makes one that does not.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        norm = BACKBONE_NORMS[config.backbone_norm]
        bottom_up = Dla34(norm) if config.backbone == "dla" else ResNet(config, norm)
        fcos = Fcos(config)  # before the rest of the backbone: seeds give the initial weights in this order
        self.backbone = Fpn(config, bottom_up)
        self.proposal_generator = fcos
        self.basis_module = BasisModule(config)
        self.top_layer = nn.Conv2d(config.fpn_channels, config.num_bases * config.attention_size**2, 3, padding=1)
        self.attends_everywhere = True  # the top layer in all cells, as the reference, not only in those that are read

    def propose(self, images: Tensor) -> Proposals:
        """Run everything that does not depend on which boxes are kept: `begin`, then `complete`."""
        return self._proposals(self.backbone(self._input(images)))

    def begin(self, images: Tensor) -> Tensor:
        """Run the first part of it, a seventh of R_50_1x: enough for a device to do while the host chooses boxes."""
        return self.backbone.begin(self._input(images))

    def complete(self, begun: Tensor) -> Proposals:
        """Run the rest of it."""
        return self._proposals(self.backbone.complete(begun))

    def _input(self, images: Tensor) -> Tensor:
        assert images.ndim == 4, images.shape
        assert images.shape[1] == 3, images.shape
        assert all(side % SIZE_DIVISOR == 0 for side in images.shape[2:]), images.shape
        return images.to(self.backbone.fpn_lateral3.weight.dtype)

    def _proposals(self, features: Sequence[Tensor]) -> Proposals:
        """Of p3 to p5, p6 or p7."""
        bases = self.basis_module(features[:3])  # (N, K, H/4, W/4)
        outputs = self.proposal_generator(features)
        box_features = [output.box_features for output in outputs]
        attentions = [self.top_layer(level) for level in box_features] if self.attends_everywhere else None
        return Proposals(self.proposal_generator.candidates(outputs), bases, box_features, attentions)

    def blend(self, proposals: Proposals, kept: Tensor) -> Tensor:
        """Return mask probabilities (D, R, R) float32 of the kept detections of a batch; `kept` (D, KEPT_FIELDS).

        Where the top layer has not been run everywhere, it is run at the detections' cells: that spares a seventh of
        the network's multiplications, and sums in another order.
        """
        size = self.config.attention_size
        rows, images, boxes = kept.split_with_sizes([9, 1, 4], dim=1)
        rows, images = rows.long(), images.long()
        if proposals.attentions is None:
            patches = table_of_levels(proposals.box_features)[images, rows]  # (D, 9, C)
            attentions = convolve(self.top_layer, patches)  # (D, K * A * A)
        else:
            attentions = values_of_levels(proposals.attentions, images[:, 0], rows[:, 4])
        attentions = attentions.view(-1, self.config.num_bases, size, size)
        return blend(proposals.bases, attentions, images, boxes, self.config.resolution)


def pack(images: Integers, levels: Integers, cells: Integers, boxes: Floats,
         level_sizes: Sequence[tuple[int, int]]) -> Floats:
    """Return what `blend` reads of detections (D,), (D, KEPT_FIELDS); cells in their level, boxes (D, 4). Host only."""
    kept = np.empty((len(images), KEPT_FIELDS), np.float32)
    kept[:, :9] = rows_of_patches(levels, cells, level_sizes)
    kept[:, 9] = images
    kept[:, 10:] = boxes
    return kept
