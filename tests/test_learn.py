"""`lpovod learn`: the numbers of the workflow, and nothing else changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import SMALLEST
from PIL import Image
from project import snakemake
from test_apps import lpovod

from lpovod.apps.learn import Lesson, Run, learn_class, region_name, region_of
from lpovod.artifacts import read_tensors, sha256
from lpovod.exceptions import LpovodError, UsageError
from lpovod.formats.model import ModelFile, read_model
from lpovod.overlaps import overlaps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(smallest_run, tmp_path_factory) -> Path:
    """A copy, because learning fills the run's store."""
    folder = tmp_path_factory.mktemp("learn") / "project"
    shutil.copytree(smallest_run, folder)
    return folder


@pytest.fixture()
def run(project, monkeypatch) -> Run:
    monkeypatch.chdir(project)  # the paths of CLIP's files are relative
    return Run(Path("results/smallest"))


def same(one: ModelFile, other: ModelFile, names: list[str]) -> bool:
    return all(
        np.array_equal(getattr(one, part)[name], getattr(other, part)[name])
        for part in ("weights", "text")
        for name in names
    )


def test_a_learned_class_has_the_weights_that_the_workflow_trains(project, run):
    model = Path("cup.safetensors")
    done = lpovod("learn", "cup", "--run", "results/smallest", "--output", str(model))
    assert done.returncode == 0, done.stderr
    before, after = run.model, read_model(model)
    assert after.names == [*before.names, "cup"]
    assert same(before, after, before.names)
    assert after.networks.keys() == before.networks.keys()
    classes = {"classes": {"novel": [*SMALLEST["classes"]["novel"], "cup"]}}
    copy = project.with_name("workflow")
    shutil.copytree(project, copy)
    snakemake(copy, "smallest.yaml", classes, "--cores", "2")
    trained, _ = read_tensors(
        copy / "results/smallest/linear_probe/weights.safetensors", "linear_probe"
    )
    np.testing.assert_array_equal(after.weights["cup"], trained["cup"])
    texts, _ = read_tensors(
        copy / "results/smallest/text_embeddings/novel.safetensors", "text_embeddings"
    )
    np.testing.assert_array_equal(after.text["cup"], texts["cup"])
    remade = read_model(copy / "results/smallest/model/model.safetensors")
    assert (remade.class_of("cup").category_id, remade.class_of("cup").split) == (
        after.class_of("cup").category_id,
        "novel",
    )


def test_learning_is_a_function_of_run_model_and_lesson(run):
    lesson = Lesson("cup", prompt="a cup", drop=(region_of(first(run, "star")),))
    one, other = (learn_class(Run(run.folder), run.model, lesson) for _ in range(2))
    assert same(one, other, one.names)
    assert one.class_of("cup").learned == {
        "pictures": [],
        "by_name": True,
        "drop": [first(run, "star")],
        "keep": [],
        "run": one.class_of("cup").learned["run"],
    }
    second = learn_class(run, one, Lesson("square hole"))
    assert same(one, second, one.names) and second.names[-2:] == ["cup", "square hole"]


def test_a_class_that_is_learned_again_keeps_its_prompt(run):
    prompted = learn_class(run, run.model, Lesson("mug", prompt="a cup"))
    again = learn_class(run, prompted, Lesson("mug", drop=(region_of(first(run, "star")),)))
    assert again.class_of("mug").prompt == "a cup"
    np.testing.assert_array_equal(again.text["mug"], prompted.text["mug"])
    named = learn_class(run, run.model, Lesson("mug"))
    assert not np.array_equal(named.text["mug"], prompted.text["mug"])


def first(run: Run, name: str) -> str:
    return region_name(run.retrieve(run.model)[name].regions[0]["key"])


def test_dropped_regions_become_negatives_and_kept_ones_labels(run):
    before = run.retrieve(run.model)["star"]
    worst, other = before.regions[-1], run.retrieve(run.model)["ring"].regions[0]
    lesson = Lesson("star", drop=(worst["key"],), keep=(other["key"],))
    learned = learn_class(run, run.model, lesson)
    after = run.retrieve(learned)["star"]
    assert [r["key"] for r in after.regions] == [
        *(r["key"] for r in before.regions[:-1]),
        other["key"],
    ]
    kept = after.regions[-1]
    assert (kept["bbox"], kept["score"]) == (other["bbox"], other["score"])
    vector = run.query(learned, "star")
    image_id, place = divmod(other["key"], 1 << 20)
    embedding = run.regions.read(image_id)["embedding"][place].astype(np.float64)
    assert kept["cosine"] == pytest.approx(float(embedding @ vector), abs=1e-6)
    x, y, width, height = worst["bbox"]
    dropped = np.array([[x, y, x + width, y + height]])
    for region in after.ignored:
        if region["image_id"] == worst["image_id"]:
            x, y, width, height = region["bbox"]
            assert overlaps(np.array([x, y, x + width, y + height]), dropped)[0].max() < 0.5
    others = [name for name in learned.names if name != "star"]
    assert learned.names == run.model.names and same(run.model, learned, others)
    assert not np.array_equal(learned.weights["star"], run.model.weights["star"])


def test_pictures_search_beside_the_name_or_instead_of_it(run, tmp_path):
    label = run.retrieve(run.model)["star"].regions[0]
    x, y, width, height = (round(side) for side in label["bbox"])
    crop = Image.fromarray(run.data.load(label["image_id"])).crop((x, y, x + width, y + height))
    crop.save(tmp_path / "crop.png")
    example = run.embed_picture(tmp_path / "crop.png")
    alone = learn_class(
        run, run.model, Lesson("thing", examples=(example,), pictures=("d",), by_name=False)
    )
    assert "thing" not in alone.text  # nothing of its name is left: the probe alone scores it
    np.testing.assert_allclose(alone.queries["thing"], example, atol=1e-6)
    regions = run.retrieve(alone)["thing"].regions
    assert label["image_id"] in [r["image_id"] for r in regions[:3]]
    both = learn_class(run, run.model, Lesson("star", examples=(example,), pictures=("d",)))
    name = run.query(run.model, "star").astype(np.float64)
    direction = name + example
    np.testing.assert_allclose(
        both.queries["star"], direction / np.linalg.norm(direction), atol=1e-6
    )
    done = lpovod(
        *("learn", "thing", "--run", "results/smallest", "--output", str(tmp_path / "a")),
        *("--image", str(tmp_path / "crop.png"), "--images-only"),
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        read_model(tmp_path / "a").weights["thing"], alone.weights["thing"]
    )


def test_a_learned_class_detects(run, tmp_path):
    model = tmp_path / "cup.safetensors"
    lpovod("learn", "cup", "--run", "results/smallest", "--output", str(model))
    before = sha256(Path("results/smallest/model/model.safetensors"))
    image = str(sorted(Path("results/smallest/dataset/images/val").glob("*.jpg"))[0])
    done = lpovod(
        *("detect", image, "--model", str(model), "--classes", "cup", "--threshold", "0"),
        *("--output", str(tmp_path)),
    )
    assert done.returncode == 0 and "CLIP head alone" not in done.stderr
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert {e["class_name"] for e in entries} == {"cup"}
    assert sha256(Path("results/smallest/model/model.safetensors")) == before


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        (Lesson("square"), "'square' is a base class"),
        (Lesson(" "), "the class needs a name"),
        (Lesson("Star"), "the model has 'star', which differs from 'Star' in form"),
        (Lesson("cup", keep=(region_of("77:3"),)), "77:3: results/smallest has no such training"),
    ],
)
def test_a_wrong_lesson_is_refused(run, lesson, message):
    with pytest.raises(LpovodError) as error:
        learn_class(run, run.model, lesson)
    assert message in str(error.value)


def test_wrong_usage_of_learn_is_explained(run):
    for arguments, code, message in (
        (("cup",), 2, "the run's own model stays as it is: give --output FILE"),
        (("cup", "--output", "a", "--images-only"), 2, "--images-only needs pictures"),
        (("cup", "--output", "a", "--drop", "star"), 2, "region 'star': expected image:place"),
    ):
        done = lpovod("learn", *arguments, "--run", "results/smallest")
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
    with pytest.raises(UsageError):
        region_of("1:x")
