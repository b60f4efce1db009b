"""Stage `base_detector`: the detector learns the base classes, and to imitate CLIP.

Three losses (Sec. 3.2 of the paper): sigmoid focal classification of sampled regions, L1 of their
box deltas, and L1 between the image head's embedding of a proposal and CLIP's, times 256.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from lpovod.artifacts import (
    LpovodError,
    check_made_from,
    fingerprint,
    identity,
    read_tensors,
    sha256,
)
from lpovod.backbone import freeze_statistics
from lpovod.boxes import encode, match, sample
from lpovod.config import Backbone, BaseDetector
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.detector import Detector
from lpovod.images import LoadedView, batch, load_views, training_views
from lpovod.progress import say
from lpovod.region_index import open_shards
from lpovod.training import train, write_training


@dataclass(frozen=True)
class Sampled:
    """The regions of one image that the losses are taken on, in pixels of the network's input.

    Attributes:
        boxes: (n, 4), positives first.
        labels: (n,) base class, or the number of base classes for background.
        targets: (n, 4) the object of each positive; undefined for the others.
        positives: how many are positive.
    """

    boxes: Tensor
    labels: Tensor
    targets: Tensor
    positives: int


def sample_regions(
    objects: Tensor, labels: Tensor, proposals: Tensor, classes: int, settings: BaseDetector
) -> Sampled:
    """Sample regions of one image; its objects themselves are candidates too.

    Args:
        objects: (m, 4) annotated boxes.
        labels: (m,) their classes.
        proposals: (n, 4).
        classes: number of base classes, the label of the background.
        settings: how many, and how many of them positive.
    """
    candidates = torch.cat([objects, proposals])
    iou, assigned = match(candidates, objects)
    positive, negative = sample(iou, settings.samples, settings.positives)
    rows = torch.cat([positive, negative])
    named = torch.full((len(rows),), classes)
    named[: len(positive)] = labels[assigned[positive]]
    return Sampled(candidates[rows], named, objects[assigned[rows]], len(positive))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid focal loss (gamma 2, alpha .25), summed, over the number of positives.

    Args:
        logits: (n, classes).
        labels: (n,) class, or `classes` for background.
    """
    target = functional.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    return sigmoid_focal_loss(logits, target, 0.25, 2, "sum") / target.sum().clamp(min=1)


def detector_losses(
    model: Detector,
    images: Tensor,
    sampled: list[Sampled],
    proposals: list[Tensor],
    embeddings: Tensor,
    distillation_weight: float,
) -> dict[str, Tensor]:
    """The three losses of a batch.

    Args:
        model: the detector.
        images: (n, 3, H, W) normalised.
        sampled: for each image, regions for classification and boxes.
        proposals: for each image, (m, 4) boxes to distil.
        embeddings: (sum of m, D) CLIP's embeddings of them, unit rows.
        distillation_weight: factor of the third loss.
    """
    pyramid = model.pyramid(images)
    both = [torch.cat([s.boxes, p]) for s, p in zip(sampled, proposals, strict=True)]
    pooled = model.pool(pyramid, both)
    to_classify = torch.cat(
        [
            torch.arange(len(s.boxes) + len(p)) < len(s.boxes)
            for s, p in zip(sampled, proposals, strict=True)
        ]
    )
    feature = model.region_branch(pooled[to_classify])
    labels = torch.cat([s.labels for s in sampled]).to(feature.device)
    losses = {"classification": classification_loss(feature @ model.prototypes.T, labels)}
    positive = labels < len(model.prototypes)
    boxes, targets = (
        torch.cat([getattr(s, name) for s in sampled]).to(feature.device)[positive]
        for name in ("boxes", "targets")
    )
    deltas = model.box_refinement(feature[positive])
    losses["box"] = (deltas - encode(boxes, targets)).abs().sum() / len(labels)
    if distillation_weight and len(embeddings):
        imitated = model.embed(pooled[~to_classify])
        losses["distillation"] = distillation_weight * (imitated - embeddings).abs().mean()
    return losses


def train_base_detector(
    dataset: Path,
    region_embeddings: list[Path],
    network: Path,
    backbone: Backbone,
    settings: BaseDetector,
    seed: int,
    state: Path,
    code: list[Path],
    detector: Path,
    history: Path,
    device: str = "cpu",
) -> None:
    """Train the detector on base classes.

    Args:
        dataset: train.json, base annotations alone; images without one are left out.
        region_embeddings: the shards of its images: proposals with CLIP's embeddings.
        network: the proposal network, whose backbone and pyramid training starts from.
        backbone: size of the backbone and of the images.
        settings: the heads and the schedule.
        seed: of initialisation, order, flips and samples.
        state: file of an unfinished training, to go on from; removed at the end.
        code: source files; a state of other code is not gone on from.
        detector: output, the weights.
        history: output, one JSON line per epoch.
        device: where to train.

    Raises:
        LpovodError: if inputs do not belong together, or a loss is not finite.
    """
    data = read_dataset(dataset)
    store = open_shards(region_embeddings)
    check_made_from(store.paths[0], store.identity, "dataset", dataset)
    image_ids = [i for i in data.images if len(data.boxes(i)[0]) and i not in store.skipped]
    if not image_ids:
        raise LpovodError(f"{dataset}: no image has an annotation to learn from")
    classes = {category: row for row, category in enumerate(sorted(data.categories))}
    shards = {f"region_embeddings_{n}": sha256(p) for n, p in enumerate(store.paths)}
    made_from = identity("base_detector", settings, dataset=dataset, network=network, **shards) | {
        "backbone": backbone.model_dump(),
        "seed": seed,
        "classes": [data.categories[c]["name"] for c in classes],
    }
    torch.manual_seed(seed)
    embedding = store.read(next(i for i in store.image_ids if store.count(i)))["embedding"]
    model = Detector(backbone, settings, len(classes), embedding.shape[1])
    _start_from(model, network)
    model = model.to(device).train()
    freeze_statistics(model.backbone)
    schedule = settings.training
    lines = train(
        model,
        lambda views: _losses(model, data, views, classes, settings, device),
        lambda epoch: load_views(
            data,
            training_views(image_ids, schedule, backbone.long_side, seed, epoch),
            schedule.images_per_step,
            schedule.workers,
            extra=lambda view: store.read(view.view.image_id),
        ),
        -(-len(image_ids) // schedule.images_per_step),
        schedule,
        seed,
        state,
        fingerprint(made_from | {"code": [sha256(path) for path in code]}),
    )
    write_training(model, lines, made_from, detector, history)
    state.unlink(missing_ok=True)


def _start_from(model: Detector, network: Path) -> None:
    tensors, _ = read_tensors(network, "proposals")
    kept = {
        k: torch.from_numpy(v) for k, v in tensors.items() if k.startswith(("backbone.", "neck."))
    }
    missing = model.load_state_dict(kept, strict=False).missing_keys
    untold = [k for k in missing if k.startswith(("backbone.", "neck."))]
    if untold:
        raise LpovodError(f"{network} has no weights {untold[:3]} ... of the detector's backbone")
    say(f"backbone and pyramid start from {network}")


def _losses(
    model: Detector,
    data: CocoDataset,
    views: list[LoadedView],
    classes: dict[int, int],
    settings: BaseDetector,
    device: str,
) -> dict[str, Tensor]:
    sampled, proposals, embeddings = [], [], []
    for view in views:
        boxes, categories = data.boxes(view.view.image_id)
        labels = torch.tensor([classes[int(c)] for c in categories])
        regions = view.extra
        given = view.to_view(regions.box)
        one = sample_regions(view.to_view(boxes), labels, given, len(classes), settings)
        sampled.append(one)
        some = np.sort(torch.randperm(len(given))[: settings.distillation_regions].numpy())
        proposals.append(given[some])
        if len(some):
            embeddings.append(torch.from_numpy(regions["embedding"][some]).float())
    return detector_losses(
        model,
        batch(views, device),
        sampled,
        [p.to(device) for p in proposals],
        torch.cat(embeddings).to(device) if embeddings else torch.zeros(0, device=device),
        settings.distillation_weight,
    )
