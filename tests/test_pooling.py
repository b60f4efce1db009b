"""The pooling of one sample per bin, against torchvision's operator."""

import pytest
import torch
from torchvision.ops import roi_align

from lpovod.networks.backbone import STRIDES, level_of
from lpovod.networks.pooling import pool_regions


def pyramid(draw: torch.Generator, images: int, height: int, width: int) -> list[torch.Tensor]:
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [torch.randn(images, 8, *size, generator=draw) for size in sizes]


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [(160, 96), (32, 320)])
def test_equals_torchvision(sampling_ratio, size):
    draw = torch.Generator().manual_seed(0)
    maps = [m.requires_grad_() for m in pyramid(draw, 3, *size)]
    corner = torch.rand(60, 2, generator=draw) * torch.tensor([size[1], size[0]])
    side = torch.rand(60, 2, generator=draw) * 150
    limit = torch.tensor([size[1], size[0]])
    every = torch.cat([corner, torch.minimum(corner + side, limit)], dim=1)
    boxes = list(every.split([25, 0, 35]))
    found = pool_regions(maps, boxes, 8, sampling_ratio)
    image = torch.tensor([0.0] * 25 + [2.0] * 35)
    level = level_of(every, 8)
    expected = torch.stack(
        [
            roi_align(
                maps[level[i]],
                torch.cat([image[i : i + 1], every[i]])[None],
                7,
                1 / STRIDES[level[i]],
                sampling_ratio,
                aligned=True,
            )[0]
            for i in range(60)
        ]
    )
    assert len(level.unique()) > 2
    assert torch.allclose(found, expected, atol=1e-4)
    weights = torch.randn(found.shape, generator=draw)
    gradients = [
        torch.autograd.grad((pooled * weights).sum(), maps[:4], allow_unused=True)
        for pooled in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is not None:
            assert torch.allclose(ours, theirs, atol=1e-4)
