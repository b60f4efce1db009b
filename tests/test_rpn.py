"""The region proposal network: anchors, matching, losses and proposals by hand."""

import math

import pytest
import torch

from lpovod.boxes import encode
from lpovod.networks.rpn import (
    STDS,
    RegionProposalNetwork,
    make_anchors,
    match_anchors,
    rpn_losses,
    rpn_proposals,
    sample_anchors,
)

SIDES = ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))  # of the levels, for 64 x 96 pixels


def pyramid(images: int = 1, channels: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(images, channels, *side, generator=draw) for side in SIDES]


def test_anchors_have_the_area_and_the_ratios_of_their_level():
    anchors = make_anchors(pyramid())
    assert [len(level) for level in anchors] == [3 * rows * columns for rows, columns in SIDES]
    for level, stride in zip(anchors, (4, 8, 16, 32, 64), strict=True):
        width, height = (level[:, 2:] - level[:, :2]).T
        assert torch.allclose(width * height, torch.tensor((8.0 * stride) ** 2))
        assert torch.allclose((height / width)[:3], torch.tensor([0.5, 1, 2]))
    # The second column of the third row of P3.
    centre = (anchors[1][:, :2] + anchors[1][:, 2:]) / 2
    assert centre[3 * (2 * 12 + 1)].tolist() == pytest.approx([8, 16], abs=1e-4)


def test_an_object_that_no_anchor_meets_well_is_learned_from_the_best_one():
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 60, 60], [0, 0, 10, 3.5]])
    objects = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 54]])
    positive, negative, assigned = match_anchors(anchors, objects)
    # IoU 1; .5; .4, the best one of the second object; .35
    assert positive.tolist() == [True, False, True, False]
    assert negative.tolist() == [False, False, False, False]
    assert assigned[positive].tolist() == [0, 1]


def test_no_anchor_is_bent_to_an_object_it_hardly_meets():
    anchors = torch.tensor([[0.0, 0, 10, 10], [90, 90, 99, 99]])
    positive, negative, _ = match_anchors(anchors, torch.tensor([[0.0, 0, 10, 2]]))
    assert not positive.any()
    assert negative.all()


def test_an_anchor_that_is_the_best_of_two_objects_learns_the_last():
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    objects = torch.tensor([[0.0, 0, 10, 9], [0, 0, 10, 5]])
    positive, _, assigned = match_anchors(anchors, objects)
    assert positive.tolist() == [True]
    assert assigned.tolist() == [1]


def test_a_smaller_image_of_a_batch_is_not_sampled_beyond_its_own_padding():
    anchors = torch.cat(make_anchors(pyramid()))
    objects = torch.tensor([[5.0, 5, 37, 37]])
    ((positive, negative, _),) = sample_anchors(anchors, [objects], [(33, 40)], [0])
    sampled = torch.cat([positive, negative])
    centre = (anchors[sampled, :2] + anchors[sampled, 2:]) / 2
    assert len(sampled) == 256
    assert float(centre.max()) < 64  # 33 x 40 pixels are padded to 64 x 64
    assert float(centre[:, 0].max()) > 40


def test_losses_are_those_of_perfect_and_of_indifferent_outputs():
    anchors = make_anchors(pyramid())
    every = torch.cat(anchors)
    thing = torch.tensor([[8.0, 8, 40, 40]])
    # Deltas that hit the object from everywhere: no box loss. Logits of 0: log 2 per anchor.
    exact = encode(every, thing.expand(len(every), 4), STDS).split([len(a) for a in anchors])
    outputs = [(torch.zeros(1, len(a)), d[None]) for a, d in zip(anchors, exact, strict=True)]
    found = rpn_losses(outputs, anchors, [thing], [(64, 96)], [0])
    assert float(found["rpn_box"]) == pytest.approx(0, abs=1e-5)
    assert float(found["rpn_classification"]) == pytest.approx(math.log(2), rel=1e-5)
    off = [(logits, deltas + 0.25) for logits, deltas in outputs]
    ((positive, _, _),) = sample_anchors(every, [thing], [(64, 96)], [0])
    expected = len(positive) * 4 * 0.25 / 256
    assert float(rpn_losses(off, anchors, [thing], [(64, 96)], [0])["rpn_box"]) == pytest.approx(
        expected
    )


def test_proposals_are_cut_to_the_image_best_first_and_do_not_repeat():
    torch.manual_seed(0)
    network = RegionProposalNetwork(4)
    maps = pyramid(images=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(20)
        outputs = network(maps)
    anchors = make_anchors(maps)
    for boxes, scores in rpn_proposals(outputs, anchors, [(60, 90), (64, 96)], per_level=100):
        assert 0 < len(boxes) <= 3 * 100 + 18 + 6
        assert float(boxes.min()) >= 0
        assert (scores.diff() <= 0).all()
    first = rpn_proposals(outputs, anchors, [(60, 90), (64, 96)])[0][0]
    assert first[:, [0, 2]].max() <= 90
    assert first[:, [1, 3]].max() <= 60


def test_an_image_s_proposals_do_not_depend_on_its_neighbour():
    torch.manual_seed(0)
    network, maps = RegionProposalNetwork(4), pyramid(images=2)
    with torch.no_grad():
        both = rpn_proposals(network(maps), make_anchors(maps), [(64, 96)] * 2)[1]
        alone = rpn_proposals(network([m[1:] for m in maps]), make_anchors(maps), [(64, 96)])[0]
    assert torch.allclose(both[0], alone[0], atol=1e-3)
