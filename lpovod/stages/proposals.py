"""Stage `proposals`: the proposals of a split, by the trained network, and their recall."""

from pathlib import Path

import torch

from lpovod.artifacts import identity, write_json
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import write_regions
from lpovod.measures.recall import RECALL_AT, recall_by_split
from lpovod.networks.proposal_inference import best_proposals, load_network
from lpovod.progress import log, progress
from lpovod.views import batch, inference_views


@torch.inference_mode()
def propose(
    dataset: Path,
    network: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    output: Path,
    recall: Path,
    device: str = "cpu",
) -> None:
    """Write the proposals of every image of a split, and their recall of its annotations.

    Args:
        dataset: the split's json.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        output: a region store without vectors, best objectness first within an image.
        recall: json of the recall (percent, at an IoU of 0.5) of base and novel objects.
        device: where to run.
    """
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    kept = max(settings.per_image, *RECALL_AT)
    sizes = (backbone.short_side, backbone.long_side, settings.training.images_per_step)
    batches = inference_views(data, list(data.images), *sizes)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    found = {}
    with (
        write_regions(output, ident) as writer,
        progress(None, "proposals", "image", len(data.images)) as bar,
    ):
        for views in batches:
            levels = model(batch(views, device, model.backbone.normalisation))
            for number, view in enumerate(views):
                boxes, scores = best_proposals(levels, number, view, data, settings, kept)
                found[view.view.image_id] = boxes
                top = slice(settings.per_image)
                writer.add(view.view.image_id, boxes[top], scores[top])
            bar.update(len(views))
    measured = recall_by_split(data, found)
    write_json(recall, {"recall": measured, "seen": "base annotations of the training images"})
    log.info(f"recall: {measured}")
