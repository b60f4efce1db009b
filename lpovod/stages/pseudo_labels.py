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

SAME = 0.6  # two regions show one object if they share this fraction of either's area, or more


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
    are ordered by image id and position in the image. With any other index, ``info`` has
    ``recall``: the fraction of the exact top K that the index returns. One image may contribute
    several regions, unless the settings limit them.

    Args:
        name: the class.
        text_embeddings: files, one of which holds the class.
        base_text_embeddings: file of the base classes; a centred query subtracts their mean.
        index: file of stage `region_index`.
        shards: all files of stage `region_embeddings`.
        dataset: json of the training images.
        settings: K, the floor, the query, and how different the regions must be.
        output: COCO json.

    Raises:
        LpovodError: if the class has no embedding, the files do not belong together, or no region
            reaches the floor.
    """
    classes = read_text_embeddings(text_embeddings)
    if name not in classes.names:
        raise LpovodError(f"class {name!r} has no text embedding; available: {classes.names}")
    base = read_text_embeddings([base_text_embeddings])
    vector = classes.vectors[classes.names.index(name)]
    store, region_index = open_shards(shards), open_index(index)
    check_belong([classes, base], store, region_index, dataset)
    (vector,) = queries(vector[None], base.vectors, settings)
    (regions,) = top_regions(region_index, store, vector[None], settings)
    if not regions:
        raise LpovodError(
            f"class {name!r}: none of {len(store)} regions has an objectness of "
            f"{settings.objectness}. Lower pseudo_labels.objectness"
        )
    if len(regions) < settings.k:
        log.warning(
            f"class {name!r}: {len(regions)} regions instead of {settings.k}; no others have an "
            f"objectness of {settings.objectness} (pseudo_labels.objectness) and differ enough "
            "(per_image, nms)"
        )
    ident = identity(
        STAGE,
        settings,
        dataset=dataset,
        region_index=fingerprint(region_index.identity),
        query=_digest(vector),
    )
    info: dict = {"identity": ident}
    if not region_index.exact:
        (exact,) = top_regions(region_index, store, vector[None], settings, exact=True)
        hits = {r["key"] for r in regions} & {r["key"] for r in exact}
        info["recall"] = len(hits) / len(exact)
        log.info(f"{name}: recall {info['recall']:.3f} of the exact top {len(exact)}")
    ignored = []
    if settings.ignored:
        ignored = _further_objects(region_index, store, vector, settings, regions)
    write_json(output, as_coco(name, regions, dataset, ignored) | {"info": info})
    images, cosines = {r["image_id"] for r in regions}, [r["cosine"] for r in regions]
    log.info(
        f"{name}: {len(regions)} regions of {len(images)} images, "
        f"cosine {cosines[0]:.4f} ... {cosines[-1]:.4f}"
    )


def _further_objects(
    index: RegionIndex,
    store: RegionStore,
    vector: np.ndarray,
    settings: PseudoLabelsSettings,
    regions: list[dict],
) -> list[dict]:
    """The objects to ignore: the most similar regions, without further boxes on the same object.

    Parts of a labelled or ignored object, and boxes around it, stay negatives: the probe must learn
    that they are badly placed.
    """
    without_floor = PseudoLabelsSettings(k=settings.ignored, objectness=0)
    (similar,) = top_regions(index, store, vector[None], without_floor)
    return list(apart(similar, _same_object, regions))


def _same_object(box: np.ndarray, others: np.ndarray) -> bool:
    return max(shared.max() for shared in overlaps(box, others)) >= SAME


def _digest(vector: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).hexdigest()
