"""Boxes: deltas, matching and sampling."""

import numpy as np
import torch

from lpovod.boxes import decode, encode, match, sample


def random_boxes(count: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=draw) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=draw) * 50], dim=1)


def test_decode_inverts_encode():
    boxes, targets = random_boxes(50, 0), random_boxes(50, 1)
    assert torch.allclose(decode(boxes, encode(boxes, targets)), targets, atol=1e-3)


def test_deltas_of_a_known_pair():
    deltas = encode(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 10]]))
    # dx = (15 - 5) / 10, dy = (5 - 10) / 20, dw = log 2, dh = log .5, over .1 .1 .2 .2
    expected = [10, -2.5, np.log(2) / 0.2, np.log(0.5) / 0.2]
    assert np.allclose(deltas.numpy(), expected, atol=1e-5)


def test_size_ratios_are_clamped_on_both_sides():
    box = torch.tensor([[0.0, 0, 16, 16]])
    for sign, side in ((1, 1000.0), (-1, 16 * 16 / 1000)):
        found = decode(box, torch.tensor([[0.0, 0, sign * 99, sign * 99]]))[0]
        assert torch.allclose(found[2:] - found[:2], torch.tensor([side, side]), rtol=1e-4)


def test_match_names_the_best_object():
    objects = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    iou, row = match(torch.tensor([[0.0, 0, 10, 5], [20, 20, 40, 40], [50, 50, 60, 60]]), objects)
    assert torch.allclose(iou, torch.tensor([0.5, 1, 0]))
    assert row[:2].tolist() == [0, 1]


def test_nothing_matches_without_objects():
    iou, row = match(random_boxes(3, 0), torch.zeros(0, 4))
    assert iou.tolist() == [0, 0, 0]
    assert row.tolist() == [-1, -1, -1]


def test_samples_respect_their_quotas():
    iou = torch.cat([torch.full((100,), 0.7), torch.full((1000,), 0.2)])
    positive, negative = sample(iou, 64, 0.25)
    assert len(positive) == 16
    assert len(negative) == 48
    assert (iou[positive] >= 0.5).all()
    assert (iou[negative] < 0.5).all()
    assert len(torch.cat([positive, negative]).unique()) == 64


def test_negatives_are_limited_by_the_positives():
    iou = torch.cat([torch.full((2,), 0.5), torch.zeros(1000)])
    positive, negative = sample(iou, 512, 0.25, negatives_per_positive=10)
    assert (len(positive), len(negative)) == (2, 20)
    assert len(sample(torch.zeros(100), 512, 0.25, negatives_per_positive=10)[1]) == 10
