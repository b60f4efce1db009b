"""Time of pooling with one sample per bin: torchvision's operator and `pool_regions`.

Run as ``python -m benchmarks.pooling``. Times forward and backward passes; ends with one JSON line.
"""

import json
import time
from collections.abc import Callable
from unittest import mock

import torch

from lpovod.networks import pooling
from lpovod.networks.backbone import STRIDES

IMAGES, REGIONS, CHANNELS, SIDE = 8, 78, 64, 160


def milliseconds(pool: Callable[[], torch.Tensor], repeats: int = 5) -> tuple[float, float]:
    """Minimum time of a forward and of a backward pass."""
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        total = pool().sum()
        middle = time.perf_counter()
        total.backward()
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return 1000 * min(forward), 1000 * min(backward)


def main() -> None:
    torch.manual_seed(0)
    maps = [
        torch.randn(IMAGES, CHANNELS, SIDE // s, SIDE // s, requires_grad=True) for s in STRIDES
    ]
    corner = torch.rand(IMAGES, REGIONS, 2) * 110
    boxes = list(torch.cat([corner, corner + 15 + 35 * torch.rand_like(corner)], dim=2))
    ours = milliseconds(lambda: pooling.pool_regions(maps, boxes, 16, 1))
    with mock.patch.object(pooling, "_pool_centres", _through_torchvision):
        reference = milliseconds(lambda: pooling.pool_regions(maps, boxes, 16, 1))
    for name, (forward, backward) in (("torchvision", reference), ("ours", ours)):
        print(f"{name:12} forward {forward:7.1f} ms   backward {backward:7.1f} ms")
    ratio = sum(reference) / sum(ours)
    print(json.dumps({"ratio_to_reference": round(ratio, 2), "device": "cpu"}))


def _through_torchvision(pyramid, image, box, level):
    pooled = pyramid[0].new_zeros(len(box), CHANNELS, pooling.POOLED, pooling.POOLED)
    rois = torch.cat([image[:, None], box], dim=1)
    for number, stride in enumerate(STRIDES[: pooling.POOLED_LEVELS]):
        rows = (level == number).nonzero().flatten()
        if len(rows):
            level_regions = pooling.roi_align(
                pyramid[number], rois[rows], pooling.POOLED, 1 / stride, 1, aligned=True
            )
            pooled = pooled.index_copy(0, rows, level_regions)
    return pooled


if __name__ == "__main__":
    main()
