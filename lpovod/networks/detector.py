"""The detector: one backbone, two heads on pooled regions (Fig. 2 of the paper).

The *region head* gives the region feature that classes are scored on, and the box refinement; the
*CLIP head* imitates CLIP's image encoder. Base classes are rows of `prototypes`; novel classes get
theirs later, by linear probing, on frozen features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpovod.config import BackboneSettings, BaseDetectorSettings
from lpovod.networks.backbone import Backbone, ConvNorm, build_backbone
from lpovod.networks.pooling import POOLED, pool_regions
from lpovod.networks.rpn import RegionProposalNetwork
from lpovod.precision import precise


class Head(nn.Module):
    """Convolutions with norms, then one linear layer: (n, channels, 7, 7) to (n, dimension)."""

    def __init__(self, channels: int, convolutions: int, dimension: int):
        super().__init__()
        norms = [ConvNorm(channels, channels, 3) for _ in range(convolutions)]
        self.convs = nn.ModuleList(norms)
        self.fc = nn.Linear(channels * POOLED * POOLED, dimension)
        for norm in norms:
            nn.init.kaiming_normal_(norm.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        for conv in self.convs:
            pooled = functional.relu(conv(pooled))
        return functional.relu(self.fc(pooled.flatten(1)))


@dataclass(frozen=True)
class RegionOutputs:
    """What the frozen detector says of n regions.

    Attributes:
        feature: (n, dimension), of the region head, not normalised.
        embedding: (n, CLIP's dimension), of the CLIP head, unit rows.
        deltas: (n, 4), the box refinement.
    """

    feature: Tensor
    embedding: Tensor
    deltas: Tensor


class Detector(nn.Module):
    """Backbone, pyramid and the two heads; with `regions: rpn` the network its losses need.

    Args:
        backbone: size of the backbone.
        settings: size of the heads.
        classes: number of base classes.
        embedding: CLIP's dimension.
    """

    def __init__(
        self,
        backbone: BackboneSettings,
        settings: BaseDetectorSettings,
        classes: int,
        embedding: int,
    ):
        super().__init__()
        self.backbone: Backbone
        self.backbone, self.neck = build_backbone(backbone)
        heads = (backbone.channels, settings.head_convolutions, settings.dimension)
        self.region_head, self.clip_head = Head(*heads), Head(*heads)
        self.box_refinement = nn.Linear(settings.dimension, 4)
        self.clip_projection = nn.Linear(settings.dimension, embedding)
        self.prototypes = nn.Parameter(torch.empty(classes, settings.dimension))
        self.finest_scale = settings.finest_scale
        self.sampling_ratio = settings.sampling_ratio
        nn.init.normal_(self.box_refinement.weight, std=0.001)
        nn.init.zeros_(self.box_refinement.bias)
        nn.init.normal_(self.prototypes, std=0.01)
        own = settings.regions == "rpn"
        self.rpn_head = RegionProposalNetwork(backbone.channels) if own else None

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """P2 ... P6 of normalised images, (n, 3, H, W)."""
        return self.neck(self.backbone(images))

    def pool(self, pyramid: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """RoIAlign each box from the level of its size.

        Args:
            pyramid: of n images.
            boxes: for each image (m, 4), in pixels of the network's input.

        Returns:
            (sum of m, channels, 7, 7), image after image.
        """
        return pool_regions(pyramid, boxes, self.finest_scale, self.sampling_ratio)

    def embed(self, pooled: Tensor) -> Tensor:
        """The CLIP head's imitation of CLIP: unit rows."""
        return functional.normalize(precise(self.clip_projection(self.clip_head(pooled))), dim=1)

    def extract(self, pooled: Tensor) -> RegionOutputs:
        """Both heads on pooled regions."""
        feature = self.region_head(pooled)
        deltas = precise(self.box_refinement(feature))
        return RegionOutputs(precise(feature), self.embed(pooled), deltas)
