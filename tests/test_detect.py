"""`lpovod detect` and `lpovod export`: the evaluation's detections, in anyone's images."""

import json
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from models import random_model
from PIL import Image
from test_apps import lpovod
from test_model import picture

from lpovod.artifacts import sha256
from lpovod.formats.coco import corners


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("detect") / "model.safetensors"
    random_model(path)
    return path


@pytest.fixture()
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.jpg", "deeper/c.bmp")):
        Image.fromarray(picture(90, 70, number)).save(folder / name)
    (folder / "notes.md").write_text("no image")
    return folder


def results(output: Path) -> list[dict]:
    return json.loads((output / "detections.json").read_text())


@pytest.mark.slow
def test_a_split_s_detections_are_those_that_the_evaluation_measured(smallest_run, tmp_path):
    run = smallest_run / "results/smallest"
    done = lpovod("detect", f"{run}/dataset/val.json", "--run", str(run), "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    both = results(tmp_path), results(run / "evaluation")
    assert len(both[0]) == len(both[1]) > 100
    by_class: list[dict] = [defaultdict(list), defaultdict(list)]
    for entries, grouped in zip(both, by_class, strict=True):
        for entry in entries:
            key = entry["image_id"], entry["category_id"]
            grouped[key].append([entry["score"], *corners(entry["bbox"])])
    for key, measured in by_class[1].items():
        # Equal scores have no order.
        detected, measured = (
            np.array(sorted(rows, key=lambda r: (-round(r[0], 3), *r[1:])))
            for rows in (by_class[0][key], measured)
        )
        np.testing.assert_allclose(detected[:, 0], measured[:, 0], atol=1e-4)
        np.testing.assert_allclose(detected[:, 1:], measured[:, 1:], atol=0.05)
    names = {e["file_name"] for e in both[0]}
    assert names <= {path.name for path in (run / "dataset/images/val").iterdir()}


@pytest.mark.slow
def test_a_run_is_exported_as_one_file_that_detects_the_same(smallest_run, tmp_path):
    run = smallest_run / "results/smallest"
    image = sorted((run / "dataset/images/val").glob("*.jpg"))[0]
    shutil.copy(image, tmp_path / image.name)
    done = lpovod("export", "--run", str(run), "--output", str(tmp_path / "mini.safetensors"))
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "mini.safetensors") == sha256(run / "model/model.safetensors")
    for source in ("--run", str(run)), ("--model", str(tmp_path / "mini.safetensors")):
        output = str(tmp_path / source[0][2:])
        done = lpovod("detect", str(tmp_path / image.name), *source, "--output", output)
        assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run") == results(tmp_path / "model")


@pytest.mark.slow
def test_a_run_without_its_model_is_named(tmp_path):
    done = lpovod("export", "--run", str(tmp_path), "--output", str(tmp_path / "a.safetensors"))
    assert done.returncode == 1 and "model.safetensors: no such file. Finish the run" in done.stderr
    done = lpovod("export", "--output", str(tmp_path / "a.safetensors"))
    assert done.returncode == 2 and "give a finished run" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "glob", "list", "files"])
def test_every_kind_of_source_names_the_same_images(model, images, tmp_path, kind):
    files = [images / "a.jpg", images / "b.png", images / "deeper/c.bmp"]
    (tmp_path / "list.txt").write_text("images/a.jpg\nimages/b.png\n\nimages/deeper/c.bmp\n")
    sources = {
        "folder": [images],
        "glob": [images / "**/*.*g", images / "deeper/*.bmp"],
        "list": [tmp_path / "list.txt"],
        "files": files,
    }[kind]
    output = tmp_path / "output"
    done = lpovod(
        *("detect", *map(str, sources), "--model", str(model), "--output", str(output)),
        *("--draw", "--yolo", "--threshold", "0.2", "--classes", "bus", "dog"),
    )
    assert done.returncode == 0, done.stderr
    entries = results(output)
    assert {e["file_name"] for e in entries} == {"a.jpg", "b.png", "deeper/c.bmp"}
    assert {(e["file_name"], e["image_id"]) for e in entries} == {
        (name, number) for number, name in enumerate(("a.jpg", "b.png", "deeper/c.bmp"), 1)
    }
    assert {(e["class_name"], e["category_id"]) for e in entries} == {("bus", 7), ("dog", 3)}
    assert min(e["score"] for e in entries) > 0.2
    for name in ("a", "b.png", "deeper/c.bmp"):
        with Image.open(output / f"drawn/{name}.jpg") as drawn:
            assert drawn.size == (800, 622)
    of_a = [e for e in entries if e["file_name"] == "a.jpg"]
    lines = (output / "yolo/labels/a.txt").read_text().splitlines()
    for line, entry in zip(lines, of_a, strict=True):
        number, x, y, width, height = map(float, line.split())
        assert ["dog", "cat", "bus", "fish"][int(number)] == entry["class_name"]
        box = [(x - width / 2) * 90, (y - height / 2) * 70, width * 90, height * 70]
        np.testing.assert_allclose(box, entry["bbox"], atol=1e-3)


@pytest.mark.slow
def test_a_drawing_never_replaces_its_original(model, images, tmp_path):
    """Even if a json names files by whole paths, and one folder holds a.jpg and a.png."""
    shutil.copy(images / "b.png", images / "a.png")
    files = [images / "a.jpg", images / "a.png", images / "deeper/c.bmp"]
    listed = [
        {"id": number, "file_name": str(path), "width": 90, "height": 70}
        for number, path in enumerate(files)
    ]
    content = {"images": listed, "annotations": [], "categories": []}
    (tmp_path / "all.json").write_text(json.dumps(content))
    before, output = [sha256(path) for path in files], tmp_path / "output"
    done = lpovod(
        *("detect", str(tmp_path / "all.json"), "--model", str(model), "--draw"),
        *("--output", str(output)),
    )
    assert done.returncode == 0, done.stderr
    assert [sha256(path) for path in files] == before
    drawn = {str(p.relative_to(output)) for p in (output / "drawn").rglob("*.jpg")}
    assert drawn == {"drawn/a.jpg", "drawn/a.png.jpg", "drawn/deeper/c.bmp.jpg"}
    assert {e["image_id"] for e in results(output)} == {0, 1, 2}


@pytest.mark.slow
def test_a_bad_image_is_named_and_skipped_and_the_exit_code_tells(model, images, tmp_path):
    (images / "broken.jpg").write_bytes((images / "a.jpg").read_bytes()[:200])
    done = lpovod("detect", str(images), "--model", str(model), "--output", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "broken.jpg cannot be decoded" in done.stderr and " 4/4 " in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of 4 images could not be read"
    assert {e["file_name"] for e in results(tmp_path / "out")} == {"a.jpg", "b.png", "deeper/c.bmp"}


@pytest.mark.slow
def test_images_of_many_sizes_are_listed_in_the_order_of_their_names(model, tmp_path):
    """Though images of one size are detected together, as many as a pass takes."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        size = [(90, 70), (70, 90), (64, 64)][number % 3 if number < 10 else 0]
        Image.fromarray(picture(*size, number)).save(tmp_path / f"images/{number:02}.png")
    outputs = [tmp_path / "one", tmp_path / "four"]
    for output, size in zip(outputs, ("1", "4"), strict=True):
        words = ["--model", str(model), "--output", str(output), "--device", "cpu"]
        done = lpovod("detect", str(tmp_path / "images"), *words, "--batch-size", size)
        assert done.returncode == 0, done.stderr
    one, four = map(results, outputs)
    for name in ("file_name", "image_id", "class_name"):
        assert [e[name] for e in four] == [e[name] for e in one]
    assert sorted({e["file_name"] for e in one}) == list(dict.fromkeys(e["file_name"] for e in one))
    for name, limit in (("bbox", 0.01), ("score", 1e-4)):
        np.testing.assert_allclose([e[name] for e in four], [e[name] for e in one], atol=limit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sources", "code", "message"),
    [
        ((), 2, "error: name something to detect in"),
        (("nowhere.jpg",), 1, "error: nowhere.jpg: no such image, folder or glob"),
        (("val.json", "a.jpg"), 2, "error: val.json has image ids of its own"),
        (("a.jpg", "--batch-size", "0"), 2, "error: --batch-size 0: expected at least 1"),
        (
            ("docs/pictures/serve.png", "--device", "gpu"),
            1,
            "error: device 'gpu': this machine has cpu",
        ),
        (("a.jpg", "--threshold", "7"), 2, "error: --threshold 7.0: expected a number from 0 to 1"),
    ],
)
def test_wrong_usage_of_detect_is_explained(model, sources, code, message):
    done = lpovod("detect", *sources, "--model", str(model))
    assert (done.returncode, message in done.stderr) == (code, True), done.stderr
