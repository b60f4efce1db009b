"""Stage `pseudo_labels`: the regions most similar to a novel class's name become its labels.

A file per class, in the layout of the original's: COCO json whose annotations carry ``score`` (the
region's objectness) and ``cosine`` (its similarity to the name). Needs no torch.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lpovod import config
from lpovod.artifacts import LpovodError, check_made_from, fingerprint, identity, write_json
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.progress import say
from lpovod.region_index import (
    RegionIndex,
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
ROUNDING = 1e-4  # more than two float32 sums over a unit vector can differ by


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
    are ordered by image id and place in the image. Several regions of one image may be taken.

    Args:
        name: the class.
        text_embeddings: files of which one has the class.
        index: file of stage `region_index`.
        shards: all files of stage `region_embeddings`.
        dataset: the training json the regions' images are of.
        settings: K and the floor.
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
    _check_belong(classes, store, searched, dataset)
    allowed = _allowed(store, searched, settings.objectness)
    regions = [
        _region(store, key, cosine)
        for key, cosine in _top(searched, store, vector, settings.k, allowed)
    ]
    if not regions:
        raise LpovodError(
            f"class {name!r}: none of {len(store)} regions has an objectness of "
            f"{settings.objectness}. Lower pseudo_labels.objectness"
        )
    if len(regions) < settings.k:
        say(
            f"WARNING: class {name!r}: {len(regions)} regions instead of {settings.k}; no more "
            f"have an objectness of {settings.objectness} (pseudo_labels.objectness)"
        )
    ident = identity(
        STAGE,
        settings,
        dataset=dataset,
        region_index=fingerprint(searched.identity),
        text_embedding=_digest(vector),
    )
    write_json(output, as_coco(name, regions, dataset) | {"info": {"identity": ident}})
    images, cosines = {r["image_id"] for r in regions}, [r["cosine"] for r in regions]
    say(
        f"{name}: {len(regions)} regions of {len(images)} images, "
        f"cosine {cosines[0]:.4f} ... {cosines[-1]:.4f}"
    )


def _check_belong(
    classes: ClassEmbeddings, store: RegionStore, searched: RegionIndex, dataset: Path
) -> None:
    shard, made_from = store.paths[0], store.identity
    check_made_from(shard, made_from, "clip_weights", classes.clip_weights)
    check_made_from(shard, made_from, "clip_architecture", classes.clip_architecture)
    check_made_from(shard, made_from, "dataset", Path(dataset))
    digest = digest_of_shards(store)
    check_made_from(searched.path, searched.identity, "region_embeddings", digest)


def _allowed(store: RegionStore, searched: RegionIndex, floor: float) -> np.ndarray:
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


def _top(
    searched: RegionIndex, store: RegionStore, vector: np.ndarray, k: int, allowed: np.ndarray
) -> list[tuple[int, float]]:
    """Key and cosine of the top k: FAISS proposes some more, sorted here by cosine and key."""
    asked = 2 * k
    while True:
        scores, keys = searched.search(vector, asked, allowed)
        # All that could be among the first k are found: there are no more, or the last one found
        # lies clearly below the k-th.
        if len(scores) < asked or scores[-1] < scores[k - 1] - ROUNDING:
            break
        asked *= 2
    if len(scores) > k:
        keys = keys[scores >= scores[k - 1] - ROUNDING]
    cosines = {key: _cosine(store, key, vector) for key in keys.tolist()}
    return sorted(cosines.items(), key=lambda item: (-item[1], item[0]))[:k]


def _cosine(store: RegionStore, key: int, vector: np.ndarray) -> float:
    image_id, index = map(int, split_key(key))
    embedding = store.read(image_id, ["embedding"])["embedding"][index]
    # Summed in float64 and rounded, so that equal vectors are ties whatever the summation order.
    return float(np.float32(embedding.astype(np.float64) @ vector.astype(np.float64)))


def _region(store: RegionStore, key: int, cosine: float) -> dict:
    image_id, index = map(int, split_key(key))
    regions = store.read(image_id, [])
    x1, y1, x2, y2 = regions.box[index].astype(float).tolist()
    return {
        "image_id": image_id,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "score": float(regions.objectness[index]),
        "cosine": cosine,
    }


def _digest(vector: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()


def as_coco(name: str, regions: list[dict], dataset: Path) -> dict:
    """The regions of a class in the layout of this stage's files."""
    images = read_dataset(dataset).images
    annotations = [
        {"id": i, "category_id": CATEGORY_ID, "iscrowd": 0, "segmentation": [], **region}
        for i, region in enumerate(regions, start=1)
    ]
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
