"""The report's crops: regions retrieved for each novel class, and the share that is right."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lpovod.artifacts import check_made_from, read_json
from lpovod.drawing import jpeg_uri
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, corners, read_dataset
from lpovod.measures.mistakes import placement
from lpovod.overlaps import overlaps
from lpovod.progress import progress

RIGHT, BADLY_PLACED, WRONG, UNKNOWN = "right", "badly placed", "wrong", "unknown"
CROP_PIXELS = 160


# --- retrieved regions


def retrieved(
    pseudo_labels: Iterable[Path], novel: list[str], train: Path, truth: Path, shown: int
) -> list[dict[str, Any]]:
    """The regions retrieved for each novel class, and the share that is right.

    Args:
        pseudo_labels: files of stage `pseudo_labels`.
        novel: names of the classes.
        train: json of the training split, for its images.
        truth: annotations of all classes in the same images.
        shown: number of crops per class.

    Returns:
        For each class: name, regions (best cosine first), counts by mark, purity in percent (None
        if unknown) and the first crops.
    """
    labels = _labels_by_class(pseudo_labels, train)
    images, known = read_dataset(train), read_dataset(truth)
    classes = []
    for name in progress(novel, "retrieved regions", "class"):
        regions = sorted(labels.get(name, []), key=lambda r: (-r["cosine"], r["id"]))
        judge = _Judge(known, name)
        marks = [judge(region) for region in regions]
        counts = Counter(mark for mark, _ in marks)
        judged = judge.can_judge and bool(regions)
        pairs = list(zip(regions, marks, strict=True))[:shown]
        classes.append(
            {
                "name": name,
                "regions": regions,
                "counts": {mark: counts[mark] for mark in (RIGHT, BADLY_PLACED, WRONG)},
                "purity": 100 * counts[RIGHT] / len(regions) if judged else None,
                "crops": [draw_crop(images, name, region, *mark) for region, mark in pairs],
            }
        )
    return classes


def _labels_by_class(paths: Iterable[Path], train: Path) -> dict[str, list[dict[str, Any]]]:
    labels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in paths:
        if ident := read_json(path).get("info", {}).get("identity"):
            check_made_from(path, ident, "dataset", train)
        content = read_dataset(path)
        annotations = (a for of_image in content.annotations.values() for a in of_image)
        for label in (a for a in annotations if not a.get("iscrowd", 0)):
            if "cosine" not in label:
                raise LpovodError(
                    f"{path}: annotation {label['id']} has no cosine. Make it again: "
                    "snakemake --forcerun pseudo_labels"
                )
            labels[content.categories[label["category_id"]]["name"]].append(label)
    return labels


class _Judge:
    """Judges the regions of a class: a mark and a short reason."""

    def __init__(self, truth: CocoDataset, name: str) -> None:
        self.truth = truth
        self.names = {i: category["name"] for i, category in truth.categories.items()}
        self.category = next((i for i, other in self.names.items() if other == name), None)
        annotations = (a for of_image in truth.annotations.values() for a in of_image)
        self.can_judge = any(a["category_id"] == self.category for a in annotations)

    def __call__(self, region: dict[str, Any]) -> tuple[str, str]:
        if not self.can_judge:
            return UNKNOWN, "no annotation to compare with"
        if region["image_id"] not in self.truth.images:
            raise LpovodError(f"{self.truth.path} has no image {region['image_id']}")
        boxes, categories = self.truth.boxes(region["image_id"])
        same = categories == self.category
        iou, inside, covered = overlaps(corners(region["bbox"]), boxes)
        if iou[same].max(initial=0) >= 0.5:
            return RIGHT, f"IoU {iou[same].max():.2f}"
        if iou[~same].max(initial=0) >= 0.5:
            return WRONG, self.names[int(categories[np.where(same, 0, iou).argmax()])]
        if iou[same].max(initial=0) > 0:
            return BADLY_PLACED, placement(iou[same], inside[same], covered[same]) or "shifted"
        return WRONG, "background"


def draw_crop(
    images: CocoDataset, name: str, region: dict[str, Any], mark: str, why: str
) -> dict[str, Any]:
    """A square around a region, with the box in percent of the square, mark and reason."""
    if region["image_id"] not in images.images:
        raise LpovodError(
            f"{images.path} has no image {region['image_id']}, which the pseudo-labels of "
            f"{name!r} name. Make them again: snakemake --forcerun pseudo_labels"
        )
    pixels = images.load(region["image_id"])
    left, top, side = _window(corners(region["bbox"]), pixels.shape[1], pixels.shape[0])
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(pixels), (-left, -top))
    x, y, width, height = region["bbox"]
    box = [100 * v / side for v in (x - left, y - top, width, height)]
    return {
        "uri": jpeg_uri(square, CROP_PIXELS),
        "box": box,
        "mark": mark,
        "why": why,
        "cosine": region["cosine"],
        "image_id": region["image_id"],
    }


def _window(box: np.ndarray, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of a square around a box, inside the image if it fits."""
    side = max(8, round(1.35 * float((box[2:] - box[:2]).max())))
    corner = (box[:2] + box[2:] - side) / 2
    limits = [(size - side) for size in (width, height)]
    left, top = (
        round(min(max(low, 0), limit)) if limit >= 0 else round(limit / 2)
        for low, limit in zip(corner.tolist(), limits, strict=True)
    )
    return left, top, side
