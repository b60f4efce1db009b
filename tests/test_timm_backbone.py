"""Backbones of timm, against timm itself: maps, channels, normalisation, weights, refusals."""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import World, make_world, write_shards
from safetensors.torch import save_file
from torch.nn.modules.module import register_module_forward_pre_hook

from lpovod.artifacts import identity, read_tensors, sha256, write_tensors
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ProposalsSettings,
    RegionFeaturesSettings,
    TrainingSettings,
)
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.formats.regions import RegionStore
from lpovod.importers.backbone import start_from
from lpovod.importers.checkpoints import export_checkpoint, import_base_detector
from lpovod.networks.backbone import build_backbone, freeze_statistics
from lpovod.networks.detector import Detector
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.networks.timm_backbone import TimmBackbone
from lpovod.stages.base_detector import train_base_detector
from lpovod.stages.proposal_network import train_proposal_network
from lpovod.stages.proposals import propose
from lpovod.stages.region_features import extract_split
from lpovod.views import View, apply_view, batch

# timm's own miniatures: batch norms; batch norms with activations; layer norms, no stride of 2.
NAMES = ("test_resnet", "test_efficientnet", "test_convnext")
HEADS = BaseDetectorSettings(
    regions="proposals", head_convolutions=1, dimension=24, finest_scale=16
)


def settings(name: str) -> BackboneSettings:
    return BackboneSettings(architecture=f"timm:{name}", channels=16, short_side=64, long_side=96)


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture()
def checkpoint(tmp_path):
    """A whole timm model, head included, with statistics of its own, and its safetensors file."""

    def make(name: str) -> tuple[torch.nn.Module, Path]:
        torch.manual_seed(5)
        model = timm.create_model(name, pretrained=False).eval()
        for key, tensor in model.state_dict().items():
            if key.endswith(("running_mean", "running_var", ".bias")):
                tensor.add_(torch.rand_like(tensor) / 2)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors", {"format": "pt"})
        return model, tmp_path / f"{name}.safetensors"

    return make


# -------------------------------------------------------------------------------------- the maps


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", [*NAMES, pytest.param("swinv2_tiny_window8_256", marks=pytest.mark.slow)]
)
def test_maps_of_an_image_are_those_of_timm_s_model(checkpoint, name):
    """Swin's come with channels last, and without an option of its own of one size alone."""
    whole, path = checkpoint(name)
    model = ProposalNetwork(settings(name), 8.0).eval()
    start_from(model, path, f"timm:{name}")
    image = pixels(64, 96)
    found = model.backbone(
        batch([apply_view(image, View(1, 64, 96))], "cpu", model.backbone.normalisation)
    )
    config = timm.data.resolve_data_config(model=whole)
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    inputs = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    if name.startswith("swin"):
        reference = timm.create_model(name, pretrained=False, dynamic_img_size=True).eval()
        reference.load_state_dict(whole.state_dict())
        whole = reference
    expected = whole.forward_intermediates(inputs[None], intermediates_only=True)
    expected = [features for features in expected if features.shape[-1] <= 96 // 4]
    assert [features.shape[-1] for features in found] == [24, 12, 6, 3]
    assert model.backbone.outputs == [features.shape[1] for features in found]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext",
        "test_efficientnet",
        pytest.param("vgg11_bn.tv_in1k", marks=pytest.mark.slow),
    ],
)
def test_mean_and_deviation_are_those_of_the_name(name):
    expected, normalisation = (
        timm.get_pretrained_cfg(name),
        TimmBackbone(f"timm:{name}").normalisation,
    )
    assert normalisation.mean == pytest.approx([255 * v for v in expected.mean])
    assert normalisation.std == pytest.approx([255 * v for v in expected.std])


def test_the_backbone_is_initialised_as_timm_does_it():
    torch.manual_seed(0)
    backbone, _ = build_backbone(settings("test_resnet"))
    torch.manual_seed(0)
    theirs = timm.create_model("test_resnet", pretrained=False, features_only=True)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(backbone.state_dict()[f"net.{name}"], tensor)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "timm has no model 'resnet81'; did you mean timm:resnet18"),
        ("resnet18.a1_in1", r"no model 'resnet18.a1_in1'; did you mean timm:resnet18.a1_in1k"),
        ("hf-hub:timm/resnet18", "timm has no model 'hf-hub:timm/resnet18'"),
        ("test_vit", "timm:test_vit has feature maps at strides 16, 16, .* needs 4, 8, 16, 32"),
        ("coatnet_pico_rw_224", "coatnet_pico_rw_224 cannot be a backbone: .*images of any size"),
        ("nextvit_small", r"norms \(BatchNorm1d\) whose statistics several ranks cannot share"),
    ],
)
def test_models_that_are_no_backbones_are_refused(name, message):
    with pytest.raises(LpovodError, match=message):
        TimmBackbone(f"timm:{name}")


def test_nothing_is_drawn_at_random_in_training():
    backbone = TimmBackbone("timm:focalnet_tiny_srf").train()  # stochastic depth of .1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, other = ([m.clone() for m in backbone(images)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_frozen_statistics_stay(name):
    backbone, _ = build_backbone(settings(name))
    images = torch.randn(2, 3, 64, 64)

    def statistics() -> dict[str, torch.Tensor]:
        state = backbone.state_dict()
        return {k: v.clone() for k, v in state.items() if "running" in k or "tracked" in k}

    before = statistics()
    backbone.train()
    freeze_statistics(backbone)
    backbone(images)
    assert all(torch.equal(v, before[k]) for k, v in statistics().items())
    backbone.train()
    backbone(images)
    assert not any(torch.equal(v, before[k]) for k, v in statistics().items())


# ----------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_of_torch_s_format_is_read_too(checkpoint, tmp_path, name, nested, logged):
    whole, _ = checkpoint(name)
    state = whole.state_dict()
    torch.save({"state_dict": state} if nested else state, tmp_path / "a.pth")
    model = ProposalNetwork(settings(name), 8.0)
    start_from(model, tmp_path / "a.pth", f"timm:{name}")
    reference = timm.create_model(
        name,
        features_only=True,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "a.pth")},
    )
    for key, tensor in reference.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[f"net.{key}"], tensor)
    head = {"test_convnext": "head.fc", "test_resnet": "fc", "test_efficientnet": "bn2"}
    unused = logged.text.partition("not used: ")[2]
    assert f"{head[name]}.weight" in unused
    assert "conv1" not in unused and "blocks" not in unused and "stages" not in unused


def test_weights_that_do_not_fit_are_refused(checkpoint, tmp_path):
    whole, path = checkpoint("test_resnet")
    state, model = whole.state_dict(), ProposalNetwork(settings("test_resnet"), 8.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, path)
        with pytest.raises(LpovodError, match=message):
            start_from(model, path, "timm:test_resnet")
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    lacking = {k: v for k, v in state.items() if k != "layer3.0.conv2.weight"}
    refused(lacking, "lacks backbone.net.layer3.0.conv2.weight of the backbone timm:test_resnet")
    refused(state | {"bn1.weight": torch.ones(3)}, "does not fit timm:test_resnet: .*bn1.weight")
    refused({"fc.weight": torch.ones(3)}, "lacks backbone.net.conv1.0.weight, .* more of the")
    refused({}, "has no tensors")
    refused(checkpoint("test_convnext")[0].state_dict(), "lacks backbone.net.conv1.0.weight")
    path.write_bytes(b"cut off")
    with pytest.raises(LpovodError, match="is not a whole safetensors file"):
        start_from(model, path, "timm:test_resnet")


def test_the_detector_starts_from_the_proposal_network_of_its_architecture(tmp_path):
    torch.manual_seed(1)
    backbone = settings("test_efficientnet")
    network, path = ProposalNetwork(backbone, 8.0), tmp_path / "network.safetensors"
    made_from = identity("proposals") | {"backbone": backbone.model_dump(mode="json")}
    tensors = {k: v.detach().numpy() for k, v in network.state_dict().items()}
    write_tensors(path, tensors, made_from)
    detector = Detector(backbone, HEADS, 2, 8)
    start_from(detector, path, backbone.architecture)
    shared = [k for k in detector.state_dict() if k.startswith(("backbone.", "neck."))]
    assert all(torch.equal(detector.state_dict()[k], network.state_dict()[k]) for k in shared)
    with pytest.raises(LpovodError, match="trained with backbone.architecture timm:test_efficient"):
        start_from(detector, path, "timm:test_efficientnet.r160_in1k")


# ------------------------------------------------------------------------------------ the stages


@dataclass(frozen=True)
class Files:
    """A world of five images with annotations, and CLIP's embeddings of its proposals."""

    world: World
    shards: list[Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("timm")
    world = make_world(folder, {7: 4, 3: 3, 900: 5, 12: 2, 1: 3})
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, right - x, bottom - y]}
        for i, (x, y, right, bottom) in ((i, b[0].tolist()) for i, b in world.boxes.items())
    ]
    content = json.loads(world.dataset.read_text()) | {"annotations": annotations}
    world.dataset.write_text(json.dumps(content))
    draw = np.random.default_rng(0)
    vectors = {i: draw.normal(size=(len(b), 8)) for i, b in world.boxes.items()}
    vectors = {
        i: (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float16)
        for i, v in vectors.items()
    }
    return Files(world, write_shards(folder, world.dataset, vectors, world.boxes, world.objectness))


SCHEDULE = TrainingSettings(
    optimizer="adamw",
    learning_rate=2e-3,
    epochs=2,
    milestones=[2],
    images_per_step=2,
    warmup_steps=0,
    short_sides=[64],
)
PROPOSALS = ProposalsSettings(training=SCHEDULE, box_iou=0.3, per_image=6, samples_per_image=32)
DETECTOR = HEADS.model_copy(
    update={"training": SCHEDULE, "regions": "rpn", "samples_per_image": 16, "sampling_ratio": 1}
)


def outputs(folder: Path, stage: str) -> list[Path]:
    return [folder / f"{stage}.{ending}" for ending in ("checkpoint", "safetensors", "jsonl")]


def learn_proposals(files: Files, name: str, folder: Path) -> Path:
    checkpoint, network, history = outputs(folder, "proposals")
    inputs = (files.world.dataset, settings(name), PROPOSALS)
    train_proposal_network(*inputs, 0, checkpoint, "", network, history)
    return network


def learn_detector(files: Files, name: str, folder: Path, network: Path) -> Path:
    checkpoint, detector, history = outputs(folder, "base_detector")
    inputs = (files.world.dataset, files.shards, network, settings(name), DETECTOR)
    train_base_detector(*inputs, 0, checkpoint, "", detector, history)
    return detector


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_both_networks_learn_and_resume_where_they_were_ended(files, name, tmp_path, monkeypatch):
    for folder in ("whole", "ended"):
        (tmp_path / folder).mkdir()
    network = learn_proposals(files, name, tmp_path / "whole")
    detector = learn_detector(files, name, tmp_path / "whole", network)
    load, loaded = CocoDataset.load, []

    def load_and_end(self: CocoDataset, image_id: int) -> np.ndarray:
        loaded.append(image_id)
        if len(loaded) == 9:  # in the second epoch's second step of three
            os.kill(os.getpid(), signal.SIGTERM)
        return load(self, image_id)

    monkeypatch.setattr(CocoDataset, "load", load_and_end)
    for learn, expected in (
        (lambda: learn_proposals(files, name, tmp_path / "ended"), network),
        (lambda: learn_detector(files, name, tmp_path / "ended", network), detector),
    ):
        loaded.clear()
        with pytest.raises(SystemExit):
            learn()
        assert expected.with_suffix(".checkpoint").name in os.listdir(tmp_path / "ended")
        assert sha256(learn()) == sha256(expected)
        lines = [
            json.loads(line) for line in expected.with_suffix(".jsonl").read_text().split("\n")[:-1]
        ]
        assert len(lines) == 2
        assert np.isfinite([list(line.values()) for line in lines]).all()
        trained, _ = read_tensors(expected, expected.stem)
        assert any("net." in key and "running" in key for key in trained) == (
            name == "test_efficientnet"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_convnext"])
def test_every_stage_shows_the_network_pixels_as_timm_does(files, name, tmp_path):
    """What comes into the backbone, taken back to grey levels with timm's numbers: whole ones."""
    config, dataset = timm.get_pretrained_cfg(name), files.world.dataset
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    seen: list[torch.Tensor] = []
    hook = register_module_forward_pre_hook(
        lambda module, inputs: (
            seen.append(inputs[0].clone())
            if isinstance(module, TimmBackbone) and inputs[0].any()
            else None
        )
    )
    try:
        network = learn_proposals(files, name, tmp_path)
        detector = learn_detector(files, name, tmp_path, network)
        one_by_one = PROPOSALS.model_copy(update={"batch_size": 1})
        split = (dataset, network, settings(name), one_by_one)
        propose(*split, 0, 1, tmp_path / "train.h5")
        assert len(seen) == 2 * 6 + 5
        shown = len(seen)
        described = (dataset, tmp_path / "train.h5", detector, settings(name), DETECTOR)
        extract_split(*described, RegionFeaturesSettings(batch_size=1), tmp_path / "features.h5")
        assert len(seen) == shown + 5
    finally:
        hook.remove()
    for number, images in enumerate(seen):
        padding = (images == 0).all(dim=1, keepdim=True) & (number < shown)
        levels = ((images * std + mean) * 255).masked_fill(padding, 0)
        assert float((levels - levels.round()).abs().max()) < 1e-3
        assert levels.min() > -0.5 and 200 < levels.max() < 255.5
        assert all(side % 32 == 0 for side in images.shape[-2:])
    assert any((images == 0).all(dim=1).any() for images in seen[:shown])
    black = -mean / std
    assert any(torch.isclose(images, black).all(dim=1).any() for images in seen[shown:])
    store = RegionStore(tmp_path / "features.h5", "region_features")
    assert set(store.image_ids) == set(read_dataset(dataset).images)
    assert all(np.isfinite(store.read(i)["feature"]).all() for i in store.image_ids)


def test_a_detector_is_exported_and_imported_again(files, tmp_path):
    backbone, path = settings("test_efficientnet"), tmp_path / "detector.safetensors"
    torch.manual_seed(2)
    tensors = {
        k: v.detach().numpy() for k, v in Detector(backbone, HEADS, 1, 8).state_dict().items()
    }
    write_tensors(path, tensors, identity("base_detector") | {"classes": ["circle"]})
    export_checkpoint(files.world.dataset, path, tmp_path / "a.pth")
    again = (tmp_path / "again.safetensors", tmp_path / "history.jsonl")
    given = (files.world.dataset, tmp_path / "a.pth", ["circle"], backbone, HEADS)
    import_base_detector(*given, *again)
    found, _ = read_tensors(again[0], "base_detector")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[k], tensors[k]) for k in tensors)


@torch.inference_mode()
def test_images_smaller_than_the_largest_stride_are_padded():
    model = Detector(settings("test_resnet"), HEADS, 2, 8).eval()
    image = batch([apply_view(pixels(9, 20), View(1, 9, 20))], "cpu", model.backbone.normalisation)
    assert [tuple(p.shape[-2:]) for p in model.pyramid(image)] == [(8, 8), (4, 4), (2, 2)] + [
        (1, 1)
    ] * 2
