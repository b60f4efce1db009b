"""The trained model on anyone's images: `lpovod.load` and `Model.detect`.

The same functions as in the stages, one after the other: proposals, what the detector says of them,
scores, NMS. So a model detects what the run's evaluation measured.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import torch
from PIL import Image, ImageOps

from lpovod.devices import device_of, explaining_memory
from lpovod.exceptions import LpovodError, existing
from lpovod.formats.coco import coco_results, ids_of
from lpovod.formats.images import EIGHT_BITS, read_image
from lpovod.formats.model import ModelClass, ModelFile, read_model
from lpovod.formats.regions import Regions
from lpovod.measures.ablations import Variant
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import build_detector, describe_regions
from lpovod.networks.proposal_inference import build_network, find_proposals
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.scoring import ClassWeights, detect, score_regions
from lpovod.views import HeightWidth, LoadedView, View, apply_view, padded, shown_size

Source: TypeAlias = Path | str | Image.Image | np.ndarray
"""An image: a path, a PIL image, or (height, width, 3) uint8 RGB."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Detections:
    """Detections of one image, best first.

    Attributes:
        xyxy: (n, 4) float32 boxes in pixels of the displayed image.
        confidence: (n,) float32 scores.
        class_id: (n,) int64 category ids of the run's data set.
        class_name: n names.
    """

    xyxy: np.ndarray
    confidence: np.ndarray
    class_id: np.ndarray
    class_name: list[str]

    def __len__(self) -> int:
        return len(self.xyxy)

    def above(self, threshold: float) -> "Detections":
        """Those with a confidence above a threshold."""
        return self._rows(np.flatnonzero(self.confidence > threshold))

    def of(self, names: Sequence[str]) -> "Detections":
        """Those of some classes."""
        _check_names(names)
        return self._rows(np.flatnonzero([name in names for name in self.class_name]))

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """COCO results: image_id, category_id, bbox xywh, score; and class_name."""
        results = coco_results({image_id: (self.xyxy, self.confidence, self.class_id)})
        return [r | {"class_name": n} for r, n in zip(results, self.class_name, strict=True)]

    def to_supervision(self) -> Any:
        """As `supervision.Detections`.

        Raises:
            LpovodError: if supervision is not installed.
        """
        try:
            import supervision  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise LpovodError("supervision is not installed: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.xyxy,
            confidence=self.confidence,
            class_id=self.class_id,
            data={"class_name": np.array(self.class_name)},
        )

    def _rows(self, rows: np.ndarray) -> "Detections":
        names = [self.class_name[row] for row in rows.tolist()]
        return Detections(self.xyxy[rows], self.confidence[rows], self.class_id[rows], names)


def load(path: str | Path, device: str | None = None) -> "Model":
    """Load a model file.

    Args:
        path: file of `lpovod export`, of `lpovod learn` or of stage `model`.
        device: "cpu" or "cuda"; None for the GPU if there is one.

    Raises:
        LpovodError: if the file is missing, damaged or no model, or there is no such device.
    """
    return Model(read_model(existing(Path(path))), Path(path), device)


class Model:
    """A trained model, ready to detect.

    Args:
        content: of the model file.
        path: of the file, for messages.
        device: "cpu" or "cuda"; None for the GPU if there is one.
    """

    def __init__(self, content: ModelFile, path: Path, device: str | None = None):
        self.path, self.device = path, device_of(device)
        network, detector = build_networks(content, path)
        self.network, self.detector = network.to(self.device), detector.to(self.device)
        self._extra: dict[str, np.ndarray] = {}
        self.content = content

    @property
    def content(self) -> ModelFile:
        """What the file holds; another content with the same networks may be assigned."""
        return self._content

    @content.setter
    def content(self, content: ModelFile) -> None:
        self._content = content
        self._vocabulary = Vocabulary(content, self._extra)

    @property
    def names(self) -> list[str]:
        """Names of the classes: base, novel, learned."""
        return self.content.names

    @property
    def vocabulary(self) -> list[str]:
        """Names of the classes, and the words added to them."""
        return self._vocabulary.names

    def with_content(self, content: ModelFile, words: Sequence[str] = ()) -> "Model":
        """A model that shares the networks of this one, and has a vocabulary of its own.

        Args:
            content: of a model file with the same networks.
            words: those to take over of the words that were added to this model.
        """
        other = copy(self)
        other._extra = {word: self._extra[word] for word in words}
        other.content = content
        return other

    def add_names(self, names: Sequence[str]) -> list[str]:
        """Add words to the vocabulary, scored by the CLIP head alone: they have no linear probe.

        Args:
            names: of classes; those that the model knows stay as they are.

        Returns:
            the names that are new.

        Raises:
            LpovodError: if neither the file nor the run's CLIP on disk can embed words.
        """
        _check_names(names)
        known = {*self.names, *self._extra}
        added = [name for name in dict.fromkeys(names) if name not in known]
        if added:
            # Most models need no CLIP, whose import takes seconds.
            from lpovod.text_tower import encode_names

            self._extra |= dict(zip(added, encode_names(added, self.content), strict=True))
            self._vocabulary = Vocabulary(self.content, self._extra)
        return added

    @overload
    def detect(
        self,
        images: Source,
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int | None = None,
        refined: bool = True,
    ) -> Detections: ...
    @overload
    def detect(
        self,
        images: list[Source],
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int | None = None,
        refined: bool = True,
    ) -> list[Detections]: ...
    def detect(
        self,
        images: Source | list[Source],
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        batch_size: int | None = None,
        refined: bool = True,
    ) -> Detections | list[Detections]:
        """Detect objects.

        The score of a class depends on the whole vocabulary (CLIP's softmax runs over it), not on
        `classes`, so that a thing of another class is not taken for one of those asked for.

        Args:
            images: one image, or a list.
            threshold: lowest confidence; None for the run's, evaluation.score_threshold.
            classes: names to detect; words that the model does not know are added to its vocabulary
                and scored by the CLIP head alone. None for all that it knows.
            batch_size: images per pass; None for 1 on a CPU, 8 on a GPU.
            refined: whether boxes are refined; false gives the proposals themselves.

        Returns:
            Detections of the image, or of each image.

        Raises:
            LpovodError: if an image cannot be read, a word cannot be embedded, or memory is too
                small.
        """
        sources = list(images) if isinstance(images, list | tuple) else [images]
        self.add_names(classes or ())
        views = []
        for source in sources:
            pixels = read_source(source)
            views.append((self.view(pixels), pixels.shape[:2]))
        results: list[Detections | None] = [None] * len(views)
        with explaining_memory("batch_size (images per pass)"):
            for rows in alike(
                range(len(views)),
                lambda row: self.batch_shape(views[row][1]),
                batch_size or self.batch_size,
                waiting=len(views),
            ):
                regions = self.describe([views[i][0] for i in rows], [views[i][1] for i in rows])
                for row, of_image in zip(rows, regions, strict=True):
                    results[row] = self.score(of_image, threshold, classes, refined)
        found = [result for result in results if result is not None]
        return found if isinstance(images, list | tuple) else found[0]

    @property
    def batch_size(self) -> int:
        """Images per pass, unless told otherwise."""
        return 1 if self.device == "cpu" else 8

    def view(self, pixels: np.ndarray) -> LoadedView:
        """An image as the networks see it."""
        return apply_view(pixels, self._view, on_device=self.device != "cpu")

    def batch_shape(self, size: HeightWidth) -> HeightWidth:
        """Height and width, padded, at which the networks see an image of a size."""
        height, width = shown_size(size, self._view)
        return padded(height), padded(width)

    @property
    def _view(self) -> View:
        backbone = self.content.config.backbone
        return View(0, backbone.short_side, backbone.long_side)

    def describe(self, views: list[LoadedView], sizes: list[HeightWidth]) -> list[Regions]:
        """The regions of images of one `batch_shape`, with what the detector says of them.

        On a CPU the networks compute in float32, whatever the run's precision: on processors
        without units for bfloat16, that takes longer.

        Args:
            views: as the networks see them.
            sizes: height and width of each image.

        Returns:
            For each image, its proposals with the columns of stage `region_features`.
        """
        config, count = self.content.config, len(views)
        finder, precision = config.proposals, config.region_features.precision
        if self.device == "cpu":
            finder, precision = finder.model_copy(update={"precision": "float32"}), "float32"
        proposed = find_proposals(self.network, views, sizes, finder, count, self.device)
        described = describe_regions(
            self.detector, views, proposed, sizes, count, self.device, precision
        )
        return [_as_regions(arrays) for arrays in described]

    def score(
        self,
        regions: Regions,
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        refined: bool = True,
        per_image: int | None = None,
    ) -> Detections:
        """Detections from the regions of an image; arguments as for `detect`.

        Args:
            per_image: the most detections; None for the run's, evaluation.per_image.
        """
        settings = self.content.config.evaluation
        if per_image is not None:
            settings = settings.model_copy(update={"per_image": per_image})
        # An image keeps its best per_image detections of the classes asked for.
        words = self._vocabulary
        rows = None if classes is None else [words.names.index(n) for n in dict.fromkeys(classes)]
        if threshold is not None:
            settings = settings.model_copy(update={"score_threshold": threshold})
        variant = Variant(settings.alpha, settings.beta, words.weights.temperature, refined=refined)
        scores = score_regions(regions, None, words.weights)
        found = detect(scores, words.probe_weights, words.ids, variant, settings, rows)
        names = [words.name_of[category] for category in found[2].tolist()]
        return Detections(*found, names)


def build_networks(content: ModelFile, path: Path) -> tuple[ProposalNetwork, Detector]:
    """The networks of a model file, in evaluation mode, on the CPU.

    Args:
        content: of the file.
        path: of the file, for messages.
    """
    config, base = content.config, content.of_split("base")
    prototypes = np.stack([content.weights[name] for name in base])
    tensors = content.networks["detector"] | {"prototypes": prototypes}
    network = build_network(content.networks["proposal_network"], config.backbone, config.proposals)
    detector = build_detector(tensors, base, config.backbone, config.base_detector, path)
    return network, detector


class Vocabulary:
    """The classes of a model, and further words, as rows of matrices.

    Attributes:
        names: of the classes.
        ids: their category ids.
        name_of: names by category id.
        weights: linear classifiers and text embeddings; zeros where a class has none.
        probe_weights: for each class, the weight of its linear classifier in its score.
    """

    def __init__(self, content: ModelFile, extra: dict[str, np.ndarray]):
        unknown = [name for name in extra if name not in content.names]
        known = content.categories | {c.name: c.category_id for c in content.classes}
        ids = ids_of(known, unknown)
        classes = [*content.classes, *(ModelClass(n, "novel", ids[n]) for n in unknown)]
        self.names = [c.name for c in classes]
        self.ids = [c.category_id for c in classes]
        self.name_of = dict(zip(self.ids, self.names, strict=True))
        text = {name: extra[name] for name in unknown} | content.text
        nothing = np.zeros_like(next(iter(content.weights.values())))
        no_text = np.zeros_like(next(iter(content.text.values())))
        base = content.of_split("base")
        self.weights = ClassWeights(
            base,
            [name for name in self.names if name not in base],
            torch.from_numpy(np.stack([content.weights.get(n, nothing) for n in self.names])),
            torch.from_numpy(np.stack([text.get(n, no_text) for n in self.names])),
            content.temperature,
        )
        self.probe_weights = [self._probe_weight(c, content) for c in classes]

    def _probe_weight(self, of_class: ModelClass, content: ModelFile) -> float:
        if of_class.name not in content.weights:
            return 0.0
        if of_class.name not in content.text:
            return 1.0
        settings = content.config.evaluation
        return 1 - settings.alpha if of_class.split == "base" else settings.beta


def read_source(source: Source) -> np.ndarray:
    """An image as (height, width, 3) uint8 RGB, turned as a viewer shows it.

    Raises:
        LpovodError: if it cannot be read, or an array has another shape or dtype.
    """
    if isinstance(source, Path | str):
        return read_image(Path(source))
    if isinstance(source, Image.Image):
        if source.mode not in EIGHT_BITS:
            raise LpovodError(
                f"the image has mode {source.mode!r}, expected 8 bits per channel. Give its path: "
                "files with 16 bits are read"
            )
        return np.array(ImageOps.exif_transpose(source).convert("RGB"))
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
        raise LpovodError(
            f"the image is an array of {source.dtype} {source.shape}, expected uint8 (height, "
            "width, 3), RGB"
        )
    return np.ascontiguousarray(source)


def _as_regions(arrays: dict[str, np.ndarray]) -> Regions:
    count = len(arrays["box"])
    columns = {name: arrays[name] for name in ("feature", "embedding", "refined")}
    return Regions(
        np.zeros(count, np.int64), np.arange(count), arrays["box"], arrays["objectness"], columns
    )


def alike(
    items: Iterable[Item], shape_of: Callable[[Item], Any], batch_size: int, waiting: int
) -> Iterator[list[Item]]:
    """Items in lists of one shape each, which are full unless too many items would wait.

    Args:
        items: taken one by one, as lists are asked for.
        shape_of: tells the shape of an item.
        batch_size: items of a full list.
        waiting: the most items that wait for others; beyond it, the longest list goes as it is.
    """
    groups: dict[Any, list[Item]] = {}
    for item in items:
        shape = shape_of(item)
        groups.setdefault(shape, []).append(item)
        if len(groups[shape]) == batch_size:
            yield groups.pop(shape)
        elif sum(map(len, groups.values())) > waiting:
            yield groups.pop(max(groups, key=lambda key: len(groups[key])))
    yield from groups.values()


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise LpovodError(f"classes: {names!r} is a text, expected a list of names: [{names!r}]")
