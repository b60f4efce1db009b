"""The trained proposal network on images: its best boxes, in pixels of the original image."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpovod.artifacts import read_tensors
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.precision import computing_in
from lpovod.torchvision_ops import clip_boxes_to_image, nms
from lpovod.transfers import fetch, send
from lpovod.views import HeightWidth, LoadedView, batch


def load_network(
    path: Path, backbone: BackboneSettings, settings: ProposalsSettings
) -> ProposalNetwork:
    """The trained network, in evaluation mode."""
    return build_network(read_tensors(path, "proposals")[0], backbone, settings)


def build_network(
    tensors: dict[str, np.ndarray], backbone: BackboneSettings, settings: ProposalsSettings
) -> ProposalNetwork:
    """A proposal network with trained weights, by name, in evaluation mode."""
    model = ProposalNetwork(backbone, settings.anchor_scale)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    # Saves a fifth of the time on a CPU.
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def find_proposals(
    model: ProposalNetwork,
    views: list[LoadedView],
    sizes: list[HeightWidth],
    settings: ProposalsSettings,
    batch_size: int,
    device: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The proposals of images whose views have one size once they are padded.

    Args:
        model: the network, on the device.
        views: of the images, at most `batch_size`.
        sizes: height and width of each original image.
        settings: precision, numbers of boxes and NMS.
        batch_size: images per pass.
        device: where the model is.

    Returns:
        For each image, best first: boxes (n, 4) float32 xyxy in its own pixels, and objectness
        (n,) float32.
    """
    # The bits of a convolution depend on its size, so that batches are full.
    images = batch(views, device, model.backbone.normalisation, at_least=batch_size)
    with computing_in(settings.precision, device):
        levels = model(images)
    found = [
        _best_proposals(levels, number, view.scale, size, settings)
        for number, (view, size) in enumerate(zip(views, sizes, strict=True))
    ]
    # One wait for the device, instead of one per image.
    # Boxes without area have no score.
    kept = [of_image[of_image[:, 4] >= 0].numpy() for of_image in fetch(found)]
    return [(of_image[:, :4].copy(), of_image[:, 4].copy()) for of_image in kept]


def _best_proposals(
    levels: list[tuple[Tensor, Tensor, Tensor]],
    number: int,
    scale: Tensor,
    size: HeightWidth,
    settings: ProposalsSettings,
) -> Tensor:
    """Boxes and scores of an image of a batch, (n, 5), best first; -1 for boxes without area.

    Args:
        levels: output of the network.
        number: of the image in the batch.
        scale: (2,), from the original image to the view.
        size: height and width of the original image.
        settings: numbers of boxes and NMS.
    """
    boxes, scores = [], []
    for _, level_boxes, logits in levels:
        top = logits[number].topk(min(settings.per_level, logits.shape[1])).indices
        boxes.append(level_boxes[number, top])
        scores.append(logits[number, top].sigmoid())
    box = torch.cat(boxes)
    box = clip_boxes_to_image(box / send(scale, box.device).repeat(2), size)
    solid = ((box[:, 2:] - box[:, :2]) >= 1).all(dim=1)
    # Worse than every other box: they suppress none, and the host drops them at the end. To drop
    # them here, it would have to wait for their number.
    score = torch.where(solid, torch.cat(scores), -1.0)
    best = nms(box, score, settings.nms)[: settings.per_image]
    return torch.cat([box[best], score[best, None]], dim=1)
