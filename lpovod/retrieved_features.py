"""The frozen detector on regions: features of a split, and of images that classes retrieved.

Those of retrieved images are kept in a store, for each image under all that shaped them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lpovod.artifacts import identity, sha256
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.formats.coco import CocoDataset
from lpovod.formats.image_features import STAGE
from lpovod.formats.pseudo_labels import PseudoLabels
from lpovod.formats.regions import Regions
from lpovod.formats.store import Store, key_of
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import describe_regions, load_detector
from lpovod.progress import log, progress
from lpovod.views import inference_views


@dataclass
class FrozenDetector:
    """The trained base detector, which is loaded when it is needed.

    Attributes:
        path: of its weights.
        backbone: as it was trained with.
        base_detector: as it was trained with.
        settings: images per pass, precision.
        device: where it runs.
        threads: of the job; with a GPU all but one load images.
    """

    path: Path
    backbone: BackboneSettings
    base_detector: BaseDetectorSettings
    settings: RegionFeaturesSettings
    device: str
    threads: int = 1

    @cached_property
    def model(self) -> Detector:
        """The network."""
        return load_detector(self.path, self.backbone, self.base_detector)[0].to(self.device)

    @cached_property
    def digest(self) -> str:
        """Digest of the weights."""
        return sha256(self.path)

    def extract(
        self, data: CocoDataset, regions: dict[int, tuple[np.ndarray, np.ndarray]]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """The arrays of each image (`lpovod.formats.image_features`), sizes in turn.

        Args:
            data: the images.
            regions: boxes (n, 4) xyxy and objectness (n,) by image id.
        """
        size = self.settings.batch_size
        sides = self.backbone.short_side, self.backbone.long_side
        with progress(None, "region features", "image", len(regions)) as bar:
            for shown in inference_views(
                data, sorted(regions), *sides, size, self.device, self.threads
            ):
                image_ids = [view.view.image_id for view in shown]
                described = describe_regions(
                    self.model,
                    shown,
                    [regions[i] for i in image_ids],
                    [data.size(i) for i in image_ids],
                    size,
                    self.device,
                    self.settings.precision,
                )
                yield from zip(image_ids, described, strict=True)
                bar.update(len(shown))


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
            "precision": detector.settings.precision,
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
        for image_id, arrays in detector.extract(data, missing):
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
