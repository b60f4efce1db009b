"""Every kind of finding on generated files, the page, and what skipping leaves out."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.stages.check import check, files
from lpovod.stages.check.findings import KINDS, OF_IMAGES

WIDTH, HEIGHT = 60, 40
COCO_TINY = Path("../shared/data/coco_tiny")


class World:
    """Six images in train and three in val, each with a cat and a dog, in folders and json files.

    Attributes:
        folder: with train/, val/, train.json and val.json.
        train: content of the json.
        val: the same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.train, self.val = self._split("train", 6), self._split("val", 3)
        self.arguments: dict[str, Any] = {}

    def _split(self, split: str, count: int) -> dict[str, Any]:
        (self.folder / split).mkdir()
        for number in range(count):
            self.draw(split, f"{number}.png")
        images = [
            {"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT}
            for n in range(count)
        ]
        annotations = [
            {"id": 10 * n + c, "image_id": n, "category_id": c, "bbox": [30 - 20 * c, 5, 12, 9 + n]}
            for n in range(count)
            for c in (0, 1)
        ]
        categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        return {"images": images, "annotations": annotations, "categories": categories}

    def draw(self, split: str, name: str, size: tuple[int, int] = (WIDTH, HEIGHT), **options):
        """Write an image that no other resembles."""
        seed = sum(map(ord, f"{split}{name}"))
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        path = self.folder / split / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path, **options)

    def turn(self, number: int, orientation: int, size: tuple[int, int]) -> None:
        """Make an image of train one that EXIF turns; `size` is what the json states."""
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        self.draw("train", f"{number}.png", exif=exif)
        self.train["images"][number].update(width=size[0], height=size[1])
        self.train["annotations"] = [a for a in self.train["annotations"] if a["image_id"] > number]

    def check(self, **changes: Any) -> dict[str, Any]:
        """Run the stage; return its json."""
        for split in ("train", "val"):
            text = json.dumps(getattr(self, split))
            (self.folder / f"{split}.json").write_text(text)
        arguments = {
            "train_images": self.folder / "train",
            "train_annotations": self.folder / "train.json",
            "val_images": self.folder / "val",
            "val_annotations": self.folder / "val.json",
            "base": ["cat"],
            "novel": ["dog"],
            "bad_images": "fail",
            "workers": 1,
            "key": "of these data",
            "output": self.folder / "check" / "check.json",
            "page": self.folder / "check" / "check.html",
        }
        arguments |= self.arguments | changes
        check(**arguments)
        return read_json(arguments["output"])


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


def a(world: World, number: int = 0) -> dict[str, Any]:
    return world.train["annotations"][number]


def image(world: World, number: int = 0) -> dict[str, Any]:
    return world.train["images"][number]


def put(item: dict[str, Any], **values: Any) -> None:
    item.update(values)


def each_box(world: World, change: Callable[[list[float]], list[float]]) -> None:
    for annotation in world.train["annotations"]:
        annotation["bbox"] = change(annotation["bbox"])


def shorten(world: World, name: str, kept: float) -> None:
    path = world.folder / "train" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])


def copy(world: World, number: int, place: int) -> None:
    target = world.folder / "val" / f"{place}.png"
    shutil.copy(world.folder / "train" / f"{number}.png", target)


def without(world: World, split: str, category: int) -> None:
    content = getattr(world, split)
    content["annotations"] = [o for o in content["annotations"] if o["category_id"] != category]


def as_xyxy(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def as_jpeg(world: World, kept: float = 1) -> None:
    world.draw("train", "0.jpg")
    image(world)["file_name"] = "0.jpg"
    shorten(world, "0.jpg", kept)


def array(world: World, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(world.folder / "train" / "0.tif")
    image(world)["file_name"] = "0.tif"


SPOILED: list[tuple[str, Callable[[World], Any], str, dict[str, int], str]] = [
    # kind, what is done, number by split, the first example
    ("json", lambda w: w.train.pop("annotations"), {"train": 1}, "no list 'annotations'"),
    ("json", lambda w: setattr(w, "val", [1]), {"val": 1}, "val.json has no list 'images'"),
    ("folder", lambda w: shutil.rmtree(w.folder / "val"), {"val": 1}, "dataset.coco.val_images"),
    ("item", lambda w: w.train["images"].append("x"), {"train": 1}, "number 7: 'x' is not an obj"),
    ("item", lambda w: image(w).pop("width"), {"train": 1}, "image 0: width is missing"),
    ("item", lambda w: put(image(w), width="60"), {"train": 1}, "image 0: width '60' is not a n"),
    ("item", lambda w: put(image(w), width=0), {"train": 1}, "image 0: 0 x 40 is not a size"),
    ("item", lambda w: put(image(w), file_name=7), {"train": 1}, "file_name 7 is not a path"),
    ("item", lambda w: a(w).pop("bbox"), {"train": 1}, "annotation 0: bbox is missing"),
    ("item", lambda w: put(a(w), image_id=None), {"train": 1}, "image_id None is not an integer"),
    ("item", lambda w: put(a(w), category_id=[0]), {"train": 1}, "category_id .0. is not an int"),
    ("string_ids", lambda w: put(a(w, 1), id="x"), {"train": 1}, "annotation 'x': id 'x'"),
    ("string_ids", lambda w: put(a(w), image_id="0"), {"train": 1}, "annotation 0: image_id '0'"),
    ("duplicate_id", lambda w: put(a(w), id=1), {"train": 1}, "annotation id 1"),
    ("duplicate_id", lambda w: w.val["images"].append(w.val["images"][0]), {"val": 1}, "image id"),
    ("duplicate_name", lambda w: w.train["categories"].append({"id": 2, "name": "dog"}),
     {"train": 1}, "category 2 is named 'dog' too"),
    ("file_name", lambda w: put(image(w), file_name="../val/0.png"), {"train": 1}, "../val/0.png"),
    ("file_name", lambda w: put(image(w), file_name="/a/0.png"), {"train": 1}, "/a/0.png"),
    ("file_name", lambda w: put(image(w), file_name="C:\\a\\0.png"), {"train": 1}, "image 0: 'C:"),
    ("unknown_image", lambda w: put(a(w), image_id=99), {"train": 1}, "annotation 0: image_id 99"),
    ("unknown_category", lambda w: put(a(w), category_id=9), {"train": 1}, "0: category_id 9"),
    ("missing", lambda w: put(image(w), file_name="x.png"), {"train": 1}, "x.png: no such file$"),
    ("missing", lambda w: put(image(w), file_name="images\\0.png"), {"train": 1}, "0.png is there"),
    ("missing", lambda w: put(image(w), file_name="0.PNG"), {"train": 1}, "; 0.png is there"),
    ("missing", lambda w: put(image(w), file_name="0.jpeg"), {"train": 1}, "; 0.png is there"),
    ("not_an_image", lambda w: (w.folder / "train/0.png").write_text("<html>"), {"train": 1},
     "image 0: .*0.png cannot be decoded .no image format"),
    ("not_an_image", lambda w: (w.folder / "train/0.png").write_bytes(b""), {"train": 1}, "empty"),
    ("damaged", lambda w: shorten(w, "0.png", 0.6), {"train": 1}, "0.png cannot be decoded"),
    ("damaged", lambda w: as_jpeg(w, 0.7), {"train": 1}, "0.jpg cannot be decoded"),
    ("depth", lambda w: array(w, np.zeros((HEIGHT, WIDTH), np.float32)), {"train": 1}, "floating"),
    ("size", lambda w: put(image(w), width=WIDTH + 1), {"train": 1}, "60 x 40 pixels.* 61 x 40"),
    ("swapped", lambda w: put(image(w), width=HEIGHT, height=WIDTH), {"train": 1}, "40 x 60"),
    ("box_form", lambda w: put(a(w), bbox=["1", "2", "3", "4"]), {"train": 1}, "'1', '2', '3'"),
    ("box_form", lambda w: put(a(w), bbox=[1, 2, 3]), {"train": 1}, "bbox .1, 2, 3."),
    ("box_form", lambda w: put(a(w), bbox={"x": 1}), {"train": 1}, "0.png.: bbox .'x': 1."),
    ("box_form", lambda w: put(a(w), bbox=None), {"train": 1}, "bbox None"),
    ("box_form", lambda w: put(a(w), bbox=[1, 2, float("nan"), 4]), {"train": 1}, "nan"),
    ("box_form", lambda w: put(a(w), bbox=[1, 2, float("inf"), 4]), {"train": 1}, "inf"),
    ("box_negative", lambda w: put(a(w), bbox=[9, 9, -4, 4]), {"train": 1}, "bbox .9, 9, -4, 4."),
    ("normalised", lambda w: each_box(w, lambda b: [b[0] / 60, b[1] / 40, b[2] / 60, b[3] / 40]),
     {"train": 12}, "bbox .0.5, 0.125, 0.2, .*the image is 60 x 40"),
    ("xyxy", lambda w: each_box(w, as_xyxy), {"train": 6}, "bbox .30, 5, 42, 14."),
    ("outside", lambda w: put(a(w), bbox=[90, 5, 5, 5]), {"train": 1}, "bbox .90, 5, 5, 5."),
    ("class_without_box", lambda w: without(w, "train", 0), {"train": 1}, "'cat' has no usable"),
    ("class_without_box", lambda w: put(w.arguments, base=["cat", "cow"]), {"train": 1}, "cow"),
    ("named_differently", lambda w: put(w.val["categories"][0], name="Cats"), {"": 1},
     "'Cats' and 'cat'"),
    ("named_differently", lambda w: put(w.arguments, novel=["dog", "do g"]), {"": 1}, "do g"),
    ("same_split", lambda w: put(w.arguments, val_annotations=w.folder / "train.json",
                                 val_images=w.folder / "train"), {"val": 1}, "the json of both"),
    ("same_split", lambda w: [copy(w, n, n) for n in range(3)], {"val": 1}, "all 3 images are in"),
    ("no_image", lambda w: w.val.update(images=[], annotations=[]), {"val": 1}, "val.json"),
    ("beyond", lambda w: put(a(w), bbox=[50, 30, 12, 9]), {"train": 1}, "bbox .50, 30, 12, 9."),
    ("beyond", lambda w: put(a(w), bbox=[-2, 30, 12, 9]), {"train": 1}, "bbox .-2, 30, 12, 9."),
    ("thin", lambda w: put(a(w), bbox=[5, 5, 0.5, 9]), {"train": 1}, "bbox .5, 5, 0.5, 9."),
    ("thin", lambda w: put(a(w), bbox=[5, 5, 0, 0]), {"train": 1}, "bbox .5, 5, 0, 0."),
    ("turned_displayed", lambda w: w.turn(0, 6, (HEIGHT, WIDTH)), {"train": 1},
     "image 0 .0.png.: stored as 60 x 40, displayed as 40 x 60"),
    ("turned_stored", lambda w: w.turn(0, 8, (WIDTH, HEIGHT)), {"train": 1}, "as 40 x 60"),
    ("turned_either", lambda w: w.turn(0, 3, (WIDTH, HEIGHT)), {"train": 1}, "as 60 x 40"),
    ("deep", lambda w: array(w, np.zeros((HEIGHT, WIDTH), np.uint16)), {"train": 1}, "16 bits"),
    ("alpha", lambda w: array(w, np.zeros((HEIGHT, WIDTH, 4), np.uint8)), {"train": 1}, "0.tif"),
    ("duplicate_file", lambda w: put(image(w, 1), file_name="0.png"), {"train": 1},
     "0.png: images 0 and 1"),
    ("duplicate_annotation", lambda w: w.train["annotations"].append(a(w) | {"id": 77}),
     {"train": 1}, "annotation 77 of image 0"),
    ("leak", lambda w: copy(w, 4, 1), {"val": 1}, r"image 1 \(1.png\) is image 4 \(4.png\) of t"),
    ("not_measured", lambda w: without(w, "val", 1), {"val": 1}, "'dog'"),
    ("not_measured", lambda w: put(w.arguments, novel=["dog", "狗"]), {"val": 1}, "'狗'"),
    ("named_nearly", lambda w: (w.train["categories"].append({"id": 7, "name": "motorcycle"}),
                                w.val["categories"].append({"id": 7, "name": "motorcyclo"})),
     {"": 1}, "'motorcycle' in train, 'motorcyclo' in val"),
    ("named_nearly", lambda w: w.train["categories"].append({"id": 7, "name": "hot dog"})
     or w.val["categories"].append({"id": 7, "name": "hotdog"}), {"": 1}, "'hot dog' and"),
    ("other_id", lambda w: [put(c, id=1 - c["id"]) for c in w.val["categories"]], {"": 2},
     "category 0 is 'cat' in train, 'dog' in val"),
]  # fmt: skip


def test_every_kind_has_a_case():
    # One would need an image of 180 million pixels; tests/test_images.py has it.
    assert {kind for kind, *_ in SPOILED} == set(KINDS) - {"too_large"}


def test_good_data_have_no_findings(world):
    content = world.check()
    assert content["findings"] == []
    assert content["bad_images"] == {"train": [], "val": []}
    assert content["counts"]["train"] == {"images": 6, "annotations": 12}
    assert content["key"] == "of these data"


@pytest.mark.parametrize(("kind", "spoil", "counts", "text"), SPOILED)
def test_it_is_found(world, kind, spoil, counts, text, capfd):
    spoil(world)
    page = world.folder / "check" / "check.html"
    if KINDS[kind].error:
        with pytest.raises(LpovodError) as error:
            world.check()
        message = str(error.value)
        assert str(page) in message and not (world.folder / "check/check.json").exists()
        line = next(line for line in message.splitlines() if KINDS[kind].title in line)
        first = line.partition("): ")[2]
        where = ", ".join(f"{n} in {split}" if split else str(n) for split, n in counts.items())
        assert f"({where})" in line
    else:
        findings = {f["kind"]: f for f in world.check()["findings"]}
        assert findings[kind]["counts"] == counts
        assert {f["level"] for f in findings.values()} == {"warning"}
        first = findings[kind]["examples"][0]
    assert re.search(text, first), first
    assert f'id="{kind}"' in page.read_text()


def test_everything_is_found_at_once(world):
    """Errors of annotations, classes and images of both splits, and the warnings beside them."""
    put(a(world), bbox=[1, 2, -3, 4])
    put(a(world, 2), bbox=[5, 5, 0.5, 9])
    put(image(world, 3), width=61)
    world.val["images"][0]["file_name"] = "gone.png"
    world.arguments["base"] = ["cat", "cow"]
    with pytest.raises(LpovodError) as error:
        world.check()
    lines = str(error.value).splitlines()
    titles = [KINDS[k].title for k in ("missing", "size", "box_negative", "class_without_box")]
    assert [line.split(" (")[0].strip() for line in lines[1:-1]] == titles
    page = (world.folder / "check/check.html").read_text()
    assert KINDS["thin"].title in page and KINDS["not_measured"].title in page


def test_only_the_first_few_are_listed_but_all_are_counted(world):
    for annotation in world.train["annotations"]:
        annotation["bbox"][2] = 0
    world.arguments["base"] = []  # without boxes to learn from it would be an error
    finding = next(f for f in world.check()["findings"] if f["kind"] == "thin")
    assert finding["counts"] == {"train": 12}
    assert len(finding["examples"]) == 5


def test_crowds_and_boxes_rounded_at_the_edge_are_fine(world):
    put(a(world), bbox=[49, 5, 11.8, 9])
    put(a(world, 1), bbox=[5, 5, 9, 0], iscrowd=1)
    assert world.check()["findings"] == []


def test_a_file_with_something_behind_its_end_is_fine(world):
    """Phones append films and depth maps to their JPEGs."""
    as_jpeg(world)
    with open(world.folder / "train/0.jpg", "ab") as file:
        file.write(b"more" * 1000)
    assert world.check()["findings"] == []


def test_errors_remove_the_json_of_earlier_data(world):
    world.check()
    put(image(world), width=61)
    with pytest.raises(LpovodError):
        world.check()
    assert [p.name for p in (world.folder / "check").iterdir()] == ["check.html"]


def test_no_val_split_is_no_finding(world):
    content = world.check(val_images=None, val_annotations=None)
    assert content["findings"] == [] and list(content["counts"]) == ["train"]


def spoil_images(world: World) -> None:
    shorten(world, "1.png", 0.6)
    (world.folder / "train/3.png").unlink()
    world.draw("val", "0.png", size=(WIDTH, HEIGHT + 1))
    # The end is there, and the middle is not.
    path = world.folder / "val/2.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_skipping_leaves_out_what_cannot_be_decoded(world):
    spoil_images(world)
    content = world.check(bad_images="skip")
    assert {f["level"] for f in content["findings"]} == {"warning"}
    bad = {}
    for split in ("train", "val"):
        (world.folder / "images").mkdir(exist_ok=True)
        (world.folder / "images" / split).symlink_to(world.folder / split)
        data = read_dataset(world.folder / f"{split}.json")
        bad[split] = []
        for image_id in data.images:
            try:
                data.load(image_id)
            except LpovodError:
                bad[split].append(image_id)
    assert content["bad_images"] == bad == {"train": [1, 3], "val": [0, 2]}


def test_all_images_bad_is_an_error_even_with_skip(world):
    for number in range(3):
        (world.folder / f"val/{number}.png").write_text("")
    with pytest.raises(LpovodError, match="without a usable image .1 in val"):
        world.check(bad_images="skip")


def test_several_processes_find_the_same(world, monkeypatch):
    spoil_images(world)
    alone = world.check(bad_images="skip")
    monkeypatch.setattr(files, "CHUNK", 1)
    assert world.check(bad_images="skip", workers=2) == alone


class Addresses(HTMLParser):
    """Everything that a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]


def test_the_page_loads_nothing_and_shows_boxes(world):
    put(a(world), bbox=[50, 30, 12, 9])
    put(a(world, 2), bbox=[5, 5, 0.5, 9])
    image(world, 5)["file_name"] = "<u>&.png"
    world.draw("train", "<u>&.png")
    put(a(world, 11), bbox=[5, 5, 0.25, 9])
    world.check()
    text = (world.folder / "check/check.html").read_text()
    page = Addresses(text)
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert "url(" not in text and "@import" not in text and "script" not in page.tags
    assert "<u>" not in text and "&lt;u&gt;&amp;.png" in text
    assert '<rect class="wrong" x="50" y="30" width="12" height="9"' in text


def test_the_box_that_was_meant_is_drawn_too(world):
    each_box(world, as_xyxy)
    with pytest.raises(LpovodError):
        world.check()
    text = (world.folder / "check/check.html").read_text()
    for drawn in ('wrong" x="30" y="5" width="42" height="14"',
                  'right" x="30" y="5" width="12" height="9"'):  # fmt: skip
        assert f'<rect class="{drawn}' in text


def test_the_program_ends_with_the_findings(world):
    """The command line of the rule: exit code 1, no traceback, the page's name at the end."""
    put(image(world), width=61)
    with pytest.raises(LpovodError):
        world.check()
    folder = world.folder
    command = [sys.executable, "-m", "workflow_scripts.check"]
    command += ["--train-images", folder / "train", "--train-annotations", folder / "train.json"]
    command += ["--val-images", folder / "val", "--val-annotations", folder / "val.json"]
    command += [
        "--base",
        "cat",
        "--novel",
        "dog",
        "--bad-images",
        "fail",
        "--workers",
        "2",
        "--key",
        "x",
    ]
    command += ["--output", folder / "check.json", "--page", folder / "check.html"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith(f"{folder}/check.html")
    done = subprocess.run([*command, "--bad-images", "skip"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_json(folder / "check.json")["bad_images"]["train"] == [0]


@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs the COCO photographs")
def test_real_photographs_have_no_errors(tmp_path):
    annotations = COCO_TINY / "annotations"
    names = [c["name"] for c in read_json(annotations / "instances_val2017.json")["categories"]]
    check(
        COCO_TINY / "train2017",
        annotations / "instances_train2017.json",
        ["person"],
        names[1:],
        "fail",
        1,
        "",
        tmp_path / "check.json",
        tmp_path / "check.html",
        COCO_TINY / "val2017",
        annotations / "instances_val2017.json",
    )
    found = {f["kind"] for f in read_json(tmp_path / "check.json")["findings"]}
    assert found <= {"thin", "not_measured", "beyond", "duplicate_annotation"}


# --- the strict reader


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.train["images"].append("x"), "image 'x' is not an object with an id"),
        (lambda w: put(image(w), id="0"), "image '0': id '0' is not an integer"),
        (lambda w: put(image(w), id=True), "image True: id True is not an integer"),
        (lambda w: put(image(w), height="40"), "image 0: height '40' is not a number of pixels"),
        (lambda w: put(image(w), file_name=None), "image 0: file_name None is not a path"),
        (lambda w: put(w.train["categories"][0], name=3), "category 0: name 3 is not a text"),
        (lambda w: put(a(w), image_id="0"), "annotation 0: image_id '0' is not an integer"),
        (lambda w: put(a(w), category_id=[0]), r"annotation 0: category_id \[0\] is not an int"),
        (lambda w: put(a(w), bbox="1 2 3 4"), "annotation 0: bbox '1 2 3 4' is not a list"),
        (lambda w: put(a(w), bbox=["1", "2", "3", "4"]), r"annotation 0: bbox \['1', .* is not"),
        (lambda w: put(a(w), bbox=[1, 2, [3], 4]), "annotation 0: bbox .* is not"),
        (lambda w: put(a(w), bbox=[1, 2, None, 4]), "annotation 0: bbox .* is not"),
        (lambda w: put(a(w), bbox=[1, 2, 3]), "annotation 0: bbox .* is not"),
        (lambda w: put(a(w), bbox=[1, 2, float("nan"), 4]), "annotation 0: bbox .* is not"),
    ],
)
def test_the_reader_refuses_other_types(world, spoil, message):
    spoil(world)
    path = world.folder / "train.json"
    path.write_text(json.dumps(world.train))
    with pytest.raises(LpovodError, match=message):
        read_dataset(path)


def test_kinds_of_images_are_kinds_of_findings():
    assert set(KINDS) >= OF_IMAGES
