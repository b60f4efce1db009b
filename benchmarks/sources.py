"""Time until Snakemake knows what is stale, with as many images as COCO has.

Makes a folder of small JPEG files and COCO json of COCO's size, and times two dry-runs: the first
checks the data and digests them, the second costs what every later call costs.

Run as ``python -m benchmarks.sources [--train 118287] [--val 5000]``. Ends with one JSON line.
"""

import argparse
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

BOXES = 7  # per image, as in COCO
OUTLINE = [[100.25] * 50]  # numbers of an outline: most of the bytes of COCO's json


def make_split(folder: Path, split: str, count: int, first_id: int) -> None:
    """Small images with the stated size, each another file, and annotations of two classes."""
    images = folder / f"{split}2017"
    images.mkdir(parents=True)
    stream, random = io.BytesIO(), np.random.default_rng(first_id)
    Image.fromarray(random.integers(0, 255, (96, 128, 3), np.uint8)).save(stream, "JPEG")
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "unicycle"}],
    }
    for n in range(first_id, first_id + count):
        # Trailing bytes behind a JPEG's end are ignored by every reader.
        (images / f"{n:012}.jpg").write_bytes(stream.getvalue() + n.to_bytes(4) + b"\xff\xd9")
        size = {"width": 128, "height": 96}
        content["images"].append({"id": n, "file_name": f"{n:012}.jpg"} | size)
        for k in range(BOXES):
            box = {
                "bbox": [k, k, 20.5, 30.5],
                "area": 625.25,
                "iscrowd": 0,
                "segmentation": OUTLINE,
            }
            ids = {"id": BOXES * n + k, "image_id": n, "category_id": 1 + k % 2}
            content["annotations"].append(ids | box)
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=118_287)
    parser.add_argument("--val", type=int, default=5_000)
    options = parser.parse_args()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_split(folder, "train", options.train, 1)
        make_split(folder, "val", options.val, 1_000_000)
        overlay = folder / "overlay.yaml"
        dataset = {"source": "coco", "coco": {"root": name, "pictogram_clip": True}}
        classes = {"base": ["person"], "novel": ["unicycle"]}
        run = f"benchmark_{folder.name}"
        overlay.write_text(yaml.safe_dump({"name": run, "dataset": dataset, "classes": classes}))
        command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "--configfile", overlay]
        try:
            for key in ("first", "again"):
                start = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds[key] = round(time.perf_counter() - start, 2)
                print(f"{key}: {seconds[key]} s")
        finally:
            shutil.rmtree(Path("results", run), ignore_errors=True)
    print(json.dumps({"images": options.train + options.val, "seconds": seconds}))


if __name__ == "__main__":
    main()
