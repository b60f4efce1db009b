"""The region index: FAISS indices over the region embeddings of all shards, in one file.

The ids in the index are region keys (`region_key`), so a hit names its image and region. At the
paper's scale the vectors take 40 GB, so the file is a sequence of small FAISS indices, one per
block of regions, made one after another. An exact search streams through their vectors; other
indices are memory-mapped and searched in place::

    <FAISS index> ... <FAISS index> <regions> <json> <length of the json: 8 bytes> <MAGIC: 8 bytes>

The regions are (rows, 5) float32, box and objectness: 20 bytes beside a vector's 1,024 (D = 512, in
half precision) and a key's 8. Retrieval reads nothing else about all regions. The json holds the
identity, the number and length of the vectors, and the end of each index. Index and identity can
thus be neither separated nor mixed up, and a truncated file is recognised. Needs no torch.
"""

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import faiss
import numpy as np

from lpovod.artifacts import Identity, atomic
from lpovod.exceptions import LpovodError, existing

STAGE = "region_index"
MAGIC = b"LPOVODI2"
REGION_BYTES = 20  # box and objectness
READ_ROWS = 4096  # read at once by an exact search, while the previous rows are compared
COMPARED_ROWS = 512  # widened to float32 and compared at once: they fit a core's cache
SIGN_AND_VALUE = np.int32(-0x70002000)


@dataclass(frozen=True)
class RegionIndex:
    """An open index; only the vectors that a search visits are read.

    Attributes:
        path: the file.
        identity: records the inputs of the index.
        dimension: of the vectors.
        keys: (rows,) int64, the region key of each row.
        box: (rows, 4) float32, mapped.
        objectness: (rows,) float32, mapped.
        parts: FAISS's indices, over consecutive rows.
        content: the mapped file, into which the parts point.
    """

    path: Path
    identity: Identity
    dimension: int
    keys: np.ndarray
    box: np.ndarray
    objectness: np.ndarray
    parts: list[faiss.Index]
    content: np.memmap

    # Cached, since FAISS takes a third of a millisecond for a downcast.
    @cached_property
    def exact(self) -> bool:
        """Whether a search compares all vectors as they are stored (Flat, SQfp16)."""
        inner = faiss.downcast_index(self.parts[0].index)
        if isinstance(inner, faiss.IndexScalarQuantizer):
            return inner.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        return isinstance(inner, faiss.IndexFlat)

    @cached_property
    def code_size(self) -> int:
        """Bytes of a vector."""
        return faiss.downcast_index(self.parts[0].index).code_size

    def stream(self, allowed: np.ndarray) -> Iterator["Piece"]:
        """Pieces of the allowed vectors, in order; a thread reads ahead.

        Args:
            allowed: (rows,) bool.
        """
        start = 0
        with open(self.path, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            pieces = self._pieces()
            pending: Future[np.ndarray] | None = pool.submit(_read_codes, file, *next(pieces))
            while pending is not None:
                codes, piece = pending.result(), next(pieces, None)
                pending = pool.submit(_read_codes, file, *piece) if piece else None
                count = len(codes) // self.code_size
                half = self.code_size == 2 * self.dimension
                stored = codes.view(np.float16 if half else np.float32)
                rows = np.flatnonzero(allowed[start : start + count])
                yield Piece(stored.reshape(count, self.dimension), rows)
                start += count

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Offset and size in bytes of each piece of codes that is read at once."""
        for part in self.parts:
            inner = faiss.downcast_index(part.index)
            start = int(inner.codes.data()) - self.content.ctypes.data
            end = start + part.ntotal * self.code_size
            for offset in range(start, end, READ_ROWS * self.code_size):
                yield offset, min(READ_ROWS * self.code_size, end - offset)


@dataclass(frozen=True)
class Piece:
    """Vectors as they are stored, and the rows that count.

    Attributes:
        vectors: (n, D) float16 or float32.
        rows: (m,) int64, ascending.
    """

    vectors: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[np.ndarray]:
        """The rows in blocks that fit a core's cache, float32; each overwrites the one before."""
        wide = np.empty((COMPARED_ROWS, self.vectors.shape[1]), np.float32)
        for start in range(0, len(self.rows), COMPARED_ROWS):
            part = self.vectors[self.rows[start : start + COMPARED_ROWS]]
            yield widen(part, wide[: len(part)]) if part.dtype == np.float16 else part


def _without_place(error: Exception) -> str:
    """FAISS's message without the place in its source code."""
    return re.sub(r"^Error in .* at \S+:\d+: (?:Error: )?", "", str(error))


def make_index(factory: str, dimension: int) -> faiss.Index:
    """An empty index of inner products, whose ids are given with the vectors.

    Args:
        factory: FAISS's description of it.
        dimension: of the vectors.

    Raises:
        LpovodError: if FAISS does not know the factory, or cannot make it for this dimension, or a
            search could not read the index.
    """
    try:
        index = faiss.index_factory(dimension, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, AssertionError) as error:
        reason = _without_place(error)
        raise LpovodError(
            f"region_index.factory = {factory!r}, for vectors of {dimension}: {reason}"
        ) from None
    searchable = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVF)
    if not isinstance(faiss.downcast_index(index.index), searchable):
        raise LpovodError(
            f"region_index.factory = {factory!r}: retrieval can search only Flat, SQ... and "
            "IVF... indices"
        )
    return index


def train_index(index: faiss.Index, sample: np.ndarray, factory: str) -> None:
    """Train an index on a sample of the vectors, (n, D) float32.

    Raises:
        LpovodError: if the sample is too small for the factory.
    """
    try:
        index.train(sample)
    except RuntimeError as error:
        raise LpovodError(
            f"region_index.factory = {factory!r} cannot be trained on {len(sample)} regions: "
            f"{_without_place(error)}. Choose fewer lists, or SQfp16, which needs no training"
        ) from None


@contextmanager
def write_index(path: Path, header: dict[str, Any]) -> Iterator["IndexWriter"]:
    """Write a file of FAISS indices; it gets its name when the block ends without an error.

    Args:
        path: the file.
        header: ``identity``, and ``rows`` and ``dimension`` of the vectors.
    """
    with atomic(path) as partial, open(partial, "wb") as file:
        writer = IndexWriter(file)
        yield writer
        footer = json.dumps(header | {"ends": writer.ends}, sort_keys=True).encode()
        file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)


class IndexWriter:
    """Appends FAISS indices of consecutive blocks, then their regions; made by `write_index`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.ends: list[int] = []

    def add_index(self, index: faiss.Index) -> None:
        """Append the index of the next block."""
        self._file.write(faiss.serialize_index(index).data)
        self.ends.append(self._file.tell())

    def add_regions(self, box: np.ndarray, objectness: np.ndarray) -> None:
        """Append boxes (n, 4) and objectness (n,), after the last index."""
        self._file.write(np.column_stack([box, objectness]).astype("<f4").tobytes())


def widen(half: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Convert finite float16 to float32 in `out`: exact, and three times as fast as numpy.

    Shifted by 13 bits, a float16 is the float32 of 2**-112 times its value.
    """
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))
    np.left_shift(bits, 13, out=bits)
    np.bitwise_and(bits, SIGN_AND_VALUE, out=bits)  # clears the copies of the sign bit
    return np.multiply(out, np.float32(2.0**112), out=out)


def _read_codes(file: FileIO, offset: int, size: int) -> np.ndarray:
    codes, read = np.empty(size, np.uint8), 0
    file.seek(offset)
    while read < size:
        count = file.readinto(codes.data[read:])
        if not count:
            raise LpovodError(f"{file.name} ended during the search: was it replaced meanwhile?")
        read += count
    return codes


def open_index(path: Path) -> RegionIndex:
    """Open a file of `build_region_index`.

    Raises:
        LpovodError: if it is missing, damaged, or not an index of this project.
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
    with open(existing(path), "rb") as file:
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
        f"{path} is not a whole index of this project: it is truncated, or another program wrote "
        f"it. Make it again: snakemake --forcerun {STAGE}"
    )
