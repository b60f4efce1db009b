"""AP50 against pycocotools."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lpovod.apps.score import score_table
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import coco_results, read_dataset
from lpovod.measures.average_precision import (
    ap50,
    ap50_by_class,
    ap50_of_detections,
    coco_ground_truth,
    images_of,
)

ORACLE = Path("../shared/data/coco_eval_oracle")


def reference(truth: Path, results: list[dict], images: list[int] | None = None) -> dict:
    """AP50 by class name, in percent, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        if images is not None:
            evaluator.params.imgIds = images
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][0, :, :, 0, 2]
    names = [coco.cats[c]["name"] for c in evaluator.params.catIds]
    return {
        name: 100 * precision[:, k].mean() for k, name in enumerate(names) if precision[0, k] > -1
    }


@pytest.fixture()
def made_up(tmp_path):
    """Annotations with crowds, ties, an empty class and empty images; noisy detections."""
    draw = np.random.default_rng(0)
    names = ["cat", "dog", "cow", "nothing"]
    annotations, results = [], []
    for image_id in range(1, 31):
        for _ in range(int(draw.integers(0, 6))):
            xy, wh = draw.uniform(0, 60, 2), draw.uniform(10, 40, 2)
            category = int(draw.integers(1, 4))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [*map(float, xy), *map(float, wh)],
                    "area": float(wh.prod()),
                    "iscrowd": int(draw.random() < 0.1),
                }
            )
            for _ in range(int(draw.integers(0, 4))):
                box = np.concatenate([xy, wh]) + draw.normal(0, 4, 4)
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if draw.random() < 0.8 else 4,
                        "bbox": [*map(float, box[:2]), *map(float, abs(box[2:]))],
                        "score": float(draw.integers(1, 10) / 10),
                    }
                )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 100} for i in range(1, 31)
        ],
        "annotations": annotations,
        "categories": [
            {"id": i, "name": name, "split": "novel" if i == 3 else "base"}
            for i, name in enumerate(names, 1)
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path, results, names


def annotated(data, names):
    """The images that have an annotation of these classes, as OV-COCO's protocol measures them."""
    data = data.of_classes(names, [])
    return coco_ground_truth(data, images_of(data, "annotated_images"))


def test_equals_pycocotools(made_up):
    path, results, names = made_up
    found = ap50_by_class(annotated(read_dataset(path), names), results)
    expected = reference(path, results)
    assert set(found) == set(expected) == {"cat", "dog", "cow"}
    assert found == expected


def test_classes_that_are_not_evaluated_leave_no_trace(made_up):
    path, results, _ = made_up
    content = json.loads(path.read_text())
    kept = [a for a in content["annotations"] if a["category_id"] == 1]
    images = sorted({a["image_id"] for a in kept})
    found = ap50_by_class(annotated(read_dataset(path), ["cat"]), results)
    assert found == {"cat": reference(path, results, images)["cat"]}


@pytest.mark.parametrize("grid", [1, 20])
def test_crowded_images_give_pycocotools_numbers_bit_for_bit(tmp_path, grid):
    """Ties of scores and overlaps, crowds, more than 100 detections, images in any order."""
    draw = np.random.default_rng(grid)

    def box() -> list[float]:
        values = np.concatenate([draw.uniform(0, 60, 2), draw.uniform(20, 60, 2)])
        return (np.ceil(values / grid) * grid).tolist()

    images = draw.permutation(12).tolist()
    annotations = [
        {"id": n + 1, "image_id": int(draw.integers(12)), "category_id": int(draw.integers(1, 4))}
        | {"bbox": box(), "area": 100.0, "iscrowd": int(draw.random() < 0.2)}
        for n in range(120)
    ]
    results = [
        {"image_id": int(draw.integers(12)), "category_id": int(draw.integers(1, 4))}
        | {"bbox": box(), "score": round(float(draw.random()), 2)}
        for n in range(5000)
    ]
    content = {
        "images": [{"id": i, "file_name": "", "width": 200, "height": 200} for i in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i), "split": "base"} for i in (3, 1, 2)],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    data = read_dataset(path)
    found = ap50_by_class(coco_ground_truth(data, list(data.images)), results)
    assert found == reference(path, results)
    assert min(found.values()) > 0


@pytest.mark.skipif(not ORACLE.exists(), reason="needs the evaluator's reference files")
def test_the_hundred_images_of_the_reference():
    truth = ORACLE / "instances_val2014_100.json"
    results = json.loads((ORACLE / "instances_val2014_fakebbox100_results.json").read_text())
    data = read_dataset(truth)
    names = [c["name"] for c in data.categories.values()]
    found = ap50_by_class(annotated(data, names), results)
    assert np.mean(list(found.values())) == pytest.approx(69.7, abs=0.05)
    assert found == reference(truth, results)


def test_no_detections_at_all(made_up):
    path, _, names = made_up
    found = ap50_by_class(annotated(read_dataset(path), names), [])
    assert found == {"cat": 0, "dog": 0, "cow": 0}


def test_detections_in_memory_are_measured_like_those_in_a_file(made_up):
    path, results, names = made_up
    truth = annotated(read_dataset(path), names)
    detections = {}
    for image_id in {r["image_id"] for r in results}:
        of_image = [r for r in results if r["image_id"] == image_id]
        x, y, width, height = np.array([r["bbox"] for r in of_image], np.float32).T
        detections[image_id] = (
            np.stack([x, y, x + width, y + height], axis=1),
            np.array([r["score"] for r in of_image], np.float32),
            np.array([r["category_id"] for r in of_image]),
        )
    expected = ap50_by_class(truth, coco_results(detections))
    assert ap50_of_detections(truth, detections) == expected
    assert 0 < expected["cow"] < 100
    assert ap50_of_detections(truth, {}) == {"cat": 0, "dog": 0, "cow": 0}


def test_means_over_the_split():
    by_class = {"cat": 10.0, "dog": 20.0, "cow": 60.0}
    assert ap50(by_class, ["cat", "dog"], ["cow"]) == {"novel": 60, "base": 15, "all": 30}
    assert ap50(by_class, ["cat"], ["nothing"])["novel"] is None


def test_results_are_xywh():
    boxes = np.array([[1, 2, 4, 8]], np.float32)
    (found,) = coco_results({7: (boxes, np.array([0.5]), np.array([3]))})
    assert found == {"image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 6], "score": 0.5}


def printed(table: str) -> dict[str, str]:
    """The last column by the columns before it."""
    return {line[:32].strip(): line[32:].strip() for line in table.splitlines()}


@pytest.fixture()
def submitted(made_up, tmp_path):
    """The made-up detections as a file, some of them on images without any object."""
    path, results, names = made_up
    content = json.loads(path.read_text())
    empty = {i["id"] for i in content["images"]} - {a["image_id"] for a in content["annotations"]}
    assert empty
    results += [
        {"image_id": i, "category_id": c, "bbox": [5.0, 5.0, 20.0, 20.0], "score": 0.95}
        for i in sorted(empty)
        for c in (1, 2, 3)
    ]
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(results))
    return path, file, results


def test_any_detector_s_results_get_pycocotools_numbers(submitted):
    path, file, results = submitted
    expected, found = reference(path, results), printed(score_table(path, file))
    assert {
        n: found[f"{n:24}{s:>8}".strip()]
        for n, s in (("cat", "base"), ("dog", "base"), ("cow", "novel"))
    } == {name: f"{value:.2f}" for name, value in expected.items()}
    assert found[f"{'nothing':24}{'base':>8}"] == "-"
    assert found["mean of novel"] == f"{expected['cow']:.2f}"
    assert float(found["mean of base"]) == pytest.approx(
        (expected["cat"] + expected["dog"]) / 2, abs=0.006
    )
    # Without the empty images, as OV-COCO has it, their false positives count for nothing.
    some = printed(score_table(path, file, protocol="annotated_images"))
    assert float(some["mean of all"]) > float(found["mean of all"])


def test_a_split_is_named_where_the_categories_have_none(submitted):
    path, file, _ = submitted
    by_file = score_table(path, file)
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["split"] = {"base": "seen", "novel": "unseen"}[category["split"]]
    path.write_text(json.dumps(content))
    assert score_table(path, file) == by_file  # as the original's files say it
    for category in content["categories"]:
        del category["split"]
    path.write_text(json.dumps(content))
    with pytest.raises(LpovodError, match="category 'cat' has the split None.*--novel CLASS"):
        score_table(path, file)
    assert score_table(path, file, novel=["cow"]) == by_file
    few = printed(score_table(path, file, base=["dog"], novel=["cow"]))
    assert not any(line.startswith("cat") for line in few)
    with pytest.raises(LpovodError, match="no category 'unicorn'"):
        score_table(path, file, novel=["unicorn"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 99}, "detection 0: .* has no image 99"),
        ({"bbox": [1, 2, 3]}, "detection 0 is not of the form"),
        ({"score": "high"}, "detection 0 is not of the form"),
        ({"score": float("nan")}, "detection 0: impossible value of bbox or score"),
        ({"bbox": [1, 2, -3, 4]}, "detection 0: impossible value of bbox or score"),
    ],
)
def test_detections_of_another_form_are_refused(submitted, change, message):
    path, file, results = submitted
    file.write_text(json.dumps([results[0] | change, *results[1:]]))
    with pytest.raises(LpovodError, match=message):
        score_table(path, file)


def test_the_command_line(submitted):
    path, file, _ = submitted
    command = [sys.executable, "-m", "lpovod.apps.main", "score", "--ground-truth", str(path)]
    done = subprocess.run(
        [*command, "--detections", str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == score_table(path, file) + "\n"
    done = subprocess.run([*command, "--detections", "none.json"], capture_output=True, text=True)
    assert done.returncode != 0 and "none.json: no such file" in done.stderr
