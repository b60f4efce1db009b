"""The model file in Python: what it detects, in which images, with which words."""

import json
from dataclasses import replace
from operator import length_hint

import numpy as np
import pytest
import torch
from conftest import make_clip
from models import BASE, NOVEL, random_model
from PIL import Image
from torchvision.ops import batched_nms

import lpovod
from lpovod.artifacts import sha256
from lpovod.clip import load_clip
from lpovod.exceptions import LpovodError
from lpovod.formats.model import read_model, write_model
from lpovod.model import Model, alike
from lpovod.text_tower import with_text_tower


def picture(width: int = 90, height: int = 70, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    random_model(path)
    return path


@pytest.fixture(scope="module")
def model(file):
    return lpovod.load(file, "cpu")


def test_the_file_holds_what_was_written(tmp_path):
    path = tmp_path / "model.safetensors"
    written = random_model(path)
    content = read_model(path)
    assert (content.config, content.classes) == (written.config, written.classes)
    for part in ("weights", "text"):
        for name, vector in getattr(written, part).items():
            np.testing.assert_array_equal(getattr(content, part)[name], vector)
    before = sha256(path)
    write_model(path, content)
    assert sha256(path) == before


def in_bfloat16(model: Model, *stages: str) -> Model:
    """The model as if stages of its run had computed in bfloat16."""
    config = model.content.config
    half = {s: getattr(config, s).model_copy(update={"precision": "bfloat16"}) for s in stages}
    return model.with_content(replace(model.content, config=config.model_copy(update=half)))


def test_a_model_on_a_cpu_computes_in_float32_whatever_its_run_did(model):
    other = in_bfloat16(model, "proposals", "region_features")
    expected, found = model.detect(picture()), other.detect(picture())
    assert found.class_name == expected.class_name
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)
    np.testing.assert_array_equal(found.confidence, expected.confidence)


def rows(vectors: dict[str, np.ndarray], names: list[str]) -> np.ndarray:
    return np.stack([vectors[name] for name in names])


def test_a_score_is_the_formula_s_for_every_class(model):
    """Eq. 5 to 7, computed here from the arrays of the file and the regions' own columns."""
    content, pixels, names = model.content, picture(), [*BASE, *NOVEL]
    (regions,) = model.describe([model.view(pixels)], [pixels.shape[:2]])
    feature = regions["feature"].astype(np.float64)
    cosine = regions["embedding"].astype(np.float64) @ rows(content.text, names).T
    powers = np.exp(cosine / content.temperature)
    clip = powers / powers.sum(axis=1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-(feature @ rows(content.weights, names).T)))
    share = np.array([1.0, 1.0, 0.8, 0.8])  # alpha is 0 and beta 0.8
    score = np.sqrt(clip ** (1 - share) * sigmoid**share * regions.objectness[:, None])
    row, column = (score > 0.05).nonzero()
    boxes = torch.from_numpy(regions["refined"][row])
    kept = batched_nms(
        boxes, torch.from_numpy(score[row, column]).float(), torch.from_numpy(column), 0.5
    )[:100].numpy()
    detections = model.detect(pixels)
    assert len(detections) == len(kept) > 10
    np.testing.assert_allclose(detections.confidence, score[row, column][kept], rtol=1e-5)
    np.testing.assert_array_equal(detections.xyxy, boxes.numpy()[kept])
    assert detections.class_name == [names[c] for c in column[kept]]
    assert detections.class_id.tolist() == [(3, 1, 7, 5)[c] for c in column[kept]]


def test_every_kind_of_source_gives_the_same(model, tmp_path):
    pixels, path = picture(), tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    expected = model.detect(pixels)
    for source in (path, str(path), Image.fromarray(pixels), Image.open(path)):
        detections = model.detect(source)
        np.testing.assert_array_equal(detections.xyxy, expected.xyxy)
        assert detections.class_name == expected.class_name
    (listed,) = model.detect([path])
    np.testing.assert_array_equal(listed.confidence, expected.confidence)


def test_images_are_turned_as_a_viewer_shows_them(model, tmp_path):
    pixels, path = picture(), tmp_path / "turned.jpg"
    stored = Image.fromarray(np.rot90(pixels, 1).copy())  # a viewer turns it back, clockwise
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(path, exif=exif, quality=100, subsampling=0)
    shown = np.array(Image.open(path).convert("RGB"))
    expected = model.detect(np.rot90(shown, -1).copy())
    for source in (path, Image.open(path)):
        np.testing.assert_array_equal(model.detect(source).xyxy, expected.xyxy)


def test_batches_of_different_sizes_give_what_single_images_give(model):
    pictures = [picture(90, 70, 0), picture(70, 90, 1), picture(90, 70, 2), picture(64, 64, 3)]
    single = [model.detect(pixels) for pixels in pictures]
    for together, alone in zip(model.detect(pictures, batch_size=3), single, strict=True):
        assert together.class_name == alone.class_name
        np.testing.assert_allclose(together.xyxy, alone.xyxy, atol=0.01)
        np.testing.assert_allclose(together.confidence, alone.confidence, atol=1e-4)


def test_images_of_one_padded_size_share_a_pass(model, monkeypatch):
    """Also where they are shown at different sizes, and others are between them."""
    passes, describe = [], Model.describe

    def noted(self: Model, views: list, sizes: list) -> list:
        passes.append([(height, width) for height, width in sizes])
        return describe(self, views, sizes)

    monkeypatch.setattr(Model, "describe", noted)
    wide, wider, tall = picture(90, 70, 0), picture(93, 70, 1), picture(70, 90, 2)
    single = [model.detect(pixels) for pixels in (wide, tall, wider)]
    passes.clear()
    together = model.detect([wide, tall, wider], batch_size=2)
    assert passes == [[(70, 90), (70, 93)], [(90, 70)]]
    for one, other in zip(together, single, strict=True):
        assert one.class_name == other.class_name
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=0.01)


def test_lists_are_full_unless_too_many_items_wait():
    words = iter(["a1", "b1", "b2", "c1", "d1", "a2", "a3", "e1", "f1", "d2"])
    lists = alike(words, lambda word: word[0], 3, waiting=4)
    assert (next(lists), length_hint(words)) == (["b1", "b2"], 5)  # the most of five
    assert (next(lists), length_hint(words)) == (["a1", "a2", "a3"], 3)
    assert [*lists] == [["d1", "d2"], ["c1"], ["e1"], ["f1"]]


def test_a_class_scores_the_same_whichever_others_are_asked_for(model):
    pixels = picture()
    everything, buses = model.detect(pixels), model.detect(pixels, classes=["bus"])
    assert set(buses.class_name) == {"bus"}
    expected = everything.of(["bus"])
    np.testing.assert_array_equal(buses.confidence[: len(expected)], expected.confidence)
    high = model.detect(pixels, threshold=0.4)
    np.testing.assert_array_equal(high.xyxy, everything.above(0.4).xyxy)
    assert 0 < len(high) < len(everything)


def test_an_image_thinner_than_a_pixel_of_the_network_is_seen(model):
    assert len(model.detect(np.full((1, 400, 3), 90, np.uint8)).xyxy) >= 0


def test_a_text_in_place_of_a_list_of_names_is_refused(model):
    for call in (lambda: model.detect(picture(), classes="bus"), lambda: model.add_names("bus")):
        with pytest.raises(LpovodError, match=r"expected a list of names: \['bus'\]"):
            call()
    assert model.vocabulary == [*BASE, *NOVEL]
    assert isinstance(model.detect((picture(),)), list)


def test_raw_boxes_are_the_proposals(model):
    pixels = picture()
    (regions,) = model.describe([model.view(pixels)], [pixels.shape[:2]])
    raw = model.detect(pixels, refined=False)
    proposals = {tuple(box) for box in regions.box.tolist()}
    assert {tuple(box) for box in raw.xyxy.tolist()} <= proposals


def test_coco_results_hold_the_corners_as_width_and_height(model):
    detections = model.detect(picture())
    for row, result in enumerate(detections.to_coco(17)):
        x, y, width, height = result["bbox"]
        np.testing.assert_allclose([x, y, x + width, y + height], detections.xyxy[row], rtol=1e-6)
        assert (result["image_id"], result["category_id"]) == (17, detections.class_id[row])
        assert result["class_name"] == detections.class_name[row]
    json.dumps(detections.to_coco())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jpg", "nowhere.jpg: no such file"),
        (np.zeros((9, 9), np.uint8), "array of uint8 (9, 9), expected uint8 (height, width, 3)"),
        (Image.new("I;16", (9, 9)), "mode 'I;16', expected 8 bits per channel. Give its path"),
        (np.zeros((9, 9, 3), np.float32), "array of float32 (9, 9, 3), expected uint8"),
    ],
)
def test_a_wrong_image_is_named(model, source, message):
    with pytest.raises(LpovodError) as error:
        model.detect(source)
    assert message in str(error.value)


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(LpovodError, match="nothing.safetensors: no such file"):
        lpovod.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("no model")
    with pytest.raises(LpovodError, match="text.safetensors is not a whole safetensors file"):
        lpovod.load(tmp_path / "text.safetensors")


def with_clip(content, clip):
    """The model as if its text embeddings came from this CLIP."""
    config = content.config.model_copy(update={"clip": clip})
    inputs = content.identity["inputs"] | {"clip_weights": sha256(clip.weights)}
    return replace(content, config=config, identity=content.identity | {"inputs": inputs})


def test_words_without_a_probe_are_scored_by_the_clip_head_alone(model, file, tiny_clip, tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, with_clip(read_model(file), tiny_clip))
    opened, pixels = lpovod.load(path, "cpu"), picture()
    assert opened.add_names(["bus", "a red ball", "a red ball"]) == ["a red ball"]
    clip = load_clip(tiny_clip)
    word = clip.encode_texts(["a red ball"]).double().numpy()[0]
    text = np.stack([*opened.content.text.values(), word / np.linalg.norm(word)])
    (regions,) = opened.describe([opened.view(pixels)], [pixels.shape[:2]])
    powers = np.exp(regions["embedding"].astype(np.float64) @ text.T / 0.1)
    expected = np.sqrt(powers[:, -1] / powers.sum(axis=1) * regions.objectness)
    detections = opened.detect(pixels, threshold=0, classes=["a red ball"])
    assert set(detections.class_name) == {"a red ball"}
    assert not {*detections.class_id.tolist()} & {3, 1, 7, 5}
    assert detections.confidence[0] == pytest.approx(expected.max(), rel=1e-4)


def test_a_text_tower_in_the_file_embeds_words_anywhere(file, tmp_path, monkeypatch):
    clip = make_clip(tmp_path, seed=1)
    content, path = with_clip(read_model(file), clip), tmp_path / "model.safetensors"
    expected = load_clip(clip).encode_texts(["a red ball"]).numpy()[0]
    write_model(path, with_text_tower(content))
    clip.weights.unlink()
    opened = lpovod.load(path, "cpu")
    opened.add_names(["a red ball"])
    (vector,) = opened._extra.values()
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


def test_a_word_that_nothing_can_embed_is_refused_with_the_remedy(model, file, tmp_path):
    with pytest.raises(LpovodError, match="had no CLIP"):
        model.detect(picture(), classes=["a red ball"])
    clip = make_clip(tmp_path, seed=1)
    path = tmp_path / "model.safetensors"
    write_model(path, with_clip(read_model(file), clip))
    clip.weights.unlink()
    with pytest.raises(LpovodError, match="no such file.*lpovod export --text-tower"):
        lpovod.load(path, "cpu").add_names(["a red ball"])
