"""The user's own data: what an edit of labels or images makes stale, asked of Snakemake.

The images are drawn, but the run knows them as anybody's: a folder and a COCO json per split.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from project import copy_project, snakemake, stale_jobs

from lpovod.miniature.split import draw_split

pytestmark = pytest.mark.slow

BASE, NOVEL = ["square", "triangle", "disk", "cross"], ["star", "ring"]
RUN = {
    "dataset": {"source": "coco", "coco": {"root": "data", "pictogram_clip": True}},
    "classes": {"base": BASE, "novel": [*NOVEL, {"name": "狗", "prompt": "a house"}]},
    "proposals": {"per_image": 10, "training": {"epochs": 1, "milestones": []}},
    "base_detector": {"training": {"epochs": 1, "milestones": []}},
    "shards": 1,
    "evaluation": {"clip_on_crops": False},
}
BEYOND_PROPOSALS = {
    "region_embeddings": 1,
    "region_index": 1,
    "base_detector": 1,
    "pseudo_labels": 1,
    "region_features": 1,
    "retrieved_region_features": 1,
    "linear_probe": 1,
    "evaluation": 1,
    "model": 1,
    "report": 1,
}
TRAINED = {"proposal_network": 1, "proposals": 2} | BEYOND_PROPOSALS
MEASURED = {"annotations": 1, "evaluation": 1, "report": 1}


class Data:
    """A project with a finished run, and the user's data in its folder `data`."""

    def __init__(self, project: Path):
        self.project, self.root = project, project / "data"

    def json_file(self, split: str) -> Path:
        return self.root / f"annotations/instances_{split}2017.json"

    def edit(self, split: str, change) -> None:
        content = json.loads(self.json_file(split).read_text())
        change(content)
        self.json_file(split).write_text(json.dumps(content, indent=1))

    def stale(self) -> dict[str, int]:
        return stale_jobs(self.project, "smallest.yaml", RUN)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    project = copy_project(tmp_path_factory.mktemp("own_data") / "project")
    (project / "data/annotations").mkdir(parents=True)
    for split, count in (("train", 24), ("val", 8)):
        content = draw_split(project / f"data/{split}2017", count, 5, split)
        (project / f"data/annotations/instances_{split}2017.json").write_text(json.dumps(content))
    snakemake(project, "smallest.yaml", RUN, "--cores", "2")
    shutil.copytree(project / "data", project / "untouched")
    return project


@pytest.fixture()
def data(finished) -> Data:
    yield Data(finished)
    shutil.rmtree(finished / "data")
    shutil.copytree(finished / "untouched", finished / "data")


def labelled(content: dict, name: str) -> dict:
    """The first annotation of a class."""
    (category,) = (c["id"] for c in content["categories"] if c["name"] == name)
    return next(a for a in content["annotations"] if a["category_id"] == category)


def correct(name: str):
    def change(content: dict) -> None:
        labelled(content, name)["bbox"][2] -= 2

    return change


def label(name: str):
    """Add an object of a class to the image of another."""

    def change(content: dict) -> None:
        box = labelled(content, "square") | {"category_id": labelled(content, name)["category_id"]}
        content["annotations"].append(box | {"id": 1})

    return change


def add_image(data: Data, split: str) -> None:
    shutil.copy(next((data.root / f"{split}2017").iterdir()), data.root / f"{split}2017/new.jpg")
    Image.new("RGB", (160, 160), (9, 99, 200)).save(data.root / f"{split}2017/new.jpg")
    image = {"id": 77, "file_name": "new.jpg", "width": 160, "height": 160}
    data.edit(split, lambda content: content["images"].append(image))


def replace_image(data: Data, split: str) -> None:
    path = sorted((data.root / f"{split}2017").iterdir())[0]
    Image.open(path).rotate(180).save(path)


def reformat(data: Data) -> None:
    for split in ("train", "val"):
        data.edit(split, lambda content: content.update(info={"year": 1}, licenses=[]))
        data.edit(split, lambda content: content["annotations"][0].update(segmentation=[]))
        for path in [data.json_file(split), *(data.root / f"{split}2017").iterdir()]:
            os.utime(path)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda data: None, {}),
        (reformat, {}),
        (lambda data: data.edit("val", correct("square")), MEASURED),
        (lambda data: data.edit("val", correct("star")), MEASURED),
        (lambda data: data.edit("val", label("star")), MEASURED),
        (lambda data: data.edit("train", label("star")), {"annotations": 1, "report": 1}),
        (lambda data: data.edit("train", correct("square")), {"annotations": 2} | TRAINED),
        (
            lambda data: add_image(data, "val"),
            {"dataset": 1, "proposals": 1, "region_features": 1} | MEASURED,
        ),
        (lambda data: add_image(data, "train"), {"dataset": 1, "annotations": 2} | TRAINED),
        (
            lambda data: replace_image(data, "val"),
            {"dataset": 1, "proposals": 1, "region_features": 1} | MEASURED,
        ),
        (lambda data: replace_image(data, "train"), {"dataset": 1, "annotations": 2} | TRAINED),
    ],
    ids=[
        "nothing",
        "touched and reformatted",
        "a val box of a base class",
        "a val box of a novel class",
        "a novel label on a val image",
        "a novel label on a train image",
        "a train box",
        "a val image more",
        "a train image more",
        "a val image replaced",
        "a train image replaced",
    ],
)
def test_an_edit_of_the_data_makes_exactly_what_it_shapes_stale(data, edit, expected):
    edit(data)
    assert data.stale() == expected


def test_a_class_that_nobody_annotated_is_detected_and_not_measured(finished):
    results = finished / "results/smallest"
    metrics = json.loads((results / "evaluation/metrics.json").read_text())
    truth = json.loads((results / "evaluation/ground_truth.json").read_text())
    (category,) = (c["id"] for c in truth["categories"] if c["name"] == "狗")
    assert "狗" in metrics["classes"]["novel"] and "狗" not in metrics["per_class"]
    detections = json.loads((results / "evaluation/detections.json").read_text())
    assert any(d["category_id"] == category for d in detections)
    assert all(a["category_id"] != category for a in truth["annotations"])


def test_without_a_validation_split_a_run_trains_and_measures_nothing(finished):
    nothing = {"val_images": None, "val_annotations": None}
    overlay = RUN | {"dataset": {"source": "coco", "coco": RUN["dataset"]["coco"] | nothing}}
    printed = snakemake(finished, "smallest.yaml", overlay, "-n")
    assert "evaluation" not in printed and "region_features/val" not in printed
    snakemake(finished, "smallest.yaml", overlay, "--cores", "2")
    assert "nothing is measured" in (finished / "results/smallest/report/report.html").read_text()
