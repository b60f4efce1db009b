"""Pseudo-labels: retrieved regions of novel classes, in the layout of the original's file.

COCO json whose annotations carry ``score`` (the region's objectness) and ``cosine`` (with what was
searched for). Objects that are no labels, but so similar to the name that they should not be
negatives either, follow with ``iscrowd`` 1, which means what it means in COCO: neither one nor the
other.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, corners, read_dataset

STAGE = "pseudo_labels"
CATEGORY_ID = 1  # of the one class of a file; readers go by its name


def as_coco(name: str, regions: list[dict], dataset: Path, ignored: Sequence[dict] = ()) -> dict:
    """The labels of a class, and what is to be ignored, in the layout of this stage's files."""
    images = read_dataset(dataset).images
    marked = [(0, region) for region in regions] + [(1, region) for region in ignored]
    annotations = [
        {"id": i, "category_id": CATEGORY_ID, "iscrowd": iscrowd, "segmentation": []}
        | {key: value for key, value in region.items() if key != "key"}
        for i, (iscrowd, region) in enumerate(marked, start=1)
    ]
    return {
        "images": [images[i] for i in dict.fromkeys(r["image_id"] for _, r in marked)],
        "annotations": annotations,
        "categories": [{"id": CATEGORY_ID, "name": name, "split": "novel"}],
    }


PseudoLabels = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]


def read_pseudo_labels(paths: Path | Iterable[Path]) -> PseudoLabels:
    """Read pseudo-labels: files of this stage, or the original's single file of all classes.

    Returns:
        By class name and image id: boxes (n, 4) float32 xyxy and their objectness (n,) float32.
        Classes without any label are left out.

    Raises:
        LpovodError: if a file is no COCO json, a label has no score, or two files have one class.
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    found: PseudoLabels = {}
    source: dict[str, Path] = {}
    for path in paths:
        content = read_dataset(path)
        for name, images in _by_class(content).items():
            if name in source:
                raise LpovodError(f"class {name!r} is both in {source[name]} and in {path}")
            found[name], source[name] = images, path
    return found


def read_ignored(paths: Iterable[Path]) -> dict[int, np.ndarray]:
    """Boxes (n, 4) float32 xyxy, by image id, of objects that are negatives of no class.

    Args:
        paths: files of this stage.
    """
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for path in paths:
        for image_id, annotations in read_dataset(path).annotations.items():
            if ignored := [a for a in annotations if a.get("iscrowd", 0)]:
                found[image_id].append(_boxes(ignored)[0])
    return {image_id: np.concatenate(boxes) for image_id, boxes in found.items()}


def _by_class(content: CocoDataset) -> PseudoLabels:
    grouped: dict[str, dict[int, list[dict]]] = {}
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            if "score" not in annotation:
                raise LpovodError(
                    f"{content.path}: annotation {annotation['id']} has no score: these are no "
                    f"pseudo-labels, which stage {STAGE} writes"
                )
            name = content.categories[annotation["category_id"]]["name"]
            grouped.setdefault(name, {}).setdefault(image_id, []).append(annotation)
    return {
        name: {image_id: _boxes(labels) for image_id, labels in images.items()}
        for name, images in grouped.items()
    }


def _boxes(labels: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    boxes = corners([label["bbox"] for label in labels])
    return boxes.astype(np.float32), np.array([label["score"] for label in labels], np.float32)
