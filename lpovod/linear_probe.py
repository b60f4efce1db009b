"""Stage `linear_probe`: a sigmoid linear classifier per novel class, on frozen features.

Retrieved regions are positives; regions of the same images that overlap them too little are
negatives, and so the probe learns to reject the badly placed boxes that CLIP scores as highly as
good ones (Sec. 3.3 of the paper). As in the original all classes are trained together: a region
retrieved for one class is a negative of the others.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpovod.artifacts import LpovodError, check_made_from, identity, write_tensors
from lpovod.base_detector import classification_loss
from lpovod.boxes import match, sample
from lpovod.config import LinearProbe
from lpovod.progress import progress, say
from lpovod.pseudo_labels import read_pseudo_labels
from lpovod.store import RegionStore
from lpovod.training import rate_at


@dataclass(frozen=True)
class Candidates:
    """The candidate regions of one image.

    Attributes:
        feature: (n, dimension) float32, of the region head.
        iou: (n,) largest IoU with a pseudo-label.
        label: (n,) class of that pseudo-label.
    """

    feature: Tensor
    iou: Tensor
    label: Tensor


def train_linear_probe(
    pseudo_labels: list[Path],
    region_features: list[Path],
    settings: LinearProbe,
    seed: int,
    output: Path,
) -> None:
    """Train the novel classes' weights.

    Args:
        pseudo_labels: one json per class.
        region_features: for each of them, in the same order, the features of its images' regions.
        settings: sampling and schedule.
        seed: of order and sampling.
        output: {class name: (dimension,) float32}.

    Raises:
        LpovodError: if features and pseudo-labels do not belong together.
    """
    made_from, detectors = {}, set()
    for labels, features in zip(pseudo_labels, region_features, strict=True):
        store = RegionStore(features, "region_features")
        check_made_from(features, store.identity, "pseudo_labels", labels)
        detectors.add(store.identity["inputs"]["detector"])
        made_from[f"pseudo_labels_{labels.stem}"] = labels
    if len(detectors) != 1:
        raise LpovodError(f"{region_features[0]} and the others come from different detectors")
    retrieved = read_pseudo_labels(pseudo_labels)
    names = list(retrieved)
    images = gather_candidates(retrieved, region_features)
    weights = fit(list(images.values()), len(names), settings, seed)
    ident = identity("linear_probe", settings, detector=detectors.pop(), **made_from)
    write_tensors(output, dict(zip(names, weights.numpy(), strict=True)), ident | {"seed": seed})


def gather_candidates(
    retrieved: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]], region_features: list[Path]
) -> dict[int, Candidates]:
    """Candidates of every image that a class retrieved a region of, labelled by all classes.

    Args:
        retrieved: as `read_pseudo_labels` returns it.
        region_features: stores that hold those images.
    """
    objects: dict[int, list[tuple[int, np.ndarray]]] = {}
    for label, of_image in enumerate(retrieved.values()):
        for image_id, (boxes, _) in of_image.items():
            objects.setdefault(image_id, []).append((label, boxes))
    stores = [RegionStore(path, "region_features") for path in region_features]
    found = {}
    for image_id, labelled in sorted(objects.items()):
        here = [s.read(image_id, ["feature"]) for s in stores if image_id in s]
        # An image that two classes retrieved has its proposals in both stores: count each once.
        box, rows = np.unique(np.concatenate([r.box for r in here]), axis=0, return_index=True)
        feature = np.concatenate([r["feature"] for r in here])[rows]
        boxes = torch.from_numpy(np.concatenate([b for _, b in labelled]))
        labels = torch.tensor([label for label, b in labelled for _ in b])
        iou, assigned = match(torch.from_numpy(box), boxes)
        found[image_id] = Candidates(torch.from_numpy(feature).float(), iou, labels[assigned])
    return found


def fit(images: list[Candidates], classes: int, settings: LinearProbe, seed: int) -> Tensor:
    """Stochastic gradient descent from zero on the focal loss of sampled regions.

    Args:
        images: the candidates of each image.
        classes: number of novel classes.
        settings: sampling and schedule.
        seed: of order and sampling.

    Returns:
        (classes, dimension) float32.
    """
    torch.manual_seed(seed)
    weights = torch.zeros(classes, images[0].feature.shape[1], requires_grad=True)
    optimiser = torch.optim.SGD(
        [weights], settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    per_epoch = -(-len(images) // settings.images_per_step)
    steps = [
        order[i * settings.images_per_step : (i + 1) * settings.images_per_step]
        for order in (torch.randperm(len(images)) for _ in range(settings.epochs))
        for i in range(per_epoch)
    ]
    loss = torch.zeros(())
    for number, chosen in enumerate(progress(steps, "linear probe", "step")):
        optimiser.param_groups[0]["lr"] = rate_at(number, per_epoch, settings)
        loss = probe_loss(weights, [images[i] for i in chosen], settings)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    if not torch.isfinite(weights).all():
        raise LpovodError("linear_probe: weights are not finite. Lower linear_probe.learning_rate.")
    say(f"{classes} classes from {len(images)} images, last loss {float(loss.detach()):.4f}")
    return weights.detach()


def probe_loss(weights: Tensor, images: list[Candidates], settings: LinearProbe) -> Tensor:
    """Focal loss of the sampled regions of a batch of images, over the number of positives."""
    classes = len(weights)
    features, labels = [], []
    for image in images:
        positive, negative = sample(
            image.iou, settings.samples, settings.positives, settings.negatives_per_positive
        )
        features += [image.feature[positive], image.feature[negative]]
        labels += [image.label[positive], torch.full((len(negative),), classes)]
    return classification_loss(torch.cat(features) @ weights.T, torch.cat(labels))
