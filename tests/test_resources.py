"""What jobs ask for grows with the data and with every attempt (rules/resources.smk)."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lpovod.config import load_config


def asked(**overlay) -> SimpleNamespace:
    """The names that rules/resources.smk defines under a configuration."""
    config = load_config(yaml.safe_load(Path("config.yaml").read_text()) | overlay)
    names = {
        "CONFIG": config,
        "NOVEL": {name: name for name in config.classes.novel},
        "SOURCES": {},
    }
    exec(Path("rules/resources.smk").read_text(), names)
    return SimpleNamespace(**names)


def photographs(folder: Path, size: int) -> dict:
    """A coco source whose training annotations are a file of some bytes."""
    (folder / "annotations").mkdir()
    with open(folder / "annotations/instances_train2017.json", "wb") as file:
        file.truncate(size)
    names = yaml.safe_load(Path("config.yaml").read_text())["classes"]
    categories = [{"id": i, "name": n} for i, n in enumerate(names["base"] + names["novel"])]
    (folder / "annotations/instances_val2017.json").write_text(
        json.dumps({"categories": categories})
    )
    return {"source": "coco", "coco": {"root": str(folder), "pictogram_clip": True}}


def test_amounts_grow_with_the_images_and_with_the_attempt():
    few = asked(dataset={"miniature": {"train_images": 100}})
    many = asked(dataset={"miniature": {"train_images": 1100}})
    train, val = SimpleNamespace(split="train"), SimpleNamespace(split="val")
    for attempt in (1, 2, 3):
        grown = many.grows(1000, 0.5)(train, attempt) - few.grows(1000, 0.5)(train, attempt)
        assert grown == attempt * 500
        assert many.grows(1000, 0.5)(val, attempt) == attempt * 1250  # of 500 validation images
        assert many.grows(1000, 0.5)(SimpleNamespace(), attempt) == attempt * 1550


def test_a_shard_asks_for_its_share_of_the_time():
    images = {"train_images": 30_000, "val_images": 6000, "tune_images": 100}
    names = asked(shards=10, dataset={"miniature": images}, pseudo_labels={"k": 2500})
    for split, images in (("train", 3000), ("val", 2000), ("tune", 100)):
        job = SimpleNamespace(split=split)
        assert names.grows_in_shards(30, 0.5)(job, 2) == 2 * (30 + images / 2)
    # Five classes retrieve 2,500 images each.
    assert names.RETRIEVED_SHARDS == 7


def test_more_training_images_leave_the_shards_of_others_as_they_are():
    counts = []
    for train in (900, 90_000):
        images = {"train_images": train, "val_images": 5000}
        counts.append(asked(shards=8, dataset={"miniature": images}).shard_count("val"))
    assert counts == [3, 3]


@pytest.mark.parametrize(("images", "threads"), [(48, 2), (200, 4), (700, 8), (100_000, 8)])
def test_a_longer_training_asks_for_more_threads(images, threads):
    few = asked(dataset={"miniature": {"train_images": images}})
    assert threads == few.training_threads(few.CONFIG.base_detector.training)


def test_a_training_on_gpus_asks_for_threads_and_memory_of_every_process():
    """Of each node; `training_nodes` is SLURM's to multiply."""
    amounts = []
    for gpus, nodes in ((1, 1), (8, 1), (8, 3)):
        on = asked(gpu=True, training_gpus=gpus, training_nodes=nodes)
        training = on.CONFIG.base_detector.training.model_copy(update={"workers": 4})
        memory = on.training_memory(training, 0.5)(SimpleNamespace(), 1)
        amounts.append((on.training_threads(training), memory))
    of_eight = 8 * (3000 + 5 * 0.5 * 1400)  # each GPU has five processes
    assert amounts == [(5, of_eight / 8), (40, of_eight), (40, of_eight)]


@pytest.mark.parametrize("name", ["coco", "coco_learned"])
def test_the_jobs_of_coco_fit_machines_that_people_have(name):
    """With 64 GB, and 128 for the training on eight GPUs; the evaluation of 2,000 images and 1,203
    classes held 0.92 GiB (benchmarks/many_classes.py)."""
    on, job = asked(**yaml.safe_load(Path(f"configs/{name}.yaml").read_text())), SimpleNamespace()
    training = on.training_memory(on.CONFIG.base_detector.training, on.LISTED + on.SHARD_ROWS)
    assert 8 * 5000 < training(job, 1) < 100_000
    retrieval = on.grows(on.LIGHT + on.RETRIEVED, on.LISTED + on.REGION_ROWS)(job, 1)
    # Keys and objectness of every region.
    assert 12e-6 * 118_287 * on.REGIONS < retrieval < 64_000
    evaluation = on.grows(on.NETWORK, on.LISTED + on.REGION_ROWS + on.DETECTED, "val")(job, 1)
    assert 2.5 * 940 < evaluation < 16_000


def test_the_number_of_photographs_follows_from_the_size_of_their_json(tmp_path):
    assert (
        asked(dataset=photographs(tmp_path, 4_000_001)).CONFIG.dataset.image_count("train") == 1001
    )


def test_photographs_that_are_not_there_yet_count_as_coco_s(tmp_path):
    dataset = photographs(tmp_path, 0)
    (tmp_path / "annotations/instances_train2017.json").unlink()
    assert asked(dataset=dataset).CONFIG.dataset.image_count("train") == 118_287
