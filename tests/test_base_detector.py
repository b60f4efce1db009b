"""The detector: equal to the original's recorded values, and its losses by hand."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from lpovod.backbone import level_of
from lpovod.base_detector import classification_loss, detector_losses, sample_regions
from lpovod.boxes import encode
from lpovod.config import Backbone, BaseDetector
from lpovod.detector import Detector, refine

GOLDENS = Path("../shared/data/goldens")
SMALL = Backbone(channels=16)
HEADS = BaseDetector(branch_convolutions=1, dimension=32, finest_scale=16, sampling_ratio=1)

# The original's names of the heads' parameters.
ORIGINAL = {
    "region_branch.convs.": "roi_head.bbox_head.shared_convs.",
    "region_branch.fc.": "roi_head.bbox_head.shared_fcs.0.",
    "image_branch.convs.": "roi_head.bbox_head.shared_convs_for_image.",
    "image_branch.fc.": "roi_head.bbox_head.shared_fcs_for_image.0.",
    "box_refinement.": "roi_head.bbox_head.fc_reg.",
    "projection.": "roi_head.projection_for_image.",
    "prototypes": "roi_head.prototype",
}


def original_name(key: str) -> str:
    for ours, theirs in ORIGINAL.items():
        key = key.replace(ours, theirs)
    return key


def recorded_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights the values were recorded with: a function of key and shape."""
    draw, leaf = np.random.default_rng(zlib.crc32(key.encode())), key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros((), np.int64)
    if leaf == "running_mean":
        return 0.1 * draw.standard_normal(shape)
    if leaf == "running_var":
        return draw.uniform(0.5, 1.5, shape)
    if "bn" in key.split(".")[-2] or ".downsample.1." in key:
        if leaf == "bias":
            return 0.1 * draw.standard_normal(shape)
        gain = 0.3 if ".bn3." in key else 0.15 if "fpn_convs" in key else 1.0
        return gain * draw.uniform(0.8, 1.2, shape)
    if leaf == "bias":
        return 0.05 * draw.standard_normal(shape)
    std, mean = np.sqrt(2.0 / np.prod(shape[1:])), 0.0
    for ending, values in {"fc_reg.weight": (0.02, 0), "prototype": (0.04, -0.0045)}.items():
        if key.endswith(ending):
            std, mean = values
    return std * draw.standard_normal(shape) + mean


@pytest.fixture(scope="module")
def recorded_model():
    model = Detector(Backbone(architecture="resnet50", channels=256), BaseDetector(), 48, 512)
    keys = model.state_dict()
    model.load_state_dict(
        {k: torch.tensor(recorded_weight(original_name(k), v.shape)) for k, v in keys.items()}
    )
    return model.eval()


def test_every_parameter_of_the_original_s_heads_has_its_place():
    if not GOLDENS.exists():
        pytest.skip("needs the recorded values")
    listed = {
        key: shape for key, shape, _ in json.loads((GOLDENS / "state_dict_base.json").read_text())
    }
    model = Detector(Backbone(architecture="resnet50", channels=256), BaseDetector(), 48, 512)
    ours = {original_name(k): list(v.shape) for k, v in model.state_dict().items()}
    assert ours == {k: v for k, v in listed.items() if not k.startswith("rpn_head.")}


def close(found: torch.Tensor, expected: np.ndarray, relative: float = 1e-4) -> None:
    assert found.shape == expected.shape
    error = np.abs(found.numpy() - expected).max() / np.abs(expected).max()
    assert error <= relative, error


@torch.inference_mode()
def test_the_original_s_recorded_values(recorded_model):
    if not GOLDENS.exists():
        pytest.skip("needs the recorded values")
    images, features, rois = (
        np.load(GOLDENS / f"golden_{name}.npz") for name in ("preprocess", "features", "roi")
    )
    pixels = images["A_test_u8"]
    table = images["lut_rgb"]
    tensor = np.stack([table[c][pixels[..., c]] for c in range(3)]).astype(np.float32)
    maps = recorded_model.backbone(torch.from_numpy(tensor)[None])
    pyramid = recorded_model.neck(maps)
    close(maps[0][0, ::4, ::16, ::16], features["A_C2_slice"])
    close(maps[3][0, ::16, ::2, ::2], features["A_C5_slice"])
    close(pyramid[0][0, ::4, ::16, ::16], features["A_P2_slice"])
    close(pyramid[3][0], features["A_P5"])
    close(pyramid[4][0, ::4], features["A_P6_slice"])
    boxes = torch.from_numpy(rois["A_rois"][:, 1:])
    assert level_of(boxes, 56).tolist() == rois["A_levels"].tolist()
    pooled = recorded_model.pool(pyramid, [boxes])
    close(pooled[::6, ::4], rois["A_roi_feats_slice"])
    outputs = recorded_model.describe(pooled)
    close(outputs.feature, rois["A_region_embeddings"])
    close(outputs.embedding, rois["A_image_embeddings"])
    close(outputs.feature @ recorded_model.prototypes.T, rois["A_cls_logits_base"])
    close(outputs.deltas, rois["A_bbox_deltas"])
    height, width = images["A_test_img_shape"][:2]
    decoded = refine(boxes, outputs.deltas, torch.ones(2), (int(width), int(height)))
    assert np.abs(decoded.numpy() - rois["A_decoded_resized"]).max() <= 0.05


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
    found = sample_regions(objects, torch.tensor([3, 5]), proposals, 12, BaseDetector())
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
            outputs = model.describe(model.pool(level, [one.boxes]))
            wanted = encode(one.boxes[: one.positives], one.targets[: one.positives])
            box_losses.append((outputs.deltas[: one.positives] - wanted).abs().sum())
            imitated.append(model.describe(model.pool(level, [proposals[number]])).embedding)
            regions += len(one.boxes)
    assert float(found["box"]) == pytest.approx(float(sum(box_losses)) / regions, rel=1e-4)
    distance = (torch.cat(imitated) - targets).abs().mean()
    assert float(found["distillation"]) == pytest.approx(256 * float(distance), rel=1e-4)
    assert float(found["classification"]) > 0
    without = detector_losses(model, model.pyramid(images), sampled, proposals, targets, 0)
    assert "distillation" not in without
