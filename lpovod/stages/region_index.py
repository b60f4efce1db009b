"""Stage `region_index`: one file of FAISS indices over the region embeddings of all shards."""

from pathlib import Path

import numpy as np

from lpovod.artifacts import identity
from lpovod.config import RegionIndexSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.index import STAGE, make_index, train_index, write_index
from lpovod.formats.regions import RegionStore, digest_of_shards, open_shards, region_key
from lpovod.progress import log, progress

TRAINING_ROWS = 1 << 18  # sample size for factories that need training


def build_region_index(shards: list[Path], settings: RegionIndexSettings, output: Path) -> None:
    """Index all region embeddings for search by inner product, one block in memory at a time.

    Args:
        shards: all files of stage `region_embeddings`.
        settings: factory string and block size.
        output: the index file.

    Raises:
        LpovodError: if shards are missing, do not belong together or hold no region, or FAISS does
            not know the factory or cannot train it.
    """
    store = open_shards(shards, "region_embeddings")
    if len(store) == 0:
        raise LpovodError(f"{store.paths[0].parent}: the shards hold no regions")
    dimension = next(store.blocks(1, ["embedding"]))["embedding"].shape[1]
    index = make_index(settings.factory, dimension)
    if not index.is_trained:
        sample = _sample(store, settings.block_rows)
        log.info(f"training {settings.factory} on {len(sample)} regions")
        train_index(index, sample, settings.factory)
    ident = identity(STAGE, settings, region_embeddings=digest_of_shards(store))
    header = {"identity": ident, "rows": len(store), "dimension": dimension}
    with (
        write_index(output, header) as writer,
        progress(None, "region index", " regions", len(store)) as bar,
    ):
        for block in store.blocks(settings.block_rows, ["embedding"]):
            index.reset()
            keys = region_key(block.image_id, block.index)
            index.add_with_ids(block["embedding"].astype(np.float32), keys)
            writer.add_index(index)
            bar.update(len(block))
        for block in store.blocks(settings.block_rows, []):
            writer.add_regions(block.box, block.objectness)


def _sample(store: RegionStore, rows: int) -> np.ndarray:
    step = -(-len(store) // TRAINING_ROWS)
    rows_before, samples = 0, []
    for block in store.blocks(rows, ["embedding"]):
        samples.append(block["embedding"][-rows_before % step :: step].astype(np.float32))
        rows_before += len(block)
    return np.concatenate(samples)
