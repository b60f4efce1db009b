"""A finished run of untrained networks, made by the stages' own functions in a few seconds."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import write_proposals, write_shards
from models import BASE, DIMENSION, NOVEL, SMALL, arrays
from PIL import Image

from lpovod.apps.learn import Run, train
from lpovod.artifacts import identity, sha256, write_tensors
from lpovod.config import ClipSettings, Config, RegionIndexSettings
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.stages.model import join_model
from lpovod.stages.region_index import build_region_index
from lpovod.stages.text_embeddings import embed_classes

IMAGES, REGIONS = 14, 6


def make_run(folder: Path, clip: ClipSettings, **settings) -> Path:
    """Make a run in a folder, with everything that `lpovod serve` and `lpovod learn` read.

    Args:
        folder: of the run.
        clip: the tiny CLIP.
        **settings: blocks of the configuration that differ from these.
    """
    content = SMALL | {
        "name": "tiny",
        "clip": clip.model_dump(mode="json"),
        "text_embeddings": {"templates": ["a photo of a {}"]},
        "region_features": {"batch_size": 2},
        "pseudo_labels": {"k": 10, "objectness": 0.2},
        "linear_probe": {"epochs": 3, "milestones": [2], "learning_rate": 0.05},
    }
    config = Config.model_validate(content | settings)
    for number, split in enumerate(("train", "val")):
        _draw(folder, split, number)
    _regions(folder, clip)
    _networks(folder, config)
    texts = [folder / f"text_embeddings/{split}.safetensors" for split in ("base", "novel")]
    store = folder / "store/text_embeddings"
    embed_classes(config.classes, clip, config.text_embeddings, *texts, store, "code")
    probe = folder / "linear_probe/weights.safetensors"
    for trained in (False, True):  # the run's own code trains the probe, with a model of zeros
        detector = folder / "base_detector/detector.safetensors"
        weights = dict.fromkeys(NOVEL, np.zeros(config.base_detector.dimension, np.float32))
        if trained:
            run = Run(folder)
            weights = train(run, run.model, run.retrieve(run.model))
        write_tensors(probe, weights, identity("linear_probe", detector=detector))
        join_model(
            config,
            json.dumps({name: number for number, name in enumerate([*BASE, *NOVEL], 1)}),
            folder / "proposals/network.safetensors",
            detector,
            probe,
            texts,
            folder / "model/model.safetensors",
        )
    return folder


def _draw(folder: Path, split: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    images, annotations = [], []
    (folder / f"dataset/images/{split}").mkdir(parents=True)
    for image_id in range(1 + 100 * seed, 1 + 100 * seed + IMAGES):
        width, height = (80, 60) if image_id % 3 else (60, 80)
        coarse = random.integers(0, 256, (6, 8, 3)).astype(np.uint8)
        drawn = Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)
        drawn.save(folder / f"dataset/images/{split}/{image_id}.png")
        named = {"id": image_id, "file_name": f"{image_id}.png"}
        images.append(named | {"width": width, "height": height})
        box = {"bbox": [10, 10, 20, 20], "area": 400, "iscrowd": 0}
        annotations.append(
            {"id": image_id, "image_id": image_id, "category_id": 1 + image_id % 4} | box
        )
    categories = [{"id": n, "name": name} for n, name in enumerate([*BASE, *NOVEL], 1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"dataset/{split}.json").write_text(json.dumps(content))
    without = content | {"annotations": []}
    (folder / f"dataset/{split}.images.json").write_text(json.dumps(without))


def _regions(folder: Path, clip: ClipSettings) -> None:
    random, dataset = np.random.default_rng(5), folder / "dataset/train.images.json"
    boxes, objectness, vectors = {}, {}, {}
    for image_id in range(1, 1 + IMAGES):
        low = random.uniform(0, 30, (REGIONS, 2))
        boxes[image_id] = np.hstack([low, low + random.uniform(8, 28, (REGIONS, 2))])
        boxes[image_id] = boxes[image_id].astype(np.float32)
        objectness[image_id] = random.uniform(0, 1, REGIONS).astype(np.float32)
        rows = random.standard_normal((REGIONS, DIMENSION))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        vectors[image_id] = rows.astype(np.float16)
    write_proposals(folder / "proposals/train/0.h5", dataset, boxes, objectness)
    inputs = {
        "clip_weights": sha256(clip.weights),
        "clip_architecture": sha256(Path(clip.architecture)),
    }
    shards = folder / "region_embeddings/train"
    shards.mkdir(parents=True)
    paths = write_shards(shards, dataset, vectors, boxes, objectness, **inputs)
    build_region_index(paths, RegionIndexSettings(), folder / "region_index/train.index")


def _networks(folder: Path, config: Config) -> None:
    torch.manual_seed(3)
    network = ProposalNetwork(config.backbone, config.proposals.anchor_scale)
    torch.nn.init.normal_(network.objectness.weight, std=3.0)
    torch.nn.init.normal_(network.distances.weight, std=0.5)
    detector = Detector(config.backbone, config.base_detector, len(BASE), DIMENSION)
    torch.nn.init.normal_(detector.box_refinement.weight, std=0.3)
    torch.nn.init.normal_(detector.prototypes, std=0.05)
    write_tensors(folder / "proposals/network.safetensors", arrays(network), identity("proposals"))
    ident = identity("base_detector") | {"classes": BASE}
    write_tensors(folder / "base_detector/detector.safetensors", arrays(detector), ident)
