"""Converting detections and pseudo-labels: files against numbers computed by hand, and back."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from lpovod.apps.adopt.look import look
from lpovod.apps.convert import convert
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.coco import read_dataset

IMAGES = [
    {"id": 70, "file_name": "a.png", "width": 80, "height": 40},
    {"id": 8, "file_name": "sub folder/b c.png", "width": 80, "height": 40},
    {"id": 9, "file_name": "empty.png", "width": 80, "height": 40},
]
CATEGORIES = [{"id": 30, "name": "狗"}, {"id": 4, "name": "red fox"}]  # in no order
DETECTIONS = [
    {"image_id": 70, "category_id": 30, "bbox": [30.25, 15, 20, 10], "score": 0.9},
    {"image_id": 70, "category_id": 4, "bbox": [-10, 20, 30, 30], "score": 0.5},  # leaves the image
    {"image_id": 8, "category_id": 30, "bbox": [0, 0, 80, 40], "score": 0.7},
    {"image_id": 8, "category_id": 4, "bbox": [10, 10, 5, 5], "score": 0.1},
    {"image_id": 9, "category_id": 4, "bbox": [90, 10, 5, 5], "score": 0.9},  # outside
]


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    """A dataset with its images, as a run has them, and detections."""
    for image in IMAGES:
        path = tmp_path / "images/val" / str(image["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 40)).save(path)
    dataset = tmp_path / "val.json"
    content = {"images": IMAGES, "annotations": [], "categories": CATEGORIES}
    dataset.write_text(json.dumps(content))
    (tmp_path / "detections.json").write_text(json.dumps(DETECTIONS))
    return dataset, tmp_path / "detections.json"


def test_detections_as_yolo(files, tmp_path):
    dataset, detections = files
    text = convert((detections,), dataset, "yolo", tmp_path / "out", threshold=0.5)
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text(encoding="utf-8"))
    assert content["names"] == {0: "red fox", 1: "狗"}  # in the order of ids
    # Centre (40.25, 20) and size (20, 10) of 80 x 40 pixels; the second is clipped to (0, 20),
    # (20, 40).
    assert (tmp_path / "out/labels/a.txt").read_text().splitlines() == [
        "1 0.503125 0.500000 0.250000 0.250000",
        "0 0.125000 0.750000 0.250000 0.500000",
    ]
    expected = "1 0.500000 0.500000 1.000000 1.000000\n"
    assert (tmp_path / "out/labels/sub folder/b c.txt").read_text() == expected
    assert not (tmp_path / "out/labels/empty.txt").exists()
    assert (tmp_path / "out/images/a.png").is_file()  # a link to the folder of images
    assert "3 boxes of 2 classes on 2 images" in text and "2 boxes below 0.5" in text


def test_the_images_of_a_run_s_ground_truth_are_those_of_its_validation_split(files, tmp_path):
    dataset, detections = files
    truth = tmp_path / "run/evaluation/ground_truth.json"
    truth.parent.mkdir(parents=True)
    truth.write_text(dataset.read_text())
    listed = tmp_path / "run/dataset/val.images.json"
    listed.parent.mkdir()
    info = {"images": "../../images/val"}
    content = {"info": info, "images": IMAGES, "annotations": [], "categories": []}
    listed.write_text(json.dumps(content))
    text = convert((detections,), truth, "voc", tmp_path / "out")
    assert (tmp_path / "out/JPEGImages/a.png").is_file() and "Put the images" not in text
    listed.unlink()
    text = convert((detections,), truth, "yolo", tmp_path / "unlinked")
    assert f"Put the images, or a link to their folder, into {tmp_path}/unlinked/images" in text


def test_detections_as_voc(files, tmp_path):
    dataset, detections = files
    convert((detections,), dataset, "voc", tmp_path / "out", threshold=0.6)
    root = ElementTree.parse(tmp_path / "out/Annotations/a.xml").getroot()
    assert root.findtext("filename") == "a.png" and root.findtext("object/name") == "狗"
    assert [root.findtext(f"size/{side}") for side in ("width", "height")] == ["80", "40"]
    # Columns 30 to 49 and rows 15 to 24, counted from 0; VOC counts from 1.
    sides = [root.findtext(f"object/bndbox/{s}") for s in ("xmin", "ymin", "xmax", "ymax")]
    assert sides == ["31", "16", "50", "25"]
    root = ElementTree.parse(tmp_path / "out/Annotations/sub folder/b c.xml").getroot()
    sides = [root.findtext(f"object/bndbox/{s}") for s in ("xmin", "ymin", "xmax", "ymax")]
    assert sides == ["1", "1", "80", "40"]
    listed = (tmp_path / "out/ImageSets/Main/train.txt").read_text().splitlines()
    assert listed == ["a", "sub folder/b c"]


def test_detections_as_coco_keep_ids_and_scores(files, tmp_path):
    dataset, detections = files
    convert((detections,), dataset, "coco", tmp_path / "out", threshold=0.5)
    data = read_dataset(tmp_path / "out/annotations.json")
    assert list(data.images.values()) == IMAGES
    assert {i: c["name"] for i, c in data.categories.items()} == {30: "狗", 4: "red fox"}
    first, second = data.annotations[70]
    assert (first["bbox"], first["score"], first["category_id"]) == ([30.25, 15, 20, 10], 0.9, 30)
    assert (second["bbox"], second["area"], second["iscrowd"]) == ([0, 20, 20, 20], 400, 0)


@pytest.mark.parametrize(("to", "rounding"), [("yolo", 0.01), ("voc", 0.5), ("coco", 0.005)])
def test_what_was_written_is_read_back(files, tmp_path, to, rounding):
    dataset, detections = files
    convert((detections,), dataset, to, tmp_path / "out", threshold=0.2)
    labels = (tmp_path / "out/annotations.json",) if to == "coco" else ()
    folder = tmp_path / "images" if to == "coco" else tmp_path / "out"
    found = look(folder, labels)
    assert not found.errors
    coco = found.splits["train"].coco
    names = {c["id"]: c["name"] for c in coco["categories"]}
    files_ = {i["id"]: i["file_name"] for i in coco["images"]}
    read = [
        (files_[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in coco["annotations"]
    ]
    expected = [
        ("a.png", "狗", [30.25, 15, 20, 10]),
        ("a.png", "red fox", [0, 20, 20, 20]),
        ("sub folder/b c.png", "狗", [0, 0, 80, 40]),
    ]
    for (file, name, box), (true_file, true_name, true_box) in zip(read, expected, strict=True):
        assert (file, name) == (true_file, true_name)
        assert np.abs(np.subtract(box, true_box)).max() <= rounding


def pseudo_labels(path: Path, name: str, boxes: list[tuple[int, list[float], float, int]]) -> None:
    """A file as stage `pseudo_labels` writes it: one class, with regions to ignore."""
    images = {image["id"]: image for image in IMAGES}
    content = {
        "images": [images[i] for i in dict.fromkeys(b[0] for b in boxes)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": 1, "bbox": b, "score": s, "iscrowd": crowd}
            for n, (i, b, s, crowd) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": name, "split": "novel"}],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_pseudo_labels_of_all_classes(files, tmp_path):
    dataset, _ = files
    content = {"images": IMAGES, "annotations": [], "categories": []}
    dataset.write_text(json.dumps(content))
    folder = tmp_path / "pseudo_labels"
    pseudo_labels(folder / "cat.json", "cat", [(70, [0, 0, 8, 4], 0.8, 0), (8, [0, 0, 9, 9], 1, 1)])
    pseudo_labels(folder / "dog.json", "a dog", [(70, [40, 0, 40, 40], 0.4, 0)])
    convert((folder,), dataset, "yolo", tmp_path / "out")
    names = yaml.safe_load((tmp_path / "out/data.yaml").read_text())["names"]
    assert names == {0: "cat", 1: "a dog"}
    assert (tmp_path / "out/labels/a.txt").read_text().splitlines() == [
        "0 0.050000 0.050000 0.100000 0.100000",
        "1 0.750000 0.500000 0.500000 1.000000",
    ]
    assert not (tmp_path / "out/labels/sub folder").exists()  # ignored regions are no labels
    convert((folder / "dog.json",), dataset, "coco", tmp_path / "coco", threshold=0.4)
    (category,) = read_dataset(tmp_path / "coco/annotations.json").categories.values()
    assert category == {"id": 1, "name": "a dog"}


def test_mistakes_are_named_and_leave_nothing(files, tmp_path):
    dataset, detections = files
    out = tmp_path / "out"
    with pytest.raises(LpovodError, match="none of 5 boxes has a score of 0.95"):
        convert((detections,), dataset, "voc", out, threshold=0.95)
    detections.write_text(json.dumps([{**DETECTIONS[0], "category_id": 99}]))
    with pytest.raises(LpovodError, match="no category 99.*ground_truth.json"):
        convert((detections,), dataset, "voc", out)
    pseudo_labels(tmp_path / "labels/cat.json", "cat", [(70, [0, 0, 8, 4], 0.8, 0)])
    dataset.write_text(json.dumps({"images": IMAGES[1:], "annotations": [], "categories": []}))
    with pytest.raises(LpovodError, match=r"no image 70.*train.images.json"):
        convert((tmp_path / "labels",), dataset, "voc", out)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(UsageError, match="exists"):
        convert((detections,), dataset, "voc", out)


def test_images_that_differ_in_their_suffix_alone_need_coco(files, tmp_path):
    dataset, detections = files
    images = [*IMAGES, {"id": 10, "file_name": "a.jpg", "width": 80, "height": 40}]
    content = {"images": images, "annotations": [], "categories": CATEGORIES}
    dataset.write_text(json.dumps(content))
    both = [DETECTIONS[0], {**DETECTIONS[0], "image_id": 10}]
    detections.write_text(json.dumps(both))
    with pytest.raises(LpovodError, match=r"a.png and a.jpg would share .*--to coco"):
        convert((detections,), dataset, "yolo", tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    convert((detections,), dataset, "coco", tmp_path / "out")
