"""Stage `pseudo_labels`: the regions most similar to a novel class's name become its labels.

A file per class, in the layout of the original's: COCO json whose annotations carry ``score`` (the
region's objectness) and ``cosine`` (with what was searched for). Objects that are no labels, but so
similar to the name that they should be no negatives either, follow with ``iscrowd`` 1, which means
what it means in COCO: neither one nor the other. Needs no torch.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lpovod import config
from lpovod.artifacts import LpovodError, check_made_from, fingerprint, identity, write_json
from lpovod.dataset import CocoDataset, read_dataset
from lpovod.overlaps import overlaps
from lpovod.progress import say
from lpovod.region_index import (
    READ_ROWS,
    RegionIndex,
    best_rows,
    digest_of_shards,
    open_index,
    open_shards,
    split_key,
)
from lpovod.store import RegionStore
from lpovod.text_embeddings import ClassEmbeddings, read_text_embeddings

STAGE = "pseudo_labels"
CATEGORY_ID = 1  # of the one class of a file; readers go by its name
SPARE = 4  # times K candidates, where some may be dropped or are ranked roughly
SAME = 0.6  # shared part, of either of two regions, from which they show the same object


def retrieve(
    name: str,
    text_embeddings: list[Path],
    base_text_embeddings: Path,
    index: Path,
    shards: list[Path],
    dataset: Path,
    settings: config.PseudoLabels,
    output: Path,
) -> None:
    """Write the top K regions by cosine with a class's query, above the objectness floor.

    With an exact index (Flat, SQfp16) the result is the exact top K of all regions; equal cosines
    are ordered by image id and place in the image. With another index, ``info`` has ``recall``, the
    part of the exact top K that it found. Several regions of one image may be taken, unless the
    settings limit them.

    Args:
        name: the class.
        text_embeddings: files of which one has the class.
        base_text_embeddings: of the base classes, which a centred query is contrasted with.
        index: file of stage `region_index`.
        shards: all files of stage `region_embeddings`.
        dataset: the training json the regions' images are of.
        settings: K, the floor, the query, and how different the regions must be.
        output: COCO json.

    Raises:
        LpovodError: if the class is not embedded, the files were not made from one another, or
            no region reaches the floor.
    """
    classes = read_text_embeddings(text_embeddings)
    if name not in classes.names:
        raise LpovodError(f"class {name!r} has no text embedding; there are {classes.names}")
    base = read_text_embeddings([base_text_embeddings])
    vector = classes.vectors[classes.names.index(name)]
    store, searched = open_shards(shards), open_index(index)
    check_belong([classes, base], store, searched, dataset)
    (vector,) = queries(vector[None], base.vectors, settings)
    (regions,) = top_regions(searched, store, vector[None], settings)
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
        query=_digest(vector),
    )
    info: dict = {"identity": ident}
    if not searched.exact:
        (exact,) = top_regions(searched, store, vector[None], settings, exact=True)
        hits = {r["key"] for r in regions} & {r["key"] for r in exact}
        info["recall"] = len(hits) / len(exact)
        say(f"{name}: recall {info['recall']:.3f} of the exact top {len(exact)}")
    ignored = _others(searched, store, vector, settings, regions) if settings.ignored else []
    write_json(output, as_coco(name, regions, dataset, ignored) | {"info": info})
    images, cosines = {r["image_id"] for r in regions}, [r["cosine"] for r in regions]
    say(
        f"{name}: {len(regions)} regions of {len(images)} images, "
        f"cosine {cosines[0]:.4f} ... {cosines[-1]:.4f}"
    )


def queries(vectors: np.ndarray, base: np.ndarray, settings: config.PseudoLabels) -> np.ndarray:
    """What regions are compared with to find those of some names.

    Text embeddings share a large part, and a region's cosine with that says how much it resembles
    any name at all. Without it a query ranks by what is particular to the name. Ours, not the
    paper's.

    Args:
        vectors: (q, D) unit text embeddings of the names.
        base: (b, D) of the base classes.
        settings: whether queries are centred.

    Returns:
        (q, D) float32, unit rows: the embeddings themselves, or what they are beyond the mean of
        the base classes'.

    Raises:
        LpovodError: if an embedding is that mean itself.
    """
    if not settings.centred:
        return vectors
    beyond = vectors - base.mean(axis=0)
    lengths = np.linalg.norm(beyond, axis=1, keepdims=True)
    if lengths.min() < 1e-6:
        raise LpovodError(
            "a name has the embedding that the base classes have on the mean, so nothing is "
            "particular to it. Set pseudo_labels.centred to false"
        )
    return beyond / lengths


def _others(
    index: RegionIndex,
    store: RegionStore,
    vector: np.ndarray,
    settings: config.PseudoLabels,
    regions: list[dict],
) -> list[dict]:
    """The objects to be ignored: the most similar regions, without other boxes of the same object.

    A part of a label or of such an object, or a box around it, stays a negative: that it is badly
    placed is what the probe has to learn.
    """
    of_any_objectness = config.PseudoLabels(k=settings.ignored, objectness=0)
    (similar,) = top_regions(index, store, vector[None], of_any_objectness)
    return list(_apart(similar, _same_object, regions))


def _same_object(box: np.ndarray, others: np.ndarray) -> bool:
    return max(shared.max() for shared in overlaps(box, others)) >= SAME


def _apart(
    ranked: list[dict],
    near: Callable[[np.ndarray, np.ndarray], bool],
    better: Sequence[dict] = (),
) -> Iterator[dict]:
    """Down the ranking, the regions that are not near a better one of their image.

    Args:
        ranked: regions, best first.
        near: whether a box, (4,), is near those of its image that are better, (n, 4).
        better: regions that are better than all of them.
    """
    of_image: dict[int, list[np.ndarray]] = defaultdict(list)
    for region in better:
        of_image[region["image_id"]].append(_corners(region))
    for region in ranked:
        box, boxes = _corners(region), of_image[region["image_id"]]
        if not (boxes and near(box, np.array(boxes))):
            boxes.append(box)
            yield region


def _corners(region: dict) -> np.ndarray:
    x, y, width, height = region["bbox"]
    return np.array([x, y, x + width, y + height])


def check_belong(
    embedded: Iterable[ClassEmbeddings], store: RegionStore, searched: RegionIndex, dataset: Path
) -> None:
    """Refuse text embeddings, shards, an index and a dataset that were not made from one another.

    Raises:
        LpovodError: naming the file and what it was made from.
    """
    shard, made_from = store.paths[0], store.identity
    for classes in embedded:
        check_made_from(shard, made_from, "clip_weights", classes.clip_weights)
        check_made_from(shard, made_from, "clip_architecture", classes.clip_architecture)
    check_made_from(shard, made_from, "dataset", Path(dataset))
    digest = digest_of_shards(store)
    check_made_from(searched.path, searched.identity, "region_embeddings", digest)


def top_regions(
    index: RegionIndex,
    store: RegionStore,
    vectors: np.ndarray,
    settings: config.PseudoLabels,
    exact: bool = False,
) -> list[list[dict]]:
    """The best regions for each of several vectors, with one pass over an exact index.

    A limit on regions of one image may use up what was searched for: then more is asked for.

    Args:
        index: what is searched.
        store: the shards it was made from; read only where the index is inexact.
        vectors: (q, D) float32 of unit norm.
        settings: K, the floor, and how different the regions must be.
        exact: search the shards themselves, whatever the index.

    Returns:
        For each vector at most K annotations, and the ``key`` of each; best first.
    """
    exact = exact or index.exact
    limited = settings.per_image is not None or settings.nms is not None
    asked = settings.k if exact and not limited else SPARE * settings.k
    floor = np.float32(settings.objectness)
    allowed = index.objectness >= floor
    taken: dict[int, list[dict]] = {}
    while pending := [query for query in range(len(vectors)) if query not in taken]:
        if exact and not index.exact:
            blocks = store.blocks(READ_ROWS)
            above = (b["embedding"][b.objectness >= floor].astype(np.float32) for b in blocks)
            found = best_rows(vectors[pending], above, asked)
            found = [(cosines, np.flatnonzero(allowed)[places]) for cosines, places in found]
        else:
            found = index.search(vectors[pending], asked, allowed)
        for query, (cosines, rows) in zip(pending, found, strict=True):
            if not exact:
                cosines = _cosines(store, index.keys[rows], vectors[query])
            regions = _take(_ranked(index, rows, cosines)[:asked], settings)
            if len(regions) == settings.k or len(rows) < asked:
                taken[query] = regions
        asked *= SPARE
    return [taken[query] for query in range(len(vectors))]


def _cosines(store: RegionStore, keys: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Summed in float64 and rounded, as an exact search does it."""
    image_ids, places = split_key(keys)
    content = {i: store.read(i, ["embedding"]) for i in np.unique(image_ids).tolist()}
    cosines = [
        content[image_id]["embedding"][place].astype(np.float64) @ vector.astype(np.float64)
        for image_id, place in zip(image_ids.tolist(), places.tolist(), strict=True)
    ]
    return np.array(cosines, np.float32)


def _ranked(index: RegionIndex, rows: np.ndarray, cosines: np.ndarray) -> list[dict]:
    """Annotations by cosine and key."""
    regions = []
    for place in np.lexsort((index.keys[rows], -cosines)).tolist():
        row = rows[place]
        x1, y1, x2, y2 = index.box[row].astype(float).tolist()
        regions.append(
            {
                "key": int(index.keys[row]),
                "image_id": int(split_key(index.keys[row])[0]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "score": float(index.objectness[row]),
                "cosine": float(cosines[place]),
            }
        )
    return regions


def _take(ranked: list[dict], settings: config.PseudoLabels) -> list[dict]:
    """The first K regions, without those that come too close to a better one of their image."""

    def near(box: np.ndarray, better: np.ndarray) -> bool:
        full = settings.per_image is not None and len(better) >= settings.per_image
        return full or (settings.nms is not None and overlaps(box, better)[0].max() > settings.nms)

    return list(islice(_apart(ranked, near), settings.k))


def _digest(vector: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()


def as_coco(name: str, regions: list[dict], dataset: Path, ignored: Sequence[dict] = ()) -> dict:
    """The labels of a class, and what is to be ignored, in the layout of this stage's files."""
    images = read_dataset(dataset).images
    marked = [(0, region) for region in regions] + [(1, region) for region in ignored]
    annotations = [
        {"id": i, "category_id": CATEGORY_ID, "iscrowd": iscrowd, "segmentation": []}
        | {key: value for key, value in region.items() if key != "key"}
        for i, (iscrowd, region) in enumerate(marked, start=1)
    ]
    return {
        "images": [images[i] for i in dict.fromkeys(r["image_id"] for _, r in marked)],
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


def read_ignored(paths: Iterable[Path]) -> dict[int, np.ndarray]:
    """Boxes (n, 4) float32 xyxy, by image id, of objects that are negatives of no class.

    Args:
        paths: files of this stage.
    """
    found: dict[int, list[np.ndarray]] = defaultdict(list)
    for path in paths:
        for image_id, annotations in read_dataset(path).annotations.items():
            if ignored := [a for a in annotations if a.get("iscrowd", 0)]:
                found[image_id].append(_boxes(ignored)[0])
    return {image_id: np.concatenate(boxes) for image_id, boxes in found.items()}


def _by_class(content: CocoDataset) -> PseudoLabels:
    grouped: dict[str, dict[int, list[dict]]] = {}
    for image_id, annotations in content.annotations.items():
        for annotation in annotations:
            if annotation.get("iscrowd", 0):
                continue
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
