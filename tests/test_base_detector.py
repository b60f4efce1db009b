"""The detector's losses, by hand and against recorded values (the others: `test_fidelity.py`)."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lpovod.boxes import encode
from lpovod.config import BackboneSettings, BaseDetectorSettings
from lpovod.formats.coco import CocoDataset
from lpovod.formats.regions import Regions
from lpovod.networks.detector import Detector
from lpovod.precision import computing_in
from lpovod.stages.base_detector import (
    classification_loss,
    detector_losses,
    sample_regions,
    training_losses,
)
from lpovod.views import LoadedView, Normalisation, View, apply_view, batch

GOLDENS = Path("../shared/data/goldens")
SMALL = BackboneSettings(channels=16)
HEADS = BaseDetectorSettings(
    regions="proposals", head_convolutions=1, dimension=32, finest_scale=16, sampling_ratio=1
)


def test_focal_loss_is_the_original_s():
    # Three regions of two classes, the last one background; by the formula, in float64.
    logits = np.array([[2.0, -1.0], [0.5, 0.3], [-2.0, 1.5]])
    labels = torch.tensor([0, 1, 2])
    expected = 0.0
    for row, label in zip(logits, labels.tolist(), strict=True):
        for column, logit in enumerate(row):
            p = 1 / (1 + np.exp(-logit))
            if column == label:
                expected -= 0.25 * (1 - p) ** 2 * np.log(p)
            else:
                expected -= 0.75 * p**2 * np.log(1 - p)
    found = classification_loss(torch.tensor(logits), labels)
    assert float(found) == pytest.approx(expected / 2, rel=1e-6)


def test_focal_loss_equals_the_recorded_one():
    if not GOLDENS.exists():
        pytest.skip("needs the recorded values")
    recorded = np.load(GOLDENS / "golden_focal.npz")
    labels = torch.from_numpy(recorded["labels"]).long()
    positives = int((labels < 17).sum())
    found = classification_loss(torch.from_numpy(recorded["pred"]), labels)
    assert float(found) * positives == pytest.approx(float(recorded["loss_sum"]), rel=1e-5)


def test_annotated_boxes_are_among_the_sampled_regions():
    objects = torch.tensor([[0.0, 0, 20, 20], [40, 40, 80, 80]])
    proposals = torch.tensor([[1.0, 1, 21, 21], [100, 100, 120, 120], [200, 200, 230, 230]])
    found = sample_regions(objects, torch.tensor([3, 5]), proposals, 12, BaseDetectorSettings())
    assert found.positives == 3
    assert found.boxes[:3].tolist() == torch.cat([objects, proposals[:1]]).tolist()
    assert found.labels.tolist() == [3, 5, 3, 12, 12]
    assert found.targets[:3].tolist() == objects[[0, 1, 0]].tolist()


def test_losses_are_those_of_the_regions_they_name():
    """Each loss, recomputed from the model's parts, region by region."""
    torch.manual_seed(0)
    model = Detector(SMALL, HEADS, 3, 8).eval()
    images = torch.randn(2, 3, 96, 96)
    objects = [torch.tensor([[5.0, 5, 40, 45]]), torch.tensor([[20.0, 10, 80, 90]])]
    proposals = [torch.tensor([[6.0, 6, 42, 44], [50, 50, 90, 90]]), torch.tensor([[0.0, 0, 9, 9]])]
    labels = [torch.tensor([1]), torch.tensor([2])]
    sampled = [
        sample_regions(o, n, p, 3, HEADS)
        for o, n, p in zip(objects, labels, proposals, strict=True)
    ]
    targets = functional.normalize(torch.randn(3, 8), dim=1)
    with torch.no_grad():
        found = detector_losses(model, model.pyramid(images), sampled, proposals, targets, 256)
        pyramid = model.pyramid(images)
        box_losses, imitated, regions = [], [], 0
        for number, one in enumerate(sampled):
            level = [features[number : number + 1] for features in pyramid]
            outputs = model.extract(model.pool(level, [one.boxes]))
            wanted = encode(one.boxes[: one.positives], one.targets[: one.positives])
            box_losses.append((outputs.deltas[: one.positives] - wanted).abs().sum())
            imitated.append(model.extract(model.pool(level, [proposals[number]])).embedding)
            regions += len(one.boxes)
    assert float(found["box"]) == pytest.approx(float(sum(box_losses)) / regions, rel=1e-4)
    distance = (torch.cat(imitated) - targets).abs().mean()
    assert float(found["distillation"]) == pytest.approx(256 * float(distance), rel=1e-4)
    assert float(found["classification"]) > 0
    without = detector_losses(model, model.pyramid(images), sampled, proposals, targets, 0)
    assert "distillation" not in without


@pytest.mark.parametrize("regions", ["rpn", "proposals"])
@pytest.mark.parametrize("sampling_ratio", [0, 1])
def test_bfloat16_is_of_the_networks_alone(regions, sampling_ratio):
    """Losses, boxes and statistics of norms are float32, and near those of a float32 network."""
    found = {}
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        settings = HEADS.model_copy(update={"regions": regions, "sampling_ratio": sampling_ratio})
        model = Detector(SMALL, settings, 1, 8).train()
        computed = []
        keep = partial(lambda kept, *io: kept.append(io[-1].dtype), computed)
        model.neck.fpn_convs[0].register_forward_hook(keep)
        with computing_in(precision, "cpu"):
            losses = training_losses(model, one_image(), [one_view()], {7: 0}, settings, "cpu")
        assert computed == [getattr(torch, precision)]
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
        norm = model.neck.fpn_convs[0].bn
        assert norm.running_var.dtype == torch.float32
        found[precision] = {name: loss.item() for name, loss in losses.items()}
        with torch.no_grad(), computing_in(precision, "cpu"):
            outputs = model.eval().extract(
                model.pool(
                    model.pyramid(torch.randn(1, 3, 64, 96)), [torch.tensor([[5.0, 5, 40, 45]])]
                )
            )
        for tensor in (outputs.feature, outputs.embedding, outputs.deltas):
            assert tensor.dtype == torch.float32
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.05)


def test_a_view_that_a_device_resizes_has_the_same_losses():
    torch.manual_seed(0)
    settings = HEADS.model_copy(update={"regions": "rpn"})
    model = Detector(SMALL, settings, 1, 8).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    found, expected = (
        training_losses(
            model,
            one_image(),
            [replace(apply_view(pixels, View(1, 96, 160), later), extra=one_view().extra)],
            {7: 0},
            settings,
            "cpu",
        )
        for later in (True, False)
    )
    assert all(torch.equal(found[name], loss) for name, loss in expected.items())


def one_image() -> CocoDataset:
    annotation = {"bbox": [10, 10, 30, 40], "category_id": 7}
    images = {1: {"file_name": "", "width": 96, "height": 64}}
    return CocoDataset(Path("x.json"), images, {1: [annotation]}, {7: {"name": "a"}})


def one_view() -> LoadedView:
    boxes = np.array([[12, 8, 44, 50], [60, 4, 90, 60]], np.float32)
    embedding = np.eye(8, dtype=np.float16)[:2]
    extra = Regions(np.ones(2), np.arange(2), boxes, np.ones(2), {"embedding": embedding})
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return replace(apply_view(pixels, View(1, 64, 96)), extra=extra)


@pytest.mark.parametrize("regions", ["rpn", "proposals"])
def test_regions_come_from_the_rpn_or_from_the_proposals(regions):
    """With an RPN its two losses are added; distillation is of the given proposals all the same."""
    torch.manual_seed(0)
    settings = HEADS.model_copy(update={"regions": regions})
    model = Detector(SMALL, settings, 1, 8).eval()
    assert any(k.startswith("rpn_head.") for k in model.state_dict()) == (regions == "rpn")
    view = one_view()
    found = training_losses(model, one_image(), [view], {7: 0}, settings, "cpu")
    own = {"rpn_classification", "rpn_box"} if regions == "rpn" else set()
    assert set(found) == {"classification", "box", "distillation"} | own
    pyramid = model.pyramid(batch([view], "cpu", Normalisation()))
    imitated = model.embed(model.pool(pyramid, [torch.tensor(view.extra.box)]))
    distance = (imitated - torch.tensor(view.extra["embedding"])).abs().mean()
    assert float(found["distillation"].detach()) == pytest.approx(256 * float(distance), rel=1e-4)
