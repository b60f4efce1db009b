"""The proposal network: targets by hand, recall by hand, learning, and a real kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from project import draw_dataset

from lpovod.artifacts import read_json, read_tensors, sha256
from lpovod.config import (
    BackboneSettings,
    MiniatureSettings,
    ProposalsSettings,
    TrainingSettings,
    read_config,
)
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.regions import RegionStore, digest_of_shards, read_proposals
from lpovod.measures.recall import recall_by_split
from lpovod.miniature.pictograms import BASE_CLASSES
from lpovod.stages.proposal_network import centerness, proposal_losses, train_proposal_network
from lpovod.stages.proposals import propose

BACKBONE = BackboneSettings(channels=16)
SETTINGS = ProposalsSettings(
    box_iou=0.3,
    per_image=30,
    training=TrainingSettings(
        optimizer="adamw",
        learning_rate=2e-3,
        epochs=3,
        milestones=[3],
        images_per_step=2,
        warmup_steps=0,
    ),
)
IN_FLOAT32 = {"precision": "float32"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("proposals")
    drawn = MiniatureSettings(train_images=12, val_images=4, tune_images=1)
    draw_dataset(folder / "dataset", drawn, BASE_CLASSES, 0)
    train(folder, "whole")
    return folder


def train(folder: Path, name: str, dataset: str = "dataset/train.json", **schedule) -> Path:
    outputs = [folder / f"{name}.{ending}" for ending in ("checkpoint", "network", "history")]
    training, code = SETTINGS.training.model_copy(update=schedule), "a"
    settings = SETTINGS.model_copy(update={"training": training})
    train_proposal_network(
        folder / dataset, BACKBONE, settings, 0, outputs[0], code, outputs[1], outputs[2]
    )
    return outputs[1]


def test_centerness():
    points = torch.tensor([[5.0, 10], [2.5, 10], [0, 10], [20, 10]])
    boxes = torch.tensor([[0.0, 0, 10, 20]]).expand(4, 4)
    assert centerness(points, boxes).tolist() == pytest.approx([1, (1 / 3) ** 0.5, 0, 0])


def losses_of(anchors, boxes, logits, objects) -> tuple[float, float]:
    """Box and objectness loss of a batch of one image."""
    losses = proposal_losses(anchors, boxes[None], logits[None], [objects], [0], SETTINGS)
    return losses[0].item(), losses[1].item()


def test_losses_of_perfect_predictions_are_zero():
    anchors = torch.tensor([[0.0, 0, 20, 20], [2, 0, 22, 20], [60, 60, 80, 80]])
    objects = torch.tensor([[0.0, 0, 20, 20]])
    boxes = objects.expand(3, 4)
    target = torch.tensor([1.0, (8 / 12) ** 0.5, 0])
    logits = torch.logit(target, eps=1e-7)
    box, objectness = losses_of(anchors, boxes, logits, objects)
    assert box == pytest.approx(0, abs=1e-5)
    assert objectness == pytest.approx(0, abs=1e-5)
    shifted = boxes + torch.tensor([10.0, 0, 10, 0])  # an IoU of a third
    box, _ = losses_of(anchors, shifted, logits, objects)
    assert box == pytest.approx(10 * 2 / 3, rel=1e-5)


def test_an_object_that_no_anchor_fits_costs_nothing():
    anchors, objects = torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 2, 2]])
    box, objectness = losses_of(anchors, anchors, torch.zeros(1), objects)
    assert box == 0
    assert objectness == pytest.approx(0.5)  # the one anchor is background


def test_recall_by_hand():
    categories = {1: {"name": "a", "split": "base"}, 2: {"name": "b", "split": "novel"}}
    annotations = [
        {"id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]},
        {"id": 2, "category_id": 2, "bbox": [50, 50, 10, 10]},
        {"id": 3, "category_id": 2, "bbox": [80, 80, 10, 10]},
    ]
    images = {1: {"width": 100, "height": 100}}
    data = CocoDataset(Path(), images, {1: annotations}, categories)
    boxes = np.array([[50, 50, 60, 60], [0, 0, 10, 5], [200, 0, 210, 10]], np.float32)
    expected = {"base": {"1": 0.0, "2": 100.0}, "novel": {"1": 50.0, "2": 50.0}}
    assert recall_by_split(data, {1: boxes}, at=(1, 2)) == expected


def test_proposals_are_keyed_bounded_and_best_first(folder, tmp_path):
    val, network = folder / "dataset/val.images.json", folder / "whole.network"
    propose(val, network, BACKBONE, SETTINGS, 0, 1, tmp_path / "val.h5")
    store, data = read_proposals([tmp_path / "val.h5"], val), read_dataset(val)
    assert set(store.image_ids) == set(data.images)
    for image_id in store.image_ids:
        found = store.read(image_id)
        assert 0 < len(found) <= 30
        assert (np.diff(found.objectness) <= 0).all()
        assert (found.box >= 0).all()
        assert (found.box <= 160).all()
        assert (found.box[:, 2:] - found.box[:, :2] >= 1).all()
    with pytest.raises(LpovodError, match="proposals of other images"):
        read_proposals([tmp_path / "val.h5"], folder / "dataset/train.images.json")


def test_any_number_of_shards_gives_the_same_bytes_per_image(folder, tmp_path):
    train, network = folder / "dataset/train.images.json", folder / "whole.network"

    def propose_in(count: int) -> RegionStore:
        paths = [tmp_path / f"of{count}/{number}.h5" for number in range(count)]
        for number, path in enumerate(paths):
            propose(train, network, BACKBONE, SETTINGS, number, count, path)
        return read_proposals(paths, train)

    one, eight = propose_in(1), propose_in(8)
    assert sorted(one.image_ids) == sorted(eight.image_ids) == sorted(read_dataset(train).images)
    for image_id in one.image_ids:
        whole, divided = one.read(image_id), eight.read(image_id)
        assert len(whole)
        assert whole.box.tobytes() == divided.box.tobytes()
        assert whole.objectness.tobytes() == divided.objectness.tobytes()
    assert digest_of_shards(one) == digest_of_shards(eight)


def found_in(folder: Path, output: Path, settings: ProposalsSettings, **lists) -> dict:
    """Proposals of the validation images by id, of those listed alone, in that order."""
    content = read_json(folder / "dataset/val.images.json") | lists
    dataset = folder / f"dataset/val.{output.stem}.json"  # beside the images
    dataset.write_text(json.dumps(content))
    propose(dataset, folder / "whole.network", BACKBONE, settings, 0, 1, output)
    store = read_proposals([output], dataset)
    return {image_id: store.read(image_id) for image_id in store.image_ids}


def test_proposals_of_an_image_depend_on_no_other_image(folder, tmp_path):
    """Bit for bit: alone, in a batch that is not full, and in another order."""
    settings = SETTINGS.model_copy(update={"batch_size": 3})
    listed = read_json(folder / "dataset/val.images.json")["images"]
    together = found_in(folder, tmp_path / "all.h5", settings)
    others = found_in(folder, tmp_path / "last.h5", settings, images=listed[:1:-1])
    others |= found_in(folder, tmp_path / "first.h5", settings, images=listed[:1])
    assert len(together) == 4 and len(others) == 3
    for image_id, alone in others.items():
        assert np.array_equal(alone.box, together[image_id].box)
        assert np.array_equal(alone.objectness, together[image_id].objectness)


def test_proposals_in_bfloat16_are_near_those_in_float32(folder, tmp_path):
    """Eight bits of a value are left: objectness within 0.02, best boxes within two pixels."""
    settings = SETTINGS.model_copy(update={"precision": "bfloat16", "nms": 1.0})
    found = found_in(folder, tmp_path / "half.h5", settings)
    expected = found_in(folder, tmp_path / "whole.h5", settings.model_copy(update=IN_FLOAT32))
    for image_id, precise in expected.items():
        near, best = found[image_id], precise.box[:10]
        assert near.box.dtype == near.objectness.dtype == np.float32
        np.testing.assert_allclose(near.objectness, precise.objectness, atol=0.02)
        apart = np.abs(best[:, None] - near.box).max(axis=2).min(axis=1)
        assert apart.max() <= 2
        assert not np.array_equal(near.objectness, precise.objectness)
        large = near.box[(near.box > 64) & (near.box < 160)]
        assert (large % 0.5 != 0).mean() > 0.9  # in bfloat16 all would be multiples of a half


def test_the_loss_falls_and_the_checkpoint_is_removed(folder):
    lines = [json.loads(line) for line in (folder / "whole.history").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[-1]["box"] < lines[0]["box"]
    assert not (folder / "whole.checkpoint").exists()


def test_bfloat16_learns_what_float32_learns(folder):
    train(folder, "bfloat16", precision="bfloat16")
    losses, expected = (
        [json.loads(line) for line in (folder / f"{name}.history").read_text().splitlines()]
        for name in ("bfloat16", "whole")
    )
    assert losses != expected
    assert losses == [pytest.approx(line, rel=0.1) for line in expected]
    weights, _ = read_tensors(folder / "bfloat16.network", "proposals")
    assert {str(weight.dtype) for weight in weights.values()} == {"float32", "int64"}


@pytest.mark.slow
def test_a_killed_training_ends_in_the_same_file(folder):
    """SIGKILL after the first epoch of the real command line; the same command resumes."""
    outputs = {key: str(folder / f"killed.{key}") for key in ("checkpoint", "network", "history")}
    command = [sys.executable, "-m", "workflow_scripts.proposal_network"]
    command += ["--dataset", str(folder / "dataset/train.json"), "--seed", "0"]
    command += ["--backbone", BACKBONE.model_dump_json(), "--settings", SETTINGS.model_dump_json()]
    command += ["--code", "a"]
    command += [word for key, path in outputs.items() for word in (f"--{key}", path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as first:
        for line in first.stderr:
            if "epoch 2/3:" in line:  # the first epoch's checkpoint is written
                first.send_signal(signal.SIGKILL)
                break
    assert Path(outputs["checkpoint"]).exists()
    assert not Path(outputs["network"]).exists()
    again = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert again.returncode == 0, again.stderr
    assert "resuming after epoch 1" in again.stderr
    for key in ("network", "history"):
        assert sha256(Path(outputs[key])) == sha256(folder / f"whole.{key}")
    assert not Path(outputs["checkpoint"]).exists()


def test_images_without_annotations_are_refused_if_there_are_no_others(folder, tmp_path):
    content = read_json(folder / "dataset/train.json") | {"annotations": []}
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(LpovodError, match="no image has an annotation"):
        train(tmp_path, "empty", "train.json")


def test_the_network_carries_what_it_was_made_from(folder):
    _, made_from = read_tensors(folder / "whole.network", "proposals")
    assert made_from["inputs"]["dataset"] == sha256(folder / "dataset/train.json")
    assert made_from["settings"]["box_iou"] == 0.3
    assert "per_image" not in made_from["settings"]  # how it is used shapes no weight


RENAMED = {"samples": "samples_per_image", "drops": "milestones", "optimiser": "optimizer"}
"""Keys of the configuration that had other names when the shipped backbone was trained."""


def renamed(settings: dict) -> dict:
    return {
        RENAMED.get(name, name): renamed(value) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def test_the_shipped_backbone_is_the_recorded_one_and_never_saw_a_novel_label():
    folder = Path("resources/small_backbone")
    record = read_json(folder / "record.json")
    assert sha256(folder / "weights.safetensors") == record["weights_sha256"]
    _, made_from = read_tensors(folder / "weights.safetensors", "proposals")
    config = read_config([Path("config.yaml"), Path("configs/small_backbone.yaml")])
    # Keys that it does not have are newer, and their defaults are what it was trained with.
    assert ProposalsSettings.model_validate(renamed(made_from["settings"])) == config.proposals
    assert made_from["backbone"] == config.backbone.model_dump(mode="json")
    assert made_from["seed"] == config.seed != read_config([Path("config.yaml")]).seed
    assert made_from["inputs"].keys() == {"dataset"}  # train.json: base annotations alone
