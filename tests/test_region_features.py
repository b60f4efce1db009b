"""What the frozen detector says of regions, against the same computed image by image."""

import numpy as np
import pytest
import torch
from torchvision.ops import clip_boxes_to_image

from lpovod.artifacts import identity, write_json, write_tensors
from lpovod.boxes import decode
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import RegionStore
from lpovod.networks.detector import Detector
from lpovod.stages.region_features import extract_retrieved, extract_split
from lpovod.views import Normalisation, View, apply_view, batch

BACKBONE = BackboneSettings(channels=16, short_side=96, long_side=128)
HEADS = BaseDetectorSettings(
    regions="proposals", head_convolutions=1, dimension=24, finest_scale=16, sampling_ratio=1
)
SETTINGS = RegionFeaturesSettings(batch_size=2)


@pytest.fixture()
def detector(tmp_path):
    torch.manual_seed(0)
    model = Detector(BACKBONE, HEADS, 2, 8).eval()
    torch.nn.init.normal_(model.box_refinement.weight, std=0.3)
    path = tmp_path / "detector.safetensors"
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    write_tensors(path, weights, identity("base_detector") | {"classes": ["a", "b"]})
    return path, model


@torch.inference_mode()
def directly(model, data, image_id, boxes):
    """Features, embeddings and refined boxes of one image, alone in its batch."""
    shown = apply_view(data.load(image_id), View(image_id, 96, 128))
    given = shown.to_view(boxes)
    image = batch([shown], "cpu", Normalisation(), pad_with_black=True)
    outputs = model.extract(model.pool(model.pyramid(image), [given]))
    size = data.images[image_id]
    refined = decode(given, outputs.deltas) / shown.scale.repeat(2)
    return (
        outputs.feature,
        outputs.embedding,
        clip_boxes_to_image(refined, (size["height"], size["width"])),
    )


def test_a_split_is_extracted_region_by_region(world, detector, tmp_path):
    path, model = detector
    output = tmp_path / "features.h5"
    extract_split(world.dataset, world.proposals, path, BACKBONE, HEADS, SETTINGS, output)
    store, data = RegionStore(output, "region_features"), read_dataset(world.dataset)
    assert sorted(store.image_ids) == sorted(world.boxes)
    for image_id, boxes in world.boxes.items():
        found = store.read(image_id)
        assert np.array_equal(found.box, boxes)
        assert np.array_equal(found.objectness, world.objectness[image_id])
        if len(boxes) == 0:
            continue
        feature, embedding, refined = directly(model, data, image_id, boxes)
        assert found["feature"].dtype == found["embedding"].dtype == np.float16
        assert np.allclose(found["feature"], feature, rtol=2e-3, atol=2e-3)
        assert np.allclose(found["embedding"], embedding, atol=2e-3)
        assert np.allclose(found["refined"], refined, atol=0.02)
        assert np.allclose(np.linalg.norm(found["embedding"].astype(float), axis=1), 1, atol=2e-3)


def test_images_of_pseudo_labels_are_extracted_with_all_their_proposals(world, detector, tmp_path):
    path, _ = detector
    data = read_dataset(world.dataset)
    box = world.boxes[3][2].astype(float)
    annotation = {"id": 1, "image_id": 3, "category_id": 1, "score": 0.8, "cosine": 0.3}
    annotation["bbox"] = [*box[:2], *(box[2:] - box[:2])]
    labels, output = tmp_path / "fish.json", tmp_path / "fish.h5"
    content = {"images": [data.images[3]], "annotations": [annotation]}
    write_json(labels, content | {"categories": [{"id": 1, "name": "fish"}]})
    extract_retrieved(
        world.dataset, world.proposals, labels, path, BACKBONE, HEADS, SETTINGS, output
    )
    store = RegionStore(output, "region_features")
    assert store.image_ids == [3]
    found = store.read(3)
    assert np.allclose(found.box, np.concatenate([box[None], world.boxes[3]]), atol=1e-4)
    assert found.objectness[0] == pytest.approx(0.8)
    assert np.allclose(found["feature"][0], found["feature"][3], atol=0.01)


def test_a_detector_of_other_settings_is_refused(world, detector, tmp_path):
    other = BaseDetectorSettings(head_convolutions=2, dimension=24)
    with pytest.raises(LpovodError, match="does not fit the settings of backbone and base_detect"):
        extract_split(
            world.dataset, world.proposals, detector[0], BACKBONE, other, SETTINGS, tmp_path / "f"
        )
