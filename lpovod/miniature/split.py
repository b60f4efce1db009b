"""A split of the miniature world: JPEG files and their COCO annotations."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from lpovod.miniature.pictograms import CATEGORY_IDS, CLASSES, DISTRACTORS
from lpovod.miniature.scenes import IMAGE_SIZE, DrawnObject, compose_scene

SPLITS = ("train", "val", "tune", "clip")


# -------------------------------------------------------------------------------------- one split


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random stream of image `index` of a split, independent of the number of images drawn.

    Raises:
        ValueError: if the split is not one of `SPLITS`.
    """
    return np.random.default_rng([seed, zlib.crc32(_checked(split).encode()), index])


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the miniature world; choose from {SPLITS}")
    return split


def draw_split(
    directory: Path,
    images: int,
    seed: int,
    split: str,
    nuisance: float = 1.0,
    nested: float = 0.4,
    distractors: float = 0.0,
) -> dict:
    """Draw the images of a split as JPEG files and return their COCO annotations.

    Args:
        directory: folder for the files, which are named by the twelve digits of their image id.
        images: number of images.
        seed: seed of the world; the splits of one seed share no random stream.
        split: one of `SPLITS`.
        nuisance: see `compose_scene`, as for `nested` and `distractors`.

    Returns:
        COCO's `images`, `annotations` (bbox xywh in absolute pixels) and `categories` (all of
        `CLASSES`, base and novel). Ids are unique across splits and have gaps.

    Raises:
        ValueError: if the split is not one of `SPLITS`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    first_id = 1_000_000 * (SPLITS.index(_checked(split)) + 1)
    records, annotations = [], []
    for index in range(images):
        scene = compose_scene(
            scene_rng(seed, split, index),
            nuisance=nuisance,
            nested=nested,
            distractors=distractors,
        )
        image_id = first_id + 7 * index + 1
        name = f"{image_id:012d}.jpg"
        _write_jpeg(directory / name, scene.image)
        records.append(
            {"id": image_id, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
        for position, drawn in enumerate(scene.objects):
            if drawn.name in DISTRACTORS:
                continue
            annotation_id = 100 * image_id + position
            annotations.append(
                _annotation(annotation_id, image_id, CATEGORY_IDS[drawn.name], drawn)
            )
    categories = [{"id": CATEGORY_IDS[name], "name": name} for name in CLASSES]
    return {"images": records, "annotations": annotations, "categories": categories}


def _annotation(annotation_id: int, image_id: int, category_id: int, drawn: DrawnObject) -> dict:
    x1, y1, x2, y2 = drawn.box
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": drawn.area,
        "iscrowd": 0,
    }


def _write_jpeg(path: Path, pixels: np.ndarray) -> None:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(stream.getvalue())
    os.replace(temporary, path)
