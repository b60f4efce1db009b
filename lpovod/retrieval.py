"""Retrieval: the training regions of each class, and those too similar to be negatives.

It is exact: it computes the cosine of every stored region with every query, in one pass over the
index for all classes (and a second one for `pseudo_labels.ignored`). What was retrieved for a class
is kept in a store under all that shaped it, so a class that is added is searched alone. Needs no
torch.
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lpovod.artifacts import fingerprint
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError, some
from lpovod.formats.index import RegionIndex
from lpovod.formats.pseudo_labels import STAGE, Retrieved
from lpovod.formats.regions import RegionStore
from lpovod.formats.store import Store, key_of
from lpovod.overlaps import overlaps
from lpovod.progress import log
from lpovod.search import apart, top_regions

SAME = 0.6  # two regions show one object if they share this fraction of either's area, or more
LISTED = 30  # classes with a line of their own in the log


def retrieve_regions(
    vectors: dict[str, np.ndarray],
    index: RegionIndex,
    regions: RegionStore,
    settings: PseudoLabelsSettings,
    store: Path,
    code: str,
    threads: int = 1,
) -> dict[str, Retrieved]:
    """The regions of each class; only those that the store lacks are searched for.

    Args:
        vectors: (D,) query of each class by name.
        index: of the training regions.
        regions: the shards that the index was made from.
        settings: K, the floor, and how different the regions must be.
        store: folder of what was retrieved so far.
        code: digest of the source code.
        threads: that compare the regions of an exact index.

    Raises:
        LpovodError: if no region reaches the floor.
    """
    shape = {
        "code": code,
        "index": fingerprint(index.identity),
        "settings": settings.model_dump(exclude={"file", "centred"}),
    }
    kept = Store(store, STAGE)
    keys = {name: key_of(query=digest_of(v), **shape) for name, v in vectors.items()}
    stored = {name: kept.json(key) for name, key in keys.items()}
    missing = [name for name, content in stored.items() if content is None]
    log.info(f"{len(vectors)} classes: {len(missing)} to search for in {len(index.keys)} regions")
    if missing:
        made = _search(index, regions, np.stack([vectors[n] for n in missing]), settings, threads)
        for name, of_class in zip(missing, made, strict=True):
            stored[name] = asdict(of_class)
            kept.put_json(keys[name], stored[name])
    retrieved = {name: Retrieved(**stored[name]) for name in vectors}
    _report(retrieved, settings)
    return retrieved


def _search(
    index: RegionIndex,
    regions: RegionStore,
    vectors: np.ndarray,
    settings: PseudoLabelsSettings,
    threads: int,
) -> list[Retrieved]:
    best = top_regions(index, regions, vectors, settings, threads=threads)
    if not all(best):
        raise LpovodError(
            f"none of {len(regions)} regions has an objectness of {settings.objectness}. Lower "
            "pseudo_labels.objectness"
        )
    recall: list[float | None] = [None] * len(best)
    if not index.exact:
        exact = top_regions(index, regions, vectors, settings, exact=True, threads=threads)
        recall = [_share(*pair) for pair in zip(best, exact, strict=True)]
    ignored: list[list[dict]] = [[] for _ in best]
    if settings.ignored:
        without_floor = PseudoLabelsSettings(k=settings.ignored, objectness=0)
        similar = top_regions(index, regions, vectors, without_floor, threads=threads)
        ignored = [_further_objects(*pair) for pair in zip(similar, best, strict=True)]
    return [Retrieved(*parts) for parts in zip(best, ignored, recall, strict=True)]


def _share(regions: list[dict], exact: list[dict]) -> float:
    return len({r["key"] for r in regions} & {r["key"] for r in exact}) / len(exact)


def _further_objects(similar: list[dict], labels: list[dict]) -> list[dict]:
    """The objects to ignore: the most similar regions, without further boxes on the same object.

    Parts of a labelled or ignored object, and boxes around it, stay negatives: the probe must learn
    that they are badly placed.
    """
    return list(apart(similar, _same_object, labels))


def _same_object(box: np.ndarray, others: np.ndarray) -> bool:
    return max(shared.max() for shared in overlaps(box, others)) >= SAME


def _report(retrieved: dict[str, Retrieved], settings: PseudoLabelsSettings) -> None:
    few = [name for name, of_class in retrieved.items() if len(of_class.regions) < settings.k]
    if few:
        log.warning(
            f"fewer than {settings.k} regions: {some(few)}; no others have an objectness of "
            f"{settings.objectness} (pseudo_labels.objectness) and differ enough (per_image, nms)"
        )
    for name, of_class in list(retrieved.items())[:LISTED]:
        images, regions = {r["image_id"] for r in of_class.regions}, of_class.regions
        line = f"{name}: {len(regions)} regions of {len(images)} images, cosine "
        line += f"{regions[0]['cosine']:.4f} ... {regions[-1]['cosine']:.4f}"
        if of_class.recall is not None:
            line += f", recall {of_class.recall:.3f} of the exact ones"
        log.info(line)
    if len(retrieved) > LISTED:
        log.info(f"... and {len(retrieved) - LISTED} classes more")


def digest_of(vector: np.ndarray) -> str:
    """Digest of vectors as float32."""
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()
