"""Kinds of detection mistakes: duplicates, badly placed boxes, wrong classes, background."""

from collections import Counter, defaultdict

import numpy as np

from lpovod.formats.coco import CocoDataset, Detections
from lpovod.overlaps import overlaps

KINDS = {
    "correct": "the first detection of an object, IoU of at least 0.5",
    "duplicate": "well placed on an object that is already detected",
    "too tight": "on a part of an object",
    "too loose": "around an object and much of its surroundings",
    "group": "around several objects",
    "shifted": "overlaps an object in another way",
    "other class": "well placed on an object of another class",
    "background": "on no annotated object",
}
"""Kinds of detections and their meaning."""


def count_mistakes(
    data: CocoDataset, detections: Detections, category_ids: list[int]
) -> dict[str, float]:
    """Percent of each kind among the highest-scoring detections of some classes.

    A class contributes as many detections as it has objects: those that decide AP.

    Args:
        data: the annotations.
        detections: all detections.
        category_ids: the classes to count.

    Returns:
        Percent by kind, over all these classes together.
    """
    counts = dict.fromkeys(KINDS, 0)
    objects = {i: data.boxes(i) for i in data.images}
    wanted = set(category_ids)
    totals = Counter(int(c) for _, categories in objects.values() for c in categories)
    ranked: dict[int, list[tuple[float, int, tuple[float, ...]]]] = defaultdict(list)
    for image_id, (boxes, scores, categories) in detections.items():
        for box, score, category in zip(boxes, scores, categories.tolist(), strict=True):
            if category in wanted:
                ranked[category].append((-float(score), image_id, tuple(map(float, box))))
    for category, of_class in ranked.items():
        taken: set[tuple[int, int]] = set()
        for _, image_id, box in sorted(of_class)[: totals[category]]:
            boxes, categories = objects[image_id]
            same = categories == category
            counts[_kind(np.array(box), image_id, boxes[same], boxes[~same], taken)] += 1
    counted = max(1, sum(counts.values()))
    return {kind: round(100 * n / counted, 2) for kind, n in counts.items()}


def _kind(
    box: np.ndarray,
    image_id: int,
    same_class: np.ndarray,
    others: np.ndarray,
    taken: set[tuple[int, int]],
) -> str:
    iou, inside, covered = overlaps(box, same_class)
    if len(same_class) and iou.max() >= 0.5:
        free = [k for k in np.argsort(-iou) if iou[k] >= 0.5 and (image_id, int(k)) not in taken]
        if not free:
            return "duplicate"
        taken.add((image_id, int(free[0])))
        return "correct"
    if badly_placed := placement(iou, inside, covered):
        return badly_placed
    return "other class" if (overlaps(box, others)[0] >= 0.5).any() else "background"


def placement(iou: np.ndarray, inside: np.ndarray, covered: np.ndarray) -> str | None:
    """The kind of misplacement of a box with an IoU below 0.5; None if it hardly meets an object.

    Args:
        iou: (m,) with each object of its class.
        inside: (m,) fraction of the box inside each object.
        covered: (m,) fraction of each object that the box covers.
    """
    if (covered >= 0.7).sum() >= 2:
        return "group"
    if (inside >= 0.9).any():
        return "too tight"
    if (covered >= 0.9).any():
        return "too loose"
    return "shifted" if (iou >= 0.1).any() else None
