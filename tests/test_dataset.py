"""Splits, and what is wrong with other people's files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lpovod.artifacts import read_json, sha256
from lpovod.config import CocoSettings, DatasetSettings, MiniatureSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.miniature.pictograms import BASE_CLASSES, CLASSES
from lpovod.stages.dataset import make_dataset

TINY = DatasetSettings(miniature=MiniatureSettings(train_images=6, val_images=4, tune_images=2))
COCO_TINY = Path("../shared/data/coco_tiny")


def test_training_annotations_hold_base_classes_alone(tmp_path):
    make_dataset(tmp_path, TINY, list(BASE_CLASSES), seed=0)
    train, everything, val = (
        read_dataset(tmp_path / f"{name}.json") for name in ("train", "train_all_classes", "val")
    )
    assert {c["name"] for c in train.categories.values()} == set(BASE_CLASSES)
    assert {c["name"] for c in val.categories.values()} == set(CLASSES)
    assert {c["split"] for c in train.categories.values()} == {"base"}
    counts = [sum(map(len, d.annotations.values())) for d in (train, everything)]
    assert counts[0] < counts[1]
    assert list(train.images) == list(everything.images)
    assert train.load(next(iter(train.images))).shape == (160, 160, 3)


def test_the_same_seed_gives_the_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_dataset(tmp_path / name, TINY, list(BASE_CLASSES), seed)
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


def make(coco: dict, output: Path, base=("cat",)) -> None:
    settings = DatasetSettings(source="coco", coco=CocoSettings(root=coco["root"]))
    make_dataset(output, settings, list(base), seed=0)


def test_files_on_disk_are_used_in_place(coco, tmp_path):
    output = tmp_path / "out"
    make(coco, output)
    make(coco, output)  # a second time over the first
    data = read_dataset(output / "train.json")
    assert (output / "images" / "train").is_symlink()
    assert [data.load(i).shape for i in data.images] == [(50, 30, 3), (4, 8, 3), (9, 9, 3)]
    val = read_dataset(output / "val.json")
    boxes, categories = val.boxes(900_000_000_000)
    assert boxes.tolist() == [[0, 0, 20, 20]]  # neither the crowd nor the sliver
    assert categories.tolist() == [17]
    assert "segmentation" not in val.annotations[900_000_000_000][0]
    assert [c["split"] for c in val.categories.values()] == ["base", "novel"]


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
        (lambda c: c["images"][2].update(file_name="x.jpg"), "1 images are missing, first x.jpg"),
    ],
)
def test_what_is_wrong_is_named(coco, tmp_path, spoil, message):
    spoil(coco["content"])
    coco["path"].write_text(json.dumps(coco["content"]))
    with pytest.raises(LpovodError, match=message):
        make(coco, tmp_path / "out")


def test_a_missing_source_is_named(coco, tmp_path):
    with pytest.raises(LpovodError, match=r"classes.base: \['dog'\]"):
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
    names = [
        c["name"] for c in read_json(COCO_TINY / "annotations/instances_val2017.json")["categories"]
    ]
    settings = DatasetSettings(source="coco", coco=CocoSettings(root=COCO_TINY))
    make_dataset(tmp_path, settings, names[:40], seed=0)
    data = read_dataset(tmp_path / "val.json")
    assert len(data.images) == 80
    assert all(data.load(i).dtype == np.uint8 for i in list(data.images)[:10])
