"""The page says what the files say, marks crops rightly, and loads nothing."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from project import install

from lpovod.artifacts import sha256
from lpovod.config import Config
from lpovod.drawing import choose_images, place_labels
from lpovod.exceptions import LpovodError
from lpovod.formats.benchmarks import stage_times
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.miniature.split import draw_split
from lpovod.stages import report
from lpovod.stages.report import duration, signed, write_report
from lpovod.stages.report.made import Made, commit_of, made_now
from lpovod.stages.report.retrieved import choose_classes
from lpovod.stages.report.scenes import choose_scenes

BASE, NOVEL = ["square", "disk"], ["star", "fish"]
MADE = Made("2024-03-01 12:00 +0000", "c0ffee", "Abacus 3000, 7 cores", {"lpovod": "9.8.7"})
HEADER = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"


class Page(HTMLParser):
    """Texts by section, table rows as lists of cells, and every attribute of the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.section, self.cell = "header", None
        self.texts: dict[str, str] = {}
        self.rows: dict[str, list[list[str]]] = {}
        self.tags: list[tuple[str, str, dict[str, str]]] = []
        self.labels: list[tuple[str, str | None, str]] = []  # texts in drawings, with their class
        self.drawing = False
        self.folds = 0  # open <details> around the current tag
        self.folded: list[tuple[str, str, int]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.section = dict(attrs).get("id", self.section) if tag == "section" else self.section
        self.tags.append((self.section, tag, dict(attrs)))
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
            self.cell = self.rows[self.section][-1]
        if tag == "text":
            self.labels.append((self.section, dict(attrs).get("class"), ""))
        self.drawing = tag == "text"
        self.folds += tag == "details"
        self.folded.append((self.section, tag, self.folds))
        if tag in ("small", "br"):
            self.handle_data(" | ")

    def handle_endtag(self, tag):
        self.folds -= tag == "details"
        self.drawing = False
        if tag in ("td", "th"):
            self.cell[-1] = self.cell[-1].strip()
            self.cell = None

    def handle_data(self, data):
        words = re.sub(r"\s+", " ", data)
        self.texts[self.section] = self.texts.get(self.section, "") + words
        if self.cell is not None:
            self.cell[-1] += words
        if self.drawing:
            *place, text = self.labels[-1]
            self.labels[-1] = (*place, text + words)

    def table(self, section: str) -> dict[str, list[str]]:
        """Cells by the first one, without its explanation."""
        return {row[0].split(" | ")[0]: row[1:] for row in self.rows[section]}

    def crops(self, name: str) -> list[tuple[str, str]]:
        """Class of the figure and its alternative text, of the crops of a novel class."""
        figures = [a.get("class") for s, t, a in self.tags if (s, t) == ("retrieved", "figure")]
        drawn = [a["aria-label"] for s, t, a in self.tags if (s, t) == ("retrieved", "svg")]
        pairs = zip(figures, drawn, strict=True)
        return [pair for pair in pairs if pair[1].startswith(f"Region retrieved for {name} ")]


@pytest.fixture(autouse=True)
def made(monkeypatch) -> None:
    """The facts that change from day to day and from machine to machine."""
    monkeypatch.setattr(report, "made_now", lambda gpu: MADE)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """A folder like a run's: eight training and six validation images of the miniature world."""
    run = tmp_path_factory.mktemp("runs") / "tiny-run"
    folder = run / "dataset"
    for split, count in (("train", 8), ("val", 6)):
        content = draw_split(folder / "images" / split, count, 3, split)
        # What is drawn stays; what is annotated is known exactly.
        content["annotations"] = _annotations(content)
        (folder / f"{split}.json").write_text(json.dumps(content))
    shutil.copy(folder / "train.json", folder / "train_all_classes.json")
    return run


def _annotations(content: dict) -> list[dict]:
    """In every image a square, a star and, in the first three, a fish."""
    ids = {c["name"]: c["id"] for c in content["categories"]}
    objects = {"square": [10, 10, 40, 40], "star": [60, 60, 40, 40], "fish": [110, 20, 40, 20]}
    return [
        {
            "id": 10 * number + place,
            "image_id": image["id"],
            "category_id": ids[name],
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for number, image in enumerate(content["images"])
        for place, (name, box) in enumerate(objects.items())
        if name != "fish" or number < 3
    ]


STARS = [
    ([60, 60, 40, 40], "right", "IoU 1.00"),
    ([62, 60, 40, 40], "right", "IoU 0.90"),
    ([70, 70, 15, 15], "badly placed", "too tight"),
    ([40, 40, 80, 80], "badly placed", "too loose"),
    ([85, 85, 40, 40], "badly placed", "shifted"),
    ([10, 10, 40, 40], "wrong", "square"),
    ([0, 120, 30, 30], "wrong", "background"),
    ([60, 60, 40, 40], "right", "IoU 1.00"),
]


def make_run(drawn: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments of `write_report` for a run of known content; `changes` replace arguments."""
    run = folder / "tiny-run"
    shutil.copytree(drawn, run)
    dataset = run / "dataset"
    files = {
        "metrics": run / "evaluation" / "metrics.json",
        "detections": run / "evaluation" / "detections.json",
        "val": dataset / "val.json",
        "train": dataset / "train.json",
        "truth": dataset / "train_all_classes.json",
        "proposals_history": run / "proposals.jsonl",
        "detector_history": run / "detector.jsonl",
        "benchmarks": run / "benchmarks",
        "output": run / "report" / "report.html",
    }
    files["metrics"].parent.mkdir()
    files["metrics"].write_text(json.dumps(metrics(files["val"])))
    files["detections"].write_text(json.dumps(detections(files["val"])))
    files["proposals_history"].write_text(
        '{"epoch": 1, "box": 3.0, "objectness": 1.0}\n'
        '{"epoch": 2, "box": 1.5, "objectness": 0.25}\n'
    )
    files["detector_history"].write_text('{"epoch": 1, "distillation": 0.75}\n')
    write_benchmarks(files["benchmarks"])
    labels = pseudo_labels(run / "star.json", "star", STARS, dataset)
    return files | {"pseudo_labels": [labels], "run": configured()} | changes


def configured(**changes: Any) -> Config:
    settings = {
        "name": "tiny-run",
        "classes": {"base": BASE, "novel": NOVEL},
        "report": {"images": 4},
    }
    return Config.model_validate(settings | changes)


def metrics(val: Path) -> dict:
    def row(novel: float) -> dict:
        return {"novel": novel, "base": 80.0, "all": 77.5}

    return {
        "rows": {
            "full": row(70.04),
            "without_probe": row(58.0),
            "without_probe_best_temperature": row(66.0) | {"temperature": 0.05},
            "without_clip_head": row(70.04),
            "something_new": row(71.0),
        },
        "per_class": {"star": 90.25, "fish": 49.83, "disk": 61.0},
        "temperature": 0.012345,
        "classes": {"base": BASE, "novel": NOVEL},
        "proposal_recall": {
            "base": {"10": 71.25, "50": 90.0, "100": 95.0},
            "novel": {"10": 61.0, "50": 80.0, "100": 85.0},
        },
        "novel_mistakes": {
            "full": {"correct": 75.0, "too tight": 25.0},
            "without_probe": {"correct": 50.0, "group": 50.0},
        },
        "made_from": {"dataset": sha256(val)},
        "evaluated": {
            "protocol": "annotated_images",
            "images": 5,
            "split_images": 6,
            "boxes": 14,
            "novel_boxes": 8,
        },
    }


def detections(val: Path) -> list[dict]:
    """In every image a star, and eight squares of falling score."""
    content = json.loads(val.read_text())
    ids = {c["name"]: c["id"] for c in content["categories"]}
    star = {"category_id": ids["star"], "bbox": [60, 60, 40, 40], "score": 0.875}
    squares = [
        {"category_id": ids["square"], "bbox": [10 + n, 10, 40, 40], "score": 0.9 - 0.1 * n}
        for n in range(8)
    ]
    return [{"image_id": i["id"]} | r for i in content["images"] for r in [*squares, star]]


def pseudo_labels(path: Path, name: str, regions: list, dataset: Path) -> Path:
    images = json.loads((dataset / "train.json").read_text())["images"]
    annotations = [
        {
            "id": place + 1,
            "image_id": images[place % len(images)]["id"],
            "category_id": 1,
            "bbox": box,
            "score": 0.8,
            "cosine": 0.9 - 0.01 * place,
        }
        for place, (box, *_) in enumerate(regions)
    ]
    inputs = {"dataset": sha256(dataset / "train.json")}
    content = {
        "images": images,
        "annotations": annotations[::-1],  # their order in the file says nothing
        "categories": [{"id": 1, "name": name}],
        "info": {"identity": {"stage": "pseudo_labels", "inputs": inputs}},
    }
    path.write_text(json.dumps(content))
    return path


def write_benchmarks(folder: Path) -> None:
    for name, seconds, peak in (
        ("dataset", "1.5", "NA"),
        ("proposals/train/0", "60", "512.4"),
        ("proposals/val/0", "30.5", "600.6"),
        ("region_features/retrieved/star", "-", "-"),
    ):
        path = folder / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEADER + "\t".join([seconds, "0:00:00", peak, *"-------"]) + "\n")


@pytest.fixture
def run(drawn, tmp_path) -> dict[str, Any]:
    return make_run(drawn, tmp_path)


@pytest.fixture
def page(run) -> Page:
    return written(run)


def written(arguments: dict[str, Any], **changes: Any) -> Page:
    write_report(**arguments | changes)
    return Page(arguments["output"].read_text())


def test_the_headline_states_run_and_ap(page):
    header = page.texts["header"]
    for stated in ("tiny-run", "70.0", "80.0", "77.5", "the 5 of 6 validation images in which"):
        assert stated in header, stated
    assert "one run, seed 0, on Abacus 3000, 7 cores" in header


def test_every_table_of_ap_says_where_it_comes_from(page):
    for section in ("ablations", "classes"):
        assert "one run, seed 0, on Abacus 3000, 7 cores" in page.texts[section]


def test_the_page_opens_with_detections(page):
    sections = [a["id"] for _, tag, a in page.tags if tag == "section"]
    assert sections[:3] == ["detections", "classes", "ablations"]
    first = next(s for s, tag, _ in page.tags if tag in ("image", "table"))
    assert first == "detections"


def test_ablations_stand_in_order_with_their_difference(page):
    assert page.table("ablations") == {
        "Scores and boxes": ["Novel", "Base", "All", "vs. full"],
        "Full method": ["70.0", "80.0", "77.5", ""],
        "CLIP head alone": ["58.0", "80.0", "77.5", "−12.0"],
        "CLIP head alone, best temperature": ["66.0", "80.0", "77.5", "−4.0"],
        "Probe alone": ["70.0", "80.0", "77.5", "0.0"],
        "Something new": ["71.0", "80.0", "77.5", "+1.0"],
    }
    assert list(page.table("ablations"))[-1] == "Something new"
    assert "temperature 0.05" in page.texts["ablations"]
    assert "+12.0" in page.texts["ablations"] and "+4.0" in page.texts["ablations"]


def test_classes_are_listed_best_first_with_their_boxes(page):
    names = [row[0] for row in page.rows["classes"] if row[0] != "Class"]
    assert names == ["star", "fish", "disk", "square"]
    # A star and a square in each of 6 and 8 images, a fish in the first three.
    assert page.table("classes")["star"][1:] == ["90.2", "6", "8"]
    assert page.table("classes")["fish"][1:] == ["49.8", "3", "3"]
    assert page.table("classes")["square"][1:] == ["not measured", "6", "8"]


def test_recall_mistakes_and_losses(page):
    assert page.table("proposals")["novel"] == ["61.0", "80.0", "85.0"]
    assert page.rows["proposals"][0][1:] == ["n = 10", "n = 50", "all 60"]
    assert "of the 60 proposals per image that are used" in page.texts["proposals"]
    assert page.table("mistakes")["Detection"] == ["Full method", "CLIP head alone"]
    assert page.table("mistakes")["too tight"] == ["25.0", "0.0"]
    drawn = [a["aria-label"] for s, t, a in page.tags if (s, t) == ("training", "svg")]
    assert "Proposal network, sum: 4.000 in epoch 1, 1.750 in epoch 2" in drawn
    assert "Detector, distillation: 0.750 in epoch 1, 0.750 in epoch 1" in drawn
    assert len(drawn) == 4  # a single loss needs no sum


def test_crops_are_marked_best_cosine_first(page):
    crops = page.crops("star")
    assert len(crops) == len(STARS)
    for (figure, alternative), (_, mark, why) in zip(crops, STARS, strict=True):
        assert figure == mark.split()[0]
        assert alternative.endswith(f": {mark}, {why}")
    for words in ("✓ right", "◐ badly placed", "✗ wrong", "cos 0.900"):
        assert words in page.texts["retrieved"]


def test_purity_counts_all_regions_not_only_those_shown(run):
    page = written(run, run=configured(report={"crops_per_class": 2}))
    assert len(page.crops("star")) == 2
    assert "38 % pure" in page.texts["retrieved"]
    assert "8 regions: 3 right, 3 badly placed, 2 wrong" in page.texts["retrieved"]
    assert "No region was retrieved for this class" in page.texts["retrieved"]  # fish


def test_without_annotations_of_a_class_nothing_is_marked(run):
    truth = json.loads(run["truth"].read_text())
    star = next(c["id"] for c in truth["categories"] if c["name"] == "star")
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] != star]
    run["truth"].write_text(json.dumps(truth))
    page = written(run)
    assert {figure for figure, _ in page.crops("star")} == {"unknown"}
    assert "nothing tells right from wrong" in page.texts["retrieved"]
    assert "% pure" not in page.texts["retrieved"]


def test_the_best_detections_are_drawn_two_more_than_objects(page):
    scenes = [a["aria-label"] for s, t, a in page.tags if s == "detections" and "aria-label" in a]
    assert len(scenes) == 4
    # Three objects in the first images: five detections.
    expected = "square 0.90, star 0.88, square 0.80, square 0.70, square 0.60; annotated: "
    assert expected in scenes[0]
    assert scenes[0].endswith("annotated: square, star, fish")
    lines = [a["class"] for s, t, a in page.tags if (s, t) == ("detections", "rect")]
    assert {"novel", "base", "object"} <= set(lines)


def test_annotated_objects_have_names_beside_their_boxes(page):
    labels = [(kind, text) for section, kind, text in page.labels if section == "detections"]
    assert labels.count(("object", "fish")) == 3  # of four pictures
    assert labels.count(("object", "star")) == labels.count(("object", "square")) == 4
    # Five detections where three objects are annotated, four where two are.
    assert labels.count(("novel", "star 0.88")) == labels.count(("base", "square 0.70")) == 4
    assert labels.count(("base", "square 0.60")) == 3


def test_stage_times_are_summed_by_rule(page):
    assert page.table("times") == {
        "Rule": ["Bar", "Jobs", "Time", "Peak memory, MiB"],
        "proposals": ["", "2", "1 min 30 s", "601"],
        "dataset": ["", "1", "1.5 s", "–"],
        "region_features": ["", "1", "0.0 s", "–"],
        "Sum": ["", "4", "1 min 32 s", ""],
    }


def test_the_page_refers_to_nothing_outside(page, run):
    text = run["output"].read_text()
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for _, tag, _ in page.tags}
    for _, tag, attributes in page.tags:
        assert "src" not in attributes and "srcset" not in attributes
        assert "xlink:href" not in attributes
        if "href" in attributes:
            inside = "data:image/jpeg;base64," if tag == "image" else "#"
            assert attributes["href"].startswith(inside)
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"
    sections = {a["id"] for _, tag, a in page.tags if tag == "section"}
    links = {a["href"][1:] for _, tag, a in page.tags if tag == "a"}
    assert links == sections
    captions = sum(tag == "caption" for _, tag, _ in page.tags)
    assert captions == sum(tag == "table" for _, tag, _ in page.tags)


# What a browser makes of the page, as json in its title.
PROBE = """<script>addEventListener("load", async () => {
  const loads = picture => new Promise(resolve => {
    const copy = new Image();
    copy.onload = () => resolve(copy.naturalWidth && picture.getBoundingClientRect().width);
    copy.onerror = () => resolve(0);
    copy.src = picture.getAttribute("href");
  });
  const shown = await Promise.all([...document.querySelectorAll("image")].map(loads));
  const root = document.documentElement;
  document.title = JSON.stringify({
    pictures: shown.length,
    broken: shown.filter(width => !width).length,
    overhang: root.scrollWidth - root.clientWidth,
  });
})</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])  # a browser's window is no narrower
def test_a_browser_shows_every_picture_and_nothing_sticks_out(run, tmp_path, width):
    """Needs Chromium, which is installed under CI or with LPOVOD_INSTALL=1; otherwise skipped."""
    install({"chromium": "chromium"})
    written(unlisted(run, "狗" + "x" * 80, count=3))
    content = run["output"].read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(content.replace("</body>", PROBE + "</body>"))
    found = in_browser(probed, tmp_path, width)
    assert found == {
        "pictures": content.count("<image "),
        "broken": 0,
        "overhang": 0,
    }
    assert found["pictures"] > 10


def test_same_inputs_same_bytes_but_for_their_making(run, monkeypatch):
    write_report(**run)
    first = run["output"].read_bytes()
    write_report(**run)
    assert run["output"].read_bytes() == first
    monkeypatch.setattr(report, "made_now", lambda gpu: replace(MADE, date="later"))
    write_report(**run)
    assert run["output"].read_bytes() == first.replace(MADE.date.encode(), b"later")


def test_names_are_escaped(run):
    content = json.loads(run["metrics"].read_text())
    content["rows"]["a<b>&c"] = {"novel": None, "base": 1.0, "all": 1.0}
    run["metrics"].write_text(json.dumps(content))
    assert written(run).table("ablations")["A<b>&c"] == ["not measured", "1.0", "1.0", ""]


def test_what_is_missing_is_said(run, tmp_path):
    nothing = {"novel": None, "base": None, "all": None}
    classes = {"base": BASE, "novel": ["ring"]}
    run["metrics"].write_text(json.dumps({"rows": {"full": nothing}, "classes": classes}))
    run["detections"].write_text("[]")
    run["proposals_history"].write_text("")
    page = written(
        run, run=configured(classes=classes), pseudo_labels=[], benchmarks=tmp_path / "nowhere"
    )
    assert "no recall" in page.texts["proposals"]
    assert "no mistake was counted" in page.texts["mistakes"]
    assert "Its history is empty" in page.texts["training"]
    assert "No region was retrieved" in page.texts["retrieved"]
    assert "Nothing was detected" in page.texts["detections"]
    assert "no benchmark files" in page.texts["times"]
    assert page.table("ablations")["Full method"] == [*["not measured"] * 3, ""]
    assert page.texts["header"].count("not measured") == 3
    # Nothing novel is annotated: the pictures show annotated objects of base classes.
    pictures = [a for s, tag, a in page.tags if (s, tag) == ("detections", "image")]
    assert len(pictures) == 4


def test_a_run_without_a_validation_split_says_so(run):
    page = written(run, metrics=None, detections=None, val=None)
    sections = [a["id"] for _, tag, a in page.tags if tag == "section"]
    assert sections == ["retrieved", "classes", "training", "run", "times", "made"]
    assert {a["href"][1:] for _, tag, a in page.tags if tag == "a"} == set(sections)
    assert "no validation split" in page.texts["header"]
    assert "AP50" not in run["output"].read_text()
    assert page.table("classes") == {
        "Class": ["Train"], "star": ["8"], "fish": ["3"], "square": ["8"], "disk": ["0"]
    }  # fmt: skip
    assert len(page.crops("star")) == len(STARS)


def unlisted(run: dict[str, Any], name: str, count: int = 0) -> dict[str, Any]:
    """The arguments for a run with one more novel class, which no json lists.

    Its detections are the lowest-scored of the images from the third on.
    """
    content = json.loads(run["val"].read_text())
    added = max(c["id"] for c in content["categories"]) + 1
    results = json.loads(run["detections"].read_text())
    results += [
        {
            "image_id": i["id"],
            "category_id": added,
            "bbox": [5, 90, 50, 60],
            "score": 0.06 + n / 1e3,
        }
        for n, i in enumerate(content["images"][2 : 2 + count])
    ]
    run["detections"].write_text(json.dumps(results))
    labels = pseudo_labels(run["output"].parents[1] / "x.json", name, STARS, run["val"].parent)
    classes = {"base": BASE, "novel": [*NOVEL, name]}
    edit(run["metrics"], lambda c: c.update(classes=classes))
    labels = [*run["pseudo_labels"], labels]
    return run | {"run": configured(classes=classes), "pseudo_labels": labels}


def test_a_novel_class_that_no_json_lists_is_shown_all_the_same(run):
    page = written(unlisted(run, "狗", count=3))
    assert page.table("classes")["狗"][1:] == ["not measured", "0", "0"]
    assert {figure for figure, _ in page.crops("狗")} == {"unknown"}
    assert len(page.crops("狗")) == len(STARS)
    scenes = [a["aria-label"] for s, t, a in page.tags if s == "detections" and "aria-label" in a]
    # Four by annotations, one of which has no detection of it drawn; its best is in the fifth.
    assert len(scenes) == 5
    assert ["狗" in scene for scene in scenes] == [False] * 4 + [True]
    assert "狗 0.06" in scenes[4] and "chosen for 狗" in page.texts["detections"]
    assert "mean of 2 of 3 classes" in page.texts["header"]


def test_a_class_without_any_detection_is_named(run):
    page = written(unlisted(run, "unicorn"))
    assert "Not detected in any image: fish, unicorn." in page.texts["detections"]


STRANGE = [
    "狗",
    """<b>"it's" & more</b>""",
    "a name so long that no label of any picture could ever hold it, " * 2 + "ever",
    "كلب",
    "x" * 80,
]


@pytest.mark.parametrize("name", STRANGE)
def test_any_name_is_shown_as_it_is(run, name):
    page = written(unlisted(run, name, count=3))
    assert name in page.table("classes")
    assert len(page.crops(name)) == len(STARS)
    scenes = [a["aria-label"] for s, t, a in page.tags if s == "detections" and "aria-label" in a]
    assert any(f"{name} 0.06" in scene for scene in scenes)
    assert f"{name} 0.06" in page.texts["detections"]
    # Every label lies within its picture.
    for section, tag, a in page.tags:
        if section == "detections" and tag == "rect" and "pill" in a["class"]:
            left, width = float(a["x"]), float(a["width"])
            assert left >= 0 and left + width <= 400


def test_a_name_of_wide_letters_has_a_label_of_twice_the_width():
    boxes = [[200, 200, 9, 9]] * 3
    narrow, wide, marked = (
        label["width"] - 8 for label in place_labels(boxes, ["nnnn", "狗狗狗狗", "n̈n̈n̈n̈"], 400, 400)
    )
    assert 1.5 * narrow < wide < 2.1 * narrow
    assert marked == narrow


def large(
    drawn: Path, folder: Path, base: int, novel: int, images: int, detected: int, regions: int
) -> dict[str, Any]:
    """The arguments for a run with many classes, in a few images under many ids.

    The first novel class has no AP, the last one no region; of the others, class n has n mod 11
    regions in ten that are right, on objects of its own. One file holds all pseudo-labels.

    Args:
        drawn: the folder of the images.
        folder: of the run.
        base: number of base classes.
        novel: number of novel classes.
        images: validation images, and training images.
        detected: detections per validation image.
        regions: pseudo-labels per novel class.
    """
    arguments = make_run(drawn, folder)
    splits = {"base": [f"base {n:04}" for n in range(base)]}
    splits["novel"] = [f"novel {n:03}" for n in range(novel)]
    names = [*splits["base"], *splits["novel"]]
    random = np.random.default_rng(7)
    categories = [{"id": n, "name": name} for n, name in enumerate(names)]
    for split, paths in (("train", ("train", "truth")), ("val", ("val",))):
        few = json.loads(arguments[split].read_text())["images"]
        listed = [few[n % len(few)] | {"id": n} for n in range(images)]
        content = {"images": listed, "annotations": [], "categories": categories}
        content["info"] = {"images": f"images/{split}"}
        for place, (image, number) in enumerate(
            (image, n) for image in range(images) for n in range(3)
        ):
            category = base + (image * 3 + number) % novel if number else image % base
            content["annotations"].append(_item(place, image, category, number))
        for path in paths:
            arguments[path].write_text(json.dumps(content))
    boxes = [[10, 10, 40, 40], [60, 60, 40, 40], [110, 20, 40, 20]]
    scores = np.sort(random.uniform(0.05, 1, (images, detected)).round(3))[:, ::-1].tolist()
    chosen = random.integers(len(names), size=(images, detected)).tolist()
    results = [
        {"image_id": i, "category_id": c, "bbox": boxes[n % 3], "score": s}
        for i in range(images)
        for n, (c, s) in enumerate(zip(chosen[i], scores[i], strict=True))
    ]
    arguments["detections"].write_text(json.dumps(results))
    truth = json.loads(arguments["truth"].read_text())
    own: dict[int, list[dict]] = {}
    for a in truth["annotations"]:
        own.setdefault(a["category_id"], []).append(a)
    labels = []
    for n, place in ((n, place) for n in range(novel - 1) for place in range(regions)):
        objects = own[base + n]
        label = dict(objects[place % len(objects)])
        if place % 10 >= n % 11:
            label |= {"image_id": (7 * place + n) % images, "bbox": [0, 120, 30, 30]}
        labels.append(label | {"cosine": 0.5 - place / 1e5, "id": place * novel + n})
    all_labels = folder / "pseudo_labels.json"
    all_labels.write_text(json.dumps(truth | {"annotations": labels}))
    edit(arguments["metrics"], lambda c: c.update(classes=splits, made_from={}))
    by_class = {
        name: round(float(random.uniform(0, 100)), 2) for name in names if name != "novel 000"
    }
    edit(arguments["metrics"], lambda c: c.update(per_class=by_class))
    return arguments | {"run": configured(classes=splits), "pseudo_labels": [all_labels]}


def _item(place: int, image_id: int, category_id: int, number: int) -> dict[str, Any]:
    box = [[10, 10, 40, 40], [60, 60, 40, 40], [110, 20, 40, 20]][number]
    item = {"id": place, "image_id": image_id, "category_id": category_id, "bbox": box}
    return item | {"area": box[2] * box[3], "iscrowd": 0}


@pytest.fixture(scope="module")
def many(drawn, tmp_path_factory) -> dict[str, Any]:
    """A run of 300 classes, a third of them novel; its arguments."""
    folder = tmp_path_factory.mktemp("many")
    return large(drawn, folder, base=200, novel=100, images=250, detected=40, regions=40)


@pytest.fixture(scope="module")
def page_of_many(many) -> Page:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "made_now", lambda gpu: MADE)
        return written(many)


def test_a_page_of_many_classes_is_small_and_lists_them_all(many, page_of_many):
    names = [*many["run"].classes.novel, *many["run"].classes.base]
    rows = [row for row in page_of_many.rows["classes"] if row[0] != "Class"]
    assert sorted(row[0] for row in rows) == sorted(names)
    # The first thirty of each split are in the open, the others in one fold.
    folds = [folds for s, tag, folds in page_of_many.folded if (s, tag) == ("classes", "tr")]
    assert folds == [0] * 31 + [1] * 71 + [0] * 31 + [1] * 171
    images = [section for section, tag, _ in page_of_many.tags if tag == "image"]
    assert images.count("retrieved") <= 300
    assert images.count("detections") <= 4 + 12
    content = many["output"].read_text()
    assert len(content) < 5e6
    section = re.search(r'<section id="classes">.*?</section>', content, re.DOTALL)[0]
    assert len(section) < 400 * len(names)  # half a megabyte for 1,203 classes


def test_the_table_of_many_classes_counts_regions_and_detections(many, page_of_many):
    table = page_of_many.table("classes")
    ids = {c["name"]: c["id"] for c in json.loads(many["val"].read_text())["categories"]}
    results = json.loads(many["detections"].read_text())
    for name, right in (("novel 003", "30"), ("novel 010", "100"), ("novel 011", "0")):
        own = [r for r in results if r["category_id"] == ids[name]]
        images = str(len({r["image_id"] for r in own}))
        best = f"{max(r['score'] for r in own):.2f}"
        assert table[name][4:] == ["40", right, images, best], name
    assert table["novel 000"][1] == "not measured"
    assert table["novel 099"][4:6] == ["0", "–"]
    assert len(table["base 0000"]) == 4


def test_pictures_of_many_classes_say_how_many_are_left_out(many, page_of_many):
    scenes = [
        a["aria-label"].partition("; annotated")[0]
        for s, t, a in page_of_many.tags
        if s == "detections" and "aria-label" in a
    ]
    drawn_classes = {name for scene in scenes for name in re.findall(r"novel \d{3}", scene)}
    assert 12 <= len(drawn_classes) < 100
    # With 10,000 detections of 300 classes, each is detected.
    left = 100 - len(drawn_classes)
    assert f"{left} more novel classes are detected" in page_of_many.texts["detections"]


def test_crops_of_many_classes_are_of_the_least_pure_and_the_purest(page_of_many):
    headings = [tag for section, tag, _ in page_of_many.tags if section == "retrieved"]
    assert (headings.count("h3"), headings.count("h4")) == (2, 18)
    # Class n has n mod 11 right regions in ten; the last class has none.
    numbers = sorted(range(99), key=lambda n: (n % 11, n))
    purest = sorted(range(99), key=lambda n: (-(n % 11), n))
    crops = {n: len(page_of_many.crops(f"novel {n:03}")) for n in range(100)}
    expected = {*numbers[:9], *purest[:9]}
    assert crops == {n: 15 if n in expected else 0 for n in range(100)}
    for words in ("the 9 least pure and the 9 purest", "3,960 regions of 99 classes"):
        assert words in page_of_many.texts["retrieved"]
    assert "none was retrieved for 1 other class" in page_of_many.texts["retrieved"]
    assert "the median class is 50 % pure" in page_of_many.texts["retrieved"]


def test_many_classes_without_validation_split_or_regions(many, tmp_path):
    page = written(
        many | {"output": tmp_path / "report.html"},
        metrics=None, detections=None, val=None, pseudo_labels=[],
    )  # fmt: skip
    assert page.table("classes")["novel 050"] == [page.table("classes")["novel 050"][0]]
    assert [a["aria-sort"] for _, _, a in page.tags if "aria-sort" in a] == ["ascending"] * 4
    assert "No region was retrieved for any of the 100 classes" in page.texts["retrieved"]


def test_no_image_is_decoded_twice_for_crops(many, tmp_path, monkeypatch):
    loaded, load = [], CocoDataset.load

    def counted(data: CocoDataset, image_id: int) -> np.ndarray:
        loaded.append(image_id)
        return load(data, image_id)

    monkeypatch.setattr(CocoDataset, "load", counted)
    arguments = many | {"output": tmp_path / "report.html"}
    write_report(**arguments | {"metrics": None, "detections": None, "val": None})
    labels = json.loads(many["pseudo_labels"][0].read_text())["annotations"]
    least, purest = {200 + n for n in range(0, 99, 11)}, {200 + n for n in range(10, 99, 11)}
    best = [a for a in labels if a["category_id"] in least | purest and a["cosine"] > 0.5 - 14.5e-5]
    assert len(best) == 9 * 15 + 9 * 15
    assert sorted(loaded) == sorted({a["image_id"] for a in best})


def test_where_purity_is_unknown_the_most_similar_classes_have_crops():
    def judged(name: str, cosine: float, purity: float | None) -> dict[str, Any]:
        return {"name": name, "cosine": cosine, "purity": purity, "regions": [1]}

    unknown = [judged(f"u{n:02}", n / 100, None) for n in range(40)]
    known = [judged("k1", 0.1, 50.0), judged("k2", 0.2, 50.0), judged("k3", 0.3, 0.0)]
    groups = choose_classes([*unknown, *known], 30)
    names = {reason: [c["name"] for c in group] for reason, group in groups.items()}
    assert names == {
        "least pure": ["k3"],
        "purest": ["k2", "k1"],
        "most similar to their names": [f"u{n:02}" for n in range(39, 24, -1)],
    }
    assert choose_classes(unknown[:30], 30) == {"": unknown[:30]}


def test_five_classes_are_all_shown_in_full(drawn, tmp_path):
    run = large(drawn, tmp_path, base=5, novel=5, images=12, detected=10, regions=30)
    page = written(run)
    tags = [tag for section, tag, _ in page.tags if section in ("classes", "retrieved")]
    assert not {"details", "input", "button"} & set(tags)
    assert "script" not in {tag for _, tag, _ in page.tags}
    assert [len(page.crops(f"novel {n:03}")) for n in range(5)] == [24, 24, 24, 24, 0]
    assert page.rows["classes"][0] == ["Class", "Bar", "AP50", "Val", "Train"]
    for words in ("30 regions: 9 right, 0 badly placed, 21 wrong", "10 % pure", "30 % pure"):
        assert words in page.texts["retrieved"]
    scenes = " ".join(a.get("aria-label", "") for s, _, a in page.tags if s == "detections")
    assert all(f"novel {n:03}" in scenes for n in range(5))
    assert "more novel class" not in page.texts["detections"]


# Uses the tables as a reader would, and leaves what it sees as json in the page's title.
USE = """<script>addEventListener("load", () => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const section = document.getElementById("classes");
  const input = section.querySelector("input");
  const shown = () => all("tbody tr", section).filter(r => r.getClientRects().length);
  const names = () => shown().map(row => row.querySelector("bdi").textContent);
  const type = text => { input.value = text; input.dispatchEvent(new Event("input")); };
  const heads = all("table", section)[0].tHead.rows[0].cells;
  const head = name => [...heads].find(th => th.textContent === name);
  const press = name => {
    const button = head(name).querySelector("button");
    button.focus();
    if (document.activeElement === button) button.click();
  };
  const sorted = () => [...heads].map(th => th.getAttribute("aria-sort"));
  const status = () => section.querySelector("output").textContent;
  const seen = { rows: shown().length, status: status(), label: input.labels[0].textContent };
  seen.folds = all("details", section).length;
  seen.first = sorted();
  press("AP50");
  seen.rising = sorted();
  seen.lowest = names().slice(0, 2);
  seen.last = names()[99];
  press("Class");
  seen.by_name = names().slice(0, 2);
  press("Purity, %");
  press("Purity, %");
  seen.least_pure = names().slice(0, 2);
  type("  NOVEL 07");
  seen.matches = names().sort();
  seen.matching = status();
  seen.no_base = all(".none", section).map(p => p.hidden);
  type("quokka");
  seen.nothing = [names().length, status()];
  type("");
  seen.again = [names().length, status()];
  seen.reachable = all(".tall", section).every(e => e.tabIndex === 0 && e.ariaLabel);
  const root = document.documentElement;
  seen.overhang = root.scrollWidth - root.clientWidth;
  document.title = JSON.stringify(seen);
})</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_a_browser_sorts_and_searches_the_classes(many, page_of_many, tmp_path, width):
    install({"chromium": "chromium"})
    probed = tmp_path / "probed.html"
    probed.write_text(many["output"].read_text().replace("</body>", USE + "</body>"))
    by_class = json.loads(many["metrics"].read_text())["per_class"]
    novel = [f"novel {n:03}" for n in range(1, 100)]
    seen = in_browser(probed, tmp_path, width)
    best = [None, None, "descending", *[None] * 6]
    assert seen == {
        "rows": 300,
        "status": "300 classes",
        "label": "Search classes",
        "folds": 0,
        "first": best,
        "rising": [order and "ascending" for order in best],
        "lowest": sorted(novel, key=by_class.get)[:2],
        "last": "novel 000",  # not measured
        "by_name": ["novel 000", "novel 001"],
        "least_pure": ["novel 000", "novel 011"],
        "matches": [f"novel {n:03}" for n in range(70, 80)],
        "matching": "10 of 300 classes",
        "no_base": [True, False],
        "nothing": [0, "no class matches"],
        "again": [300, "300 classes"],
        "reachable": True,
        "overhang": 0,
    }


def in_browser(page: Path, folder: Path, width: int) -> dict[str, Any]:
    """What a page leaves as json in its title, in a browser of a width."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={folder / 'chromium'}", f"--window-size={width},2000"]
    options += ["--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    done = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(html.unescape(title[1]))


def test_facts_of_data_models_and_settings(run):
    changes = {
        "seed": 3,
        "evaluation": {"beta": 0.25},
        "backbone": {"architecture": "timm:resnet18"},
    }
    page = written(run, run=configured(**changes))
    text = page.texts["run"]
    # 8 images: 8 squares, 8 stars and 3 fish; of base classes the squares alone.
    assert "8, with 8 boxes of base and 11 of novel classes" in text
    assert "6, with 6 boxes of base and 9 of novel classes" in text
    for stated in (
        "the drawn miniature world (nuisance 0.5, nested 0.8, distractors 0)",
        "200, to choose settings on, never reported",
        "2 base, 2 novel",
        "resources/small_clip/architecture.json, weights resources/small_clip/weights.safetensors",
        "timm:resnet18, started from random weights",
        "the 5 of 6 validation images in which one of these classes is annotated (OV-COCO's",
        "0.01235",
    ):
        assert stated in text, stated
    assert page.table("run") == {
        "Key": ["Value", "Default"],
        "seed": ["3", "0"],
        "backbone.architecture": ['"timm:resnet18"', '"small"'],
        "evaluation.beta": ["0.25", "0.8"],
        "report.images": ["4", "12"],
    }
    assert "one run, seed 3, on Abacus" in page.texts["header"]
    assert "4 settings differ from the defaults" in text


def test_crowds_are_not_counted(run):
    edit(run["val"], lambda c: c["annotations"][0].update(iscrowd=1))
    edit(run["metrics"], lambda c: c.update(made_from={"dataset": sha256(run["val"])}))
    assert written(run).table("classes")["square"][2] == "5"


def test_paths_of_the_users_files_are_stated(run):
    coco = {"root": "/data/犬", "train_images": "a", "train_annotations": "a.json"}
    coco |= {"val_images": None, "val_annotations": None}
    page = written(
        run,
        run=configured(dataset={"source": "coco", "coco": coco, "miniature": {"train_images": 7}}),
        metrics=None,
        detections=None,
        val=None,
    )
    assert "/data/犬/a, /data/犬/a.json" in page.texts["run"]
    assert "Validation" not in page.texts["run"]
    assert page.table("run")["dataset.coco.root"] == ['"/data/犬"', "null"]
    assert "dataset.miniature.train_images" not in page.table("run")
    assert "knows drawn pictograms alone" in page.texts["run"]


def test_prompts_are_shown_with_their_classes(run):
    novel = ["star", {"name": "fish", "prompt": "a cod"}]
    page = written(run, run=configured(classes={"base": BASE, "novel": novel}))
    assert "prompt: a cod" in page.texts["classes"]


def test_the_making_of_the_page_is_stated_once(page, run):
    text = page.texts["made"]
    for stated in (MADE.date, "commit c0ffee", MADE.machine, "lpovod 9.8.7"):
        assert stated in text
    assert run["output"].read_text().count(MADE.date) == 1


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_code_and_changes_are_said(tmp_path):
    package = tmp_path / "lpovod"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(package) is None  # outside git
    git(tmp_path, "init", "-q")
    assert commit_of(package) is None  # in somebody's repository that does not hold the code
    git(tmp_path, "add", "lpovod")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(package) == commit
    (tmp_path / "mine.yaml").write_text("seed: 1\n")  # a configuration is no code
    assert commit_of(package) == commit
    (package / "new.py").write_text("")
    assert commit_of(package) == f"{commit}, with changes"


def test_machine_and_versions_are_of_this_machine():
    made = made_now(gpu=False)
    assert made.versions["numpy"] == np.__version__
    cores = len(os.sched_getaffinity(0))
    assert re.search(rf"\S, {cores} cores?$", made.machine)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d [+-]\d{4}", made.date)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def keep_images(content: dict, count: int) -> dict:
    images = content["images"][:count]
    kept = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in kept]
    return content | {"images": images, "annotations": annotations}


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (
            "metrics",
            lambda c: c["rows"].pop("full") and None,
            ["metrics.json", "rows.full", "--forcerun"],
        ),
        (
            "metrics",
            lambda c: c["classes"]["novel"].pop() and None,
            ["other classes", "--forcerun"],
        ),
        ("metrics", lambda c: c["made_from"].update(dataset="0" * 64), ["val.json", "--forcerun"]),
        ("detections", lambda c: c[3].update(image_id=5), ["detection 3", "has no image 5"]),
        ("detections", lambda c: c[2].pop("bbox") and None, ["detection 2", "bbox"]),
        ("star", lambda c: c["annotations"][0].pop("cosine") and None, ["star.json", "no cosine"]),
        ("star", lambda c: c["info"]["identity"]["inputs"].clear(), ["star.json", "--forcerun"]),
        ("truth", lambda c: keep_images(c, 1), ["train_all_classes.json has no image"]),
        ("train", lambda c: keep_images(c, 1), ["train.json", "--forcerun", "star.json"]),
    ],
)
def test_contradictions_are_named(run, name, damage, words):
    path = run["pseudo_labels"][0] if name == "star" else run[name]
    edit(path, damage)
    if name == "truth":  # the annotation that tells is of an image that a region is not of
        one = json.loads(run["train"].read_text())
        edit(
            path, lambda c: c | {"images": one["images"][:1], "annotations": one["annotations"][:3]}
        )
    with pytest.raises(LpovodError) as error:
        write_report(**run)
    for word in words:
        assert word in str(error.value)
    assert not run["output"].exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{broken", "line 2 is not an epoch's json"),
        ('{"epoch": 2, "box": 1}', "line 2 lacks the epoch or has other losses"),
    ],
)
def test_a_broken_history_is_named(run, line, words):
    with run["proposals_history"].open("w") as file:
        file.write('{"epoch": 1, "box": 3.0, "objectness": 1.0}\n' + line)
    with pytest.raises(LpovodError, match=f"proposals.jsonl: {words}"):
        write_report(**run)


@pytest.mark.parametrize("text", ["a\tb\n1\t2\n", HEADER + "1\t2\n", "s\tmax_rss\nsoon\t1\n"])
def test_a_file_that_is_no_benchmark_is_named(tmp_path, text):
    (tmp_path / "odd.tsv").write_text(text)
    with pytest.raises(LpovodError, match=r"odd\.tsv is no benchmark"):
        stage_times(tmp_path)


def test_chosen_images_spread_over_the_classes(drawn):
    data = read_dataset(drawn / "dataset" / "val.json")
    chosen = choose_images(data, BASE, NOVEL, 4)
    first = list(data.images)
    assert chosen == first[:4]  # three with star and fish, then one with a star
    assert choose_images(data, BASE, ["fish"], 9) == first[:3]
    assert choose_images(data, BASE, ["ring"], 9) == []


def test_every_detected_novel_class_is_in_a_picture(drawn):
    """Against a plain reading of the rule, on random detections."""
    data = read_dataset(drawn / "dataset" / "val.json")
    names = [f"class {n}" for n in range(12)]
    data = data.of_classes(BASE, [*NOVEL, *names])
    ids = dict(zip(names, data.category_ids(names), strict=True))
    random = np.random.default_rng(5)
    by_image = {}
    for image_id in data.images:
        drawn_classes = random.choice([*names, "square"], 20)
        results = [
            {
                "image_id": image_id,
                "category_id": ids.get(name, data.category_ids(["square"])[0]),
                "bbox": [0, 0, 9, 9],
                "score": float(random.uniform(0.05, 0.2 if name in ids else 1)),
            }
            for name in drawn_classes
        ]
        by_image[image_id] = sorted(results, key=lambda r: -r["score"])
    scenes = choose_scenes(data, by_image, BASE, [*NOVEL, *names], 2)
    assert [s.image_id for s in scenes[:2]] == choose_images(data, BASE, NOVEL, 2)
    assert len({s.image_id for s in scenes}) == len(scenes)
    shown = {r["category_id"] for scene in scenes for r in scene.results}
    assert shown >= set(ids.values())
    for name, scene in ((n, s) for s in scenes for n in s.chosen_for):
        best = max(
            (r for results in by_image.values() for r in results if r["category_id"] == ids[name]),
            key=lambda r: r["score"],
        )
        assert any(r is best for r in scene.results)
        assert scene.image_id == best["image_id"]
    again = choose_scenes(data, dict(reversed(by_image.items())), BASE, [*NOVEL, *names], 2)
    assert again == scenes


def test_without_novel_annotations_pictures_are_filled_by_detections(drawn):
    data = read_dataset(drawn / "dataset" / "val.json").of_classes(BASE, ["ring"])
    ring = data.category_ids(["ring"])[0]
    scores = dict(zip(data.images, (0.1, 0.6, 0.3, 0.5, 0.2), strict=False))
    by_image = {
        i: [{"image_id": i, "category_id": ring, "bbox": [0, 0, 9, 9], "score": score}]
        for i, score in scores.items()
    }
    scenes = choose_scenes(data, by_image, BASE, ["ring"], 3)
    images = list(data.images)
    assert [s.image_id for s in scenes] == [images[1], images[3], images[2]]


def test_a_class_that_nobody_annotated_shows_its_best_even_if_a_picture_has_it(drawn):
    """Equal scores: the image with the smaller id comes first, in whatever order they are read."""
    data = read_dataset(drawn / "dataset" / "val.json").of_classes(BASE, ["star", "ring"])
    ring, images = data.category_ids(["ring"])[0], sorted(data.images)
    selected = choose_images(data, BASE, ["star"], 1)
    scores = dict.fromkeys(images, 0.5) | dict.fromkeys(selected, 0.1)
    by_image = {
        i: [{"image_id": i, "category_id": ring, "bbox": [0, 0, 9, 9], "score": scores[i]}]
        for i in reversed(images)
    }
    scenes = choose_scenes(data, by_image, BASE, ["star", "ring"], 1)
    best = next(i for i in images if i not in selected)
    assert [(s.image_id, s.chosen_for) for s in scenes] == [(*selected, []), (best, ["ring"])]


def test_labels_avoid_one_another_and_stay_inside():
    boxes = [[0, 0, 60, 60], [0, 0, 60, 60], [350, 290, 60, 30], [345, 280, 60, 30]]
    labels = place_labels(boxes, ["star 0.90"] * 4, 400, 300)
    rectangles = np.array([[p["x"], p["y"], p["x"] + p["width"], p["y"] + 15] for p in labels])
    assert (rectangles[:, :2] >= 0).all() and (rectangles[:, 2:] <= [400, 300]).all()
    for number, a in enumerate(rectangles):
        for b in rectangles[:number]:
            assert (np.minimum(a[2:], b[2:]) <= np.maximum(a[:2], b[:2])).any()


def test_numbers_read_well():
    assert [signed(v) for v in (2.04, -2.06, -0.04, None)] == ["+2.0", "−2.1", "0.0", "–"]
    assert [duration(v) for v in (0.04, 9.96, 59.7, 192, 7500)] == [
        "0.0 s",
        "10 s",
        "1 min 00 s",
        "3 min 12 s",
        "2 h 05 min",
    ]


def test_torch_is_not_imported():
    code = "import sys, lpovod.stages.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
