"""Labelled images between formats: what the readers of YOLO, VOC and LabelMe return.

Boxes are xyxy in pixels, half-open, of the image as labelling tools show it: turned by its EXIF
orientation.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lpovod.exceptions import LpovodError
from lpovod.formats.images import ImageFault, read_header

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""Of the files that count as images."""

DECIMALS = 2  # of a pixel, as in COCO's own files
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class Box(NamedTuple):
    """A labelled object.

    Attributes:
        name: of its class.
        corners: xyxy in pixels.
        crowd: whether it is neither an object to learn nor background (COCO's ``iscrowd``, VOC's
            ``difficult``).
        score: of a detection; None for a label.
    """

    name: str
    corners: tuple[float, float, float, float]
    crowd: bool = False
    score: float | None = None


class LabelledImage(NamedTuple):
    """An image file with its size in pixels and its boxes.

    Attributes:
        labelled: whether somebody looked for objects in it, even if there are none.
    """

    path: Path
    width: int
    height: int
    boxes: list[Box]
    labelled: bool = True


UNLABELLED = "images have no labels: novel classes are looked for in them, nothing else"

Findings = dict[str, list[str]]
"""By kind, the items concerned."""


@dataclass
class Labels:
    """What a reader found.

    Attributes:
        classes: names in the order of the files, or sorted where files have no order.
        splits: images by "train", "val", "test", or "" where nothing states a split.
        errors: what must be corrected first, by kind: the files and lines.
        notes: what was done about oddities, by kind: the files.
    """

    classes: list[str] = field(default_factory=list)
    splits: dict[str, list[LabelledImage]] = field(default_factory=dict)
    errors: Findings = field(default_factory=lambda: defaultdict(list))
    notes: Findings = field(default_factory=lambda: defaultdict(list))

    def size_of(self, image: Path) -> tuple[int, int] | None:
        """Width and height of an image as it is shown; None, and a note, if it is not read."""
        try:
            return read_header(image).displayed
        except (ImageFault, OSError):
            self.notes["images cannot be read and are left out"].append(str(image))
            return None

    def add(
        self,
        split: str,
        path: Path,
        size: tuple[int, int],
        boxes: Iterable[Box],
        labelled: bool = True,
    ) -> None:
        """Add an image; its boxes are clipped to it, and empty ones left out."""
        width, height = size
        clipped = []
        for box in boxes:
            inner = clip(box, width, height)
            if inner is None:
                self.notes["boxes without area, or outside their image, are left out"].append(
                    str(path)
                )
                continue
            beyond = max(abs(a - b) for a, b in zip(inner.corners, box.corners, strict=True))
            if beyond > 1:
                self.notes["boxes reach beyond their image and are clipped"].append(str(path))
            clipped.append(inner)
        image = LabelledImage(path, width, height, clipped, labelled)
        self.splits.setdefault(split, []).append(image)

    def add_unlabelled(self, folder: Path, images: Iterable[Path]) -> None:
        """Add the images without a label file that lie beside labelled ones.

        They join the training images, where novel classes are looked for; nothing can be measured
        on them, so those of other splits are left out.
        """
        labelled = {image.path for of_split in self.splits.values() for image in of_split}
        parents = {path.parent for path in labelled}
        for path in images:
            if path in labelled or path.parent not in parents:
                continue
            if (split := split_of(path, folder)) not in ("", "train"):
                self.notes[f"images of {split} have no labels and are left out"].append(str(path))
                continue
            if (size := self.size_of(path)) is None:
                continue
            self.notes[UNLABELLED].append(str(path))
            self.add(split, path, size, [], labelled=False)


def clip(box: Box, width: int, height: int) -> Box | None:
    """The part of a box inside its image, or None if nothing is left."""
    x1, y1, x2, y2 = box.corners
    x1, x2 = (min(max(x, 0.0), float(width)) for x in (x1, x2))
    y1, y2 = (min(max(y, 0.0), float(height)) for y in (y1, y2))
    return box._replace(corners=(x1, y1, x2, y2)) if x1 < x2 and y1 < y2 else None


def as_coco(images: list[LabelledImage], classes: list[str], root: Path | None = None) -> dict:
    """COCO's json, with ids from 1 in the order of the arguments.

    Args:
        images: of one split.
        classes: names of the categories.
        root: folder that file names are relative to; None leaves paths as they are.
    """
    ids = {name: number for number, name in enumerate(classes, 1)}
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        path = Path(os.path.relpath(image.path, root)) if root else image.path
        listed.append(
            {
                "id": number,
                "file_name": path.as_posix(),
                "width": image.width,
                "height": image.height,
            }
        )
        for box in image.boxes:
            x1, y1, x2, y2 = box.corners
            sides = [round(value, DECIMALS) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotation = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": ids[box.name],
                "bbox": sides,
                "area": round(sides[2] * sides[3], DECIMALS),
                "iscrowd": int(box.crowd),
                "segmentation": [],
            }
            score = {} if box.score is None else {"score": box.score}
            annotations.append(annotation | score)
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": listed, "annotations": annotations, "categories": categories}


def split_of(path: Path, folder: Path) -> str:
    """The split that the folders of a path name, such as ``train2017`` or ``valid``, or ""."""
    for part in Path(os.path.relpath(path, folder)).parts[:-1]:
        word = re.fullmatch(r"([a-z]+)[-_]?\d*", part.lower())
        if word and word[1] in SPLIT_WORDS:
            return SPLIT_WORDS[word[1]]
    return ""


def label_files(
    images: list[LabelledImage], folder: Path, suffix: str
) -> list[tuple[LabelledImage, Path]]:
    """Images that have boxes, each with the path of its label file, whose folder exists.

    Raises:
        LpovodError: if two images would share a label file.
    """
    owners: dict[Path, Path] = {}
    files = []
    for image in images:
        if not image.boxes:
            continue
        path = folder / image.path.with_name(image.path.stem + suffix)
        if path in owners:
            raise LpovodError(
                f"{owners[path]} and {image.path} would share the label file {path.name}: this "
                "format tells images apart by their names without suffix. Use --to coco"
            )
        owners[path] = image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        files.append((image, path))
    return files


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, in UTF-8 with or without a mark; other bytes become U+FFFD."""
    return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()


class ImageIndex:
    """Finds the image of a label file among the images of a folder."""

    def __init__(self, images: Iterable[Path]):
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for path in images:
            self._by_stem[path.stem].append(path)

    def of_label(self, label: Path, stated: str | None) -> Path | None:
        """The image of a label file.

        Args:
            label: the label file; its image has the same stem, or the stated name.
            stated: the image's name in the label file, a path in any system's style.

        Returns:
            Of several images with that stem, the one whose folders are most like the label's.
        """
        name = PurePosixPath((stated or "").replace("\\", "/"))
        candidates = self._by_stem.get(label.stem) or self._by_stem.get(name.stem) or []

        def likeness(image: Path) -> tuple[int, int, bool]:
            ours, theirs = image.parent.parts, label.parent.parts
            ends = _common(ours[::-1], theirs[::-1])
            return ends, _common(ours, theirs), image.name == name.name

        return max(candidates, key=likeness, default=None)


def _common(ours: tuple[str, ...], theirs: tuple[str, ...]) -> int:
    for count, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return count
    return min(len(ours), len(theirs))
