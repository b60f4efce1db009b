"""Time of the check of a user's data, per image, with headers alone and with decoding.

Run as ``python -m benchmarks.check``; --photographs FOLDER copies real images in place of noise.
Every file has its own content, since copies would be taken for leaks, and COCO's number of boxes.
The files are out of the page cache when a measurement starts (posix_fadvise, DONTNEED). Ends with
one JSON line; the seconds for COCO are in proportion to the number of images.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from PIL import Image

from lpovod.progress import start_logging
from lpovod.stages.check import check

COCO_IMAGES, BOXES = 123_287, 7
CLASSES = 80
SIDE = 96


@dataclass
class Options:
    images: int = 20_000
    """number of images, a tenth of them in val"""
    photographs: Path | None = None
    """folder of JPEGs that are copied in turn, with a number appended"""
    decode: bool = False
    """measure decoding, too"""
    workers: int = 2
    """processes"""


def make_images(folder: Path, split: str, count: int, photographs: list[Path]) -> list[dict]:
    """Write images and return their entries in the json."""
    (folder / split).mkdir()
    draw = np.random.default_rng(len(split))
    sizes = {path: Image.open(path).size for path in photographs}
    images = []
    for number in range(count):
        name, size = f"{number:06}.jpg", (SIDE, SIDE)
        if photographs:
            source = photographs[number % len(photographs)]
            size = sizes[source]
            # In front of the end marker; readers skip it.
            content = source.read_bytes()[:-2] + f"{split}{number}".encode() + b"\xff\xd9"
            (folder / split / name).write_bytes(content)
        else:
            noise = draw.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
            Image.fromarray(noise).resize(size).save(folder / split / name)
        shape = {"width": size[0], "height": size[1]}
        images.append({"id": number, "file_name": name, **shape})
    return images


def make_json(folder: Path, split: str, images: list[dict]) -> None:
    """Write the json, with outlines as COCO's."""
    draw = np.random.default_rng(1)
    boxes = (draw.random((len(images), BOXES, 4)) * 40 + 2).round(2).tolist()
    categories = draw.integers(0, CLASSES, (len(images), BOXES)).tolist()
    outline = [(draw.random(60) * 90).round(2).tolist()]
    annotations = [
        {
            "id": image["id"] * BOXES + number,
            "image_id": image["id"],
            "category_id": categories[image["id"]][number],
            "bbox": boxes[image["id"]][number],
            "segmentation": outline,
        }
        for image in images
        for number in range(BOXES)
    ]
    named = [{"id": c, "name": f"class {chr(97 + c // 26)}{chr(97 + c % 26)}"} for c in range(80)]
    content = {"images": images, "annotations": annotations, "categories": named}
    (folder / f"{split}.json").write_text(json.dumps(content))


def make_cold(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*.jp*g"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def seconds(folder: Path, bad_images: Literal["fail", "skip"], workers: int) -> float:
    make_cold(folder)
    start = time.perf_counter()
    check(
        folder / "train",
        folder / "train.json",
        ["class aa", "class ab"],
        ["class ac"],
        bad_images,
        workers,
        "",
        folder / "check.json",
        folder / "check.html",
        folder / "val",
        folder / "val.json",
    )
    return time.perf_counter() - start


def main(options: Options) -> None:
    start_logging()
    photographs = sorted(options.photographs.glob("*.jpg")) if options.photographs else []
    result = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = {"train": options.images - options.images // 10, "val": options.images // 10}
        for split, count in counts.items():
            make_json(folder, split, make_images(folder, split, count, photographs))
        modes: list[Literal["fail", "skip"]] = ["fail", "skip"] if options.decode else ["fail"]
        for mode in modes:
            took = seconds(folder, mode, options.workers)
            label = "headers" if mode == "fail" else "decoding"
            result[f"{label}_seconds"] = round(took, 2)
            result[f"{label}_seconds_of_coco"] = round(took / options.images * COCO_IMAGES)
    print(json.dumps(result | {"images": options.images, "workers": options.workers}))


if __name__ == "__main__":
    main(tyro.cli(Options))
