"""Stage `proposals`, its training: the proposal network learns from base annotations alone."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lpovod.artifacts import identity
from lpovod.boxes import rows_of, take
from lpovod.config import BackboneSettings, ProposalsSettings
from lpovod.devices import explaining_memory
from lpovod.distributed import total, training_ranks
from lpovod.exceptions import LpovodError
from lpovod.formats.coco import CocoDataset, read_dataset
from lpovod.importers.backbone import start_from
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.torchvision_ops import box_iou
from lpovod.training import ready, resumable, train, write_training
from lpovod.transfers import send_all
from lpovod.views import LoadedView, batch, steps_per_epoch, training_batches


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central a point lies in its box, 1 in the middle, 0 outside; both (n, ...)."""
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(before, after).clamp(min=0) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.prod(dim=1).sqrt()


def proposal_losses(
    anchors: Tensor,
    boxes: Tensor,
    logits: Tensor,
    objects: Sequence[Tensor],
    seeds: list[int],
    settings: ProposalsSettings,
) -> tuple[Tensor, Tensor]:
    """Box loss, (1 - IoU) x 10, and objectness loss, L1 of centerness, of each of k images, (k,).

    Args:
        anchors: (n, 4).
        boxes: (k, n, 4), predicted.
        logits: (k, n), predicted.
        objects: for each image (m, 4), the base annotations.
        seeds: of the samples of each image.
        settings: thresholds and number of samples.
    """
    matches = [_match(anchors, of_image, settings.box_iou) for of_image in objects]
    rows = rows_of(torch.cat([marks for marks, _ in matches]))
    losses = []
    for number, (_, matched) in enumerate(matches):
        torch.manual_seed(seeds[number])
        localised, centred, outside = rows[3 * number : 3 * number + 3]
        localised = take(localised, settings.samples_per_image)
        centred = take(centred, settings.samples_per_image)
        outside = take(outside, settings.samples_per_image - len(centred))
        fit = _iou_of_pairs(boxes[number, localised], matched[localised])
        # An object far from every anchor's size may leave an image without an anchor to learn from.
        box_loss = 10 * (1 - fit).sum() / max(1, len(localised))
        points = (anchors[centred, :2] + anchors[centred, 2:]) / 2
        target = torch.cat([centerness(points, matched[centred]), logits.new_zeros(len(outside))])
        predicted = logits[number, torch.cat([centred, outside])].sigmoid()
        losses.append(torch.stack([box_loss, (predicted - target).abs().mean()]))
    box_losses, objectness_losses = torch.stack(losses).unbind(dim=1)
    return box_losses, objectness_losses


def _match(anchors: Tensor, objects: Tensor, box_iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Anchors that learn a box, a centerness, that they are outside, (3, n) bool; their objects."""
    pairwise = box_iou(objects, anchors)
    iou, assigned = pairwise.max(dim=0)
    # An object that no anchor fits well is learned from the anchor that fits it best.
    closest = (pairwise == pairwise.amax(dim=1, keepdim=True)).any(dim=0) & (iou >= 0.3)
    marks = [(iou >= box_iou_threshold) | closest, iou >= 0.3, iou < 0.1]
    return torch.stack(marks), objects[assigned]


def _iou_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    shared = size.prod(dim=1)
    areas = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1)
    return shared / (areas - shared).clamp(min=1e-6)


def train_proposal_network(
    dataset: Path,
    backbone: BackboneSettings,
    settings: ProposalsSettings,
    seed: int,
    checkpoint: Path,
    code: str,
    network: Path,
    history: Path,
    device: str = "cpu",
    threads: int = 1,
    workers: int = 0,
    images_at_once: int = 0,
) -> None:
    """Train the proposal network on the annotated images of `dataset`.

    Args:
        dataset: train.json; images without an annotation are left out.
        backbone: the network's size and the images' size.
        settings: the head's and the schedule's.
        seed: of initialisation, order, flips and samples.
        checkpoint: file of an unfinished training, which is resumed; removed at the end.
        code: digest of the source code; a checkpoint written by different code is not resumed.
        network: output, the weights.
        history: output, one JSON line per epoch.
        device: cpu or cuda; started by a launcher, the ranks share every step.
        threads: processors to use on a CPU, where the training starts ranks itself: as many
            processes as there are images in a step, at most, share every step.
        workers: processes that load images for each rank; 0 for the settings'.
        images_at_once: images that a rank computes at once; 0 for the settings'.

    Raises:
        LpovodError: if no image is annotated, or a loss is not finite.
    """
    schedule = settings.training.divided(workers, images_at_once)
    with (
        training_ranks(device, threads, schedule.images_per_step) as device,
        explaining_memory(
            "proposals.training.images_at_once or short_sides; workers, if a loading process "
            "lacks it"
        ),
    ):
        data = read_dataset(dataset)
        image_ids = [i for i in data.images if len(data.boxes(i)[0])]
        if not image_ids:
            raise LpovodError(f"{dataset}: no image has an annotation to learn proposals from")
        inputs = {"dataset": dataset} | ({"weights": backbone.weights} if backbone.weights else {})
        learned = settings.model_dump(mode="json", include=settings.LEARNED)
        made_from = identity("proposals", learned, **inputs) | {
            "backbone": backbone.model_dump(mode="json"),
            "seed": seed,
        }
        torch.manual_seed(seed)
        model = ProposalNetwork(backbone, settings.anchor_scale)
        if backbone.weights:
            start_from(model, backbone.weights, backbone.architecture)
        model = ready(model, device, schedule.precision)
        lines = train(
            model,
            lambda views: _losses(model, data, views, settings, device),
            training_batches(data, image_ids, schedule, backbone.long_side, seed, device),
            steps_per_epoch(data, image_ids, schedule.images_per_step),
            schedule,
            checkpoint,
            resumable(made_from, code),
        )
        write_training(model, lines, made_from, network, history, checkpoint)


def _losses(
    model: ProposalNetwork,
    data: CocoDataset,
    views: list[LoadedView],
    settings: ProposalsSettings,
    device: str,
) -> dict[str, Tensor]:
    levels = model(batch(views, device, model.backbone.normalisation))
    anchors = torch.cat([level[0] for level in levels])
    boxes = torch.cat([level[1] for level in levels], dim=1)
    logits = torch.cat([level[2] for level in levels], dim=1)
    objects = send_all([view.to_view(data.boxes(view.view.image_id)[0]) for view in views], device)
    seeds = [view.view.seed for view in views]
    box, objectness = proposal_losses(anchors, boxes, logits, objects, seeds, settings)
    images = total(box.new_full((), float(len(views))))
    return {"box": box.sum() / images, "objectness": objectness.sum() / images}
