"""Scores by hand, detections by hand, and what mistakes are called."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards

from lpovod.artifacts import identity, write_tensors
from lpovod.config import EvaluationSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, Detections, read_dataset
from lpovod.formats.regions import write_regions
from lpovod.measures.ablations import Variant, variants
from lpovod.measures.mistakes import count_mistakes
from lpovod.scoring import Scores, detect, final_scores
from lpovod.stages.evaluation import evaluate


def scores(**changed) -> Scores:
    """Two regions, one base class and one novel class."""
    values = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]),
        "refined": torch.tensor([[0.0, 0, 12, 12], [20, 20, 32, 32]]),
        "objectness": torch.tensor([0.81, 0.25]),
        "sigmoid": torch.tensor([[0.9, 0.2], [0.1, 0.6]]),
        "cosine": torch.tensor([[0.30, 0.20], [0.20, 0.25]]),
        "clip": torch.tensor([[0.1, 0.2], [0.3, 0.1]]),
    }
    return Scores(**values | changed)


def test_scores_follow_the_formula():
    found = final_scores(scores(), [1, 0.8], Variant(alpha=0, beta=0.8, temperature=0.01))
    for region, (cosine, sigmoid, objectness) in enumerate(
        [((0.30, 0.20), (0.9, 0.2), 0.81), ((0.20, 0.25), (0.1, 0.6), 0.25)]
    ):
        powers = [math.exp(c / 0.01) for c in cosine]
        clip = [p / sum(powers) for p in powers]
        base = math.sqrt(sigmoid[0] * objectness)
        novel = math.sqrt(clip[1] ** 0.2 * sigmoid[1] ** 0.8 * objectness)
        assert found[region].tolist() == pytest.approx([base, novel], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "novel"),
    [
        ("without_probe", lambda clip, sigmoid, objectness: clip * objectness),
        ("without_clip_head", lambda clip, sigmoid, objectness: sigmoid * objectness),
        ("without_objectness", lambda clip, sigmoid, objectness: clip**0.2 * sigmoid**0.8),
    ],
)
def test_each_ablation_takes_one_thing_away(name, novel):
    settings = EvaluationSettings()
    variant = variants(settings, 0.1, True)[name]
    found = final_scores(scores(), variant.probe_weights(1, 1), variant)[1, 1]
    clip = math.exp(2.5) / (math.exp(2.5) + math.exp(2.0))
    assert float(found) == pytest.approx(math.sqrt(novel(clip, 0.6, 0.25)), rel=1e-5)


def test_true_clip_replaces_the_image_head():
    rows = variants(EvaluationSettings(), 0.1, True)
    swapped = scores(cosine=scores().clip)
    assert torch.equal(
        final_scores(scores(), [1, 0.8], rows["true_clip_with_probe"]),
        final_scores(swapped, [1, 0.8], rows["full"]),
    )
    assert "true_clip_with_probe" not in variants(EvaluationSettings(), 0.1, False)


def test_detections_are_thresholded_suppressed_within_a_class_and_best_first():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    one = scores(
        boxes=boxes,
        refined=boxes,
        objectness=torch.ones(3),
        sigmoid=torch.tensor([[0.81, 0.49], [0.64, 0.36], [0.001, 0.001]]),
        cosine=torch.zeros(3, 2),
    )
    box, score, category = detect(one, [1, 1], [7, 9], Variant(0, 1, 1.0), EvaluationSettings())
    assert category.tolist() == [7, 9]  # the second region is suppressed in both classes
    assert score.tolist() == pytest.approx([0.9, 0.7])
    assert box.tolist() == [boxes[0].tolist()] * 2


def test_raw_boxes_can_be_asked_for():
    raw = detect(scores(), [1, 1], [7, 9], Variant(0, 1, 1.0, refined=False), EvaluationSettings())
    assert {tuple(b) for b in raw[0].tolist()} <= {(0, 0, 10, 10), (20, 20, 30, 30)}


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        ([0, 0, 40, 40], "correct"),
        ([10, 10, 25, 25], "too tight"),
        ([0, 0, 80, 80], "too loose"),
        ([20, 20, 60, 60], "shifted"),
        ([0, 0, 150, 45], "group"),
        ([0, 100, 40, 140], "other class"),
        ([160, 160, 170, 170], "background"),
    ],
)
def test_a_mistake_has_a_name(tmp_path, box, kind):
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [110, 0, 40, 40]},
        {"id": 3, "image_id": 1, "category_id": 2, "bbox": [0, 100, 40, 40]},
    ]
    data = CocoDataset(
        tmp_path,
        {1: {"file_name": "", "width": 200, "height": 200}},
        {1: annotations},
        {1: {"name": "a"}, 2: {"name": "b"}},
    )
    detections = {1: (np.array([box], np.float32), np.array([0.9]), np.array([1]))}
    assert count_mistakes(data, detections, [1])[kind] == 100
    twice = {1: (np.array([box] * 2, np.float32), np.array([0.9, 0.8]), np.array([1, 1]))}
    expected = {"correct": 50, "duplicate": 50} if kind == "correct" else {kind: 100}
    assert {k: v for k, v in count_mistakes(data, twice, [1]).items() if v} == expected


def of_corners(box, other) -> float:
    """IoU of two boxes, number by number."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    return shared / (area(box) + area(other) - shared)


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def counted_by_hand(data: CocoDataset, detections: Detections, classes: list[int]) -> dict:
    """Percent of each kind of mistake, from the definitions, detection by detection."""
    objects = [
        (image_id, a["category_id"], (x, y, x + w, y + h))
        for image_id in data.images
        for a in data.annotations[image_id]
        for x, y, w, h in [a["bbox"]]
    ]
    kinds = []
    for category in classes:
        ranked = [
            (score, image_id, box.tolist())
            for image_id, of_image in detections.items()
            for box, score, label in zip(*of_image, strict=True)
            if label == category
        ]
        ranked.sort(key=lambda d: (-d[0], d[1], d[2]))
        detected = set()
        for _, image_id, box in ranked[: sum(o[1] == category for o in objects)]:
            same = [(n, o[2]) for n, o in enumerate(objects) if o[:2] == (image_id, category)]
            others = [o[2] for o in objects if o[0] == image_id and o[1] != category]
            kinds.append(kind_by_hand(box, same, others, detected))
    return {kind: 100 * kinds.count(kind) / max(1, len(kinds)) for kind in kinds}


def kind_by_hand(box, same, others, detected: set) -> str:
    placed = [(of_corners(box, o), n) for n, o in same if of_corners(box, o) >= 0.5]
    if placed:
        free = [(iou, n) for iou, n in placed if n not in detected]
        detected.update([max(free)[1]] if free else [])
        return "correct" if free else "duplicate"

    def shared(o) -> float:
        iou = of_corners(box, o)
        return iou * (area(box) + area(o)) / (1 + iou)

    if sum(shared(o) / area(o) >= 0.7 for _, o in same) >= 2:
        return "group"
    if any(shared(o) / area(box) >= 0.9 for _, o in same):
        return "too tight"
    if any(shared(o) / area(o) >= 0.9 for _, o in same):
        return "too loose"
    if any(of_corners(box, o) >= 0.1 for _, o in same):
        return "shifted"
    return "other class" if any(of_corners(box, o) >= 0.5 for o in others) else "background"


@pytest.mark.parametrize("seed", range(4))
def test_mistakes_are_counted_by_their_definitions(tmp_path, seed):
    random = np.random.default_rng(seed)
    annotations, detections = {}, {}
    for image_id in (4, 9, 2, 30, 17, 8):
        boxes = boxes_at_random(random, 7)
        annotations[image_id] = [
            {"id": 10 * image_id + n, "image_id": image_id, "category_id": int(c), "bbox": b}
            for n, (b, c) in enumerate(zip(as_bbox(boxes), random.integers(1, 4, 7), strict=True))
        ]
        # Half of the detections near an object, scores with ties.
        near = boxes.repeat(6, axis=0) + random.normal(0, 5, (42, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 2)
        drawn = np.concatenate([near, boxes_at_random(random, 42)]).astype(np.float32)
        scores = np.round(random.uniform(0, 1, 84), 1).astype(np.float32)
        detections[image_id] = (drawn, scores, random.integers(1, 4, 84))
    images = {i: {"file_name": "", "width": 100, "height": 100} for i in annotations}
    names = {c: {"name": str(c)} for c in (1, 2, 3)}
    data = CocoDataset(tmp_path, images, annotations, names)
    for classes in ([1, 3], [2], []):
        counted = {k: v for k, v in count_mistakes(data, detections, classes).items() if v}
        assert counted == pytest.approx(counted_by_hand(data, detections, classes), abs=0.006)
    assert len(counted_by_hand(data, detections, [1, 2, 3])) > 4


def boxes_at_random(random: np.random.Generator, count: int) -> np.ndarray:
    low = random.uniform(0, 60, (count, 2))
    return np.hstack([low, low + random.uniform(5, 40, (count, 2))])


def as_bbox(boxes: np.ndarray) -> list[list[float]]:
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.tolist()]


BASE, NOVEL = ["dog", "cat"], ["owl", "bee", "ant"]
COUNTS = {12: 7, 3: 0, 40: 9, 5: 1, 8: 12}


class Files:
    """What the stage reads, and the dense form of it."""

    def __init__(self, folder: Path):
        random = np.random.default_rng(0)
        self.folder, self.boxes, self.rows, self.clip = folder, {}, {}, {}
        self.names = [*BASE, *sorted(NOVEL)]
        self.ids = {name: 3 * n + 2 for n, name in enumerate(["ant", *BASE, "stop", "owl", "bee"])}
        annotations = [
            {"id": 100 * i + n, "image_id": i, "category_id": c, "bbox": b, "iscrowd": 0}
            | {"area": b[2] * b[3]}
            for i in COUNTS
            for n, (c, b) in enumerate(
                zip(self.ids.values(), as_bbox(boxes_at_random(random, 6)), strict=True)
            )
        ]
        images = [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in COUNTS]
        categories = [{"id": c, "name": n} for n, c in self.ids.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        self.dataset = folder / "val.json"
        self.dataset.write_text(json.dumps(content))
        self.weights = {n: random.normal(0, 1, 6).astype(np.float32) for n in self.names}
        self.text = {n: unit(random.normal(0, 1, 4)).astype(np.float32) for n in self.names}
        prototypes = np.stack([self.weights[n] for n in BASE])
        write_tensors(
            folder / "detector",
            {"prototypes": prototypes},
            identity("base_detector") | {"classes": BASE},
        )
        write_tensors(
            folder / "probe",
            {n: self.weights[n] for n in NOVEL},
            identity("linear_probe", detector=folder / "detector"),
        )
        clip = identity("text_embeddings", clip_weights="w" * 64, clip_architecture="a")
        for split, names in (("base", BASE), ("novel", NOVEL)):
            vectors = {n: self.text[n] for n in names}
            write_tensors(folder / split, vectors, clip | {"logit_scale": 20.0})
        self.objectness, made_from = {}, {"dataset": self.dataset, "detector": folder / "detector"}
        for i, n in COUNTS.items():
            self.boxes[i] = boxes_at_random(random, n).astype(np.float32)
            self.objectness[i] = random.uniform(0, 1, n).astype(np.float32)
            self.rows[i] = {
                "feature": random.normal(0, 1, (n, 6)).astype(np.float16),
                "embedding": unit(random.normal(0, 1, (n, 4))).astype(np.float16),
                "refined": boxes_at_random(random, n).astype(np.float32),
            }
            self.clip[i] = unit(random.normal(0, 1, (n, 4))).astype(np.float16)
        with write_regions(folder / "features", identity("region_features", **made_from)) as writer:
            for i in COUNTS:
                writer.add(i, self.boxes[i], self.objectness[i], **self.rows[i])
        self.shards = write_shards(folder, self.dataset, self.clip, self.boxes, self.objectness)

    def evaluate(self, settings: EvaluationSettings, workers: int = 0) -> tuple[dict, list]:
        """The metrics and the detections."""
        outputs = [self.folder / f"{name}.json" for name in ("metrics", "detections", "truth")]
        evaluate(
            self.dataset,
            [self.folder / "features"],
            self.folder / "detector",
            self.folder / "probe",
            [self.folder / "base", self.folder / "novel"],
            self.shards if settings.clip_on_crops else [],
            settings,
            *outputs,
            workers,
        )
        return json.loads(outputs[0].read_text()), json.loads(outputs[1].read_text())

    def dense(self, settings: EvaluationSettings) -> Detections:
        """Detections of all images from one matrix of scores, in float64 and box by box."""
        images = [i for i, n in COUNTS.items() for _ in range(n)]
        feature, embedding, refined = (
            np.concatenate([self.rows[i][k] for i in COUNTS]).astype(float)
            for k in ("feature", "embedding", "refined")
        )
        objectness = np.concatenate([self.objectness[i] for i in COUNTS]).astype(float)
        weights, text = (
            np.stack([of[n] for n in self.names]).astype(float) for of in (self.weights, self.text)
        )
        probe = 1 / (1 + np.exp(-feature @ weights.T))
        clip = np.exp(embedding @ text.T * 20)
        clip /= clip.sum(axis=1, keepdims=True)
        power = np.where(np.arange(5) < 2, 1 - settings.alpha, settings.beta)
        score = np.sqrt(clip ** (1 - power) * probe**power * objectness[:, None])
        detections = {}
        for image_id in COUNTS:
            kept = []
            for k in range(5):
                rows = [
                    n
                    for n in np.argsort(-score[:, k])
                    if images[n] == image_id and score[n, k] > settings.score_threshold
                ]
                taken = []
                for n in rows:
                    if all(of_corners(refined[n], refined[m]) <= settings.nms for m in taken):
                        taken.append(n)
                kept += [(score[n, k], n, self.ids[self.names[k]]) for n in taken]
            kept = sorted(kept, reverse=True)[: settings.per_image]
            detections[image_id] = (
                np.array([refined[n] for _, n, _ in kept]).reshape(-1, 4),
                np.array([s for s, *_ in kept]),
                np.array([c for *_, c in kept], int),
            )
        return detections


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stage_detects_what_a_dense_computation_detects(tmp_path, workers):
    files, rows = Files(tmp_path), {}
    data = read_dataset(files.dataset)
    novel = [files.ids[n] for n in NOVEL]
    for row, beta in (("full", 0.8), ("without_probe", 0.0)):
        settings = EvaluationSettings(alpha=0.1, beta=beta, score_threshold=0.2, per_image=8)
        metrics, detections = files.evaluate(settings, workers)
        expected = files.dense(settings)
        assert sum(len(s) for _, s, _ in expected.values()) == len(detections) > 20
        for image_id, (boxes, scores, categories) in expected.items():
            found = [d for d in detections if d["image_id"] == image_id]
            assert [d["category_id"] for d in found] == categories.tolist()
            assert [d["score"] for d in found] == pytest.approx(scores.tolist(), rel=1e-3)
            corners = np.array([d["bbox"] for d in found]).reshape(-1, 4)
            corners[:, 2:] += corners[:, :2]
            np.testing.assert_allclose(corners, boxes, atol=0.01)
        mistakes = {k: v for k, v in metrics["novel_mistakes"]["full"].items() if v}
        assert mistakes == pytest.approx(counted_by_hand(data, expected, novel), abs=0.006)
        rows[row] = (metrics["rows"]["full"], metrics["novel_mistakes"]["full"])
        if row == "full":
            of_variant = (
                metrics["rows"]["without_probe"],
                metrics["novel_mistakes"]["without_probe"],
            )
    assert rows["without_probe"] == of_variant != rows["full"]


def test_workers_change_no_bit(tmp_path):
    files = Files(tmp_path)
    files.evaluate(EvaluationSettings())
    alone = [(tmp_path / f"{n}.json").read_bytes() for n in ("metrics", "detections", "truth")]
    files.evaluate(EvaluationSettings(), workers=2)
    assert alone == [
        (tmp_path / f"{n}.json").read_bytes() for n in ("metrics", "detections", "truth")
    ]


def test_embeddings_of_other_boxes_are_refused(tmp_path):
    files = Files(tmp_path)
    moved = {i: boxes + (i == 40) for i, boxes in files.boxes.items()}
    files.shards = write_shards(tmp_path, files.dataset, files.clip, moved, files.objectness)
    with pytest.raises(LpovodError, match="image 40: its region embeddings .* different boxes"):
        files.evaluate(EvaluationSettings())
