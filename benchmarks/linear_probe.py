"""Novel AP50 and time of the linear probe: on stored features, and by the original's training.

Run as ``python -m benchmarks.linear_probe results/mini`` after the workflow. Ends with one JSON
line. Times are CPU time in one thread, so other jobs on the machine matter little.

*Online* is the original's fine-tuning (`StandardRoIHeadSigmoidFinetune.forward_train` in its
mmdet/models/roi_heads/standard_roi_head_sigmoid_ft.py): every step loads images, resizes and flips
them at random, runs the frozen backbone, pyramid and region head on sampled regions, and updates
only the novel weights. Settings, number of steps and schedule are those of stage `linear_probe`.
Candidates are the given proposals; the original runs its region proposal network, whose time is not
counted here. As in the stage, a pseudo-label is a candidate only once, since it is one of the given
proposals.

*Cached* is the stage `linear_probe`: it reads the stored features and trains on them. The cost of
storing them, which arises once per detector and set of pseudo-labels, is printed separately, as
Snakemake measured it, including imports.
"""

import csv
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from lpovod.boxes import match, sample
from lpovod.config import Config, LinearProbeSettings, TrainingSettings, read_config
from lpovod.formats.coco import CocoDataset, coco_results, read_dataset
from lpovod.formats.image_features import ImageFeatures, paths_in
from lpovod.formats.pseudo_labels import PseudoLabels, read_ignored, read_pseudo_labels
from lpovod.formats.regions import RegionStore, open_shards, read_proposals, shards_in
from lpovod.measures.ablations import variants
from lpovod.measures.average_precision import (
    ap50,
    ap50_by_class,
    coco_ground_truth,
    images_of,
)
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import load_detector
from lpovod.overlaps import overlapping
from lpovod.probe import fit, gather_candidates
from lpovod.progress import progress
from lpovod.schedule import rate_at
from lpovod.scoring import detect, read_class_weights, score_regions
from lpovod.stages.base_detector import classification_loss
from lpovod.views import LoadedView, batch, load_views, steps_per_epoch, training_views

VARIANTS = {"full": "full method", "without_clip_head": "probe alone"}


@dataclass
class Options:
    results: tyro.conf.Positional[Path] = Path("results/mini")
    """folder of a finished run"""
    config: tuple[Path, ...] = (Path("config.yaml"),)
    """its configuration, and overlays"""
    seeds: int = 3
    """number of trainings of each kind"""


@dataclass(frozen=True)
class Labelled:
    """Boxes of one image, in pixels of the original image.

    Attributes:
        candidates: (n, 4) float32, without duplicates.
        objects: (m, 4) float32 pseudo-labels.
        labels: (m,) classes of the objects.
    """

    candidates: Tensor
    objects: Tensor
    labels: Tensor


def label_images(
    retrieved: PseudoLabels, ignored: dict[int, np.ndarray], proposals: RegionStore
) -> dict[int, Labelled]:
    """The boxes of every image with a retrieved region, without candidates on ignored objects."""
    labelled, none = {}, np.empty((0, 4), np.float32)
    for image_id in sorted(set().union(*retrieved.values())):
        by_class = [of_class.get(image_id, (none, None))[0] for of_class in retrieved.values()]
        objects = np.concatenate(by_class)
        labels = np.repeat(np.arange(len(by_class)), [len(boxes) for boxes in by_class])
        candidates = np.unique(np.concatenate([objects, proposals.read(image_id).box]), axis=0)
        positive = overlapping(candidates, objects)
        candidates = candidates[positive | ~overlapping(candidates, ignored.get(image_id, none))]
        arrays = candidates, objects, labels
        labelled[image_id] = Labelled(*(torch.from_numpy(array) for array in arrays))
    return labelled


def online_loss(
    weights: Tensor, model: Detector, views: list[LoadedView], settings: LinearProbeSettings
) -> Tensor:
    """The loss of one step, including the computation of everything frozen.

    Args:
        weights: (classes, dimension) of the novel classes.
        model: the detector, in evaluation mode.
        views: the resized and flipped images, each with its `Labelled` boxes as `extra`.
        settings: settings of the sampling.
    """
    regions, labels = [], []
    for view in views:
        candidates = view.to_view(view.extra.candidates)
        iou, assigned = match(candidates, view.to_view(view.extra.objects))
        positive, negative = sample(
            iou,
            settings.samples_per_image,
            settings.positive_fraction,
            settings.negatives_per_positive,
        )
        regions.append(candidates[torch.cat([positive, negative])])
        background = torch.full((len(negative),), len(weights))
        labels += [view.extra.labels[assigned[positive]], background]
    images = batch(views, "cpu", model.backbone.normalisation)
    with torch.no_grad():
        features = model.region_head(model.pool(model.pyramid(images), regions))
    return classification_loss(features @ weights.T, torch.cat(labels))


def fit_online(
    model: Detector,
    data: CocoDataset,
    images: dict[int, Labelled],
    classes: int,
    config: Config,
    seed: int,
) -> Tensor:
    """The novel weights, (classes, dimension), from the original's fine-tuning."""
    settings, shown = config.linear_probe, config.base_detector.training
    schedule = TrainingSettings(
        images_per_step=settings.images_per_step, short_sides=shown.short_sides, flip=shown.flip
    )
    weights = torch.zeros(classes, config.base_detector.dimension, requires_grad=True)
    optimizer = torch.optim.SGD(
        [weights], settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    torch.manual_seed(seed)
    per_epoch, number = steps_per_epoch(data, list(images), settings.images_per_step), 0
    for epoch in progress(range(settings.epochs), f"online, seed {seed}", "epoch"):
        views = training_views(data, list(images), schedule, config.backbone.long_side, seed, epoch)
        for step in load_views(
            data, views, settings.images_per_step, extra=lambda v: images[v.view.image_id]
        ):
            optimizer.param_groups[0]["lr"] = rate_at(number, per_epoch, settings)
            optimizer.zero_grad()
            online_loss(weights, model, step, settings).backward()
            optimizer.step()
            number += 1
    return weights.detach()


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def measure(options: Options) -> dict:
    config, run = read_config(options.config), options.results
    train = run / "dataset/train.json"
    proposals = read_proposals(shards_in(run / "proposals/train"), train)
    detector = run / "base_detector/detector.safetensors"
    score = scorer(run, config)
    labels = run / "pseudo_labels/novel.json"
    retrieved, ignored = read_pseudo_labels(labels), read_ignored(labels)
    retrieved = {name: retrieved[name] for name in sorted(retrieved)}  # as the scorer has them
    stored = ImageFeatures(paths_in(sorted((run / "region_features/retrieved").iterdir())))
    model, _ = load_detector(detector, config.backbone, config.base_detector)
    data = read_dataset(train)
    images = label_images(retrieved, ignored, proposals)

    def cached(seed: int) -> Tensor:
        candidates = list(gather_candidates(retrieved, ignored, stored).values())
        return torch.from_numpy(fit(candidates, len(retrieved), config.linear_probe, seed))

    def online(seed: int) -> Tensor:
        return fit_online(model, data, images, len(retrieved), config, seed)

    rows = {"cached": [], "online": []}
    for seed in range(options.seeds):
        for name, train_weights in (("cached", cached), ("online", online)):
            weights, seconds = timed(lambda train=train_weights, seed=seed: train(seed))
            rows[name].append(score(weights) | {"seconds": seconds})
            print(f"{name:8} seed {seed}   {line(rows[name][-1])}", flush=True)
    jobs = run.glob("benchmarks/region_features/retrieved/*.tsv")
    storing = sum(float(table[-1]["cpu_time"]) for table in map(read_rows, jobs))
    return summary(rows) | {"storing_s": round(storing, 1), "images": len(images)}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Snakemake's table of a job."""
    with open(path) as file:
        return list(csv.DictReader(file, delimiter="\t"))


def scorer(run: Path, config: Config) -> Callable[[Tensor], dict[str, float]]:
    """A function that returns the variants' novel AP50 for novel weights, in alphabetical order."""
    classes = read_class_weights(
        run / "base_detector/detector.safetensors",
        run / "linear_probe/weights.safetensors",
        [run / f"text_embeddings/{split}.safetensors" for split in ("base", "novel")],
        config.evaluation,
    )
    data = read_dataset(run / "dataset/val.json").of_classes(classes.base, classes.novel)
    stage = "region_features"
    features = open_shards(shards_in(run / stage / "val"), stage)
    truth = coco_ground_truth(data, images_of(data, config.evaluation.protocol))
    category_ids = data.category_ids(classes.names)
    ways = variants(config.evaluation, classes.temperature, true_clip=False)
    base = len(classes.base)

    def score(weights: Tensor) -> dict[str, float]:
        of_all = replace(classes, weights=torch.cat([classes.weights[:base], weights]))
        image_ids, novel_ap = [i for i in features.image_ids if features.count(i)], {}
        scores = {i: score_regions(features.read(i), None, of_all) for i in image_ids}
        for way in VARIANTS:
            probe_weights = ways[way].probe_weights(base, len(classes.novel))
            detected = {
                i: detect(of_image, probe_weights, category_ids, ways[way], config.evaluation)
                for i, of_image in scores.items()
            }
            by_class = ap50_by_class(truth, coco_results(detected))
            novel_ap[way] = ap50(by_class, classes.base, classes.novel)["novel"]
        return novel_ap

    return score


def summary(rows: dict[str, list[dict[str, float]]]) -> dict:
    """Mean and range over the seeds, and the ratio of times."""
    content = {}
    for name, of_seeds in rows.items():
        values = {key: [row[key] for row in of_seeds] for key in of_seeds[0]}
        mean = {key: sum(v) / len(v) for key, v in values.items()}
        print(f"{name:8} mean     {line(mean)}")
        for way in VARIANTS:
            low, high = min(values[way]), max(values[way])
            content[f"{name}_{way}"] = [round(v, 2) for v in (mean[way], low, high)]
        content[f"{name}_s"] = round(mean["seconds"], 2)
    ratio = content["cached_s"] / content["online_s"]
    return content | {"ratio_to_online": round(ratio, 4)}


def line(row: dict[str, float]) -> str:
    scores = "   ".join(f"{VARIANTS[way]} {row[way]:5.2f}" for way in VARIANTS)
    return f"novel AP50: {scores}   {row['seconds']:7.2f} s"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main(tyro.cli(Options))
