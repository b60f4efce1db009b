"""`lpovod convert`: detections and pseudo-labels as files that labelling tools take up.

    R=results/mine
    lpovod convert $R/evaluation/detections.json --dataset $R/evaluation/ground_truth.json \\
        --threshold 0.5 --to yolo --output boxes
    lpovod convert $R/pseudo_labels --dataset $R/dataset/train.images.json --to voc --output boxes
"""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lpovod.artifacts import read_json, write_json
from lpovod.exceptions import LpovodError, UsageError, some
from lpovod.formats.coco import CocoDataset, corners, read_dataset, read_results
from lpovod.formats.labels import Box, LabelledImage, as_coco, clip
from lpovod.formats.voc import IMAGES, write_voc
from lpovod.formats.yolo import write_yolo

FOLDERS = {"yolo": "images", "voc": IMAGES}


def convert(
    source: Annotated[tuple[Path, ...], tyro.conf.Positional],
    dataset: Path,
    to: Literal["coco", "yolo", "voc"],
    output: Path,
    threshold: float = 0.0,
    images: Path | None = None,
) -> str:
    """Write detections or pseudo-labels as COCO json, a YOLO folder or Pascal VOC xml.

    Boxes are clipped to their images. COCO's json keeps scores and lists every image; the other two
    have files for images with boxes alone, and a link to the folder of images.

    Args:
        source: detections in COCO's results format, or pseudo-labels: their files, or a folder
        dataset: COCO json of the images; of detections, with the categories that they name
        to: the format
        output: a new folder
        threshold: lowest score of a box; a pseudo-label's score is its objectness
        images: folder of the images; for a dataset of a run it is known

    Returns:
        What was written.

    Raises:
        UsageError: if the output exists.
        LpovodError: if files are wrong or do not belong together, or nothing is left to write.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists. Name another folder (--output), or remove it")
    data = read_dataset(dataset)
    names, boxes = _read(_files(source), data)
    labelled, left_out = _labelled(data, boxes, threshold)
    count = sum(len(image.boxes) for image in labelled)
    if not count:
        raise LpovodError(
            f"nothing to write: none of {sum(map(len, boxes.values()))} boxes has a score of "
            f"{threshold:g} (--threshold) inside its image"
        )
    folder = images or _image_folder(data)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if to == "coco":
            write_json(partial / "annotations.json", _coco(data, names, labelled))
        elif to == "yolo":
            write_yolo(partial, names, labelled)
        else:
            write_voc(partial, labelled)
        if to in FOLDERS and folder:
            (partial / FOLDERS[to]).symlink_to(folder.resolve())
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with_boxes = sum(bool(image.boxes) for image in labelled)
    lines = [f"{output}: {count:,} boxes of {len(names)} classes on {with_boxes:,} images"]
    if left_out:
        lines.append(
            f"{left_out:,} boxes below {threshold:g}, or outside their image, are left out"
        )
    if to in FOLDERS and not folder:
        lines.append(f"Put the images, or a link to their folder, into {output / FOLDERS[to]}")
    return "\n".join(lines)


def _files(source: tuple[Path, ...]) -> list[Path]:
    files = []
    for path in source:
        inner = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inner:
            raise LpovodError(f"{path}: no json files")
        files += inner
    if not files:
        raise UsageError("name the detections or the pseudo-labels to convert")
    return files


def _read(files: list[Path], data: CocoDataset) -> tuple[list[str], dict[Any, list[Box]]]:
    """Class names in order, and boxes by image id."""
    boxes: dict[Any, list[Box]] = defaultdict(list)
    names = [category["name"] for _, category in sorted(data.categories.items())]
    for path in files:
        if isinstance(read_json(path), list):
            _read_detections(path, data, boxes)
        else:
            names += [name for name in _read_labels(path, data, boxes) if name not in names]
    return names, boxes


def _read_detections(path: Path, data: CocoDataset, boxes: dict[Any, list[Box]]) -> None:
    for number, item in enumerate(read_results(path, data)):
        category = data.categories.get(item.get("category_id", ""))
        if category is None:
            raise LpovodError(
                f"{path}: detection {number}: {data.path} has no category "
                f"{item.get('category_id')}. A run's are in evaluation/ground_truth.json"
            )
        x1, y1, x2, y2 = corners(item["bbox"]).tolist()
        boxes[item["image_id"]].append(
            Box(category["name"], (x1, y1, x2, y2), score=float(item["score"]))
        )


def _read_labels(path: Path, data: CocoDataset, boxes: dict[Any, list[Box]]) -> list[str]:
    """Boxes of a COCO json; regions that a pseudo-label file ignores are no labels."""
    content = read_dataset(path)
    unknown = [str(i) for i in content.images if i not in data.images]
    if unknown:
        raise LpovodError(
            f"{path}: {data.path} has no image {some(unknown)}. Pseudo-labels are of the training "
            "images: a run's are in dataset/train.images.json"
        )
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
            x1, y1, x2, y2 = corners(annotation["bbox"]).tolist()
            name = content.categories[annotation["category_id"]]["name"]
            boxes[image_id].append(Box(name, (x1, y1, x2, y2), score=annotation.get("score")))
    return [category["name"] for _, category in sorted(content.categories.items())]


def _labelled(
    data: CocoDataset, boxes: dict[Any, list[Box]], threshold: float
) -> tuple[list[LabelledImage], int]:
    """Every image with its boxes above the threshold, clipped, and how many are left out."""
    labelled, left_out = [], 0
    for image_id, image in data.images.items():
        width, height = int(image["width"]), int(image["height"])
        inner = [
            clipped
            for box in boxes.get(image_id, [])
            if (box.score is None or box.score >= threshold)
            and (clipped := clip(box, width, height))
        ]
        left_out += len(boxes.get(image_id, [])) - len(inner)
        labelled.append(LabelledImage(Path(image["file_name"]), width, height, inner))
    return labelled, left_out


def _image_folder(data: CocoDataset) -> Path | None:
    """The folder of the images, if the dataset is one of a run's, or lies beside it."""
    listed = data.path.parent.parent / "dataset" / "val.images.json"
    if data.path.name == "ground_truth.json" and listed.is_file():
        return read_dataset(listed).folder
    return data.folder if data.folder.is_dir() else None


def _coco(data: CocoDataset, names: list[str], labelled: list[LabelledImage]) -> dict[str, Any]:
    """COCO's json with the ids of the dataset; classes that it lacks get the next ids."""
    content = as_coco(labelled, names)
    ids = {category["name"]: number for number, category in data.categories.items()}
    following = max(data.categories, default=0) + 1
    for name in names:
        if name not in ids:
            ids[name], following = following, following + 1
    places = list(data.images)
    for annotation in content["annotations"]:
        annotation["image_id"] = places[annotation["image_id"] - 1]
        annotation["category_id"] = ids[names[annotation["category_id"] - 1]]
    categories = [{"id": ids[name], "name": name} for name in names]
    return {**content, "images": list(data.images.values()), "categories": categories}
