"""Stage `evaluation`: scores, detections, AP50, and the ablations that explain it.

Everything here is arithmetic on stored region features (Eq. 5-7 of the paper):

* the sigmoid of feature · weight, for base classes (trained) and novel ones (linear probe);
* the softmax, over all classes, of cosine / temperature between image head and class name;
* base score: CLIP head^alpha · sigmoid^(1 - alpha); novel: CLIP head^(1 - beta) · sigmoid^beta;
* the root of score · objectness, a threshold, NMS within each class.

``python -m lpovod.evaluation --ground-truth GT.json --detections DT.json`` prints AP50 of anybody's
detections in COCO's results format.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lpovod.artifacts import (
    LpovodError,
    check_made_from,
    read_json,
    read_tensors,
    sha256,
    write_json,
)
from lpovod.average_precision import (
    Detections,
    ap50,
    ap50_by_class,
    coco_results,
    evaluate_files,
    ground_truth,
    without_garbage_collection,
)
from lpovod.boxes import nms
from lpovod.config import Evaluation
from lpovod.dataset import read_dataset
from lpovod.errors import count_errors
from lpovod.progress import progress, say
from lpovod.region_index import open_shards
from lpovod.store import RegionStore
from lpovod.summary import table
from lpovod.text_embeddings import read_text_embeddings

TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Tried for the row of the CLIP head at its best temperature."""


@dataclass(frozen=True)
class Scores:
    """Raw scores of one image's regions, classes in the order base, then novel.

    Attributes:
        boxes: (n, 4) proposals; refined: (n, 4) after box regression.
        objectness: (n,).
        sigmoid: (n, classes).
        cosine: (n, classes) of the image head; clip: the same of CLIP itself, if it is there.
    """

    boxes: Tensor
    refined: Tensor
    objectness: Tensor
    sigmoid: Tensor
    cosine: Tensor
    clip: Tensor | None


@dataclass(frozen=True)
class Variant:
    """How raw scores become detections: the full method, or one of its ablations."""

    alpha: float
    beta: float
    temperature: float
    objectness: bool = True
    refined: bool = True
    true_clip: bool = False


@dataclass(frozen=True)
class ClassWeights:
    """What regions are scored with; rows are base classes, then novel ones.

    Attributes:
        base: names of the base classes.
        novel: names of the novel classes.
        weights: (classes, dimension) of the linear classifiers.
        text: (classes, D) unit text embeddings.
        temperature: of the softmax over cosines.
    """

    base: list[str]
    novel: list[str]
    weights: Tensor
    text: Tensor
    temperature: float

    @property
    def names(self) -> list[str]:
        return [*self.base, *self.novel]


def read_class_weights(
    detector: Path, linear_probe: Path, text_embeddings: list[Path], settings: Evaluation
) -> ClassWeights:
    """Join base prototypes, novel weights and text embeddings by class name.

    Raises:
        LpovodError: if a class lacks one of them, or the probe is of another detector.
    """
    tensors, ident = read_tensors(detector, "base_detector")
    probes, probe_ident = read_tensors(linear_probe, "linear_probe")
    check_made_from(linear_probe, probe_ident, "detector", detector)
    text = read_text_embeddings(text_embeddings)
    rows = dict(zip(text.names, text.vectors, strict=True))
    base, novel = ident["classes"], sorted(probes)
    for name in [*base, *novel]:
        if name not in rows:
            raise LpovodError(f"class {name!r} has no text embedding in {text_embeddings}")
    weights = np.concatenate([tensors["prototypes"], *(probes[name][None] for name in novel)])
    return ClassWeights(
        base,
        novel,
        torch.from_numpy(weights),
        torch.from_numpy(np.stack([rows[name] for name in [*base, *novel]])),
        settings.temperature or 1 / text.logit_scale,
    )


def score_regions(
    features: RegionStore, embeddings: RegionStore | None, classes: ClassWeights
) -> dict[int, Scores]:
    """Raw scores of every image.

    Args:
        features: of a split.
        embeddings: CLIP's own embeddings of the same regions, for comparison.
        classes: what to score with.
    """
    scores = {}
    for image_id in features.image_ids:
        found = features.read(image_id)
        if len(found) == 0:
            continue
        clip = None
        if embeddings is not None:
            true = embeddings.read(image_id)
            if not np.array_equal(true.box, found.box):
                raise LpovodError(f"image {image_id}: {embeddings.paths[0]} has other boxes")
            clip = torch.from_numpy(true["embedding"]).float() @ classes.text.T
        scores[image_id] = Scores(
            torch.from_numpy(found.box),
            torch.from_numpy(found["refined"]),
            torch.from_numpy(found.objectness),
            (torch.from_numpy(found["feature"]).float() @ classes.weights.T).sigmoid(),
            torch.from_numpy(found["embedding"]).float() @ classes.text.T,
            clip,
        )
    return scores


def final_scores(scores: Scores, base: int, variant: Variant) -> Tensor:
    """(n, classes) scores as they enter the NMS.

    Args:
        scores: raw scores of n regions.
        base: how many of the classes are base classes; they come first.
        variant: the method or an ablation.
    """
    cosine = scores.clip if variant.true_clip else scores.cosine
    clip = (cosine / variant.temperature).softmax(dim=1)
    probe_part = torch.full((clip.shape[1],), variant.beta)
    probe_part[:base] = 1 - variant.alpha
    score = clip ** (1 - probe_part) * scores.sigmoid**probe_part
    return (score * scores.objectness[:, None] if variant.objectness else score).sqrt()


def detect(
    scores: dict[int, Scores],
    base: int,
    category_ids: list[int],
    variant: Variant,
    settings: Evaluation,
) -> Detections:
    """Detections of every image: threshold, NMS within each class, the best of them.

    Args:
        scores: raw scores by image id.
        base: number of base classes.
        category_ids: of base, then novel classes.
        variant: the method or an ablation.
        settings: threshold, NMS and number of detections.
    """
    categories = torch.tensor(category_ids)
    found = {}
    for image_id, of_image in scores.items():
        score = final_scores(of_image, base, variant)
        rows, classes = (score > settings.score_threshold).nonzero(as_tuple=True)
        boxes = (of_image.refined if variant.refined else of_image.boxes)[rows]
        kept = nms(boxes, score[rows, classes], classes, settings.nms, settings.per_image)
        found[image_id] = tuple(
            t[kept].numpy() for t in (boxes, score[rows, classes], categories[classes])
        )
    return found


def variants(settings: Evaluation, temperature: float, true_clip: bool) -> dict[str, Variant]:
    """The method and its ablations, by their name in the metrics."""
    full = Variant(settings.alpha, settings.beta, temperature)
    rows = {
        "full": full,
        "without_probe": replace(full, beta=0.0),
        "without_clip_head": replace(full, beta=1.0),
        "without_objectness": replace(full, objectness=False),
        "without_probe_and_objectness": replace(full, beta=0.0, objectness=False),
        "without_box_refinement": replace(full, refined=False),
        "without_probe_and_box_refinement": replace(full, beta=0.0, refined=False),
    }
    if true_clip:
        rows["true_clip_without_probe"] = replace(full, beta=0.0, true_clip=True)
        rows["true_clip_with_probe"] = replace(full, true_clip=True)
    return rows


def evaluate(
    dataset: Path,
    region_features: Path,
    detector: Path,
    linear_probe: Path,
    text_embeddings: list[Path],
    recall: Path,
    region_embeddings: list[Path],
    settings: Evaluation,
    metrics: Path,
    detections: Path,
    workers: int = 0,
) -> None:
    """Measure AP50 of the method and of its ablations.

    Args:
        dataset: the split's json, with all classes annotated.
        region_features: of the split's proposals.
        detector: the base detector, for its base classes' prototypes.
        linear_probe: the novel classes' weights.
        text_embeddings: of base and novel classes.
        recall: of the proposals, as stage `proposals` wrote it.
        region_embeddings: CLIP on the same regions, for comparison; may be empty.
        settings: of this stage.
        metrics: output json, in percent.
        detections: output json, COCO results of the full method.
        workers: processes that measure side by side; 0 measures in this one.
    """
    data = read_dataset(dataset)
    features = RegionStore(region_features, "region_features")
    check_made_from(region_features, features.identity, "dataset", dataset)
    check_made_from(region_features, features.identity, "detector", detector)
    embeddings = open_shards(region_embeddings) if region_embeddings else None
    classes = read_class_weights(detector, linear_probe, text_embeddings, settings)
    category_ids = data.category_ids(classes.names)
    truth = ground_truth(data, classes.names)
    scores = score_regions(features, embeddings, classes)
    base = len(classes.base)

    def measure(variant: Variant) -> tuple[Detections, dict[str, float], dict[str, float | None]]:
        found = detect(scores, base, category_ids, variant, settings)
        with without_garbage_collection():
            by_class = ap50_by_class(truth, coco_results(found))
        return found, by_class, ap50(by_class, classes.base, classes.novel)

    rows = variants(settings, classes.temperature, embeddings is not None)
    tried = [replace(rows["without_probe"], temperature=t) for t in TEMPERATURES]
    # A loader of variants instead of images: its processes share the scores, and keep the order.
    loader = DataLoader(
        [*rows.values(), *tried], batch_size=None, num_workers=workers, collate_fn=measure
    )
    results = list(progress(loader, "evaluation", "variant"))
    measured = dict(zip(rows, results, strict=False))
    content = {name: means for name, (_, _, means) in measured.items() if name != "full"}
    content["AP50"] = measured["full"][2]
    content["per_class"] = {k: round(v, 2) for k, v in measured["full"][1].items()}
    at_temperature = [means for _, _, means in results[len(rows) :]]
    content["without_probe_best_temperature"] = _best_temperature(
        dict(zip(TEMPERATURES, at_temperature, strict=True))
    )
    novel = set(data.category_ids(classes.novel))
    content["evaluated"] = {
        "images": len(truth.imgs),
        "boxes": len(truth.anns),
        "novel_boxes": sum(a["category_id"] in novel for a in truth.anns.values()),
    }
    content["temperature"] = classes.temperature
    content["classes"] = {"base": classes.base, "novel": classes.novel}
    content["proposal_recall"] = read_json(recall)["recall"]
    content["novel_errors"] = {
        name: count_errors(data, measured[name][0], data.category_ids(classes.novel))
        for name in ("full", "without_probe", "without_clip_head")
    }
    made_from = {
        "dataset": sha256(dataset),
        "region_features": sha256(region_features),
        "linear_probe": sha256(linear_probe),
    }
    content["made_from"] = made_from
    write_json(detections, coco_results(measured["full"][0]))
    write_json(metrics, content)
    say(table(content))


def _best_temperature(rows: dict[float, dict[str, float | None]]) -> dict[str, float | None]:
    best = max(rows, key=lambda t: (rows[t]["novel"] or 0.0, -t))
    return rows[best] | {"temperature": best}


def main() -> None:
    """The command line: AP50 of a file of detections."""
    parser = argparse.ArgumentParser(
        prog="python -m lpovod.evaluation", description="AP50 of detections, by class and by split."
    )
    parser.add_argument("--ground-truth", type=Path, required=True, help="COCO json")
    parser.add_argument("--detections", type=Path, required=True, help="COCO's results format")
    parser.add_argument(
        "--novel", nargs="+", help="novel classes (default: by the categories' split)"
    )
    parser.add_argument(
        "--base", nargs="+", help="base classes (default: by the categories' split, or all others)"
    )
    parser.add_argument(
        "--annotated-images",
        action="store_true",
        help="leave out images without any of the classes, as OV-COCO does",
    )
    given = parser.parse_args()
    try:
        print(
            evaluate_files(
                given.ground_truth,
                given.detections,
                given.base,
                given.novel,
                given.annotated_images,
            )
        )
    except LpovodError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
