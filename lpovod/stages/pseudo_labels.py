"""Stage `pseudo_labels`: the training regions most similar to each novel name. Needs no torch."""

from pathlib import Path

import numpy as np

from lpovod.artifacts import fingerprint, identity, write_json
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError, some
from lpovod.formats.class_embeddings import ClassEmbeddings, read_text_embeddings
from lpovod.formats.index import open_index
from lpovod.formats.pseudo_labels import STAGE, as_coco
from lpovod.formats.regions import open_shards
from lpovod.retrieval import digest_of, retrieve_regions
from lpovod.search import check_belong, queries


def retrieve(
    names: list[str],
    text_embeddings: Path,
    base_text_embeddings: Path,
    index: Path,
    shards: list[Path],
    dataset: Path,
    settings: PseudoLabelsSettings,
    output: Path,
    store: Path,
    code: str,
    threads: int = 1,
) -> None:
    """Write the top K regions by cosine with the query of each class, above the objectness floor.

    With an exact index (Flat, SQfp16) the result is the exact top K of all regions; equal cosines
    are ordered by image id and position in the image. With any other index, ``info`` has
    ``recall``: by class, the fraction of the exact top K that the index returns. One image may
    contribute several regions, unless the settings limit them.

    Args:
        names: the novel classes.
        text_embeddings: file of the novel classes.
        base_text_embeddings: file of the base classes; a centred query subtracts their mean.
        index: file of stage `region_index`.
        shards: all files of stage `region_embeddings`.
        dataset: json with the training images.
        settings: K, the floor, the query, and how different the regions must be.
        output: COCO json, a category for each class in the order of the names.
        store: folder of what was retrieved so far.
        code: digest of the source code; what different code retrieved is retrieved again.
        threads: that compare the regions of an exact index.

    Raises:
        LpovodError: if a class has no embedding, the files do not belong together, or no region
            reaches the floor.
    """
    classes, base = (read_text_embeddings(p) for p in (text_embeddings, base_text_embeddings))
    vectors = _vectors(names, classes, base, settings)
    regions, region_index = open_shards(shards, "region_embeddings"), open_index(index)
    check_belong([classes, base], regions, region_index, dataset)
    retrieved = retrieve_regions(vectors, region_index, regions, settings, store, code, threads)
    ident = identity(
        STAGE,
        settings,
        dataset=dataset,
        region_index=fingerprint(region_index.identity),
        queries=digest_of(np.stack(list(vectors.values()))),
    )
    info: dict = {"identity": ident}
    if not region_index.exact:
        info["recall"] = {name: of_class.recall for name, of_class in retrieved.items()}
    write_json(output, as_coco(retrieved, dataset) | {"info": info})


def _vectors(
    names: list[str],
    classes: ClassEmbeddings,
    base: ClassEmbeddings,
    settings: PseudoLabelsSettings,
) -> dict[str, np.ndarray]:
    if absent := [name for name in names if name not in classes.names]:
        raise LpovodError(
            f"class {absent[0]!r} has no text embedding; available: {some(classes.names)}"
        )
    rows = {name: classes.vectors[classes.names.index(name)] for name in names}
    return {name: queries(row[None], base.vectors, settings)[0] for name, row in rows.items()}
