"""What the frozen detector says of regions, against the same computed image by image."""

import numpy as np
import pytest
import torch
from conftest import write_proposals
from torchvision.ops import clip_boxes_to_image

from lpovod.artifacts import identity, read_json, write_json, write_tensors
from lpovod.boxes import decode
from lpovod.config import BackboneSettings, BaseDetectorSettings, RegionFeaturesSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.formats.image_features import ImageFeatures, paths_in
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


def write_labels(path, data, labels):
    """Pseudo-labels (class, image id, box, score) in a file."""
    names = list(dict.fromkeys(name for name, *_ in labels))
    annotations = []
    for number, (name, image_id, box, score) in enumerate(labels, 1):
        x1, y1, x2, y2 = np.asarray(box, float).tolist()
        annotation = {"id": number, "image_id": image_id, "category_id": names.index(name) + 1}
        annotation |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "score": score, "cosine": 0.3}
        annotations.append(annotation)
    write_json(
        path,
        {
            "images": [data.images[i] for i in dict.fromkeys(i for _, i, *_ in labels)],
            "annotations": annotations,
            "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
        },
    )


def test_images_of_pseudo_labels_are_extracted_with_all_their_proposals(world, detector, tmp_path):
    path, model = detector
    data = read_dataset(world.dataset)
    labels, output, foreign = tmp_path / "novel.json", tmp_path / "retrieved", [3, 4, 30, 31]
    retrieved = [("fish", 3, world.boxes[3][2], 0.8), ("star", 3, foreign, 0.7)]
    retrieved += [("star", 20, world.boxes[20][0], 0.6), ("fish", 41, world.boxes[41][0], 0.9)]
    write_labels(labels, data, retrieved)
    extract_retrieved(
        *(world.dataset, world.proposals, labels, path, BACKBONE, HEADS, SETTINGS),
        *(0, output, tmp_path / "store", "c"),
    )
    assert sorted(file.name for file in output.iterdir()) == [
        f"{i}.safetensors" for i in (20, 3, 41)
    ]
    features = ImageFeatures(paths_in([output]))
    assert sorted(features.image_ids) == [3, 20, 41]
    for image_id in (3, 20, 41):
        found, proposed = features.read(image_id), world.boxes[image_id]
        # A label that is none of the proposals comes first.
        extra = 1 if image_id == 3 else 0
        assert len(found["box"]) == len(proposed) + extra
        np.testing.assert_array_equal(found["box"][extra:], proposed)
        np.testing.assert_array_equal(found["objectness"][extra:], world.objectness[image_id])
        assert {found[k].dtype for k in ("feature", "embedding")} == {np.dtype(np.float16)}
        assert {found[k].dtype for k in ("box", "objectness", "refined")} == {np.dtype(np.float32)}
        feature, embedding, refined = directly(model, data, image_id, found["box"])
        assert np.allclose(found["feature"], feature, rtol=2e-3, atol=2e-3)
        assert np.allclose(found["embedding"], embedding, atol=2e-3)
        assert np.allclose(found["refined"], refined, atol=0.02)
    first = features.read(3)
    assert np.allclose(first["box"][0], foreign)
    assert first["objectness"][0] == pytest.approx(0.7)


def described(world, detector, output, **settings) -> RegionStore:
    settings = RegionFeaturesSettings(batch_size=2, **settings)
    extract_split(world.dataset, world.proposals, detector, BACKBONE, HEADS, settings, output)
    return RegionStore(output, "region_features")


def test_features_in_bfloat16_are_near_those_in_float32(world, detector, tmp_path):
    """Eight bits of a value are left: a hundredth of the largest feature, five of a cosine's."""
    path, _ = detector
    one = described(world, path, tmp_path / "float32.h5")
    other = described(world, path, tmp_path / "bfloat16.h5", precision="bfloat16")
    for image_id in filter(one.count, one.image_ids):
        expected, found = one.read(image_id), other.read(image_id)
        scale = float(np.abs(expected["feature"]).max())
        for name, limit in (("feature", 0.02 * scale), ("embedding", 0.02), ("refined", 1.0)):
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_allclose(found[name], expected[name], atol=limit, err_msg=name)
        assert not np.array_equal(expected["feature"], found["feature"])
        lengths = np.linalg.norm(found["embedding"].astype(float), axis=1)
        assert np.allclose(lengths, 1, atol=1e-3)


def test_features_of_an_image_depend_on_no_other_image(world, detector, tmp_path):
    path, _ = detector
    together = described(world, path, tmp_path / "all.h5")
    listed = read_json(world.dataset)["images"]
    for image in listed[1:3]:
        write_json(world.dataset, read_json(world.dataset) | {"images": [image]})
        image_id = image["id"]
        boxes, objectness = world.boxes[image_id], world.objectness[image_id]
        write_proposals(world.proposals, world.dataset, {image_id: boxes}, {image_id: objectness})
        alone = described(world, path, tmp_path / "one.h5").read(image_id)
        for name in ("feature", "embedding", "refined"):
            assert np.array_equal(alone[name], together.read(image_id)[name])


def test_shards_share_the_images(world, detector, tmp_path):
    data, labels = read_dataset(world.dataset), tmp_path / "novel.json"
    write_labels(labels, data, [("fish", i, world.boxes[i][0], 0.8) for i in (41, 3, 20)])
    settings = RegionFeaturesSettings(batch_size=2, shards=2)
    folders = [tmp_path / "0", tmp_path / "1"]
    for shard, folder in enumerate(folders):
        extract_retrieved(
            *(world.dataset, world.proposals, labels, detector[0], BACKBONE, HEADS, settings),
            *(shard, folder, tmp_path / "store", "c"),
        )
    assert [sorted(ImageFeatures(paths_in([folder])).image_ids) for folder in folders] == [
        [3, 41],
        [20],
    ]
    assert sorted(ImageFeatures(paths_in(folders)).image_ids) == [3, 20, 41]


def test_a_detector_of_other_settings_is_refused(world, detector, tmp_path):
    other = BaseDetectorSettings(head_convolutions=2, dimension=24)
    with pytest.raises(LpovodError, match="does not fit the settings of backbone and base_detect"):
        extract_split(
            world.dataset, world.proposals, detector[0], BACKBONE, other, SETTINGS, tmp_path / "f"
        )
