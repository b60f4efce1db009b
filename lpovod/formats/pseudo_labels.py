"""Pseudo-labels: retrieved regions of novel classes, in the layout of the original's file.

COCO json whose annotations carry ``score`` (the region's objectness) and ``cosine`` (with the
query). They are followed by objects with ``iscrowd`` 1: too uncertain for labels, but too similar
to the name for negatives. As in COCO, they count as neither positive nor negative.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lpovod.exceptions import LpovodError
from lpovod.formats.coco import corners, read_dataset

STAGE = "pseudo_labels"


@dataclass(frozen=True)
class Retrieved:
    """What was retrieved for one class, in COCO's annotations without ids.

    Attributes:
        regions: ``image_id``, ``bbox``, ``area``, ``score`` (objectness), ``cosine``; best first.
        ignored: the same of objects that are neither labels nor negatives.
        recall: of an inexact index: the fraction of the exact regions that it returned.
    """

    regions: list[dict]
    ignored: list[dict] = field(default_factory=list)
    recall: float | None = None


def as_coco(retrieved: dict[str, Retrieved], dataset: Path) -> dict:
    """The labels of all classes, and the regions to ignore, in the layout of this stage's file."""
    images = read_dataset(dataset).images
    annotations = [
        {"id": 0, "category_id": category, "iscrowd": iscrowd, "segmentation": []}
        | {key: value for key, value in region.items() if key != "key"}
        for category, of_class in enumerate(retrieved.values(), 1)
        for iscrowd, regions in ((0, of_class.regions), (1, of_class.ignored))
        for region in regions
    ]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    return {
        "images": [images[i] for i in dict.fromkeys(a["image_id"] for a in annotations)],
        "annotations": annotations,
        "categories": [
            {"id": category, "name": name, "split": "novel"}
            for category, name in enumerate(retrieved, 1)
        ],
    }


PseudoLabels = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]


def read_pseudo_labels(path: Path) -> PseudoLabels:
    """Read pseudo-labels: this stage's file, or the original's.

    Returns:
        By class name, in the order of the categories, and image id: boxes (n, 4) float32 xyxy and
        their objectness (n,) float32. Classes without labels are left out.

    Raises:
        LpovodError: if the file is not a COCO json, or a label has no score.
    """
    content = read_dataset(path)
    grouped: dict[int, dict[int, list[dict]]] = {category: {} for category in content.categories}
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            if "score" not in annotation:
                raise LpovodError(
                    f"{content.path}: annotation {annotation['id']} has no score: the file does "
                    f"not hold pseudo-labels, which stage {STAGE} writes"
                )
            grouped[annotation["category_id"]].setdefault(image_id, []).append(annotation)
    return {
        content.categories[category]["name"]: {i: _boxes(labels) for i, labels in images.items()}
        for category, images in grouped.items()
        if images
    }


def labels_of(retrieved: dict[str, Retrieved]) -> tuple[PseudoLabels, dict[int, np.ndarray]]:
    """What `read_pseudo_labels` and `read_ignored` would read from the file of `as_coco`."""
    labels: PseudoLabels = {}
    ignored: dict[int, list[dict]] = {}
    for name, of_class in retrieved.items():
        by_image: dict[int, list[dict]] = {}
        for region in of_class.regions:
            by_image.setdefault(region["image_id"], []).append(region)
        labels[name] = {image_id: _boxes(regions) for image_id, regions in by_image.items()}
        for region in of_class.ignored:
            ignored.setdefault(region["image_id"], []).append(region)
    return labels, {image_id: _boxes(regions)[0] for image_id, regions in ignored.items()}


def read_ignored(path: Path) -> dict[int, np.ndarray]:
    """Boxes (n, 4) float32 xyxy, by image id, of objects that are not negatives of any class."""
    by_image = {}
    for image_id, annotations in read_dataset(path).annotations.items():
        if ignored := [a for a in annotations if a.get("iscrowd", 0)]:
            by_image[image_id] = _boxes(ignored)[0]
    return by_image


def _boxes(labels: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    boxes = corners([label["bbox"] for label in labels])
    return boxes.astype(np.float32), np.array([label["score"] for label in labels], np.float32)
