"""What counts as a change of the user's data, and what does not."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

import lpovod.sources
from lpovod.exceptions import LpovodError
from lpovod.sources import Source, read_source

CONTENT = {
    "images": [
        {"id": n, "file_name": f"{n}.png", "width": 8, "height": 6, "license": 1} for n in (1, 2)
    ],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 3, "bbox": [0, 0, 4, 4], "segmentation": []},
        {"id": 6, "image_id": 2, "category_id": 9, "bbox": [1, 1, 4, 4], "segmentation": []},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "狗"}],
}


class Data:
    """Two images and their json, to be edited."""

    def __init__(self, folder: Path):
        self.folder, self.json = folder / "images", folder / "boxes.json"
        self.cache, self.content = folder / "cache", json.loads(json.dumps(CONTENT))
        self.folder.mkdir()
        for n in (1, 2):
            Image.new("L", (8, 6), n).save(self.folder / f"{n}.png")
        self.write()

    def write(self) -> None:
        self.json.write_text(json.dumps(self.content))

    def read(self) -> Source:
        return read_source(self.folder, self.json, self.cache)


@pytest.fixture()
def data(tmp_path) -> Data:
    return Data(tmp_path)


def test_nothing_changed(data):
    first = data.read()
    assert (first.count, sorted(first.annotations)) == (2, ["cat", "狗"])
    for path in (data.json, data.folder / "1.png"):
        os.utime(path, (1, 1))
    data.content["images"][0]["license"] = 7
    data.content["annotations"][0]["segmentation"] = [[0, 0, 4, 0, 4, 4]]
    data.content["info"] = {"year": 2026}
    data.json.write_text(json.dumps(data.content, indent=3))
    assert data.read() == first


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (lambda c: c["annotations"][1].update(bbox=[1, 1, 4, 5]), "狗"),
        (lambda c: c["annotations"].pop(), "狗"),
        (lambda c: c["annotations"].append(c["annotations"][0] | {"id": 7}), "cat"),
        (lambda c: c["categories"][0].update(id=4), "cat"),
    ],
)
def test_a_corrected_box_changes_its_class_alone(data, edit, changed):
    first = data.read()
    edit(data.content)
    data.write()
    second = data.read()
    (other,) = {"cat", "狗"} - {changed}
    assert second.images == first.images
    assert second.annotations[changed] != first.annotations[changed]
    assert second.annotations[other] == first.annotations[other]
    assert second.digest([other]) == first.digest([other])
    assert second.digest([changed]) != first.digest([changed])
    assert second.digest() != first.digest()


@pytest.mark.parametrize("by_content", [2_000, 1])
@pytest.mark.parametrize(
    "edit",
    [
        lambda data: Image.new("L", (8, 6), 77).save(data.folder / "1.png", compress_level=1),
        lambda data: (data.folder / "2.png").unlink(),
        lambda data: data.content["images"].pop(),
        lambda data: data.content["images"][0].update(width=9),
        lambda data: data.content["images"].append(
            {"id": 3, "file_name": "1.png", "width": 8, "height": 6}
        ),
    ],
)
def test_another_image_changes_the_images_and_all_that_is_made_from_them(
    data, monkeypatch, edit, by_content
):
    monkeypatch.setattr(lpovod.sources, "BY_CONTENT", by_content)
    first = data.read()
    edit(data)
    data.write()
    second = data.read()
    assert second.images != first.images
    assert second.digest(["cat"]) != first.digest(["cat"])
    assert second.annotations == first.annotations


def test_of_many_images_the_time_of_the_last_change_counts(data, monkeypatch):
    monkeypatch.setattr(lpovod.sources, "BY_CONTENT", 1)
    first = data.read()
    os.utime(data.folder / "1.png", (1, 1))
    assert data.read().images != first.images


def test_files_that_did_not_change_are_not_read_again(data, monkeypatch):
    first = data.read()
    monkeypatch.setattr(lpovod.sources, "read_json", None)
    monkeypatch.setattr(lpovod.sources, "sha256", None)
    assert data.read() == first
    for path in data.cache.iterdir():
        path.write_text("{")  # a cache that cannot be read is made again
    monkeypatch.undo()
    assert data.read() == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "boxes.json is not valid json"),
        ("[]", "boxes.json is not a COCO json: it has no list 'images'"),
        ('{"images": [], "annotations": {}}', "no list 'annotations'"),
        ('{"images": ["a"]}', "no list 'images'"),
    ],
)
def test_a_file_of_another_format_is_named(data, text, message):
    data.json.write_text(text)
    with pytest.raises(LpovodError, match=message):
        data.read()
    data.json.unlink()
    with pytest.raises(LpovodError, match="boxes.json: no such file"):
        data.read()
