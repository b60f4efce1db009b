"""Milliseconds from an image to its detections: ONNX Runtime beside torch, on the CPU.

    python -m benchmarks.onnx --model results/mini/model/model.safetensors --image photograph.jpg

Both take the same pixels, decoded before; torch comes first, because ONNX Runtime's idle threads
keep the cores busy. Without `--model` the networks are a ResNet-50 of the size that
configs/photographs.yaml sets, with random weights; without `--image` the pixels are noise of
640 x 480. With `--compare FOLDER` the detections in its images are compared, too: one differs if
the other has none of its class within 0.05 pixels and 1e-4 of its score. Ends with one JSON line.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import tyro

import lpovod
from benchmarks.random_model import random_model
from lpovod.apps.onnx_graphs import export_onnx
from lpovod.config import Config
from lpovod.formats.model import ModelFile, write_model
from lpovod.model import read_source
from lpovod.progress import start_logging

CLASSES = 65
PHOTOGRAPHS = {
    "backbone": {
        "architecture": "resnet50_torchvision",
        "channels": 256,
        "short_side": 640,
        "long_side": 1067,
    },
    "proposals": {"per_level": 1000, "per_image": 300},
    "base_detector": {"regions": "proposals", "sampling_ratio": 0},
}


@dataclass
class Options:
    model: Path | None = None
    """the model file"""
    image: Path | None = None
    """the image file"""
    compare: Path | None = None
    """folder of images whose detections are compared"""
    repeats: int = 20
    """measurements, of which the median counts"""
    threads: int = 2
    """of either library"""


class Graphs:
    """The three graphs, one after the other, as docs/onnx.md runs them."""

    def __init__(self, folder: Path, threads: int):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.image, self.vocabulary, self.detections = (
            onnxruntime.InferenceSession(folder / f"{name}.onnx", options)
            for name in ("image", "vocabulary", "detections")
        )
        self.inputs = dict(np.load(folder / "vocabulary.npz"))

    def detect(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Boxes, scores and columns."""
        values = self.inputs | {"image": pixels}
        for graph in (self.image, self.vocabulary, self.detections):
            inputs = {i.name: values[i.name] for i in graph.get_inputs()}
            outputs = graph.run(None, inputs)
            values |= zip((o.name for o in graph.get_outputs()), outputs, strict=True)
        return outputs


def photographs_size() -> ModelFile:
    """A model of the size of configs/photographs.yaml."""
    names = [f"class {chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(CLASSES)]
    classes = {"base": names[:-1], "novel": names[-1:]}
    return random_model(Config.model_validate({"classes": classes} | PHOTOGRAPHS))


def median_milliseconds(
    detect: Callable[[np.ndarray], object], pixels: np.ndarray, repeats: int
) -> float:
    """Of one call."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        detect(pixels)
        seconds.append(time.perf_counter() - start)
    return round(1000 * statistics.median(seconds[2:]), 1)  # the first two warm up


def count_differing(model: lpovod.Model, graphs: Graphs, images: list[Path]) -> dict[str, int]:
    """Detections of the model, and how many of them the graphs lack."""
    total, differing = 0, 0
    for path in images:
        pixels = read_source(path)
        expected = model.detect(pixels)
        boxes, scores, columns = graphs.detect(pixels)
        names = graphs.inputs["names"][columns]
        for box, score, name in zip(
            expected.xyxy, expected.confidence, expected.class_name, strict=True
        ):
            near = (np.abs(boxes - box) < 0.05).all(axis=1) & (np.abs(scores - score) < 1e-4)
            differing += not (near & (names == name)).any()
        total += len(expected)
    return {"images": len(images), "detections": total, "differing": differing}


def main(options: Options) -> None:
    start_logging()
    torch.set_num_threads(options.threads)
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    pixels = read_source(options.image) if options.image else noise
    with tempfile.TemporaryDirectory() as name:
        path = options.model or Path(name, "model.safetensors")
        if options.model is None:
            write_model(path, photographs_size())
        start = time.perf_counter()
        export_onnx(path, Path(name, "onnx"))
        seconds = time.perf_counter() - start
        model = lpovod.load(path, "cpu")
        torch_ms = median_milliseconds(model.detect, pixels, options.repeats)
        graphs = Graphs(Path(name, "onnx"), options.threads)
        onnx_ms = median_milliseconds(graphs.detect, pixels, options.repeats)
        images = sorted(options.compare.rglob("*.jpg")) if options.compare else []
        compared = count_differing(model, graphs, images)
    result = {
        "backbone": model.content.config.backbone.architecture,
        "image": list(pixels.shape[:2]),
        "threads": options.threads,
        "torch_ms": torch_ms,
        "onnxruntime_ms": onnx_ms,
        "speedup": round(torch_ms / onnx_ms, 2),
        "export_seconds": round(seconds, 1),
        **(compared if images else {}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options))
