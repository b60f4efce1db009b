"""Stage `region_index`: FAISS indices over the region embeddings of all shards, in one file.

The ids in the index are region keys (`region_key`), so a hit names its image and region. At the
paper's scale the vectors are 40 GB, so the file is a row of small FAISS indices, each of one block
of regions, made one after another. An exact search streams through their vectors; the others are
searched in place (memory-mapped)::

    <FAISS index> ... <FAISS index> <regions> <json> <length of the json: 8 bytes> <MAGIC: 8 bytes>

The regions are (rows, 5) float32, box and objectness: 20 bytes beside a vector's 1,024 (D = 512, in
half precision) and a key's 8, and the only other thing that a retrieval reads of all regions.
The json holds the identity, number and length of the vectors, and where each index ends. Index and
identity can thus be neither separated nor mixed, and half a file is recognised.
Imported for retrieval, which needs no torch: nothing here imports it.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import faiss
import numpy as np

from lpovod import config
from lpovod.artifacts import Identity, LpovodError, atomic, fingerprint, identity
from lpovod.progress import progress, say
from lpovod.store import RegionStore

STAGE = "region_index"
MAGIC = b"LPOVODI2"
REGION_BYTES = 20  # of box and objectness
INDEX_BITS = 20  # of a region's place in its image; the image id has the other 43
TRAINING_ROWS = 1 << 18  # sample for the factories that need training
PROBED_PART = 8  # one in so many lists of an inverted file is searched
READ_ROWS = 4096  # of an exact search, read at once while the rows before them are compared
COMPARED_ROWS = 512  # widened to float32 and compared at once: they fit a core's cache
SIGN_AND_VALUE = np.int32(-0x70002000)

Found = tuple[np.ndarray, np.ndarray]


def region_key(image_id: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A region's key in the index, int64: image_id * 2**20 + its place in the image.

    Raises:
        LpovodError: naming the first image id or place that does not fit.
    """
    image_id, index = np.broadcast_arrays(np.asarray(image_id), np.asarray(index))
    for what, values, bits in (("image id", image_id, 43), ("region", index, INDEX_BITS)):
        outside = (values < 0) | (values >= 1 << bits)
        if outside.any():
            first = np.atleast_1d(values)[np.atleast_1d(outside)][0]
            raise LpovodError(f"{what} {first} is not in 0 ... 2**{bits} - 1")
    return (image_id.astype(np.int64) << INDEX_BITS) | index.astype(np.int64)


def split_key(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image ids and places of region keys, both int64."""
    key = np.asarray(key, np.int64)
    return key >> INDEX_BITS, key & ((1 << INDEX_BITS) - 1)


def open_shards(paths: Iterable[Path]) -> RegionStore:
    """All shards of the region embeddings as one store, in one order whatever order is given.

    Raises:
        LpovodError: if a shard is missing or damaged, or they are not shards of one division of
            the same proposals.
    """
    paths = sorted(Path(p) for p in paths)
    if not paths:
        raise LpovodError("no shard of region embeddings was given")
    store = RegionStore(paths, "region_embeddings")
    for path, ident in zip(paths, store.identities, strict=True):
        for name, digest in ident["inputs"].items():
            if digest != store.identity["inputs"][name]:
                raise LpovodError(
                    f"{path} and {paths[0]} were made from different {name}. Make them again: "
                    "snakemake --forcerun region_embeddings"
                )
    expected = store.identity["settings"]["shards"]
    if len(paths) != expected:
        raise LpovodError(f"{len(paths)} shards were given, {paths[0]} is one of {expected}")
    return store


def digest_of_shards(store: RegionStore) -> str:
    """One digest of what the shards were made from and which regions they hold.

    The vectors themselves are not read: at the paper's scale they are 40 GB.
    """
    counts = [[image_id, store.count(image_id)] for image_id in store.image_ids]
    return fingerprint({"identity": store.identity, "counts": counts})


def build_region_index(shards: list[Path], settings: config.RegionIndex, output: Path) -> None:
    """Index all region embeddings for search by inner product; the vectors stream through.

    Args:
        shards: all files of stage `region_embeddings`.
        settings: factory string and block size.
        output: the index with its footer.

    Raises:
        LpovodError: if shards are missing or do not belong together, hold no region, or FAISS
            knows no such factory.
    """
    store = open_shards(shards)
    if len(store) == 0:
        raise LpovodError(f"{store.paths[0].parent}: the shards hold no region")
    dimension = next(store.blocks(1, ["embedding"]))["embedding"].shape[1]
    index = _make_index(settings.factory, dimension)
    if not index.is_trained:
        sample = _sample(store, settings.block_rows)
        say(f"training {settings.factory} on {len(sample)} regions")
        index.train(sample)
    ident = identity(STAGE, settings, region_embeddings=digest_of_shards(store))
    header = {"identity": ident, "rows": len(store), "dimension": dimension, "ends": []}
    with (
        atomic(output) as partial,
        open(partial, "wb") as file,
        progress(None, "region index", " regions", len(store)) as bar,
    ):
        for block in store.blocks(settings.block_rows, ["embedding"]):
            index.reset()
            keys = region_key(block.image_id, block.index)
            index.add_with_ids(block["embedding"].astype(np.float32), keys)
            file.write(faiss.serialize_index(index).data)
            header["ends"].append(file.tell())
            bar.update(len(block))
        for block in store.blocks(settings.block_rows, []):
            file.write(np.column_stack([block.box, block.objectness]).astype("<f4").tobytes())
        footer = json.dumps(header, sort_keys=True).encode()
        file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)


def _make_index(factory: str, dimension: int) -> faiss.Index:
    try:
        index = faiss.index_factory(dimension, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, AssertionError) as error:
        raise LpovodError(f"region_index.factory = {factory!r}: {error}") from None
    searchable = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVF)
    if not isinstance(faiss.downcast_index(index.index), searchable):
        raise LpovodError(
            f"region_index.factory = {factory!r}: retrieval searches Flat, SQ... and IVF... "
            "indices alone"
        )
    return index


def _sample(store: RegionStore, rows: int) -> np.ndarray:
    step = -(-len(store) // TRAINING_ROWS)
    seen, parts = 0, []
    for block in store.blocks(rows, ["embedding"]):
        parts.append(block["embedding"][-seen % step :: step].astype(np.float32))
        seen += len(block)
    return np.concatenate(parts)


@dataclass(frozen=True)
class RegionIndex:
    """An open index: of the vectors, only what a search touches is read.

    Attributes:
        path: the file.
        identity: what it was made from.
        dimension: of the vectors.
        keys: (rows,) int64, the region key of each row.
        box: (rows, 4) float32, mapped.
        objectness: (rows,) float32, mapped.
        parts: FAISS's indices, over consecutive rows.
        content: the mapped file, which the parts point into.
    """

    path: Path
    identity: Identity
    dimension: int
    keys: np.ndarray
    box: np.ndarray
    objectness: np.ndarray
    parts: list[faiss.Index]
    content: np.memmap

    @property
    def exact(self) -> bool:
        """Whether a search compares all vectors as they are (Flat, SQfp16)."""
        inner = faiss.downcast_index(self.parts[0].index)
        if isinstance(inner, faiss.IndexScalarQuantizer):
            return inner.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return isinstance(inner, faiss.IndexFlat)

    @property
    def code_size(self) -> int:
        """Bytes of a vector."""
        return faiss.downcast_index(self.parts[0].index).code_size

    def search(self, vectors: np.ndarray, k: int, allowed: np.ndarray) -> list[Found]:
        """The k rows of largest inner product with each vector, among the allowed ones.

        An exact index is read once from end to end, whatever number of vectors there is.

        Args:
            vectors: (q, D) float32.
            k: how many at most.
            allowed: (rows,) bool.

        Returns:
            For each vector inner products (n,) float32, descending, and rows (n,) int64.
            Of an exact index the products are those of float64, rounded, and all rows that equal
            the k-th are there; of the others n <= k, and they are FAISS's.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if self.exact:
            rows = np.flatnonzero(allowed)
            found = best_rows(vectors, self._stream(allowed), k)
            return [(scores, rows[places]) for scores, places in found]
        return [self._search_parts(vector[None], k, allowed) for vector in vectors]

    def _search_parts(self, query: np.ndarray, k: int, allowed: np.ndarray) -> Found:
        scores, rows, start = [np.empty(0, np.float32)], [np.empty(0, np.int64)], 0
        for part in self.parts:
            stop = start + part.ntotal
            if allowed[start:stop].any():
                inner = faiss.downcast_index(part.index)
                parameters = _parameters(inner, allowed[start:stop])
                found = inner.search(query, min(k, part.ntotal), params=parameters)
                real = found[1][0] >= 0
                scores.append(found[0][0][real])
                rows.append(start + found[1][0][real])
            start = stop
        merged = np.concatenate(scores)
        best = np.argsort(-merged, kind="stable")[:k]
        return merged[best], np.concatenate(rows)[best]

    def _stream(self, allowed: np.ndarray) -> Iterator[np.ndarray]:
        """The allowed vectors in order, (n, D) float32, with a thread that reads ahead.

        Each block is overwritten by the next one.
        """
        start = 0
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            pieces = self._pieces()
            coming = pool.submit(_read_codes, file, *next(pieces))
            while coming is not None:
                codes, following = coming.result(), next(pieces, None)
                coming = following and pool.submit(_read_codes, file, *following)
                count = len(codes) // self.code_size
                yield from self._float32(codes, np.flatnonzero(allowed[start : start + count]))
                start += count

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """What is read at once: where codes lie in the file, and how many bytes."""
        for part in self.parts:
            inner = faiss.downcast_index(part.index)
            start = int(inner.codes.data()) - self.content.ctypes.data
            end = start + part.ntotal * self.code_size
            for offset in range(start, end, READ_ROWS * self.code_size):
                yield offset, min(READ_ROWS * self.code_size, end - offset)

    def _float32(self, codes: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
        half = self.code_size == 2 * self.dimension
        vectors = codes.view(np.float16 if half else np.float32).reshape(-1, self.dimension)
        wide = np.empty((COMPARED_ROWS, self.dimension), np.float32)
        for start in range(0, len(rows), COMPARED_ROWS):
            part = vectors[rows[start : start + COMPARED_ROWS]]
            yield widen(part, wide[: len(part)]) if half else part


def widen(half: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Finite float16 as float32, into `out`: exact, and three times as fast as numpy's own.

    Moved by 13 bits, a float16 is the float32 of 2**-112 times its value.
    """
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, SIGN_AND_VALUE, out=bits)  # the sign was carried into the bits between
    return np.multiply(out, np.float32(2.0**112), out=out)


def _read_codes(file: BinaryIO, offset: int, size: int) -> np.ndarray:
    codes, read = np.empty(size, np.uint8), 0
    file.seek(offset)
    while read < size:
        count = file.readinto(memoryview(codes)[read:])
        if not count:
            raise LpovodError(f"{file.name} ends while it is read: was it replaced meanwhile?")
        read += count
    return codes


def best_rows(vectors: np.ndarray, blocks: Iterable[np.ndarray], k: int) -> list[Found]:
    """The rows that may be among the k of largest inner product with each vector.

    A float32 sum over D products of two unit vectors differs from the true one by D * 2**-24 at
    most, whatever its order. What lies within four times that of the k-th best so far is summed
    again in float64 and rounded, so that equal rows have equal sums.

    Args:
        vectors: (q, D) float32, of unit norm, as the rows are (float16's rounding aside).
        blocks: the rows in order, (n, D) float32.
        k: how many.

    Returns:
        For each vector inner products, descending, and rows, int64, ascending among equals: k of
        them, and all that equal the k-th.
    """
    margin = np.float32(4 * vectors.shape[1] * 2.0**-24)
    exact = vectors.astype(np.float64)
    scores = [np.empty(0, np.float32) for _ in vectors]
    rows = [np.empty(0, np.int64) for _ in vectors]
    floor, start = np.full(len(vectors), -np.inf, np.float32), 0
    for block in blocks:
        products = block @ vectors.T
        for query in np.flatnonzero(products.max(axis=0, initial=-np.inf) > floor):
            near = np.flatnonzero(products[:, query] > floor[query])
            summed = (block[near].astype(np.float64) @ exact[query]).astype(np.float32)
            scores[query] = np.concatenate([scores[query], summed])
            rows[query] = np.concatenate([rows[query], start + near])
            if len(scores[query]) >= 2 * k:
                kth = np.partition(scores[query], -k)[-k]
                floor[query] = kth - margin
                kept = scores[query] >= kth
                scores[query], rows[query] = scores[query][kept], rows[query][kept]
        start += len(block)
    return [_descending(*found, k) for found in zip(scores, rows, strict=True)]


def _descending(scores: np.ndarray, rows: np.ndarray, k: int) -> Found:
    order = np.argsort(-scores, kind="stable")
    if len(order) > k:
        order = order[scores[order] >= scores[order[k - 1]]]
    return scores[order], rows[order]


def _parameters(inner: faiss.Index, allowed: np.ndarray) -> faiss.SearchParameters:
    selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=-(-inner.nlist // PROBED_PART))
    return faiss.SearchParameters(sel=selector)


def open_index(path: Path) -> RegionIndex:
    """Open a file of `build_region_index`.

    Raises:
        LpovodError: if it is missing, damaged, or another program's.
    """
    path = Path(path)
    header = _read_footer(path)
    content = np.memmap(path, np.uint8, "r")
    parts = [
        _open_part(path, content[start:end])
        for start, end in zip([0, *header["ends"]], header["ends"], strict=False)
    ]
    keys = np.concatenate([faiss.vector_to_array(part.id_map) for part in parts])
    if len(keys) != header["rows"]:
        raise LpovodError(
            f"{path} holds {len(keys)} vectors, its footer states {header['rows']}. Make it "
            f"again: snakemake --forcerun {STAGE}"
        )
    start = header["ends"][-1]
    regions = content[start : start + REGION_BYTES * len(keys)].view("<f4").reshape(-1, 5)
    return RegionIndex(
        path,
        header["identity"],
        header["dimension"],
        keys,
        regions[:, :4],
        regions[:, 4],
        parts,
        content,
    )


def _open_part(path: Path, content: np.ndarray) -> faiss.Index:
    try:
        return faiss.read_index(faiss.ZeroCopyIOReader(faiss.swig_ptr(content), content.nbytes))
    except RuntimeError as error:
        raise LpovodError(f"{path} cannot be read by FAISS: {error}") from None


def _read_footer(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 16, 0))
            length, magic = int.from_bytes(file.read(8), "little"), file.read(8)
            start = size - 16 - length
            if magic == MAGIC and start >= 0:
                file.seek(start)
                header = json.loads(file.read(length))
                if header["ends"][-1] + REGION_BYTES * header["rows"] == start:
                    return header
        raise LpovodError(
            f"{path} is not a whole index of this project. Make it again: "
            f"snakemake --forcerun {STAGE}"
        )
    except FileNotFoundError:
        raise LpovodError(f"{path}: no such file") from None
