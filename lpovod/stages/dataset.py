"""Stage `dataset`: images and annotations of every split, in one layout for every source.

::

    dataset/{train,val,tune}.images.json    the images: names, sizes, and their folder
    dataset/train.json                      with the boxes of base classes, to learn from
    dataset/{train_all_classes,val,tune}.json  with all boxes, to measure and to judge

The json is COCO's. Images and annotations are apart, so that a corrected box makes only the stages
stale that learn or measure; proposals, embeddings and features of the images stay. What a class is,
base or novel, belongs to the configuration, not to these files, except that ``train.json`` has the
boxes of base classes alone: no stage learns from another box.
"""

import os
from pathlib import Path
from typing import Any

from lpovod.artifacts import Identity, identity, read_json, write_json
from lpovod.config import MiniatureSettings, Split
from lpovod.exceptions import LpovodError, some
from lpovod.formats.coco import BOX_KEYS, IMAGE_KEYS, read_dataset
from lpovod.miniature.split import draw_split
from lpovod.progress import log


def draw(
    split: Split,
    settings: MiniatureSettings,
    seed: int,
    folder: Path,
    images: Path,
    annotations: Path,
) -> None:
    """Draw a split of the miniature world.

    Args:
        split: which.
        settings: the drawn world.
        seed: its seed.
        folder: for the image files.
        images: output json with the images.
        annotations: output json with the images and all annotations.
    """
    count = getattr(settings, f"{split}_images")
    world = (settings.nuisance, settings.nested, settings.distractors)
    content = draw_split(folder, count, seed, split, *world)
    ident = identity("dataset", {"world": world}) | {"seed": seed}
    write_json(images, _content(content["images"], folder, images, ident))
    write_json(annotations, content)
    log.info(f"{split}: {count} images drawn, {len(content['annotations'])} objects")


def list_images(
    split: Split,
    folder: Path,
    annotations: Path,
    digest: str,
    output: Path,
    check: Path | None = None,
) -> None:
    """List the images of a split of the user's data.

    Args:
        split: which.
        folder: of the image files.
        annotations: COCO json.
        digest: of the image files and of the list; it becomes part of the output's identity, so
            that what was made from an image that was replaced is never taken for current.
        output: json with the images.
        check: json of stage `check`, whose bad images are left out.

    Raises:
        LpovodError: if an image or the folder is missing.
    """
    data = read_dataset(annotations)
    if not folder.is_dir():
        raise LpovodError(f"{folder}: no such folder (dataset.coco.{split}_images)")
    bad = set(read_json(check)["bad_images"].get(split, [])) if check else set()
    images = [image for image in data.images.values() if image["id"] not in bad]
    absent = [i["file_name"] for i in images if not (folder / i["file_name"]).is_file()]
    if absent:
        raise LpovodError(f"{folder}: {len(absent)} images are missing: {some(absent)}")
    ident = identity("dataset", None, source=digest)
    write_json(output, _content(images, folder, output, ident))
    log.info(f"{split}: {len(images)} images" + (f", {len(bad)} left out" if bad else ""))


def annotate(
    images: Path,
    annotations: Path,
    output: Path,
    base: list[str] | None = None,
    base_only: bool = False,
    expected_boxes: int | None = None,
) -> None:
    """Write the annotations of a split's images.

    Args:
        images: json of `draw` or `list_images`.
        annotations: COCO json with the same images, or more.
        output: COCO json.
        base: names of the base classes.
        base_only: keep the annotations and categories of base classes alone.
        expected_boxes: number of annotations that the base classes must have.

    Raises:
        LpovodError: if `annotations` lacks a base class, or has another number of boxes.
    """
    listed, data = read_dataset(images), read_dataset(annotations)
    of_base = set(data.category_ids(base or []))
    ids = of_base if base_only else set(data.categories)
    boxes = [
        {k: a[k] for k in BOX_KEYS if k in a}
        for image_id in listed.images
        for a in data.annotations[image_id]
        if a["category_id"] in ids
    ]
    _check_count(sum(a["category_id"] in of_base for a in boxes), expected_boxes, annotations)
    ident = identity("dataset", {"base": base if base_only else None}, images=images)
    categories = [{"id": i, "name": data.categories[i]["name"]} for i in sorted(ids)]
    content = _content([*listed.images.values()], listed.folder, output, ident)
    write_json(output, content | {"annotations": boxes, "categories": categories})
    log.info(
        f"{output.name}: {len(listed.images)} images, {len(boxes)} boxes of {len(ids)} classes"
    )


def _content(images: list[dict], folder: Path, output: Path, ident: Identity) -> dict[str, Any]:
    """COCO's json of images in a folder, without annotations."""
    return {
        "info": {"identity": ident, "images": os.path.relpath(folder, output.parent)},
        "images": [{k: image[k] for k in IMAGE_KEYS} for image in images],
        "annotations": [],
        "categories": [],
    }


def _check_count(boxes: int, expected: int | None, annotations: Path) -> None:
    if expected is not None and boxes != expected:
        raise LpovodError(
            f"{annotations} has {boxes} boxes of base classes, dataset.coco.base_boxes expects "
            f"{expected}: check the annotation file and classes.base"
        )
