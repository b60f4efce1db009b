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
HTML = b"<!DOCTYPE html><html><title>404: not found</title></html>"
NO_BLOCK, NO_LIST = "a block of keys", "valid list"


class Evil:
    """Writes a file if a reader runs the code of a pickle."""

    def __reduce__(self):
        return Path("ran").touch, ()


class Case(NamedTuple):
    """A mistake.

    Attributes:
        when: it is noticed: config, check (of the data), stage or command.
        mistake: what the user did.
        act: does it, in a folder of its own.
        words: essential words of the message.
        code: exit code, 2 for wrong usage.
    """

    when: str
    mistake: str
    act: Callable[[], object]
    words: tuple[str, ...]
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
    return write_shards(
        Path(), world.dataset, vectors, world.boxes, world.objectness, **stated
    )


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
        import_proposals(world.dataset, Path(name), ProposalsSettings(), Path("out.h5"), place)

    return act


def rows(array: Any, names: Any, wanted: str = "cat") -> Callable[[], object]:
    """Imported text embeddings."""

    def act() -> None:
        np.save("rows.npy", array)
        write_json(Path("names.json"), names)
        settings = TextEmbeddingsSettings(file=Path("rows.npy"), classes=Path("names.json"))
        embed_classes([wanted], ClipSettings(weights=None), settings, Path("out.safetensors"))

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
        import_pseudo_labels(
            name, Path("labels.json"), world.dataset, settings, Path("out.json")
        )

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
    read_proposals(world.proposals, Path("other/train.json"))


def truncated_proposals() -> None:
    world = make_world(Path(), COUNTS)
    read_proposals(cut(world.proposals), world.dataset)


def json_in_place_of_proposals() -> None:
    world = make_world(Path(), COUNTS)
    read_proposals(world.dataset, world.dataset)


def shard_of_another_run() -> None:
    first, _ = shards()
    Path("other").mkdir()
    data = read_json(Path("train.json"))
    world = make_world(Path("other"), {i["id"] + 5000: 2 for i in data["images"]})
    vectors = {i: np.ones((2, 16), np.float16) / 4 for i in world.images}
    _, second = write_shards(
        Path("other"), world.dataset, vectors, world.boxes, world.objectness, proposals="q" * 64
    )
    open_shards([first, second])


def one_shard_is_missing() -> None:
    open_shards(shards()[:1])


def truncated_shard() -> None:
    first, second = shards()
    open_shards([first, cut(second)])


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
    retrieve(
        "owl",
        [text],
        text,
        Path("train.index"),
        made,
        Path("train.json"),
        PseudoLabelsSettings(),
        Path("out.json"),
    )


def class_without_embedding() -> None:
    vectors = {"owl": np.eye(16, dtype=np.float32)[0]}
    inputs = {"clip_weights": "w" * 64, "clip_architecture": "a"}
    text = Path("owl.safetensors")
    write_tensors(text, vectors, identity("text_embeddings", **inputs) | {"logit_scale": 100.0})
    factory("Flat")()
    made = sorted(Path().glob("*.h5"))
    retrieve("cow", [text], text, Path("train.index"), made, Path("train.json"), *[None] * 2)


def detector_in_place_of_text_embeddings() -> None:
    write_tensors(Path("d.safetensors"), {"a": np.ones(2)}, identity("base_detector"))
    paths = [Path("d.safetensors")]
    retrieve("owl", paths, paths[0], Path("i"), [], Path("train.json"), *[None] * 2)


def features_of_other_labels() -> None:
    world = make_world(Path(), COUNTS)
    write_json(Path("owl.json"), {})
    from lpovod.formats.regions import write_regions

    ident = identity("region_features", pseudo_labels="x" * 64, detector="d" * 64)
    with write_regions(Path("owl.h5"), ident) as writer:
        writer.add(7, world.boxes[7], world.objectness[7])
    train_linear_probe(
        [Path("owl.json")], [Path("owl.h5")], LinearProbeSettings(), 0, Path("out.safetensors")
    )


def proposals_in_place_of_features() -> None:
    world = make_world(Path(), COUNTS)
    paths = {n: Path(n) for n in ("detector", "linear_probe", "metrics", "detections")}
    evaluate(
        world.dataset,
        world.proposals,
        text_embeddings=[],
        region_embeddings=[],
        settings=load_config(DEFAULT).evaluation,
        ground_truth=Path("truth.json"),
        **paths,
    )


def embeddings_of_too_few_images() -> None:
    world = make_world(Path(), COUNTS)
    write_proposals(Path("few.h5"), world.dataset, {7: world.boxes[7]}, {7: world.objectness[7]})
    settings = RegionEmbeddingsSettings(shards=1)
    arguments = (world.dataset, Path("few.h5"), make_clip(Path(), 0), settings, 0)
    embed_regions(*arguments, Path("checkpoint"), "", Path("out.h5"))
