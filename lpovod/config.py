"""The configuration: every key with its meaning, default and limits, in one typed model.

`config.yaml` and the overlays in `configs/` hold only values that differ from these defaults. A
stage receives its own block and nothing else, so a changed key makes exactly its stages stale. The
workflow imports this module while it builds its graph, so nothing heavy may be imported.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from lpovod.catalogue import COCO, COCO_IMAGES, FILES
from lpovod.exceptions import LpovodError, did_you_mean, existing

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Split = Literal["train", "val", "tune"]
Precision = Literal["float32", "bfloat16"]
BACKBONES = ("small", "resnet50", "resnet50_torchvision")
TIMM = "timm:"
"""In front of the name of a model of timm's."""

INTERPOLATIONS, RESIZE_MODES = ("bicubic", "bilinear"), ("shortest", "squash")
"""Of CLIP's preprocessing, as far as `lpovod.crops` does it."""

JSON_PER_IMAGE = 4000
"""Bytes of annotations per image; COCO's have four to five thousand, outlines included."""


IMAGES_PER_SHARD = 2000
"""Fewer images are no work to divide: a job takes seconds to start."""


class Settings(BaseModel):
    """A block of the configuration: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def key(default: Any, description: str, **limits: Any) -> Any:
    """A key with its default and its meaning."""
    return Field(default=default, description=description, **limits)


class DownloadSettings(Settings):
    # It shapes no result: what was downloaded counts by its content.
    digests: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]] = key(
        {},
        "by file name, the SHA-1 or SHA-256 that a published file must have when it is downloaded; "
        "otherwise that of lpovod/catalogue.py or resources/published.json",
        exclude=True,
    )

    @field_validator("digests")
    @classmethod
    def _files_are_published(cls, digests: dict[str, str]) -> dict[str, str]:
        for name in digests.keys() - {*COCO, *FILES}:
            hint = did_you_mean(name, [*COCO, *FILES])
            allowed = ", ".join([*COCO, *FILES])
            raise ValueError(f"{name!r} is none of the published files; {hint or allowed}")
        return digests


class MiniatureSettings(Settings):
    train_images: PositiveInt = key(900, "drawn images to train on")
    val_images: PositiveInt = key(500, "drawn images that the metrics are measured on")
    tune_images: PositiveInt = key(200, "drawn images to choose settings on, never reported")
    nuisance: Fraction = key(
        0.5, "strength of rotation, texture and clutter; the small CLIP was trained on 0.3 to 1"
    )
    nested: Fraction = key(0.8, "fraction of the objects that carry a smaller copy of themselves")
    distractors: Fraction = key(
        0.0, "probability, three times per image, of an unannotated item that has no class"
    )


class CocoSettings(Settings):
    root: Path | None = key(None, "folder to which the four paths below are relative")
    train_images: Path = key(Path("train2017"), "folder of training images")
    train_annotations: Path = key(
        Path("annotations/instances_train2017.json"), "COCO json of the training images"
    )
    val_images: Path | None = key(
        Path("val2017"),
        "folder of validation images; null, with val_annotations, for a run that measures nothing",
    )
    val_annotations: Path | None = key(
        Path("annotations/instances_val2017.json"),
        "COCO json of the validation images; it may have no annotations",
    )
    # It shapes no result, so it is excluded from the values that stages receive.
    download: bool = key(False, "download missing files of COCO 2017 into root", exclude=True)
    base_boxes: dict[Literal["train", "val"], PositiveInt] = key(
        {},
        "number of annotated boxes of base classes, crowds included, that a split must have; a "
        "split without a number is not checked",
    )

    # It decides whether a run is allowed, and shapes no result.
    pictogram_clip: bool = key(
        False,
        "permits the shipped CLIP, which knows drawn pictograms alone, on these images; its "
        "answers mean nothing on photographs",
        exclude=True,
    )

    @model_validator(mode="after")
    def _downloads_have_a_place(self) -> Self:
        if self.download and self.root is None:
            raise ValueError("download needs a root to download into")
        if (self.val_images is None) != (self.val_annotations is None):
            raise ValueError("val_images and val_annotations belong together: give both, or null")
        return self

    def path(self, name: str) -> Path:
        """One of the four paths, below the root."""
        return (self.root or Path()) / getattr(self, name)

    def images(self, split: str) -> Path:
        """Folder of a split's images."""
        return self.path(f"{split}_images")

    def annotations(self, split: str) -> Path:
        """COCO json of a split."""
        return self.path(f"{split}_annotations")


class DatasetSettings(Settings):
    source: Literal["miniature", "coco"] = key(
        "miniature", "drawn images, or images and annotations in COCO's format on disk"
    )
    miniature: MiniatureSettings = key(MiniatureSettings(), "the drawn world (source: miniature)")
    coco: CocoSettings = key(CocoSettings(), "paths of the files (source: coco)")
    bad_images: Literal["fail", "skip"] = key(
        "fail",
        "response to an image that cannot be decoded; skip decodes every image once, before "
        "everything else, and leaves the bad ones out of the data set (source: coco)",
    )

    @property
    def splits(self) -> list[Split]:
        """The splits that the source has."""
        if self.source == "miniature":
            return ["train", "val", "tune"]
        return ["train"] if self.coco.val_images is None else ["train", "val"]

    def image_count(self, split: Split) -> int:
        """How many images a split has: as configured, or about, by the size of its json.

        COCO's own number is taken with `download`, and where there is no json. No file is read.
        """
        if self.source == "miniature":
            return getattr(self.miniature, f"{split}_images")
        if split not in self.splits:
            return 0
        annotations = self.coco.annotations(split)
        if self.coco.download or not annotations.is_file():
            # A run that trains nothing may name the validation images in place of the others.
            return COCO_IMAGES["val" if self.coco.images(split).name == "val2017" else split]
        return math.ceil(annotations.stat().st_size / JSON_PER_IMAGE)


_NAMES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "anyOf": [
            {"type": "string"},
            {
                "type": "object",
                "properties": {"name": {"type": "string"}, "prompt": {"type": "string"}},
                "required": ["name"],
                "additionalProperties": False,
            },
        ]
    },
}
_FILE_SCHEMA = {"type": "string", "format": "path"}

ClassNames = Annotated[list[str], WithJsonSchema(_NAMES_SCHEMA)]
ClassNamesOrFile = Annotated[
    list[str], WithJsonSchema({"anyOf": [_NAMES_SCHEMA | {"minItems": 1}, _FILE_SCHEMA]})
]


class ClassSettings(Settings):
    base: ClassNamesOrFile = Field(
        description="annotated: the detector trains on them; a list of names, or of {name: ..., "
        "prompt: ...}, or the path of a json in COCO's format whose categories have a split",
        min_length=1,
    )
    novel: ClassNamesOrFile = Field(
        description="known only by name; a list, or the path of a json, as for base",
        min_length=1,
    )
    add_base: ClassNames = key([], "appended to base, for overlays", exclude=True)
    add_novel: ClassNames = key([], "appended to novel, for overlays", exclude=True)
    prompts: dict[str, str] = key(
        {}, "by class name, the text that CLIP reads in place of the name in the templates"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_names(cls, content: Any) -> Any:
        """Move the prompts out of the lists of names, and append what overlays add."""
        if not isinstance(content, dict):
            return content
        plain, prompts = dict(content), dict(content.get("prompts") or {})
        for name in ("base", "novel"):
            # Any other text is a name that lacks its list.
            if isinstance(file := content.get(name), str) and file.endswith(".json"):
                plain[name] = _names_in(Path(file), name)
        for name in ("base", "novel", "add_base", "add_novel"):
            if isinstance(names := plain.get(name), list):
                plain[name] = [_plain_name(item, prompts) for item in names]
        for name in ("base", "novel"):
            added = plain.get(f"add_{name}")
            if isinstance(plain.get(name), list) and isinstance(added, list):
                plain[name] = [*plain[name], *plain.pop(f"add_{name}")]
        return plain | {"prompts": prompts}

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        slugs: dict[str, str] = {}
        for name in [*self.base, *self.novel]:
            if not name.strip() or name != name.strip():
                raise ValueError(f"class name {name!r} is empty, or has spaces around it")
            if slug(name) in slugs:
                raise ValueError(f"class {name!r} is listed twice (as {slugs[slug(name)]!r})")
            slugs[slug(name)] = name
        unknown = sorted(set(self.prompts) - {*self.base, *self.novel})
        if unknown:
            raise ValueError(f"prompts: {unknown[0]!r} is no base or novel class")
        return self


def _names_in(file: Path, split: str) -> list[str]:
    """The classes of a split, in the order of a json with COCO's categories."""
    try:
        content = json.loads(existing(file, f"classes.{split}").read_text(encoding="utf-8"))
        return [c["name"] for c in content["categories"] if c["split"] == split]
    except (ValueError, LookupError, TypeError) as error:
        raise LpovodError(
            f"classes.{split}: {file} is no json with categories that have name and split "
            f"({type(error).__name__}: {error})"
        ) from None


def _plain_name(item: Any, prompts: dict[str, str]) -> Any:
    if not isinstance(item, dict):
        return item
    if not isinstance(item.get("name"), str) or set(item) - {"name", "prompt"}:
        raise ValueError(f"{item!r}: a class is a name, or {{name: ..., prompt: ...}}")
    if item.get("prompt") is not None:
        prompts[item["name"]] = item["prompt"]
    return item["name"]


class ClipSettings(Settings):
    architecture: str = key(
        "resources/small_clip/architecture.json",
        "name of an open_clip model (ViT-B-32-quickgelu for OpenAI's weights) or a json file",
    )
    weights: Path | None = key(
        Path("resources/small_clip/weights.safetensors"),
        "the model's weights (a missing ViT-B-32.pt or ViT-B-32.safetensors, both OpenAI's, is "
        "downloaded); null if everything that needs CLIP is read from files",
    )
    vocabulary: Path | None = key(
        Path("resources/small_clip/vocabulary.txt.gz"),
        "byte-pair merges of the tokenizer; null for CLIP's",
    )
    pretrained: str | None = key(
        None,
        "open_clip's tag of the weights, such as laion2b_s32b_b82k, which selects their "
        "preprocessing; null for a json file, and if all of open_clip's weights of the "
        "architecture share their preprocessing",
    )

    def files(self) -> list[Path]:
        """The files that define the model; none without weights."""
        if self.weights is None:
            return []
        document = [Path(self.architecture)] if self.architecture.endswith(".json") else []
        return [*document, self.weights, *([self.vocabulary] if self.vocabulary else [])]


class TextEmbeddingsSettings(Settings):
    templates: list[str] = key(
        ["{}"], "prompts, where {} is the class name; several are averaged", min_length=1
    )
    file: Path | None = key(
        None,
        "imported text embeddings, in place of the prompts: .npy, or .pth with a single tensor",
    )
    classes: Path | None = key(
        None,
        "json with the class names of the imported rows, in order: a list, or COCO's json with "
        "categories",
    )

    @model_validator(mode="after")
    def _templates_hold_the_name(self) -> Self:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must contain {{}} once")
        if (self.file is None) != (self.classes is None):
            raise ValueError("file and classes belong together: give both, or neither")
        return self


class BackboneSettings(Settings):
    architecture: str = key(
        "small",
        "small: a thin net of nine convolutions; resnet50: in the caffe style; "
        "resnet50_torchvision: with the stride where torchvision has it; timm:NAME: any timm model "
        "with feature maps at strides 4 to 32, such as timm:resnet18, with its mean and deviation",
    )
    weights: Path | None = key(
        None,
        "what training starts from: a checkpoint with OpenMMLab's or torchvision's names, with "
        "timm:NAME that model's checkpoint; null is a random start, and the detector starts from "
        "the proposal network",
    )
    channels: PositiveInt = key(64, "channels of the feature pyramid")
    short_side: PositiveInt = key(160, "pixels of the resized image's shorter side in inference")
    long_side: PositiveInt = key(160, "pixels that its longer side may have at most")

    @field_validator("architecture")
    @classmethod
    def _architecture_is_one_of_ours_or_timm_s(cls, name: str) -> str:
        # Whether timm has the model is seen when it is built: timm imports torch.
        if name in BACKBONES or len(name) > len(TIMM) and name.startswith(TIMM):
            return name
        hint = did_you_mean(name, BACKBONES, cutoff=0.8)
        hint = f"; {hint}" if hint else ""
        raise ValueError(f"allowed are {', '.join(BACKBONES)}, and timm:NAME{hint}")


class TrainingSettings(Settings):
    """A training schedule: warm-up, then a rate that is divided by ten after each milestone."""

    optimizer: Literal["sgd", "adamw"] = key(
        "sgd", "adamw suits a short run from random initial weights"
    )
    epochs: PositiveInt = key(8, "passes over the training images")
    images_per_step: PositiveInt = key(8, "images per optimisation step, on all GPUs together")
    # How a step is divided, as the number of GPUs, and no part of what is learned.
    images_at_once: PositiveInt | None = key(
        None,
        "images that a GPU computes at once: it takes a step's images in parts and adds up their "
        "gradients, in less memory; null: all of them",
        exclude=True,
    )
    precision: Precision = key(
        "float32",
        "of the networks' convolutions and products; weights, norms, losses and boxes are float32; "
        "bfloat16 pays on GPUs and CPUs with bfloat16 units",
    )
    learning_rate: Positive = key(0.02, "learning rate after the warm-up")
    momentum: Fraction = key(0.9, "momentum (sgd)")
    weight_decay: float = key(1e-4, "weight decay, on all parameters", ge=0)
    warmup_steps: int = key(50, "steps of the linear warm-up", ge=0)
    warmup_ratio: Positive = key(
        0.001, "start of the warm-up, as a fraction of the learning rate", le=1
    )
    milestones: list[PositiveInt] = key(
        [6, 7], "epochs after which the learning rate is divided by ten"
    )
    gradient_norm: Positive = key(15.0, "gradients are clipped to this norm")
    short_sides: list[PositiveInt] = key(
        [160],
        "lengths for the resized image's shorter side in pixels, one drawn at random per image",
        min_length=1,
    )
    flip: Fraction = key(0.5, "probability of a horizontal flip")
    # It shapes no result.
    workers: int = key(
        0, "processes that load images; 0 loads in the training process", ge=0, exclude=True
    )

    def divided(self, workers: int, images_at_once: int) -> Self:
        """The schedule with another division of its work, where one is given: 0 is none.

        Args:
            workers: loading processes.
            images_at_once: that a GPU computes at once.
        """
        given = {"workers": workers, "images_at_once": images_at_once}
        return self.model_copy(update={name: value for name, value in given.items() if value})

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Self:
        _check_milestones(self.milestones, self.epochs)
        return self


def _check_milestones(milestones: list[int], epochs: int) -> None:
    late = [epoch for epoch in milestones if epoch > epochs]
    if late:
        raise ValueError(f"milestone {late[0]} lies beyond the last of {epochs} epochs")


class ProposalsSettings(Settings):
    # What the network learns by; the other keys say how it is used once it is trained.
    LEARNED: ClassVar = {"training", "anchor_scale", "box_iou", "samples_per_image"}

    training: TrainingSettings = key(TrainingSettings(), "schedule of the proposal network")
    anchor_scale: Positive = key(8.0, "side of the single square anchor, in strides")
    box_iou: Fraction = key(0.7, "lowest IoU with an object at which an anchor learns its box")
    samples_per_image: PositiveInt = key(256, "sampled anchors per image and output")
    per_level: PositiveInt = key(2000, "best boxes of each pyramid level that enter the NMS")
    nms: Fraction = key(0.7, "IoU threshold of the class-agnostic NMS")
    per_image: PositiveInt = key(60, "proposals kept per image")
    batch_size: PositiveInt = key(4, "images per pass of the network, once it is trained")
    precision: Precision = key("float32", "of the trained network; its boxes are float32")
    files: dict[Split, Path] = key(
        {},
        "imported proposals by split: an OpenMMLab pickle, or json in COCO's results format",
    )
    id_maps: dict[Split, Path] = key(
        {},
        "json of image ids and their places in the pickle, by split; without it, the pickle is in "
        "annotation order",
    )


class RegionEmbeddingsSettings(Settings):
    scales: list[Positive] = key(
        [1.0, 1.5],
        "sizes of a region's crops, relative to its box; their features are summed",
        min_length=1,
    )
    batch_size: PositiveInt = key(
        256, "crops cut at once, across images, of which a GPU encodes up to 256 in a pass"
    )
    precision: Precision = key(
        "float32", "of CLIP's image tower; bfloat16 pays on GPUs and CPUs with bfloat16 units"
    )


class RegionIndexSettings(Settings):
    factory: str = key("SQfp16", "FAISS index factory string; Flat and SQfp16 are exact")
    block_rows: PositiveInt = key(65536, "vectors read and added at once")


class BaseDetectorSettings(Settings):
    training: TrainingSettings = key(TrainingSettings(), "schedule of the detector")
    regions: Literal["rpn", "proposals"] = key(
        "rpn",
        "source of the boxes for the classification and box losses: a region proposal network that "
        "is trained jointly, as in the original, or the stored proposals",
    )
    samples_per_image: PositiveInt = key(
        512, "regions sampled per image for classification and boxes"
    )
    positive_fraction: Fraction = key(
        0.25, "largest fraction of the samples with an IoU of at least 0.5 with an object"
    )
    head_convolutions: int = key(4, "convolutions of each head before its linear layer", ge=0)
    dimension: PositiveInt = key(1024, "length of a region feature")
    finest_scale: Positive = key(
        56.0, "side in pixels of the regions that are pooled from the finest level"
    )
    sampling_ratio: int = key(0, "samples per bin and axis of RoIAlign; 0 is adaptive", ge=0)
    distillation_weight: float = key(256.0, "weight of the distillation loss", ge=0)
    distillation_regions: PositiveInt = key(1000, "proposals per image that are distilled")
    checkpoint: Path | None = key(
        None, "the original's checkpoint, imported instead of training a detector"
    )


class PseudoLabelsSettings(Settings):
    k: PositiveInt = key(100, "regions retrieved per novel class")
    objectness: Fraction = key(0.6, "lowest objectness of a retrieved region")
    centred: bool = key(
        False,
        "true ranks regions by the cosine with the name's embedding minus the mean embedding of "
        "the base classes, so by what is particular to the name; false ranks by the cosine with "
        "the name's embedding, as in the original",
    )
    ignored: int = key(
        0,
        "number of regions, most similar to the name and of any objectness, that are taken for "
        "objects of the class unless a better region shows the same object; a region that overlaps "
        "one of them (IoU 0.5) and no label is not a negative of the linear probe; 0 excludes no "
        "negative, as in the original",
        ge=0,
    )
    per_image: PositiveInt | None = key(
        None, "largest number of retrieved regions per image; null sets no limit"
    )
    nms: Fraction | None = key(
        None,
        "IoU above which the worse of two retrieved regions of an image is dropped; null drops "
        "none",
    )
    file: Path | None = key(
        None, "COCO json with the pseudo-labels of all novel classes, imported instead of retrieval"
    )


class RegionFeaturesSettings(Settings):
    batch_size: PositiveInt = key(4, "images per pass of the backbone")
    precision: Precision = key(
        "float32", "of the detector's backbone and heads; its boxes are float32"
    )


class LinearProbeSettings(Settings):
    epochs: PositiveInt = key(12, "passes over the retrieved images")
    images_per_step: PositiveInt = key(2, "images per step")
    learning_rate: Positive = key(0.001, "learning rate after the warm-up")
    momentum: Fraction = key(0.9, "momentum")
    weight_decay: float = key(2.5e-5, "weight decay", ge=0)
    warmup_steps: int = key(20, "steps of the linear warm-up", ge=0)
    warmup_ratio: Positive = key(
        0.1, "start of the warm-up, as a fraction of the learning rate", le=1
    )
    milestones: list[PositiveInt] = key(
        [8, 11], "epochs after which the learning rate is divided by ten"
    )
    samples_per_image: PositiveInt = key(512, "regions sampled per image")
    positive_fraction: Fraction = key(
        0.25, "largest fraction of the samples with an IoU of at least 0.5 with a pseudo-label"
    )
    negatives_per_positive: PositiveInt = key(10, "largest number of negatives per positive")
    checkpoint: Path | None = key(
        None,
        "the original's fine-tuned checkpoint, whose novel weights are imported instead of trained",
    )

    @model_validator(mode="after")
    def _milestones_are_reached(self) -> Self:
        _check_milestones(self.milestones, self.epochs)
        return self


class EvaluationSettings(Settings):
    protocol: Literal["all_images", "annotated_images"] = key(
        "all_images",
        "images that AP is measured on: all of the validation split, or only those with an "
        "annotation of a configured class, as in OV-COCO, where false alarms elsewhere cost "
        "nothing",
    )
    temperature: Positive | None = key(
        None, "temperature of the CLIP head's softmax; null uses the CLIP model's logit scale"
    )
    alpha: Fraction = key(0.0, "weight of the CLIP head in base scores (geometric mean)")
    beta: Fraction = key(0.8, "weight of the probe in novel scores (geometric mean)")
    score_threshold: Fraction = key(0.05, "lowest score of a detection")
    nms: Fraction = key(0.5, "IoU threshold of the NMS within a class")
    per_image: PositiveInt = key(100, "detections kept per image")
    clip_on_crops: bool = key(
        True, "whether to evaluate CLIP itself too, which embeds every proposal of the split"
    )


class ReportSettings(Settings):
    crops_per_class: PositiveInt = key(
        24, "largest number of retrieved regions shown per novel class; fewer if classes are many"
    )
    images: PositiveInt = key(
        12,
        "validation images shown with their detections, "
        "plus at most 12 for novel classes that these do not show",
    )


class SmallClipSettings(Settings):
    """The small CLIP and its training."""

    seed: int = key(
        17, "seed for the drawn images, the crops, the initial weights and the batches", ge=0
    )
    crops: PositiveInt = key(48_000, "crops to train on")
    held_out_scenes: PositiveInt = key(300, "images that measure the recorded accuracy")
    epochs: PositiveInt = key(8, "passes over the crops")
    batch_size: PositiveInt = key(128, "crops per optimisation step")
    learning_rate: Positive = key(2e-3, "highest learning rate of AdamW; cosine decay to zero")
    weight_decay: float = key(0.05, "weight decay on matrices and kernels, not on vectors", ge=0)
    image_size: PositiveInt = key(48, "side of a crop in pixels")
    dimension: PositiveInt = key(128, "dimension of the space that images and texts share")
    text_width: PositiveInt = key(96, "channels of the text transformer; a multiple of 32")
    text_layers: PositiveInt = key(2, "layers of the text transformer")
    context_length: PositiveInt = key(16, "largest number of tokens of a text, with start and end")


class Config(Settings):
    """The whole configuration."""

    name: str = key("mini", "folder below results/", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    seed: int = key(0, "seed for all random numbers", ge=0)
    gpu: bool = key(False, "whether the stages that can use a GPU request and use one")
    training_gpus: PositiveInt = key(
        1, "GPUs per node that share the steps of a training (gpu: true)"
    )
    training_nodes: PositiveInt = key(
        1, "nodes of a SLURM cluster that share the steps of a training"
    )
    # How the work is divided shapes no result.
    shards: PositiveInt = key(
        2,
        "jobs that share a pass over the training images, in proposals, region_embeddings and "
        f"region_features; a pass over other images has one for every {IMAGES_PER_SHARD:,}, and no "
        "more than that",
    )
    download: DownloadSettings = key(DownloadSettings(), "published files that are missing")
    dataset: DatasetSettings = key(DatasetSettings(), "images and annotations")
    classes: ClassSettings = Field(description="the split")
    clip: ClipSettings = key(ClipSettings(), "the vision-language model")
    backbone: BackboneSettings = key(
        BackboneSettings(), "of the proposal network and of the detector"
    )
    text_embeddings: TextEmbeddingsSettings = key(
        TextEmbeddingsSettings(), "vectors of the class names"
    )
    proposals: ProposalsSettings = key(ProposalsSettings(), "class-agnostic boxes")
    region_embeddings: RegionEmbeddingsSettings = key(
        RegionEmbeddingsSettings(), "CLIP on every proposal"
    )
    region_index: RegionIndexSettings = key(
        RegionIndexSettings(), "nearest neighbours of text in regions"
    )
    base_detector: BaseDetectorSettings = key(BaseDetectorSettings(), "trained on base classes")
    pseudo_labels: PseudoLabelsSettings = key(PseudoLabelsSettings(), "retrieval")
    region_features: RegionFeaturesSettings = key(
        RegionFeaturesSettings(), "the frozen detector on regions"
    )
    linear_probe: LinearProbeSettings = key(LinearProbeSettings(), "the novel classes' weights")
    evaluation: EvaluationSettings = key(EvaluationSettings(), "detections and AP50")
    report: ReportSettings = key(ReportSettings(), "one page")
    small_clip: SmallClipSettings = key(
        SmallClipSettings(), "training of the small CLIP (target small_clip)"
    )

    def shards_of(self, images: int) -> int:
        """Number of jobs that share a pass over other images than all training images.

        Args:
            images: number of the images.
        """
        return min(self.shards, max(1, math.ceil(images / IMAGES_PER_SHARD)))

    def retrieved_images(self, train: int) -> int:
        """Number of training images that the novel classes retrieve, at most."""
        return min(train, len(self.classes.novel) * self.pseudo_labels.k)

    def files(self) -> list[Path]:
        """The files, not the images and annotations, that a run may read; some may be missing."""
        optional = (
            self.backbone.weights,
            self.text_embeddings.file,
            self.text_embeddings.classes,
            *self.proposals.files.values(),
            *self.proposals.id_maps.values(),
            self.base_detector.checkpoint,
            self.pseudo_labels.file,
            self.linear_probe.checkpoint,
        )
        return [*self.clip.files(), *(path for path in optional if path)]


def slug(name: str) -> str:
    """A class name as part of a file name: ``traffic light`` is ``traffic_light``.

    Letters outside ASCII are left out, and a digest of the whole name tells such names apart.
    """
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if name.isascii() and plain:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain}_{digest}" if plain else f"class_{digest}"


def read_config(paths: Iterable[Path], weights: bool = True) -> Config:
    """Read and validate a configuration: the first file, then overlays in order.

    Args:
        paths: yaml files.
        weights: whether the files of CLIP and of the backbone must exist.

    Raises:
        LpovodError: if a file is missing or is not yaml, and as `load_config` does.
    """
    content: dict[str, Any] = {}
    for path in paths:
        try:
            overlay = yaml.safe_load(existing(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise LpovodError(f"{path} is not valid yaml: {error}") from None
        if not isinstance(overlay, dict):
            raise LpovodError(f"{path} holds a {type(overlay).__name__}, expected key: value")
        content = merge(content, overlay)
    return load_config(content, weights)


def merge(content: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """A configuration with an overlay applied, block by block, as in Snakemake."""
    merged = dict(content)
    for name, value in overlay.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            value = merge(below, value)
        merged[name] = value
    return merged


def load_config(content: dict[str, Any], weights: bool = True) -> Config:
    """Validate a configuration.

    Args:
        content: the merged content of the yaml files.
        weights: whether the files of CLIP and of the backbone must exist.

    Raises:
        LpovodError: naming every wrong key, its value and the allowed ones.
    """
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        lines = [explain(problem, Config, "config") for problem in error.errors()]
        raise LpovodError("The configuration is wrong:\n  " + "\n  ".join(lines)) from None
    if weights:
        _check_weights(config)
    _check_imports(config)
    _check_clip(config)
    return config


def _check_weights(config: Config) -> None:
    for path in config.clip.files():
        if path.name not in FILES:
            kinds = {config.clip.weights: "weights", config.clip.vocabulary: "vocabulary"}
            existing(path, f"clip.{kinds.get(path, 'architecture')}")
    weights = config.backbone.weights
    if weights and weights.name not in FILES:
        existing(weights, "backbone.weights")


def _check_imports(config: Config) -> None:
    """Refuse imports that leave a later stage without an input."""
    if config.proposals.files and not (config.backbone.weights or config.base_detector.checkpoint):
        raise LpovodError(
            "proposals.files: without a proposal network the detector has nothing to start from: "
            "give backbone.weights, or a trained detector as base_detector.checkpoint"
        )
    if config.clip.weights is None:
        probe = config.linear_probe.checkpoint or config.pseudo_labels.file
        for setting, value in {
            "text_embeddings.file": config.text_embeddings.file,
            "base_detector.checkpoint": config.base_detector.checkpoint,
            "linear_probe.checkpoint or pseudo_labels.file": probe,
            "evaluation.clip_on_crops: false": not config.evaluation.clip_on_crops,
            "evaluation.temperature": config.evaluation.temperature,
        }.items():
            if not value:
                raise LpovodError(f"clip.weights: without CLIP this is needed: {setting}")


def _check_clip(config: Config) -> None:
    """Refuse the miniature world's CLIP on other images, unless that is meant."""
    shipped = config.clip.weights == ClipSettings().weights
    if config.dataset.source == "coco" and shipped and not config.dataset.coco.pictogram_clip:
        raise LpovodError(
            f"clip.weights: {config.clip.weights} knows drawn pictograms alone. Photographs need "
            "a CLIP of photographs (configs/photographs.yaml has one); to try the workflow out all "
            "the same, set dataset.coco.pictogram_clip: true"
        )


def explain(problem: Any, root: type[Settings], whole: str) -> str:
    """A problem of pydantic's in words: the key, its value and what is allowed.

    Args:
        problem: of a ValidationError.
        root: the block that was validated.
        whole: what the block as a whole is called.
    """
    name = ".".join(str(part) for part in problem["loc"]) or whole
    if problem["type"] == "extra_forbidden":
        block = _block(root, problem["loc"][:-1])
        allowed = list(block.model_fields) if block else []
        moved = "shards is a key of the whole run" if problem["loc"][-1] == "shards" else ""
        hint = moved or did_you_mean(str(problem["loc"][-1]), allowed)
        return f"{name}: unknown key; {hint or 'allowed: ' + ', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{name}: this key is required"
    if problem["type"] == "value_error":  # of a validator here, whose message names the value
        return f"{name}: {problem['ctx']['error']}"
    return f"{name} = {problem['input']!r}: {problem['msg']}"


def _block(root: type[Settings], path: tuple[Any, ...]) -> type[Settings] | None:
    block: Any = root
    for part in path:
        field = block.model_fields.get(part)
        block = field.annotation if field else None
        if not (isinstance(block, type) and issubclass(block, Settings)):
            return None
    return block


def documentation() -> str:
    """All keys as markdown: `lpovod config --print documentation > docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Made from `lpovod/config.py` by `lpovod config --print documentation`.",
        "",
        "- Blocks are merged: an overlay names only the keys that it changes.",
        "- A list replaces the whole list below it.",
        "- `classes.add_base` and `classes.add_novel` add to the lists of classes instead.",
    ]
    return "\n".join([*lines, *_document(Config, "")]) + "\n"


def _document(block: type[Settings], path: str) -> list[str]:
    rows = ["", "| key | default | permitted | meaning |", "|---|---|---|---|"]
    schemas = block.model_json_schema()["properties"]
    blocks: list[str] = []
    for name, field in block.model_fields.items():
        full_name = f"{path}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            blocks += ["", f"## `{full_name}`: {field.description}"]
            blocks += _document(field.annotation, f"{full_name}.")
        else:
            default = "required" if field.is_required() else json.dumps(_plain(field.default))
            schema = schemas[name]
            for limit in field.metadata:  # which a schema written by hand does not hold
                if hasattr(limit, "min_length"):
                    schema["minItems"] = limit.min_length
            cells = [f"`{full_name}`", f"`{default}`", _permitted(schema)]
            rows.append(f"| {' | '.join(cells)} | {field.description} |")
    return (rows if len(rows) > 3 else []) + blocks


def _permitted(schema: dict[str, Any]) -> str:
    """What a json schema permits, in words."""
    if "anyOf" in schema:
        return " or ".join(_permitted(part) for part in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    words: str = {"boolean": "`true` or `false`", "string": "text", "null": "`null`"}.get(
        schema["type"], schema["type"]
    )
    if schema["type"] == "array":
        least = f" at least {schema['minItems']}" if "minItems" in schema else ""
        words = f"list of{least}: {_permitted(schema['items'])}"
    elif "properties" in schema:
        words = f"`{{{', '.join(f'{name}: ...' for name in schema['properties'])}}}`"
    elif schema["type"] == "object":
        names = _permitted(schema.get("propertyNames", {"type": "string"}))
        words = f"block: {_permitted(schema['additionalProperties'])} by {names}"
    elif "pattern" in schema:
        words = f"text, `{schema['pattern']}`"
    elif schema.get("format") == "path":
        words = "path"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[limit]:g}" for limit, sign in limits.items() if limit in schema]
    return " ".join([words, ", ".join(bounds)]).strip()


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
