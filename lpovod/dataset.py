"""Stage `dataset`: images and annotations of every split, in one layout for every source.

Beside the json files lies a folder `images/` with a folder (or a link to one) for each split::

    dataset/train.json  dataset/val.json  [dataset/tune.json]  dataset/train_all_classes.json
    dataset/images/train/  dataset/images/val/  [dataset/images/tune/]

The json is COCO's, each category with a ``split`` (base or novel). Training annotations hold base
classes alone; validation annotations hold all classes the source has, so that a novel class can be
added or left out later without touching this stage. ``train_all_classes.json`` tells right from
wrong among retrieved regions in the report; no stage learns from it.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lpovod import miniature
from lpovod.artifacts import LpovodError, identity, read_json, write_json
from lpovod.config import CocoFiles, Dataset, Miniature
from lpovod.progress import say


@dataclass(frozen=True)
class CocoDataset:
    """Images and annotations of one split.

    Attributes:
        path: the json file.
        images: by id: ``file_name``, ``width``, ``height``.
        annotations: by image id; an image without any has an empty list.
        categories: by id: ``name`` and ``split``.
    """

    path: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[int, dict[str, Any]]

    def image_path(self, image_id: int) -> Path:
        """Where the image lies."""
        return self.path.parent / "images" / self.path.stem / self.images[image_id]["file_name"]

    def load(self, image_id: int) -> np.ndarray:
        """The decoded image, (height, width, 3) uint8 RGB, grey ones repeated over channels.

        Raises:
            LpovodError: if the file is missing, damaged, or not of the stated size.
        """
        path, stated = self.image_path(image_id), self.images[image_id]
        try:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
        except FileNotFoundError:
            raise LpovodError(f"image {image_id}: {path}: no such file") from None
        except (OSError, ValueError) as error:
            raise LpovodError(f"image {image_id}: {path} cannot be decoded ({error})") from None
        if pixels.shape[:2] != (stated["height"], stated["width"]):
            raise LpovodError(
                f"image {image_id}: {path} is {pixels.shape[1]} x {pixels.shape[0]}, "
                f"{self.path} states {stated['width']} x {stated['height']}"
            )
        return pixels

    def boxes(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Annotated boxes of an image: (n, 4) float32 xyxy and (n,) int64 category ids.

        Crowds, and boxes thinner than a pixel, are left out, as in the original's loader.
        """
        kept = [
            a
            for a in self.annotations[image_id]
            if not a.get("iscrowd", 0) and min(a["bbox"][2:]) >= 1
        ]
        xywh = np.array([a["bbox"] for a in kept], np.float64).reshape(-1, 4)
        xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return xyxy.astype(np.float32), np.array([a["category_id"] for a in kept], np.int64)

    def category_ids(self, names: list[str]) -> list[int]:
        """Ids of categories by name.

        Raises:
            LpovodError: naming the category that is not there.
        """
        by_name = {c["name"]: i for i, c in self.categories.items()}
        for name in names:
            if name not in by_name:
                raise LpovodError(f"{self.path} has no category {name!r}: {sorted(by_name)}")
        return [by_name[name] for name in names]


def read_dataset(path: Path) -> CocoDataset:
    """Read a json file of this stage, or of any source in COCO's format.

    Raises:
        LpovodError: naming the first image, annotation or category that contradicts another.
    """
    path = Path(path)
    content = read_json(path)
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise LpovodError(f"{path} is no COCO json: it has no list {section!r}")
    images = _by_id(path, "image", content["images"], ("file_name", "width", "height"))
    categories = _by_id(path, "category", content["categories"], ("name",))
    _by_id(path, "annotation", content["annotations"], ("image_id", "category_id", "bbox"))
    twice = [n for n, c in Counter(c["name"] for c in categories.values()).items() if c > 1]
    if twice:
        raise LpovodError(f"{path}: several categories are named {twice[0]!r}")
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        _check_annotation(path, annotation, images, categories)
        annotations[annotation["image_id"]].append(annotation)
    return CocoDataset(path, images, {i: annotations[i] for i in images}, categories)


def _by_id(path: Path, what: str, items: list[dict], needed: tuple[str, ...]) -> dict[int, dict]:
    found: dict[int, dict] = {}
    for item in items:
        for name in ("id", *needed):
            if name not in item:
                raise LpovodError(f"{path}: {what} {item.get('id', item)} has no {name!r}")
        if item["id"] in found:
            raise LpovodError(f"{path}: {what} id {item['id']} stands there twice")
        found[item["id"]] = item
    return found


def _check_annotation(path: Path, annotation: dict, images: dict, categories: dict) -> None:
    where = f"{path}: annotation {annotation['id']}"
    if annotation["image_id"] not in images:
        raise LpovodError(f"{where} names image {annotation['image_id']}, which is not listed")
    if annotation["category_id"] not in categories:
        raise LpovodError(f"{where} names category {annotation['category_id']}, not listed")
    box = annotation["bbox"]
    if len(box) != 4 or not np.isfinite(box).all() or box[2] < 0 or box[3] < 0:
        raise LpovodError(f"{where}: bbox {box} is not [x, y, width >= 0, height >= 0]")


def make_dataset(output: Path, settings: Dataset, base: list[str], seed: int) -> None:
    """Write every split's json and images to the folder `output`.

    Args:
        output: folder of the layout above.
        settings: the source.
        base: names of the classes that stay annotated in training.
        seed: of the drawn world.

    Raises:
        LpovodError: if a source is missing or contradicts itself, or a base class is not in it.
    """
    if settings.source == "miniature":
        splits = _draw(output, settings.miniature, seed)
    else:
        splits = _link(output, settings.coco)
        _check_counts(splits, settings.coco, base)
    ident = identity("dataset", settings) | {"seed": seed}
    for split, content in splits.items():
        whole = {"info": {"identity": ident}, **_with_split(content, base)}
        if split == "train":
            write_json(output / "train_all_classes.json", whole)
            whole = _base_alone(whole)
        write_json(output / f"{split}.json", whole)
        say(f"{split}: {len(whole['images'])} images, {len(whole['annotations'])} boxes")


def _draw(output: Path, settings: Miniature, seed: int) -> dict[str, dict]:
    counts = {
        "train": settings.train_images,
        "val": settings.val_images,
        "tune": settings.tune_images,
    }
    return {
        split: miniature.draw_split(
            output / "images" / split,
            count,
            seed,
            split,
            settings.nuisance,
            settings.nested,
            settings.distractors,
        )
        for split, count in counts.items()
    }


def _link(output: Path, files: CocoFiles) -> dict[str, dict]:
    (output / "images").mkdir(parents=True, exist_ok=True)
    splits = {}
    for split in ("train", "val"):
        folder = files.path(f"{split}_images").resolve()
        if not folder.is_dir():
            raise LpovodError(f"{folder}: no such folder (dataset.coco.{split}_images)")
        link = output / "images" / split
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        data = read_dataset(files.path(f"{split}_annotations"))
        names = [image["file_name"] for image in data.images.values()]
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise LpovodError(f"{folder}: {len(missing)} images are missing, first {missing[0]}")
        splits[split] = {
            "images": list(data.images.values()),
            "annotations": [a for kept in data.annotations.values() for a in kept],
            "categories": list(data.categories.values()),
        }
    return splits


def _check_counts(splits: dict[str, dict], files: CocoFiles, base: list[str]) -> None:
    for split, expected in files.base_boxes.items():
        content = splits[split]
        ids = {c["id"] for c in content["categories"] if c["name"] in base}
        found = sum(a["category_id"] in ids for a in content["annotations"])
        if found != expected:
            raise LpovodError(
                f"{files.path(f'{split}_annotations')} has {found} boxes of base classes, "
                f"dataset.coco.base_boxes states {expected}: are annotations and classes.base "
                "those that the number is of?"
            )


def _with_split(content: dict, base: list[str]) -> dict:
    unknown = set(base) - {c["name"] for c in content["categories"]}
    if unknown:
        raise LpovodError(f"classes.base: {sorted(unknown)} are not among the annotated classes")
    categories = [
        {"id": c["id"], "name": c["name"], "split": "base" if c["name"] in base else "novel"}
        for c in content["categories"]
    ]
    # Outlines are most of a COCO json, and nothing here reads them.
    boxes = [{k: v for k, v in a.items() if k != "segmentation"} for a in content["annotations"]]
    return {"images": content["images"], "annotations": boxes, "categories": categories}


def _base_alone(content: dict) -> dict:
    categories = [c for c in content["categories"] if c["split"] == "base"]
    kept = {c["id"] for c in categories}
    annotations = [a for a in content["annotations"] if a["category_id"] in kept]
    return content | {"categories": categories, "annotations": annotations}
