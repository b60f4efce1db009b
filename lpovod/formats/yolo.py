"""YOLO's folders: a data.yaml with names, and a text file of normalised boxes for each image.

A line is ``class x y width height`` (centre and size, as fractions of the image) or a polygon,
``class x1 y1 x2 y2 x3 y3 ...``, of which the bounding box is taken. The labels of
``.../images/a.jpg`` are in ``.../labels/a.txt``; without a folder ``images``, beside the image.
"""

import os
from pathlib import Path
from typing import Any

import yaml

from lpovod.exceptions import LpovodError, existing
from lpovod.formats.labels import (
    SUFFIXES,
    UNLABELLED,
    Box,
    LabelledImage,
    Labels,
    label_files,
    read_lines,
    split_of,
)

SPLITS = ("train", "val", "test")
ROUNDING = 0.01  # how far beyond 0..1 a fraction may be before it is taken for a mistake


def is_yolo(path: Path) -> bool:
    """Whether a yaml file describes a data set of YOLO's."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(content, dict) and "names" in content and bool({*SPLITS} & {*content})


def read_yolo(path: Path) -> Labels:
    """Read a data set from its yaml file.

    Args:
        path: with ``names`` (list, or mapping from numbers) and, relative to ``path`` or to the
            yaml's folder, ``train``, ``val`` and ``test``: a folder, a text file of image paths, or
            a list of these.

    Raises:
        LpovodError: if the yaml is wrong or a folder is missing.
    """
    try:
        content = yaml.safe_load(existing(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise LpovodError(f"{path} is not valid yaml: {error}") from None
    names = _names(path, content)
    labels = Labels(classes=[name for _, name in sorted(names.items())])
    seen: set[str] = set()
    for split in SPLITS:
        images = _images(path, content, split)
        listed = [image for image in images if os.path.realpath(image) not in seen]
        if images and not listed:
            labels.notes[f"{split} has the images of another split and is left out"].append(
                str(content[split])
            )
        seen |= {os.path.realpath(image) for image in listed}
        for image in listed:
            _read_image(labels, split, image, names, poses="kpt_shape" in content)
    return labels


def read_yolo_folder(folder: Path, images: list[Path], classes: Path) -> Labels:
    """Read label files without a data.yaml, their names from a ``classes.txt``.

    Args:
        folder: that holds everything.
        images: all of them.
        classes: one name per line.
    """
    lines = read_lines(classes)
    names = dict(enumerate(line.strip() for line in lines if line.strip()))
    labels = Labels(classes=[*names.values()])
    for image in images:
        _read_image(labels, split_of(image, folder), image, names, poses=False)
    return labels


def label_path(image: Path) -> Path:
    """The label file of an image."""
    parts = [*image.with_suffix(".txt").parts]
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            parts[place] = "labels"
            return Path(*parts)
    return image.with_suffix(".txt")


def write_yolo(folder: Path, classes: list[str], images: list[LabelledImage]) -> None:
    """Write data.yaml and the label files of images that have boxes, below ``labels/``.

    Args:
        folder: to write to.
        classes: names; a class has its place in them as its number.
        images: with paths relative to the folder of images.

    Raises:
        LpovodError: if two images would share a label file.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    content = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(classes))}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=10_000)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    for image, path in label_files(images, folder / "labels", ".txt"):
        lines = [_line(numbers[box.name], box, image) for box in image.boxes]
        path.write_text("".join(lines))


def _line(number: int, box: Box, image: LabelledImage) -> str:
    x1, y1, x2, y2 = box.corners
    centre = ((x1 + x2) / 2 / image.width, (y1 + y2) / 2 / image.height)
    size = ((x2 - x1) / image.width, (y2 - y1) / image.height)
    return " ".join([str(number), *(f"{value:.6f}" for value in (*centre, *size))]) + "\n"


def _names(path: Path, content: Any) -> dict[int, str]:
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(isinstance(n, int) for n in names):
        raise LpovodError(
            f"{path}: names must be a list of class names, or a mapping from numbers to names"
        )
    named = {number: str(name) for number, name in names.items()}
    twice = {name for name in named.values() if [*named.values()].count(name) > 1}
    if twice:
        raise LpovodError(f"{path}: names has {sorted(twice)[0]!r} twice")
    return named


def _images(path: Path, content: dict, split: str) -> list[Path]:
    entries = content.get(split) or []
    images: set[Path] = set()
    for entry in entries if isinstance(entries, list) else [entries]:
        place = _place(path, content, str(entry), split)
        if place.is_dir():
            images |= {
                Path(parent, name)
                for parent, _, names in os.walk(place, followlinks=True)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES
            }
        else:
            images |= {place.parent / line.strip() for line in read_lines(place) if line.strip()}
    return sorted(images)


def _place(path: Path, content: dict, entry: str, split: str) -> Path:
    """Where an entry points to; exported files often have one ``../`` too many."""
    base = path.parent / str(content.get("path") or "")
    places = [folder / entry for folder in (base, path.parent)]
    if entry.startswith("../"):
        places.append(path.parent / entry[3:])
    for place in places:
        if place.exists():
            return Path(os.path.normpath(place))
    raise LpovodError(f"{path}: {split}: {places[0]} does not exist. Correct {split} or path")


def _read_image(
    labels: Labels, split: str, image: Path, names: dict[int, str], poses: bool
) -> None:
    if (size := labels.size_of(image)) is None:
        return
    width, height = size
    file, boxes = label_path(image), []
    labelled = file.is_file() or split not in ("", "train")
    if not labelled:
        labels.notes[UNLABELLED].append(str(image))
    elif not file.is_file():
        kind = f"images of {split} have no label file and count as images without objects"
        labels.notes[kind].append(str(image))
    else:
        for number, line in enumerate(read_lines(file), 1):
            if not line.strip():
                continue
            try:
                boxes.append(_box(line, names, width, height, poses))
            except ValueError as error:
                labels.errors[f"lines of label files are wrong: {error}"].append(f"{file}:{number}")
    labels.add(split, image, (width, height), boxes, labelled)


def _box(line: str, names: dict[int, str], width: int, height: int, poses: bool) -> Box:
    words = line.split()
    try:
        number, values = int(float(words[0])), [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError("not numbers") from None
    if number not in names:
        raise ValueError("no such class number in names")
    if poses:
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError("expected a class and 4 numbers, or a polygon of 3 points or more")
    if not all(-ROUNDING <= value <= 1 + ROUNDING for value in values):
        raise ValueError("expected fractions of the image, from 0 to 1; are these pixels?")
    if len(values) == 4:
        x, y, w, h = values
        corners = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
    else:
        corners = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    x1, y1, x2, y2 = corners
    return Box(names[number], (x1 * width, y1 * height, x2 * width, y2 * height))
