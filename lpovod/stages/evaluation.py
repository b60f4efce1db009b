"""Stage `evaluation`: detections, AP50, and the ablations that explain it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from lpovod.artifacts import check_made_from, sha256, write_json
from lpovod.config import EvaluationSettings
from lpovod.formats.coco import (
    Detected,
    Detections,
    check_same_images,
    coco_results,
    read_dataset,
)
from lpovod.formats.regions import RegionStore, open_shards
from lpovod.measures.ablations import Variant, table, variants
from lpovod.measures.average_precision import (
    GroundTruth,
    ap50,
    ap50_of_detections,
    coco_ground_truth,
    images_of,
)
from lpovod.measures.mistakes import count_mistakes
from lpovod.measures.recall import recall_by_split
from lpovod.progress import log, progress
from lpovod.scoring import (
    ClassWeights,
    Scores,
    best_detections,
    final_scores,
    join,
    read_class_weights,
    score_regions,
)

TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Temperatures to choose from for the row of the CLIP head at its best temperature."""

SCORES_AT_ONCE = 1 << 14
"""Small images are scored together: torch's calls take longer than the arithmetic."""


def evaluate(
    dataset: Path,
    region_features: Path,
    detector: Path,
    linear_probe: Path,
    text_embeddings: list[Path],
    region_embeddings: list[Path],
    settings: EvaluationSettings,
    metrics: Path,
    detections: Path,
    ground_truth: Path,
    workers: int = 0,
) -> None:
    """Measure AP50 of the method and of its ablations.

    Args:
        dataset: json of the split, with all classes annotated.
        region_features: region store with the features of the split's proposals.
        detector: the base detector, for the prototypes of its base classes.
        linear_probe: weights of the novel classes.
        text_embeddings: files that together hold all base and novel classes.
        region_embeddings: CLIP's embeddings of the same regions, for comparison; may be empty.
        settings: settings of this stage.
        metrics: output json, in percent.
        detections: output json, COCO results of the full method on all images of the split.
        ground_truth: output json, COCO's: the images and annotations that AP was measured on.
        workers: number of processes that measure in parallel; 0 measures in this process.
    """
    data = read_dataset(dataset)
    features = RegionStore(region_features, "region_features")
    check_same_images(region_features, features.identity, data)
    check_made_from(region_features, features.identity, "detector", detector)
    embeddings = open_shards(region_embeddings) if region_embeddings else None
    classes = read_class_weights(detector, linear_probe, text_embeddings, settings)
    everything, data = data, data.of_classes(classes.base, classes.novel)
    category_ids = data.category_ids(classes.names)
    measured_images = images_of(data, settings.protocol)
    truth = coco_ground_truth(data, measured_images)
    write_json(ground_truth, truth.content)
    rows = variants(settings, classes.temperature, embeddings is not None)
    heads = [replace(rows["without_probe"], temperature=t) for t in TEMPERATURES]
    ways = [*rows.values(), *heads]
    detected = _detect_all(features, embeddings, classes, category_ids, ways, settings, workers)
    results = _measure_all(truth, classes, detected, workers)
    measured = dict(zip(rows, results, strict=False))
    by_row = {name: means for name, (_, means) in measured.items()}
    at_temperature = [means for _, means in results[len(rows) :]]
    by_row["without_probe_best_temperature"] = _best_temperature(
        dict(zip(TEMPERATURES, at_temperature, strict=True))
    )
    content: dict[str, Any] = {"rows": by_row}
    content["per_class"] = {k: round(v, 2) for k, v in measured["full"][0].items()}
    annotated = truth.content["annotations"]
    novel_ids = set(data.category_ids(classes.novel))
    content["evaluated"] = {
        "protocol": settings.protocol,
        "images": len(measured_images),
        "split_images": len(data.images),
        "boxes": len(annotated),
        "novel_boxes": sum(a["category_id"] in novel_ids for a in annotated),
    }
    content["temperature"] = classes.temperature
    content["classes"] = {"base": classes.base, "novel": classes.novel}
    boxes = {i: features.read(i, []).box for i in data.images}
    content["proposal_recall"] = recall_by_split(data, boxes)
    detections_of = dict(zip(rows, detected, strict=False))
    content["novel_mistakes"] = {
        name: count_mistakes(everything, detections_of[name], data.category_ids(classes.novel))
        for name in ("full", "without_probe", "without_clip_head")
    }
    made_from = {
        "dataset": sha256(dataset),
        "region_features": sha256(region_features),
        "linear_probe": sha256(linear_probe),
    }
    content["made_from"] = made_from
    write_json(detections, coco_results(detections_of["full"]))
    write_json(metrics, content)
    log.info(table(content))


def _detect_all(
    features: RegionStore,
    embeddings: RegionStore | None,
    classes: ClassWeights,
    category_ids: list[int],
    ways: list[Variant],
    settings: EvaluationSettings,
    workers: int,
) -> list[Detections]:
    """The detections of each variant; scores are made for a few images at a time, and not kept."""
    splits = len(classes.base), len(classes.novel)
    weights = [torch.tensor(way.probe_weights(*splits)) for way in ways]
    columns = torch.tensor(category_ids)

    def of_images(image_ids: list[int]) -> list[list[Detected]]:
        every = [
            score_regions(features.read(i), embeddings.read(i) if embeddings else None, classes)
            for i in image_ids
        ]
        counts, joined = [len(scores.boxes) for scores in every], join(every)
        return [of_variant(joined, counts, *pair) for pair in zip(ways, weights, strict=True)]

    def of_variant(
        joined: Scores, counts: list[int], way: Variant, probe_weights: torch.Tensor
    ) -> list[Detected]:
        score = final_scores(joined, probe_weights, way).split(counts)
        boxes = (joined.refined if way.refined else joined.boxes).split(counts)
        of_each = zip(score, boxes, strict=True)
        return [best_detections(*of_image, columns, settings) for of_image in of_each]

    detected: list[Detections] = [{} for _ in ways]
    groups = list(_groups(features, len(classes.names)))
    with progress(None, "detections", "image", sum(map(len, groups))) as bar:
        results = in_processes(of_images, groups, workers)
        for image_ids, of_ways in zip(groups, results, strict=True):
            for of_way, of_group in zip(detected, of_ways, strict=True):
                of_way.update(zip(image_ids, of_group, strict=True))
            bar.update(len(image_ids))
    return detected


def _groups(features: RegionStore, classes: int) -> Iterator[list[int]]:
    """Images whose scores are made together, up to a number of scores."""
    group: list[int] = []
    scores = 0
    for image_id in filter(features.count, sorted(features.image_ids)):
        scores += features.count(image_id) * classes
        if group and scores > SCORES_AT_ONCE:
            yield group
            group, scores = [], features.count(image_id) * classes
        group.append(image_id)
    if group:
        yield group


def _measure_all(
    truth: GroundTruth, classes: ClassWeights, detected: list[Detections], workers: int
) -> list[tuple[dict[str, float], dict[str, float | None]]]:
    """AP50 by class, and its means, of each variant."""

    def of_variant(number: int) -> tuple[dict[str, float], dict[str, float | None]]:
        by_class = ap50_of_detections(truth, detected[number])
        return by_class, ap50(by_class, classes.base, classes.novel)

    results = in_processes(of_variant, list(range(len(detected))), workers)
    return list(progress(results, "AP50", "variant"))


def in_processes(work: Callable[[Any], Any], items: list[Any], workers: int) -> Iterable[Any]:
    """Results of a function in the order of the items; the processes share what is in memory."""
    return DataLoader(
        cast(Any, items), batch_size=None, num_workers=workers, collate_fn=cast(Any, work)
    )


def _best_temperature(rows: dict[float, dict[str, float | None]]) -> dict[str, float | None]:
    best = max(rows, key=lambda t: (rows[t]["novel"] or 0.0, -t))
    return rows[best] | {"temperature": best}
