"""The configuration: what is wrong is named before anything runs."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lpovod.config import Config, DatasetSettings, Settings, documentation, load_config, slug
from lpovod.exceptions import LpovodError

DEFAULT = yaml.safe_load(Path("config.yaml").read_text())


def changed(path: str, value) -> dict:
    content = copy.deepcopy(DEFAULT)
    *blocks, last = path.split(".")
    place = content
    for block in blocks:
        place = place.setdefault(block, {})
    place[last] = value
    return content


def test_the_default_is_valid():
    assert load_config(DEFAULT).name == "mini"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pseudo_lables.k", 10, "pseudo_lables: unknown key; did you mean pseudo_labels?"),
        ("pseudo_labels.kk", 10, "pseudo_labels.kk: unknown key; did you mean k?"),
        ("proposals.training.epoch", 1, "proposals.training.epoch: unknown key; did you mean epo"),
        ("region_embeddings.shards", 2, "shards: unknown key; shards is a key of the whole run"),
        ("region_features.shards", 1, "shards: unknown key; shards is a key of the whole run"),
        ("shards", 0, "shards = 0: .*greater than or equal to 1"),
        ("pseudo_labels.k", 0, "pseudo_labels.k = 0: .*greater than or equal to 1"),
        ("pseudo_labels.k", "many", "pseudo_labels.k = 'many': .*integer"),
        ("region_embeddings.scales", [0], "region_embeddings.scales.0 = 0: .*greater than 0"),
        ("evaluation.beta", 1.5, "evaluation.beta = 1.5: .*less than or equal to 1"),
        ("classes.novel", [" star"], "' star' is empty, or has spaces around it"),
        ("classes.novel", [{"name": "star", "promt": "x"}], "a class is a name, or {name: "),
        ("classes.prompts", {"stars": "a star"}, "prompts: 'stars' is no base or novel class"),
        ("proposals.training.milestones", [9], "milestone 9 lies beyond the last of 2 epochs"),
        ("dataset.source", "coco", "knows drawn pictograms alone"),
        ("dataset.coco.val_images", None, "val_images and val_annotations belong together"),
        ("classes.novel", ["star", "Star"], "'Star' is listed twice"),
        ("classes.novel", ["square"], "'square' is listed twice"),
        ("classes.novel", [], "classes.novel = .*at least 1 item"),
        ("text_embeddings.templates", ["a photo"], "must contain {} once"),
        ("clip.weights", "nowhere.pt", "nowhere.pt: no such file"),
        ("backbone.weights", "none.pth", "backbone.weights: none.pth: no such file"),
        ("backbone.architecture", "resnet_50", "allowed are small, .*did you mean resnet50?"),
        ("backbone.architecture", "timm:", "allowed are small, .*and timm:NAME"),
        ("dataset.source", "voc", "dataset.source = 'voc': .*'miniature' or 'coco'"),
        ("seed", -1, "seed = -1"),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(LpovodError, match=message):
        load_config(changed(path, value))


def test_fewer_images_have_fewer_shards():
    coco = load_config(changed("shards", 64))
    images = (200_000, 5_000, 1_700, 10, 0)  # the second is COCO's val, the third 17 classes' 100
    assert [coco.shards_of(count) for count in images] == [64, 3, 1, 1, 1]
    assert [load_config(DEFAULT).shards_of(count) for count in images] == [2, 2, 1, 1, 1]


def test_a_backbone_of_timm_s_is_looked_up_when_it_is_built():
    content = changed("backbone", {"architecture": "timm:resnet18", "weights": None})
    assert load_config(content).backbone.architecture == "timm:resnet18"


def test_overlays_add_classes_and_prompts_leave_the_names():
    novel = [{"name": "狗", "prompt": "a dog"}, "traffic light"]
    content = changed("classes", {"base": ["cat"], "novel": novel, "add_novel": ["owl"]})
    content["classes"] |= {"add_base": [{"name": "cow"}], "prompts": {"owl": "an owl at night"}}
    classes = load_config(content).classes
    assert (classes.base, classes.novel) == (["cat", "cow"], ["狗", "traffic light", "owl"])
    assert classes.prompts == {"狗": "a dog", "owl": "an owl at night"}
    # What is printed can be read again.
    assert load_config(content | {"classes": classes.model_dump()}).classes == classes


def blocks(model: type[Settings], prefix: str = ""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}", field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from blocks(field.annotation, f"{prefix}{name}.")


def test_every_key_is_described():
    missing = [name for name, field in blocks(Config) if not field.description]
    assert not missing


def test_images_are_counted_without_reading_them(tmp_path):
    drawn = DatasetSettings(miniature={"train_images": 7, "tune_images": 3})
    assert (drawn.image_count("train"), drawn.image_count("tune")) == (7, 3)
    coco = {"root": tmp_path, "val_annotations": "val.json"}
    (tmp_path / "val.json").write_bytes(bytes(40_000))  # at four thousand bytes per image
    on_disk = DatasetSettings(source="coco", coco=coco)
    assert (on_disk.image_count("train"), on_disk.image_count("val")) == (118_287, 10)
    downloaded = DatasetSettings(source="coco", coco=coco | {"download": True})
    assert downloaded.image_count("val") == 5_000


def test_slugs():
    assert slug("traffic light") == "traffic_light"
    assert slug("T-Shirt (red)") == "t_shirt_red"
    foreign = [slug(name) for name in ("狗", "猫", "Bär", "bär", "bar", "b r")]
    assert len(set(foreign)) == 6 and all(re.fullmatch("[a-z0-9_]+", s) for s in foreign)


def test_no_heavy_import_while_the_graph_is_built():
    """torch takes seconds to import, and the graph is built on every call of snakemake."""
    program = (
        "import sys, lpovod.config, lpovod.measures.ablations;"
        "print({'torch', 'timm'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_documentation_is_current():
    assert Path("docs/configuration.md").read_text() == documentation()


def test_the_documentation_says_what_is_permitted():
    rows = [line.split(" | ") for line in documentation().splitlines() if line.startswith("| `")]
    permitted = {name.strip("| `"): words for name, _, words, *_ in rows}
    assert permitted["dataset.source"] == "`miniature` or `coco`"
    assert permitted["pseudo_labels.k"] == "integer ≥ 1"
    assert permitted["evaluation.beta"] == "number ≥ 0, ≤ 1"
    assert permitted["region_embeddings.scales"] == "list of at least 1: number > 0"
    assert permitted["classes.novel"].startswith("list of at least 1: text or ")
    assert permitted["proposals.files"] == "block: path by `train` or `val` or `tune`"
    assert permitted["pseudo_labels.per_image"] == "integer ≥ 1 or `null`"
