"""Scores of regions and what becomes of them: arithmetic on stored region features (Eq. 5-7).

* the sigmoid of feature · weight, for base classes (trained) and novel ones (linear probe);
* the softmax, over all classes, of cosine / temperature between the CLIP head and the class name;
* base score: CLIP head^alpha · sigmoid^(1 - alpha); novel: CLIP head^(1 - beta) · sigmoid^beta;
* the root of score · objectness, a threshold, NMS within each class.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from lpovod.artifacts import check_made_from, read_tensors
from lpovod.config import EvaluationSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import read_text_embeddings
from lpovod.formats.coco import Detections
from lpovod.formats.regions import RegionStore
from lpovod.measures.ablations import Variant


@dataclass(frozen=True)
class Scores:
    """Raw scores of one image's regions, classes in the order base, then novel.

    Attributes:
        boxes: (n, 4) proposals; refined: (n, 4) after box regression.
        objectness: (n,).
        sigmoid: (n, classes).
        cosine: (n, classes) of the CLIP head; clip: the same of CLIP itself, if it is there.
    """

    boxes: Tensor
    refined: Tensor
    objectness: Tensor
    sigmoid: Tensor
    cosine: Tensor
    clip: Tensor | None


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
    detector: Path, linear_probe: Path, text_embeddings: list[Path], settings: EvaluationSettings
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
    settings: EvaluationSettings,
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
        kept = batched_nms(boxes, score[rows, classes], classes, settings.nms)[: settings.per_image]
        found[image_id] = tuple(
            t[kept].numpy() for t in (boxes, score[rows, classes], categories[classes])
        )
    return found
