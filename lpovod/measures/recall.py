"""Recall of proposals: the fraction of the annotated objects that one of the best boxes covers."""

import numpy as np

from lpovod.formats.coco import CocoDataset
from lpovod.overlaps import overlaps

RECALL_AT = (10, 50, 100)


def recall_by_split(
    data: CocoDataset, proposals: dict[int, np.ndarray], at: tuple[int, ...] = RECALL_AT
) -> dict[str, dict[str, float]]:
    """Percent of annotated objects that one of the first n proposals covers with an IoU of 0.5.

    Args:
        data: the annotations; crowds are left out.
        proposals: (m, 4) boxes by image id, best first.
        at: the values of n.

    Returns:
        for ``base`` and ``novel`` (where there are objects), the recall by n.
    """
    met: dict[str, list[np.ndarray]] = {}
    for image_id in data.images:
        boxes, categories = data.boxes(image_id)
        iou = overlaps(boxes, proposals[image_id])[0]
        covered = [(iou[:, :n] >= 0.5).any(axis=1) for n in at]
        for category, flags in zip(categories, np.array(covered).T, strict=True):
            met.setdefault(data.categories[int(category)]["split"], []).append(flags)
    return {
        split: {str(n): round(100 * float(v), 2) for n, v in zip(at, np.mean(f, 0), strict=True)}
        for split, f in sorted(met.items())
    }
