"""Stage `evaluation`: detections, AP50, and the ablations that explain it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader

from lpovod.artifacts import check_made_from, sha256, write_json
from lpovod.config import EvaluationSettings
from lpovod.formats.coco import Detections, check_same_images, coco_results, read_dataset
from lpovod.formats.regions import RegionStore, open_shards
from lpovod.measures.ablations import Variant, table, variants
from lpovod.measures.average_precision import (
    ap50,
    ap50_by_class,
    coco_ground_truth,
    images_of,
    without_garbage_collection,
)
from lpovod.measures.mistakes import count_mistakes
from lpovod.measures.recall import recall_by_split
from lpovod.progress import log, progress
from lpovod.scoring import detect, read_class_weights, score_regions

TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Temperatures to choose from for the row of the CLIP head at its best temperature."""


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
    scores = score_regions(features, embeddings, classes)
    base = len(classes.base)

    def measure(variant: Variant) -> tuple[Detections, dict[str, float], dict[str, float | None]]:
        detected = detect(scores, base, category_ids, variant, settings)
        with without_garbage_collection():
            by_class = ap50_by_class(truth, coco_results(detected))
        return detected, by_class, ap50(by_class, classes.base, classes.novel)

    rows = variants(settings, classes.temperature, embeddings is not None)
    heads = [replace(rows["without_probe"], temperature=t) for t in TEMPERATURES]
    # Loads variants instead of images: the processes share the scores, and results keep the order.
    measurements: Any = [*rows.values(), *heads]
    loader: DataLoader = DataLoader(
        measurements, batch_size=None, num_workers=workers, collate_fn=cast(Any, measure)
    )
    results = list(progress(loader, "evaluation", "variant"))
    measured = dict(zip(rows, results, strict=False))
    by_row = {name: means for name, (_, _, means) in measured.items()}
    at_temperature = [means for _, _, means in results[len(rows) :]]
    by_row["without_probe_best_temperature"] = _best_temperature(
        dict(zip(TEMPERATURES, at_temperature, strict=True))
    )
    content: dict[str, Any] = {"rows": by_row}
    content["per_class"] = {k: round(v, 2) for k, v in measured["full"][1].items()}
    novel_ids = set(data.category_ids(classes.novel))
    content["evaluated"] = {
        "protocol": settings.protocol,
        "images": len(truth.imgs),
        "split_images": len(data.images),
        "boxes": len(truth.anns),
        "novel_boxes": sum(a["category_id"] in novel_ids for a in truth.anns.values()),
    }
    content["temperature"] = classes.temperature
    content["classes"] = {"base": classes.base, "novel": classes.novel}
    boxes = {i: s.boxes.numpy() for i, s in scores.items()}
    boxes = dict.fromkeys(data.images, np.empty((0, 4), np.float32)) | boxes
    content["proposal_recall"] = recall_by_split(data, boxes)
    content["novel_mistakes"] = {
        name: count_mistakes(everything, measured[name][0], data.category_ids(classes.novel))
        for name in ("full", "without_probe", "without_clip_head")
    }
    made_from = {
        "dataset": sha256(dataset),
        "region_features": sha256(region_features),
        "linear_probe": sha256(linear_probe),
    }
    content["made_from"] = made_from
    write_json(detections, coco_results(measured["full"][0]))
    write_json(ground_truth, truth.dataset)
    write_json(metrics, content)
    log.info(table(content))


def _best_temperature(rows: dict[float, dict[str, float | None]]) -> dict[str, float | None]:
    best = max(rows, key=lambda t: (rows[t]["novel"] or 0.0, -t))
    return rows[best] | {"temperature": best}
