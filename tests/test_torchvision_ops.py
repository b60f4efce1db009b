"""Operators of detectors against torchvision's own functions, bit for bit."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torchvision import ops

from lpovod.torchvision_ops import (
    box_iou,
    clip_boxes_to_image,
    nms,
    roi_align,
    sigmoid_focal_loss,
)


def boxes(count: int, seed: int = 0) -> torch.Tensor:
    """Boxes at random, some of them outside of an image of 80 x 100 pixels."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 120 - 20
    return torch.cat([low, low + torch.rand(count, 2, generator=generator) * 60], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlap_and_suppression_are_torchvision_s(dtype):
    some, others = boxes(200).to(dtype), boxes(30, 1).to(dtype)
    assert torch.equal(box_iou(some, others), ops.box_iou(some, others))
    assert box_iou(some[:0], others).shape == (0, 30)
    scores = torch.rand(200, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(nms(some, scores, 0.5), ops.nms(some, scores, 0.5))


def test_boxes_are_cut_as_torchvision_cuts_them():
    some = boxes(200)
    assert torch.equal(
        clip_boxes_to_image(some, (80, 100)), ops.clip_boxes_to_image(some, (80, 100))
    )
    assert clip_boxes_to_image(some[:0], (80, 100)).shape == (0, 4)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_pooling_and_its_gradient_are_torchvision_s(sampling_ratio):
    rois = torch.cat([torch.arange(20)[:, None] % 2, boxes(20)], dim=1)
    gradients = []
    for pool in (
        lambda maps: roi_align(maps, rois, 7, 0.25, sampling_ratio),
        lambda maps: ops.roi_align(maps, rois, 7, 0.25, sampling_ratio, aligned=True),
    ):
        maps = torch.randn(2, 3, 20, 25, generator=torch.Generator().manual_seed(3))
        maps.requires_grad_()
        pooled = pool(maps)
        pooled.square().sum().backward()
        gradients.append((pooled.detach(), maps.grad))
    (ours, our_gradient), (theirs, their_gradient) = gradients
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient)


def test_the_focal_loss_and_its_gradient_are_torchvision_s():
    found = []
    for loss in (sigmoid_focal_loss, partial(ops.sigmoid_focal_loss, reduction="sum")):
        drawn = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(500, 9, generator=drawn)).requires_grad_()
        target = (torch.rand(500, 9, generator=drawn) < 0.1).float()
        value = loss(logits, target, 0.25, 2)
        value.backward()
        found.append((value.detach(), logits.grad))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert torch.equal(ours, theirs) and torch.equal(our_gradient, their_gradient)


def test_the_package_is_not_imported_and_may_be_later():
    code = (
        "import sys, torch, lpovod.torchvision_ops as ours\n"
        "assert 'torchvision' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "box, score = torch.rand(9, 4), torch.rand(9)\n"
        "first = ours.nms(box, score, 0.5)\n"
        "from torchvision.ops import nms\n"
        "assert torch.equal(first, nms(box, score, 0.5))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
