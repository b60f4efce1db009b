"""Overlaps of boxes without torch; networks use `lpovod.boxes`."""

import numpy as np


def overlaps(boxes: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU and coverage of boxes and objects.

    Args:
        boxes: (..., 4) xyxy.
        objects: (m, 4) xyxy.

    Returns:
        The IoU, the fraction of the box inside the object, and the fraction of the object that the
        box covers; each (..., m).
    """
    boxes = boxes[..., None, :]
    sides = np.minimum(boxes[..., 2:], objects[:, 2:]) - np.maximum(boxes[..., :2], objects[:, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1).clip(min=1e-9)
    areas = (objects[:, 2:] - objects[:, :2]).prod(axis=-1).clip(min=1e-9)
    return shared / (area + areas - shared), shared / area, shared / areas


def overlapping(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Whether each box has an IoU of at least 0.5 with any object.

    Args:
        boxes: (n, 4) xyxy.
        objects: (m, 4) xyxy.

    Returns:
        (n,) bool.
    """
    iou, _, _ = overlaps(boxes, objects)
    return np.any(iou >= 0.5, axis=1)
