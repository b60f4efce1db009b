"""What users get wrong, one line each: the essential words of the message, and when it comes.

Findings about images and annotations have a table of their own in `test_check`.
"""

import copy
import json
import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_CLIP, make_clip, make_world, write_proposals, write_shards
from PIL import Image
from project import copy_project
from safetensors.torch import save_file

from lpovod.apps.main import main
from lpovod.artifacts import identity, read_json, sha256, write_json, write_tensors
from lpovod.clip import load_clip
from lpovod.command_line import run
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ClassSettings,
    ClipSettings,
    LinearProbeSettings,
    ProposalsSettings,
    PseudoLabelsSettings,
    RegionEmbeddingsSettings,
    RegionIndexSettings,
    TextEmbeddingsSettings,
    load_config,
    read_config,
)
from lpovod.formats.index import open_index
from lpovod.formats.regions import open_shards, read_proposals
from lpovod.importers.backbone import start_from
from lpovod.importers.checkpoints import import_base_detector, import_linear_probe
from lpovod.importers.proposals import import_proposals
from lpovod.importers.pseudo_labels import import_pseudo_labels
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.sources import check_classes, read_sources
from lpovod.stages.evaluation import evaluate
from lpovod.stages.linear_probe import train_linear_probe
from lpovod.stages.pseudo_labels import retrieve
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_index import build_region_index
from lpovod.stages.text_embeddings import embed_classes

DEFAULT = yaml.safe_load(Path("config.yaml").read_text())
COUNTS = {7: 4, 3: 9, 900: 0, 41: 1, 20: 6}
ROOT = Path.cwd()
HTML = b"<!DOCTYPE html><html><title>404: not found</title></html>"


class Evil:
    """Writes a file if a reader runs the code of a pickle."""

    def __reduce__(self):
        return Path("ran").touch, ()


class Case(NamedTuple):
    """A mistake, and what the user reads.

    Attributes:
        when: it is noticed: config, check (of the data), stage or command.
        mistake: what the user did.
        act: does it, in a folder of its own.
        words: essential words of the message, separated by " ... ".
        code: exit code, 2 for wrong usage.
    """

    when: str
    mistake: str
    act: Callable[[], object]
    words: str
    code: int = 1


# How a mistake is made.


def keys(**values: Any) -> Callable[[], object]:
    """The default configuration with other values; two underscores lead into a block."""
    content = copy.deepcopy(DEFAULT)
    for path, value in values.items():
        *blocks, last = path.split("__")
        place = content
        for block in blocks:
            place = place.setdefault(block, {})
        place[last] = value
    return lambda: load_config(content)


def unknown(block: str) -> Callable[[], object]:
    """The default configuration with an unknown key in that block."""
    return keys(**{f"{block.replace('.', '__')}__colour": 1})


def overlay(text: str | bytes) -> Callable[[], object]:
    """An overlay of that text."""

    def act() -> object:
        Path("mine.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
        return read_config([Path("config.yaml"), Path("mine.yaml")])

    return act


def command(*words: str, **files: Any) -> Callable[[], object]:
    """A command line of lpovod; names of files have two underscores in place of the dot."""

    def act() -> None:
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            Path(name.replace("__", ".")).write_text(text)
        sys.argv[:] = ["lpovod", *words]
        main()

    return act


def stage(name: str, *words: str) -> Callable[[], object]:
    """A command line of a stage."""

    def act() -> None:
        sys.argv[:] = [f"workflow_scripts/{name}.py", *words]
        runpy.run_module(f"workflow_scripts.{name}", run_name="__main__", alter_sys=True)

    return act


def coco(**changes: Any) -> Callable[[], object]:
    """A configuration of the user's own data, cat and dog, checked before the graph is built."""

    def act() -> None:
        images = [{"id": 1, "file_name": "1.png", "width": 8, "height": 6}]
        boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}]
        names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        content = {"images": images, "annotations": boxes, "categories": names}
        Path("photos").mkdir()
        Image.new("RGB", (8, 6)).save("photos/1.png")
        write_json(Path("boxes.json"), content)
        files = {"train_images": "photos", "train_annotations": "boxes.json"}
        files |= {"val_images": "photos", "val_annotations": "boxes.json", "pictogram_clip": True}
        files |= {k: v for k, v in changes.items() if k not in ("base", "novel")}
        classes = {"base": changes.get("base", ["cat"]), "novel": changes.get("novel", ["owl"])}
        data = {"source": "coco", "coco": files}
        config = load_config(DEFAULT | {"dataset": data, "classes": classes})
        check_classes(config, read_sources(config))

    return act


def clip(**changes: Any) -> Callable[[], object]:
    """A CLIP whose files or names differ; bytes are the content of the weights."""

    def act() -> None:
        settings = make_clip(Path(), seed=0).model_dump()
        for name, value in changes.items():
            if isinstance(value, bytes):
                Path(settings["weights"]).write_bytes(value)
            else:
                settings[name] = value(settings[name]) if callable(value) else value
        load_clip(ClipSettings.model_validate(settings))

    return act


def cut(path: Path) -> Path:
    """Cut a file in half."""
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])
    return path


def with_code(path: Path) -> Path:
    """A pickle with code in a file's place."""
    other = path.with_suffix(".pt")
    torch.save(Evil(), other)
    return other


def wider(architecture: str) -> str:
    """An architecture of another width."""
    content = copy.deepcopy(TINY_CLIP)
    content["text_cfg"]["width"] = 64
    Path("wider.json").write_text(json.dumps(content))
    return "wider.json"


SMALL = BackboneSettings(channels=8)


def backbone(content: dict | bytes, name: str = "start.pth") -> Callable[[], object]:
    """A training that starts from that file."""

    def act() -> None:
        if isinstance(content, bytes):
            Path(name).write_bytes(content)
        elif name.endswith(".safetensors"):
            save_file(content, name)
        else:
            torch.save(content, name)
        start_from(ProposalNetwork(SMALL, 8.0), Path(name), SMALL.architecture)

    return act


def factory(name: str) -> Callable[[], object]:
    """An index with that factory."""

    def act() -> None:
        build_region_index(shards(), RegionIndexSettings(factory=name), Path("train.index"))

    return act


def shards(**inputs: str) -> list[Path]:
    """Region embeddings of a drawn world in this folder."""
    random = np.random.default_rng(0)
    world = make_world(Path(), COUNTS)
    vectors = {i: random.normal(size=(n, 16)) for i, n in COUNTS.items()}
    vectors = {i: (v / np.linalg.norm(v, axis=1)[:, None]).astype("f2") for i, v in vectors.items()}
    stated = {"proposals": sha256(world.proposals)} | inputs
    return write_shards(Path(), world.dataset, vectors, world.boxes, world.objectness, **stated)


def proposals(content: Any, id_map: dict | None = None, name: str = "p.pkl") -> Callable:
    """Imported proposals: a pickle, or json."""

    def act() -> None:
        world = make_world(Path(), COUNTS)
        if name.endswith(".pkl"):
            Path(name).write_bytes(pickle.dumps(content))
        else:
            write_json(Path(name), content)
        if id_map is not None:
            write_json(Path("map.json"), id_map)
        place = None if id_map is None else Path("map.json")
        import_proposals(world.dataset, Path(name), ProposalsSettings(), [Path("out.h5")], place)

    return act


def rows(array: Any, names: Any, wanted: str = "cat") -> Callable[[], object]:
    """Imported text embeddings."""

    def act() -> None:
        np.save("rows.npy", array)
        write_json(Path("names.json"), names)
        settings = TextEmbeddingsSettings(file=Path("rows.npy"), classes=Path("names.json"))
        classes = ClassSettings(base=[wanted], novel=["dog"])
        outputs = (Path("base.safetensors"), Path("novel.safetensors"), Path("store"), "code")
        embed_classes(classes, ClipSettings(weights=None), settings, *outputs)

    return act


def labels(name: str = "owl", **change: Any) -> Callable[[], object]:
    """Imported pseudo-labels, one of them changed; None removes a key."""

    def act() -> None:
        world = make_world(Path(), COUNTS)
        content = json.loads(world.dataset.read_text())
        label = {"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 5, 10]}
        label |= {"score": 0.9, "cosine": 0.3} | change
        content["annotations"] = [{k: v for k, v in label.items() if v is not None}]
        content["categories"] = [{"id": 5, "name": "owl"}, {"id": 6, "name": "cow"}]
        write_json(Path("labels.json"), content)
        settings = PseudoLabelsSettings(file=Path("labels.json"))
        import_pseudo_labels([name], Path("labels.json"), world.dataset, settings, Path("out.json"))

    return act


def checkpoint(state: dict | bytes, probe: bool = False) -> Callable[[], object]:
    """The original's checkpoint, imported as the detector or for the novel weights."""

    def act() -> None:
        write_json(Path("val.json"), {"images": [], "annotations": [], "categories": []})
        if isinstance(state, bytes):
            Path("ft.pth").write_bytes(state)
        else:
            torch.save({"state_dict": state}, "ft.pth")
        val, file, detector = Path("val.json"), Path("ft.pth"), Path("detector.safetensors")
        if probe:
            tensors = {"neck.weight": np.ones(3, np.float32)}
            write_tensors(detector, tensors, identity("base_detector"))
            settings = LinearProbeSettings()
            import_linear_probe(val, file, detector, ["owl"], settings, Path("probe.safetensors"))
        else:
            head = BaseDetectorSettings(dimension=12, head_convolutions=1)
            import_base_detector(val, file, ["cat"], SMALL, head, detector, Path("history.jsonl"))

    return act


def shape_of(rows: int, width: int) -> dict[str, torch.Tensor]:
    return {
        "roi_head.prototype": torch.zeros(rows, 12),
        "roi_head.projection_for_image.weight": torch.zeros(width, 12),
    }


# Stages that are fed with files of another run, or with damaged ones.


def foreign_proposals() -> None:
    world = make_world(Path(), COUNTS)
    make_world(Path("other"), COUNTS, seed=1)
    read_proposals([world.proposals], Path("other/train.json"))


def truncated_proposals() -> None:
    world = make_world(Path(), COUNTS)
    read_proposals([cut(world.proposals)], world.dataset)


def json_in_place_of_proposals() -> None:
    world = make_world(Path(), COUNTS)
    read_proposals([world.dataset], world.dataset)


def shard_of_another_run() -> None:
    first, _ = shards()
    Path("other").mkdir()
    data = read_json(Path("train.json"))
    world = make_world(Path("other"), {i["id"] + 5000: 2 for i in data["images"]})
    vectors = {i: np.ones((2, 16), np.float16) / 4 for i in world.images}
    _, second = write_shards(
        Path("other"), world.dataset, vectors, world.boxes, world.objectness, proposals="q" * 64
    )
    open_shards([first, second], "region_embeddings")


def one_shard_is_missing() -> None:
    open_shards(shards()[:1], "region_embeddings")


def truncated_shard() -> None:
    first, second = shards()
    open_shards([first, cut(second)], "region_embeddings")


def no_shards() -> None:
    build_region_index([], RegionIndexSettings(), Path("train.index"))


def truncated_index() -> None:
    factory("Flat")()
    open_index(cut(Path("train.index")))


def damaged_index() -> None:
    factory("Flat")()
    content = bytearray(Path("train.index").read_bytes())
    content[:8] = b"notfaiss"
    Path("train.index").write_bytes(content)
    open_index(Path("train.index"))


def index_of_another_run() -> None:
    factory("Flat")()
    for path in Path().glob("*.h5"):
        path.unlink()
    Path("images").rename("images_before")
    made = shards(clip_weights="v" * 64)
    vectors = {"owl": np.eye(16, dtype=np.float32)[0]}
    inputs = {"clip_weights": "v" * 64, "clip_architecture": "a"}
    write_tensors(
        Path("owl.safetensors"),
        vectors,
        identity("text_embeddings", **inputs) | {"logit_scale": 100.0},
    )
    text = Path("owl.safetensors")
    find("owl", text, made)


def find(name: str, text: Path, shards: list[Path]) -> None:
    """Stage pseudo_labels for one class."""
    retrieve(
        [name],
        text,
        text,
        Path("train.index"),
        shards,
        Path("train.json"),
        PseudoLabelsSettings(),
        Path("out.json"),
        Path("store"),
        "code",
    )


def class_without_embedding() -> None:
    vectors = {"owl": np.eye(16, dtype=np.float32)[0]}
    inputs = {"clip_weights": "w" * 64, "clip_architecture": "a"}
    text = Path("owl.safetensors")
    write_tensors(text, vectors, identity("text_embeddings", **inputs) | {"logit_scale": 100.0})
    factory("Flat")()
    made = sorted(Path().glob("*.h5"))
    find("cow", text, made)


def detector_in_place_of_text_embeddings() -> None:
    write_tensors(Path("d.safetensors"), {"a": np.ones(2)}, identity("base_detector"))
    find("owl", Path("d.safetensors"), [])


def features_of_other_labels() -> None:
    labels("owl")()
    arrays = {"box": np.float32([[50, 50, 60, 60]]), "feature": np.ones((1, 3), np.float16)}
    ident = identity("region_features", detector="d" * 64) | {"image_id": 7}
    write_tensors(Path("features/7.safetensors"), arrays, ident)
    output = Path("out.safetensors")
    train_linear_probe(Path("out.json"), [Path("features")], LinearProbeSettings(), 0, output)


def proposals_in_place_of_features() -> None:
    world = make_world(Path(), COUNTS)
    paths = {n: Path(n) for n in ("detector", "linear_probe", "metrics", "detections")}
    evaluate(
        world.dataset,
        [world.proposals],
        text_embeddings=[],
        region_embeddings=[],
        settings=load_config(DEFAULT).evaluation,
        ground_truth=Path("truth.json"),
        **paths,
    )


def embeddings_of_too_few_images() -> None:
    world = make_world(Path(), COUNTS)
    write_proposals(Path("few.h5"), world.dataset, {7: world.boxes[7]}, {7: world.objectness[7]})
    settings = RegionEmbeddingsSettings()
    arguments = (world.dataset, Path("few.h5"), make_clip(Path(), 0), settings)
    embed_regions(*arguments, Path("checkpoint"), "", Path("out.h5"))


def folder_named(path: str) -> None:
    Path(path).mkdir(parents=True)


def after(make: Callable[[], object], *words: str) -> Callable[[], object]:
    def act() -> None:
        make()
        command(*words)()

    return act


def images_alone() -> None:
    Path("street").mkdir()
    Image.new("RGB", (8, 6)).save("street/1.png")


TRUTH = {
    "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 6}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}],
    "categories": [{"id": 1, "name": "cat", "split": "base"}],
}
UNSPLIT = TRUTH | {"categories": [{"id": 1, "name": "cat"}]}
DETECTION = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "score": 0.9}
SCORE = ("score", "--ground-truth", "truth.json", "--detections", "found.json")
CONVERT = ("convert", "found.json", "--dataset", "truth.json", "--output", "out", "--to")


def page_of_html(path: Path) -> Path:
    Path("page.pt").write_bytes(HTML)
    return Path("page.pt")


def list_json(_: str) -> str:
    Path("list.json").write_text("[]")
    return "list.json"


def images_and_truth() -> None:
    images_alone()
    write_json(Path("truth.json"), TRUTH)


def damaged_benchmark() -> None:
    folder = Path("results/mini/benchmarks")
    folder.mkdir(parents=True)
    (folder / "dataset.tsv").write_text("s\th:m:s\n1")
    command("plan")()


def picture_for_config() -> None:
    images_alone()
    command("config", "street/1.png")()


BLOCKS = [
    "dataset",
    "dataset.miniature",
    "dataset.coco",
    "classes",
    "clip",
    "backbone",
    "text_embeddings",
    "proposals",
    "proposals.training",
    "region_embeddings",
    "region_index",
    "base_detector",
    "pseudo_labels",
    "region_features",
    "linear_probe",
    "evaluation",
    "report",
    "small_clip",
]

ROWS = {
    "config": [
        # Keys, types and ranges. `documentation()` lists what is permitted.
        ("a typing error in a block", keys(pseudo_lables={}), "mean pseudo_labels?"),
        (
            "a typing error in a key",
            overlay("proposals: {nsm: 0.5}"),
            "proposals.nsm ... did you mean nms?",
        ),
        *(
            (f"an unknown key in {block}", unknown(block), f"{block}.colour: unknown key")
            for block in BLOCKS
        ),
        ("a text for a number", keys(seed="zero"), "seed = 'zero' ... integer"),
        (
            "a fraction for a number",
            keys(pseudo_labels__k=1.5),
            "pseudo_labels.k = 1.5 ... integer",
        ),
        ("nothing for a number", overlay("seed:"), "seed = None ... integer"),
        (
            "a number below its range",
            keys(proposals__per_image=0),
            "proposals.per_image = 0 ... greater than or equal to 1",
        ),
        (
            "per cent for a fraction",
            keys(evaluation__nms=50),
            "evaluation.nms = 50 ... less than or equal to 1",
        ),
        (
            "a rate of zero",
            keys(linear_probe__learning_rate=0),
            "linear_probe.learning_rate = 0 ... greater than 0",
        ),
        ("not a number", overlay("evaluation: {beta: .nan}"), "evaluation.beta = nan"),
        ("yes in other words", keys(gpu="perhaps"), "gpu = 'perhaps' ... boolean"),
        (
            "an unknown choice",
            keys(dataset__source="voc"),
            "dataset.source = 'voc' ... 'miniature' or 'coco'",
        ),
        (
            "an unknown split",
            keys(proposals__files={"test": "a.pkl"}),
            "proposals.files ... 'test'",
        ),
        (
            "a scalar for a list",
            keys(classes__novel="star"),
            "classes.novel = 'star' ... valid list",
        ),
        ("a list for a scalar", keys(proposals__nms=[0.5]), "proposals.nms = [0.5] ... number"),
        (
            "a list for a block",
            keys(proposals=["nms"]),
            "proposals = ['nms'] ... ProposalsSettings",
        ),
        ("a scalar for a block", overlay("evaluation: 0.5"), "evaluation = 0.5"),
        ("a block for a scalar", keys(seed={"value": 1}), "seed = {'value': 1} ... integer"),
        (
            "an empty list",
            keys(region_embeddings__scales=[]),
            "region_embeddings.scales ... at least 1 item",
        ),
        ("no base class", keys(classes__base=[]), "classes.base ... at least 1 item"),
        (
            "a milestone beyond the last epoch",
            keys(base_detector__training__milestones=[2, 9]),
            "base_detector.training ... milestone ... 3 epochs",
        ),
        (
            "a template without a place",
            keys(text_embeddings__templates=["a photo"]),
            "'a photo' ... must contain {} once",
        ),
        (
            "a template with a name in its place",
            keys(text_embeddings__templates=["a {name}"]),
            "'a {name}' ... must contain {} once",
        ),
        ("a name with a slash", keys(name="runs/first"), "name = 'runs/first' ... pattern"),
        (
            "an unknown backbone",
            keys(backbone__architecture="resnet_50"),
            "backbone.architecture ... did you mean resnet50?",
        ),
        (
            "rows without their names",
            keys(text_embeddings__file="rows.npy"),
            "file and classes belong together",
        ),
        ("infinity", overlay("base_detector: {training: {learning_rate: .inf}}"), "learning_rate"),
        (
            "a milestone of the probe beyond its last epoch",
            keys(linear_probe__epochs=5),
            "linear_probe ... milestone 8 ... 5 epochs",
        ),
        ("a name that leads elsewhere", keys(name=".."), "name = '..'"),
        (
            "added classes that are no list",
            keys(classes__add_base="cat"),
            "classes.add_base = 'cat' ... valid list",
        ),
        ("a list for the whole", overlay("- name: mine\n"), "mine.yaml"),
        ("a text for the whole", overlay("name mine\n"), "mine.yaml"),
        ("another encoding", overlay("name: café".encode("latin1")), "mine.yaml"),
        ("a picture for an overlay", overlay(bytes([137, 80, 78, 71, 0, 1])), "mine.yaml"),
        # Classes.
        ("a class twice", keys(classes__novel=["star", "star"]), "'star' is listed twice"),
        (
            "a class that is base and novel",
            keys(classes__novel=["square"]),
            "'square' is listed twice",
        ),
        (
            "an added class that exists",
            keys(classes__add_novel=["square"]),
            "'square' is listed twice",
        ),
        ("an empty name", keys(classes__novel=["star", ""]), "class name '' ... is empty"),
        ("a number for a class", keys(classes__novel=[7]), "classes.novel.0 = 7 ... string"),
        (
            "a class that yaml takes for a truth",
            overlay("classes: {novel: [no]}"),
            "classes.novel.0 = False ... string",
        ),
        (
            "an unknown key of a class",
            keys(classes__novel=[{"name": "狗", "promt": "a dog"}]),
            "'promt' ... {name: ..., prompt: ...}",
        ),
        ("a class without a name", keys(classes__novel=[{"prompt": "a dog"}]), "a class is a name"),
        (
            "a prompt that is a list",
            keys(classes__novel=[{"name": "狗", "prompt": ["a dog"]}]),
            "classes.prompts ... string",
        ),
        (
            "a prompt for no class",
            keys(classes__prompts={"stra": "x"}),
            "prompts: 'stra' is no base or novel class",
        ),
        ("no classes", lambda: load_config({}), "classes ... required"),
        # Files of settings.
        (
            "a missing overlay",
            lambda: read_config([Path("config.yaml"), Path("mine.yaml")]),
            "mine.yaml: no such file",
        ),
        (
            "a folder for an overlay",
            lambda: read_config([Path("config.yaml"), Path("configs")]),
            "configs ... folder",
        ),
        (
            "an empty file alone",
            lambda: Path("a.yaml").touch() or read_config([Path("a.yaml")]),
            "classes ... required",
        ),
        (
            "tabs",
            overlay("proposals:\n\tnms: 0.5\n"),
            "mine.yaml ... not valid yaml ... \\t ... line 2",
        ),
        ("a quote that does not end", overlay("name: 'mine\n"), "mine.yaml ... not valid yaml"),
        # Files and combinations.
        (
            "a missing weights file",
            keys(clip__weights="nowhere.pt"),
            "clip.weights: nowhere.pt: no such file",
        ),
        ("a folder for weights", keys(clip__weights="resources"), "clip ... resources ... folder"),
        (
            "missing weights of the backbone",
            keys(backbone__weights="none.pth"),
            "backbone.weights: none.pth: no such file",
        ),
        (
            "no CLIP and nothing in its place",
            keys(clip__weights=None),
            "without CLIP this is needed: text_embeddings.file",
        ),
        (
            "imported proposals and nothing to start from",
            keys(proposals__files={"train": "a.pkl"}, backbone__weights=None),
            "proposals.files ... backbone.weights ... base_detector.checkpoint",
        ),
        (
            "the pictograms' CLIP on photographs",
            keys(dataset__source="coco"),
            "clip.weights ... drawn pictograms alone ... configs/photographs.yaml",
        ),
        (
            "val_images without val_annotations",
            keys(dataset__coco__val_annotations=None),
            "val_images and val_annotations belong together",
        ),
        ("a download without a place", keys(dataset__coco__download=True), "download needs a root"),
        (
            "expected boxes of no split",
            keys(dataset__coco__base_boxes={"training": 3}),
            "dataset.coco.base_boxes ... 'train' or 'val'",
        ),
    ],
    "check": [
        # The classes and files of the user's data, before the graph is built.
        (
            "a base class with a typing error",
            coco(base=["cta"]),
            "classes.base: boxes.json has no class 'cta' ... did you mean cat?",
        ),
        (
            "a base class that nothing resembles",
            coco(base=["zebra"]),
            "no class 'zebra' ... it has cat, dog",
        ),
        (
            "a base class of the drawn world that it lacks",
            lambda: check_classes(keys(classes__base=["squar"])(), {}),
            "the miniature world ... did you mean square?",
        ),
        ("a missing json", coco(train_annotations="nowhere.json"), "nowhere.json: no such file"),
        ("a folder for a json", coco(train_annotations="photos"), "photos ... folder"),
        ("a json of another layout", coco(val_annotations="other.json"), "other.json"),
        ("an image for a json", coco(val_annotations="photos/1.png"), "1.png is not valid json"),
    ],
    "stage": [
        # Weights.
        (
            "CLIP's weights cut off",
            clip(weights=cut),
            "weights.safetensors is not a complete file ... download it again",
        ),
        (
            "a web page for CLIP's weights",
            clip(weights=HTML),
            "weights.safetensors is not a complete file ... download it again",
        ),
        ("a web page for CLIP's .pt", clip(weights=page_of_html), "page.pt"),
        ("a pickle with code for CLIP's weights", clip(weights=with_code), "weights.pt"),
        (
            "weights of another architecture",
            clip(architecture=wider),
            "do not fit the architecture wider.json ... wrong shape",
        ),
        (
            "an unknown CLIP",
            clip(architecture="ViT-B-23"),
            "open_clip knows no model named 'ViT-B-23' ... did you mean ViT-B-32",
        ),
        (
            "an unknown tag of CLIP's weights",
            clip(architecture="ViT-B-32", pretrained="laion3b"),
            "clip.pretrained ... 'laion3b' ... did you mean",
        ),
        (
            "an architecture file that is none",
            clip(architecture="config.yaml.json"),
            "config.yaml.json",
        ),
        ("an architecture file that is a list", clip(architecture=list_json), "list.json"),
        (
            "another CLIP's vocabulary",
            clip(vocabulary=lambda _: Path("resources/small_clip/vocabulary.txt.gz")),
            "clip.vocabulary ... tokens",
        ),
        (
            "a vocabulary that is no gzip",
            clip(vocabulary=lambda _: Path("config.yaml")),
            "config.yaml",
        ),
        (
            "backbone weights that are a web page",
            backbone(HTML),
            "start.pth is not a checkpoint ... Is the file complete?",
        ),
        (
            "backbone weights with code",
            backbone({"state_dict": Evil()}),
            "start.pth is not a checkpoint ... none of its code was run",
        ),
        (
            "backbone weights of another network",
            backbone({"encoder.weight": torch.zeros(2)}),
            "neither OpenMMLab's names ... encoder.weight",
        ),
        (
            "torchvision's weights for another backbone",
            backbone({"conv1.weight": torch.zeros(2)}),
            "torchvision's names ... resnet50_torchvision",
        ),
        (
            "another project's safetensors",
            backbone({"a": torch.zeros(2)}, "start.safetensors"),
            "start.safetensors has no identity",
        ),
        (
            "a truncated safetensors",
            backbone(b"\x08\x00\x00\x00\x00\x00\x00\x00{", "start.safetensors"),
            "start.safetensors is not a whole safetensors file",
        ),
        # FAISS's factory.
        ("an unknown factory", factory("HSNW32"), "region_index.factory = 'HSNW32'"),
        (
            "a factory that retrieval cannot search",
            factory("HNSW32"),
            "region_index.factory = 'HNSW32' ... only Flat, SQ... and IVF...",
        ),
        ("an empty factory", factory(""), "region_index.factory = ''"),
        (
            "more lists than regions",
            factory("IVF4096,Flat"),
            "region_index.factory = 'IVF4096,Flat'",
        ),
        (
            "a product quantiser that does not divide the vectors",
            factory("IVF1,PQ7"),
            "region_index.factory = 'IVF1,PQ7'",
        ),
        # Imports.
        (
            "proposals of other images",
            proposals([np.zeros((0, 5), np.float32)] * 3),
            "p.pkl has 3 arrays ... 5 images ... proposals.id_maps",
        ),
        (
            "proposals of four columns",
            proposals([np.zeros((2, 4), np.float32)] * 5),
            "shape (2, 4), expected (n, 5)",
        ),
        (
            "proposals in 0 to 1, in reverse",
            proposals([np.array([[0.9, 0.9, 0.1, 0.1, 1]], np.float32)] * 5),
            "p.pkl: image 3: proposal 0 ... is inverted",
        ),
        (
            "proposals by another size of image",
            proposals([np.array([[0, 0, 1333, 800, 1]], np.float32)] * 5),
            "lies outside the image ... pixels of the original image",
        ),
        (
            "proposals with code",
            proposals(Evil()),
            "p.pkl is not a pickle of only numpy arrays ... none of its code was run",
        ),
        (
            "a dictionary for proposals",
            proposals({"boxes": []}),
            "p.pkl holds a dict, expected a list of arrays",
        ),
        (
            "a map of image ids of another split",
            proposals([np.zeros((0, 5), np.float32)] * 5, {"7": 0, "8": 1}),
            "map.json has 1 of the 5 images ... the map of another split",
        ),
        (
            "a map of image ids beyond the list",
            proposals([np.zeros((0, 5), np.float32)], {"7": 9, "3": 0, "41": 0}),
            "image 7 has place 9 in map.json",
        ),
        (
            "a map of image ids that is a list",
            proposals([np.zeros((0, 5), np.float32)], [7, 3]),
            "map.json is not of the form {image id: place}",
        ),
        (
            "proposals as json of another image",
            proposals([DETECTION | {"image_id": 5}], name="p.json"),
            "p.json: detection 0 ... no image 5",
        ),
        (
            "more rows than names",
            rows(np.ones((3, 4)), ["cat", "dog"]),
            "rows.npy has shape (3, 4) ... names.json lists 2 classes",
        ),
        (
            "rows without the class",
            rows(np.eye(2), ["dog", "cow"]),
            "names.json does not list the class 'cat'",
        ),
        (
            "a row of zeros",
            rows(np.zeros((1, 4)), ["cat"]),
            "rows.npy: the row of 'cat' has length 0",
        ),
        (
            "rows of objects",
            rows(np.array([Path()]), ["cat"]),
            "rows.npy does not hold a single numeric matrix",
        ),
        (
            "pseudo-labels without a score",
            labels(score=None),
            "labels.json: annotation 1 has no score",
        ),
        (
            "pseudo-labels with a text for a score",
            labels(cosine="high"),
            "labels.json: annotation 1 ... cosine",
        ),
        ("pseudo-labels without the class", labels("cat"), "labels.json has no category 'cat'"),
        (
            "pseudo-labels without a box of the class",
            labels("cow"),
            "labels.json has no label of class 'cow'",
        ),
        (
            "a pseudo-label outside its image",
            labels(bbox=[1, 1, 500, 4]),
            "annotation 1: bbox ... outside its image",
        ),
        (
            "a checkpoint of another detector",
            checkpoint({"a": torch.zeros(2)}),
            "ft.pth has no roi_head.prototype",
        ),
        (
            "a checkpoint of another shape",
            checkpoint(shape_of(1, 16)),
            "ft.pth does not fit the settings of backbone and base_detector ... missing: ",
        ),
        (
            "a checkpoint of flat tensors",
            checkpoint(
                {
                    "roi_head.prototype": torch.zeros(()),
                    "roi_head.projection_for_image.weight": torch.zeros(()),
                }
            ),
            "ft.pth",
        ),
        (
            "a checkpoint that is a web page",
            checkpoint(HTML),
            "ft.pth is not a checkpoint ... Is the file complete?",
        ),
        (
            "a checkpoint without novel weights",
            checkpoint(shape_of(1, 16), probe=True),
            "ft.pth has no roi_head.prototype_novel",
        ),
        (
            "novel weights of another detector",
            checkpoint({"roi_head.prototype_novel": torch.zeros(1, 12)}, probe=True),
            "belong to another detector ... base_detector.checkpoint",
        ),
        # Files of another run, and damaged files of a run.
        (
            "proposals of another run",
            foreign_proposals,
            "proposals.h5 holds proposals of other images",
        ),
        (
            "proposals cut off",
            truncated_proposals,
            "proposals.h5 is not a whole HDF5 file ... Delete it",
        ),
        ("a json for proposals", json_in_place_of_proposals, "train.json is not a whole HDF5 file"),
        ("proposals of too few images", embeddings_of_too_few_images, "few.h5"),
        (
            "a shard of another run",
            shard_of_another_run,
            "were made from different dataset ... --forcerun ... 0.h5 ... 1.h5",
        ),
        ("a shard too few", one_shard_is_missing, "1 shards were given ... one of 2"),
        ("a shard cut off", truncated_shard, "1.h5 is not a whole HDF5 file"),
        ("no shards", no_shards, "no shard of region embeddings"),
        (
            "an index cut off",
            truncated_index,
            "train.index is not a whole index ... --forcerun region_index",
        ),
        ("an index that FAISS cannot read", damaged_index, "train.index cannot be read by FAISS"),
        (
            "an index of another run",
            index_of_another_run,
            "train.index was made from other region_embeddings ... --forcerun ... train.index",
        ),
        (
            "a class without an embedding",
            class_without_embedding,
            "class 'cow' has no text embedding ... available: owl",
        ),
        (
            "a detector for text embeddings",
            detector_in_place_of_text_embeddings,
            "d.safetensors was written by stage base_detector",
        ),
        (
            "features of other pseudo-labels",
            features_of_other_labels,
            "image 7: a retrieved region has no features ... --forcerun retrieved_region_features",
        ),
        (
            "proposals for features",
            proposals_in_place_of_features,
            "proposals.h5 was written by stage proposals, not region_features",
        ),
    ],
    "command": [
        # Command lines.
        (
            "an unknown command",
            command("serch"),
            "there is no command 'serch'; did you mean search?",
            2,
        ),
        ("no command", command(), "usage: lpovod COMMAND", 2),
        (
            "score: no detections",
            command("score", "--ground-truth", "truth.json"),
            "--detections PATH ... lpovod score --help",
            2,
        ),
        ("score: a missing file", command(*SCORE), "truth.json: no such file"),
        (
            "score: a folder",
            command("score", "--ground-truth", "configs", "--detections", "found.json"),
            "configs ... folder",
        ),
        (
            "score: settings for annotations",
            command("score", "--ground-truth", "config.yaml", "--detections", "a"),
            "config.yaml is not valid json",
        ),
        (
            "score: annotations for detections",
            command(*SCORE, truth__json=TRUTH, found__json=TRUTH),
            "found.json is not in COCO's results format",
        ),
        (
            "score: detections for annotations",
            command(*SCORE, truth__json=[DETECTION], found__json=[DETECTION]),
            "truth.json is not a COCO json",
        ),
        (
            "score: no split",
            command(*SCORE, truth__json=UNSPLIT, found__json=[DETECTION]),
            "category 'cat' has the split None ... --novel CLASS",
        ),
        (
            "score: an unknown novel class",
            command(*SCORE, "--novel", "cow", truth__json=TRUTH, found__json=[DETECTION]),
            "truth.json has no category 'cow'",
        ),
        (
            "score: a detection without a box",
            command(*SCORE, truth__json=TRUTH, found__json=[{"image_id": 1}]),
            "found.json: detection 0 is not of the form",
        ),
        (
            "score: a detection in another image",
            command(*SCORE, truth__json=TRUTH, found__json=[DETECTION | {"image_id": 2}]),
            "truth.json has no image 2",
        ),
        (
            "score: a json cut off",
            command(*SCORE, truth__json=TRUTH, found__json='[{"image_id": 1,'),
            "found.json is not valid json ... Is the file complete?",
        ),
        (
            "score: an unknown protocol",
            command(*SCORE, "--protocol", "some"),
            "--protocol ... annotated_images",
            2,
        ),
        ("search: no words", command("search"), "name something to search for", 2),
        (
            "search: --k 0",
            command("search", "a star", "--k", "0", results__mini="x"),
            "--k 0 ... greater than or equal to 1",
            2,
        ),
        (
            "search: an objectness above one",
            command("search", "a star", "--objectness", "7"),
            "--objectness 7 ... less than or equal to 1",
            2,
        ),
        (
            "search: an unfinished run",
            command("search", "a star"),
            "results/mini/region_index/train.index: no such file ... snakemake --cores all",
        ),
        (
            "search: a missing overlay",
            command("search", "a star", "--configfile", "mine.yaml"),
            "mine.yaml: no such file",
        ),
        ("plan: a missing file", command("plan", "mine.yaml"), "mine.yaml: no such file"),
        (
            "plan: --images 0 0",
            command("plan", "--images", "0", "0"),
            "--images ... must be positive",
            2,
        ),
        ("plan: one number of images", command("plan", "--images", "10"), "--images", 2),
        ("plan: no cores", command("plan", "--cores", "0"), "--cores must be positive", 2),
        ("plan: a benchmark cut off", damaged_benchmark, "results/mini/benchmarks"),
        ("config: a picture", picture_for_config, "1.png"),
        (
            "config: a json for yaml",
            command("config", "mine.yaml", mine__yaml="{"),
            "mine.yaml is not valid yaml",
        ),
        (
            "config: an unknown form",
            command("config", "--print", "all"),
            "--print ... documentation",
            2,
        ),
        ("convert: an unknown format", command(*CONVERT, "xml"), "--to ... voc", 2),
        (
            "convert: a missing file",
            command(*CONVERT, "voc", truth__json=TRUTH),
            "found.json: no such file",
        ),
        (
            "convert: a missing dataset",
            command(*CONVERT, "voc", found__json=[DETECTION]),
            "truth.json: no such file",
        ),
        (
            "convert: a category of another data set",
            command(
                *CONVERT, "voc", truth__json=TRUTH, found__json=[DETECTION | {"category_id": 9}]
            ),
            "found.json: detection 0 ... no category 9 ... evaluation/ground_truth.json",
        ),
        (
            "convert: a category that is a list",
            command(
                *CONVERT, "voc", truth__json=TRUTH, found__json=[DETECTION | {"category_id": [9]}]
            ),
            "found.json: detection 0",
        ),
        (
            "convert: a threshold above all",
            command(
                *CONVERT, "yolo", "--threshold", "2", truth__json=TRUTH, found__json=[DETECTION]
            ),
            "nothing to write ... --threshold",
        ),
        (
            "convert: a folder without files",
            after(
                images_and_truth,
                "convert",
                "street",
                "--dataset",
                "truth.json",
                "--to",
                "voc",
                "--output",
                "out",
            ),
            "street: no json files",
        ),
        (
            "convert: an output that exists",
            command(*CONVERT[:-2], "configs", "--to", "voc"),
            "configs exists ... --output",
            2,
        ),
        ("adopt: a missing folder", command("adopt", "street", "--novel", "owl"), "street", 2),
        ("adopt: a file", command("adopt", "config.yaml", "--novel", "owl"), "config.yaml", 2),
        (
            "adopt: an empty folder",
            after(lambda: folder_named("street"), "adopt", "street", "--novel", "owl"),
            "street",
        ),
        (
            "adopt: images alone",
            after(images_alone, "adopt", "street", "--novel", "owl"),
            "1 images, and no labels ... Nothing was written",
        ),
        (
            "adopt: both machines",
            command("adopt", "street", "--gpu", "--cpu"),
            "--gpu and --cpu exclude one another",
            2,
        ),
        (
            "a stage: settings that are no json",
            stage(
                "region_index", "--shards", "a.h5", "--output", "i", "--settings", "factory=Flat"
            ),
            "--settings ... python -m workflow_scripts.region_index --help",
            2,
        ),
        (
            "a stage: settings with an unknown key",
            stage(
                "region_index",
                "--shards",
                "a.h5",
                "--output",
                "i",
                "--settings",
                '{"factor": "Flat"}',
            ),
            "factor",
            2,
        ),
        (
            "a stage: settings out of range",
            stage(
                "region_index",
                "--shards",
                "a.h5",
                "--output",
                "i",
                "--settings",
                '{"block_rows": 0}',
            ),
            "block_rows ... greater than or equal to 1",
            2,
        ),
        (
            "a stage: a missing option",
            stage("region_index"),
            "--shards ... python -m workflow_scripts.region_index --help",
            2,
        ),
        (
            "a stage: no command of several",
            stage("dataset"),
            "python -m workflow_scripts.dataset --help",
            2,
        ),
        (
            "a stage: a missing shard",
            stage("region_index", "--shards", "a.h5", "--output", "i", "--settings", "{}"),
            "a.h5: no such file",
        ),
    ],
}

CASES = [Case(when, *row) for when, rows in ROWS.items() for row in rows]


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The workflow's folder without results."""
    for name in ("config.yaml", "configs", "resources"):
        (tmp_path / name).symlink_to(Path(name).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.when}: {case.mistake}")
def test_the_message_names_what_is_wrong(case, capsys):
    with pytest.raises(SystemExit) as end:
        run(case.act, arguments=[])
    message = capsys.readouterr().err
    code = end.value.code
    if not isinstance(code, int):  # a text is printed at the very end
        message, code = f"{message}{code}", 1
    message = " ".join(message.split())  # help is wrapped
    assert code == case.code, message
    assert not [word for word in case.words.split(" ... ") if word not in message], message
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("proposals: {nsm: 0.5}", "proposals.nsm: unknown key; did you mean nms?"),
        ("proposals:\n\tnms: 0.5\n", "not valid JSON or YAML ... whitespace and tab"),
        ("classes: {base: [sqare]}", "has no class 'sqare'; did you mean square?"),
    ],
)
def test_the_workflow_ends_before_its_first_job(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(ROOT)
    folder = copy_project(tmp_path / "copy")
    (folder / "mine.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", "mine.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 1
    assert "Traceback" not in printed
    assert not [word for word in words.split(" ... ") if word not in printed], printed
