"""Stage `proposals`: the proposals of a shard of a split, by the trained network."""

from pathlib import Path

import torch

from lpovod.artifacts import identity
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import Shard, write_regions
from lpovod.networks.proposal_inference import best_proposals, load_network
from lpovod.progress import progress
from lpovod.views import batch, inference_views


@torch.inference_mode()
def propose(
    dataset: Path,
    network: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    shard: int,
    shards: int,
    output: Path,
    device: str = "cpu",
) -> None:
    """Write the proposals of every image of a shard.

    Args:
        dataset: json with the split's images.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        shard: number of the shard, from 0.
        shards: number of shards that the split has.
        output: a region store without vectors, best objectness first within an image.
        device: where to run.
    """
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    sizes = (backbone.short_side, backbone.long_side, settings.training.images_per_step)
    of_shard = Shard(shard, shards)
    image_ids = of_shard.of(data.images)
    batches = inference_views(data, image_ids, *sizes)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    with (
        write_regions(output, ident, of_shard) as writer,
        progress(None, "proposals", "image", len(image_ids)) as bar,
    ):
        for views in batches:
            levels = model(batch(views, device, model.backbone.normalisation))
            for number, view in enumerate(views):
                image_id = view.view.image_id
                boxes, scores = best_proposals(levels, number, view, data.size(image_id), settings)
                writer.add(image_id, boxes, scores)
            bar.update(len(views))
