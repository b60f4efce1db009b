"""This project computes what the original code computed, number by number.

Both get the same generated images and weights (`recorded.py`). The original's numbers are kept in
`recorded_values/original.npz`; where the whole recordings are at hand, every number is compared.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import (
    IMAGE_IDS,
    build_detector,
    clip_embeddings,
    evaluation_arrays,
    make_image,
    make_objects,
    make_proposals,
    original_name,
    preprocessing,
    sampled_evenly,
    text_embeddings,
    training_step,
    training_view,
)
from recorded_values.make import FILE, THINNED, UNUSED

from lpovod.config import BaseDetectorSettings
from lpovod.networks.backbone import STRIDES
from lpovod.networks.rpn import make_anchors, sample_anchors
from lpovod.stages.base_detector import sample_regions

WHOLE = Path("../shared/data/goldens")
PIXELS, SCORE, RELATIVE = 0.05, 1e-4, 1e-4
GRADIENT_NORM, GRADIENT = 2e-3, 2e-2
"""Relative. The gradient of ReLU jumps, and rounding decides for values at the jump."""

UNORDERED = ("top50", "_dets", "base/train_proposals")
"""Boxes with scores, best first: equal scores have no order."""

SAMPLED = ("base/rpn_", "base/roi_")
"""Compared by a test of their own."""

INPUTS = {
    "image_A": "7372d1e0a5b632ac48daff4ba7c0ef16d07d1c08a377028776c973e5a5dea84d",
    "proposals_A": "52f314d1452f7b0e99e8f0f431d7adf1e4e4882d5e298ae3082bf7449499725e",
    "gt_boxes_A": "59a1bbc8d96a10a6a5bf0d08094e23c00b4e3a71e7d0e7f39d4e0377086f109a",
    "gt_labels_A": "b2f7a4cfe13bfcb7fc008a0f19ba8a91d590aaada771f1f335dfd0cca25e9c2a",
    "clip_features_A": "27c3490dab18b8b5bb045ebbc7b49ea4d88b1513350aab0bf6de91f8da446cfd",
    "image_B": "ce4f0246c9838b77e673421df9e5f864aed774a8bb17de0c91627ee2a59e1c1b",
    "proposals_B": "6bdd98d17c3c96053b1002e59e506cfffd858b5d577063279726a438d87912f1",
    "gt_boxes_B": "f74eefc79fb47b68b4c1afd839c1d628490ee4760328130f8a6e5c1af12829b3",
    "gt_labels_B": "153f584f73639b146abf81fa25d95e33905898121c6c2a5098eeedff3218d6a5",
    "clip_features_B": "5bc1b8ffb5b5aae44840cd2f21ac1b5aae180f0b56fb5095e53b747a767d0d09",
    "text_embedding": "982f8abf5bab74332db9c04a1020dc23dde323f1478fa130191ef97d3d0a2d9d",
}
"""SHA-256 of the bytes of what the original was given."""

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["kept", "whole"])
def original(request) -> dict[str, np.ndarray]:
    """The recorded values by name: those kept with the tests, or all of them."""
    if request.param == "kept":
        return dict(np.load(FILE))
    if not WHOLE.exists():
        pytest.skip("needs the whole recordings")
    files = ("preprocess", "features", "rpn", "roi", "detections", "train_base")
    found = {
        f"{file}/{key}": array
        for file in files
        for key, array in np.load(WHOLE / f"golden_{file}.npz").items()
    }
    norms = json.loads((WHOLE / "golden_train_base_gradnorms.json").read_text())
    return found | {f"gradient_norms/{key}": np.array(norm) for key, norm in norms.items()}


@pytest.fixture(scope="module")
def evaluated() -> dict[str, np.ndarray]:
    return evaluation_arrays("A", build_detector())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, np.ndarray]:
    recorded = np.load(FILE)
    order = [recorded[f"train_base/train_proposals_{number}"] for number in (0, 1)]
    checkpoint = tmp_path_factory.mktemp("step") / "checkpoint"
    arrays, norms = training_step(build_detector(), order, checkpoint)
    return arrays | {f"gradient_norms/{key}": np.array(norm) for key, norm in norms.items()}


def compare(found: dict[str, np.ndarray], original: dict[str, np.ndarray], *files: str) -> None:
    """Every recorded array of the named files has its equal among those found."""
    without = (*UNUSED, *SAMPLED)
    names = [n for n in original if n.startswith(files) and not any(part in n for part in without)]
    assert names
    for name in names:
        expected, array = original[name], found[name]
        if expected.dtype.kind == "U" and array.dtype.kind != "U":
            array = np.array(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
        if any(part in name for part in UNORDERED):
            assert unmatched(array, expected) == [], name
            continue
        if name in THINNED and array.shape != expected.shape:
            array = array[THINNED[name]]
        assert array.shape == expected.shape, name
        if expected.dtype.kind == "f" and not name.startswith("preprocess"):
            error = np.abs(array.astype(np.float64) - expected).max() / np.abs(expected).max()
            assert error <= tolerance(name), (name, error)
        elif name.endswith("stats"):
            assert np.allclose(array, expected, rtol=1e-9), name
        else:
            assert np.array_equal(array, expected), name


def tolerance(name: str) -> float:
    if "grad::" in name:
        return GRADIENT
    return GRADIENT_NORM if "grad" in name else RELATIVE


def unmatched(found: np.ndarray, expected: np.ndarray) -> list[int]:
    """Rows of `expected` (box, score, perhaps class) without a row of their own in `found`."""
    free, without = np.ones(len(found), bool), []
    for row, wanted in enumerate(expected):
        near = np.abs(found[:, :4] - wanted[:4]).max(axis=1) <= PIXELS
        near &= np.abs(found[:, 4] - wanted[4]) <= SCORE
        near &= (found[:, 5:] == wanted[5:]).all(axis=1)
        rows = np.flatnonzero(near & free)
        if len(rows):
            free[rows[0]] = False
        else:
            without.append(row)
    return without


def test_the_inputs_are_those_the_original_was_given():
    made = {"text_embedding": text_embeddings()}
    for name in IMAGE_IDS:
        boxes, objectness = make_proposals(name)
        made[f"image_{name}"] = make_image(name)
        made[f"proposals_{name}"] = np.column_stack([boxes, objectness])
        made[f"gt_boxes_{name}"], made[f"gt_labels_{name}"] = make_objects(name)
        made[f"clip_features_{name}"] = clip_embeddings(name)
    digests = {
        key: hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for key, array in made.items()
    }
    assert digests == INPUTS


@pytest.fixture(scope="module")
def parameters() -> set[str]:
    """By the original's names; the detector with the recorded weights takes seconds to build."""
    return {original_name(key) for key, _ in build_detector().named_parameters()}


def test_every_parameter_has_its_place(original, parameters):
    """Those of the original, of their shape; its gradients' names list them all."""
    assert parameters == {k.split("/")[1] for k in original if k.startswith("gradient_norms/")}


def test_images_and_boxes_are_shown_as_in_the_original(original):
    """Bit for bit: resized bytes, normalised input, padding, boxes."""
    shown = preprocessing("A") | preprocessing("B")
    found = {f"preprocess/{key}": np.asarray(array) for key, array in shown.items()}
    compare(found, original, "preprocess/")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["features", "rpn", "roi", "detections"])
def test_an_evaluated_image_is_the_original_s(evaluated, original, file):
    compare(evaluated, original, f"{file}/")
    if file == "detections":
        assert all(len(evaluated[f"detections/A_{kind}_dets"]) == 100 for kind in ("base", "ft"))


@pytest.mark.slow
def test_a_training_step_is_the_original_s(trained, original):
    """Losses, gradients, and weights and running statistics after one step of the loop."""
    compare(trained, original, "train_base/", "gradient_norms/")


@pytest.mark.parametrize("number", [0, 1])
def test_samples_are_the_original_s(original, number):
    """With its rule in place of chance, the same anchors and the same regions are sampled."""
    recorded = {k.removeprefix("train_base/"): v for k, v in original.items()}
    name = "AB"[number]
    view = training_view(name)
    objects = view.to_view(make_objects(name)[0])
    labels = torch.from_numpy(make_objects(name)[1])
    # The batch is as wide as B; the recorded rows are those of the anchors on the image itself.
    batch, own = anchors_on(640, 960), anchors_on(640, [864, 960][number])
    proposals = torch.from_numpy(recorded[f"train_proposals_{number}"][:, :4])
    with sampled_evenly():
        height, width = view.pixels.shape[1:]
        samples = sample_anchors(batch, [objects], [(height, width)], [0])
        regions = sample_regions(objects, labels, proposals, 48, BaseDetectorSettings())
    ((positive, negative, learned),) = samples
    assert torch.equal(batch[positive], own[recorded[f"rpn_pos_inds_{number}"]])
    assert torch.equal(batch[negative], own[recorded[f"rpn_neg_inds_{number}"]])
    assert torch.equal(learned, objects[recorded[f"rpn_pos_gt_{number}"]])
    candidates = torch.cat([objects, proposals])
    rows = [recorded[f"roi_{kind}_inds_{number}"] for kind in ("pos", "neg")]
    assert torch.equal(regions.boxes, candidates[np.concatenate(rows)])
    assigned = recorded[f"roi_pos_assigned_gt_{number}"]
    assert regions.positives == len(assigned)
    assert torch.equal(regions.labels[: regions.positives], labels[assigned])
    assert torch.equal(regions.targets[: regions.positives], objects[assigned])


def anchors_on(height: int, width: int) -> torch.Tensor:
    """All anchors of an image of that size."""
    sides = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    return torch.cat(make_anchors([torch.zeros(1, 1, *side) for side in sides]))
