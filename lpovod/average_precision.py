"""COCO's average precision at an IoU of .5, over base, novel and all classes.

The engine is faster-coco-eval, which gives pycocotools' numbers at a fraction of its time.
"""

import contextlib
import gc
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from lpovod.artifacts import LpovodError, read_json
from lpovod.dataset import CocoDataset, read_dataset

Detections = dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""By image id: boxes (n, 4) xyxy, scores (n,), category ids (n,)."""

SPLITS = {"base": "base", "novel": "novel", "seen": "base", "unseen": "novel"}
"""What a category's ``split`` may say; the original's files say seen and unseen."""


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """For what makes a hundred thousand small objects and no cycles: a quarter of its time.

    Reference counts free them; Python's collector would only walk over them again and again.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ground_truth(data: CocoDataset, names: list[str], every_image: bool = False) -> COCO:
    """Annotations of the named classes alone, on the images that have some of them.

    Images without any of the classes are left out, as in the generalised OV-COCO protocol, unless
    `every_image` keeps them.
    """
    categories = set(data.category_ids(names))
    kept = {
        image_id: [a for a in found if a["category_id"] in categories]
        for image_id, found in data.annotations.items()
    }
    images = [data.images[i] for i, found in kept.items() if found or every_image]
    annotations = [
        {"iscrowd": 0, "area": a["bbox"][2] * a["bbox"][3], **a} for f in kept.values() for a in f
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(
            {
                "images": images,
                "annotations": annotations,
                "categories": [data.categories[c] | {"id": c} for c in sorted(categories)],
            }
        )


def coco_results(detections: Detections) -> list[dict[str, Any]]:
    """Detections in COCO's results format: a list of image_id, category_id, bbox xywh, score."""
    return [
        {
            "image_id": image_id,
            "category_id": category,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, found in detections.items()
        # As lists: numbers taken out of the arrays one by one take three times as long.
        for (x1, y1, x2, y2), score, category in zip(*(a.tolist() for a in found), strict=True)
    ]


def ap50_by_class(truth: COCO, results: list[dict[str, Any]]) -> dict[str, float]:
    """AP50 in percent of every class that has an object, by class name.

    Args:
        truth: from `ground_truth`.
        results: from `coco_results`; images that `truth` leaves out are ignored.
    """
    known = set(truth.getImgIds())
    here = [r for r in results if r["image_id"] in known]
    names = {c: truth.cats[c]["name"] for c in sorted(truth.cats)}
    present = {a["category_id"] for a in truth.anns.values() if not a["iscrowd"]}
    if not here:
        return {name: 0.0 for c, name in names.items() if c in present}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval_faster(truth, truth.loadRes(here), "bbox")
        evaluator.params.iouThrs = np.array([0.5])
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [100]
        evaluator.evaluate()
        evaluator.accumulate()
    # precision: (IoU, recall, class, area, detections per image); -1 where a class has no object
    precision = evaluator.eval["precision"][0, :, :, 0, 0]
    means = {c: float(precision[:, k].mean()) for k, c in enumerate(evaluator.params.catIds)}
    return {names[c]: 100 * means[c] for c in names if c in present}


def ap50(by_class: dict[str, float], base: list[str], novel: list[str]) -> dict[str, float | None]:
    """Means over novel, base and all classes; None where none of them has an object."""

    def mean(names: list[str]) -> float | None:
        values = [by_class[n] for n in names if n in by_class]
        return round(float(np.mean(values)), 2) if values else None

    return {"novel": mean(novel), "base": mean(base), "all": mean([*base, *novel])}


def evaluate_files(
    truth: Path,
    detections: Path,
    base: list[str] | None = None,
    novel: list[str] | None = None,
    annotated_images: bool = False,
) -> str:
    """AP50 of anybody's detections, as a table: pycocotools' numbers, by class and by split.

    Args:
        truth: COCO json.
        detections: COCO's results format: a list of image_id, category_id, bbox xywh and score;
            those of other classes than the evaluated ones count for nothing.
        base: the base classes; without, those whose ``split`` says so, or all that are not novel.
        novel: the novel classes; without, those whose ``split`` says so.
        annotated_images: leave out the images without any of the classes, as OV-COCO does, and
            this workflow; otherwise every image counts, as with pycocotools.

    Raises:
        LpovodError: if the split is not known, or a detection is not of the format or of an image
            that is not listed.
    """
    data = read_dataset(truth)
    splits = _splits(data, base, novel)
    results = _read_results(detections, data, set(data.category_ids([*splits])))
    with without_garbage_collection():
        by_class = ap50_by_class(ground_truth(data, [*splits], not annotated_images), results)
    named = {s: [n for n, split in splits.items() if split == s] for s in ("base", "novel")}
    means = ap50(by_class, named["base"], named["novel"])
    rows = [(f"{'class':24}{'split':>8}", "AP50")]
    rows += [
        (f"{name:24}{split:>8}", f"{by_class[name]:.2f}" if name in by_class else "-")
        for name, split in splits.items()
    ]
    rows += [
        (f"{'mean of ' + split:32}", "-" if means[split] is None else f"{means[split]:.2f}")
        for split in ("novel", "base", "all")
    ]
    return "\n".join(f"{left}{right:>8}" for left, right in rows)


def _splits(data: CocoDataset, base: list[str] | None, novel: list[str] | None) -> dict[str, str]:
    """The evaluated classes with their split, in the order of their ids."""
    data.category_ids([*(base or []), *(novel or [])])
    found = {}
    for _, category in sorted(data.categories.items()):
        name = category["name"]
        if novel is None and base is None:
            split = SPLITS.get(category.get("split"))
            if split is None:
                raise LpovodError(
                    f"{data.path}: category {name!r} has the split {category.get('split')!r}, "
                    'expected "base" or "novel". Write it there, or name the novel classes: '
                    "--novel CLASS CLASS ... (and --base, if not all others are base classes)"
                )
        elif novel is not None and name in novel:
            split = "novel"
        else:
            split = "base" if base is None or name in base else None
        if split:
            found[name] = split
    return found


def _read_results(path: Path, data: CocoDataset, categories: set[int]) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise LpovodError(f"{path} is not in COCO's results format, a list of detections")
    kept = []
    for number, item in enumerate(content):
        try:
            image_id, category, score = item["image_id"], item["category_id"], item["score"]
            x, y, width, height = item["bbox"]
            finite = math.isfinite(x + y + width + height + score) and min(width, height) >= 0
        except (KeyError, TypeError, ValueError):
            raise LpovodError(
                f"{path}: detection {number} is not of the form image_id, category_id, "
                "bbox [x, y, width, height], score"
            ) from None
        if not finite:
            raise LpovodError(f"{path}: detection {number}: bbox or score is no possible value")
        if image_id not in data.images:
            raise LpovodError(f"{path}: detection {number}: {data.path} has no image {image_id}")
        if category in categories:
            kept.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [x, y, width, height],
                    "score": score,
                }
            )
    return kept
