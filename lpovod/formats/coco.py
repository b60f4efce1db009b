"""COCO's json: images, annotations and categories of a split, and detections as COCO results."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from lpovod.artifacts import Identity, check_made_from, read_json, sha256
from lpovod.exceptions import LpovodError
from lpovod.formats.images import read_image

NUMBER = (int, float)
Fields = dict[str, tuple[tuple[type, ...], str]]
"""Types of the fields that an item must have, and their meaning; true is not an integer."""

_ID: Fields = {"id": ((int,), "an integer")}
IMAGE: Fields = _ID | {
    "file_name": ((str,), "a path below the folder of the images"),
    "width": (NUMBER, "a number of pixels"),
    "height": (NUMBER, "a number of pixels"),
}
CATEGORY: Fields = _ID | {"name": ((str,), "a text")}
ANNOTATION: Fields = _ID | {
    "image_id": ((int,), "an integer"),
    "category_id": ((int,), "an integer"),
    "bbox": ((list,), "a list of four numbers"),
}
IMAGE_KEYS = ("id", "file_name", "width", "height")
BOX_KEYS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
"""What stages read of the json. Outlines make up most of COCO's, and no stage reads them."""


def corners(xywh: Any) -> np.ndarray:
    """Converts COCO's boxes (x, y, width, height), (n, 4) or (4,), to float64 xyxy."""
    box = np.asarray(xywh, np.float64)
    box = box if box.shape == (4,) else box.reshape(-1, 4)
    return np.concatenate([box[..., :2], box[..., :2] + box[..., 2:]], axis=-1)


@dataclass(frozen=True)
class CocoDataset:
    """Images and annotations of one split.

    Attributes:
        path: the json file.
        images: by id: ``file_name``, ``width``, ``height``.
        annotations: by image id; the list is empty for an image without annotations.
        categories: by id: ``name``; ``split`` (base or novel) for configured classes alone.
        info: what the file says of itself: its ``identity``, and the folder of the ``images``,
            relative to the file.
    """

    path: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, list[dict[str, Any]]]
    categories: dict[int, dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Folder of the images; ``images/<split>`` beside the file, unless the file names one."""
        return self.path.parent / self.info.get(
            "images", Path("images", self.path.name.partition(".")[0])
        )

    @property
    def images_digest(self) -> str:
        """Digest of the json that lists the images: the one this file was made from, or itself.

        Stages that need no annotations read that json, so annotations make none of them stale.
        """
        inputs = self.info.get("identity", {}).get("inputs", {})
        return inputs.get("images") or sha256(self.path)

    def image_path(self, image_id: int) -> Path:
        """Path of the image file."""
        return self.folder / self.images[image_id]["file_name"]

    def size(self, image_id: int) -> tuple[int, int]:
        """Height and width of an image in pixels, as stated."""
        stated = self.images[image_id]
        return stated["height"], stated["width"]

    def load(self, image_id: int) -> np.ndarray:
        """The decoded image, (height, width, 3) uint8 RGB, as `read_image` says.

        Raises:
            LpovodError: if the file is missing, damaged, or does not have the stated size.
        """
        stated = self.images[image_id]
        try:
            return read_image(self.image_path(image_id), (stated["width"], stated["height"]))
        except LpovodError as error:
            raise LpovodError(f"image {image_id}: {error}") from None

    def boxes(self, image_id: int) -> tuple[np.ndarray, np.ndarray]:
        """Annotated boxes of an image: (n, 4) float32 xyxy and (n,) int64 category ids.

        Crowds, and boxes thinner than a pixel, are left out, as in the original's loader.
        """
        objects = [
            a
            for a in self.annotations[image_id]
            if not a.get("iscrowd", 0) and min(a["bbox"][2:]) >= 1
        ]
        boxes = corners([a["bbox"] for a in objects]).astype(np.float32)
        return boxes, np.array([a["category_id"] for a in objects], np.int64)

    def category_ids(self, names: list[str]) -> list[int]:
        """Ids of categories by name.

        Raises:
            LpovodError: naming the missing category.
        """
        by_name = {c["name"]: i for i, c in self.categories.items()}
        for name in names:
            if name not in by_name:
                raise LpovodError(f"{self.path} has no category {name!r}: {sorted(by_name)}")
        return [by_name[name] for name in names]

    def of_classes(self, base: list[str], novel: list[str]) -> "CocoDataset":
        """The same images with the annotations and categories of these classes alone.

        Each category gets its ``split``. A class that the file lacks is added, in the order of the
        names, with the next id: it has no annotations, so its AP cannot be measured.
        """
        splits = dict.fromkeys(base, "base") | dict.fromkeys(novel, "novel")
        categories = {
            i: c | {"split": splits[c["name"]]}
            for i, c in self.categories.items()
            if c["name"] in splits
        }
        known = {c["name"]: i for i, c in self.categories.items()}
        for name, number in ids_of(known, splits).items():
            categories.setdefault(number, {"id": number, "name": name, "split": splits[name]})
        annotations = {
            image_id: [a for a in objects if a["category_id"] in categories]
            for image_id, objects in self.annotations.items()
        }
        return replace(self, annotations=annotations, categories=categories)


def ids_of(known: dict[str, int], names: Iterable[str]) -> dict[str, int]:
    """The category id of each name: its own, or, for names that have none, the next ones.

    Args:
        known: ids of all categories of a data set.
        names: of classes.
    """
    names = list(names)
    absent = sorted(set(names) - set(known))
    added = dict(zip(absent, count(max(known.values(), default=0) + 1), strict=False))
    return {name: known[name] if name in known else added[name] for name in names}


def check_same_images(path: Path, ident: Identity, data: CocoDataset) -> None:
    """Refuse an artifact that was made from other images than those of a dataset.

    Raises:
        LpovodError: naming the artifact, both digests and the remedy.
    """
    check_made_from(path, ident, "dataset", data.images_digest)


def read_dataset(path: Path) -> CocoDataset:
    """Read a json file in COCO's format.

    Raises:
        LpovodError: naming the first image, annotation or category that is incomplete or
            contradicts another.
    """
    path = Path(path)
    content = read_json(path)
    for section in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            raise LpovodError(f"{path} is not a COCO json: it has no list {section!r}")
    images = _by_id(path, "image", content["images"], IMAGE)
    categories = _by_id(path, "category", content["categories"], CATEGORY)
    _by_id(path, "annotation", content["annotations"], ANNOTATION)
    names = Counter(category["name"] for category in categories.values())
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise LpovodError(f"{path}: several categories are named {repeated[0]!r}")
    annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        _check_annotation(path, annotation, images, categories)
        annotations[annotation["image_id"]].append(annotation)
    info = content.get("info")
    info = info if isinstance(info, dict) else {}
    return CocoDataset(path, images, {i: annotations[i] for i in images}, categories, info)


def _by_id(path: Path, kind: str, items: list[dict], required: Fields) -> dict[int, dict]:
    by_id: dict[int, dict] = {}
    for item in items:
        if not isinstance(item, dict):
            raise LpovodError(f"{path}: {kind} {item!r} is not an object with an id")
        for name, (types, meaning) in required.items():
            if name not in item:
                raise LpovodError(f"{path}: {kind} {item.get('id', item)} has no {name!r}")
            if type(item[name]) not in types:
                raise LpovodError(
                    f"{path}: {kind} {item['id']!r}: {name} {item[name]!r} is not {meaning}"
                )
        if item["id"] in by_id:
            raise LpovodError(f"{path}: {kind} id {item['id']} appears twice")
        by_id[item["id"]] = item
    return by_id


def _check_annotation(path: Path, annotation: dict, images: dict, categories: dict) -> None:
    prefix = f"{path}: annotation {annotation['id']}"
    if annotation["image_id"] not in images:
        raise LpovodError(f"{prefix} names image {annotation['image_id']}, which is not listed")
    if annotation["category_id"] not in categories:
        raise LpovodError(f"{prefix} names category {annotation['category_id']}, not listed")
    if not is_box(annotation["bbox"]):
        box = annotation["bbox"]
        raise LpovodError(f"{prefix}: bbox {box} is not [x, y, width >= 0, height >= 0]")


def is_box(box: Any) -> bool:
    """Whether a value is a box in COCO's form: x, y, width and height, finite numbers."""
    if not isinstance(box, list) or len(box) != 4:
        return False
    numbers = all(type(value) in NUMBER for value in box)
    return numbers and math.isfinite(sum(box)) and box[2] >= 0 and box[3] >= 0


Detected = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one image: boxes (n, 4) xyxy, scores (n,), category ids (n,)."""

Detections = dict[int, Detected]
"""By image id."""


def coco_results(detections: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's results format: a list of image_id, category_id, bbox xywh, score."""
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, arrays in detections.items()
        # Lists, because taking numbers out of the arrays one by one takes three times as long.
        for (x1, y1, x2, y2), score, category in zip(*(a.tolist() for a in arrays), strict=True)
    ]


def read_results(path: Path, data: CocoDataset) -> list[dict[str, Any]]:
    """Detections in COCO's results format, checked against the images of their split.

    Args:
        path: json list of image_id, bbox xywh in pixels, score and, unless class-agnostic,
            category_id.
        data: the split.

    Returns:
        The entries of the file, unchanged.

    Raises:
        LpovodError: naming the first entry that does not have this form, has an impossible value,
            or names an image that the split does not have.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise LpovodError(f"{path} is not in COCO's results format, a list of detections")
    for number, item in enumerate(content):
        try:
            x, y, width, height = item["bbox"]
            possible = math.isfinite(x + y + width + height + item["score"])
            possible, image_id = possible and min(width, height) >= 0, item["image_id"]
            hash((image_id, item.get("category_id")))  # neither is a list
        except (KeyError, TypeError, ValueError):
            raise LpovodError(
                f"{path}: detection {number} is not of the form image_id, category_id, "
                "bbox [x, y, width, height], score"
            ) from None
        if not possible:
            raise LpovodError(f"{path}: detection {number}: impossible value of bbox or score")
        if image_id not in data.images:
            raise LpovodError(f"{path}: detection {number}: {data.path} has no image {image_id}")
    return content
