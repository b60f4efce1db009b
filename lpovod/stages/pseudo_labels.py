"""Stage `pseudo_labels`: the regions most similar to a novel class's name become its labels.

One file per class (`lpovod.formats.pseudo_labels`). Needs no torch.
"""

import hashlib
from pathlib import Path

import numpy as np

from lpovod.artifacts import fingerprint, identity, write_json
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import read_text_embeddings
from lpovod.formats.index import RegionIndex, open_index
from lpovod.formats.pseudo_labels import STAGE, as_coco
from lpovod.formats.regions import RegionStore, open_shards
from lpovod.overlaps import overlaps
from lpovod.progress import log
from lpovod.search import apart, check_belong, queries, top_regions

SAME = 0.6  # shared part, of either of two regions, from which they show the same object


def retrieve(
    name: str,
    text_embeddings: list[Path],
    base_text_embeddings: Path,
    index: Path,
    shards: list[Path],
    dataset: Path,
    settings: PseudoLabelsSettings,
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
        log.warning(
            f"class {name!r}: {len(regions)} regions instead of {settings.k}; no more "
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
        log.info(f"{name}: recall {info['recall']:.3f} of the exact top {len(exact)}")
    ignored = _others(searched, store, vector, settings, regions) if settings.ignored else []
    write_json(output, as_coco(name, regions, dataset, ignored) | {"info": info})
    images, cosines = {r["image_id"] for r in regions}, [r["cosine"] for r in regions]
    log.info(
        f"{name}: {len(regions)} regions of {len(images)} images, "
        f"cosine {cosines[0]:.4f} ... {cosines[-1]:.4f}"
    )


def _others(
    index: RegionIndex,
    store: RegionStore,
    vector: np.ndarray,
    settings: PseudoLabelsSettings,
    regions: list[dict],
) -> list[dict]:
    """The objects to be ignored: the most similar regions, without other boxes of the same object.

    A part of a label or of such an object, or a box around it, stays a negative: that it is badly
    placed is what the probe has to learn.
    """
    of_any_objectness = PseudoLabelsSettings(k=settings.ignored, objectness=0)
    (similar,) = top_regions(index, store, vector[None], of_any_objectness)
    return list(apart(similar, _same_object, regions))


def _same_object(box: np.ndarray, others: np.ndarray) -> bool:
    return max(shared.max() for shared in overlaps(box, others)) >= SAME


def _digest(vector: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()
