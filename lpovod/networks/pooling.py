"""RoIAlign over a feature pyramid."""

import torch
from torch import Tensor
from torch.nn import functional

from lpovod.networks.backbone import STRIDES, level_of
from lpovod.precision import precise
from lpovod.torchvision_ops import roi_align
from lpovod.transfers import numbers, send

POOLED = 7
"""Bins per side of a pooled region."""

POOLED_LEVELS = 4
"""Regions are pooled from P2 ... P5."""


def pool_regions(
    pyramid: list[Tensor], boxes: list[Tensor], finest_scale: float, sampling_ratio: int
) -> Tensor:
    """RoIAlign each box from the level of its size (aligned, half-pixel centres).

    Args:
        pyramid: maps of n images, finest first.
        boxes: for each image (m, 4), in pixels of the network's input. If they are the host's, a
            GPU's host does not wait.
        finest_scale: see `level_of`.
        sampling_ratio: samples per bin and axis; 0 is adaptive, as in the original.

    Returns:
        (sum of m, channels, 7, 7), image after image.
    """
    image = torch.cat([box.new_full((len(box),), i) for i, box in enumerate(boxes)])
    rois = torch.cat([image[:, None], torch.cat(boxes)], dim=1)
    level = level_of(rois[:, 1:], finest_scale, POOLED_LEVELS)
    device = pyramid[0].device
    if sampling_ratio == 1:
        rois, level = send(rois, device), send(level, device)
        return _pool_centres(pyramid, rois[:, 0].long(), rois[:, 1:], level)
    of_levels = [(level == number).nonzero().flatten() for number in range(POOLED_LEVELS)]
    # Of a level without a region, too: the backward pass must meet the same norms on every rank.
    pooled = [
        roi_align(precise(features), send(rois[rows], device), POOLED, 1 / stride, sampling_ratio)
        for features, rows, stride in zip(pyramid, of_levels, STRIDES, strict=False)
    ]
    order = torch.cat(of_levels)
    places = torch.empty_like(order).scatter(
        0, order, torch.arange(len(order), device=order.device)
    )
    return torch.cat(pooled)[send(places, device)]


def _pool_centres(pyramid: list[Tensor], image: Tensor, box: Tensor, level: Tensor) -> Tensor:
    """One sample per bin: a weighted sum of four cells, for all levels in one call.

    The same values as torchvision's operator, whose backward pass on a CPU takes four times as
    long (`benchmarks/pooling.py`).
    """
    maps = [precise(features) for features in pyramid[:POOLED_LEVELS]]
    cells = torch.cat([m.permute(0, 2, 3, 1).reshape(-1, m.shape[1]) for m in maps])
    height, width = (numbers([m.shape[side] for m in maps], box)[level] for side in (2, 3))
    first = numbers([0, *(m[:, 0].numel() for m in maps[:-1])], level).cumsum(0)[level]
    stride = numbers(STRIDES[:POOLED_LEVELS], box)[level]
    x, left = _bins(box[:, 0], box[:, 2], stride, width)
    y, top = _bins(box[:, 1], box[:, 3], stride, height)
    row = first[:, None] + (image * height.long())[:, None] * width.long()[:, None]
    row = row[:, :, None] + y[:, :, None] * width.long()[:, None, None] + x[:, None, :]
    # A map of one row or column has no second one; its weight is zero there.
    right = (width > 1).long()[:, None, None]
    below = torch.where(height > 1, width, 0).long()[:, None, None]
    corners = torch.stack([row, row + right, row + below, row + below + right], dim=-1)
    over, down = left[:, None, :], top[:, :, None]
    weights = torch.stack(
        [(1 - down) * (1 - over), (1 - down) * over, down * (1 - over), down * over], dim=-1
    )
    summed = functional.embedding_bag(
        corners.reshape(-1, 4), cells, per_sample_weights=weights.reshape(-1, 4), mode="sum"
    )
    return summed.view(len(box), POOLED, POOLED, cells.shape[1]).permute(0, 3, 1, 2)


def _bins(start: Tensor, stop: Tensor, stride: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """For the bins along one axis: the cell before each centre, and how far past it that lies."""
    part = (torch.arange(POOLED, device=start.device) + 0.5) / POOLED
    start, stop = (start / stride)[:, None], (stop / stride)[:, None]
    centre = (start + (stop - start) * part - 0.5).clamp(min=0)
    centre = torch.minimum(centre, (cells - 1)[:, None])
    before = torch.minimum(centre.floor(), (cells - 2).clamp(min=0)[:, None])
    return before.long(), centre - before
