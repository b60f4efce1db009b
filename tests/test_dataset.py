"""Splits, and what is wrong with other people's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import draw_dataset

from lpovod.artifacts import read_json, sha256
from lpovod.config import CocoSettings, MiniatureSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.miniature.pictograms import BASE_CLASSES, CLASSES
from lpovod.stages.dataset import annotate, list_images

TINY = MiniatureSettings(train_images=6, val_images=4, tune_images=2)
COCO_TINY = Path("../shared/data/coco_tiny")


def test_training_annotations_hold_base_classes_alone(tmp_path):
    draw_dataset(tmp_path, TINY, BASE_CLASSES, seed=0)
    train, everything, val, images = (
        read_dataset(tmp_path / f"{name}.json")
        for name in ("train", "train_all_classes", "val", "train.images")
    )
    assert {c["name"] for c in train.categories.values()} == set(BASE_CLASSES)
    assert {c["name"] for c in val.categories.values()} == set(CLASSES)
    counts = [sum(map(len, d.annotations.values())) for d in (train, everything, images)]
    assert counts[2] == 0 < counts[0] < counts[1]
    assert list(train.images) == list(everything.images) == list(images.images)
    for data in (train, everything, images):
        assert data.load(next(iter(train.images))).shape == (160, 160, 3)
        assert data.images_digest == sha256(tmp_path / "train.images.json")
    assert val.images_digest == sha256(tmp_path / "val.images.json")


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_dataset(tmp_path / name, TINY, BASE_CLASSES, seed)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.jp*"))
    assert len(files) == 12
    for file in [*files, "val.json"]:
        assert sha256(tmp_path / "a" / file) == sha256(tmp_path / "b" / file)
    assert sha256(tmp_path / "a/val.json") != sha256(tmp_path / "c/val.json")


@pytest.fixture()
def coco(tmp_path) -> dict:
    """A folder in COCO's layout: grey, portrait and tiny images, a crowd, odd ids."""
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"{split}2017").mkdir()
        images = []
        for number, (mode, size) in enumerate([("L", (30, 50)), ("RGB", (8, 4)), ("CMYK", (9, 9))]):
            Image.new(mode, size).save(tmp_path / f"{split}2017" / f"{number}.jpg")
            shape = {"width": size[0], "height": size[1]}
            images.append({"id": 900_000_000_000 + number, "file_name": f"{number}.jpg", **shape})
        boxes = [[0, 0, 20, 20], [1.5, 2.5, 10, 0.5], [0, 0, 30, 50]]
        annotations = [
            {"id": 10 + n, "image_id": images[0]["id"], "category_id": 90, "bbox": box}
            | {"iscrowd": int(n == 2), "area": 1.0, "segmentation": [[0, 0, 1, 1, 2, 2]]}
            for n, box in enumerate(boxes)
        ]
        annotations[0]["category_id"] = 17
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 17, "name": "cat"}, {"id": 90, "name": "tooth brush"}],
        }
        path = tmp_path / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(content))
    return {"root": tmp_path, "path": path, "content": content}


def make(coco: dict, output: Path, base=("cat",), check: Path | None = None) -> None:
    files = CocoSettings(root=coco["root"])
    for split in ("train", "val"):
        images, json_file = output / f"{split}.images.json", files.annotations(split)
        list_images(split, files.images(split), json_file, f"digest of {split}", images, check)
        of_base = list(base) if split == "train" else None
        annotate(images, json_file, output / f"{split}.json", of_base, split == "train")


def test_files_on_disk_are_used_in_place(coco, tmp_path):
    output = tmp_path / "out"
    make(coco, output)
    make(coco, output)  # a second time over the first
    data = read_dataset(output / "train.json")
    assert not (output / "images").exists()
    assert data.folder.resolve() == coco["root"] / "train2017"
    assert [data.load(i).shape for i in data.images] == [(50, 30, 3), (4, 8, 3), (9, 9, 3)]
    assert data.info["identity"]["inputs"]["images"] == sha256(output / "train.images.json")
    val = read_dataset(output / "val.json")
    boxes, categories = val.boxes(900_000_000_000)
    assert boxes.tolist() == [[0, 0, 20, 20]]  # neither the crowd nor the sliver
    assert categories.tolist() == [17]
    assert "segmentation" not in val.annotations[900_000_000_000][0]
    assert all(c.keys() == {"id", "name"} for c in val.categories.values())


def test_bad_images_are_left_out_of_images_and_annotations(coco, tmp_path):
    check, first = tmp_path / "check.json", 900_000_000_000
    check.write_text(json.dumps({"bad_images": {"train": [first], "val": [first + 1]}}))
    make(coco, tmp_path / "out", check=check)
    train, val = (read_dataset(tmp_path / f"out/{split}.json") for split in ("train", "val"))
    assert list(train.images) == [first + 1, first + 2]
    assert sum(map(len, train.annotations.values())) == 0  # all were on the bad image
    assert list(val.images) == [first, first + 2]
    assert len(val.annotations[first]) == 3


def test_a_split_reduced_to_classes_lists_the_absent_ones(coco, tmp_path):
    make(coco, tmp_path / "out")
    data = read_dataset(tmp_path / "out/val.json").of_classes(["cat"], ["unicycle", "狗"])
    assert {c["name"]: (i, c["split"]) for i, c in data.categories.items()} == {
        "cat": (17, "base"),
        "unicycle": (91, "novel"),
        "狗": (92, "novel"),
    }
    assert [a["category_id"] for a in data.annotations[900_000_000_000]] == [17]
    assert list(data.images) == [900_000_000_000 + n for n in range(3)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: c["images"].append(c["images"][0]), "image id 900000000000 appears twice"),
        (lambda c: c["images"][1].pop("width"), "image 900000000001 has no 'width'"),
        (lambda c: c["annotations"][0].update(image_id=5), "annotation 10 names image 5"),
        (lambda c: c["annotations"][0].update(category_id=5), "annotation 10 names category 5"),
        (lambda c: c["annotations"][1].update(bbox=[0, 0, -1, 5]), "annotation 11: bbox"),
        (lambda c: c["annotations"][1].update(bbox=[0, 0, 1e999, 5]), "annotation 11: bbox"),
        (lambda c: c["categories"][1].update(name="cat"), "several categories are named 'cat'"),
        (lambda c: c["images"][2].update(file_name="x.jpg"), "1 images are missing: x.jpg"),
    ],
)
def test_what_is_wrong_is_named(coco, tmp_path, spoil, message):
    spoil(coco["content"])
    coco["path"].write_text(json.dumps(coco["content"]))
    with pytest.raises(LpovodError, match=message):
        make(coco, tmp_path / "out")


def test_a_missing_source_is_named(coco, tmp_path):
    with pytest.raises(LpovodError, match="has no category 'dog'"):
        make(coco, tmp_path / "out", base=("cat", "dog"))
    coco["path"].write_text("{")
    with pytest.raises(LpovodError, match="instances_val2017.json is not valid json"):
        make(coco, tmp_path / "out")


def test_damaged_images_are_named(coco, tmp_path):
    make(coco, tmp_path / "out")
    data = read_dataset(tmp_path / "out/val.json")
    path = coco["root"] / "val2017/0.jpg"
    Image.new("RGB", (31, 50)).save(path)
    with pytest.raises(LpovodError, match="image 900000000000: .*0.jpg is 31 x 50.*30 x 50"):
        data.load(900_000_000_000)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(LpovodError, match="image 900000000000: .*cannot be decoded"):
        data.load(900_000_000_000)
    path.unlink()
    with pytest.raises(LpovodError, match="image 900000000000: .*no such file"):
        data.load(900_000_000_000)


@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs the COCO photographs")
def test_real_photographs(tmp_path):
    make({"root": COCO_TINY}, tmp_path, ("person", "dog"))
    data = read_dataset(tmp_path / "val.json")
    assert len(data.images) == 80
    assert all(data.load(i).dtype == np.uint8 for i in list(data.images)[:10])


@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs the COCO photographs")
def test_the_number_of_base_boxes_is_checked(tmp_path):
    file = COCO_TINY / "annotations/instances_val2017.json"
    content, base = read_json(file), ["person", "dog"]
    names = {c["id"]: c["name"] for c in content["categories"]}
    boxes = sum(names[a["category_id"]] in base for a in content["annotations"])
    assert 0 < boxes < len(content["annotations"])
    images = tmp_path / "val.images.json"
    list_images("val", COCO_TINY / "val2017", file, "", images)
    annotate(images, file, tmp_path / "val.json", base, expected_boxes=boxes)
    assert len(read_json(tmp_path / "val.json")["annotations"]) == len(content["annotations"])
    with pytest.raises(LpovodError, match=f"has {boxes} boxes of base classes"):
        annotate(images, file, tmp_path / "val.json", base, expected_boxes=boxes + 1)
