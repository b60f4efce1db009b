"""The linear probe: joint training on gathered candidates, and its loss by hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from counting import count

from benchmarks.linear_probe import label_images, online_loss
from lpovod.artifacts import identity, read_json, read_tensors, write_json, write_tensors
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    LinearProbeSettings,
    RegionFeaturesSettings,
)
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.formats.image_features import ImageFeatures, paths_in
from lpovod.formats.pseudo_labels import PseudoLabels, read_pseudo_labels
from lpovod.formats.regions import read_proposals, write_regions
from lpovod.miniature.split import draw_split
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import load_detector
from lpovod.probe import Candidates, Memory, draw, fit, focal_loss, gather_candidates
from lpovod.stages.base_detector import classification_loss
from lpovod.stages.linear_probe import train_linear_probe
from lpovod.stages.region_features import extract_retrieved
from lpovod.views import LoadedView, View, apply_view

GOLDENS = Path("../shared/data/goldens")
NAMES = ["fish", "house"]
HALF = 2**-11
"""Features are stored in 16 bits: the largest relative error of one number."""
SETTINGS = LinearProbeSettings(epochs=60, learning_rate=0.05, milestones=[50])


def make_inputs(folder: Path) -> tuple[Path, list[Path]]:
    """Two classes, of eight images each, four shared; a class's regions share a direction."""
    directions = np.eye(6)
    good, bad = [10, 10, 50, 50], [10, 10, 25, 25]
    annotation = {"iscrowd": 0, "score": 0.9, "cosine": 0.3, "area": 1600}
    annotations = [
        annotation | {"category_id": k + 1, "image_id": i, "bbox": [10 + 60 * k] * 2 + [40, 40]}
        for k in range(2)
        for i in range(4 * k + 1, 4 * k + 9)
    ]
    images = [{"id": i, "file_name": "", "width": 200, "height": 200} for i in range(1, 13)]
    write_json(
        folder / "novel.json",
        {
            "images": images,
            "annotations": [a | {"id": n} for n, a in enumerate(annotations)],
            "categories": [{"id": k, "name": n, "split": "novel"} for k, n in enumerate(NAMES, 1)],
        },
    )
    made_from = identity("region_features", detector="d" * 64)
    for image_id in range(1, 13):
        boxes, vectors = [], []
        for k in (k for k in range(2) if 4 * k + 1 <= image_id < 4 * k + 9):
            # Each class's box, well and badly placed.
            noise = np.random.default_rng([image_id, k]).normal(0, 0.05, (2, 6))
            boxes += [[c + 60 * k for c in good], [c + 60 * k for c in bad]]
            vectors += [directions[k] + noise[0], directions[k] + directions[4] + noise[1]]
        tensors = {"box": np.array(boxes, np.float32), "feature": np.array(vectors, np.float16)}
        path = folder / f"{image_id % 2}/{image_id}.safetensors"
        write_tensors(path, tensors, made_from | {"image_id": image_id})
    return folder / "novel.json", [folder / "0", folder / "1"]


def test_badly_placed_boxes_are_rejected(tmp_path):
    labels, features = make_inputs(tmp_path)
    train_linear_probe(labels, features, SETTINGS, 0, tmp_path / "weights")
    weights, made_from = read_tensors(tmp_path / "weights", "linear_probe")
    assert list(weights) == NAMES
    assert made_from["inputs"]["detector"] == "d" * 64
    for k, name in enumerate(NAMES):
        placed, misplaced = np.eye(6)[k], np.eye(6)[k] + np.eye(6)[4]
        other = np.eye(6)[1 - k]
        assert weights[name] @ placed > 0 > weights[name] @ misplaced
        assert weights[name] @ other < 0


def test_the_result_is_reproducible(tmp_path):
    labels, features = make_inputs(tmp_path)
    for name in ("a", "b"):
        train_linear_probe(labels, features, SETTINGS, 0, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_image_of_two_classes_counts_each_region_once(tmp_path):
    labels, features = make_inputs(tmp_path)
    box = np.array([[10, 10, 50, 50]], np.float32)
    retrieved = {
        "fish": {5: (box, np.array([0.9]))},
        "house": {5: (box + 60, np.array([0.9])), 9: (box + 60, np.array([0.9]))},
    }
    found = gather_candidates(retrieved, {}, ImageFeatures(paths_in(features)))
    assert sorted(found) == [5, 9]
    assert len(found[5].label) == 4  # a good and a bad box of each class
    assert sorted(found[5].label[found[5].positive].tolist()) == [0, 1]
    assert found[9].label[found[9].positive].tolist() == [1]


def test_what_overlaps_an_ignored_object_is_no_negative_and_may_be_a_positive(tmp_path):
    labels, features = make_inputs(tmp_path)
    good, bad = np.float32([10, 10, 50, 50]), np.float32([10, 10, 25, 25])
    retrieved = {"fish": {1: (good[None], np.array([0.9]))}}
    near, far = bad + np.float32([0, 0, 6, 6]), bad + np.float32([0, 0, 8, 8])  # IoU .51 and .43
    ignored = {1: np.array([good, bad]), 2: np.array([bad])}
    for given, usable in (({}, 2), (ignored, 1), ({1: near[None]}, 1), ({1: far[None]}, 2)):
        found = gather_candidates(retrieved, given, ImageFeatures(paths_in(features)))
        assert found[1].label.tolist().count(0) == 1
        assert len(found[1].label) == usable


def test_a_box_that_the_file_repeats_is_a_candidate_once(tmp_path):
    """As where an imported pseudo-label is a rounded proposal, or a proposal is listed twice."""
    labels, features = make_inputs(tmp_path)
    path = tmp_path / "1/5.safetensors"
    arrays, ident = read_tensors(path, "region_features")
    twice = {name: np.concatenate([array[2:3], array]) for name, array in arrays.items()}
    write_tensors(path, twice, ident)
    found = gather_candidates(read_pseudo_labels(labels), {}, ImageFeatures(paths_in(features)))[5]
    assert len(found.label) == 4
    np.testing.assert_array_equal(
        np.sort(found.feature(np.arange(4)), axis=0),
        np.sort(arrays["feature"].astype(np.float32), axis=0),
    )


def moved(labels: Path) -> None:
    content = read_json(labels)
    content["annotations"][0]["bbox"][0] += 1
    write_json(labels, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels, folder: moved(labels), "image 1: a retrieved region has no features"),
        (
            lambda labels, folder: (folder / "0/4.safetensors").unlink(),
            "image 4 has pseudo-labels and no features.* --forcerun retrieved_region_features",
        ),
        (
            lambda labels, folder: rewrite(folder / "0/4.safetensors", inputs={"detector": "e"}),
            "4.safetensors holds another image, or comes from another detector",
        ),
        (
            lambda labels, folder: rewrite(folder / "1/3.safetensors", image_id=5),
            "3.safetensors holds another image, or comes from another detector",
        ),
        (
            lambda labels, folder: [
                rewrite(path, inputs={"detector": "e"}) for path in (folder / "0").iterdir()
            ],
            "1 and .*0 come from different detectors",
        ),
        (
            lambda labels, folder: [path.unlink() for path in folder.glob("*/*")],
            "there are no region features of retrieved images",
        ),
    ],
    ids=["moved", "missing", "detector", "image", "folders", "none"],
)
def test_features_that_do_not_belong_to_the_labels_are_refused(tmp_path, change, message):
    labels, features = make_inputs(tmp_path)
    change(labels, tmp_path)
    with pytest.raises(LpovodError, match=message):
        train_linear_probe(labels, features, SETTINGS, 0, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def rewrite(path: Path, **changed) -> None:
    arrays, ident = read_tensors(path, "region_features")
    write_tensors(path, arrays, ident | changed)


@pytest.mark.parametrize("limit", [0, 200])  # of 12 files of 24 or 48 bytes
def test_what_stays_in_memory_changes_no_bit(tmp_path, monkeypatch, limit):
    inputs = make_inputs(tmp_path)
    train_linear_probe(*inputs, SETTINGS, 0, tmp_path / "weights")
    reads = count(monkeypatch, ImageFeatures, "read")
    monkeypatch.setattr(Memory.__init__, "__defaults__", (limit,))
    train_linear_probe(*inputs, SETTINGS, 0, tmp_path / "limited")
    assert (tmp_path / "limited").read_bytes() == (tmp_path / "weights").read_bytes()
    assert len(reads) > 5 * SETTINGS.epochs  # otherwise once for boxes and once for features


def test_the_loss_and_its_gradient_are_those_of_the_detector_s_classification():
    random = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(40, 3, generator=random)).requires_grad_()
    label = torch.randint(-1, 3, (40,), generator=random)
    expected = classification_loss(logits, torch.where(label < 0, 3, label))
    (gradient,) = torch.autograd.grad(expected, logits)
    loss, found = focal_loss(logits.detach().numpy(), label.numpy())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    np.testing.assert_allclose(found, gradient.numpy(), rtol=1e-5, atol=1e-9)


def candidates(feature: np.ndarray, label: np.ndarray) -> Candidates:
    """Of an image whose features are at hand."""

    class InMemory(ImageFeatures):
        def __init__(self):
            pass

        def read(self, image_id: int) -> dict[str, np.ndarray]:
            return {"feature": feature}

    return Candidates(Memory(InMemory()), 1, np.arange(len(label)), label)


def test_few_regions_are_all_drawn_and_many_by_the_rule():
    label = np.repeat([1, -1], [3, 50])
    image = candidates(np.arange(53, dtype=np.float32)[:, None], label)
    feature, labels = draw([image], LinearProbeSettings(), np.random.default_rng(0))
    assert labels.tolist() == [1] * 3 + [-1] * 30  # ten negatives per positive
    assert feature[:3, 0].tolist() == [0, 1, 2]
    assert len(np.unique(feature[3:])) == 30 and feature[3:].min() >= 3
    feature, labels = draw(
        [image], LinearProbeSettings(samples_per_image=8), np.random.default_rng(0)
    )
    assert labels.tolist() == [1] * 2 + [-1] * 6


BACKBONE = BackboneSettings(channels=16)
HEADS = BaseDetectorSettings(
    regions="proposals", head_convolutions=0, dimension=24, sampling_ratio=1
)
STEP = LinearProbeSettings(samples_per_image=400, positive_fraction=0.5, negatives_per_positive=100)


def test_a_step_on_stored_features_is_the_one_on_images(tmp_path):
    """Of the original's online training, unflipped; no region is left out."""
    retrieved, stored, views, model = drawn_world(tmp_path)
    torch.manual_seed(0)
    weights = torch.randn(2, HEADS.dimension, requires_grad=True)
    online = online_loss(weights, model, views, STEP)
    (gradient,) = torch.autograd.grad(online, weights)
    images = list(gather_candidates(retrieved, {}, stored).values())
    feature, label = draw(images, STEP, np.random.default_rng(0))
    ours, of_logits = focal_loss(feature @ weights.detach().numpy().T, label)
    assert ours == pytest.approx(float(online.detach()), rel=HALF)
    our_gradient = torch.from_numpy(of_logits.T @ feature)
    assert float((our_gradient - gradient).norm() / gradient.norm()) < HALF


def drawn_world(folder: Path) -> tuple[PseudoLabels, ImageFeatures, list[LoadedView], Detector]:
    """Pseudo-labels of two classes on two drawn images, their stored features, and the images."""
    content = draw_split(folder / "images/train", 2, 0, "train")
    write_json(folder / "train.json", content)
    data, draw = read_dataset(folder / "train.json"), np.random.default_rng(0)
    with write_regions(
        folder / "proposals.h5", identity("proposals", dataset=folder / "train.json")
    ) as writer:
        for image_id in data.images:
            low = draw.uniform(0, 100, (60, 2))
            boxes = np.concatenate([low, low + draw.uniform(10, 60, (60, 2))], axis=1)
            writer.add(image_id, boxes.astype(np.float32), np.full(60, 0.9, np.float32))
    torch.manual_seed(0)
    model = Detector(BACKBONE, HEADS, 2, 8)
    parameters = {k: v.numpy() for k, v in model.state_dict().items()}
    detector, made_from = folder / "detector", identity("base_detector") | {"classes": ["a", "b"]}
    write_tensors(detector, parameters, made_from)
    proposals = read_proposals([folder / "proposals.h5"], folder / "train.json")
    annotation = {"iscrowd": 0, "score": 0.9, "cosine": 0.3, "area": 1}
    annotations = [
        annotation | {"category_id": k + 1, "image_id": i, "bbox": [x1, y1, x2 - x1, y2 - y1]}
        for k in range(2)
        for i in data.images
        for x1, y1, x2, y2 in proposals.read(i).box[5 * k : 5 * k + 5].astype(float).tolist()
    ]
    write_json(
        folder / "novel.json",
        {
            "images": list(data.images.values()),
            "annotations": [a | {"id": n} for n, a in enumerate(annotations)],
            "categories": [{"id": k, "name": n, "split": "novel"} for k, n in enumerate(NAMES, 1)],
        },
    )
    inputs = (folder / "train.json", [folder / "proposals.h5"], folder / "novel.json", detector)
    settings = (BACKBONE, HEADS, RegionFeaturesSettings())
    extract_retrieved(*inputs, *settings, 0, 1, folder / "retrieved", folder / "store", "c")
    retrieved, stored = read_pseudo_labels(folder / "novel.json"), folder / "retrieved"
    views = []
    for image_id, boxes in label_images(retrieved, {}, proposals).items():
        shown = apply_view(data.load(image_id), View(image_id, 160, 160))
        views.append(LoadedView(shown.view, shown.pixels, shown.scale, boxes))
    return (
        retrieved,
        ImageFeatures(paths_in([stored])),
        views,
        load_detector(detector, BACKBONE, HEADS)[0],
    )


def test_weights_that_run_away_are_an_error():
    one = candidates(np.full((2, 3), 1e20, np.float32), np.array([0, -1]))
    with pytest.raises(LpovodError, match="Lower linear_probe.learning_rate"):
        fit([one], 1, LinearProbeSettings(learning_rate=1e30), 0)


@pytest.mark.skipif(not GOLDENS.exists(), reason="needs the recorded values")
def test_the_original_s_recorded_loss():
    recorded = np.load(GOLDENS / "golden_train_ft.npz")
    # The original's label of background is the number of classes.
    labels = np.where(recorded["labels_mapped"] == 17, -1, recorded["labels_mapped"])
    zero, _ = focal_loss(np.zeros((len(labels), 17), np.float32), labels)
    assert zero == pytest.approx(float(recorded["zeros_cls_loss"]), rel=1e-5)
    drawn, _ = focal_loss(recorded["logits_novel"], labels)
    assert drawn == pytest.approx(float(recorded["rand_cls_loss"]), rel=1e-4)
