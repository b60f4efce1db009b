"""Every stage that computes on a device, at its smallest, beside what a CPU makes of the same.

The devices are the strict one (`strict_device.py`) and a GPU where there is one. `test_devices.py`
runs this file in a process of its own, since a backend is registered for a whole process:

    python -m pytest tests/device_cases.py

As a program, under `lpovod.launcher`, it is one of two ranks (`learn_both`).
"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strict_device
import torch
from conftest import make_clip, make_world, write_proposals, write_shards
from models import SMALL, random_model
from PIL import Image
from test_model import picture
from tiny_run import make_run
from torch import Tensor, nn

import lpovod
from lpovod import training
from lpovod.apps.detect import detect as detect_in_files
from lpovod.apps.learn import Run, learn
from lpovod.artifacts import read_tensors, write_json
from lpovod.boxes import take
from lpovod.clip import Clip, load_clip
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ClipSettings,
    ProposalsSettings,
    RegionEmbeddingsSettings,
    RegionFeaturesSettings,
    TrainingSettings,
)
from lpovod.crops import crop_and_resize
from lpovod.distributed import LossesOfRanks
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset
from lpovod.formats.image_features import ImageFeatures, paths_in
from lpovod.formats.images import read_image
from lpovod.formats.model import read_model
from lpovod.formats.regions import Regions, RegionStore
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.stages import base_detector, proposal_network
from lpovod.stages.base_detector import train_base_detector
from lpovod.stages.proposal_network import train_proposal_network
from lpovod.stages.proposals import propose
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_features import extract_retrieved, extract_split
from lpovod.stages.small_clip.zero_shot import zero_shot
from lpovod.training import build_optimizer, ready, train, write_training
from lpovod.transfers import fetch
from lpovod.views import LoadedView, View, apply_view

WAITS = {
    "proposal_network": (3, 0),
    "base_detector with an RPN": (4, 1),
    "base_detector": (1, 0),
    "proposals": (0, 1),
    "region_embeddings": (0, 0),
    "region_features": (0, 0.5),
    "model": (0, 3),
}
"""How often the host may wait for the device: in a training step, by the images in it, a fixed part
and a part per image; in inference per image, here alone in its batch, or of region features one of
two, after loading the network."""

BACKBONE = BackboneSettings(channels=16, short_side=64, long_side=96)
TIMM = BACKBONE.model_copy(update={"architecture": "timm:test_efficientnet"})
STEP = TrainingSettings(
    epochs=1,
    images_per_step=2,
    learning_rate=0.01,
    warmup_steps=0,
    milestones=[1],
    short_sides=[64],
)
HEADS = BaseDetectorSettings(
    training=STEP,
    samples_per_image=16,
    head_convolutions=1,
    dimension=32,
    finest_scale=16,
    distillation_regions=3,
)
FINDER = ProposalsSettings(
    training=STEP, box_iou=0.3, samples_per_image=20, per_level=200, per_image=12
)
CUDA = ["cuda"] * torch.cuda.is_available()
STRICT = strict_device.available()
if STRICT:
    strict_device.register()
needs_strict = pytest.mark.skipif(not STRICT, reason="this torch has no backends in Python")
DEVICES = [pytest.param("strict", marks=needs_strict), *CUDA]
on_devices = pytest.mark.parametrize("device", DEVICES)


def tolerance(device: str, of_cuda: float, of_strict: float = 1e-5) -> dict[str, float]:
    """How near a device's values are to a CPU's; the strict one computes on it."""
    limit = of_strict if device == "strict" else of_cuda
    return {"rtol": limit, "atol": limit}


def same(found: Any, expected: Any, limits: dict[str, float]) -> None:
    """Compare arrays by name."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **limits)


@dataclass(frozen=True)
class Inputs:
    """Annotated images, and the files that stages make of them, all in one folder."""

    folder: Path
    images: dict[int, np.ndarray]
    boxes: dict[int, np.ndarray]
    clip: ClipSettings | None

    @property
    def dataset(self) -> Path:
        return self.folder / "train.json"

    @property
    def proposals(self) -> Path:
        return self.folder / "proposals.h5"

    @property
    def network(self) -> Path:
        return self.folder / "network.safetensors"

    @property
    def detector(self) -> Path:
        return self.folder / "detector.safetensors"

    @property
    def shards(self) -> list[Path]:
        return [self.folder / f"{number}.h5" for number in range(2)]


def draw(folder: Path, counts: dict[int, int]) -> Inputs:
    """Images with as many proposals as `counts` says, an object each, and embeddings."""
    world = make_world(folder, counts)
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": [4.0 + n, 5.0, 24.0, 20.0]}
        for n, i in enumerate(world.images)
    ]
    content = json.loads(world.dataset.read_text()) | {"annotations": annotations}
    world.dataset.write_text(json.dumps(content))
    random = np.random.default_rng(0)
    vectors = {}
    for image_id, boxes in world.boxes.items():
        rows = random.normal(size=(len(boxes), 8))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        vectors[image_id] = rows.astype(np.float16)
    write_proposals(world.proposals, world.dataset, world.boxes, world.objectness)
    write_shards(folder, world.dataset, vectors, world.boxes, world.objectness)
    (folder / "clip").mkdir()
    return Inputs(folder, world.images, world.boxes, make_clip(folder / "clip", 0))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    drawn = draw(tmp_path_factory.mktemp("inputs"), {7: 9, 3: 6, 20: 5, 41: 7})
    learn_proposals(drawn, drawn.folder, "cpu")
    learn_detector(drawn, drawn.folder, "cpu")
    return drawn


def learn_proposals(
    inputs: Inputs, output: Path, device: str, backbone: BackboneSettings = BACKBONE
) -> None:
    files = [output / name for name in ("checkpoint", "network.safetensors", "history.jsonl")]
    train_proposal_network(
        inputs.dataset, backbone, FINDER, 0, files[0], "code", *files[1:], device
    )


def learn_detector(
    inputs: Inputs,
    output: Path,
    device: str,
    settings: BaseDetectorSettings = HEADS,
    workers: int = 0,
) -> None:
    files = [output / name for name in ("checkpoint2", "detector.safetensors", "history2.jsonl")]
    train_base_detector(
        *(inputs.dataset, inputs.shards, inputs.network, BACKBONE, settings, 0),
        *(files[0], "code", *files[1:], device),
        workers=workers,
    )


def learned(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """The weights that a training left in a folder."""
    name = {"proposals": "network", "base_detector": "detector"}[stage]
    return read_tensors(folder / f"{name}.safetensors", stage)[0]


def in_both(work: Callable[[Path, str], Any], folder: Path, device: str) -> tuple[Any, Any]:
    """What a function of a folder and a device makes on the CPU, and on the device."""
    for name in ("cpu", "device"):
        (folder / name).mkdir()
    expected = work(folder / "cpu", "cpu")
    with strict_device.counted() as waits:
        found = work(folder / "device", device)
    assert waits or device != "strict", "nothing was computed on the device"
    return expected, found


def same_regions(expected: RegionStore, found: RegionStore, limits: dict[str, float]) -> None:
    assert found.image_ids == expected.image_ids
    for image_id in expected.image_ids:
        one, other = expected.read(image_id), found.read(image_id)
        same(other.columns, one.columns, limits)
        np.testing.assert_allclose(other.box, one.box, atol=1e-2)


# ------------------------------------------------------------------------------- trainings


@on_devices
@pytest.mark.parametrize("backbone", [BACKBONE, TIMM], ids=["own", "timm"])
def test_a_proposal_network_is_trained(inputs, tmp_path, device, backbone):
    def work(folder: Path, where: str) -> dict[str, np.ndarray]:
        learn_proposals(inputs, folder, where, backbone)
        return learned(folder, "proposals")

    expected, found = in_both(work, tmp_path, device)
    same(found, expected, tolerance(device, 0.05, 1e-4))


@on_devices
@pytest.mark.parametrize(
    ("regions", "sampling_ratio", "workers"),
    [("rpn", 0, 0), ("proposals", 1, 0), ("rpn", 1, 2)],  # workers fork beside the open store
)
def test_a_detector_is_trained(inputs, tmp_path, device, regions, sampling_ratio, workers):
    settings = HEADS.model_copy(
        update={
            "regions": regions,
            "sampling_ratio": sampling_ratio,
            "training": STEP,
        }
    )

    def work(folder: Path, where: str) -> dict[str, np.ndarray]:
        learn_detector(inputs, folder, where, settings, workers)
        return learned(folder, "base_detector")

    expected, found = in_both(work, tmp_path, device)
    same(found, expected, tolerance(device, 0.05, 1e-4))


def fit(
    folder: Path, device: str, optimizer: str, stop_at: int | None = None
) -> dict[str, np.ndarray]:
    """Three epochs of a small regression with a norm; optionally ends abruptly before one."""
    torch.manual_seed(0)
    # Convolutions, whose weights lie in another order on a CPU than on a GPU. A bias before a norm
    # would have rounding alone as its gradient.
    layers = (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten())
    model = ready(nn.Sequential(*layers, nn.Linear(4, 1)), device)

    def batches(epoch: int, step: int) -> torch.Tensor:
        if epoch == stop_at:
            raise KeyboardInterrupt
        drawn = torch.Generator().manual_seed(epoch)
        return torch.randn(2, 16, 3, 5, 5, generator=drawn)[step:]

    def losses(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        batch = batch.to(device)
        return {"square": (model(batch)[:, 0] - batch.mean((1, 2, 3))).square().mean()}

    schedule = STEP.model_copy(update={"epochs": 3, "optimizer": optimizer})
    files = folder / "checkpoint", folder / "weights", folder / "history"
    lines = train(model, losses, batches, 2, schedule, files[0], "a")
    write_training(model, lines, {"stage": "a"}, files[1], files[2], files[0])
    return read_tensors(files[1], "a")[0]


@on_devices
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("first", ["cpu", "device"])
def test_a_training_is_resumed_on_another_device(tmp_path, device, optimizer, first):
    places = ("cpu", device) if first == "cpu" else (device, "cpu")
    (tmp_path / "whole").mkdir()
    expected = fit(tmp_path / "whole", "cpu", optimizer)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, places[0], optimizer, stop_at=1)
    with pytest.raises(KeyboardInterrupt):  # on the same device, and then on the other
        fit(tmp_path, places[0], optimizer, stop_at=2)
    same(fit(tmp_path, places[1], optimizer), expected, tolerance(device, 1e-3))


def learn_both(folder: Path, output: Path, device: str) -> None:
    """Both trainings from the files of `inputs`; in double precision: no rounding flips a ReLU."""
    inputs = Inputs(folder, {}, {}, None)
    torch.set_default_dtype(torch.float64)
    learn_proposals(inputs, output, device)
    torch.set_default_dtype(torch.float32)
    learn_detector(inputs, output, device)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch's own reduction needs two GPUs")
@pytest.mark.parametrize("device", ["cuda"])
def test_two_ranks_train_as_one(inputs, tmp_path, device):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    learn_both(inputs.folder, tmp_path / "one", "cpu")
    words = [str(inputs.folder), str(tmp_path / "two"), device]
    done = subprocess.run(
        [sys.executable, "-m", "lpovod.launcher", "1", "2", "device_cases", *words],
        env=os.environ | {"PYTHONPATH": ".:tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    for stage in ("proposals", "base_detector"):
        one, two = (learned(tmp_path / name, stage) for name in ("one", "two"))
        same(two, one, tolerance(device, 0.05, 1e-4))


# ------------------------------------------------------------------------------- inference


@on_devices
def test_proposals_are_found(inputs, tmp_path, device):
    def work(folder: Path, where: str) -> RegionStore:
        propose(inputs.dataset, inputs.network, BACKBONE, FINDER, 0, 1, folder / "p.h5", where)
        return RegionStore(folder / "p.h5", "proposals")

    one, other = in_both(work, tmp_path, device)
    assert other.image_ids == one.image_ids
    for image_id in one.image_ids:
        # Of an untrained network's scores only the first are far enough apart for a GPU.
        expected, found = (store.read(image_id).objectness[:5] for store in (one, other))
        np.testing.assert_allclose(found, expected, **tolerance(device, 1e-2))


@on_devices
def test_a_split_is_described(inputs, tmp_path, device):
    def work(folder: Path, where: str) -> RegionStore:
        extract_split(
            *(inputs.dataset, inputs.proposals, inputs.detector, BACKBONE, HEADS),
            *(RegionFeaturesSettings(batch_size=2), folder / "f.h5", where),
        )
        return RegionStore(folder / "f.h5", "region_features")

    same_regions(*in_both(work, tmp_path, device), tolerance(device, 0.01))


@on_devices
def test_retrieved_images_are_described(inputs, tmp_path, device):
    box = [float(v) for v in inputs.boxes[7][0]]
    low, high = box[:2], box[2:]
    label = {"id": 1, "image_id": 7, "category_id": 1, "score": 0.5, "iscrowd": 0}
    label["bbox"] = [*low, high[0] - low[0], high[1] - low[1]]
    labels = json.loads(inputs.dataset.read_text()) | {"annotations": [label]}
    write_json(tmp_path / "labels.json", labels)

    def work(folder: Path, where: str) -> dict[str, np.ndarray]:
        extract_retrieved(
            *(inputs.dataset, [inputs.proposals], tmp_path / "labels.json", inputs.detector),
            *(BACKBONE, HEADS, RegionFeaturesSettings(batch_size=2), 0, 1, folder / "retrieved"),
            *(folder / "store", "code", where),
        )
        return ImageFeatures(paths_in([folder / "retrieved"])).read(7)

    expected, found = in_both(work, tmp_path, device)
    same(found, expected, tolerance(device, 0.01))


@on_devices
@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-3), ("bfloat16", 3e-2)])
def test_regions_are_embedded(inputs, tmp_path, device, precision, limit):
    settings = RegionEmbeddingsSettings(batch_size=7, precision=precision)

    def work(folder: Path, where: str) -> RegionStore:
        files = folder / "checkpoint", "code", folder / "0.h5"
        embed_regions(inputs.dataset, inputs.proposals, inputs.clip, settings, *files, where)
        return RegionStore(folder / "0.h5", "region_embeddings")

    same_regions(*in_both(work, tmp_path, device), {"rtol": 0, "atol": limit})


@on_devices
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_are_cut_on_the_device(inputs, device, interpolation, resize_mode):
    boxes = np.array([[0, 0, 30, 20], [3, 5, 13, 35], [9, 9, 10, 11]])
    how = (24, device, interpolation, resize_mode)
    found = crop_and_resize(inputs.images[7], boxes, *how)
    assert found.device.type == device
    expected = crop_and_resize(inputs.images[7], boxes, 24, "cpu", *how[2:])
    apart = (found.cpu().int() - expected.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


@on_devices
def test_clip_reads_texts_and_crops_there(inputs, device):
    on_cpu, model = load_clip(inputs.clip), load_clip(inputs.clip, device)
    crops = crop_and_resize(inputs.images[7], np.array([[0, 0, 30, 20]]), model.image_size)
    for given in (crops, crops.to(device)):
        features = model.encode_crops(given)
        assert features.device.type == device
        np.testing.assert_allclose(
            features.cpu(), on_cpu.encode_crops(crops), **tolerance(device, 1e-2)
        )
    texts = [clip.encode_texts(["a dog", "dogs"]).cpu() for clip in (model, on_cpu)]
    np.testing.assert_allclose(*texts, **tolerance(device, 1e-2))
    one, other = (zero_shot(c, 1, 0, 0.5) for c in (on_cpu, model))
    for kind, scores in one.items():
        assert other[kind]["cosine"] == pytest.approx(scores["cosine"], abs=1e-2)


@on_devices
def test_a_model_detects_there(tmp_path, device):
    file = tmp_path / "model.safetensors"
    random_model(file)
    images = [picture(90, 70, seed) for seed in range(3)]
    on_cpu, model = (lpovod.load(file, where) for where in ("cpu", device))
    for network in (model.network, model.detector):
        assert next(network.parameters()).device.type == device
    for one, other in zip(on_cpu.detect(images), model.detect(images), strict=True):
        assert len(one) == len(other) > 0
        # From features in half precision, which round either way.
        np.testing.assert_allclose(
            other.confidence, one.confidence, **tolerance(device, 1e-2, 1e-4)
        )


@on_devices
@pytest.mark.parametrize("stage", ["proposals", "region_features"])
def test_a_model_computes_there_in_the_precision_of_its_run(tmp_path, device, stage):
    pixels, found = picture(90, 70), {}
    for precision in ("float32", "bfloat16"):
        random_model(
            tmp_path / precision, **{stage: SMALL.get(stage, {}) | {"precision": precision}}
        )
        model = lpovod.load(tmp_path / precision, device)
        (regions,) = model.describe([model.view(pixels)], [pixels.shape[:2]])
        found[precision] = regions.objectness if stage == "proposals" else regions["feature"]
    one, other = found["float32"], found["bfloat16"]
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(other, one, atol=0.02 * float(np.abs(one).max()))


@on_devices
def test_files_are_detected_there_while_other_processes_read_them(
    tmp_path, device, monkeypatch, logged
):
    """In passes of two images of one size, and in the order of their names."""
    random_model(tmp_path / "model")
    (tmp_path / "images").mkdir()
    for number in range(7):
        pixels = picture(*[(90, 70), (70, 90), (64, 64)][number % 3], number)
        Image.fromarray(pixels).save(tmp_path / f"images/{number}.png")
    (tmp_path / "images/3.png").write_bytes(b"no image")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})

    def noted(path: Path, size: Any) -> np.ndarray:
        (tmp_path / f"{os.getpid()}.reader").touch()
        return read_image(path, size)

    monkeypatch.setattr("lpovod.apps.detect.read_image", noted)

    def work(folder: Path, where: str) -> list[dict[str, Any]]:
        options = {"model": tmp_path / "model", "batch_size": 2, "output": folder, "draw": True}
        with pytest.raises(LpovodError, match="1 of 7 images could not be read"):
            detect_in_files((str(tmp_path / "images"),), device=where, **options)
        assert len(list((folder / "drawn").iterdir())) == 6
        return json.loads((folder / "detections.json").read_text())

    expected, found = in_both(work, tmp_path, device)
    assert len(list(tmp_path.glob("*.reader"))) == 3  # this process, for the CPU, and two more
    assert logged.text.count(f"skipped: {tmp_path}/images/3.png cannot be decoded") == 2
    assert len(found) == len(expected) > 0
    names = [e["file_name"] for e in found]
    assert names == sorted(names) and {*names} == {f"{n}.png" for n in (0, 1, 2, 4, 5, 6)}
    for one, other in zip(expected, found, strict=True):
        assert one["file_name"] == other["file_name"]
        assert other["score"] == pytest.approx(
            one["score"], abs=1e-4 if device == "strict" else 1e-2
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of untrained networks."""
    folder = tmp_path_factory.mktemp("run")
    return make_run(folder, make_clip(folder, 0))


@on_devices
def test_a_class_is_learned_there(run, tmp_path, device):
    Image.fromarray(picture(40, 30)).save(tmp_path / "otter.png")

    def work(folder: Path, where: str) -> dict[str, np.ndarray]:
        shutil.rmtree(run / "store")  # its features have the device in their key, too
        files = {"output": folder / "model", "image": (tmp_path / "otter.png",)}
        learn("otter", run, **files, device=where)
        return read_model(folder / "model").weights

    source = Run(run, device)
    for network in (source.clip.model, source.detector.model):
        assert next(network.parameters()).device.type == device
    expected, found = in_both(work, tmp_path, device)
    assert "otter" in found
    same(
        found,
        expected,
        {"rtol": 0, "atol": 1e-3} if device == "strict" else tolerance(device, 0.05),
    )


# ----------------------------------------------------------------------------------- waits


def batch_of(images: int) -> tuple[CocoDataset, list]:
    """Views of random images, with proposals and embeddings."""
    random = np.random.default_rng(0)
    boxes = np.array([[12, 8, 44, 50], [60, 4, 90, 60], [3, 3, 30, 30]], np.float32)
    vectors = {"embedding": np.eye(8, dtype=np.float16)[:3]}
    extra = Regions(np.ones(3, np.int64), np.arange(3), boxes, np.ones(3), vectors)
    pixels = random.integers(0, 256, (images, 64, 96, 3), dtype=np.uint8)
    views = [
        replace(apply_view(p, View(i, 64, 96, seed=i)), extra=extra) for i, p in enumerate(pixels)
    ]
    listed = {i: {"file_name": "", "width": 96, "height": 64} for i in range(images)}
    annotations = {i: [{"bbox": [10, 10, 30, 40], "category_id": 1}] for i in range(images)}
    return CocoDataset(Path("x.json"), listed, annotations, {1: {"name": "a"}}), views


def waits_of_a_step(stage: str, images: int) -> Counter:
    data, views = batch_of(images)
    if stage == "proposal_network":
        model: nn.Module = ready(ProposalNetwork(BACKBONE, 8.0), "strict")
    else:
        regions = "rpn" if "RPN" in stage else "proposals"
        settings = HEADS.model_copy(update={"regions": regions})
        model = ready(Detector(BACKBONE, settings, 1, 8), "strict")

    def losses(part: list[LoadedView]) -> dict[str, Tensor]:
        if stage == "proposal_network":
            return proposal_network._losses(model, data, part, FINDER, "strict")
        return base_detector.training_losses(model, data, part, {1: 0}, settings, "strict")

    optimizer = build_optimizer(model, STEP)
    with strict_device.counted() as waits:
        training._step(model, LossesOfRanks(model, losses), views, optimizer, STEP, 0)
    return waits


@needs_strict
@pytest.mark.parametrize(
    "stage", ["proposal_network", "base_detector with an RPN", "base_detector"]
)
@pytest.mark.parametrize("images", [2, 4])
def test_a_step_waits_no_more_often_than_it_may(stage, images):
    fixed, each = WAITS[stage]
    waits = waits_of_a_step(stage, images)
    assert sum(waits.values()) <= fixed + each * images, waits.most_common()


def infer(stage: str, folder: Path, images: int, inputs: Inputs) -> Counter:
    """Run a stage on as many images, all but the network's weights new; returns its waits."""
    folder.mkdir()
    if stage == "model":
        random_model(folder / "model")
        model = lpovod.load(folder / "model", "strict")
        with strict_device.counted() as waits:
            model.detect([picture(90, 70, seed) for seed in range(images)], batch_size=1)
        return waits
    drawn = draw(folder, dict.fromkeys(range(1, images + 1), 4))
    features = RegionFeaturesSettings(batch_size=2)
    with strict_device.counted() as waits:
        if stage == "proposals":
            propose(
                drawn.dataset, inputs.network, BACKBONE, FINDER, 0, 1, folder / "o.h5", "strict"
            )
        elif stage == "region_features":
            extract_split(
                *(drawn.dataset, drawn.proposals, inputs.detector, BACKBONE, HEADS, features),
                *(folder / "o.h5", "strict"),
            )
        else:
            settings = RegionEmbeddingsSettings(batch_size=8)
            embed_regions(
                *(drawn.dataset, drawn.proposals, drawn.clip, settings),
                *(folder / "checkpoint", "code", folder / "o.h5", "strict"),
            )
    return waits


@needs_strict
@pytest.mark.parametrize("stage", ["proposals", "region_embeddings", "region_features", "model"])
def test_an_image_waits_no_more_often_than_it_may(inputs, tmp_path, stage):
    few, many = (infer(stage, tmp_path / str(count), count, inputs) for count in (2, 6))
    of_four = many - few
    assert sum(of_four.values()) <= 4 * WAITS[stage][1], of_four.most_common()


@on_devices
def test_tensors_are_fetched_in_one_copy(device):
    wide, narrow = torch.rand(4, 3), torch.rand(5, 3).half()
    tensors = [wide.t(), wide[:0], narrow, narrow[:1], narrow.t()]
    there = [tensor.to(device) for tensor in tensors]
    with strict_device.counted() as waits:
        fetched = fetch(there)
    assert sum(waits.values()) == (device == "strict"), waits.most_common()
    for one, other in zip(fetched, tensors, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


@needs_strict
def test_crops_stay_on_the_device_until_they_are_embedded(inputs, tmp_path, monkeypatch):
    places, encode = set(), Clip.encode_crops

    def noted(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
        places.update({pixels.device.type, clip.model.logit_scale.device.type})
        return encode(clip, pixels)

    monkeypatch.setattr(Clip, "encode_crops", noted)
    settings = RegionEmbeddingsSettings(batch_size=7)
    with strict_device.counted() as waits:
        files = tmp_path / "checkpoint", "code", tmp_path / "0.h5"
        embed_regions(inputs.dataset, inputs.proposals, inputs.clip, settings, *files, "strict")
    assert places == {"strict"}
    batches = -(-2 * sum(map(len, inputs.boxes.values())) // 7)
    fetched = sum(count for (kind, _), count in waits.items() if kind == "to the host")
    assert 0 < fetched <= batches, waits.most_common()  # the features alone


# -------------------------------------------------------------------- the strict device itself


@on_devices
def test_what_cuda_refuses_is_refused(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    for mixed in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: here[there.long()],
        lambda: torch.where(there > 0, there, here),
        lambda: nn.functional.linear(there[None], here[None]),
    ):
        with pytest.raises(RuntimeError):
            mixed()
    with pytest.raises(TypeError, match=r"cpu\(\)"):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]
    assert take(torch.arange(9, device=device), 4).device.type == device


if __name__ == "__main__":
    learn_both(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
