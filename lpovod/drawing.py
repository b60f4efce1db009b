"""Boxes with names and scores on images, and which images are worth showing."""

from collections import Counter
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lpovod.formats.coco import CocoDataset

LABEL_HEIGHT = 15
READABLE_OBJECTS = 15  # an image with more is shown only where there is no other
COLOURS = {False: (37, 99, 235), True: (234, 88, 12)}  # of base and of novel classes


def choose_images(data: CocoDataset, base: list[str], novel: list[str], count: int) -> list[int]:
    """Ids of images whose novel objects are many and spread over the classes.

    Annotations alone decide, never detections. One after the other, the image is taken that adds
    most: an object of a class counts the less, the more of the class is already shown.
    """
    wanted, named = set(data.category_ids(novel)), set(data.category_ids([*base, *novel]))
    objects = {i: data.boxes(i)[1].tolist() for i in data.images}
    counts = {i: Counter(c for c in found if c in wanted) for i, found in objects.items()}
    readable = {
        i: sum(c in named for c in found) <= READABLE_OBJECTS for i, found in objects.items()
    }
    shown: Counter[int] = Counter()

    def worth(image_id: int) -> tuple[bool, float, int]:
        # Of a class no more than two objects count: a flock is no variety.
        added = sum(min(n, 2) / (1 + shown[c]) for c, n in counts[image_id].items())
        return readable[image_id], added, -image_id

    left = {i for i, of_image in counts.items() if of_image}
    chosen: list[int] = []
    while left and len(chosen) < count:
        chosen.append(max(left, key=worth))
        left.remove(chosen[-1])
        shown.update(counts[chosen[-1]])
    return chosen


def draw_detections(
    pixels: np.ndarray,
    boxes: list[list[float]],
    labels: list[str],
    novel: list[bool],
    width: int,
) -> Image.Image:
    """An image with labelled boxes, enlarged or shrunk to a width.

    Args:
        pixels: (H, W, 3) uint8.
        boxes: xywh in pixels of the image, the most important first.
        labels: what is written at each box.
        novel: whether its class is novel, which colours it.
        width: of the result, in pixels.
    """
    scale = width / pixels.shape[1]
    size = (width, round(pixels.shape[0] * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    scaled = [[scale * side for side in box] for box in boxes]
    for (x, y, w, h), of_novel in zip(scaled, novel, strict=True):
        pen.rectangle((x, y, x + w, y + h), outline=COLOURS[of_novel], width=2)
    placed = place_labels(scaled, labels, *size)
    for label, of_novel in zip(placed, novel, strict=True):
        x, y = label["x"], label["y"]
        pen.rectangle((x, y, x + label["width"], y + LABEL_HEIGHT), fill=COLOURS[of_novel])
        pen.text((x + 4, y + 1), label["text"], "white", font)
    return image


Rectangle = tuple[float, float, float, float]


def place_labels(
    boxes: list[list[float]], texts: list[str], width: float, height: float
) -> list[dict[str, Any]]:
    """Where labels go: the first place at their box that covers no label placed before.

    Args:
        boxes: xywh in the overlay's units, the most important first.
        texts: what the labels say.
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
    """About the width of a text in 11 units of a bold sans serif, with its margins of 4.

    The page states it to the browser, which fits the letters of whatever font it has.
    """
    widths = dict.fromkeys("fijlrtI.:, ", 4.2) | dict.fromkeys("mwMW", 10.2)
    return 8 + sum(widths.get(c, 7.0) for c in text)
