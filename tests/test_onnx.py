"""A model's ONNX graphs against the model itself, and the example of the documentation."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from models import random_model
from PIL import Image
from torchvision.ops import batched_nms

import lpovod
from lpovod.apps import onnx_scripts
from lpovod.apps.export import export
from lpovod.apps.onnx_graphs import export_onnx
from lpovod.config import BackboneSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.model import ModelClass, read_model, write_model
from lpovod.views import Normalisation, View, apply_view, batch

SIZES = [(90, 70), (70, 90), (96, 128), (300, 41), (33, 35), (1, 1), (513, 400), (97, 640)]
"""Heights and widths of images."""

REGION_COLUMNS = ("objectness", "feature", "embedding")
EXAMPLES = re.findall(r"```python\n(.*?)```", Path("docs/onnx.md").read_text(), re.S)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (7, 9, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = random.integers(-20, 21, (height, width, 3))
    return (np.array(smooth).astype(int) + noise).clip(0, 255).astype(np.uint8)


def session(graph: Path | onnx.ModelProto) -> onnxruntime.InferenceSession:
    source = graph if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(source)


def run(graph: onnxruntime.InferenceSession, inputs: dict) -> dict[str, np.ndarray]:
    names = [output.name for output in graph.get_outputs()]
    wanted = {i.name: inputs[i.name] for i in graph.get_inputs()}
    return dict(zip(names, graph.run(None, wanted), strict=True))


@pytest.mark.parametrize(("short_side", "long_side"), [(160, 160), (96, 128), (40, 300)])
def test_the_graph_shows_the_networks_the_very_pixels(short_side, long_side):
    backbone = BackboneSettings(short_side=short_side, long_side=long_side)
    normalisation = Normalisation((120.1, 110.2, 100.3), (60.4, 50.5, 40.6))
    graph = session(onnx_scripts.preparation(backbone, normalisation))
    for height, width in SIZES:
        pixels = picture(height, width)
        view = apply_view(pixels, View(0, short_side, long_side))
        outputs = run(graph, {"image": pixels})
        for name, black in (("zero_padded", False), ("black_padded", True)):
            expected = batch([view], "cpu", normalisation, pad_with_black=black)
            np.testing.assert_array_equal(outputs[name], expected.numpy())
        np.testing.assert_array_equal(outputs["scale"], view.scale.numpy())
        assert outputs["size"].tolist() == [width, height]
        assert outputs["shown"].tolist() == list(view.pixels.shape[:0:-1])


def test_scores_are_the_formula_s():
    """Eq. 5 to 7, in float64."""
    random = np.random.default_rng(0)
    feature, embedding = random.normal(size=(7, 12)), random.normal(size=(7, 5))
    inputs = {
        "feature": feature.astype(np.float16),
        "embedding": embedding.astype(np.float16),
        "objectness": random.random(7).astype(np.float32),
        "weights": random.normal(size=(4, 12)).astype(np.float32),
        "text": random.normal(size=(4, 5)).astype(np.float32),
        "probe_weights": np.array([0, 1, 0.3, 0.8], np.float32),
        "temperature": np.array(0.5, np.float32),
    }
    exact = {name: value.astype(np.float64) for name, value in inputs.items()}
    powers = np.exp(exact["embedding"] @ exact["text"].T / 0.5)
    clip = powers / powers.sum(axis=1, keepdims=True)
    sigmoid = 1 / (1 + np.exp(-exact["feature"] @ exact["weights"].T))
    share = exact["probe_weights"]
    expected = clip ** (1 - share) * sigmoid**share * exact["objectness"][:, None]
    graph = session(onnx_scripts.score_classes.to_model_proto())
    np.testing.assert_allclose(run(graph, inputs)["scores"], np.sqrt(expected), rtol=1e-5)
    none = inputs | {name: inputs[name][:0] for name in REGION_COLUMNS}
    assert run(graph, none)["scores"].shape == (0, 4)


@pytest.mark.parametrize(("threshold", "per_image"), [(0.1, 1000), (0.6, 1000), (0.1, 30)])
def test_detections_are_those_of_nms_within_each_class(threshold, per_image):
    random = np.random.default_rng(1)
    corners = random.random((60, 2)) * 50
    boxes = np.concatenate([corners, corners + 5 + random.random((60, 2)) * 30], axis=1)
    inputs = {
        "boxes": boxes.astype(np.float32),
        "scores": random.random((60, 3)).astype(np.float32),
        "score_threshold": np.array(threshold, np.float32),
        "nms": np.array(0.4, np.float32),
        "per_image": np.array(per_image),
    }
    graph = session(onnx_scripts.best_detections.to_model_proto())
    detections = run(graph, inputs)
    row, column = (inputs["scores"] > threshold).nonzero()
    score = inputs["scores"][row, column]
    kept = batched_nms(
        torch.from_numpy(inputs["boxes"][row]),
        torch.from_numpy(score),
        torch.from_numpy(column),
        0.4,
    )[:per_image].numpy()
    assert len(kept) >= min(per_image, 20)
    np.testing.assert_array_equal(detections["confidence"], score[kept])
    np.testing.assert_array_equal(detections["column"], column[kept])
    np.testing.assert_array_equal(detections["xyxy"], inputs["boxes"][row[kept]])
    nothing = run(graph, inputs | {"boxes": inputs["boxes"][:0], "scores": inputs["scores"][:0]})
    assert nothing["xyxy"].shape == (0, 4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder with a model file and its graphs."""
    folder = tmp_path_factory.mktemp("onnx")
    random_model(folder / "model.safetensors")
    export(model=folder / "model.safetensors", onnx=folder / "mini_onnx")
    return folder


def compare(model: lpovod.Model, folder: Path, pictures: list[np.ndarray]) -> None:
    """Detections of the graphs are the model's; so are the regions."""
    image, vocabulary, detections = (
        session(folder / f"{name}.onnx") for name in ("image", "vocabulary", "detections")
    )
    inputs = dict(np.load(folder / "vocabulary.npz"))
    for pixels in pictures:
        outputs = run(image, {"image": pixels})
        (regions,) = model.describe([model.view(pixels)], [pixels.shape[:2]])
        np.testing.assert_allclose(outputs["proposals"], regions.box, atol=1e-3)
        np.testing.assert_allclose(outputs["objectness"], regions.objectness, atol=1e-5)
        np.testing.assert_allclose(outputs["boxes"], regions["refined"], atol=5e-3)
        for name in ("feature", "embedding"):
            assert outputs[name].dtype == np.float16
            np.testing.assert_allclose(outputs[name], regions[name], rtol=2e-3, atol=2e-3)
        outputs |= run(vocabulary, inputs | outputs)
        found, expected = run(detections, inputs | outputs), model.detect(pixels)
        assert inputs["names"][found["column"]].tolist() == expected.class_name
        ids = inputs["category_ids"][found["column"]]
        np.testing.assert_array_equal(ids, expected.class_id)
        np.testing.assert_allclose(found["confidence"], expected.confidence, atol=1e-4)
        np.testing.assert_allclose(found["xyxy"], expected.xyxy, atol=0.01)


@pytest.mark.slow
def test_detections_of_any_size_are_the_model_s(exported):
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    model = lpovod.load(exported / "model.safetensors", "cpu")
    assert len(model.detect(pictures[0])) > 10
    compare(model, exported / "mini_onnx", pictures)


@pytest.mark.slow
def test_detections_are_the_same_with_a_backbone_of_timm_s_and_adaptive_pooling(tmp_path):
    random_model(
        tmp_path / "model.safetensors",
        backbone={
            "architecture": "timm:resnet10t",
            "channels": 16,
            "short_side": 64,
            "long_side": 96,
        },
        base_detector={
            "regions": "proposals",
            "head_convolutions": 0,
            "dimension": 24,
            "finest_scale": 8,
            "sampling_ratio": 0,
        },
    )
    export_onnx(tmp_path / "model.safetensors", tmp_path)
    pictures = [picture(*size, seed) for seed, size in enumerate(SIZES[:5])]
    compare(lpovod.load(tmp_path / "model.safetensors", "cpu"), tmp_path, pictures)


@pytest.mark.slow
def test_the_graphs_carry_their_card_and_no_folder_of_this_computer(exported):
    card = json.loads((exported / "mini_onnx" / "card.json").read_text())
    content = read_model(exported / "model.safetensors")
    assert [c["name"] for c in card["classes"]] == content.names
    assert card["temperature"] == content.temperature
    assert card["identity"]["inputs"] == content.identity["inputs"]
    for path in (exported / "mini_onnx").glob("*.onnx"):
        metadata = session(path).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["card"]) == card
        assert str(Path.cwd()).encode() not in path.read_bytes()
    graph = session(exported / "mini_onnx" / "image.onnx")
    assert [i.shape for i in graph.get_inputs()] == [["height", "width", 3]]
    assert [o.shape for o in graph.get_outputs()][:2] == [["regions", 4]] * 2


@pytest.mark.slow
def test_the_example_of_the_documentation_runs_without_this_library(exported, monkeypatch):
    """Also its second part: a class is added, and then scored as in the model that learned it."""
    pixels = picture(90, 70)
    Image.fromarray(pixels).save(exported / "photograph.png")
    content = read_model(exported / "model.safetensors")
    random = np.random.default_rng(5)
    text = content.text["dog"][::-1].copy()
    learned = content.with_class(ModelClass("unicycle", "novel", 40), text, text)
    weights = random.normal(size=24).astype(np.float32)
    learned = replace(learned, weights=content.weights | {"unicycle": weights})
    write_model(exported / "learned.safetensors", learned)
    # The rows alone: an image's graph takes long, and does not change.
    monkeypatch.setattr("lpovod.apps.onnx_graphs.image_graph", lambda *_: small_graph())
    export_onnx(exported / "learned.safetensors", exported / "learned_onnx")
    code = "\n".join([*EXAMPLES, "import sys", "print({'torch', 'lpovod'} & {*sys.modules})"])
    code = code.replace("photograph.jpg", "photograph.png")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=exported, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("\nset()\n")
    printed = done.stdout.splitlines()
    expected = lpovod.load(exported / "model.safetensors", "cpu").detect(pixels)
    assert [line.split()[0] for line in printed[: len(expected)]] == expected.class_name
    rows = np.load(exported / "mini_onnx" / "vocabulary.npz")
    assert rows["names"].tolist() == [*content.names, "unicycle"]
    compare(lpovod.load(exported / "learned.safetensors", "cpu"), exported / "mini_onnx", [pixels])


def small_graph() -> onnx.ModelProto:
    return onnx_scripts.score_classes.to_model_proto()


def test_without_onnx_the_packages_to_install_are_named(tmp_path, monkeypatch):
    random_model(tmp_path / "model.safetensors")
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "lpovod.apps.onnx_graphs")
    with pytest.raises(LpovodError, match=r'not installed: pip install -e "\.\[onnx\]"'):
        export(model=tmp_path / "model.safetensors", onnx=tmp_path)


def test_a_backbone_that_torch_cannot_export_is_named(tmp_path, monkeypatch):
    random_model(tmp_path / "model.safetensors")

    def refuse(*_, **__):
        raise RuntimeError("no such operator\nat length")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(LpovodError, match="backbone small to ONNX: no such operator$"):
        export_onnx(tmp_path / "model.safetensors", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
