"""Images per second of the loader, for each core, and how many cores a GPU needs beside it.

    python -m benchmarks.loader --images ../photographs

One process reads the photographs in four ways: Pillow alone (opened, decoded, RGB), which is the
reference; this project's loader as it feeds a GPU, which resizes by itself, and as it feeds a CPU,
where loading resizes as well; and the resizing alone. Then `workers` processes load for a GPU, as
the workflow's jobs do. Rates are medians of the repeats, ratios are over the reference's rate.

A GPU takes `gpu` images a second, an assumption: it waits for the loader if the cores beside it
load fewer. Ends with one JSON line. Use an idle machine.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from lpovod.formats.coco import CocoDataset
from lpovod.formats.images import read_header
from lpovod.formats.labels import SUFFIXES
from lpovod.views import View, apply_view, load_views

ELSEWHERE = "meta"  # stands for a GPU: views come as they are decoded, and go nowhere


def main(
    images: Path,
    count: int = 100,
    short_side: int = 800,
    long_side: int = 1333,
    workers: int = 2,
    gpu: float = 100.0,
    repeats: int = 5,
) -> None:
    """Time the loader.

    Args:
        images: folder of photographs.
        count: photographs read in a repeat; a folder with fewer is read several times.
        short_side: of the resized photograph, in pixels.
        long_side: limit of its longer side.
        workers: processes that load side by side.
        gpu: images per second that a GPU takes.
        repeats: of each measurement.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = dataset_of(images, Path(folder))
        ids = list(data.images)
        views = [View(ids[n % len(ids)], short_side, long_side) for n in range(count)]
        decoded = {i: data.load(i) for i in ids}

        def loaded(device: str, processes: int = 0) -> Iterable[object]:
            return load_views(data, views, 1, processes, device=device)

        ways: dict[str, Callable[[], Iterable[object]]] = {
            "reference": lambda: (pillow(data.image_path(v.image_id)) for v in views),
            "for_gpu": lambda: loaded(ELSEWHERE),
            "for_cpu": lambda: loaded("cpu"),
            "resizing": lambda: (apply_view(decoded[v.image_id], v) for v in views),
            "workers": lambda: loaded(ELSEWHERE, workers),
        }
        rates = {name: count / seconds for name, seconds in medians(ways, repeats).items()}
    names = {
        "reference": "Pillow decodes",
        "for_gpu": "loaded for a GPU: decoded",
        "for_cpu": "loaded for a CPU: decoded, resized",
        "resizing": "resized alone",
        "workers": f"loaded for a GPU by {workers} processes",
    }
    for name, rate in rates.items():
        ratio = rate / rates["reference"]
        print(f"{names[name]:38} {rate:7.1f} images/s {1000 / rate:7.2f} ms   {ratio:.2f}")
    for name in ("for_gpu", "for_cpu"):
        print(f"cores that feed {gpu:g} images/s, {names[name]}: {gpu / rates[name]:.1f}")
    print(json.dumps({name: round(rate, 1) for name, rate in rates.items()}))


def dataset_of(images: Path, folder: Path) -> CocoDataset:
    """The photographs of a folder as a data set."""
    paths = sorted(p for p in images.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise SystemExit(f"{images} holds no photographs")
    (folder / "images").mkdir()
    (folder / "images/train").symlink_to(images.resolve())
    listed = {}
    for number, path in enumerate(paths):
        width, height = read_header(path).displayed
        name = str(path.relative_to(images))
        listed[number] = {"file_name": name, "width": width, "height": height}
    return CocoDataset(folder / "train.json", listed, {i: [] for i in listed}, {})


def pillow(path: Path) -> np.ndarray:
    """The pixels of a photograph."""
    return np.array(Image.open(path).convert("RGB"))


def medians(ways: dict[str, Callable[[], Iterable[object]]], repeats: int) -> dict[str, float]:
    """Median seconds of each way, taken in turn, so that all see the same machine.

    The first round does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in way():
                pass
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(of_way) for name, of_way in seconds.items()}


if __name__ == "__main__":
    tyro.cli(main)
