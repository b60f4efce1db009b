"""Findings in COCO's json: entries, ids, boxes and class names. Nothing is raised."""

import difflib
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import ANNOTATION, CATEGORY, IMAGE, NUMBER, Fields, is_box
from lpovod.stages.check.findings import EXAMPLES, Example, Findings

MARGIN = 1.0  # pixels that a box may reach beyond its image: annotations may be rounded
MOSTLY_CORNERS = 0.9  # fraction of a json's boxes that must fit as two corners
MOSTLY_FRACTIONS = 0.5  # fraction of a json's boxes that must lie between 0 and 1
SIMILAR = 0.85  # difflib's ratio of two names
IDS = ("id", "image_id", "category_id")
SECTIONS = {"images": IMAGE, "annotations": ANNOTATION, "categories": CATEGORY}


@dataclass
class Listed:
    """What can be used of the json of a split.

    Attributes:
        split: train or val.
        folder: of the images.
        path: the json.
        images: usable entries, by id.
        categories: names, by id.
        boxes: numbers of boxes that count in training and evaluation, by name of their category.
        annotations: number of annotations, usable or not.
        first_boxes: x, y, width and height of a box of each image, as in the json.
    """

    split: str
    folder: Path
    path: Path
    images: dict[int | str, dict[str, Any]] = field(default_factory=dict)
    categories: dict[int | str, str] = field(default_factory=dict)
    boxes: Counter[str] = field(default_factory=Counter)
    annotations: int = 0
    first_boxes: dict[int | str, list[float]] = field(default_factory=dict)

    def example(self, text: str, image_id: Any = None, box: Any = None) -> Example:
        """An example with an image of this split."""
        image = self.images.get(image_id) if image_id is not None else None
        if image is None:
            return Example(self.split, text)
        size = (image["width"], image["height"])
        return Example(self.split, text, self.folder / image["file_name"], size, box)


def check_json(findings: Findings, listed: Listed) -> bool:
    """Read a json into `listed`; whether it is COCO's at all."""
    try:
        content = read_json(listed.path)
    except LpovodError as error:
        findings.add("json", listed.example(str(error)))
        return False
    for section in SECTIONS:
        if not isinstance(content, dict) or not isinstance(content.get(section), list):
            text = f"{listed.path} has no list {section!r}"
            findings.add("json", listed.example(text))
            return False
    _check_images(findings, listed, content["images"])
    _check_categories(findings, listed, content["categories"])
    _check_annotations(findings, listed, content)
    return True


# --- entries


def _items(
    findings: Findings, listed: Listed, kind: str, items: list[Any], fields: Fields
) -> Iterator[dict[str, Any]]:
    """The usable entries of a list, the first of each id."""
    seen: set[int | str] = set()
    for place, item in enumerate(items):
        if fault := _fault(item, fields):
            has_id = isinstance(item, dict) and "id" in item
            name = _short(item["id"]) if has_id else f"number {place + 1}"
            findings.add("item", listed.example(f"{kind} {name}: {fault}"))
            continue
        if strings := [name for name in IDS if name in fields and type(item[name]) is not int]:
            texts = ", ".join(f"{name} {_short(item[name])}" for name in strings)
            findings.add("string_ids", listed.example(f"{kind} {_short(item['id'])}: {texts}"))
        if item["id"] in seen:
            findings.add("duplicate_id", listed.example(f"{kind} id {_short(item['id'])}"))
            continue
        seen.add(item["id"])
        yield item


def _fault(item: Any, fields: Fields) -> str | None:
    if not isinstance(item, dict):
        return f"{_short(item)} is not an object"
    for name, (types, meaning) in fields.items():
        if name not in item:
            return f"{name} is missing"
        allowed = (int, str) if name in IDS else types
        # Boxes are looked at apart.
        if name != "bbox" and type(item[name]) not in allowed:
            return f"{name} {_short(item[name])} is not {meaning}"
    return None


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _check_images(findings: Findings, listed: Listed, items: list[Any]) -> None:
    first: dict[str, int | str] = {}
    for image in _items(findings, listed, "image", items, IMAGE):
        number, name, size = image["id"], image["file_name"], (image["width"], image["height"])
        if not all(math.isfinite(side) and side > 0 for side in size):
            text = f"image {number}: {size[0]} x {size[1]} is not a size in pixels"
            findings.add("item", listed.example(text))
            continue
        if _leads_out(name):
            findings.add("file_name", listed.example(f"image {number}: {_short(name)}"))
            continue
        listed.images[number] = image
        if name in first:
            text = f"{name}: images {first[name]} and {number}"
            findings.add("duplicate_file", listed.example(text, number))
        first.setdefault(name, number)


def _leads_out(name: str) -> bool:
    windows = PureWindowsPath(name)
    return (
        not name
        or PurePosixPath(name).is_absolute()
        or ".." in windows.parts
        or (windows.drive != "")
    )


def _check_categories(findings: Findings, listed: Listed, items: list[Any]) -> None:
    for category in _items(findings, listed, "category", items, CATEGORY):
        name = category["name"]
        if name in listed.categories.values():
            text = f"category {category['id']} is named {name!r} too"
            findings.add("duplicate_name", listed.example(text))
        listed.categories[category["id"]] = name


# --- annotations


def _check_annotations(findings: Findings, listed: Listed, content: dict[str, Any]) -> None:
    """Look at annotations one by one, then at all their boxes together."""
    known = {section: _ids(content[section]) for section in ("images", "categories")}
    image_numbers = {image_id: number for number, image_id in enumerate(listed.images)}
    categories = {category_id: number for number, category_id in enumerate(listed.categories)}
    listed.annotations = len(content["annotations"])
    usable: list[dict[str, Any]] = []
    rows: list[tuple[float, ...]] = []
    for item in _items(findings, listed, "annotation", content["annotations"], ANNOTATION):
        unknown = _unknown(findings, listed, item, known)
        box = item["bbox"]
        if not is_box(box):
            numbers = isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box))
            text = f"{_named(listed, item)}: bbox {_short(box)}"
            example = listed.example(text, item["image_id"], box if numbers else None)
            findings.add("box_negative" if numbers else "box_form", example)
            continue
        number = image_numbers.get(item["image_id"])
        if unknown or number is None or item["category_id"] not in categories:
            continue
        image = listed.images[item["image_id"]]
        usable.append(item)
        listed.first_boxes.setdefault(item["image_id"], box)
        crowd = bool(item.get("iscrowd", 0))
        size = (image["width"], image["height"])
        rows.append((number, categories[item["category_id"]], *box, *size, crowd))
    if rows:
        _check_boxes(findings, listed, usable, np.array(rows, np.float64))


def _is_finite(value: Any) -> bool:
    return type(value) in NUMBER and math.isfinite(value)


def _ids(items: list[Any]) -> set[Any]:
    return {i["id"] for i in items if isinstance(i, dict) and isinstance(i.get("id"), int | str)}


def _unknown(
    findings: Findings, listed: Listed, item: dict[str, Any], known: dict[str, set[Any]]
) -> bool:
    unknown = False
    for name, section in (("image_id", "images"), ("category_id", "categories")):
        # An id of the wrong type is a finding already.
        if type(item[name]) is int and item[name] not in known[section]:
            kind = "unknown_image" if section == "images" else "unknown_category"
            text = f"annotation {_short(item['id'])}: {name} {item[name]}"
            findings.add(kind, listed.example(text, item["image_id"]))
            unknown = True
    return unknown


def _named(listed: Listed, item: dict[str, Any]) -> str:
    image = listed.images.get(item["image_id"])
    name = f" ({image['file_name']})" if image else ""
    return f"annotation {_short(item['id'])} of image {_short(item['image_id'])}{name}"


def _check_boxes(
    findings: Findings, listed: Listed, items: list[dict[str, Any]], rows: np.ndarray
) -> None:
    """Look at all usable boxes of a split.

    Args:
        findings: to add to.
        listed: the split.
        items: n annotations.
        rows: (n, 9): numbers of image and category; x, y, width, height; the image's width and
            height; whether it is a crowd.
    """
    x, y, width, height, image_width, image_height = rows[:, 2:8].T
    crowd = rows[:, 8] > 0
    right, bottom = x + width, y + height

    def add(kind: str, mask: np.ndarray) -> None:
        places = np.flatnonzero(mask)
        # The first box of each image, then the others: more images are shown.
        firsts = np.unique(rows[places, 0], return_index=True)[1]
        ordered = np.concatenate([places[firsts], np.delete(places, firsts)])
        for place in ordered[:EXAMPLES]:
            item = items[place]
            size = f"{image_width[place]:g} x {image_height[place]:g}"
            text = f"{_named(listed, item)}: bbox {_short(item['bbox'])}, the image is {size}"
            findings.add(kind, listed.example(text, item["image_id"], item["bbox"]))
        if len(places) > EXAMPLES:
            findings.counts[kind][listed.split] += len(places) - EXAMPLES

    solid = np.minimum(width, height) > 0
    fractions = solid & (rows[:, 2:6] >= 0).all(1) & (rows[:, 2:6] <= 1).all(1)
    fractions &= np.minimum(image_width, image_height) > 2
    if fractions.sum() >= max(1, MOSTLY_FRACTIONS * solid.sum()):
        add("normalised", fractions)
    else:
        fractions[:] = False
    beyond = (np.minimum(x, y) < -MARGIN) | (right > image_width + MARGIN)
    beyond |= bottom > image_height + MARGIN
    corners = (width >= x) & (height >= y)
    corners &= (width <= image_width + MARGIN) & (height <= image_height + MARGIN)
    if beyond.any() and corners.mean() >= MOSTLY_CORNERS:
        add("xyxy", beyond)
    else:
        outside = (x >= image_width) | (y >= image_height) | (right <= 0) | (bottom <= 0)
        add("outside", beyond & outside)
        add("beyond", beyond & ~outside)
    thin = np.minimum(width, height) < 1
    add("thin", thin & ~fractions & ~crowd)
    repeated = np.ones(len(rows), bool)
    repeated[np.unique(rows[:, :6], axis=0, return_index=True)[1]] = False
    add("duplicate_annotation", repeated)
    counts = np.bincount(
        rows[~(thin & ~fractions) & ~crowd, 1].astype(int), minlength=len(listed.categories)
    )
    for name, count in zip(listed.categories.values(), counts.tolist(), strict=True):
        listed.boxes[name] += count


# --- class names


def check_classes(
    findings: Findings, train: Listed, val: Listed | None, base: list[str], novel: list[str]
) -> None:
    """Compare the names of both splits and of the configuration."""
    for name in base:
        if not train.boxes[name]:
            known = name in train.categories.values()
            text = f"{name!r} " + ("has no usable box" if known else "is no category")
            findings.add("class_without_box", train.example(f"{text} of {train.path}"))
    if val is None:
        _check_spelling(findings, set(train.categories.values()), [*base, *novel])
        return
    for name in [*base, *novel]:
        if not val.boxes[name]:
            findings.add("not_measured", val.example(repr(name)))
    names = set(train.categories.values()), set(val.categories.values())
    _check_spelling(findings, names[0] | names[1], [*base, *novel])
    for name in sorted(names[0] - names[1]):
        others = [n for n in sorted(names[1] - names[0]) if _spelling(n) != _spelling(name)]
        for near in difflib.get_close_matches(name, others, n=1, cutoff=SIMILAR):
            text = f"{name!r} in train, {near!r} in val"
            findings.add("named_nearly", Example("", text))
    for number, name in train.categories.items():
        other = val.categories.get(number, name)
        if other != name:
            text = f"category {number} is {name!r} in train, {other!r} in val"
            findings.add("other_id", Example("", text))


def _check_spelling(findings: Findings, names: set[str], configured: list[str]) -> None:
    """Find names that differ by case, spaces, punctuation or a plural's s alone."""
    spellings: dict[str, list[str]] = {}
    for name in sorted(names | set(configured)):
        spellings.setdefault(_spelling(name), []).append(name)
    for alike in spellings.values():
        if len(alike) > 1:
            kind = "named_differently" if set(alike) & set(configured) else "named_nearly"
            findings.add(kind, Example("", " and ".join(map(repr, alike))))


def _spelling(name: str) -> str:
    letters = "".join(letter for letter in name.casefold() if letter.isalnum())
    return (letters[:-1] if len(letters) > 3 and letters.endswith("s") else letters) or name
