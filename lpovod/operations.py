"""How much the configured networks compute: counted on the meta device, without weights or pixels.

A multiplication and an addition are two operations. Counted are convolutions, matrix products and
attention; RoIAlign and NMS, which have no such products, take little beside them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from lpovod.clip import build_image_tower
from lpovod.config import Config
from lpovod.networks.detector import Detector
from lpovod.networks.pooling import POOLED
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.views import padded


class Operations(NamedTuple):
    """Of one forward pass, in GFLOP, and what else follows from the networks' sizes.

    Attributes:
        pyramid: backbone and feature pyramid, of an image.
        proposal_network: the same with the head of the proposal network, of an image.
        rpn: the detector's own region proposal network, of an image; 0 without one.
        region_head: of a region.
        clip_head: with its projection, of a region.
        extraction: everything that the frozen detector computes of a region.
        crop: CLIP's image tower, of a crop.
        crop_size: side of a crop in pixels.
        dimension: of CLIP's space.
        proposal_weights: number of parameters of the proposal network.
        detector_weights: number of parameters of the detector.
    """

    pyramid: float
    proposal_network: float
    rpn: float
    region_head: float
    clip_head: float
    extraction: float
    crop: float
    crop_size: int
    dimension: int
    proposal_weights: int
    detector_weights: int


def count_operations(config: Config, height: int, width: int) -> Operations:
    """Count the operations of the configured networks.

    Args:
        config: names the networks.
        height: of an image as the networks see it, in pixels, before it is padded.
        width: of the same.

    Raises:
        LpovodError: if there is no such CLIP or backbone.
    """
    with torch.device("meta"):
        tower = build_image_tower(config.clip.architecture)
        size: Any = tower.image_size  # a number, or height and width
        size = size if isinstance(size, int) else size[0]
        crop, vector = _count(tower, tower, torch.empty(1, 3, size, size))
        dimension = vector.shape[1]
        network = ProposalNetwork(config.backbone, config.proposals.anchor_scale)
        classes = len(config.classes.base)
        detector = Detector(config.backbone, config.base_detector, classes, dimension)
        image = torch.empty(1, 3, padded(height), padded(width))
        region = torch.empty(1, config.backbone.channels, POOLED, POOLED)
        pyramid, maps = _count(detector, detector.pyramid, image)
        rpn = detector.rpn_head
        return Operations(
            pyramid=pyramid,
            proposal_network=_count(network, network, image)[0],
            rpn=_count(rpn, rpn, maps)[0] if rpn else 0.0,
            region_head=_count(detector, detector.region_head, region)[0],
            clip_head=_count(detector, detector.embed, region)[0],
            extraction=_count(detector, detector.extract, region)[0],
            crop=crop,
            crop_size=size,
            dimension=dimension,
            proposal_weights=sum(weight.numel() for weight in network.parameters()),
            detector_weights=sum(weight.numel() for weight in detector.parameters()),
        )


def _count(model: torch.nn.Module, call: Callable[[Any], Any], inputs: Any) -> tuple[float, Any]:
    """GFLOP of a call of the model, or of a part of it, and what the call returns."""
    # Without gradients the counter's hooks fail on some towers (attention pooling, as in SigLIP).
    model.eval()
    with FlopCounterMode(display=False) as counter:
        outputs = call(inputs)
    return counter.get_total_flops() / 1e9, outputs
