"""Stage `pseudo_labels`: the regions most similar to a novel class's name become its labels.

A file per class, in the layout of the original's: COCO json whose annotations carry ``score`` (the
region's objectness) and ``cosine`` (its similarity to the name). Needs no torch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lpovod import config
from lpovod.artifacts import LpovodError, check_made_from, fingerprint, identity, write_json
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.progress import say
from lpovod.region_index import (
    READ_ROWS,
    Found,
    RegionIndex,
    best_rows,
    digest_of_shards,
    open_index,
    open_shards,
    region_key,
    split_key,
)
from lpovod.store import RegionStore
from lpovod.text_embeddings import ClassEmbeddings, read_text_embeddings

STAGE = "pseudo_labels"
CATEGORY_ID = 1  # of the one class of a file; readers go by its name
BLOCK_ROWS = 1 << 20  # objectness values read at once
SPARE = 4  # times K candidates, where some may be dropped or are ranked roughly


def retrieve(
    name: str,
    text_embeddings: list[Path],
    index: Path,
    shards: list[Path],
    dataset: Path,
    settings: config.PseudoLabels,
    output: Path,
) -> None:
    """Write the top K regions by cosine with a class name, above the objectness floor.

    With an exact index (Flat, SQfp16) the result is the exact top K of all regions; equal cosines
    are ordered by image id and place in the image. With another index, ``info`` has ``recall``, the
    part of the exact top K that it found. Several regions of one image may be taken, unless the
    settings limit them.

    Args:
        name: the class.
        text_embeddings: files of which one has the class.
        index: file of stage `region_index`.
        shards: all files of stage `region_embeddings`.
        dataset: the training json the regions' images are of.
        settings: K, the floor, and how different the regions must be.
        output: COCO json.

    Raises:
        LpovodError: if the class is not embedded, the files were not made from one another, or
            no region reaches the floor.
    """
    classes = read_text_embeddings(text_embeddings)
    if name not in classes.names:
        raise LpovodError(f"class {name!r} has no text embedding; there are {classes.names}")
    vector = classes.vectors[classes.names.index(name)]
    store, searched = open_shards(shards), open_index(index)
    check_belong(classes, store, searched, dataset)
    allowed = allowed_rows(store, searched, settings.objectness)
    (regions,) = top_regions(searched, store, vector[None], settings, allowed)
    if not regions:
        raise LpovodError(
            f"class {name!r}: none of {len(store)} regions has an objectness of "
            f"{settings.objectness}. Lower pseudo_labels.objectness"
        )
    if len(regions) < settings.k:
        say(
            f"WARNING: class {name!r}: {len(regions)} regions instead of {settings.k}; no more "
            f"have an objectness of {settings.objectness} (pseudo_labels.objectness) and are "
            "different enough (per_image, nms)"
        )
    ident = identity(
        STAGE,
        settings,
        dataset=dataset,
        region_index=fingerprint(searched.identity),
        text_embedding=_digest(vector),
    )
    info: dict = {"identity": ident}
    if not searched.exact:
        (exact,) = top_regions(_Shards(store), store, vector[None], settings, allowed)
        hits = {r["key"] for r in regions} & {r["key"] for r in exact}
        info["recall"] = len(hits) / len(exact)
        say(f"{name}: recall {info['recall']:.3f} of the exact top {len(exact)}")
    write_json(output, as_coco(name, regions, dataset) | {"info": info})
    images, cosines = {r["image_id"] for r in regions}, [r["cosine"] for r in regions]
    say(
        f"{name}: {len(regions)} regions of {len(images)} images, "
        f"cosine {cosines[0]:.4f} ... {cosines[-1]:.4f}"
    )


def check_belong(
    classes: ClassEmbeddings, store: RegionStore, searched: RegionIndex, dataset: Path
) -> None:
    """Refuse text embeddings, shards, an index and a dataset that were not made from one another.

    Raises:
        LpovodError: naming the file and what it was made from.
    """
    shard, made_from = store.paths[0], store.identity
    check_made_from(shard, made_from, "clip_weights", classes.clip_weights)
    check_made_from(shard, made_from, "clip_architecture", classes.clip_architecture)
    check_made_from(shard, made_from, "dataset", Path(dataset))
    digest = digest_of_shards(store)
    check_made_from(searched.path, searched.identity, "region_embeddings", digest)


def allowed_rows(store: RegionStore, searched: RegionIndex, floor: float) -> np.ndarray:
    """Which rows of the index hold regions that reach the objectness floor, (rows,) bool."""
    reached, start = [], 0
    for block in store.blocks(BLOCK_ROWS, []):
        keys = region_key(block.image_id, block.index)
        if not np.array_equal(keys, searched.keys[start : start + len(block)]):
            raise LpovodError(
                f"{searched.path} holds other regions than {store.paths[0].parent}. Make it "
                "again: snakemake --forcerun region_index"
            )
        reached.append(block.objectness >= np.float32(floor))
        start += len(block)
    return np.concatenate(reached)


def top_regions(
    searched: "RegionIndex | _Shards",
    store: RegionStore,
    vectors: np.ndarray,
    settings: config.PseudoLabels,
    allowed: np.ndarray,
) -> list[list[dict]]:
    """The best regions for each of several vectors, with one pass over an exact index.

    A limit on regions of one image may use up what was searched for: then more is asked for.

    Args:
        searched: what finds candidates; the cosines of an inexact one are computed anew.
        store: the shards.
        vectors: (q, D) float32 of unit norm.
        settings: K, and how different the regions must be.
        allowed: (rows,) bool, see `allowed_rows`.

    Returns:
        For each vector at most K annotations, and the ``key`` of each; best first.
    """
    limited = settings.per_image is not None or settings.nms is not None
    asked = settings.k if searched.exact and not limited else SPARE * settings.k
    taken: dict[int, list[dict]] = {}
    while pending := [query for query in range(len(vectors)) if query not in taken]:
        found = searched.search(vectors[pending], asked, allowed)
        for query, (cosines, keys) in zip(pending, found, strict=True):
            if not searched.exact:
                cosines = _cosines(store, keys, vectors[query])
            regions = _take(_ranked(store, keys, cosines)[:asked], settings)
            if len(regions) == settings.k or len(keys) < asked:
                taken[query] = regions
        asked *= SPARE
    return [taken[query] for query in range(len(vectors))]


@dataclass(frozen=True)
class _Shards:
    """The shards themselves, searched exactly: what an inexact index is measured against."""

    store: RegionStore
    exact = True

    def search(self, vectors: np.ndarray, k: int, allowed: np.ndarray) -> list[Found]:
        blocks = (b["embedding"].astype(np.float32) for b in self.store.blocks(READ_ROWS))
        keys = [region_key(b.image_id, b.index) for b in self.store.blocks(BLOCK_ROWS, [])]
        found = best_rows(vectors, blocks, k, allowed)
        return [(scores, np.concatenate(keys)[rows]) for scores, rows in found]


def _cosines(store: RegionStore, keys: np.ndarray, vector: np.ndarray) -> np.ndarray:
    image_ids, places = split_key(keys)
    content = {i: store.read(i, ["embedding"]) for i in np.unique(image_ids).tolist()}
    pairs = zip(image_ids.tolist(), places, strict=True)
    rows = [content[image_id]["embedding"][place] for image_id, place in pairs]
    return (np.stack(rows).astype(np.float64) @ vector.astype(np.float64)).astype(np.float32)


def _ranked(store: RegionStore, keys: np.ndarray, cosines: np.ndarray) -> list[dict]:
    """Annotations by cosine and key."""
    regions = []
    for row in np.lexsort((keys, -cosines)).tolist():
        image_id, place = map(int, split_key(keys[row]))
        content = store.read(image_id, [])
        x1, y1, x2, y2 = content.box[place].astype(float).tolist()
        regions.append(
            {
                "key": int(keys[row]),
                "image_id": image_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "score": float(content.objectness[place]),
                "cosine": float(cosines[row]),
            }
        )
    return regions


def _take(ranked: list[dict], settings: config.PseudoLabels) -> list[dict]:
    """The first K regions, without those that come too close to a better one of their image."""
    taken: list[dict] = []
    of_image: dict[int, list[dict]] = defaultdict(list)
    for region in ranked:
        better = of_image[region["image_id"]]
        full = settings.per_image is not None and len(better) >= settings.per_image
        near = settings.nms is not None and any(_iou(region, b) > settings.nms for b in better)
        if len(taken) < settings.k and not full and not near:
            taken.append(region)
            better.append(region)
    return taken


def _iou(one: dict, other: dict) -> float:
    sides = [
        min(one["bbox"][a] + one["bbox"][a + 2], other["bbox"][a] + other["bbox"][a + 2])
        - max(one["bbox"][a], other["bbox"][a])
        for a in (0, 1)
    ]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (one["area"] + other["area"] - common)


def _digest(vector: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()


def as_coco(name: str, regions: list[dict], dataset: Path) -> dict:
    """The regions of a class in the layout of this stage's files."""
    images = read_dataset(dataset).images
    annotations = [
        {"id": i, "category_id": CATEGORY_ID, "iscrowd": 0, "segmentation": [], **region}
        for i, region in enumerate(regions, start=1)
    ]
    for annotation in annotations:
        del annotation["key"]
    return {
        "images": [images[i] for i in dict.fromkeys(r["image_id"] for r in regions)],
        "annotations": annotations,
        "categories": [{"id": CATEGORY_ID, "name": name, "split": "novel"}],
    }


PseudoLabels = dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]


def read_pseudo_labels(paths: Path | Iterable[Path]) -> PseudoLabels:
    """Read pseudo-labels: files of this stage, or the original's single file of all classes.

    Returns:
        By class name and image id: boxes (n, 4) float32 xyxy and their objectness (n,) float32.
        Classes without any label are left out.

    Raises:
        LpovodError: if a file is no COCO json, a label has no score, or two files have one class.
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
    found: PseudoLabels = {}
    source: dict[str, Path] = {}
    for path in paths:
        content = read_dataset(path)
        for name, images in _by_class(content).items():
            if name in source:
                raise LpovodError(f"class {name!r} is both in {source[name]} and in {path}")
            found[name], source[name] = images, path
    return found


def _by_class(content: CocoDataset) -> PseudoLabels:
    grouped: dict[str, dict[int, list[dict]]] = {}
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if "score" not in annotation:
                raise LpovodError(
                    f"{content.path}: annotation {annotation['id']} has no score: these are no "
                    f"pseudo-labels, which stage {STAGE} writes"
                )
            name = content.categories[annotation["category_id"]]["name"]
            grouped.setdefault(name, {}).setdefault(image_id, []).append(annotation)
    return {
        name: {image_id: _boxes(labels) for image_id, labels in images.items()}
        for name, images in grouped.items()
    }


def _boxes(labels: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    xywh = np.array([label["bbox"] for label in labels], np.float64)
    boxes = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return boxes.astype(np.float32), np.array([label["score"] for label in labels], np.float32)
