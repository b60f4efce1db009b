"""From stored region features to scores and detections (Eq. 5-7).

* the sigmoid of feature · weight, for base classes (trained) and novel ones (linear probe);
* the softmax, over all classes, of cosine / temperature between the CLIP head and the class name;
* base score: CLIP head^alpha · sigmoid^(1 - alpha); novel: CLIP head^(1 - beta) · sigmoid^beta;
* the square root of score · objectness, a threshold, NMS within each class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lpovod.config import EvaluationSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import temperature_of
from lpovod.formats.class_rows import read_class_rows
from lpovod.formats.coco import Detected
from lpovod.formats.regions import Regions
from lpovod.measures.ablations import Variant
from lpovod.torchvision_ops import nms

FIRST_CANDIDATES = 1000  # that enter the NMS of an image


@dataclass(frozen=True)
class Scores:
    """Raw scores of one image's regions, classes in the order base, then novel.

    Attributes:
        boxes: (n, 4) proposals, xyxy.
        refined: (n, 4) after box regression.
        objectness: (n,).
        sigmoid: (n, classes).
        cosine: (n, classes) between CLIP head and class name.
        clip: (n, classes) between CLIP's own embedding and class name; None without embeddings.
    """

    boxes: Tensor
    refined: Tensor
    objectness: Tensor
    sigmoid: Tensor
    cosine: Tensor
    clip: Tensor | None


@dataclass(frozen=True)
class ClassWeights:
    """Weights that score regions; rows are base classes, then novel ones.

    Attributes:
        base: names of the base classes.
        novel: names of the novel classes.
        weights: (classes, dimension) of the linear classifiers.
        text: (classes, D) unit text embeddings.
        temperature: softmax temperature over cosines.
    """

    base: list[str]
    novel: list[str]
    weights: Tensor
    text: Tensor
    temperature: float

    @property
    def names(self) -> list[str]:
        """Names of all classes, in the order of the rows."""
        return [*self.base, *self.novel]


def read_class_weights(
    detector: Path, linear_probe: Path, text_embeddings: list[Path], settings: EvaluationSettings
) -> ClassWeights:
    """Join base prototypes, novel weights and text embeddings by class name.

    Raises:
        LpovodError: if a class has no text embedding, if the probe belongs to another detector, or
            if there is neither a temperature nor CLIP's logit scale.
    """
    rows = read_class_rows(detector, linear_probe, text_embeddings)
    names = [*rows.base, *rows.novel]
    return ClassWeights(
        rows.base,
        rows.novel,
        torch.from_numpy(np.stack([rows.weights[name] for name in names])),
        torch.from_numpy(np.stack([rows.vectors[name] for name in names])),
        temperature_of(rows.text, text_embeddings[0], settings),
    )


def score_regions(regions: Regions, embedded: Regions | None, classes: ClassWeights) -> Scores:
    """Raw scores of the regions of one image.

    Args:
        regions: with the columns of stage `region_features`.
        embedded: CLIP's own embeddings of the same regions, for comparison.
        classes: the weights to score with.

    Raises:
        LpovodError: if `embedded` has other boxes than `regions`.
    """
    clip = None
    if embedded is not None:
        if not np.array_equal(embedded.box, regions.box):
            raise LpovodError(
                f"image {regions.image_id[0]}: its region embeddings and its region features have "
                "different boxes. Make them again: snakemake --forcerun region_features"
            )
        clip = torch.from_numpy(embedded["embedding"]).float() @ classes.text.T
    return Scores(
        torch.from_numpy(regions.box),
        torch.from_numpy(regions["refined"]),
        torch.from_numpy(regions.objectness),
        (torch.from_numpy(regions["feature"]).float() @ classes.weights.T).sigmoid(),
        torch.from_numpy(regions["embedding"]).float() @ classes.text.T,
        clip,
    )


def join(images: Sequence[Scores]) -> Scores:
    """Raw scores of several images as if they were one; all of them with CLIP's own, or none."""
    clip = [scores.clip for scores in images if scores.clip is not None]
    return Scores(
        torch.cat([scores.boxes for scores in images]),
        torch.cat([scores.refined for scores in images]),
        torch.cat([scores.objectness for scores in images]),
        torch.cat([scores.sigmoid for scores in images]),
        torch.cat([scores.cosine for scores in images]),
        torch.cat(clip) if clip else None,
    )


def final_scores(
    scores: Scores, probe_weights: Sequence[float] | Tensor, variant: Variant
) -> Tensor:
    """(n, classes) scores as they enter the NMS.

    Args:
        scores: raw scores of n regions.
        probe_weights: for each class, the weight of its linear classifier; the CLIP head has the
            rest.
        variant: the method or an ablation.
    """
    cosine = scores.clip if variant.true_clip else scores.cosine
    assert cosine is not None, "CLIP's own scores need its embeddings of the regions"
    clip = (cosine / variant.temperature).softmax(dim=1)
    probe_weight = torch.as_tensor(probe_weights)
    score = clip ** (1 - probe_weight) * scores.sigmoid**probe_weight
    return (score * scores.objectness[:, None] if variant.objectness else score).sqrt()


def detect(
    scores: Scores,
    probe_weights: Sequence[float],
    category_ids: list[int],
    variant: Variant,
    settings: EvaluationSettings,
    only: Sequence[int] | None = None,
) -> Detected:
    """Detections of one image: threshold, NMS within each class, the best `per_image`.

    Args:
        scores: raw scores of its regions.
        probe_weights: see `final_scores`.
        category_ids: of the classes.
        variant: the method or an ablation.
        settings: threshold, NMS and number of detections.
        only: columns of the classes to detect; None for all.
    """
    score = final_scores(scores, probe_weights, variant)
    if only is not None:
        score, category_ids = score[:, list(only)], [category_ids[column] for column in only]
    boxes = scores.refined if variant.refined else scores.boxes
    return best_detections(score, boxes, torch.tensor(category_ids), settings)


def best_detections(
    score: Tensor, boxes: Tensor, category_ids: Tensor, settings: EvaluationSettings
) -> Detected:
    """Detections of one image from its final scores.

    Args:
        score: (n, classes), see `final_scores`.
        boxes: (n, 4) xyxy.
        category_ids: (classes,) int64.
        settings: threshold, NMS and number of detections.
    """
    rows, classes = (score > settings.score_threshold).nonzero(as_tuple=True)
    if not len(rows):
        return np.empty((0, 4), np.float32), np.empty(0, np.float32), np.empty(0, np.int64)
    above, boxes = score[rows, classes], boxes[rows]
    best = _best(boxes, above, classes, settings)
    return boxes[best].numpy(), above[best].numpy(), category_ids[classes[best]].numpy()


def _best(boxes: Tensor, score: Tensor, classes: Tensor, settings: EvaluationSettings) -> Tensor:
    """Rows of the best detections after NMS within each class, best first.

    A detection suppresses none with a higher score, so the NMS sees the highest scores first, and
    more of them only if too few are left: a thousand classes give hundreds of thousands.
    """
    count = FIRST_CANDIDATES
    while True:
        high, top = score.topk(min(count, len(score)))
        # Each class gets a place of its own, where boxes of other classes never overlap; in float64
        # no digit of a coordinate is lost by it.
        apart = classes[top, None] * (boxes.max().double() + 1)
        kept = nms(boxes[top].double() + apart, high.double(), settings.nms)
        if len(kept) >= settings.per_image or count >= len(score):
            return top[kept[: settings.per_image]]
        count *= 4
