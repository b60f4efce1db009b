"""The user's images and annotations as the workflow's graph sees them: by digests of their content.

Snakemake compares the params of a job with those of its last run. The rules that read the user's
files have these digests as params, so they run again if and only if what they would write has
changed. To digest COCO's half a gigabyte of json takes seconds and happens once: the digests are
kept in a cache, by the size and the modification time of each file. The cache is no artifact;
deleting it costs time and nothing else.

The workflow calls this while it builds its graph, so nothing heavy is imported.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpovod.artifacts import read_json, sha256, write_json
from lpovod.catalogue import COCO_CLASSES, COCO_IDS
from lpovod.config import Config
from lpovod.exceptions import LpovodError, did_you_mean, existing, some
from lpovod.formats.coco import BOX_KEYS, IMAGE_KEYS, ids_of
from lpovod.miniature import pictograms

BY_CONTENT = 2_000
"""Up to this many images of a split are compared by content, more by size and modification time."""

SHOWN = 20
"""Unknown classes in a message."""

CACHE = Path(".snakemake", "lpovod")


@dataclass(frozen=True)
class Source:
    """Digests of a split of the user's data.

    Attributes:
        images: of the image files and the list of them.
        annotations: of the annotations, by class name.
        count: number of images.
        categories: ids by class name.
    """

    images: str
    annotations: dict[str, str]
    count: int
    categories: dict[str, int]

    def digest(self, classes: Iterable[str] | None = None) -> str:
        """Digest of the list of images and of the annotations of some classes, or of all."""
        names = sorted(self.annotations if classes is None else classes)
        return _digest([self.images, *(f"{n} {self.annotations.get(n)}" for n in names)])


def read_source(images: Path, annotations: Path, cache: Path = CACHE) -> Source:
    """Digest a split of the user's data.

    Args:
        images: folder of the images.
        annotations: COCO json.
        cache: folder of remembered digests.

    Raises:
        LpovodError: if the json is missing, or is not COCO's.
    """
    remembered = cache / f"{_digest([str(annotations.resolve())])[:16]}.json"
    facts = _facts(annotations, remembered)
    files = _file_digest(images, facts["files"], remembered.with_suffix(".images.json"))
    images_digest, count = _digest([facts["images"], files]), len(facts["files"])
    return Source(images_digest, facts["annotations"], count, facts["categories"])


def read_sources(config: Config) -> dict[str, Source]:
    """The user's data by split; none if it is drawn, or downloaded: it then counts as published."""
    files = config.dataset.coco
    if config.dataset.source != "coco" or files.download:
        return {}
    return {s: read_source(files.images(s), files.annotations(s)) for s in config.dataset.splits}


def category_ids(config: Config, sources: dict[str, Source]) -> dict[str, int]:
    """Ids by name of the data set's categories and of all classes, as the evaluation has them.

    Args:
        config: the classes, and where the images come from.
        sources: the user's data by split; empty if it is drawn, or downloaded.
    """
    if config.dataset.source == "miniature":
        known = pictograms.CATEGORY_IDS
    elif sources:
        known = sources["val" if "val" in sources else "train"].categories
    else:
        known = COCO_IDS
    return known | ids_of(known, [*config.classes.base, *config.classes.novel])


def check_classes(config: Config, sources: dict[str, Source]) -> list[str]:
    """Refuse a base class that the source does not annotate.

    Args:
        config: the classes, and where the images come from.
        sources: the user's data by split; empty if it is drawn, or not downloaded yet.

    Returns:
        A warning that names the novel classes that cannot be measured, if there are any.

    Raises:
        LpovodError: naming the unknown base classes.
    """
    if config.dataset.source == "miniature":
        where, learned = "the miniature world", list(pictograms.CLASSES)
        measured = learned
    elif not sources:
        where, learned = "COCO 2017", list(COCO_CLASSES)
        measured = learned
    else:
        where = str(config.dataset.coco.annotations("train"))
        learned = list(sources["train"].annotations)
        measured = list(sources["val"].annotations) if "val" in sources else []
    unknown = [
        f"classes.base: {where} has no class {name!r}; "
        + (did_you_mean(name, learned) or f"it has {some(learned)}")
        for name in config.classes.base
        if name not in learned
    ]
    if unknown:
        raise LpovodError("\n  ".join(unknown[:SHOWN] + ["..."] * (len(unknown) > SHOWN)))
    if "val" not in config.dataset.splits:
        return []
    absent = [name for name in config.classes.novel if name not in measured]
    hints = {name: did_you_mean(name, measured) for name in absent}
    listed = some([f"{name!r} ({hint})" if hint else repr(name) for name, hint in hints.items()])
    return [f"not annotated, so their AP cannot be measured: {listed}"] if absent else []


def _facts(annotations: Path, remembered: Path) -> dict[str, Any]:
    """Names of the image files, and digests of what a json says, from the cache if it holds."""
    stamp = _stamp(existing(annotations))
    facts = _remembered(remembered)
    if facts.get("stamp") != stamp or "categories" not in facts:
        facts = {"stamp": stamp} | _read_facts(annotations)
        write_json(remembered, facts)
    return facts


def _read_facts(annotations: Path) -> dict[str, Any]:
    content = read_json(annotations)
    for section in ("images", "annotations", "categories"):
        items = content.get(section) if isinstance(content, dict) else None
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise LpovodError(f"{annotations} is not a COCO json: it has no list {section!r}")
    by_category: dict[Any, list[dict]] = defaultdict(list)
    for box in content["annotations"]:
        by_category[_key(box.get("category_id"))].append({k: box.get(k) for k in BOX_KEYS})
    return {
        "files": [str(image.get("file_name")) for image in content["images"]],
        "images": _digest([[image.get(k) for k in IMAGE_KEYS] for image in content["images"]]),
        # The check names those whose id is no integer.
        "categories": {
            str(c.get("name")): c["id"] for c in content["categories"] if type(c.get("id")) is int
        },
        "annotations": {
            str(c.get("name")): _digest([c.get("id"), by_category[_key(c.get("id"))]])
            for c in content["categories"]
        },
    }


def _key(category: Any) -> str:
    return json.dumps(category)


def _file_digest(folder: Path, names: list[str], remembered: Path) -> str:
    """Digest of the image files: by content if they are few, else by size and time."""
    if len(names) > BY_CONTENT:
        return _digest([_stamp(folder / name) for name in names])
    digests, changed = _remembered(remembered), False
    for name in names:
        path = folder / name
        stamp = _stamp(path)
        if str(path) not in digests or digests[str(path)][0] != stamp:
            digests[str(path)], changed = [stamp, sha256(path) if stamp else None], True
    if changed:
        write_json(remembered, {k: digests[k] for k in (str(folder / n) for n in names)})
    return _digest([[name, digests[str(folder / name)][1]] for name in names])


def _stamp(path: Path) -> list[int] | None:
    """Size in bytes and time of the last change in nanoseconds; None if there is no such file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _remembered(path: Path) -> dict[str, Any]:
    # A cache that cannot be read is made again.
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
