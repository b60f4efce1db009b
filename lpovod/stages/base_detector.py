"""Stage `base_detector`: the detector learns the base classes, and to imitate CLIP.

Three losses (Sec. 3.2 of the paper): sigmoid focal classification of sampled regions, L1 of their
box deltas, and L1 between the CLIP head's embedding of a proposal and CLIP's, times 256. With
`regions: rpn` the regions of the first two come from a region proposal network, which adds its own
two losses; the proposals that are distilled are always the given ones, resized and flipped with
their image.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from lpovod.artifacts import identity
from lpovod.boxes import encode, match, sample
from lpovod.config import BackboneSettings, BaseDetectorSettings
from lpovod.devices import explaining_memory
from lpovod.distributed import total, training_ranks
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, check_same_images, read_dataset
from lpovod.formats.regions import Regions, RegionStore, digest_of_shards, open_shards
from lpovod.importers.backbone import start_from
from lpovod.networks.backbone import freeze_statistics
from lpovod.networks.detector import Detector
from lpovod.networks.rpn import RegionProposalNetwork, make_anchors, rpn_losses, rpn_proposals
from lpovod.precision import precise
from lpovod.torchvision_ops import sigmoid_focal_loss
from lpovod.training import ready, resumable, train, write_training
from lpovod.transfers import send, send_all
from lpovod.views import LoadedView, batch, steps_per_epoch, training_batches


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


@dataclass(frozen=True)
class RegionsOf:
    """Reads the regions of a view's image; loading processes get a copy."""

    store: RegionStore

    def __call__(self, loaded: LoadedView) -> Regions:
        return self.store.read(loaded.view.image_id)


def sample_regions(
    objects: Tensor, labels: Tensor, proposals: Tensor, classes: int, settings: BaseDetectorSettings
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
    positive, negative = sample(iou, settings.samples_per_image, settings.positive_fraction)
    rows = torch.cat([positive, negative])
    named = torch.full((len(rows),), classes)
    named[: len(positive)] = labels[assigned[positive]]
    return Sampled(candidates[rows], named, objects[assigned[rows]], len(positive))


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid focal loss (gamma 2, alpha 0.25), summed over regions, by all ranks' positives.

    Args:
        logits: (n, classes).
        labels: (n,) class, or `classes` for background.
    """
    target = functional.one_hot(labels, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    return sigmoid_focal_loss(logits, target, 0.25, 2) / total(target.sum()).clamp(min=1)


def detector_losses(
    model: Detector,
    pyramid: list[Tensor],
    sampled: list[Sampled],
    proposals: list[Tensor],
    embeddings: Tensor,
    distillation_weight: float,
) -> dict[str, Tensor]:
    """The three losses of a batch; of several ranks' parts they add up to those of the whole.

    Boxes, labels and embeddings are the host's, also if the model is not.

    Args:
        model: the detector.
        pyramid: P2 ... P6 of the images.
        sampled: for each image, regions for classification and boxes.
        proposals: for each image, (m, 4) boxes to distil.
        embeddings: (sum of m, D) CLIP's embeddings of them, unit rows.
        distillation_weight: factor of the third loss.
    """
    device = pyramid[0].device
    both = [torch.cat([s.boxes, p]) for s, p in zip(sampled, proposals, strict=True)]
    pooled = model.pool(pyramid, both)
    to_classify = torch.cat(
        [
            torch.arange(len(s.boxes) + len(p)) < len(s.boxes)
            for s, p in zip(sampled, proposals, strict=True)
        ]
    )
    to_imitate = (~to_classify).nonzero().flatten()
    labels, boxes, targets = (
        torch.cat([getattr(s, name) for s in sampled]) for name in ("labels", "boxes", "targets")
    )
    positive = (labels < len(model.prototypes)).nonzero().flatten()
    rows, positives, imitating = send_all(
        [to_classify.nonzero().flatten(), positive, to_imitate], device
    )
    labels, wanted, embeddings = (
        send(tensor, device)
        for tensor in (labels, encode(boxes[positive], targets[positive]), embeddings)
    )
    feature = model.region_head(pooled[rows])
    logits = precise(feature @ model.prototypes.T)
    losses = {"classification": classification_loss(logits, labels)}
    deltas = model.box_refinement(feature[positives])
    # The host adds these up: a device's sum would make it wait.
    regions, values = total(torch.tensor([len(labels), embeddings.numel()])).tolist()
    losses["box"] = (deltas - wanted).abs().sum() / regions
    if distillation_weight and values > 0:
        imitated = model.embed(pooled[imitating])
        distance = (imitated - embeddings).abs().sum() / values
        losses["distillation"] = distillation_weight * distance
    return losses


def train_base_detector(
    dataset: Path,
    region_embeddings: list[Path],
    network: Path,
    backbone: BackboneSettings,
    settings: BaseDetectorSettings,
    seed: int,
    checkpoint: Path,
    code: str,
    detector: Path,
    history: Path,
    device: str = "cpu",
    threads: int = 1,
    workers: int = 0,
    images_at_once: int = 0,
) -> None:
    """Train the detector on base classes.

    Args:
        dataset: train.json, base annotations alone; images without one are left out.
        region_embeddings: the shards of its images: proposals with CLIP's embeddings.
        network: what training starts from: the proposal network, or pretrained weights.
        backbone: size of the backbone and of the images.
        settings: the heads and the schedule.
        seed: of initialisation, order, flips and samples.
        checkpoint: file of an unfinished training, which is resumed; removed at the end.
        code: digest of the source code; a checkpoint written by different code is not resumed.
        detector: output, the weights.
        history: output, one JSON line per epoch.
        device: cpu or cuda; started by a launcher, the ranks share every step.
        threads: processors to use on a CPU, where the training starts ranks itself: as many
            processes as there are images in a step, at most, share every step.
        workers: processes that load images for each rank; 0 for the settings'.
        images_at_once: images that a rank computes at once; 0 for the settings'.

    Raises:
        LpovodError: if inputs do not belong together, or a loss is not finite.
    """
    schedule = settings.training.divided(workers, images_at_once)
    with (
        training_ranks(device, threads, schedule.images_per_step) as device,
        explaining_memory(
            "base_detector.training.images_at_once or short_sides; workers, if a loading process "
            "lacks it"
        ),
    ):
        data = read_dataset(dataset)
        store = open_shards(region_embeddings, "region_embeddings")
        check_same_images(store.paths[0], store.identity, data)
        image_ids = [i for i in data.images if len(data.boxes(i)[0])]
        if not image_ids:
            raise LpovodError(f"{dataset}: no image has an annotation to learn from")
        classes = {category: row for row, category in enumerate(sorted(data.categories))}
        regions = digest_of_shards(store)
        made_from = identity(
            "base_detector", settings, dataset=dataset, network=network, region_embeddings=regions
        ) | {
            "backbone": backbone.model_dump(mode="json"),
            "seed": seed,
            "classes": [data.categories[c]["name"] for c in classes],
        }
        torch.manual_seed(seed)
        embedding = store.read(next(i for i in store.image_ids if store.count(i)))["embedding"]
        model = Detector(backbone, settings, len(classes), embedding.shape[1])
        start_from(model, network, backbone.architecture)
        model = ready(model, device, schedule.precision)
        freeze_statistics(model.backbone)
        lines = train(
            model,
            lambda views: training_losses(model, data, views, classes, settings, device),
            training_batches(
                data, image_ids, schedule, backbone.long_side, seed, device, RegionsOf(store)
            ),
            steps_per_epoch(data, image_ids, schedule.images_per_step),
            schedule,
            checkpoint,
            resumable(made_from, code),
        )
        write_training(model, lines, made_from, detector, history, checkpoint)


def training_losses(
    model: Detector,
    data: CocoDataset,
    views: list[LoadedView],
    classes: dict[int, int],
    settings: BaseDetectorSettings,
    device: str,
) -> dict[str, Tensor]:
    """All losses of one training step.

    Args:
        model: the detector, in training mode.
        data: the annotations.
        views: images with their proposals and CLIP's embeddings of them (`extra`, regions with the
            column ``embedding``).
        classes: row of each base class by category id.
        settings: where regions come from, how many are sampled, and the weight of distillation.
        device: where the model is.
    """
    pyramid = model.pyramid(batch(views, device, model.backbone.normalisation))
    objects = [view.to_view(data.boxes(view.view.image_id)[0]) for view in views]
    given = [view.to_view(view.extra.box) for view in views]
    losses: dict[str, Tensor] = {}
    candidates = given
    if model.rpn_head is not None:
        losses, candidates = _own_regions(model.rpn_head, pyramid, objects, views)
    sampled, proposals, embeddings = [], [], []
    for number, view in enumerate(views):
        categories = data.boxes(view.view.image_id)[1]
        labels = torch.tensor([classes[int(c)] for c in categories])
        torch.manual_seed(view.view.seed)
        sampled.append(
            sample_regions(objects[number], labels, candidates[number], len(classes), settings)
        )
        some = torch.randperm(len(given[number]))[: settings.distillation_regions].sort().values
        proposals.append(given[number][some])
        embeddings.append(torch.from_numpy(view.extra["embedding"][some.numpy()]).float())
    return losses | detector_losses(
        model,
        pyramid,
        sampled,
        proposals,
        torch.cat(embeddings),
        settings.distillation_weight,
    )


def _own_regions(
    rpn_head: RegionProposalNetwork,
    pyramid: list[Tensor],
    objects: list[Tensor],
    views: list[LoadedView],
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The region proposal network's two losses, and its boxes of each image."""
    sizes = [view.size for view in views]
    seeds = [view.view.seed for view in views]
    outputs, anchors = rpn_head(pyramid), make_anchors(pyramid)
    losses = rpn_losses(outputs, anchors, send_all(objects, pyramid[0].device), sizes, seeds)
    boxes = [boxes for boxes, _ in rpn_proposals(outputs, anchors, sizes)]
    return losses, list(torch.cat(boxes).cpu().split([len(of_image) for of_image in boxes]))
