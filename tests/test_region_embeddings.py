import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_CLIP, make_clip, make_world, write_proposals
from counting import count
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file

from lpovod.artifacts import check_made_from, fingerprint, identity, sha256
from lpovod.clip import Clip, load_clip
from lpovod.config import ClipSettings, RegionEmbeddingsSettings, RegionIndexSettings
from lpovod.crops import crop_boxes
from lpovod.exceptions import LpovodError
from lpovod.formats.regions import (
    RegionStore,
    Shard,
    digest_of_shards,
    open_shards,
    shards_in,
    write_regions,
)
from lpovod.stages.region_embeddings import STAGE, embed_regions
from lpovod.stages.region_index import build_region_index

SETTINGS = RegionEmbeddingsSettings(batch_size=7)


def embed(world, clip, output, settings=SETTINGS):
    checkpoint, code = output.with_suffix(".checkpoint"), "a"
    embed_regions(world.dataset, world.proposals, clip, settings, checkpoint, code, output)
    assert not checkpoint.exists()
    return RegionStore(output, "region_embeddings")


def reference(world, clip, image_id, scales):
    """The definition, one crop after the other, through PIL."""
    model = load_clip(clip)
    height, width = world.images[image_id].shape[:2]
    picture, size = Image.fromarray(world.images[image_id]), model.image_size
    rows = []
    for box in world.boxes[image_id]:
        feature = 0
        for scale in scales:
            crop = picture.crop(crop_boxes(box[None], scale, width, height)[0].tolist())
            short = min(crop.size)
            wide, high = (size * side // short for side in crop.size)
            crop = crop.resize((wide, crop.height), 3).resize((wide, high), 3)
            left, top = round((wide - size) / 2), round((high - size) / 2)
            pixels = np.asarray(crop.crop((left, top, left + size, top + size)))
            pixels = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
            feature = feature + model.encode_crops(pixels)[0].numpy()
        rows.append(feature / np.linalg.norm(feature))
    return np.array(rows)


@pytest.mark.parametrize("scales", [[1.0, 1.5], [1.0]])
def test_every_region_has_the_vector_of_its_own_crops(world, tiny_clip, tmp_path, scales):
    settings = RegionEmbeddingsSettings(batch_size=7, scales=scales)
    store = embed(world, tiny_clip, tmp_path / "s.h5", settings)
    assert store.image_ids == sorted(world.images)
    for image_id, boxes in world.boxes.items():
        regions = store.read(image_id)
        np.testing.assert_array_equal(regions.box, boxes)
        np.testing.assert_array_equal(regions.objectness, world.objectness[image_id])
        assert regions["embedding"].dtype == np.float16
        assert regions["embedding"].shape == (len(boxes), 16)
        if len(boxes):
            expected = reference(world, tiny_clip, image_id, scales)
            np.testing.assert_allclose(regions["embedding"], expected, atol=2e-3)


def test_crops_are_preprocessed_as_the_architecture_states(world, tiny_clip, tmp_path):
    """Against open_clip's own transform, where it differs from OpenAI's in everything."""
    stated = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    document = {"model_cfg": TINY_CLIP, "preprocess_cfg": stated}
    (tmp_path / "squash.json").write_text(json.dumps(document))
    clip = tiny_clip.model_copy(update={"architecture": str(tmp_path / "squash.json")})
    store = embed(world, clip, tmp_path / "s.h5", RegionEmbeddingsSettings(scales=[1.0]))
    transform = image_transform_v2(PreprocessCfg(size=32, **stated), is_train=False)
    model = CLIP(**TINY_CLIP).eval()
    model.load_state_dict(load_file(clip.weights))
    for image_id in (7, 3):
        height, width = world.images[image_id].shape[:2]
        picture = Image.fromarray(world.images[image_id])
        boxes = crop_boxes(world.boxes[image_id], 1.0, width, height).tolist()
        with torch.no_grad():
            features = model.encode_image(torch.stack([transform(picture.crop(b)) for b in boxes]))
        expected = torch.nn.functional.normalize(features, dim=1)
        # Pillow 13 may run the vertical pass first, which rounds some pixels differently.
        np.testing.assert_allclose(store.read(image_id)["embedding"], expected, atol=5e-3)
    plain = embed(world, tiny_clip, tmp_path / "plain.h5").identity["inputs"]
    assert store.identity["inputs"]["clip_preprocessing"] != plain["clip_preprocessing"]


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_batch_size_changes_no_vector(world, tiny_clip, tmp_path, batch_size):
    ours = embed(world, tiny_clip, tmp_path / "a.h5")
    settings = RegionEmbeddingsSettings(batch_size=batch_size)
    other = embed(world, tiny_clip, tmp_path / "b.h5", settings)
    for image_id in world.images:
        one, two = ours.read(image_id)["embedding"], other.read(image_id)["embedding"]
        np.testing.assert_allclose(one, two, atol=1e-3)


def test_the_same_run_gives_the_same_bytes(world, tiny_clip, tmp_path):
    for name in ("a.h5", "b.h5"):
        embed(world, tiny_clip, tmp_path / name)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


@pytest.mark.parametrize(("batch_size", "per_pass"), [(7, 7), (50, 32)])
def test_any_number_of_shards_gives_the_same_bytes(
    world, tiny_clip, tmp_path, monkeypatch, batch_size, per_pass
):
    """Of each image, and of the index over them.

    A pass of another size changes the last bits of float32, few of which reach those of float16.
    """
    encoded = count(monkeypatch, Clip, "encode_crops", lambda clip, pixels: len(pixels))
    settings = RegionEmbeddingsSettings(batch_size=batch_size)
    whole = embed(world, tiny_clip, tmp_path / "whole.h5", settings)
    paths = [tmp_path / f"shards/{n}.h5" for n in range(8)]
    for number, path in enumerate(paths):
        proposals = tmp_path / f"proposals/{number}.h5"
        shard = Shard(number, len(paths))
        write_proposals(proposals, world.dataset, world.boxes, world.objectness, shard)
        embed(replace(world, proposals=proposals), tiny_clip, path, settings)
    divided = open_shards(shards_in(tmp_path / "shards"), STAGE)
    assert divided.image_ids == whole.image_ids
    for image_id in world.images:
        one, two = whole.read(image_id), divided.read(image_id)
        for name in ("box", "objectness"):
            assert getattr(one, name).tobytes() == getattr(two, name).tobytes()
        assert one["embedding"].tobytes() == two["embedding"].tobytes()
    assert digest_of_shards(divided) == digest_of_shards(whole)
    for name, shards in (("one", whole.paths), ("eight", divided.paths)):
        build_region_index(shards, RegionIndexSettings(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "eight").read_bytes()
    assert encoded and {crops % per_pass for crops in encoded} == {0}


def test_a_shard_of_images_without_proposals_is_written(tiny_clip, tmp_path):
    world = make_world(tmp_path, {1: 0, 2: 0})
    store = embed(world, tiny_clip, tmp_path / "s.h5")
    assert (store.image_ids, len(store)) == ([1, 2], 0)


def test_the_shard_says_what_it_was_made_from(world, tiny_clip, tmp_path):
    path = tmp_path / "s.h5"
    ident = embed(world, tiny_clip, path).identity
    check_made_from(path, ident, "dataset", world.dataset)
    proposed = RegionStore(world.proposals, "proposals").identity
    check_made_from(path, ident, "proposals", fingerprint(proposed))
    check_made_from(path, ident, "clip_weights", sha256(tiny_clip.weights))
    assert ident["settings"] == {"scales": [1.0, 1.5], "precision": "float32"}
    assert ident["code"] == "a"


def test_a_shard_that_lacks_an_image_is_named(world, tmp_path):
    write_proposals(world.proposals, world.dataset, world.boxes, world.objectness, Shard(0, 2))
    ident = identity("proposals", dataset=world.dataset)
    with write_regions(world.proposals, ident, Shard(1, 2)) as writer:
        for image_id in (20, 900):  # and 41 is between them
            writer.add(image_id, world.boxes[image_id], world.objectness[image_id])
    message = "3 images in shard 1 of 2, .* has 2; image 41 is in .*train.json but not in"
    fails_before_clip_is_loaded(world, tmp_path, message)


def fails_before_clip_is_loaded(world, tmp_path, message, **changed):
    """No CLIP is there to be loaded, no image to be decoded."""
    for path in (tmp_path / "images" / "train").iterdir():
        path.unlink()
    nowhere = ClipSettings.model_construct(architecture="none.json", weights=tmp_path / "none")
    files = {"dataset": world.dataset, "proposals": world.proposals} | changed
    with pytest.raises(LpovodError, match=message):
        embed_regions(
            **files,
            clip=nowhere,
            settings=SETTINGS,
            checkpoint=tmp_path / "s.checkpoint",
            code="",
            output=tmp_path / "s.h5",
        )
    assert not (tmp_path / "s.h5").exists()


def test_proposals_of_another_dataset_are_refused(world, tmp_path):
    (tmp_path / "more").mkdir()
    other = make_world(tmp_path / "more", {1: 2})
    fails_before_clip_is_loaded(world, tmp_path, "other images", proposals=other.proposals)


def test_an_image_without_an_entry_is_named(world, tmp_path):
    fewer = {i: b for i, b in world.boxes.items() if i != 41}
    write_proposals(world.proposals, world.dataset, fewer, world.objectness)
    fails_before_clip_is_loaded(world, tmp_path, "image 41 is in .*train.json but not in")


@pytest.mark.parametrize("box", [[500, 5, 520, 20], [5, 5, 300, 20], [20, 5, 20, 30]])
def test_a_box_outside_its_image_is_named(world, tmp_path, box):
    boxes = {i: b.copy() for i, b in world.boxes.items()}
    boxes[20][3] = box
    write_proposals(world.proposals, world.dataset, boxes, world.objectness)
    message = rf"proposals.h5, image 20 \(000020.png\): .*\[{box[0]}.0, 5.0"
    fails_before_clip_is_loaded(world, tmp_path, message)


def test_an_unreadable_image_ends_the_run_and_leaves_no_shard(world, tiny_clip, tmp_path):
    (tmp_path / "images" / "train" / "000041.png").write_bytes(b"no image")
    with pytest.raises(LpovodError, match="image 41"):
        embed(world, tiny_clip, tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def test_other_weights_give_another_identity(world, tiny_clip, tmp_path):
    (tmp_path / "other").mkdir()
    one = embed(world, tiny_clip, tmp_path / "a.h5").identity
    two = embed(world, make_clip(tmp_path / "other", seed=1), tmp_path / "b.h5").identity
    assert one["inputs"]["clip_weights"] != two["inputs"]["clip_weights"]


def test_equal_crops_have_equal_vectors(world, tiny_clip, tmp_path):
    boxes = {i: b.copy() for i, b in world.boxes.items()}
    height, width = world.images[20].shape[:2]
    boxes[20][[1, 4]] = [[0, 0, width, height], [0.1, 0.2, width, height]]
    boxes[20][5] = boxes[20][2]
    write_proposals(world.proposals, world.dataset, boxes, world.objectness)
    changed = replace(world, boxes=boxes)
    rows = embed(changed, tiny_clip, tmp_path / "s.h5").read(20)["embedding"]
    np.testing.assert_array_equal(rows[1], rows[4])
    np.testing.assert_array_equal(rows[2], rows[5])
    expected = reference(changed, tiny_clip, 20, [1.0, 1.5])
    np.testing.assert_allclose(rows, expected, atol=2e-3)


def test_half_precision_is_near(world, tiny_clip, tmp_path):
    exact = embed(world, tiny_clip, tmp_path / "a.h5")
    settings = RegionEmbeddingsSettings(batch_size=7, precision="bfloat16")
    near = embed(world, tiny_clip, tmp_path / "b.h5", settings)
    assert near.identity["settings"]["precision"] == "bfloat16"
    one, two = (next(s.blocks(100))["embedding"].astype(np.float64) for s in (exact, near))
    assert not np.array_equal(one, two)
    cosine = (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert (1 - cosine).max() <= 1e-3


# A block is then 8 crops, so each of the images 3, 7 and 20 is one, and 41 and 900 are the last.
SMALL_BLOCKS = RegionEmbeddingsSettings(batch_size=1)


@pytest.mark.parametrize("cut", [0, 1, 100, 150])
def test_a_killed_shard_resumes_after_its_last_whole_block(world, tiny_clip, tmp_path, logged, cut):
    """The checkpoint may end anywhere within a block; `cut` bytes of its end are missing."""
    images = tmp_path / "images" / "train"
    whole = embed(world, tiny_clip, tmp_path / "whole.h5", SMALL_BLOCKS).paths[0]
    (images / "000041.png").rename(tmp_path / "41.png")
    with pytest.raises(LpovodError, match="image 41"):
        embed(world, tiny_clip, tmp_path / "s.h5", SMALL_BLOCKS)
    assert not (tmp_path / "s.h5").exists()
    checkpoint = tmp_path / "s.checkpoint"
    checkpoint.write_bytes(checkpoint.read_bytes()[: -cut or None])
    (tmp_path / "41.png").rename(images / "000041.png")
    (images / "000003.png").unlink()  # is not needed any more
    (images / "000007.png").unlink()
    embed(world, tiny_clip, tmp_path / "s.h5", SMALL_BLOCKS)
    assert f"resuming after {13 if cut else 19} regions" in logged.text
    assert (tmp_path / "s.h5").read_bytes() == whole.read_bytes()


def test_a_checkpoint_of_another_run_is_not_resumed(world, tiny_clip, tmp_path, logged):
    (tmp_path / "images" / "train" / "000041.png").rename(tmp_path / "41.png")
    with pytest.raises(LpovodError, match="image 41"):
        embed(world, tiny_clip, tmp_path / "s.h5", SMALL_BLOCKS)
    (tmp_path / "41.png").rename(tmp_path / "images" / "train" / "000041.png")
    other = RegionEmbeddingsSettings(batch_size=1, scales=[1.0])
    fresh = embed(world, tiny_clip, tmp_path / "fresh.h5", other).paths[0].read_bytes()
    embed(world, tiny_clip, tmp_path / "s.h5", other)
    assert "s.checkpoint has other settings, inputs or code: starting from" in logged.text
    assert (tmp_path / "s.h5").read_bytes() == fresh
