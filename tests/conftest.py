"""Small inputs that several tests share: a drawn world of a few images and a tiny random CLIP."""

import json
import logging
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from open_clip.model import CLIP
from PIL import Image
from project import copy_project, snakemake
from safetensors.torch import save_file

from lpovod.artifacts import identity
from lpovod.config import ClipSettings
from lpovod.formats.regions import WHOLE, Shard, write_regions

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}

# One class fewer than the miniature world has, so that the sixth can be added.
SMALLEST = {"classes": {"novel": ["star", "ring", "bolt", "house", "fish"]}}

torch.set_num_threads(1)
# A shell's background job ignores Ctrl-C, and so would the programs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the processes that share the files then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def smallest_run(tmp_path_factory) -> Path:
    """A copy of the project with the finished run of configs/smallest.yaml and `SMALLEST`.

    Who changes it puts it back, or takes a copy.
    """
    folder = tmp_path_factory.mktemp("smallest") / "project"
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _run_smallest(folder)
    # The first of pytest-xdist's processes makes the run, and each gets a copy of its own.
    shared = tmp_path_factory.getbasetemp().parent / "smallest"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            _run_smallest(folder).rename(shared)
    return shutil.copytree(shared, folder)


def _run_smallest(folder: Path) -> Path:
    copy_project(folder)
    snakemake(folder, "smallest.yaml", SMALLEST, "--cores", "2")
    return folder


@pytest.fixture
def logged(caplog, monkeypatch) -> pytest.LogCaptureFixture:
    """What the library logs, even after a test that sent it to standard error."""
    monkeypatch.setattr(logging.getLogger("lpovod"), "propagate", True)
    caplog.set_level(logging.INFO, "lpovod")
    return caplog


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory) -> ClipSettings:
    """Settings of a CLIP of two one-layer towers with random weights."""
    return make_clip(tmp_path_factory.mktemp("clip"), seed=0)


def make_clip(folder: Path, seed: int) -> ClipSettings:
    torch.manual_seed(seed)
    model = CLIP(**TINY_CLIP)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    (folder / "architecture.json").write_text(json.dumps(TINY_CLIP))
    save_file(model.state_dict(), folder / "weights.safetensors")
    return ClipSettings(
        architecture=str(folder / "architecture.json"),
        weights=folder / "weights.safetensors",
        vocabulary=None,
    )


@dataclass(frozen=True)
class World:
    """A dataset on disk with proposals of every image."""

    dataset: Path
    proposals: Path
    images: dict[int, np.ndarray]
    boxes: dict[int, np.ndarray]
    objectness: dict[int, np.ndarray]


@pytest.fixture
def world(tmp_path) -> World:
    """Five images of different sizes, ids in no order, one without proposals."""
    return make_world(tmp_path, {7: 4, 3: 9, 900: 0, 41: 1, 20: 6})


def make_world(
    folder: Path, counts: dict[int, int], seed: int = 0, name: str = "train.json"
) -> World:
    random = np.random.default_rng(seed)
    images, boxes, objectness, listed = {}, {}, {}, []
    (folder / "images" / "train").mkdir(parents=True)
    for image_id, count in counts.items():
        width, height = (int(side) for side in random.integers(40, 90, 2))
        images[image_id] = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
        low = random.uniform(0, [width - 12, height - 12], (count, 2))
        high = low + random.uniform(6, np.array([width, height]) - low)
        high = np.minimum(high, [width, height])
        boxes[image_id] = np.concatenate([low, high], axis=1).astype(np.float32)
        objectness[image_id] = random.uniform(0, 1, count).astype(np.float32)
        file = f"{image_id:06}.png"
        Image.fromarray(images[image_id]).save(folder / "images" / "train" / file)
        listed.append({"id": image_id, "file_name": file, "width": width, "height": height})
    dataset, proposals = folder / name, folder / "proposals.h5"
    categories = [{"id": 1, "name": "circle", "split": "base"}]
    content = {"images": listed, "annotations": [], "categories": categories}
    dataset.write_text(json.dumps(content))
    write_proposals(proposals, dataset, boxes, objectness)
    return World(dataset, proposals, images, boxes, objectness)


def write_proposals(
    path: Path, dataset: Path, boxes: dict, objectness: dict, shard: Shard = WHOLE
) -> None:
    with write_regions(path, identity("proposals", dataset=dataset), shard) as writer:
        for image_id in shard.of(boxes):
            writer.add(image_id, boxes[image_id], objectness[image_id])


def write_shards(
    folder: Path,
    dataset: Path,
    vectors: dict[int, np.ndarray],
    boxes: dict,
    objectness: dict,
    shards: int = 2,
    **inputs: str,
) -> list[Path]:
    """Region embeddings with given vectors, image by image in turn over the shards."""
    stated = {"proposals": "p" * 64, "clip_weights": "w" * 64, "clip_architecture": "a"} | inputs
    settings = {"scales": [1.0, 1.5]}
    paths = [folder / f"{number}.h5" for number in range(shards)]
    for number, path in enumerate(paths):
        ident = identity("region_embeddings", settings, dataset=dataset, **stated)
        with write_regions(path, ident, Shard(number, shards)) as writer:
            for image_id in list(vectors)[number::shards]:
                writer.add(
                    image_id, boxes[image_id], objectness[image_id], embedding=vectors[image_id]
                )
    return paths
