"""Adopting a folder: every format against boxes computed by hand, the split, the overlay."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from project import copy_project, keys_of, snakemake

from lpovod.apps.adopt import adopt, choose_val
from lpovod.apps.adopt.look import Content, look
from lpovod.catalogue import FILES, OPENAI_SAFETENSORS
from lpovod.config import load_config, merge
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.near_copies import groups

COCO_TINY = Path("../shared/data/coco_tiny").resolve()
SIZE = (80, 40)


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The workflow's folder, without results, and a folder `photos` beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("config.yaml", "configs", "resources"):
        (folder / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(folder)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def picture(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> Path:
    """An image with a few large patches of colour, different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def boxes(content: dict) -> dict[str, list[tuple[str, list[float]]]]:
    """By file name: class names and boxes, in order."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    files = {i["id"]: i["file_name"] for i in content["images"]}
    by_file: dict[str, list[tuple[str, list[float]]]] = {name: [] for name in files.values()}
    for a in content["annotations"]:
        by_file[files[a["image_id"]]].append((names[a["category_id"]], a["bbox"]))
    return by_file


def configured(overlay: str) -> object:
    """The configuration that an overlay gives, as Snakemake merges it."""
    content: dict = {}
    for path in ("config.yaml", "configs/photographs.yaml", overlay):
        content = merge(content, yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    return load_config(content, weights=False)


# Formats, on images of 80 x 40 pixels


def yolo(folder: Path, names: object) -> None:
    picture(folder / "images/train/a.png", 1)
    picture(folder / "images/train/sub/b c.png", 2)
    picture(folder / "images/val/d.png", 3)
    # Centre (40, 20), 20 x 10; a triangle; a box that leaves the image on the right.
    write(folder / "labels/train/a.txt", "0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.5 0.2 0.3 0.9\n")
    write(folder / "labels/train/sub/b c.txt", "1 0.95 0.5 0.2 1\n\n")
    write(folder / "labels/val/d.txt", "1 0.5 0.5 1 1\n")
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": names}
    write(folder / "data.yaml", yaml.safe_dump(content, allow_unicode=True))


YOLO_BOXES = {
    "a.png": [("red fox", [30, 15, 20, 10]), ("狗", [8, 4, 32, 32])],
    "sub/b c.png": [("狗", [68, 0, 12, 40])],
}


@pytest.mark.parametrize("names", [["red fox", "狗"], {1: "狗", 0: "red fox"}])
def test_yolo_s_boxes_and_polygons(photos, names):
    yolo(photos, names)
    found = look(photos, ())
    assert found.format == "YOLO" and not found.errors
    assert boxes(found.splits["train"].coco) == YOLO_BOXES
    assert boxes(found.splits["val"].coco) == {"d.png": [("狗", [0, 0, 80, 40])]}
    assert found.splits["train"].root == photos / "images/train"
    assert list(found.notes.values()) == [[str(photos / "images/train/sub/b c.png")]]


def test_yolo_s_lists_of_images_and_surplus_dots(photos):
    """An export's ``../train/images``, and a text file of paths."""
    picture(photos / "train/images/a.png")
    picture(photos / "other/e.png")
    write(photos / "train/labels/a.txt", "0 0.5 0.5 0.5 0.5")
    write(photos / "other/e.txt", "0 0.25 0.25 0.5 0.5")
    write(photos / "val.txt", "./other/e.png\n")
    write(photos / "data.yaml", "train: ../train/images\nval: val.txt\nnames: [fox]\n")
    found = look(photos, ())
    assert boxes(found.splits["train"].coco) == {"a.png": [("fox", [20, 10, 40, 20])]}
    assert boxes(found.splits["val"].coco) == {"e.png": [("fox", [0, 0, 40, 20])]}


def test_yolo_s_mistakes_are_listed_and_nothing_is_written(photos):
    yolo(photos, ["red fox", "狗"])
    write(photos / "labels/train/a.txt", "0 40 20 20 10\n7 .5 .5 .1 .1\nfox 1 1 1 1\n0 .5 .5 .1\n")
    with pytest.raises(LpovodError) as error:
        adopt(photos, novel=("cat",))
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    for line, words in zip(
        lines[1:], ("pixels", "no such class number", "not numbers", "4 numbers"), strict=True
    ):
        assert words in line
    assert [f"a.txt:{n}" in line for n, line in enumerate(lines)] == [False, True, True, True, True]
    assert not Path("photos.yaml").exists() and not Path("data").exists()


def test_a_val_folder_with_the_training_images_is_no_validation_split(photos):
    yolo(photos, ["fox", "dog"])
    write(photos / "data.yaml", "train: images/train\nval: images/train\nnames: [fox, dog]\n")
    found = look(photos, ())
    assert list(found.splits) == ["train"]
    assert any("images of another split" in kind for kind in found.notes)


OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def xml(path: Path, objects: str, size: tuple[int, int] = SIZE) -> None:
    width, height = size
    write(
        path,
        f"<annotation><filename>{path.stem}.png</filename><size><width>{width}</width>"
        f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>",
    )


def voc(folder: Path) -> None:
    for seed, name in enumerate(("a", "sub/b c", "d", "e")):
        picture(folder / f"JPEGImages/{name}.png", seed)
    # The whole image in VOC's numbers; a single pixel; one of difficult.
    xml(folder / "Annotations/a.xml", OBJECT.format("red fox", 0, 1, 1, 80, 40))
    xml(folder / "Annotations/sub/b c.xml", OBJECT.format("狗", 0, 11, 21, 11, 21))
    xml(folder / "Annotations/d.xml", OBJECT.format("狗", 1, 31, 11, 40, 20))
    write(folder / "ImageSets/Main/train.txt", "a\nsub/b c\n")
    write(folder / "ImageSets/Main/val.txt", "d\n")


def test_voc_s_pixels_are_counted_from_one(photos):
    voc(photos)
    found = look(photos, ())
    assert found.format == "Pascal VOC" and not found.errors
    assert boxes(found.splits["train"].coco) == {
        "a.png": [("red fox", [0, 0, 80, 40])],
        "sub/b c.png": [("狗", [10, 20, 1, 1])],
    }
    assert boxes(found.splits["val"].coco) == {"d.png": [("狗", [30, 10, 10, 10])]}
    assert [a["iscrowd"] for a in found.splits["val"].coco["annotations"]] == [1]
    (noted,) = found.notes.values()
    assert noted == [str(photos / "JPEGImages/e.png")]


def test_voc_s_stated_sizes_are_compared_with_the_images(photos):
    voc(photos)
    xml(photos / "Annotations/a.xml", OBJECT.format("fox", 0, 1, 1, 80, 40), size=(81, 40))
    (items,) = look(photos, ()).errors.values()
    assert items == [f"{photos}/JPEGImages/a.png (81 x 40, not 80 x 40)"]


def test_labelme_s_shapes(photos):
    picture(photos / "a.png")
    shapes = [
        {"label": "red fox", "shape_type": "rectangle", "points": [[30, 25], [10, 5]]},
        {"label": "狗", "shape_type": "circle", "points": [[40, 20], [43, 24]]},  # radius 5
        {"label": "狗", "points": [[0, 0], [20, 0], [10, 30]]},
        {"label": "eye", "shape_type": "point", "points": [[1, 1]]},
    ]
    content = {"version": "5", "imagePath": "a.png", "shapes": shapes, "imageData": None}
    write(photos / "a.json", json.dumps(content))
    found = look(photos, ())
    assert found.format == "LabelMe" and not found.errors
    assert boxes(found.splits["train"].coco) == {
        "a.png": [
            ("red fox", [10, 5, 20, 20]),
            ("狗", [35, 15, 10, 10]),
            ("狗", [0, 0, 20, 30]),
        ]
    }


def test_sizes_are_those_that_are_displayed(photos):
    yolo(photos, ["fox", "dog"])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", SIZE).save(photos / "images/val/d.png", exif=exif)
    (image,) = look(photos, ()).splits["val"].coco["images"]
    assert (image["width"], image["height"]) == SIZE[::-1]


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_unlabelled_images_are_searched_and_not_measured(photos, kind):
    """Only part of a folder is labelled; a label file without boxes says: no object."""
    for number in range(12):
        picture(photos / f"images/{number:02}.png", number)
    picture(photos / "masks/00.png", 50)
    for number in range(6):
        if kind == "yolo":
            line = "" if number == 5 else "0 0.5 0.5 0.5 0.5"
            write(photos / f"labels/{number:02}.txt", line)
            write(photos / "data.yaml", "train: images\nnames: [fox]\n")
        else:
            item = "" if number == 5 else OBJECT.format("fox", 0, 1, 1, 9, 9)
            xml(photos / f"{number:02}.xml", item)
    for seed in range(4):
        adopt(photos, novel=("cat",), val_fraction=0.5, seed=seed, overwrite=True)
        train, val = (
            {
                i["file_name"]
                for i in json.loads(Path(f"data/photos/{s}.json").read_text())["images"]
            }
            for s in ("train", "val")
        )
        assert len(val) == 3 and val < {f"{n:02}.png" for n in range(6)}
        assert train == {f"{n:02}.png" for n in range(12)} - val


# COCO


def coco_json(path: Path, files: list[str], first: int = 1) -> Path:
    images = [
        {"id": n, "file_name": name, "width": 80, "height": 40}
        for n, name in enumerate(files, first)
    ]
    annotations = [
        {"id": i["id"], "image_id": i["id"], "category_id": 1 + i["id"] % 2, "bbox": [8, 4, 32, 32]}
        for i in images
    ]
    categories = [{"id": 1, "name": "fox"}, {"id": 2, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return write(path, json.dumps(content))


@pytest.mark.parametrize("place", ["{}/_annotations.coco.json", "annotations/instances_{}.json"])
def test_images_of_equal_names_are_those_of_their_split(photos, place):
    for seed, split in enumerate(("train", "valid")):
        picture(photos / split / "1.png", seed)
        coco_json(photos / place.format(split), ["1.png"])
    found = look(photos, ())
    assert {split: content.root for split, content in found.splits.items()} == {
        "train": photos / "train",
        "val": photos / "valid",
    }


def test_coco_files_stay_where_they_are(photos):
    for number in range(4):
        picture(photos / f"images/{number}.png", number)
    coco_json(photos / "annotations/instances_train.json", ["0.png", "1.png"])
    coco_json(photos / "annotations/instances_val.json", ["2.png", "3.png"])
    adopt(photos, novel=("cat",))
    coco = configured("photos.yaml").dataset.coco
    assert coco.annotations("train") == photos / "annotations/instances_train.json"
    assert coco.images("val") == photos / "images"
    assert not Path("data").exists()


def test_several_annotation_files_are_a_question(photos):
    picture(photos / "1.png")
    first, second = (coco_json(photos / f"{name}.json", ["1.png"]) for name in ("one", "two"))
    with pytest.raises(UsageError, match="--labels TRAIN.json VAL.json") as error:
        look(photos, ())
    assert str(first) in str(error.value) and str(second) in str(error.value)
    assert look(photos, (second, first)).splits["train"].json == second
    assert list(look(photos, (first,)).splits) == ["train"]


def test_labels_in_several_formats_are_a_question(photos):
    yolo(photos, ["fox", "dog"])
    coco_json(photos / "coco.json", ["a.png"])
    with pytest.raises(UsageError, match=r"labels in 2 formats(.|\n)*--labels"):
        look(photos, ())
    assert look(photos, (photos / "coco.json",)).format == "COCO"
    assert look(photos, (photos / "data.yaml",)).format == "YOLO"


def test_missing_images_are_named(photos):
    picture(photos / "1.png")
    coco_json(photos / "all.json", ["1.png", "2.png"])
    with pytest.raises(LpovodError, match=r"1 images .* are missing .*: 2.png"):
        adopt(photos, novel=("cat",))
    coco_json(photos / "all.json", ["8.png"])
    with pytest.raises(LpovodError, match="none of the images"):
        look(photos, ())


# The same data in three formats


def as_yolo(source: Path, folder: Path) -> None:
    """COCO's layout as YOLO's, written without the library."""
    names: dict[int, str] = {}
    for split in ("train2017", "val2017"):
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        names = {n: c["name"] for n, c in enumerate(content["categories"])}
        numbers = {c["id"]: n for n, c in enumerate(content["categories"])}
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "images" / split).symlink_to(source / split)
        for image in content["images"]:
            lines = []
            for a in content["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    values = (
                        (x + w / 2) / image["width"],
                        (y + h / 2) / image["height"],
                        w / image["width"],
                        h / image["height"],
                    )
                    lines.append(f"{numbers[a['category_id']]} " + " ".join(map(str, values)))
            stem = Path(image["file_name"]).stem
            write(folder / f"labels/{split}/{stem}.txt", "\n".join(lines))
    splits = {"train": "images/train2017", "val": "images/val2017"}
    write(folder / "data.yaml", yaml.safe_dump({**splits, "names": names}))


def as_voc(source: Path, folder: Path) -> None:
    """COCO's layout as VOC's, written without the library; corners are rounded to pixels."""
    (folder / "JPEGImages").mkdir(parents=True)
    for split, listed in (("train2017", "train"), ("val2017", "val")):
        content = json.loads((source / f"annotations/instances_{split}.json").read_text())
        names = {c["id"]: c["name"] for c in content["categories"]}
        stems = []
        for image in content["images"]:
            objects = ""
            for a in content["annotations"]:
                if a["image_id"] == image["id"]:
                    x, y, w, h = a["bbox"]
                    corners = (round(x) + 1, round(y) + 1, round(x + w), round(y + h))
                    objects += OBJECT.format(names[a["category_id"]], a["iscrowd"], *corners)
            stems.append(Path(image["file_name"]).stem)
            size = (image["width"], image["height"])
            xml(folder / f"Annotations/{stems[-1]}.xml", objects, size)
            file = image["file_name"]
            (folder / "JPEGImages" / file).symlink_to(source / split / file)
        write(folder / f"ImageSets/Main/{listed}.txt", "\n".join(stems))


@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs the COCO photographs")
def test_coco_photographs_are_the_same_in_three_formats(tmp_path, capsys):
    as_yolo(COCO_TINY, tmp_path / "yolo")
    as_voc(COCO_TINY, tmp_path / "voc")
    classes = {}
    for name, folder in {"coco": COCO_TINY, **{n: tmp_path / n for n in ("yolo", "voc")}}.items():
        adopt(folder, novel=("unicycle", "cat"), name=name, cpu=True)
        config = configured(f"{name}.yaml")
        classes[name] = (sorted(config.classes.base), config.classes.novel)
        for split in ("train", "val"):
            original = json.loads(
                (COCO_TINY / f"annotations/instances_{split}2017.json").read_text()
            )
            ours = json.loads(config.dataset.coco.annotations(split).read_text())
            assert sum(map(len, boxes(ours).values())) == len(original["annotations"])
            for file, expected in boxes(original).items():
                for (a, box), (b, truth) in zip(boxes(ours)[file], expected, strict=True):
                    assert a == b and np.abs(np.subtract(box, truth)).max() <= 1.01
                    if name == "yolo":
                        assert np.abs(np.subtract(box, truth)).max() <= 0.02
    assert classes["coco"] == classes["yolo"] == classes["voc"]
    assert len(classes["coco"][0]) == 79 and "80 images, 705 boxes" in capsys.readouterr().out


# The split


def test_near_copies_are_found_and_others_are_not(tmp_path):
    first = picture(tmp_path / "first.png", 1, (640, 480))
    image = Image.open(first)
    image.resize((200, 150)).save(tmp_path / "small.png")
    image.save(tmp_path / "again.jpg", quality=40)
    exif = Image.Exif()
    exif[0x0112] = 8  # stored on its side, displayed upright
    image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.jpg", exif=exif)
    others = [picture(tmp_path / f"{n}.png", n, (640, 480)) for n in range(2, 30)]
    flat = []
    for value in (0, 100, 255):  # no edges at all: their difference hashes are equal
        flat.append(tmp_path / f"flat{value}.png")
        Image.new("RGB", (64, 48), (value, 0, 0)).save(flat[-1])
    broken = write(tmp_path / "broken.png", "no image")
    copies = [first, *(tmp_path / n for n in ("small.png", "again.jpg", "turned.jpg"))]
    paths = [others[0], *copies, *others[1:], *flat, broken]
    alone = [[place] for place in range(5, len(paths))]
    assert groups(paths) == [[0], [1, 2, 3, 4], *alone]


def contents(folder: Path, count: int, categories: list[int]) -> Content:
    """Images of which every second one is a smaller copy of the one before."""
    images, annotations = [], []
    for number in range(count):
        size = (64, 48) if number % 2 else (128, 96)
        picture(folder / f"{number:03}.png", number // 2, size)
        images.append({"id": number, "file_name": f"{number:03}.png"})
        annotations.append(
            {"image_id": number, "category_id": categories[number % len(categories)]}
        )
    return Content(folder, {"images": images, "annotations": annotations, "categories": []})


def test_the_split_keeps_copies_together_and_follows_the_seed(photos):
    content = contents(photos, 40, [1])
    chosen = choose_val(content, 0.25, seed=0)
    assert len(chosen) == 10
    assert all((number ^ 1) in chosen for number in chosen)
    assert chosen == choose_val(content, 0.25, seed=0) != choose_val(content, 0.25, seed=1)


def test_an_added_image_moves_few_others(photos):
    content = contents(photos, 40, [1])
    fewer = Content(photos, {**content.coco, "images": content.coco["images"][:38]})
    fewer.coco["annotations"] = content.coco["annotations"][:38]
    before, after = choose_val(fewer, 0.25, 0), choose_val(content, 0.25, 0)
    assert len(before ^ after) <= 4


def test_no_class_loses_its_last_training_image(photos):
    content = contents(photos, 12, [1])
    for number in range(10):  # five pairs, each with a class of its own
        content.coco["annotations"][number]["category_id"] = 2 + number // 2
    for seed in range(5):
        assert choose_val(content, 0.5, seed) <= {10, 11}


def test_both_splits_are_written_and_name_the_same_folder(photos):
    for number in range(10):
        picture(photos / f"pictures/{number}.png", number)
    coco_json(photos / "labels.json", [f"{n}.png" for n in range(10)])
    adopt(photos, novel=("cat",), val_fraction=0.3)
    coco = configured("photos.yaml").dataset.coco
    assert coco.images("train") == coco.images("val") == photos / "pictures"
    train, val = (json.loads(coco.annotations(s).read_text()) for s in ("train", "val"))
    ids = [{i["id"] for i in content["images"]} for content in (train, val)]
    assert [len(i) for i in ids] == [7, 3] and not ids[0] & ids[1]
    assert {a["image_id"] for a in val["annotations"]} == ids[1]
    adopt(photos, novel=("cat",), val_fraction=0, name="unmeasured")
    assert configured("unmeasured.yaml").dataset.splits == ["train"]


# Classes and the overlay


def test_the_overlay_is_complete_and_takes_any_name(photos):
    yolo(photos, ["yes", "12"])  # yaml would take them for other things than words
    adopt(photos, novel=("狗=dog", "traffic cone"))
    config = configured("photos.yaml")
    assert config.classes.base == ["yes", "12"]
    assert config.classes.novel == ["狗", "traffic cone"] and config.classes.prompts == {
        "狗": "dog"
    }
    assert config.clip.architecture == "ViT-B-32-quickgelu" and config.clip.vocabulary is None
    assert config.dataset.source == "coco"
    assert config.dataset.coco.images("train") == photos / "images/train"


def test_novel_classes_leave_the_base(photos, capsys):
    yolo(photos, ["fox", "dog"])
    adopt(photos, novel=("dog",))
    config = configured("photos.yaml")
    assert (config.classes.base, config.classes.novel) == (["fox"], ["dog"])
    assert "dog (1 boxes in val)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": ("foxx",), "novel": ("cat",)}, "'foxx'; did you mean fox"),
        ({"base": ("fox",), "novel": ("fox",)}, "both a base and a novel"),
        ({}, "--novel"),
        ({"novel": ("fox", "dog")}, "no box of a base class"),
        ({"novel": ("cat",), "gpu": True, "cpu": True}, "exclude one another"),
        ({"novel": ("cat",), "val_fraction": 1.0}, "--val-fraction"),
        ({"novel": ("cat",), "labels": (Path("nowhere"),)}, "nowhere: no such file"),
        ({"novel": ("cat",), "name": "a b"}, "name"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(photos, options, message):
    yolo(photos, ["fox", "dog"])
    with pytest.raises(LpovodError, match=message):
        adopt(photos, **options)
    assert not list(Path().glob("*a*s.yaml")) and not Path("data").exists()


def test_images_alone_need_labels(photos):
    picture(photos / "a.png")
    with pytest.raises(LpovodError, match="1 images, and no labels(.|\n)*Nothing was written"):
        adopt(photos, novel=("cat",))
    (photos / "a.png").rename(photos / "a.heic")
    with pytest.raises(LpovodError, match="no images but 1 of .heic: convert"):
        adopt(photos, novel=("cat",))


def test_nothing_is_overwritten_silently(photos):
    yolo(photos, ["fox", "dog"])
    adopt(photos, novel=("cat",))
    before = Path("photos.yaml").read_text()
    adopt(photos, novel=("cat",))  # the same again
    with pytest.raises(LpovodError, match=r"^photos.yaml: exists.*--output"):
        adopt(photos, novel=("cow",))
    write(photos / "labels/val/d.txt", "0 0.5 0.5 1 1\n")
    with pytest.raises(LpovodError, match="data/photos/val.json, photos.yaml: exists"):
        adopt(photos, novel=("cat",))
    assert Path("photos.yaml").read_text() == before
    adopt(photos, novel=("cat",), overwrite=True)
    assert boxes(json.loads(Path("data/photos/val.json").read_text())) == {
        "d.png": [("fox", [0, 0, 80, 40])]
    }


def test_the_command_in_the_overlay_writes_it_again(photos):
    yolo(photos, ["fox", "dog"])
    adopt(photos, novel=("red cat",), base=("fox",), seed=3, output=Path("other.yaml"), name="x")
    first, *_ = Path("other.yaml").read_text().splitlines()
    assert first.startswith(f"# Written by: lpovod adopt {photos} --base fox --novel 'red cat'")
    assert "--name x --output other.yaml --seed 3" in first


def test_a_cpu_gets_smaller_sizes_and_fewer_epochs(photos):
    yolo(photos, ["fox", "dog"])
    adopt(photos, novel=("cat",), name="on_gpu", gpu=True)
    adopt(photos, novel=("cat",), name="on_cpu", cpu=True)
    gpu, cpu = configured("on_gpu.yaml"), configured("on_cpu.yaml")
    assert gpu.gpu and not cpu.gpu
    assert cpu.backbone.short_side < gpu.backbone.short_side == 640
    assert cpu.base_detector.training.epochs < gpu.base_detector.training.epochs
    assert cpu.proposals.per_image < gpu.proposals.per_image


def test_the_last_lines_are_the_plan_and_the_next_command(photos):
    yolo(photos, ["fox", "dog"])
    text = adopt(photos, novel=("cat",), cpu=True)
    assert "for 2 + 1 images" in text and "base_detector" in text
    assert "snakemake -n --configfile configs/photographs.yaml photos.yaml " in text


# What overlays share


def test_nothing_of_the_default_run_reaches_photographs():
    """Overlays are laid over config.yaml: what it sets, photographs.yaml has to set again."""

    default, shared = keys_of("config.yaml"), keys_of("configs/photographs.yaml")
    own = {("name",), ("classes", "base"), ("classes", "novel")}
    drawn = {key for key in default if key[:2] == ("dataset", "miniature")}
    assert default - drawn - own <= shared


def test_published_weights_have_the_digest_that_their_name_or_address_states():
    for name, remote in FILES.items():
        if remote.digest is None:  # nobody publishes one
            continue
        assert len(remote.digest) == 64 and remote.size
        if name == OPENAI_SAFETENSORS:  # its address states a revision, 40 digits, instead
            assert re.search("/[0-9a-f]{40}/", remote.url)
            continue
        stem = name.rpartition(".")[0]
        assert remote.digest in remote.url or remote.digest.startswith(stem.rpartition("-")[2])


@pytest.mark.slow
def test_the_command_that_adopt_ends_with_resolves(photos, tmp_path, monkeypatch, request):
    yolo(photos, ["fox", "dog"])
    adopt(photos, novel=("cat",), cpu=True)
    overlay, data = Path("photos.yaml").resolve(), Path("data").resolve()
    monkeypatch.chdir(request.config.rootpath)
    folder = copy_project(tmp_path / "copy")
    shutil.copytree(data, folder / "data")
    content = yaml.safe_load(overlay.read_text(encoding="utf-8"))
    printed = snakemake(folder, "photographs.yaml", content, "-n", "--quiet", "reason")
    jobs = dict(line.split() for line in printed.splitlines() if len(line.split()) == 2)
    assert jobs["download_data_clip_vit_b_32_pt"] == "1"
    assert jobs["download_data_backbone_resnet50_0676ba61_pth"] == "1"
