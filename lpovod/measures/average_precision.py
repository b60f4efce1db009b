"""COCO's average precision at an IoU of 0.5, over base, novel and all classes.

The numbers are pycocotools'. They are computed from arrays, for all images and classes at once:
a run measures many variants, and a dictionary per detection took most of the time.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

import numpy as np

from lpovod.formats.coco import CocoDataset, Detections

IOU = 0.5
PER_IMAGE = 100  # detections of a class that count in an image, the best ones
RECALLS = np.linspace(0, 1, 101)

Protocol = Literal["all_images", "annotated_images"]
"""Images that AP is measured on: all, or as in OV-COCO only those with an annotation."""


def images_of(data: CocoDataset, protocol: Protocol) -> list[int]:
    """Ids of the images to measure on; `data` holds the measured classes alone."""
    return [i for i, objects in data.annotations.items() if objects or protocol == "all_images"]


@dataclass(frozen=True)
class GroundTruth:
    """The measured images and their objects.

    Attributes:
        content: both in COCO's format, with the categories.
        image_ids: (i,) int64, ascending.
        names: of the classes, by category id, ascending.
        group: (m,) int64, ascending: image and class of each object (see `groups`).
        box: (m, 4) float64, x, y, width and height.
        crowd: (m,) bool; in each group the crowds come last.
    """

    content: dict[str, list[dict[str, Any]]]
    image_ids: np.ndarray
    names: dict[int, str]
    group: np.ndarray
    box: np.ndarray
    crowd: np.ndarray

    def groups(self, image_id: np.ndarray, category_id: np.ndarray) -> np.ndarray:
        """A number for the image and class of each of (n,) boxes, (n,) int64.

        The first class has the lowest numbers, and in each class the first image. It is -1 for an
        image or a class that is not measured.
        """
        image, measured = _places(self.image_ids, image_id)
        category, known = _places(np.array(list(self.names), np.int64), category_id)
        return np.where(measured & known, category * len(self.image_ids) + image, -1)

    def category_places(self, group: np.ndarray) -> np.ndarray:
        """The place of each group's class among the names."""
        return group // max(1, len(self.image_ids))


def _places(listed: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where ascending numbers list each value, and whether they do."""
    if not len(listed):
        return np.zeros(len(values), np.int64), np.zeros(len(values), bool)
    place = np.searchsorted(listed, values).clip(max=len(listed) - 1)
    return place, listed[place] == values


def coco_ground_truth(data: CocoDataset, image_ids: list[int]) -> GroundTruth:
    """The objects of these images, indexed for the measurement."""
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a}
        for image_id in image_ids
        for a in data.annotations[image_id]
    ]
    categories = [data.categories[c] | {"id": c} for c in sorted(data.categories)]
    truth = GroundTruth(
        content={
            "images": [data.images[i] for i in image_ids],
            "annotations": annotations,
            "categories": categories,
        },
        image_ids=np.array(sorted(image_ids), np.int64),
        names={c["id"]: c["name"] for c in categories},
        group=np.empty(0, np.int64),
        box=_boxes(annotations),
        crowd=np.array([bool(a["iscrowd"]) for a in annotations], bool),
    )
    ids = (_integers(annotations, key) for key in ("image_id", "category_id"))
    group = truth.groups(*ids)
    order = np.lexsort((truth.crowd, group))
    return replace(truth, group=group[order], box=truth.box[order], crowd=truth.crowd[order])


def _integers(items: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    return np.array([item[key] for item in items], np.int64)


def _boxes(items: Iterable[dict[str, Any]]) -> np.ndarray:
    return np.array([item["bbox"] for item in items], np.float64).reshape(-1, 4)


def ap50_by_class(truth: GroundTruth, results: list[dict[str, Any]]) -> dict[str, float]:
    """AP50, in percent, of every class that has an object, by class name.

    Args:
        truth: from `coco_ground_truth`.
        results: in COCO's results format; images and classes that `truth` leaves out are ignored.
    """
    group = truth.groups(_integers(results, "image_id"), _integers(results, "category_id"))
    return _ap50(truth, group, _boxes(results), np.array([r["score"] for r in results], np.float64))


def ap50_of_detections(truth: GroundTruth, detections: Detections) -> dict[str, float]:
    """The same as `ap50_by_class`, for detections that are in memory."""
    counts = [len(score) for _, score, _ in detections.values()]
    image_id = np.repeat(np.array(list(detections), np.int64), counts)
    box, score, category = (
        np.concatenate([np.empty((0, *shape)), *(of_image[k] for of_image in detections.values())])
        for k, shape in enumerate([(4,), (), ()])
    )
    box[:, 2:] -= box[:, :2]  # in float64, as in the results' file
    return _ap50(truth, truth.groups(image_id, category.astype(np.int64)), box, score)


def _ap50(
    truth: GroundTruth, group: np.ndarray, box: np.ndarray, score: np.ndarray
) -> dict[str, float]:
    """AP50 by class name; detections have a group (n,), box (n, 4) xywh and score (n,)."""
    # Equal scores keep the order of the images, and in an image that of the results.
    order = np.lexsort((-score, group))
    order = order[np.searchsorted(group[order], 0) :]
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    order = order[rank < PER_IMAGE]
    group, box, score = group[order], box[order], score[order]
    matched = _match(truth, group, box)
    crowded = np.append(truth.crowd, False)[matched]
    right, score = (matched >= 0)[~crowded], score[~crowded]
    category = truth.category_places(group[~crowded])
    order = np.lexsort((-score, category))
    right, category = right[order], category[order]
    places = np.arange(len(truth.names))
    starts, ends = (np.searchsorted(category, places, side) for side in ("left", "right"))
    objects = np.bincount(truth.category_places(truth.group[~truth.crowd]), minlength=len(places))
    return {
        name: 100 * _average_precision(right[start:end], count)
        for name, start, end, count in zip(
            truth.names.values(), starts, ends, objects.tolist(), strict=True
        )
        if count
    }


def _match(truth: GroundTruth, group: np.ndarray, box: np.ndarray) -> np.ndarray:
    """The object that each detection is matched with, (n,) int64; -1 without one.

    Detections come in groups, best first. Each takes the free object that it overlaps most, with an
    IoU of at least 0.5; only if there is none, a crowd, which remains free.
    """
    start, end = (np.searchsorted(truth.group, group, side) for side in ("left", "right"))
    counts = end - start
    detection = np.repeat(np.arange(len(group)), counts)
    first = np.cumsum(counts) - counts
    candidate = np.arange(len(detection)) - np.repeat(first - start, counts)
    iou = _iou(box[detection], truth.box[candidate], truth.crowd[candidate])
    close = iou >= IOU
    pairs = zip(*(a[close].tolist() for a in (detection, candidate, iou)), strict=True)
    matched, crowd = np.full(len(group), -1), truth.crowd.tolist()
    taken: set[int] = set()
    for number, of_detection in groupby(pairs, itemgetter(0)):
        # Of equal ones the last, as in pycocotools.
        free = [(not crowd[o], overlap, o) for _, o, overlap in of_detection if o not in taken]
        if free:
            matched[number] = best = max(free)[2]
            if not crowd[best]:
                taken.add(best)
    return matched


def _iou(boxes: np.ndarray, objects: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of (n, 4) boxes with (n, 4) objects, xywh; with a crowd, the fraction inside it."""
    ends = np.minimum(boxes[:, 2:] + boxes[:, :2], objects[:, 2:] + objects[:, :2])
    shared = (ends - np.maximum(boxes[:, :2], objects[:, :2])).clip(min=0).prod(axis=1)
    area, areas = boxes[:, 2:].prod(axis=1), objects[:, 2:].prod(axis=1)
    union = np.where(crowd, area, area + areas - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _average_precision(right: np.ndarray, objects: int) -> float:
    """Mean precision at 101 recalls, each the highest at that recall or beyond.

    Args:
        right: (n,) bool, whether each detection has an object, best first.
        objects: their number.
    """
    correct = right.cumsum()
    recall = correct / objects
    precision = correct / (np.arange(1, len(right) + 1) + np.spacing(1))
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.append(highest, 0.0)[np.searchsorted(recall, RECALLS)].mean())


def ap50(by_class: dict[str, float], base: list[str], novel: list[str]) -> dict[str, float | None]:
    """Means over novel, base and all classes; None if no class of a split has an object."""

    def mean(names: list[str]) -> float | None:
        values = [by_class[n] for n in names if n in by_class]
        return round(float(np.mean(values)), 2) if values else None

    return {"novel": mean(novel), "base": mean(base), "all": mean([*base, *novel])}
