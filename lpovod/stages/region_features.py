"""Stage `region_features`: what the frozen detector says of regions, kept for everything below it.

With them a new class, another beta or a different floor is a matrix product and an NMS away: no
further pass of the backbone. A region store with the columns ``feature`` (region head, fp16),
``embedding`` (CLIP head, unit rows, fp16) and ``refined`` (box after regression, float32 xyxy in
pixels of the original image).
"""

from pathlib import Path

import numpy as np
import torch

from lpovod.artifacts import Identity, identity
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.pseudo_labels import read_pseudo_labels
from lpovod.formats.regions import RegionWriter, read_proposals, write_regions
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import load_detector, refine
from lpovod.progress import progress
from lpovod.views import LoadedView, batch, inference_views


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
        found = store.read(image_id)
        regions[image_id] = (found.box, found.objectness)
    made_from = identity(
        "region_features", None, dataset=dataset, proposals=proposals, detector=detector
    )
    _extract(data, regions, detector, backbone, base_detector, settings, output, device, made_from)


def extract_retrieved(
    dataset: Path,
    proposals: Path,
    pseudo_labels: Path,
    detector: Path,
    backbone: BackboneSettings,
    base_detector: BaseDetectorSettings,
    settings: RegionFeaturesSettings,
    output: Path,
    device: str = "cpu",
) -> None:
    """Features of the regions that one novel class is learned from.

    These are its pseudo-labels, and all proposals of the images they lie in: the linear probe's
    candidates for positives and negatives.

    Args:
        dataset: train.json.
        proposals: of the same images.
        pseudo_labels: json of one class.
        detector: the trained base detector.
        backbone: as the detector was trained with.
        base_detector: as the detector was trained with.
        settings: of this stage.
        output: the region store, with the images of the pseudo-labels alone.
        device: where to run.
    """
    data = read_dataset(dataset)
    store = read_proposals(proposals, dataset)
    regions = {}
    for labels in read_pseudo_labels([pseudo_labels]).values():
        for image_id, (boxes, scores) in labels.items():
            found = store.read(image_id)
            # Pseudo-labels come first, as annotated boxes do among the candidates of training.
            regions[image_id] = (
                np.concatenate([boxes, found.box]),
                np.concatenate([scores, found.objectness]).astype(np.float32),
            )
    made_from = identity(
        "region_features",
        None,
        dataset=dataset,
        proposals=proposals,
        detector=detector,
        pseudo_labels=pseudo_labels,
    )
    _extract(data, regions, detector, backbone, base_detector, settings, output, device, made_from)


@torch.inference_mode()
def _extract(
    data: CocoDataset,
    regions: dict[int, tuple[np.ndarray, np.ndarray]],
    detector: Path,
    backbone: BackboneSettings,
    base_detector: BaseDetectorSettings,
    settings: RegionFeaturesSettings,
    output: Path,
    device: str,
    made_from: Identity,
) -> None:
    model, _ = load_detector(detector, backbone, base_detector)
    model = model.to(device)
    views = inference_views(
        data, sorted(regions), backbone.short_side, backbone.long_side, settings.batch_size
    )
    with (
        write_regions(output, made_from) as writer,
        progress(None, "region features", "image", len(regions)) as bar,
    ):
        for shown in views:
            _write_batch(model, data, shown, regions, writer, device)
            bar.update(len(shown))


def _write_batch(
    model: Detector,
    data: CocoDataset,
    views: list[LoadedView],
    regions: dict[int, tuple[np.ndarray, np.ndarray]],
    writer: RegionWriter,
    device: str,
) -> None:
    images = batch(views, device, model.backbone.normalisation, pad_with_black=True)
    pyramid = model.pyramid(images)
    boxes = [v.to_view(regions[v.view.image_id][0]).to(device) for v in views]
    outputs = model.extract(model.pool(pyramid, boxes))
    start = 0
    for view, box in zip(views, boxes, strict=True):
        image_id, rows = view.view.image_id, slice(start, start + len(box))
        size = data.images[image_id]
        refined = refine(box, outputs.deltas[rows], view.scale, (size["height"], size["width"]))
        given, objectness = regions[image_id]
        writer.add(
            image_id,
            given,
            objectness,
            feature=outputs.feature[rows].half().cpu().numpy(),
            embedding=outputs.embedding[rows].half().cpu().numpy(),
            refined=refined.float().cpu().numpy(),
        )
        start += len(box)
