"""The linear probe: a sigmoid linear classifier per novel class, on frozen features.

Retrieved regions are positives. Regions of the same images that overlap them too little are
negatives, so the probe learns to reject the badly placed boxes that CLIP scores as highly as good
ones (Sec. 3.3 of the paper). As in the original, all classes are trained together: a region
retrieved for one class is a negative of the others. Regions on objects that retrieval marks as
ignored are neither: an object that missed the top K may still belong to the class.

On stored features a step is two small matrix products: numpy computes them in a fraction of the
time of torch's overhead, and without importing torch.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lpovod.config import LinearProbeSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.image_features import ImageFeatures
from lpovod.formats.pseudo_labels import PseudoLabels
from lpovod.overlaps import overlapping, overlaps
from lpovod.progress import log, progress
from lpovod.schedule import rate_at

FEATURE_BYTES = 1 << 30
"""Features that stay in memory; beyond it they are read from the files in every epoch."""


class Memory:
    """Features of images, read when they are needed; a limited number of bytes stays in memory."""

    def __init__(self, features: ImageFeatures, limit: int = FEATURE_BYTES):
        self._features, self._left = features, limit
        self._kept: dict[int, np.ndarray] = {}

    def boxes(self, image_id: int) -> np.ndarray:
        """(n, 4) float32 xyxy."""
        return self._features.read(image_id)["box"]

    def feature(self, image_id: int) -> np.ndarray:
        """(n, dimension) float16."""
        if image_id in self._kept:
            return self._kept[image_id]
        feature = self._features.read(image_id)["feature"]
        if feature.nbytes <= self._left:
            self._kept[image_id], self._left = feature, self._left - feature.nbytes
        return feature


@dataclass(frozen=True)
class Candidates:
    """The candidate regions of one image.

    Attributes:
        memory: that reads their features.
        image_id: of the image.
        rows: (n,) their rows among the image's features.
        label: (n,) class of the pseudo-label that the region overlaps most, if their IoU is 0.5 or
            more; otherwise -1.
    """

    memory: Memory
    image_id: int
    rows: np.ndarray
    label: np.ndarray

    def feature(self, selected: np.ndarray) -> np.ndarray:
        """Features of some candidates, (m, dimension) float32."""
        return self.memory.feature(self.image_id)[self.rows[selected]].astype(np.float32)

    @cached_property
    def positive(self) -> np.ndarray:
        """Rows with a class, (positives,) int64."""
        return np.flatnonzero(self.label >= 0)

    @cached_property
    def negative(self) -> np.ndarray:
        """Rows without a class, (negatives,) int64."""
        return np.flatnonzero(self.label < 0)


def gather_candidates(
    retrieved: PseudoLabels, ignored: dict[int, np.ndarray], features: ImageFeatures
) -> dict[int, Candidates]:
    """Candidates of every image with a retrieved region, labelled by all classes.

    Args:
        retrieved: result of `read_pseudo_labels`.
        ignored: result of `read_ignored`; a region that overlaps one of these boxes is a candidate
            only if it is a positive.
        features: of those images.

    Returns:
        Candidates by image id, in ascending order.

    Raises:
        LpovodError: if the features lack an image, or a retrieved region.
    """
    objects: dict[int, list[tuple[int, np.ndarray]]] = {}
    for label, of_image in enumerate(retrieved.values()):
        for image_id, (boxes, _) in of_image.items():
            objects.setdefault(image_id, []).append((label, boxes))
    candidates, memory = {}, Memory(features)
    for image_id, labelled in sorted(objects.items()):
        box, rows = np.unique(memory.boxes(image_id), axis=0, return_index=True)
        boxes = np.concatenate([b for _, b in labelled])
        labels = np.array([label for label, b in labelled for _ in b])
        label = np.full(len(box), -1)
        if len(boxes):  # a person may have dropped all regions of an image
            iou = overlaps(box, boxes)[0]
            if not (iou == 1).any(axis=0).all():
                raise LpovodError(
                    f"image {image_id}: a retrieved region has no features. Make them again: "
                    "snakemake --forcerun retrieved_region_features"
                )
            label = np.where(iou.max(axis=1) >= 0.5, labels[iou.argmax(axis=1)], -1)
        ignored_boxes = ignored.get(image_id, np.empty((0, 4), np.float32))
        usable = (label >= 0) | ~overlapping(box, ignored_boxes)
        candidates[image_id] = Candidates(memory, image_id, rows[usable], label[usable])
    return candidates


def fit(
    images: list[Candidates], classes: int, settings: LinearProbeSettings, seed: int
) -> np.ndarray:
    """Stochastic gradient descent from zero on the focal loss of sampled regions.

    Args:
        images: the candidates of each image.
        classes: number of novel classes.
        settings: sampling and schedule.
        seed: seed of the order of images and of sampling.

    Returns:
        The weights, (classes, dimension) float32.

    Raises:
        LpovodError: if training diverges.
    """
    random = np.random.default_rng(seed)
    dimension = images[0].feature(np.arange(0)).shape[1]
    weights = np.zeros((classes, dimension), np.float32)
    velocity, loss = np.zeros_like(weights), 0.0
    per_epoch = -(-len(images) // settings.images_per_step)
    steps = [
        order[i * settings.images_per_step : (i + 1) * settings.images_per_step]
        for order in (random.permutation(len(images)) for _ in range(settings.epochs))
        for i in range(per_epoch)
    ]
    for number, batch in enumerate(progress(steps, "linear probe", "step")):
        feature, label = draw([images[i] for i in batch], settings, random)
        loss, gradient = focal_loss(feature @ weights.T, label)
        velocity *= np.float32(settings.momentum)
        velocity += gradient.T @ feature + np.float32(settings.weight_decay) * weights
        weights -= np.float32(rate_at(number, per_epoch, settings)) * velocity
    if not np.isfinite(weights).all():
        raise LpovodError("linear_probe: weights are not finite. Lower linear_probe.learning_rate.")
    log.info(f"{classes} classes from {len(images)} images, last loss {loss:.4f}")
    return weights


def draw(
    images: list[Candidates], settings: LinearProbeSettings, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the sampled regions of a batch of images.

    The rule is the same as the detector's (`lpovod.boxes.sample`).
    """
    features, labels = [], []
    for image in images:
        positive = take(
            image.positive, int(settings.samples_per_image * settings.positive_fraction), random
        )
        limit = settings.negatives_per_positive * max(1, len(positive))
        limit = min(limit, settings.samples_per_image - len(positive))
        rows = np.concatenate([positive, take(image.negative, limit, random)])
        features.append(image.feature(rows))
        labels.append(image.label[rows])
    return np.concatenate(features), np.concatenate(labels)


def take(rows: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Sample at most `count` rows, without replacement."""
    return rows if len(rows) <= count else random.choice(rows, count, replace=False, shuffle=False)


def focal_loss(logits: np.ndarray, labels: np.ndarray) -> tuple[float, np.ndarray]:
    """Sigmoid focal loss (gamma 2, alpha 0.25) over the number of positives, and its gradient.

    Args:
        logits: (n, classes).
        labels: (n,) class, or -1 for background.

    Returns:
        The sum over all regions and classes, and its gradient by the logits, (n, classes).
    """
    positive = labels[:, None] == np.arange(logits.shape[1])
    sign = np.where(positive, np.float32(-1), np.float32(1))
    wrong_logit = logits * sign  # of the false answer
    log_right = -np.logaddexp(np.float32(0), wrong_logit)
    wrong = -np.expm1(log_right)
    weight = np.where(positive, np.float32(0.25), np.float32(0.75)) / max(1, positive.sum())
    weight = weight.astype(np.float32) * wrong
    gradient = sign * weight * (wrong - 2 * (1 - wrong) * log_right) * wrong
    return float(-(weight * wrong * log_right).sum()), gradient
