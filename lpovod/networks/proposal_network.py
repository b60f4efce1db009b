"""The proposal network: class-agnostic boxes with objectness.

The first stage of the Object Localization Network (Kim et al. 2022, "Learning Open-World Object
Proposals without Learning to Classify"): one square anchor per cell, boxes by four distances, and
objectness as the centerness of the anchor in its object. Nothing learns to distinguish an object
from what is not annotated, so unannotated objects are proposed as well.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lpovod.config import BackboneSettings
from lpovod.networks.backbone import STRIDES, Backbone, build_backbone
from lpovod.precision import precise


class ProposalNetwork(nn.Module):
    """Backbone, pyramid, and a head of one 3 x 3 convolution with two outputs per cell."""

    def __init__(self, backbone: BackboneSettings, anchor_scale: float):
        super().__init__()
        self.backbone: Backbone
        self.backbone, self.neck = build_backbone(backbone)
        self.anchor_scale = anchor_scale
        self.conv = nn.Conv2d(backbone.channels, backbone.channels, 3, padding=1)
        self.distances = nn.Conv2d(backbone.channels, 4, 1)
        self.objectness = nn.Conv2d(backbone.channels, 1, 1)
        for output in (self.distances, self.objectness):
            nn.init.normal_(output.weight, std=0.01)
            assert output.bias is not None
            nn.init.zeros_(output.bias)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level: anchors (cells, 4), boxes (n, cells, 4), objectness logits (n, cells)."""
        return [
            self._level(features, stride)
            for features, stride in zip(self.neck(self.backbone(images)), STRIDES, strict=True)
        ]

    def _level(self, features: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.normalize(functional.relu(precise(self.conv(features))), dim=1)
        rows, columns = (torch.arange(n, device=x.device) for n in features.shape[-2:])
        side = self.anchor_scale * stride
        y, x_ = torch.meshgrid(rows, columns, indexing="ij")
        centre = (torch.stack([x_, y], dim=-1).reshape(-1, 2) * stride).to(x)
        # OLN decodes linearly; the exponential cannot leave the range where IoU has a gradient.
        logarithms = precise(self.distances(x)).flatten(2).transpose(1, 2)
        distances = logarithms.clamp(max=4).exp() * side / 2
        boxes = torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1)
        anchors = torch.cat([centre - side / 2, centre + side / 2], dim=-1)
        return anchors, boxes, precise(self.objectness(x)).flatten(1)
