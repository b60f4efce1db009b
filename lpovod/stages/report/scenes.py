"""The report's pictures: validation images with their detections."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lpovod.drawing import (
    READABLE_OBJECTS,
    choose_images,
    jpeg_uri,
    place_labels,
    shortened,
)
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_results
from lpovod.progress import progress

SCENE_PIXELS, SMALL_SCENE_PIXELS = 960, 480
OPEN_SCENES = 30  # a page with more pictures folds the others away and shows them smaller
MORE_SCENES = 12  # the most that classes add which would not appear in those of the setting
SCENE_UNITS = 400  # width of a scene's overlay; lines and letters are sized in these units
LABEL_UNITS = 260  # largest width of a label
WITHOUT_OBJECTS = 5  # detections shown in an image without an annotated object

Results = list[dict[str, Any]]


@dataclass
class Scene:
    """An image to show.

    Attributes:
        image_id: its id.
        results: detections to draw, best first.
        chosen_for: classes whose detection is the reason to show the image.
    """

    image_id: int
    results: Results
    chosen_for: list[str] = field(default_factory=list)


# --- detections on images


def read_detections(path: Path, data: CocoDataset) -> dict[int, Results]:
    """Detections by image id, best first.

    Raises:
        LpovodError: if a detection names an image or a category that the split lacks.
    """
    by_image: dict[int, Results] = defaultdict(list)
    for place, result in enumerate(read_results(path, data)):
        if result.get("category_id") not in data.categories:
            raise LpovodError(
                f"{path}: detection {place} has category_id {result.get('category_id')}, which "
                f"{data.path} lacks. Make it again: snakemake --forcerun evaluation"
            )
        by_image[result["image_id"]].append(result)
    return {i: sorted(results, key=lambda r: -r["score"]) for i, results in by_image.items()}


def choose_scenes(
    data: CocoDataset,
    by_image: dict[int, Results],
    base: list[str],
    novel: list[str],
    count: int,
) -> list[Scene]:
    """Images in which novel classes have detections drawn: all that are detected, if they are few.

    First come images by their annotations only (`choose_images`). Then every class that nobody
    annotated, and every other one that is detected but not drawn yet, adds the image of its
    best-scored detection, best score first: `MORE_SCENES` images beyond `count` at most, and no
    detection where an image already shows `READABLE_OBJECTS`. What is left of `count` goes to
    further detections of the classes that nobody annotated. Base classes decide if nothing is
    annotated or detected of the novel ones.

    Args:
        data: the split, with the annotations of these classes alone.
        by_image: detections by image, best first.
        base: names of the base classes.
        novel: names of the novel classes.
        count: number of images, if that many show anything.
    """
    for names in (novel, base):
        chosen = choose_images(data, base, names, count)
        scenes = {i: Scene(i, _best(data, i, by_image.get(i, []))) for i in chosen}
        ranked = _ranked(data, by_image, names)
        annotated = _names(data, (a for objects in data.annotations.values() for a in objects))
        for name, (best, *_) in sorted(ranked.items(), key=lambda item: -item[1][0]["score"]):
            wanted = name not in annotated or name not in drawn_names(data, scenes.values())
            if wanted and _has_room(scenes, best["image_id"], count + MORE_SCENES):
                _add(scenes, data, by_image, name, best)
        unknown = {n: results for n, results in ranked.items() if n not in annotated}
        _fill(scenes, data, by_image, unknown, count)
        if scenes:
            break
    return list(scenes.values())


def _ranked(
    data: CocoDataset, by_image: dict[int, Results], names: list[str]
) -> dict[str, Results]:
    """The best detection of each class in each image, best first, by class name."""
    best: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in names}
    for image_id in sorted(by_image):
        for result in by_image[image_id]:
            name = data.categories[result["category_id"]]["name"]
            if name in best:
                best[name].setdefault(image_id, result)
    ranked = {n: sorted(r.values(), key=lambda r: -r["score"]) for n, r in best.items()}
    return {name: results for name, results in ranked.items() if results}


def _has_room(scenes: dict[int, Scene], image_id: int, count: int) -> bool:
    if image_id in scenes:
        return len(scenes[image_id].results) < READABLE_OBJECTS
    return len(scenes) < count


def detected_in(data: CocoDataset, by_image: dict[int, Results]) -> dict[str, tuple[int, float]]:
    """Number of images in which each class is detected, and its best score, by class name."""
    counts: dict[int, tuple[int, float]] = {}
    for results in by_image.values():
        best: dict[int, float] = {}
        for result in results:
            best.setdefault(result["category_id"], result["score"])
        for category, score in best.items():
            images, highest = counts.get(category, (0, 0.0))
            counts[category] = (images + 1, max(highest, score))
    return {data.categories[i]["name"]: counted for i, counted in counts.items()}


def _fill(
    scenes: dict[int, Scene],
    data: CocoDataset,
    by_image: dict[int, Results],
    ranked: dict[str, Results],
    count: int,
) -> None:
    """Add images until there are `count`: the next best of each class in turn."""
    for place in range(1, max(map(len, ranked.values()), default=0)):
        for name, results in ranked.items():
            if len(scenes) < count and place < len(results):
                _add(scenes, data, by_image, name, results[place])


def _add(
    scenes: dict[int, Scene],
    data: CocoDataset,
    by_image: dict[int, Results],
    name: str,
    result: dict[str, Any],
) -> None:
    image_id = result["image_id"]
    if image_id not in scenes:
        scenes[image_id] = Scene(image_id, _best(data, image_id, by_image[image_id]))
    scene = scenes[image_id]
    scene.chosen_for.append(name)
    if not any(result is other for other in scene.results):
        scene.results = sorted([*scene.results, result], key=lambda r: -r["score"])


def _best(data: CocoDataset, image_id: int, results: Results) -> Results:
    objects = len(_objects(data, image_id))
    return results[: objects + 2 if objects else WITHOUT_OBJECTS]


def _objects(data: CocoDataset, image_id: int) -> list[dict[str, Any]]:
    return [a for a in data.annotations[image_id] if not a.get("iscrowd")]


def _names(data: CocoDataset, items: Any) -> set[str]:
    return {data.categories[item["category_id"]]["name"] for item in items}


def drawn_names(data: CocoDataset, scenes: Iterable[Scene]) -> set[str]:
    """Names of the classes that have a detection in any of the pictures."""
    return _names(data, (result for scene in scenes for result in scene.results))


def draw_scenes(
    data: CocoDataset, scenes: list[Scene], novel: list[str], large: int
) -> list[dict[str, Any]]:
    """The pictures.

    Args:
        data: the split.
        scenes: of `choose_scenes`.
        novel: names of the novel classes.
        large: how many have the full size; the others are smaller.

    Returns:
        For each, the image as a data URI, and boxes in the overlay's units with their labels.
    """
    sizes = [SCENE_PIXELS if n < large else SMALL_SCENE_PIXELS for n in range(len(scenes))]
    return [
        _draw(data, scene, set(novel), pixels)
        for scene, pixels in progress(list(zip(scenes, sizes, strict=True)), "detections", "image")
    ]


def _draw(data: CocoDataset, scene: Scene, novel: set[str], pixels: int) -> dict[str, Any]:
    size = data.images[scene.image_id]
    scale = SCENE_UNITS / size["width"]
    width, height = SCENE_UNITS, size["height"] * scale

    def box(item: dict[str, Any], ending: str = "") -> dict[str, Any]:
        name = data.categories[item["category_id"]]["name"]
        return {
            "text": name + ending,
            "short": shortened(name, ending, LABEL_UNITS),
            "novel": name in novel,
            "box": [scale * v for v in item["bbox"]],
        }

    objects = _objects(data, scene.image_id)
    detections = [box(result, f" {result['score']:.2f}") for result in scene.results]
    annotated = [box(a) for a in objects]
    boxes = [*detections, *annotated]
    labels = place_labels([b["box"] for b in boxes], [b["short"] for b in boxes], width, height)
    labelled = [b | {"label": label} for b, label in zip(boxes, labels, strict=True)]
    counted = Counter(data.categories[a["category_id"]]["name"] for a in objects)
    return {
        "name": size["file_name"],
        "uri": jpeg_uri(Image.fromarray(data.load(scene.image_id)), pixels),
        "size": (width, height),
        "detections": labelled[: len(detections)],
        "objects": labelled[len(detections) :],
        "annotated": sorted(counted.items(), key=lambda item: (item[0] not in novel, item[0])),
        "chosen_for": scene.chosen_for,
        "novel": novel,
    }
