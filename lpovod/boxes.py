"""Boxes: xyxy in pixels, half-open. Matching, sampling, and the deltas of box regression."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lpovod.torchvision_ops import box_iou
from lpovod.transfers import send

DELTA_STDS = (0.1, 0.1, 0.2, 0.2)
MAX_LOG_RATIO = abs(math.log(16 / 1000))


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of another's dtype and device.

    `new_tensor` would send them there, and the host would wait until the device has done all else.
    """
    return torch.stack([like.new_full((), value) for value in values])


def send_all(tensors: list[Tensor], device: torch.device | str) -> tuple[Tensor, ...]:
    """Tensors of the host on a device, in one copy that the host does not wait for."""
    return send(torch.cat(tensors), device).split([len(t) for t in tensors])


def encode(boxes: Tensor, targets: Tensor, stds: tuple[float, ...] = DELTA_STDS) -> Tensor:
    """Deltas (dx, dy, dw, dh) from `boxes` to `targets`, both (n, 4), divided by `stds`."""
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    centre, target_centre = boxes[:, :2] + size / 2, targets[:, :2] + target_size / 2
    deltas = torch.cat([(target_centre - centre) / size, torch.log(target_size / size)], dim=1)
    return deltas / numbers(stds, deltas)


def decode(boxes: Tensor, deltas: Tensor, stds: tuple[float, ...] = DELTA_STDS) -> Tensor:
    """The inverse of `encode`; the logarithm of the size ratio is clamped on both sides."""
    deltas = deltas * numbers(stds, deltas)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + size / 2 + deltas[:, :2] * size
    size = size * deltas[:, 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return torch.cat([centre - size / 2, centre + size / 2], dim=1)


def match(boxes: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """The object that overlaps each box most.

    Args:
        boxes: (n, 4).
        objects: (m, 4).

    Returns:
        The largest IoU (n,) and the object's row (n,) int64; 0 and -1 if there are no objects.
    """
    if len(objects) == 0:
        return boxes.new_zeros(len(boxes)), torch.full((len(boxes),), -1, device=boxes.device)
    return box_iou(boxes, objects).max(dim=1)


def rows_of(marks: Tensor) -> tuple[Tensor, ...]:
    """For each row of (n, m) bool the marked places, ascending; a GPU's host waits twice in all."""
    return marks.nonzero()[:, 1].split(marks.sum(dim=1).tolist())


def take(candidates: Tensor, count: int) -> Tensor:
    """At most `count` random candidates, in ascending order."""
    if len(candidates) <= count:
        return candidates
    chosen = torch.randperm(len(candidates), device=candidates.device)[:count]
    return candidates[chosen.sort().values]


def sample(
    iou: Tensor, count: int, positive_fraction: float, negatives_per_positive: int | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of sampled positives (IoU of at least 0.5 with an object) and negatives.

    Args:
        iou: (n,) largest IoU of each region with an object.
        count: number of samples, positives and negatives together.
        positive_fraction: largest fraction of `count` that is positive.
        negatives_per_positive: limits the negatives; at least one positive is counted.
    """
    positive, negative = rows_of(torch.stack([iou >= 0.5, iou < 0.5]))
    return sample_rows(positive, negative, count, positive_fraction, negatives_per_positive)


def sample_rows(
    positive: Tensor,
    negative: Tensor,
    count: int,
    positive_fraction: float,
    negatives_per_positive: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows sampled from those that are positive, (p,), and negative, (q,); see `sample`."""
    positives = take(positive, int(count * positive_fraction))
    limit = count - len(positives)
    if negatives_per_positive is not None:
        limit = min(limit, negatives_per_positive * max(1, len(positives)))
    return positives, take(negative, limit)
