"""The overlay that `lpovod adopt` writes: what is the user's, and schedules that fit the data."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lpovod.apps.adopt.look import Content

SHARED = Path("configs/photographs.yaml")

# Images that a training should see, and limits of its epochs, on a GPU and on a CPU.
SEEN = {
    True: {"proposals": (20_000, 8, 60), "base_detector": (40_000, 12, 80)},
    False: {"proposals": (2_000, 2, 16), "base_detector": (3_000, 2, 24)},
}
MILESTONES = (0.75, 0.92)  # of the epochs
IMAGES_PER_PSEUDO_LABEL = 10
PSEUDO_LABELS = (5, 100)  # at least, at most, per novel class

ON_CPU: dict[str, Any] = {
    "backbone": {"channels": 128, "short_side": 320, "long_side": 534},
    "proposals": {
        "per_level": 500,
        "per_image": 50,
        "training": {"short_sides": [288, 320], "workers": 0},
    },
    "region_embeddings": {"batch_size": 64},
    "base_detector": {
        "regions": "proposals",
        "samples_per_image": 64,
        "head_convolutions": 0,
        "finest_scale": 28,
        "distillation_regions": 50,
        "training": {"short_sides": [288, 320], "workers": 0},
    },
    "evaluation": {"clip_on_crops": False},
}
"""What a CPU has time for."""


class Adopted(NamedTuple):
    """What an overlay says.

    Attributes:
        name: of the run.
        splits: images and annotations.
        json: the file with the annotations of each split.
        base: annotated classes.
        novel: names, and their prompts or None.
        gpu: whether the run has a GPU.
        command: that wrote it.
    """

    name: str
    splits: dict[str, Content]
    json: dict[str, Path]
    base: list[str]
    novel: dict[str, str | None]
    gpu: bool
    command: str


def settings(adopted: Adopted) -> dict[str, Any]:
    """The overlay's blocks for the stages: schedules, and sizes for a CPU."""
    blocks: dict[str, Any] = {} if adopted.gpu else _copy(ON_CPU)
    train = adopted.splits["train"]
    labelled = len({a["image_id"] for a in train.coco["annotations"]})
    for stage, (seen, fewest, most) in SEEN[adopted.gpu].items():
        epochs = min(most, max(fewest, round(seen / max(1, labelled))))
        milestones = sorted({max(1, math.ceil(part * epochs)) for part in MILESTONES})
        training = blocks.setdefault(stage, {}).setdefault("training", {})
        training |= {"epochs": epochs, "milestones": milestones}
    least, most = PSEUDO_LABELS
    images = len(train.coco["images"])
    blocks["pseudo_labels"] = {"k": min(most, max(least, images // IMAGES_PER_PSEUDO_LABEL))}
    return blocks


def overlay(adopted: Adopted, path: Path) -> str:
    """The overlay as text.

    Args:
        adopted: what it says.
        path: where it will be, for the commands in its comments.
    """
    blocks = settings(adopted)
    parts = [
        f"# Written by: {adopted.command}\n"
        f"#   snakemake --cores all --configfile {SHARED} {path}\n"
        f"# It is laid over {SHARED}, which has what runs on photographs share. Every key:\n"
        "# docs/configuration.md. Change what you like: only what depends on it runs again.",
        f"name: {adopted.name}  # results/{adopted.name}/\n"
        + (
            "gpu: true  # false without a GPU, but then adopt the folder with --cpu"
            if adopted.gpu
            else "gpu: false  # with a GPU, adopt the folder with --gpu: larger sizes, more epochs"
        ),
        _dataset(adopted),
        _classes(adopted),
        _stages(adopted, blocks),
    ]
    return "\n\n".join(parts) + "\n"


def scalar(value: Any) -> str:
    """A value on one line of yaml, quoted where it must be."""
    text = yaml.safe_dump(
        value, allow_unicode=True, width=10**9, default_flow_style=True, sort_keys=False
    )
    return text.removesuffix("...\n").rstrip("\n")


def _dataset(adopted: Adopted) -> str:
    lines = ["dataset:", "  source: coco", "  coco:"]
    for split in ("train", "val"):
        content = adopted.splits.get(split)
        if content is None:
            lines += ["    val_images: null  # nothing is measured", "    val_annotations: null"]
            continue
        boxes = len(content.coco["annotations"])
        count = f"{len(content.coco['images']):,} images, {boxes:,} boxes"
        lines += [
            f"    {split}_images: {scalar(str(content.root))}",
            f"    {split}_annotations: {scalar(str(adopted.json[split]))}  # {count}",
        ]
    lines.append("  bad_images: fail  # skip: leave out images that cannot be decoded")
    return "\n".join(lines)


def _classes(adopted: Adopted) -> str:
    counts = {split: content.counts() for split, content in adopted.splits.items()}
    train, val = counts["train"], counts.get("val", {})
    base = [
        (scalar(name), f"{train.get(name, (0, 0))[1]:,} + {val.get(name, (0, 0))[1]:,}")
        for name in adopted.base
    ]
    novel = []
    for name, prompt in adopted.novel.items():
        item = scalar(name) if prompt is None else scalar({"name": name, "prompt": prompt})
        boxes = val.get(name, (0, 0))[1]
        measured = f"measured on {boxes:,} boxes" if boxes else "not annotated in val: no AP"
        novel.append((item, measured))
    return "\n".join(
        [
            "classes:",
            "  base:  # the detector learns from their boxes: in train + in val",
            *_items(base),
            "  novel:  # by name alone; annotations of them, if any, are never learned from",
            *_items(novel),
            "  # The words that CLIP reads may differ from the name: {name: 狗, prompt: dog}",
        ]
    )


def _items(items: list[tuple[str, str]]) -> list[str]:
    width = max(len(item) for item, _ in items)
    return [f"    - {item:{width}}  # {comment}" for item, comment in items]


def _stages(adopted: Adopted, blocks: dict[str, Any]) -> str:
    train = len(adopted.splits["train"].coco["images"])
    head = f"# Epochs for {train:,} training images"
    head += (
        "." if adopted.gpu else "; sizes for a CPU, which cost accuracy, small objects above all."
    )
    comments = {
        "pseudo_labels": "k: regions that teach a novel class; no more than train surely shows",
        "evaluation": "true measures CLIP on its own as well, and embeds val's proposals for it",
        "proposals": "per_image: boxes that CLIP looks at, the largest part of the time",
    }
    lines = [head]
    for name, block in blocks.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        if any(isinstance(value, dict) for value in block.values()):
            inner = yaml.safe_dump(block, sort_keys=False, default_flow_style=None, width=88)
            lines += [f"{name}:{comment}", *(f"  {line}" for line in inner.splitlines())]
        else:
            lines.append(f"{name}: {scalar(block)}{comment}")
    return "\n".join(lines)


def _copy(content: dict[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, dict) else v for k, v in content.items()}


def run_name(folder: Path) -> str:
    """A name for a run on a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().name).strip("_.-") or "photographs"
