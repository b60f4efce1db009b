"""Recall of proposals: the fraction of annotated objects that one of the best boxes covers."""

from collections.abc import Mapping

import numpy as np

from lpovod.formats.coco import CocoDataset
from lpovod.overlaps import overlaps

RECALL_AT = (10, 50, 100)


def recall_by_split(
    data: CocoDataset, proposals: Mapping[int, np.ndarray], at: tuple[int, ...] = RECALL_AT
) -> dict[str, dict[str, float]]:
    """Percent of annotated objects that one of the first n proposals covers, IoU at least 0.5.

    Args:
        data: annotations of the configured classes (`CocoDataset.of_classes`); crowds are left out.
        proposals: (m, 4) boxes by image id, best first; all that the stages use, so that n beyond
            their number gives the recall of them all.
        at: the values of n.

    Returns:
        The recall by n, for each of ``base`` and ``novel`` that has objects.
    """
    by_split: dict[str, list[np.ndarray]] = {}
    for image_id in data.images:
        boxes, categories = data.boxes(image_id)
        iou = overlaps(boxes, proposals[image_id])[0]
        covered = [(iou[:, :n] >= 0.5).any(axis=1) for n in at]
        for category, flags in zip(categories, np.array(covered).T, strict=True):
            by_split.setdefault(data.categories[int(category)]["split"], []).append(flags)
    return {
        split: {str(n): round(100 * float(v), 2) for n, v in zip(at, np.mean(f, 0), strict=True)}
        for split, f in sorted(by_split.items())
    }
