"""Time of AP50 at COCO's scale: pycocotools and this project, on the same generated detections.

Run as ``python -m benchmarks.evaluation``. pycocotools is measured twice: at an IoU of 0.5 only,
which is the work that this project does, and with its default twelve numbers. Ends with one JSON
line; `ratio_to_reference` refers to the former.
"""

import argparse
import contextlib
import io
import json
import time

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lpovod.formats.coco import CocoDataset
from lpovod.measures.average_precision import ap50_by_class, coco_ground_truth

CLASSES, OBJECTS, DETECTIONS = 65, 7, 100


def made_up(images: int) -> tuple[dict, list[dict]]:
    """Annotations and noisy detections with as many objects per image as COCO has."""
    draw = np.random.default_rng(0)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        corner, size = draw.uniform(0, 400, (OBJECTS, 2)), draw.uniform(10, 200, (OBJECTS, 2))
        boxes, named = np.hstack([corner, size]), draw.integers(1, CLASSES + 1, OBJECTS)
        for box, category in zip(boxes.tolist(), named.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        of = draw.integers(0, OBJECTS, DETECTIONS)
        guesses = np.abs(boxes[of] + draw.normal(0, 15, (DETECTIONS, 4)))
        right = draw.random(DETECTIONS) < 0.5
        guessed = np.where(right, named[of], draw.integers(1, CLASSES + 1, DETECTIONS))
        for box, category, score in zip(
            guesses.tolist(), guessed.tolist(), draw.random(DETECTIONS).tolist(), strict=True
        ):
            results.append(
                {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
            )
    return {
        "images": [
            {"id": i, "file_name": "", "width": 640, "height": 640} for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c), "split": "base"} for c in range(1, CLASSES + 1)],
    }, results


def reference(content: dict, results: list[dict], twelve_numbers: bool) -> dict[str, float]:
    """pycocotools' AP50 by class."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        if not twelve_numbers:
            evaluator.params.iouThrs = np.array([0.5])
            evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
            evaluator.params.maxDets = [100]
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][0, :, :, 0, -1]
    return {str(c): 100 * precision[:, k].mean() for k, c in enumerate(evaluator.params.catIds)}


def ours(content: dict, results: list[dict]) -> dict[str, float]:
    annotations = {i["id"]: [] for i in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    images, categories = ({i["id"]: i for i in content[k]} for k in ("images", "categories"))
    data = CocoDataset("made up", images, annotations, categories)
    return ap50_by_class(coco_ground_truth(data, list(images)), results)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=1000, help="COCO's validation split has 5000")
    images = parser.parse_args().images
    seconds, values = {}, {}
    for name, run in (
        ("pycocotools, by default", lambda *files: reference(*files, True)),
        ("pycocotools, IoU 0.5 only", lambda *files: reference(*files, False)),
        ("ours", ours),
    ):
        files = made_up(images)  # again, since the evaluators modify it
        start = time.process_time()
        values[name] = run(*files)
        seconds[name] = time.process_time() - start
        print(f"{name:26} {seconds[name]:7.2f} s of CPU time")
    expected, actual = values["pycocotools, IoU 0.5 only"], values["ours"]
    assert max(abs(actual[c] - expected[c]) for c in expected) < 1e-6
    ratios = {k: seconds["ours"] / seconds[k] for k in seconds}
    print(
        json.dumps(
            {
                "ratio_to_reference": round(ratios["pycocotools, IoU 0.5 only"], 3),
                "ratio_to_twelve_numbers": round(ratios["pycocotools, by default"], 3),
                "images": images,
            }
        )
    )


if __name__ == "__main__":
    main()
