"""torchvision's operators of detectors, without its Python package.

`import torchvision` imports its models and torch's compiler as well, and takes as long as torch
itself: 1.4 s of every job. The compiled operators need neither; the others are a few lines, equal
to torchvision's bit for bit (`tests/test_torchvision_ops.py`).
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional


def _load_operators() -> None:
    """Register the compiled operators in `torch.ops.torchvision`."""
    package = find_spec("torchvision")
    assert package is not None and package.origin is not None, "torchvision is not installed"
    for library in Path(package.origin).parent.glob("_C*.so"):
        torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):  # its files are named otherwise: the slow way
        import torchvision  # noqa: F401


_load_operators()


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Rows that no box with a higher score suppresses, best first, (k,) int64.

    Args:
        boxes: (n, 4) xyxy.
        scores: (n,).
        iou_threshold: a box suppresses those that overlap it by more.
    """
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


def roi_align(
    features: Tensor, rois: Tensor, size: int, spatial_scale: float, sampling_ratio: int
) -> Tensor:
    """Features (n, channels, size, size) of regions, with half-pixel centres ("aligned").

    Args:
        features: (images, channels, height, width).
        rois: (n, 5): number of the image, and xyxy.
        size: bins per side.
        spatial_scale: from the regions' pixels to those of the features.
        sampling_ratio: samples per bin and axis; 0 is adaptive.
    """
    return torch.ops.torchvision.roi_align(
        features, rois, spatial_scale, size, size, sampling_ratio, True
    )


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of each of (n, 4) boxes with each of (m, 4) others, xyxy; (n, m)."""
    low = torch.max(boxes[:, None, :2], others[:, :2])
    high = torch.min(boxes[:, None, 2:], others[:, 2:])
    sides = (high - low).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    return shared / (_areas(boxes)[:, None] + _areas(others) - shared)


def sigmoid_focal_loss(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sum of the focal losses (Lin et al. 2017, "Focal Loss for Dense Object Detection").

    Args:
        logits: of any shape.
        target: 0 or 1, of the same shape.
        alpha: weight of the positives; that of the negatives is 1 - alpha.
        gamma: exponent that weakens what is classified well.
    """
    p = torch.sigmoid(logits)
    crossed = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    of_target = p * target + (1 - p) * (1 - target)
    loss = crossed * ((1 - of_target) ** gamma)
    return ((alpha * target + (1 - alpha) * (1 - target)) * loss).sum()


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def clip_boxes_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (n, 4) xyxy, cut to an image of this height and width."""
    height, width = size
    x, y = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
    return torch.stack((x, y), dim=2).reshape(boxes.shape)
