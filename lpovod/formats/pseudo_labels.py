"""Pseudo-labels: retrieved regions of novel classes, in the layout of the original's file.

COCO json whose annotations carry ``score`` (the region's objectness) and ``cosine`` (with the
query). They are followed by objects with ``iscrowd`` 1: too uncertain for labels, but too similar
to the name for negatives. As in COCO, they count as neither positive nor negative.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, corners, read_dataset

STAGE = "pseudo_labels"
CATEGORY_ID = 1  # of the single class in a file; readers use its name instead


def as_coco(name: str, regions: list[dict], dataset: Path, ignored: Sequence[dict] = ()) -> dict:
    """The labels of a class, and the regions to ignore, in the layout of this stage's files."""
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
    """Read pseudo-labels: files of this stage, or the original's single file with all classes.

    Returns:
        By class name and image id: boxes (n, 4) float32 xyxy and their objectness (n,) float32.
        Classes without labels are left out.

    Raises:
        LpovodError: if a file is not a COCO json, a label has no score, or two files have the same
            class.
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    pseudo_labels: PseudoLabels = {}
    source: dict[str, Path] = {}
    for path in paths:
        content = read_dataset(path)
        for name, images in _by_class(content).items():
            if name in source:
                raise LpovodError(f"class {name!r} is both in {source[name]} and in {path}")
            pseudo_labels[name], source[name] = images, path
    return pseudo_labels


def read_ignored(paths: Iterable[Path]) -> dict[int, np.ndarray]:
    """Boxes (n, 4) float32 xyxy, by image id, of objects that are not negatives of any class.

    Args:
        paths: files of this stage.
    """
    by_image: dict[int, list[np.ndarray]] = defaultdict(list)
    for path in paths:
        for image_id, annotations in read_dataset(path).annotations.items():
            if ignored := [a for a in annotations if a.get("iscrowd", 0)]:
                by_image[image_id].append(_boxes(ignored)[0])
    return {image_id: np.concatenate(boxes) for image_id, boxes in by_image.items()}


def _by_class(content: CocoDataset) -> PseudoLabels:
    grouped: dict[str, dict[int, list[dict]]] = {}
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            if "score" not in annotation:
                raise LpovodError(
                    f"{content.path}: annotation {annotation['id']} has no score: the file does "
                    f"not hold pseudo-labels, which stage {STAGE} writes"
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
