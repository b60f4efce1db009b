"""Kinds of findings about the user's data: error or warning, what they are called, what to do."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = 5  # per kind and split


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    Attributes:
        error: whether it ends the run; otherwise it is a warning.
        title: the name of several of them.
        remedy: what the user can do.
    """

    error: bool
    title: str
    remedy: str


KINDS = {
    "json": Kind(
        True,
        "json files that are not COCO's",
        "Give a json with the lists images, annotations and categories "
        "(dataset.coco.train_annotations, val_annotations).",
    ),
    "folder": Kind(
        True,
        "folders that do not exist",
        "Correct dataset.coco.root, train_images or val_images.",
    ),
    "item": Kind(
        True,
        "entries that are incomplete or of a wrong type",
        "An image has id, file_name, width and height; an annotation has id, image_id, "
        "category_id and bbox; a category has id and name.",
    ),
    "string_ids": Kind(
        True,
        "ids that are not integers",
        "Number images, annotations and categories with integers, and use the same numbers in "
        "image_id and category_id.",
    ),
    "duplicate_id": Kind(True, "ids that appear twice", "Give every entry of a list another id."),
    "duplicate_name": Kind(
        True,
        "categories of the same name",
        "Keep one category of each name, and give its id to all its annotations.",
    ),
    "file_name": Kind(
        True,
        "file names that lead out of the folder of images",
        "Write file names relative to the folder of images, without '..'.",
    ),
    "unknown_image": Kind(
        True,
        "annotations of images that are not listed",
        "Add the images to the list, or remove the annotations.",
    ),
    "unknown_category": Kind(
        True,
        "annotations of categories that are not listed",
        "Add the categories to the list, or remove the annotations.",
    ),
    "no_image": Kind(
        True, "splits without a usable image", "Correct the other errors, or the paths."
    ),
    "same_split": Kind(
        True,
        "validation sets that are part of the training set",
        "Give other validation images. To run without validation, set dataset.coco.val_images and "
        "val_annotations to null.",
    ),
    "missing": Kind(
        True,
        "images that are missing",
        "Copy the files, correct file_name or the folder, or leave them out with "
        "dataset.bad_images: skip.",
    ),
    "not_an_image": Kind(
        True,
        "files that are no image",
        "Replace or convert them, or leave them out with dataset.bad_images: skip.",
    ),
    "damaged": Kind(
        True,
        "images that are damaged",
        "Copy them again, or leave them out with dataset.bad_images: skip.",
    ),
    "depth": Kind(
        True,
        "images whose pixels have an unknown range",
        "Convert them to 8 or 16 bits per channel, or leave them out with dataset.bad_images: "
        "skip.",
    ),
    "too_large": Kind(
        True,
        "images that are too large",
        "Divide them into tiles, or leave them out with dataset.bad_images: skip.",
    ),
    "size": Kind(
        True,
        "images of another size than the json states",
        "Boxes of another size do not fit: take the images that were annotated, or correct the "
        "json.",
    ),
    "swapped": Kind(
        True,
        "images whose width and height are exchanged in the json",
        "Exchange them, and look at a box below: its coordinates may be exchanged too.",
    ),
    "box_form": Kind(
        True,
        "boxes that are not four numbers",
        "Write a bbox as [x, y, width, height], finite numbers in pixels.",
    ),
    "box_negative": Kind(
        True,
        "boxes of negative width or height",
        "Write a bbox as [x, y, width, height]; x and y are those of the upper left corner.",
    ),
    "normalised": Kind(
        True,
        "boxes between 0 and 1: fractions of the image?",
        "Multiply x and width by the image's width, y and height by its height. (YOLO's x and y "
        "are a box's centre; COCO's, its upper left corner.)",
    ),
    "xyxy": Kind(
        True,
        "boxes beyond their image that fit as two corners: xyxy?",
        "COCO's bbox is [x, y, width, height]: subtract the first corner from the second.",
    ),
    "outside": Kind(
        True,
        "boxes that lie outside their image",
        "Correct or remove them; were they drawn on another image, or at another size?",
    ),
    "class_without_box": Kind(
        True,
        "base classes without a box to learn from",
        "Annotate them in the training images, correct classes.base, or move them to "
        "classes.novel.",
    ),
    "named_differently": Kind(
        True,
        "classes with several spellings",
        "Give a class the same name in both json files and in the configuration.",
    ),
    "beyond": Kind(
        False,
        "boxes that reach beyond their image",
        "Nothing, if they are cut at the edge on purpose; otherwise correct them.",
    ),
    "thin": Kind(
        False,
        "boxes thinner than a pixel",
        "Nothing: they are left out of training and evaluation.",
    ),
    "turned_displayed": Kind(
        False,
        "images turned by EXIF whose json states the displayed size",
        "Nothing: they are read as displayed, and boxes are taken in displayed pixels.",
    ),
    "turned_stored": Kind(
        False,
        "images turned by EXIF whose json states the stored size",
        "Look at the boxes below. The images are read as stored, lying or upside down, and boxes "
        "are taken in stored pixels. If that is wrong, state the displayed sizes.",
    ),
    "turned_either": Kind(
        False,
        "images turned by EXIF whose size does not tell how they were annotated",
        "Look at the boxes below: the images are read as displayed. If boxes were drawn on the "
        "stored pixels, remove the EXIF orientation.",
    ),
    "deep": Kind(
        False,
        "images of more than 8 bits",
        "Nothing, if they use their whole range: the upper 8 bits are read. If they look dark "
        "below, scale them to the whole range.",
    ),
    "alpha": Kind(
        False,
        "images with an alpha channel",
        "Nothing, unless they look wrong below: alpha is dropped, and transparent pixels show the "
        "colour that is stored for them.",
    ),
    "duplicate_file": Kind(
        False,
        "files that are listed several times",
        "List each file once, with all its annotations.",
    ),
    "duplicate_annotation": Kind(
        False,
        "annotations that appear several times",
        "Remove the copies: in evaluation, each counts as an object that must be detected.",
    ),
    "leak": Kind(
        False,
        "validation images that are training images too",
        "Remove them from one of the two: the detector has seen them.",
    ),
    "not_measured": Kind(
        False,
        "configured classes without a box in the validation images",
        "Nothing, or annotate some: their AP is not measured; their detections are shown.",
    ),
    "named_nearly": Kind(
        False,
        "categories with similar names",
        "Nothing, if they are different things; otherwise give them the same name.",
    ),
    "other_id": Kind(
        False,
        "ids that belong to different categories in train and val",
        "Nothing, if that is meant: classes are compared by name.",
    ),
}
OF_IMAGES = frozenset(
    {"missing", "not_an_image", "damaged", "depth", "too_large", "size", "swapped"}
)
"""Kinds of an image that cannot be read; ``lpovod.formats.images`` has the same names."""


@dataclass(frozen=True)
class Example:
    """A finding, and the image and the box that show it, where there are any.

    Attributes:
        split: train or val; empty for a finding about both.
        text: names the item and the fault.
        path: the image.
        size: width and height that the json states.
        box: x, y, width and height, as in the json.
    """

    split: str
    text: str
    path: Path | None = None
    size: tuple[float, float] | None = None
    box: Sequence[float] | None = None


class Findings:
    """All findings: their numbers, and the first few of each kind and split.

    Args:
        skip: whether images that cannot be read are left out, so that they are warnings.
    """

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.examples: dict[str, list[Example]] = defaultdict(list)

    def add(self, kind: str, example: Example) -> None:
        """Count a finding, and keep it as an example if it is among the first."""
        if self.wants_example(kind, example.split):
            self.examples[kind].append(example)
        self.counts[kind][example.split] += 1

    def wants_example(self, kind: str, split: str) -> bool:
        """Whether the next finding becomes an example."""
        return self.counts[kind][split] < EXAMPLES

    def is_error(self, kind: str) -> bool:
        """Whether a kind ends the run."""
        return KINDS[kind].error and not (self.skip and kind in OF_IMAGES)

    def kinds(self, error: bool) -> list[str]:
        """Kinds of the findings that are errors, or of those that are warnings."""
        return [k for k in KINDS if self.counts.get(k) and self.is_error(k) == error]

    def line(self, kind: str) -> str:
        """Number, name and first example of a kind, in one line."""
        counts, first = self.counts[kind], self.examples[kind][0]
        where = ", ".join(f"{n} in {split}" if split else str(n) for split, n in counts.items())
        return f"{KINDS[kind].title} ({where}): {first.text}"

    def as_json(self) -> list[dict[str, Any]]:
        """Every kind with its numbers and examples."""
        return [
            {
                "kind": kind,
                "level": "error" if error else "warning",
                "title": KINDS[kind].title,
                "counts": dict(self.counts[kind]),
                "examples": [f"{e.split} {e.text}".strip() for e in self.examples[kind]],
                "remedy": KINDS[kind].remedy,
            }
            for error in (True, False)
            for kind in self.kinds(error)
        ]
