"""How boxes overlap, for what needs no torch; networks use `lpovod.boxes`."""

import numpy as np


def overlaps(boxes: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """IoU of boxes and objects, the part of a box inside an object, and that of it that is covered.

    Args:
        boxes: (..., 4) xyxy.
        objects: (m, 4) xyxy.

    Returns:
        Each (..., m).
    """
    boxes = boxes[..., None, :]
    sides = np.minimum(boxes[..., 2:], objects[:, 2:]) - np.maximum(boxes[..., :2], objects[:, :2])
    shared = sides.clip(min=0).prod(axis=-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(axis=-1).clip(min=1e-9)
    areas = (objects[:, 2:] - objects[:, :2]).prod(axis=-1).clip(min=1e-9)
    return shared / (area + areas - shared), shared / area, shared / areas


def overlapping(boxes: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Which of the boxes (n, 4) have an IoU of .5 or more with any of the objects (m, 4)."""
    return (overlaps(boxes, objects)[0] >= 0.5).any(axis=1)
