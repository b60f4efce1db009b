"""Time of `lpovod detect`: start-up, and the overhead beside the bare networks.

    python -m benchmarks.detect --run results/mini --images ../photographs

Three figures, medians of the repeats:

* seconds of the whole process from start to the first detection, on one image of the run;
* milliseconds of `Model.detect` on one decoded image, over those of the networks alone on the same
  resized pixels (both backbones, proposals, heads), for the run's model;
* with images: the same for a model of the paper's size with random weights (ResNet-50, 1333 x 800,
  300 proposals), beside torchvision's Faster R-CNN R50-FPN on the same images.

Ends with one JSON line. Use an idle machine.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from benchmarks.random_model import random_model
from lpovod.config import read_config
from lpovod.formats.images import read_image
from lpovod.formats.labels import SUFFIXES
from lpovod.model import Model, load
from lpovod.views import batch

PHOTOGRAPHS = 3  # a model of the paper's size takes seconds for each


def main(run: Path = Path("results/mini"), images: Path | None = None, repeats: int = 15) -> None:
    """Time detection.

    Args:
        run: a finished run.
        images: folder of photographs, for a model of the paper's size.
        repeats: of each measurement.
    """
    path = run / "model/model.safetensors"
    first = sorted((run / "dataset/images/val").glob("*.jpg"))[0]
    figures = {"start_up_s": start_up(path, first)}
    print(f"process to first detection: {figures['start_up_s']:.2f} s")
    figures |= overhead("mini", load(path, "cpu"), [read_image(first)], repeats)
    if images is not None:
        files = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES)
        photographs = [read_image(p) for p in files[:PHOTOGRAPHS]]
        repeats = max(1, repeats // 5)
        figures |= overhead("r50", paper_size(), photographs, repeats)
        theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
        tensors = [torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in photographs]
        with torch.inference_mode():
            (theirs_ms,) = medians([lambda: [theirs([t]) for t in tensors]], repeats)
        figures["torchvision_ms"] = theirs_ms / len(tensors)
        ratio = figures["r50_detect_ms"] / figures["torchvision_ms"]
        print(f"torchvision's Faster R-CNN: {figures['torchvision_ms']:.0f} ms; ours {ratio:.2f}")
    print(json.dumps(figures))


def start_up(model: Path, image: Path) -> float:
    """Seconds of a process that detects in one image."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "lpovod.apps.main", "detect", str(image)]
        command += ["--model", str(model), "--output", output]

        def process() -> None:
            subprocess.run(command, check=True, capture_output=True)

        return medians([process], 5)[0] / 1000


def overhead(name: str, model: Model, images: list[np.ndarray], repeats: int) -> dict[str, float]:
    """Milliseconds per image of detection and of the bare networks."""
    views = [model.view(pixels) for pixels in images]
    regions = [model.describe([v], [p.shape[:2]])[0] for v, p in zip(views, images, strict=True)]

    @torch.inference_mode()
    def bare() -> None:
        for view, proposed in zip(views, regions, strict=True):
            shown = batch([view], "cpu", model.network.backbone.normalisation)
            model.network(shown)
            detector = model.detector
            pooled = detector.pool(detector.pyramid(shown), [view.to_view(proposed.box)])
            detector.extract(pooled)

    def detect() -> None:
        for pixels in images:
            model.detect(pixels)

    networks, whole = (m / len(images) for m in medians([bare, detect], repeats))
    print(f"{name}: {whole:.1f} ms per image, networks {networks:.1f} ({whole / networks:.3f})")
    return {f"{name}_detect_ms": whole, f"{name}_networks_ms": networks}


def paper_size() -> Model:
    """A model of the paper's size with random weights and 65 classes."""
    config = read_config([Path("config.yaml"), Path("configs/coco_learned.yaml")], weights=False)
    return Model(random_model(config), Path("random"), "cpu")


def medians(works: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each of several works, done in turn, so that all see the same machine.

    The first round does not count.
    """
    seconds: list[list[float]] = [[] for _ in works]
    for number in range(repeats + 1):
        for work, of_work in zip(works, seconds, strict=True):
            started = time.perf_counter()
            work()
            if number:
                of_work.append(time.perf_counter() - started)
    return [1000 * statistics.median(of_work) for of_work in seconds]


if __name__ == "__main__":
    tyro.cli(main)
