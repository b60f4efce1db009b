"""`lpovod score`: AP50 of any detector's results, by class and by split."""

from pathlib import Path

from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_dataset, read_results
from lpovod.measures.average_precision import (
    Protocol,
    ap50,
    ap50_by_class,
    coco_ground_truth,
    images_of,
)

SPLITS = {"base": "base", "novel": "novel", "seen": "base", "unseen": "novel"}
"""Values that a category's ``split`` may have; the original's files use seen and unseen."""


def score(
    ground_truth: Path,
    detections: Path,
    novel: list[str] | None = None,
    base: list[str] | None = None,
    protocol: Protocol = "all_images",
) -> None:
    """Print AP50 of any detector's results: pycocotools' numbers, by class and by split.

    Args:
        ground_truth: COCO json of the images that the detector ran on.
        detections: COCO's results format: a json list of image_id, category_id, bbox and score.
        novel: the novel classes; by default the categories whose "split" is novel.
        base: the base classes; by default the categories whose "split" is base, or all others.
        protocol: all_images, as in pycocotools, or annotated_images: those with an annotation of
            one of the classes, as in OV-COCO. A run's evaluation/ground_truth.json holds the images
            that it measured.
    """
    print(score_table(ground_truth, detections, base, novel, protocol))


def score_table(
    truth: Path,
    detections: Path,
    base: list[str] | None = None,
    novel: list[str] | None = None,
    protocol: Protocol = "all_images",
) -> str:
    """The table that `score` prints; arguments as there.

    Detections of other classes are ignored.

    Raises:
        LpovodError: if the split is unknown, or a detection has a wrong format or names an image
            that the annotations lack.
    """
    data = read_dataset(truth)
    splits = _splits(data, base, novel)
    names = {s: [n for n, split in splits.items() if split == s] for s in ("base", "novel")}
    results = read_results(detections, data)
    data = data.of_classes(names["base"], names["novel"])
    results = [r for r in results if r.get("category_id") in data.categories]
    images = images_of(data, protocol)
    by_class = ap50_by_class(coco_ground_truth(data, images), results)
    means = ap50(by_class, names["base"], names["novel"])
    rows = [(f"{'class':24}{'split':>8}", "AP50")]
    rows += [
        (f"{name:24}{split:>8}", f"{by_class[name]:.2f}" if name in by_class else "-")
        for name, split in splits.items()
    ]
    rows += [
        (f"{'mean of ' + split:32}", "-" if means[split] is None else f"{means[split]:.2f}")
        for split in ("novel", "base", "all")
    ]
    table = [f"{left}{right:>8}" for left, right in rows]
    return "\n".join([*table, f"{len(images)} of {len(data.images)} images ({protocol})"])


def _splits(data: CocoDataset, base: list[str] | None, novel: list[str] | None) -> dict[str, str]:
    """The evaluated classes and their splits, in the order of category ids."""
    data.category_ids([*(base or []), *(novel or [])])
    splits = {}
    for _, category in sorted(data.categories.items()):
        name = category["name"]
        if novel is None and base is None:
            split = SPLITS.get(str(category.get("split")))
            if split is None:
                raise LpovodError(
                    f"{data.path}: category {name!r} has the split {category.get('split')!r}, "
                    'expected "base" or "novel". Correct the file, or name the novel classes: '
                    "--novel CLASS CLASS ... (and --base, if not all others are base classes)"
                )
        elif novel is not None and name in novel:
            split = "novel"
        else:
            split = "base" if base is None or name in base else None
        if split:
            splits[name] = split
    return splits
