"""Stage `proposals`: class-agnostic boxes with objectness, learned from base annotations alone.

The first stage of the Object Localization Network (Kim et al. 2022, "Learning Open-World Object
Proposals without Learning to Classify"): one square anchor per cell, boxes by four distances, and
objectness as the centerness of the anchor in its object. Nothing learns to tell an object from
what is not annotated, and so unannotated objects are found as well.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import box_iou
from torchvision.ops import nms as suppress

from lpovod.artifacts import (
    LpovodError,
    fingerprint,
    identity,
    read_tensors,
    sha256,
    write_json,
)
from lpovod.backbone import STRIDES, build_backbone
from lpovod.boxes import clip, match, take
from lpovod.config import Backbone, Proposals
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.distributed import join, total
from lpovod.images import LoadedView, batch, inference_views, load_views, training_views
from lpovod.importers.backbone import start_from
from lpovod.progress import progress, say
from lpovod.store import RegionStore, write_regions
from lpovod.training import train, write_training

RECALL_AT = (10, 50, 100)


class ProposalNetwork(nn.Module):
    """Backbone, pyramid, and a head of one 3 x 3 convolution with two outputs per cell."""

    def __init__(self, backbone: Backbone, anchor_scale: float):
        super().__init__()
        self.backbone, self.neck = build_backbone(backbone)
        self.anchor_scale = anchor_scale
        self.conv = nn.Conv2d(backbone.channels, backbone.channels, 3, padding=1)
        self.distances = nn.Conv2d(backbone.channels, 4, 1)
        self.objectness = nn.Conv2d(backbone.channels, 1, 1)
        for output in (self.distances, self.objectness):
            nn.init.normal_(output.weight, std=0.01)
            nn.init.zeros_(output.bias)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each level: anchors (cells, 4), boxes (n, cells, 4), objectness logits (n, cells)."""
        return [
            self._level(features, stride)
            for features, stride in zip(self.neck(self.backbone(images)), STRIDES, strict=True)
        ]

    def _level(self, features: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
        x = functional.normalize(functional.relu(self.conv(features)), dim=1)
        rows, columns = features.shape[-2:]
        side = self.anchor_scale * stride
        y, x_ = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        centre = (torch.stack([x_, y], dim=-1).reshape(-1, 2) * stride).to(x)
        # OLN decodes linearly; the exponential cannot leave the range where IoU has a gradient.
        distances = self.distances(x).flatten(2).transpose(1, 2).clamp(max=4).exp() * side / 2
        boxes = torch.cat([centre - distances[..., :2], centre + distances[..., 2:]], dim=-1)
        anchors = torch.cat([centre - side / 2, centre + side / 2], dim=-1)
        return anchors, boxes, self.objectness(x).flatten(1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """How central a point lies in its box, 1 in the middle, 0 outside; both (n, ...)."""
    before, after = points - boxes[:, :2], boxes[:, 2:] - points
    ratio = torch.minimum(before, after).clamp(min=0) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.prod(dim=1).sqrt()


def proposal_losses(
    anchors: Tensor, boxes: Tensor, logits: Tensor, objects: Tensor, settings: Proposals
) -> tuple[Tensor, Tensor]:
    """Box loss, (1 - IoU) x 10, and objectness loss, L1 of centerness, of one image.

    Args:
        anchors: (n, 4).
        boxes: (n, 4), predicted.
        logits: (n,), predicted.
        objects: (m, 4), the base annotations.
        settings: thresholds and number of samples.
    """
    pairwise = box_iou(objects, anchors)
    iou, assigned = pairwise.max(dim=0)
    # An object that no anchor fits well is learned from the anchor that fits it best.
    closest = (pairwise == pairwise.amax(dim=1, keepdim=True)).any(dim=0) & (iou >= 0.3)
    localised = take(((iou >= settings.box_iou) | closest).nonzero().flatten(), settings.samples)
    centred = take((iou >= 0.3).nonzero().flatten(), settings.samples)
    outside = take((iou < 0.1).nonzero().flatten(), settings.samples - len(centred))
    fit = _iou_of_pairs(boxes[localised], objects[assigned[localised]])
    # An object far from every anchor's size may leave an image without an anchor to learn from.
    box_loss = 10 * (1 - fit).sum() / max(1, len(localised))
    points = (anchors[centred, :2] + anchors[centred, 2:]) / 2
    target = torch.cat(
        [centerness(points, objects[assigned[centred]]), logits.new_zeros(len(outside))]
    )
    predicted = logits[torch.cat([centred, outside])].sigmoid()
    return box_loss, (predicted - target).abs().mean()


def _iou_of_pairs(a: Tensor, b: Tensor) -> Tensor:
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    shared = size.prod(dim=1)
    areas = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1)
    return shared / (areas - shared).clamp(min=1e-6)


def train_proposals(
    dataset: Path,
    backbone: Backbone,
    settings: Proposals,
    seed: int,
    state: Path,
    code: list[Path],
    network: Path,
    history: Path,
    device: str = "cpu",
) -> None:
    """Train the proposal network on the annotated images of `dataset`.

    Args:
        dataset: train.json; images without an annotation are left out.
        backbone: the network's size and the images' size.
        settings: the head's and the schedule's.
        seed: of initialisation, order, flips and samples.
        state: file of an unfinished training, to go on from; removed at the end.
        code: source files; a state of other code is not gone on from.
        network: output, the weights.
        history: output, one JSON line per epoch.
        device: cpu or cuda; started by a launcher, the ranks share every step.

    Raises:
        LpovodError: if no image is annotated, or a loss is not finite.
    """
    device = join(device)
    data = read_dataset(dataset)
    image_ids = [i for i in data.images if len(data.boxes(i)[0])]
    if not image_ids:
        raise LpovodError(f"{dataset}: no image has an annotation to learn proposals from")
    inputs = {"dataset": dataset} | ({"weights": backbone.weights} if backbone.weights else {})
    made_from = identity("proposals", settings, **inputs) | {
        "backbone": backbone.model_dump(mode="json"),
        "seed": seed,
    }
    torch.manual_seed(seed)
    model = ProposalNetwork(backbone, settings.anchor_scale)
    if backbone.weights:
        start_from(model, backbone.weights, backbone.architecture)
    model = model.to(device).train()
    schedule = settings.training
    lines = train(
        model,
        lambda views: _losses(model, data, views, settings, device),
        lambda epoch, step: load_views(
            data,
            training_views(data, image_ids, schedule, backbone.long_side, seed, epoch, step),
            schedule.images_per_step,
            schedule.workers,
        ),
        -(-len(image_ids) // schedule.images_per_step),
        schedule,
        state,
        fingerprint(made_from | {"code": [sha256(path) for path in code]}),
    )
    write_training(model, lines, made_from, network, history, state)


def _losses(
    model: ProposalNetwork,
    data: CocoDataset,
    views: list[LoadedView],
    settings: Proposals,
    device: str,
) -> dict[str, Tensor]:
    levels = model(batch(views, device, model.backbone.normalisation))
    anchors = torch.cat([level[0] for level in levels])
    boxes = torch.cat([level[1] for level in levels], dim=1)
    logits = torch.cat([level[2] for level in levels], dim=1)
    pairs = []
    for view, box, logit in zip(views, boxes, logits, strict=True):
        objects = view.to_view(data.boxes(view.view.image_id)[0]).to(device)
        torch.manual_seed(view.view.seed)
        pairs.append(proposal_losses(anchors, box, logit, objects, settings))
    images = total(torch.tensor(float(len(views)), device=device))
    return {
        "box": torch.stack([p[0] for p in pairs]).sum() / images,
        "objectness": torch.stack([p[1] for p in pairs]).sum() / images,
    }


def load_network(path: Path, backbone: Backbone, settings: Proposals) -> ProposalNetwork:
    """The trained network, in evaluation mode."""
    tensors, _ = read_tensors(path, "proposals")
    model = ProposalNetwork(backbone, settings.anchor_scale)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    # Saves a fifth of the time on a CPU; in training its sums of gradients are less exact.
    return model.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def propose(
    dataset: Path,
    network: Path,
    backbone: Backbone,
    settings: Proposals,
    output: Path,
    recall: Path,
    device: str = "cpu",
) -> None:
    """Write the proposals of every image of a split, and their recall of its annotations.

    Args:
        dataset: the split's json.
        network: the trained network.
        backbone: as in training.
        settings: as in training.
        output: a region store without vectors, best objectness first within an image.
        recall: json of the recall (percent, at an IoU of .5) of base and novel objects.
        device: where to run.
    """
    data = read_dataset(dataset)
    model = load_network(network, backbone, settings).to(device)
    kept = max(settings.per_image, *RECALL_AT)
    sizes = (backbone.short_side, backbone.long_side, settings.training.images_per_step)
    batches = inference_views(data, list(data.images), *sizes)
    ident = identity("proposals", settings, dataset=dataset, network=network)
    found = {}
    with (
        write_regions(output, ident) as writer,
        progress(None, "proposals", "image", len(data.images)) as bar,
    ):
        for views in batches:
            levels = model(batch(views, device, model.backbone.normalisation))
            for number, view in enumerate(views):
                boxes, scores = _best(levels, number, view, data, settings, kept)
                found[view.view.image_id] = boxes
                top = slice(settings.per_image)
                writer.add(view.view.image_id, boxes[top], scores[top])
            bar.update(len(views))
    measured = recall_by_split(data, found)
    write_json(recall, {"recall": measured, "seen": "base annotations of the training images"})
    say(f"recall: {measured}")


def _best(
    levels: list[tuple[Tensor, Tensor, Tensor]],
    number: int,
    view: LoadedView,
    data: CocoDataset,
    settings: Proposals,
    kept: int,
) -> tuple[np.ndarray, np.ndarray]:
    boxes, scores = [], []
    for _, level_boxes, logits in levels:
        top = logits[number].topk(min(settings.per_level, logits.shape[1])).indices
        boxes.append(level_boxes[number, top])
        scores.append(logits[number, top].sigmoid())
    size = data.images[view.view.image_id]
    box = clip(torch.cat(boxes) / view.scale.repeat(2).to(boxes[0]), size["width"], size["height"])
    score = torch.cat(scores)
    solid = ((box[:, 2:] - box[:, :2]) >= 1).all(dim=1)
    box, score = box[solid], score[solid]
    best = suppress(box, score, settings.nms)[:kept]
    return box[best].cpu().numpy(), score[best].cpu().numpy()


def recall_by_split(
    data: CocoDataset, proposals: dict[int, np.ndarray], at: tuple[int, ...] = RECALL_AT
) -> dict[str, dict[str, float]]:
    """Percent of annotated objects that one of the first n proposals meets with an IoU of .5.

    Args:
        data: the annotations; crowds are left out.
        proposals: (m, 4) boxes by image id, best first.
        at: the values of n.

    Returns:
        for ``base`` and ``novel`` (where there are objects), the recall by n.
    """
    met: dict[str, list[np.ndarray]] = {}
    for image_id in data.images:
        boxes, categories = data.boxes(image_id)
        found = torch.from_numpy(proposals[image_id])
        covered = [match(torch.from_numpy(boxes), found[:n])[0].numpy() >= 0.5 for n in at]
        for category, flags in zip(categories, np.array(covered).T, strict=True):
            met.setdefault(data.categories[int(category)]["split"], []).append(flags)
    return {
        split: {str(n): round(100 * float(v), 2) for n, v in zip(at, np.mean(f, 0), strict=True)}
        for split, f in sorted(met.items())
    }


def read_proposals(path: Path, dataset: Path) -> RegionStore:
    """Open the proposals of a split, whoever wrote them.

    Raises:
        LpovodError: if they were made for another split or other images.
    """
    store = RegionStore(path, "proposals")
    stated = store.identity["inputs"].get("dataset")
    if stated != sha256(dataset):
        raise LpovodError(f"{path} holds proposals of other images than those of {dataset}")
    return store
