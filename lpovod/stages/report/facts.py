"""The facts of the report: data set, models, and settings that differ from the defaults."""

import json
from collections import Counter
from collections.abc import Iterator

from lpovod.config import ClipSettings, Config, Settings
from lpovod.formats.coco import CocoDataset

PROTOCOLS = {
    "all_images": "all {images} validation images",
    "annotated_images": "the {images} of {split_images} validation images in which one of these "
    "classes is annotated (OV-COCO's protocol: false alarms in other images cost nothing)",
}


def run_facts(run: Config, train: CocoDataset, val: CocoDataset | None) -> list[tuple[str, str]]:
    """Name and text of each fact, in order.

    Args:
        run: the run's configuration.
        train: the training images with the annotations of all classes.
        val: the validation images with theirs, if there are any.
    """
    splits = [("Training images", train), ("Validation images", val)]
    images = [(name, _content(data, run)) for name, data in splits if data]
    tune = f"{run.dataset.image_count('tune'):,}, to choose settings on, never reported"
    return [
        ("Data set", _source(run)),
        *_paths(run),
        *images,
        *([("Tuning images", tune)] if run.dataset.source == "miniature" else []),
        ("Classes", f"{len(run.classes.base)} base, {len(run.classes.novel)} novel"),
        ("CLIP", _clip(run)),
        ("Backbone", _backbone(run)),
        ("Seed", str(run.seed)),
    ]


def box_counts(data: CocoDataset) -> Counter[str]:
    """Annotated boxes by class name; crowds are left out."""
    return Counter(
        data.categories[a["category_id"]]["name"]
        for annotations in data.annotations.values()
        for a in annotations
        if not a.get("iscrowd", 0)
    )


def measured_on(evaluated: dict[str, object]) -> str:
    """The images that AP was measured on, in words; empty if the metrics do not say.

    Args:
        evaluated: of the metrics: protocol, images, split_images.
    """
    counts = {k: f"{v:,}" for k, v in evaluated.items() if isinstance(v, int)}
    return PROTOCOLS[str(evaluated["protocol"])].format(**counts) if evaluated else ""


def changed_settings(run: Config) -> list[tuple[str, str, str]]:
    """Key, value and default of every setting that differs from its default, as json.

    The name of the run and its classes are left out: they have no default worth a comparison. So
    are the settings of the source that the run does not use.
    """
    usual = Config(name=run.name, classes=run.classes)
    unused = {"miniature": "dataset.coco.", "coco": "dataset.miniature."}[run.dataset.source]
    return [row for row in _changed(run, usual, "") if not row[0].startswith(unused)]


def _changed(block: Settings, usual: Settings, path: str) -> Iterator[tuple[str, str, str]]:
    for name in type(block).model_fields:
        value, default = getattr(block, name), getattr(usual, name)
        if isinstance(value, Settings):
            yield from _changed(value, default, f"{path}{name}.")
        elif value != default:
            yield f"{path}{name}", _json(value), _json(default)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _content(data: CocoDataset, run: Config) -> str:
    counts = box_counts(data)
    base, novel = (
        sum(counts[name] for name in names) for names in (run.classes.base, run.classes.novel)
    )
    return f"{len(data.images):,}, with {base:,} boxes of base and {novel:,} of novel classes"


def _source(run: Config) -> str:
    if run.dataset.source == "coco":
        return "images with annotations in COCO's format"
    world = run.dataset.miniature
    return (
        f"the drawn miniature world (nuisance {world.nuisance:g}, nested {world.nested:g}, "
        f"distractors {world.distractors:g})"
    )


def _paths(run: Config) -> list[tuple[str, str]]:
    if run.dataset.source == "miniature":
        return []
    files = run.dataset.coco
    splits = ["train", "val"] if files.val_images else ["train"]
    names = {"train": "Training files", "val": "Validation files"}
    return [
        (names[split], f"{files.path(f'{split}_images')}, {files.path(f'{split}_annotations')}")
        for split in splits
    ]


def _clip(run: Config) -> str:
    clip = run.clip
    if clip.weights is None:
        return "none: everything that needs it was read from files"
    tag = f" ({clip.pretrained})" if clip.pretrained else ""
    shipped = clip.weights == ClipSettings().weights
    warning = ", which knows drawn pictograms alone" if shipped else ""
    return f"{clip.architecture}{tag}, weights {clip.weights}{warning}"


def _backbone(run: Config) -> str:
    start = run.backbone.weights
    trained = run.base_detector.checkpoint
    text = f"{run.backbone.architecture}, started from {start or 'random weights'}"
    return f"{text}; the detector is {trained}" if trained else text
