"""Stage `dataset`: images and annotations of every split, in one layout for every source.

The folder `images/` beside the json files holds a folder, or a link to one, for each split::

    dataset/train.json  dataset/val.json  [dataset/tune.json]  dataset/train_all_classes.json
    dataset/images/train/  dataset/images/val/  [dataset/images/tune/]

The json is COCO's; each category also has a ``split`` (base or novel). Training annotations cover
base classes only. Validation annotations cover all classes of the source, so that a novel class can
be added or left out later without rerunning this stage. The report uses ``train_all_classes.json``
to tell right from wrong retrieved regions; no stage learns from it.
"""

from pathlib import Path

from lpovod.artifacts import identity, write_json
from lpovod.config import CocoSettings, DatasetSettings, MiniatureSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import read_dataset
from lpovod.miniature.split import draw_split
from lpovod.progress import log


def make_dataset(output: Path, settings: DatasetSettings, base: list[str], seed: int) -> None:
    """Write every split's json and images to the folder `output`.

    Args:
        output: folder with the layout above.
        settings: the source.
        base: names of the classes that stay annotated in training.
        seed: seed of the miniature world.

    Raises:
        LpovodError: if a source is missing or contradicts itself, or lacks a base class.
    """
    if settings.source == "miniature":
        splits = _draw(output, settings.miniature, seed)
    else:
        splits = _link(output, settings.coco)
        _check_counts(splits, settings.coco, base)
    ident = identity("dataset", settings) | {"seed": seed}
    for split, content in splits.items():
        complete = {"info": {"identity": ident}, **_with_split(content, base)}
        if split == "train":
            write_json(output / "train_all_classes.json", complete)
            complete = _base_only(complete)
        write_json(output / f"{split}.json", complete)
        log.info(f"{split}: {len(complete['images'])} images, {len(complete['annotations'])} boxes")


def _draw(output: Path, settings: MiniatureSettings, seed: int) -> dict[str, dict]:
    counts = {
        "train": settings.train_images,
        "val": settings.val_images,
        "tune": settings.tune_images,
    }
    return {
        split: draw_split(
            output / "images" / split,
            count,
            seed,
            split,
            settings.nuisance,
            settings.nested,
            settings.distractors,
        )
        for split, count in counts.items()
    }


def _link(output: Path, files: CocoSettings) -> dict[str, dict]:
    (output / "images").mkdir(parents=True, exist_ok=True)
    splits = {}
    for split in ("train", "val"):
        folder = files.path(f"{split}_images").resolve()
        if not folder.is_dir():
            raise LpovodError(f"{folder}: no such folder (dataset.coco.{split}_images)")
        link = output / "images" / split
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
        data = read_dataset(files.path(f"{split}_annotations"))
        names = [image["file_name"] for image in data.images.values()]
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise LpovodError(f"{folder}: {len(missing)} images are missing, first {missing[0]}")
        splits[split] = {
            "images": list(data.images.values()),
            "annotations": [a for of_image in data.annotations.values() for a in of_image],
            "categories": list(data.categories.values()),
        }
    return splits


def _check_counts(splits: dict[str, dict], files: CocoSettings, base: list[str]) -> None:
    for split, expected in files.base_boxes.items():
        content = splits[split]
        ids = {c["id"] for c in content["categories"] if c["name"] in base}
        count = sum(a["category_id"] in ids for a in content["annotations"])
        if count != expected:
            raise LpovodError(
                f"{files.path(f'{split}_annotations')} has {count} boxes of base classes, "
                f"dataset.coco.base_boxes expects {expected}: check the annotation file and "
                "classes.base"
            )


def _with_split(content: dict, base: list[str]) -> dict:
    unknown = set(base) - {c["name"] for c in content["categories"]}
    if unknown:
        raise LpovodError(f"classes.base: {sorted(unknown)} are not among the annotated classes")
    categories = [
        {"id": c["id"], "name": c["name"], "split": "base" if c["name"] in base else "novel"}
        for c in content["categories"]
    ]
    # Segmentations make up most of a COCO json, and no stage reads them.
    boxes = [{k: v for k, v in a.items() if k != "segmentation"} for a in content["annotations"]]
    return {"images": content["images"], "annotations": boxes, "categories": categories}


def _base_only(content: dict) -> dict:
    categories = [c for c in content["categories"] if c["split"] == "base"]
    base_ids = {c["id"] for c in categories}
    annotations = [a for a in content["annotations"] if a["category_id"] in base_ids]
    return content | {"categories": categories, "annotations": annotations}
