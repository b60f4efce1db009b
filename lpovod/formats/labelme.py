"""LabelMe's json: one file per image, with shapes of which the bounding boxes are taken."""

import math
import os
from pathlib import Path
from typing import Any

from lpovod.artifacts import read_json
from lpovod.exceptions import LpovodError
from lpovod.formats.labels import Box, ImageIndex, Labels, split_of

HEAD = 4096  # bytes in which a file of LabelMe's shows what it is
AREAS = ("polygon", "rectangle", "circle", "rotation", "linestrip", "mask")


def is_labelme(path: Path) -> bool:
    """Whether a json file is one of LabelMe's, by its first bytes: they may embed an image."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
    return b'"shapes"' in head and b'"annotations"' not in head


def read_labelme(folder: Path, files: list[Path], images: list[Path]) -> Labels:
    """Read the json files of a folder.

    Args:
        folder: that holds everything.
        files: the json files.
        images: all images.
    """
    labels, index = Labels(), ImageIndex(images)
    names: set[str] = set()
    for file in files:
        try:
            content = read_json(file)
            stated, shapes = str(content.get("imagePath") or ""), content["shapes"]
            boxes = [box for shape in shapes if (box := _box(shape)) is not None]
        except LpovodError:
            labels.errors["files are not valid json"].append(str(file))
            continue
        except (KeyError, TypeError, ValueError, AttributeError):
            labels.errors["files have a shape without label or points"].append(str(file))
            continue
        beside = Path(os.path.normpath(file.parent / stated.replace("\\", "/")))
        image = beside if stated and beside.is_file() else index.of_label(file, stated)
        if image is None:
            labels.notes["json files have no image and are left out"].append(str(file))
            continue
        if (size := labels.size_of(image)) is None:
            continue
        if len(boxes) < len(shapes):
            labels.notes["files have points or lines, which have no box, left out"].append(
                str(file)
            )
        names |= {box.name for box in boxes}
        labels.add(split_of(file, folder), image, size, boxes)
    labels.add_unlabelled(folder, images)
    labels.classes = sorted(names)
    return labels


def _box(shape: dict[str, Any]) -> Box | None:
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind not in AREAS:
        return None
    xs, ys = ([float(point[axis]) for point in points] for axis in (0, 1))
    if kind == "circle":  # its centre, and a point on it
        (x, other_x), (y, other_y) = xs, ys
        radius = math.hypot(other_x - x, other_y - y)
        xs, ys = [x - radius, x + radius], [y - radius, y + radius]
    return Box(str(shape["label"]), (min(xs), min(ys), max(xs), max(ys)))
