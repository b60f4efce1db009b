"""Scores by hand, detections by hand, and what mistakes are called."""

import math

import numpy as np
import pytest
import torch

from lpovod.config import EvaluationSettings
from lpovod.formats.coco import CocoDataset
from lpovod.measures.ablations import Variant, variants
from lpovod.measures.mistakes import count_mistakes
from lpovod.scoring import Scores, detect, final_scores


def scores(**changed) -> Scores:
    """Two regions, one base class and one novel class."""
    values = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "refined": torch.tensor([[0.0, 0, 12, 12], [20, 20, 32, 32]]),
        "objectness": torch.tensor([0.81, 0.25]),
        "sigmoid": torch.tensor([[0.9, 0.2], [0.1, 0.6]]),
        "cosine": torch.tensor([[0.30, 0.20], [0.20, 0.25]]),
        "clip": torch.tensor([[0.1, 0.2], [0.3, 0.1]]),
    }
    return Scores(**values | changed)


def test_scores_follow_the_formula():
    found = final_scores(scores(), 1, Variant(alpha=0, beta=0.8, temperature=0.01))
    for region, (cosine, sigmoid, objectness) in enumerate(
        [((0.30, 0.20), (0.9, 0.2), 0.81), ((0.20, 0.25), (0.1, 0.6), 0.25)]
    ):
        powers = [math.exp(c / 0.01) for c in cosine]
        clip = [p / sum(powers) for p in powers]
        base = math.sqrt(sigmoid[0] * objectness)
        novel = math.sqrt(clip[1] ** 0.2 * sigmoid[1] ** 0.8 * objectness)
        assert found[region].tolist() == pytest.approx([base, novel], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "novel"),
    [
        ("without_probe", lambda clip, sigmoid, objectness: clip * objectness),
        ("without_clip_head", lambda clip, sigmoid, objectness: sigmoid * objectness),
        ("without_objectness", lambda clip, sigmoid, objectness: clip**0.2 * sigmoid**0.8),
    ],
)
def test_each_ablation_takes_one_thing_away(name, novel):
    settings = EvaluationSettings()
    found = final_scores(scores(), 1, variants(settings, 0.1, True)[name])[1, 1]
    clip = math.exp(2.5) / (math.exp(2.5) + math.exp(2.0))
    assert float(found) == pytest.approx(math.sqrt(novel(clip, 0.6, 0.25)), rel=1e-5)


def test_true_clip_replaces_the_image_head():
    rows = variants(EvaluationSettings(), 0.1, True)
    swapped = scores(cosine=scores().clip)
    assert torch.equal(
        final_scores(scores(), 1, rows["true_clip_with_probe"]),
        final_scores(swapped, 1, rows["full"]),
    )
    assert "true_clip_with_probe" not in variants(EvaluationSettings(), 0.1, False)


def test_detections_are_thresholded_suppressed_within_a_class_and_best_first():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    one = scores(
        boxes=boxes,
        refined=boxes,
        objectness=torch.ones(3),
        sigmoid=torch.tensor([[0.81, 0.49], [0.64, 0.36], [0.001, 0.001]]),
        cosine=torch.zeros(3, 2),
    )
    found = detect({5: one}, 1, [7, 9], Variant(0, 1, 1.0), EvaluationSettings())
    box, score, category = found[5]
    assert category.tolist() == [7, 9]  # the second region is suppressed in both classes
    assert score.tolist() == pytest.approx([0.9, 0.7])
    assert box.tolist() == [boxes[0].tolist()] * 2


def test_raw_boxes_can_be_asked_for():
    raw = detect({5: scores()}, 1, [7, 9], Variant(0, 1, 1.0, refined=False), EvaluationSettings())
    assert {tuple(b) for b in raw[5][0].tolist()} <= {(0, 0, 10, 10), (20, 20, 30, 30)}


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([0, 0, 40, 40], "correct"),
        ([10, 10, 25, 25], "too tight"),
        ([0, 0, 80, 80], "too loose"),
        ([20, 20, 60, 60], "shifted"),
        ([0, 0, 150, 45], "group"),
        ([0, 100, 40, 140], "other class"),
        ([160, 160, 170, 170], "background"),
    ],
)
def test_a_mistake_has_a_name(tmp_path, box, kind):
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [110, 0, 40, 40]},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 100, 40, 40]},
    ]
    data = CocoDataset(
        tmp_path,
        {1: {"file_name": "", "width": 200, "height": 200}},
        {1: annotations},
        {1: {"name": "a"}, 2: {"name": "b"}},
    )
    detections = {1: (np.array([box], np.float32), np.array([0.9]), np.array([1]))}
    assert count_mistakes(data, detections, [1])[kind] == 100
    twice = {1: (np.array([box] * 2, np.float32), np.array([0.9, 0.8]), np.array([1, 1]))}
    expected = {"correct": 50, "duplicate": 50} if kind == "correct" else {kind: 100}
    assert {k: v for k, v in count_mistakes(data, twice, [1]).items() if v} == expected
