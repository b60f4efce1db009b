"""Stage `region_features`: what the frozen detector says of regions, kept for everything below it.

With them a new class, another beta or a different floor is a matrix product and an NMS away: no
further pass of the backbone. A region store with the columns ``feature`` (region head, fp16),
``embedding`` (CLIP head, unit rows, fp16) and ``refined`` (box after regression, float32 xyxy in
pixels of the original image).
"""

from pathlib import Path

from lpovod.artifacts import identity
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.formats.coco import read_dataset
from lpovod.formats.image_features import STAGE, link_images
from lpovod.formats.pseudo_labels import read_pseudo_labels
from lpovod.formats.regions import read_proposals, write_regions
from lpovod.retrieved_features import FrozenDetector, candidates_of, retrieved_features


def extract_split(
    dataset: Path,
    proposals: Path,
    detector: Path,
    backbone: BackboneSettings,
    base_detector: BaseDetectorSettings,
    settings: RegionFeaturesSettings,
    output: Path,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Features of all proposals of a split.

    Args:
        dataset: the split's json.
        proposals: its proposals.
        detector: the trained base detector.
        backbone: as the detector was trained with.
        base_detector: as the detector was trained with.
        settings: of this stage.
        output: the region store.
        device: where to run.
        threads: of the job; with a GPU all but one load images.
    """
    data = read_dataset(dataset)
    store = read_proposals(proposals, dataset)
    regions = {}
    for image_id in data.images:
        proposed = store.read(image_id)
        regions[image_id] = (proposed.box, proposed.objectness)
    made_from = identity(STAGE, None, dataset=dataset, proposals=proposals, detector=detector)
    frozen = FrozenDetector(detector, backbone, base_detector, settings, device, threads)
    with write_regions(output, made_from) as writer:
        for image_id, arrays in frozen.extract(data, regions):
            writer.add(image_id, **arrays)


def extract_retrieved(
    dataset: Path,
    proposals: Path,
    pseudo_labels: Path,
    detector: Path,
    backbone: BackboneSettings,
    base_detector: BaseDetectorSettings,
    settings: RegionFeaturesSettings,
    shard: int,
    output: Path,
    store: Path,
    code: str,
    device: str = "cpu",
    threads: int = 1,
) -> None:
    """Features of the regions that the novel classes are learned from.

    These are the pseudo-labels, and all proposals of the images they lie in: the linear probe's
    candidates for positives and negatives. An image goes through the detector once, whatever number
    of classes retrieved it; what the store holds is not made again.

    Args:
        dataset: json with the training images.
        proposals: of the same images.
        pseudo_labels: json of all classes.
        detector: the trained base detector.
        backbone: as the detector was trained with.
        base_detector: as the detector was trained with.
        settings: of this stage.
        shard: number of the shard, from 0.
        output: folder with a file for each image (`lpovod.formats.image_features`).
        store: folder of the features made so far.
        code: digest of the source code; features made by different code are made again.
        device: where to run.
        threads: of the job; with a GPU all but one load images.
    """
    data, regions = read_dataset(dataset), read_proposals(proposals, dataset)
    labels = read_pseudo_labels(pseudo_labels)
    image_ids = sorted({i for images in labels.values() for i in images})[shard :: settings.shards]
    wanted = {i: candidates_of(regions.read(i), labels, i) for i in image_ids}
    frozen = FrozenDetector(detector, backbone, base_detector, settings, device, threads)
    link_images(retrieved_features(data, wanted, frozen, store, code), output)
