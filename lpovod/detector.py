"""The detector: one backbone, two heads on pooled regions (Fig. 2 of the paper).

The *region head* gives the region feature that classes are scored on, and the box refinement; the
*image head* imitates CLIP's image encoder. Base classes are rows of `prototypes`; novel classes get
theirs later, by linear probing, on frozen features.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpovod.artifacts import Identity, LpovodError, read_tensors
from lpovod.backbone import ConvNorm, build_backbone
from lpovod.boxes import clip, decode
from lpovod.config import Backbone, BaseDetector
from lpovod.pooling import POOLED, pool_regions
from lpovod.rpn import RegionProposalNetwork


class Branch(nn.Module):
    """Convolutions with norms, then one linear layer: (n, channels, 7, 7) to (n, dimension)."""

    def __init__(self, channels: int, convolutions: int, dimension: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels, channels, 3) for _ in range(convolutions))
        self.fc = nn.Linear(channels * POOLED * POOLED, dimension)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.conv.weight, mode="fan_out", nonlinearity="relu")
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
        embedding: (n, CLIP's dimension), of the image head, unit rows.
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

    def __init__(self, backbone: Backbone, settings: BaseDetector, classes: int, embedding: int):
        super().__init__()
        self.backbone, self.neck = build_backbone(backbone)
        heads = (backbone.channels, settings.branch_convolutions, settings.dimension)
        self.region_branch, self.image_branch = Branch(*heads), Branch(*heads)
        self.box_refinement = nn.Linear(settings.dimension, 4)
        self.projection = nn.Linear(settings.dimension, embedding)
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
        """The image head's imitation of CLIP: unit rows."""
        return functional.normalize(self.projection(self.image_branch(pooled)), dim=1)

    def describe(self, pooled: Tensor) -> RegionOutputs:
        """Both heads on pooled regions."""
        feature = self.region_branch(pooled)
        return RegionOutputs(feature, self.embed(pooled), self.box_refinement(feature))


def refine(boxes: Tensor, deltas: Tensor, scale: Tensor, size: tuple[int, int]) -> Tensor:
    """Refined boxes in pixels of the original image.

    Args:
        boxes: (n, 4) in pixels of the network's input.
        deltas: (n, 4).
        scale: (2,) resized over original width and height.
        size: width and height of the original image.
    """
    return clip(decode(boxes, deltas) / scale.repeat(2).to(boxes), *size)


def load_detector(
    path: Path, backbone: Backbone, settings: BaseDetector
) -> tuple[Detector, Identity]:
    """The trained base detector, in evaluation mode, and its identity (with its ``classes``).

    Raises:
        LpovodError: if the file does not fit the settings.
    """
    tensors, ident = read_tensors(path, "base_detector")
    embedding = tensors["projection.weight"].shape[0]
    model = Detector(backbone, settings, len(ident["classes"]), embedding)
    own = model.state_dict().keys()
    # An imported detector carries its RPN along, which nothing here needs.
    kept = {k: v for k, v in tensors.items() if k in own or not k.startswith("rpn_head.")}
    try:
        model.load_state_dict({k: torch.from_numpy(v) for k, v in kept.items()})
    except RuntimeError as error:
        raise LpovodError(
            f"{path} does not fit the settings of backbone and base_detector: {error}"
        ) from None
    # Saves a fifth of the time on a CPU; in training its sums of gradients are less exact.
    return model.eval().to(memory_format=torch.channels_last), ident
