"""The report's pictures: validation images with their detections."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from lpovod.drawing import place_labels
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_results
from lpovod.stages.report.retrieved import jpeg_uri

SCENE_PIXELS = 960
SCENE_UNITS = 400  # width of a scene's overlay; lines and letters are sized in these units


# --- detections on images


def read_detections(path: Path, data: CocoDataset) -> dict[int, list[dict[str, Any]]]:
    """Detections by image id, best first.

    Raises:
        LpovodError: if a detection names an image or a category that the split lacks.
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


def draw_scene(
    data: CocoDataset,
    image_id: int,
    results: list[dict[str, Any]],
    base: list[str],
    novel: list[str],
) -> dict[str, Any]:
    """An image with its n annotated boxes and its n + 2 best detections.

    Returns:
        The image as a data URI, and boxes in the overlay's units with their labels' positions.
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
