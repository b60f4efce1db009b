"""What a thousand classes cost: jobs, time until they are listed, and memory of the evaluation.

LVIS has 866 base and 337 novel classes. A dry-run on a small data set with as many names is timed;
then stage `evaluation` runs on synthetic features of growing numbers of images, each number in a
process of its own, whose peak memory, children included, is sampled.

Run as ``python -m benchmarks.many_classes [--images 500 1000 2000]``. Ends with one JSON line.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro
import yaml
from PIL import Image

from lpovod.artifacts import identity, write_json, write_tensors
from lpovod.config import EvaluationSettings
from lpovod.formats.regions import write_regions

BASE = [f"base thing {n}" for n in range(866)]
NOVEL = [f"novel thing {n}" for n in range(337)]
REGIONS, DIMENSION, D = 300, 1024, 512
OBJECTS = 12  # annotated per image


@dataclass
class Options:
    images: tuple[int, ...] = (500, 1000, 2000)
    """numbers of evaluated images"""


def categories() -> list[dict]:
    return [{"id": n, "name": name} for n, name in enumerate([*BASE, *NOVEL], 1)]


def dry_run() -> dict[str, float]:
    """Number of jobs, and seconds of a second dry-run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "annotations").mkdir()
        for split in ("train", "val"):
            (folder / f"{split}2017").mkdir()
            colour = (200, 90, 40) if split == "train" else (20, 90, 180)
            Image.new("RGB", (64, 48), colour).save(folder / f"{split}2017/1.png")
            boxes = [
                {"id": c["id"], "image_id": 1, "category_id": c["id"], "bbox": [0, 0, 9, 9]}
                | {"area": 81, "iscrowd": 0}
                for c in categories()
            ]
            image = {"id": 1, "file_name": "1.png", "width": 64, "height": 48}
            content = {"images": [image], "annotations": boxes, "categories": categories()}
            write_json(folder / f"annotations/instances_{split}2017.json", content)
        run = f"benchmark_{folder.name}"
        dataset = {"source": "coco", "coco": {"root": name, "pictogram_clip": True}}
        content = {"name": run, "dataset": dataset, "classes": {"base": BASE, "novel": NOVEL}}
        (folder / "overlay.yaml").write_text(yaml.safe_dump(content))
        command = [sys.executable, "-m", "snakemake", "-n", "--configfile", folder / "overlay.yaml"]
        try:
            for _ in range(2):
                start = time.perf_counter()
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds = time.perf_counter() - start
        finally:
            shutil.rmtree(Path("results", run), ignore_errors=True)
    return {"jobs": int(re.search(r"^total +(\d+)", done.stdout, re.M)[1]), "dry_run_s": seconds}


def make_features(folder: Path, images: int) -> None:
    """Everything that the evaluation reads, at random."""
    random = np.random.default_rng(images)
    listed, boxes = [], []
    for i in range(1, images + 1):
        listed.append({"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480})
        for k in range(OBJECTS):
            x, y = random.uniform(0, 400), random.uniform(0, 300)
            category = int(random.integers(1, len(BASE) + len(NOVEL) + 1))
            box = {"bbox": [x, y, 90.0, 90.0], "area": 8100, "iscrowd": 0}
            ids = {"id": i * OBJECTS + k, "image_id": i, "category_id": category}
            boxes.append(ids | box)
    content = {"images": listed, "annotations": boxes, "categories": categories()}
    write_json(folder / "val.json", content)

    def units(rows: int, columns: int) -> np.ndarray:
        vectors = random.standard_normal((rows, columns)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def weights(rows: int) -> np.ndarray:
        # A constant component, so that few of the classes score high, as with a trained detector.
        return np.hstack([np.full((rows, 1), -1, np.float32), units(rows, DIMENSION - 1)])

    detector = {"prototypes": weights(len(BASE))}
    write_tensors(
        folder / "detector.safetensors", detector, identity("base_detector") | {"classes": BASE}
    )
    probe = dict(zip(NOVEL, weights(len(NOVEL)), strict=True))
    ident = identity("linear_probe", detector=folder / "detector.safetensors")
    write_tensors(folder / "probe.safetensors", probe, ident)
    ident = identity("text_embeddings", clip_weights="w", clip_architecture="a")
    for split, names in (("base", BASE), ("novel", NOVEL)):
        text = dict(zip(names, units(len(names), D), strict=True))
        write_tensors(folder / f"{split}.safetensors", text, ident | {"logit_scale": 100.0})
    ident = identity(
        "region_features", dataset=folder / "val.json", detector=folder / "detector.safetensors"
    )
    with write_regions(folder / "features.h5", ident) as writer:
        for i in range(1, images + 1):
            low = random.uniform(0, [500, 380], (REGIONS, 2))
            box = np.hstack([low, low + random.uniform(20, 100, (REGIONS, 2))]).astype(np.float32)
            feature = 2 * random.standard_normal((REGIONS, DIMENSION)).astype(np.float16)
            feature[:, 0] = 6
            writer.add(
                i,
                box,
                random.random(REGIONS, np.float32),
                feature=feature,
                embedding=units(REGIONS, D).astype(np.float16),
                refined=box,
            )


def measure(folder: Path) -> tuple[float, float]:
    """Seconds of the evaluation, and peak GiB of its processes together, shared pages once."""
    options = {
        "dataset": "val.json",
        "region-features": "features.h5",
        "detector": "detector.safetensors",
        "linear-probe": "probe.safetensors",
        "metrics": "metrics.json",
        "detections": "detections.json",
        "ground-truth": "ground_truth.json",
    }
    command = [sys.executable, "-m", "workflow_scripts.evaluation", "--workers", "2"]
    command += [word for k, v in options.items() for word in (f"--{k}", str(folder / v))]
    command += ["--text-embeddings", str(folder / "base.safetensors")]
    command += [str(folder / "novel.safetensors"), "--region-embeddings"]
    command += ["--settings", EvaluationSettings(clip_on_crops=False).model_dump_json()]
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.2):
            try:
                parent = psutil.Process(process.pid)
                family = [parent, *parent.children(recursive=True)]
                peak = max(peak, sum(p.memory_full_info().pss for p in family))
            except psutil.NoSuchProcess:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    done.set()
    watcher.join()
    assert process.returncode == 0
    return time.perf_counter() - start, peak / 2**30


def main(options: Options) -> None:
    listed = dry_run()
    print(f"{len(BASE)} + {len(NOVEL)} classes: {listed['jobs']} jobs, {listed['dry_run_s']:.2f} s")
    rows = {}
    for images in options.images:
        with tempfile.TemporaryDirectory() as name:
            make_features(Path(name), images)
            seconds, gib = measure(Path(name))
        rows[images] = {"s": round(seconds, 1), "gib": round(gib, 2)}
        print(f"{images} images evaluated: {seconds:.1f} s, {gib:.2f} GiB", flush=True)
    print(json.dumps(listed | {"evaluation": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options))
