"""Stage `region_features`: what the frozen detector says of regions, kept for everything below it.

With them a new class, another beta or a different floor is a matrix product and an NMS away: no
further pass of the backbone. A region store with the columns ``feature`` (region head, fp16),
``embedding`` (CLIP head, unit rows, fp16) and ``refined`` (box after regression, float32 xyxy in
pixels of the original image).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lpovod.artifacts import identity, sha256
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.image_features import STAGE, link_images
from lpovod.formats.pseudo_labels import PseudoLabels, read_pseudo_labels
from lpovod.formats.regions import Regions, read_proposals, write_regions
from lpovod.formats.store import Store, key_of
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import describe_regions, load_detector
from lpovod.progress import log, progress
from lpovod.views import inference_views


def extract_split(
    dataset: Path,
    proposals: Path,
    detector: Path,
    backbone: BackboneSettings,
    base_detector: BaseDetectorSettings,
    settings: RegionFeaturesSettings,
    output: Path,
    device: str = "cpu",
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
    """
    data = read_dataset(dataset)
    store = read_proposals(proposals, dataset)
    regions = {}
    for image_id in data.images:
        proposed = store.read(image_id)
        regions[image_id] = (proposed.box, proposed.objectness)
    made_from = identity(STAGE, None, dataset=dataset, proposals=proposals, detector=detector)
    model = load_detector(detector, backbone, base_detector)[0].to(device)
    with write_regions(output, made_from) as writer:
        for image_id, arrays in _extract(data, regions, model, backbone, settings, device):
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
    """
    data, regions = read_dataset(dataset), read_proposals(proposals, dataset)
    labels = read_pseudo_labels(pseudo_labels)
    image_ids = sorted({i for images in labels.values() for i in images})[shard :: settings.shards]
    model = FrozenDetector(detector, backbone, base_detector, settings, device)
    paths = retrieved_features(
        data, {i: candidates_of(regions.read(i), labels, i) for i in image_ids}, model, store, code
    )
    link_images(paths, output)


@dataclass
class FrozenDetector:
    """The trained base detector, which is loaded when it is needed.

    Attributes:
        path: of its weights.
        backbone: as it was trained with.
        base_detector: as it was trained with.
        settings: of this stage.
        device: where it runs.
    """

    path: Path
    backbone: BackboneSettings
    base_detector: BaseDetectorSettings
    settings: RegionFeaturesSettings
    device: str

    @cached_property
    def model(self) -> Detector:
        """The network."""
        return load_detector(self.path, self.backbone, self.base_detector)[0].to(self.device)

    @cached_property
    def digest(self) -> str:
        """Digest of the weights."""
        return sha256(self.path)


def retrieved_features(
    data: CocoDataset,
    wanted: dict[int, tuple[np.ndarray, np.ndarray]],
    detector: FrozenDetector,
    store: Path,
    code: str,
) -> dict[int, Path]:
    """Features of regions of images; those that the store lacks are made.

    Args:
        data: the images.
        wanted: boxes (n, 4) and objectness (n,) by image id.
        detector: the trained base detector.
        store: folder of the features made so far.
        code: digest of the source code; features made by different code are made again.

    Returns:
        The file of each image, in the store.
    """
    made_from = identity(
        STAGE,
        {
            "backbone": detector.backbone.model_dump(mode="json"),
            "batch_size": detector.settings.batch_size,
            "base_detector": detector.base_detector.model_dump(mode="json"),
            "device": detector.device,
            "code": code,
        },
        dataset=data.path,
        detector=detector.digest,
    )
    kept = Store(store, STAGE)
    keys = {
        image_id: key_of(made_from=made_from, image=image_id, regions=_digest(*regions))
        for image_id, regions in wanted.items()
    }
    missing = {i: wanted[i] for i, key in keys.items() if kept.tensors(key) is None}
    log.info(f"{len(wanted)} images retrieved: {len(missing)} to go through the detector")
    if missing:
        extracted = _extract(
            data, missing, detector.model, detector.backbone, detector.settings, detector.device
        )
        for image_id, arrays in extracted:
            kept.put_tensors(keys[image_id], arrays, made_from | {"image_id": image_id})
    return {image_id: kept.tensors_path(key) for image_id, key in keys.items()}


def candidates_of(
    regions: Regions, labels: PseudoLabels, image_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and objectness of an image's proposals, after those of labels that are none of them."""
    retrieved = [images[image_id] for images in labels.values() if image_id in images]
    boxes = np.concatenate([boxes for boxes, _ in retrieved])
    scores = np.concatenate([scores for _, scores in retrieved])
    # Retrieved regions are proposals; imported ones need not be.
    known = {box.tobytes() for box in regions.box}
    others = [n for n, box in enumerate(boxes) if box.tobytes() not in known]
    return (
        np.concatenate([boxes[others], regions.box]),
        np.concatenate([scores[others], regions.objectness]).astype(np.float32),
    )


def _digest(box: np.ndarray, objectness: np.ndarray) -> str:
    return hashlib.sha256(box.tobytes() + objectness.tobytes()).hexdigest()


def _extract(
    data: CocoDataset,
    regions: dict[int, tuple[np.ndarray, np.ndarray]],
    model: Detector,
    backbone: BackboneSettings,
    settings: RegionFeaturesSettings,
    device: str,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The arrays of each image (`lpovod.formats.image_features`), in the order of the ids."""
    views = inference_views(
        data, sorted(regions), backbone.short_side, backbone.long_side, settings.batch_size
    )
    with progress(None, "region features", "image", len(regions)) as bar:
        for shown in views:
            image_ids = [view.view.image_id for view in shown]
            described = describe_regions(
                model,
                shown,
                [regions[i] for i in image_ids],
                [data.size(i) for i in image_ids],
                settings.batch_size,
                device,
            )
            yield from zip(image_ids, described, strict=True)
            bar.update(len(shown))
