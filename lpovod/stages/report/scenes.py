"""The report's pictures: validation images with their detections."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_results
from lpovod.stages.report.retrieved import jpeg_uri

SCENE_PIXELS = 960
SCENE_UNITS = 400  # width of a scene's overlay: lines and letters are sized in these
LABEL_HEIGHT = 15
READABLE_OBJECTS = 15  # an image with more is shown only where there is no other


# --- detections on images


def read_detections(path: Path, data: CocoDataset) -> dict[int, list[dict[str, Any]]]:
    """Detections by image id, best first.

    Raises:
        LpovodError: if one names an image or a category that the split does not have.
    """
    by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, result in enumerate(read_results(path, data)):
        if result.get("category_id") not in data.categories:
            raise LpovodError(
                f"{path}: detection {place} has category_id {result.get('category_id')}, which "
                f"{data.path} lacks. Make it again: snakemake --forcerun evaluation"
            )
        by_image[result["image_id"]].append(result)
    return {i: sorted(results, key=lambda r: -r["score"]) for i, results in by_image.items()}


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


def draw_scene(
    data: CocoDataset,
    image_id: int,
    results: list[dict[str, Any]],
    base: list[str],
    novel: list[str],
) -> dict[str, Any]:
    """An image with its annotated boxes and as many of its best detections, and two more.

    Returns:
        the image as a data URI, and boxes in the overlay's units with the places of their labels.
    """
    size = data.images[image_id]
    scale = SCENE_UNITS / size["width"]
    width, height = SCENE_UNITS, size["height"] * scale
    named = {i: c["name"] for i, c in data.categories.items() if c["name"] in {*base, *novel}}
    objects = [
        a for a in data.annotations[image_id] if a["category_id"] in named and not a.get("iscrowd")
    ]

    def box(item: dict[str, Any]) -> dict[str, Any]:
        name = named[item["category_id"]]
        return {"name": name, "novel": name in novel, "box": [scale * v for v in item["bbox"]]}

    shown = [r for r in results if r["category_id"] in named][: len(objects) + 2]
    detections = [box(r) | {"score": r["score"]} for r in shown]
    labels = place_labels(
        [d["box"] for d in detections],
        [f"{d['name']} {d['score']:.2f}" for d in detections],
        width,
        height,
    )
    counted = Counter(named[a["category_id"]] for a in objects)
    return {
        "image_id": image_id,
        "uri": jpeg_uri(Image.fromarray(data.load(image_id)), SCENE_PIXELS),
        "size": (width, height),
        "objects": [box(a) for a in objects],
        "detections": [d | {"label": label} for d, label in zip(detections, labels, strict=True)],
        "annotated": sorted(counted.items(), key=lambda item: (item[0] not in novel, item[0])),
        "novel": set(novel),
    }


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
