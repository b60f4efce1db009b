"""The report's crops: regions retrieved for each novel class, and the share that is right."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lpovod.artifacts import check_made_from
from lpovod.drawing import jpeg_uri, square_around
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, corners, read_dataset
from lpovod.measures.mistakes import placement
from lpovod.overlaps import overlaps
from lpovod.progress import progress

RIGHT, BADLY_PLACED, WRONG, UNKNOWN = "right", "badly placed", "wrong", "unknown"
CROP_PIXELS = 160
CROPS = 270  # of one page: they make up most of its bytes
CLASSES_WITH_CROPS = 18  # of a page with too many classes to show crops of all

Labels = dict[str, list[dict[str, Any]]]


# --- retrieved regions


def retrieved(labels: Labels, novel: list[str], truth: CocoDataset) -> list[dict[str, Any]]:
    """The regions retrieved for each novel class, judged.

    Args:
        labels: regions by class name, of `read_labels`.
        novel: names of the classes.
        truth: annotations of all classes in the same images.

    Returns:
        For each class: name, regions (best cosine first), the mark and reason of each, counts by
        mark, mean cosine, and purity in percent, None if unknown. Classes have no regions if none
        were retrieved.
    """
    judge = _Judge(truth)
    classes = []
    for name in progress(novel, "retrieved regions", "class"):
        regions = sorted(labels.get(name, []), key=lambda r: (-r["cosine"], r["id"]))
        marks = [judge(name, region) for region in regions]
        counts = Counter(mark for mark, _ in marks)
        judged = judge.can_judge(name) and bool(regions)
        classes.append(
            {
                "name": name,
                "regions": regions,
                "marks": marks,
                "counts": {mark: counts[mark] for mark in (RIGHT, BADLY_PLACED, WRONG)},
                "cosine": sum(r["cosine"] for r in regions) / max(1, len(regions)),
                "purity": 100 * counts[RIGHT] / len(regions) if judged else None,
            }
        )
    return classes


def read_labels(paths: Iterable[Path], train: Path) -> Labels:
    """Regions by the name of their class.

    Args:
        paths: files of stage `pseudo_labels`.
        train: json of the training split that they were made from.

    Raises:
        LpovodError: if a file was made from another split, or its annotations have no cosine.
    """
    labels: Labels = defaultdict(list)
    for path in paths:
        content = read_dataset(path)
        if ident := content.info.get("identity"):
            check_made_from(path, ident, "dataset", train)
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
    """Judges regions: a mark and a short reason."""

    def __init__(self, truth: CocoDataset) -> None:
        self.truth = truth
        self.names = {i: category["name"] for i, category in truth.categories.items()}
        self.categories = {name: i for i, name in self.names.items()}
        annotations = (a for of_image in truth.annotations.values() for a in of_image)
        self.annotated = {self.names[a["category_id"]] for a in annotations}
        # An image has regions of many classes; its annotations are converted once.
        self.boxes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def can_judge(self, name: str) -> bool:
        """Whether any object of a class is annotated."""
        return name in self.annotated

    def __call__(self, name: str, region: dict[str, Any]) -> tuple[str, str]:
        if not self.can_judge(name):
            return UNKNOWN, "no annotation to compare with"
        boxes, categories = self._boxes(region["image_id"])
        same = categories == self.categories[name]
        iou, inside, covered = overlaps(corners(region["bbox"]), boxes)
        if iou[same].max(initial=0) >= 0.5:
            return RIGHT, f"IoU {iou[same].max():.2f}"
        if iou[~same].max(initial=0) >= 0.5:
            return WRONG, self.names[int(categories[np.where(same, 0, iou).argmax()])]
        if iou[same].max(initial=0) > 0:
            return BADLY_PLACED, placement(iou[same], inside[same], covered[same]) or "shifted"
        return WRONG, "background"

    def _boxes(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        if image_id not in self.truth.images:
            raise LpovodError(f"{self.truth.path} has no image {image_id}")
        if image_id not in self.boxes:
            self.boxes[image_id] = self.truth.boxes(image_id)
        return self.boxes[image_id]


# --- the classes and regions to show


def choose_classes(classes: list[dict[str, Any]], few: int) -> dict[str, list[dict[str, Any]]]:
    """The classes whose crops are shown, by the reason, which is empty if all are shown.

    Of more than `few` classes, half of `CLASSES_WITH_CROPS` are the least pure and half the purest.
    Where purity is known for too few, those of the highest mean cosine fill up. Ties go to the
    higher mean cosine, then to the name.

    Args:
        classes: of `retrieved`.
        few: the most classes that are all shown, those without a region as well.
    """
    if len(classes) <= few:
        return {"": classes}
    by_cosine = sorted(
        (c for c in classes if c["regions"]), key=lambda c: (-c["cosine"], c["name"])
    )
    least = sorted((c for c in by_cosine if c["purity"] is not None), key=lambda c: c["purity"])
    half = min(CLASSES_WITH_CROPS, len(least)) // 2
    purest = sorted(least[half:], key=lambda c: -c["purity"])[: CLASSES_WITH_CROPS // 2]
    unknown = [c for c in by_cosine if c["purity"] is None]
    groups = {
        "least pure": least[:half],
        "purest": purest,
        "most similar to their names": unknown[: CLASSES_WITH_CROPS - half - len(purest)],
    }
    return {reason: group for reason, group in groups.items() if group}


def draw_crops(
    images: CocoDataset, classes: list[dict[str, Any]], per_class: int
) -> dict[str, list[dict[str, Any]]]:
    """Crops of the best regions of each class, by its name.

    Args:
        images: the training images.
        classes: of `retrieved`.
        per_class: the most crops per class; `CROPS` in all are divided equally.

    Raises:
        LpovodError: if there is no such image.
    """
    with_regions = [c for c in classes if c["regions"]]
    shown = min(per_class, max(1, CROPS // max(1, len(with_regions))))
    wanted = [
        (region["image_id"], c["name"], place)
        for c in with_regions
        for place, region in enumerate(c["regions"][:shown])
    ]
    by_name = {c["name"]: c for c in classes}
    crops: dict[tuple[str, int], dict[str, Any]] = {}
    of_images = [(i, list(group)) for i, group in groupby(sorted(wanted), key=lambda w: w[0])]
    for image_id, group in progress(of_images, "crops", "image"):
        pixels = _load(images, image_id, group[0][1])
        for _, name, place in group:
            region, mark = by_name[name]["regions"][place], by_name[name]["marks"][place]
            crops[name, place] = _draw_crop(pixels, region, *mark)
    return {
        c["name"]: [crops[c["name"], place] for place in range(min(shown, len(c["regions"])))]
        for c in classes
    }


def _load(images: CocoDataset, image_id: int, name: str) -> np.ndarray:
    if image_id not in images.images:
        raise LpovodError(
            f"{images.path} has no image {image_id}, which the pseudo-labels of "
            f"{name!r} name. Make them again: snakemake --forcerun pseudo_labels"
        )
    return images.load(image_id)


def _draw_crop(pixels: np.ndarray, region: dict[str, Any], mark: str, why: str) -> dict[str, Any]:
    """A square around a region, with the box in percent of the square, mark and reason."""
    square, box = square_around(pixels, region["bbox"])
    return {
        "uri": jpeg_uri(square, CROP_PIXELS),
        "box": list(box),
        "mark": mark,
        "why": why,
        "cosine": region["cosine"],
        "image_id": region["image_id"],
    }
