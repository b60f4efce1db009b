"""Stage `proposals`: the proposals of a split, by the trained network."""

from pathlib import Path

import torch

from lpovod.artifacts import identity
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.devices import explaining_memory, own_device
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import write_regions
from lpovod.networks.proposal_inference import best_proposals, load_network
from lpovod.progress import progress
from lpovod.views import batch, inference_views


@torch.inference_mode()
def propose(
    dataset: Path,
    network: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    output: Path,
    device: str = "cpu",
) -> None:
    """Write the proposals of every image of a split.

    Args:
        dataset: json with the split's images.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        output: a region store without vectors, best objectness first within an image.
        device: where to run.

    Raises:
        LpovodError: if there is no such device, or its memory is too small.
    """
    device = own_device(device)
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    sizes = (backbone.short_side, backbone.long_side, settings.training.images_per_step)
    batches = inference_views(data, list(data.images), *sizes)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    with (
        explaining_memory(
            "proposals.training.images_per_step (images per pass) or backbone.short_side"
        ),
        write_regions(output, ident) as writer,
        progress(None, "proposals", "image", len(data.images)) as bar,
    ):
        for views in batches:
            levels = model(batch(views, device, model.backbone.normalisation))
            for number, view in enumerate(views):
                image_id = view.view.image_id
                boxes, scores = best_proposals(levels, number, view, data.size(image_id), settings)
                writer.add(image_id, boxes, scores)
            bar.update(len(views))
