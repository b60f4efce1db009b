"""Stage `proposals`: the proposals of a split, by the trained network."""

from pathlib import Path

from lpovod.artifacts import identity
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import write_regions
from lpovod.networks.proposal_inference import find_proposals, load_network
from lpovod.progress import progress
from lpovod.views import inference_views


def propose(
    dataset: Path,
    network: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    output: Path,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Write the proposals of every image of a split.

    Args:
        dataset: json with the split's images.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        output: a region store without vectors, best objectness first within an image; images of
            one size lie together.
        device: where to run.
        threads: of the job; with a GPU all but one load images.
    """
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    size, sides = settings.batch_size, (backbone.short_side, backbone.long_side)
    batches = inference_views(data, list(data.images), *sides, size, device, threads)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    with (
        write_regions(output, ident) as writer,
        progress(None, "proposals", "image", len(data.images)) as bar,
    ):
        for views in batches:
            image_ids = [view.view.image_id for view in views]
            sizes = [data.size(image_id) for image_id in image_ids]
            found = find_proposals(model, views, sizes, settings, size, device)
            for image_id, (boxes, scores) in zip(image_ids, found, strict=True):
                writer.add(image_id, boxes, scores)
            bar.update(len(views))
