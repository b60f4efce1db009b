"""Stage `proposals`: the proposals of a shard of a split, by the trained network."""

from pathlib import Path

from lpovod.artifacts import identity
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.devices import explaining_memory, own_device
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import Shard, write_regions
from lpovod.networks.proposal_inference import find_proposals, load_network
from lpovod.progress import progress
from lpovod.views import inference_views


def propose(
    dataset: Path,
    network: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    shard: int,
    shards: int,
    output: Path,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Write the proposals of every image of a shard.

    Args:
        dataset: json with the split's images.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        shard: number of the shard, from 0.
        shards: number of shards that the split has.
        output: a region store without vectors, best objectness first within an image; images of
            one size lie together.
        device: where to run.
        threads: of the job; with a GPU all but one load images.

    Raises:
        LpovodError: if there is no such device, or its memory is too small.
    """
    device = own_device(device)
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    of_shard = Shard(shard, shards)
    image_ids = of_shard.of(data.images)
    size, sides = settings.batch_size, (backbone.short_side, backbone.long_side)
    batches = inference_views(data, image_ids, *sides, size, device, threads)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    with (
        explaining_memory("proposals.batch_size (images per pass) or backbone.short_side"),
        write_regions(output, ident, of_shard) as writer,
        progress(None, "proposals", "image", len(image_ids)) as bar,
    ):
        for views in batches:
            shown = [view.view.image_id for view in views]
            sizes = [data.size(image_id) for image_id in shown]
            found = find_proposals(model, views, sizes, settings, size, device)
            for image_id, (boxes, scores) in zip(shown, found, strict=True):
                writer.add(image_id, boxes, scores)
            bar.update(len(views))
