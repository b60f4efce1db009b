"""Draws boxes with names and scores on images, and chooses the images to show."""

import base64
import io
import unicodedata
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lpovod.formats.coco import CocoDataset, corners

LABEL_HEIGHT = 15
JPEG_QUALITY = 84
READABLE_OBJECTS = 15  # an image with more objects is shown only if there is no other
COLOURS = {False: (37, 99, 235), True: (234, 88, 12)}  # base and novel classes


def choose_images(data: CocoDataset, base: list[str], novel: list[str], count: int) -> list[int]:
    """Ids of images with many novel objects, spread over the classes.

    Only annotations decide, never detections. Each step takes the image that adds most: an object
    counts less, the more objects of its class the chosen images already show.
    """
    novel_ids, all_ids = set(data.category_ids(novel)), set(data.category_ids([*base, *novel]))
    categories = {i: data.boxes(i)[1].tolist() for i in data.images}
    counts = {i: Counter(c for c in ids if c in novel_ids) for i, ids in categories.items()}
    readable = {
        i: sum(c in all_ids for c in ids) <= READABLE_OBJECTS for i, ids in categories.items()
    }
    shown: Counter[int] = Counter()

    def worth(image_id: int) -> tuple[bool, float, int]:
        # At most two objects of a class count: a flock adds no variety.
        added = sum(min(n, 2) / (1 + shown[c]) for c, n in counts[image_id].items())
        return readable[image_id], added, -image_id

    candidates = {i for i, novel_objects in counts.items() if novel_objects}
    chosen: list[int] = []
    while candidates and len(chosen) < count:
        chosen.append(max(candidates, key=worth))
        candidates.remove(chosen[-1])
        shown.update(counts[chosen[-1]])
    return chosen


def draw_detections(
    pixels: np.ndarray,
    boxes: list[list[float]],
    labels: list[str],
    novel: list[bool],
    width: int,
) -> Image.Image:
    """An image with labelled boxes, resized to a width.

    Args:
        pixels: (H, W, 3) uint8.
        boxes: xywh in pixels of the image, most important first.
        labels: the text at each box.
        novel: whether the class of each box is novel, which decides its colour.
        width: of the result, in pixels.
    """
    scale = width / pixels.shape[1]
    size = (width, round(pixels.shape[0] * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    scaled = [[scale * side for side in box] for box in boxes]
    for box, is_novel in zip(corners(scaled).tolist(), novel, strict=True):
        pen.rectangle(box, outline=COLOURS[is_novel], width=2)
    placed = place_labels(scaled, labels, *size)
    for label, is_novel in zip(placed, novel, strict=True):
        x, y = label["x"], label["y"]
        pen.rectangle((x, y, x + label["width"], y + LABEL_HEIGHT), fill=COLOURS[is_novel])
        pen.text((x + 4, y + 1), label["text"], "white", font)
    return image


Rectangle = tuple[float, float, float, float]


def place_labels(
    boxes: list[list[float]], texts: list[str], width: float, height: float
) -> list[dict[str, Any]]:
    """Places each label at its box, where it covers earlier labels least.

    Args:
        boxes: xywh in the overlay's units, most important first.
        texts: of the labels.
        width: of the overlay.
        height: of the overlay.

    Returns:
        x, y, width and text of each label.
    """
    taken: list[Rectangle] = []
    labels, up = [], LABEL_HEIGHT
    for (x, y, w, h), text in zip(boxes, texts, strict=True):
        wide = _text_width(text)
        places = [
            (min(max(0, left), width - wide), min(max(0, top), height - up))
            for top in (y - up, y, y + h, y + h - up, y + h / 2, y - 2 * up, y + h + up)
            for left in (x - 1, x + w + 1 - wide)
        ]
        rectangles = [(px, py, px + wide, py + up) for px, py in places]
        place = min(rectangles, key=lambda r: sum(_shared(r, other) for other in taken))
        taken.append(place)
        labels.append({"x": place[0], "y": place[1], "width": wide, "text": text})
    return labels


def _shared(a: Rectangle, b: Rectangle) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def _text_width(text: str) -> float:
    """Approximate width of a text in bold sans serif of size 11, with margins of 4.

    The page passes it to the browser, which fits the letters of its own font to it.
    """
    return 8 + sum(_letter_width(letter) for letter in text)


def _letter_width(letter: str) -> float:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):  # drawn upon the letter before, or not
        return 0.0
    if unicodedata.east_asian_width(letter) in "WF":
        return 12.0
    return 4.2 if letter in "fijlrtI.:, " else 10.2 if letter in "mwMW" else 7.0


def shortened(name: str, ending: str, width: float) -> str:
    """A label of a name and an ending; the name is cut where both are wider than `width`."""
    if _text_width(name + ending) <= width:
        return name + ending
    while name and _text_width(f"{name}…{ending}") > width:
        name = name[:-1]
    return f"{name.rstrip()}…{ending}"


def square_around(
    pixels: np.ndarray, bbox: list[float]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """A square around a box, grey outside the image, and the box (xywh) in percent of the square.

    Args:
        pixels: (H, W, 3) uint8.
        bbox: xywh in pixels of the image.
    """
    left, top, side = _window(corners(bbox), pixels.shape[1], pixels.shape[0])
    square = Image.new("RGB", (side, side), (128, 128, 128))
    square.paste(Image.fromarray(pixels), (-left, -top))
    x, y, width, height = (100 * v / side for v in (bbox[0] - left, bbox[1] - top, *bbox[2:]))
    return square, (x, y, width, height)


def _window(box: np.ndarray, width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of a square around a box, inside the image if it fits."""
    side = max(8, round(1.35 * float((box[2:] - box[:2]).max())))
    corner = (box[:2] + box[2:] - side) / 2
    limits = [(size - side) for size in (width, height)]
    left, top = (
        round(min(max(low, 0), limit)) if limit >= 0 else round(limit / 2)
        for low, limit in zip(corner.tolist(), limits, strict=True)
    )
    return left, top, side


def jpeg_uri(image: Image.Image, longest: int) -> str:
    """An image as a data URI, shrunk to `longest` pixels if it is larger."""
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
