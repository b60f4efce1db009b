"""The region store: boxes of many images with objectness and vectors, in HDF5, keyed by image id.

Layout of a file, where `rows` counts all regions of all its images, one image after another::

    image_id    (images,)   int64      start  (images,)  int64     count  (images,)  int64
    box         (rows, 4)   float32    xyxy, absolute pixels of the original image, half-open
    objectness  (rows,)     float32
    <column>    (rows, d)   float16 or float32, any number of columns
    attrs       identity: json (see `lpovod.artifacts`), format: int, shard: number and count

Proposals are a store without columns; region embeddings and region features have columns. A
region's key is its image id and box; its vectors lie beside the key and are only read with it.

A store may be divided into shards, files of different images (`Shard`). Proposals decide the
division; what is made of a shard of proposals is the same shard of its own store. An identity does
not contain the shard, so that what is made of all shards does not depend on their number.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from lpovod.artifacts import Identity, atomic, fingerprint, need_room, sha256
from lpovod.exceptions import LpovodError, existing

FORMAT = 2
CHUNK_ROWS = 128
DIGESTED_ROWS = 1 << 16
MARGIN = 1 << 25  # bytes that must stay free: HDF5 crashes on a full disk or silently loses rows


class Shard(NamedTuple):
    """A part of a split's images, which one job works on.

    Attributes:
        number: of the shard, from 0.
        total: number of shards that the split has.
    """

    number: int = 0
    total: int = 1

    def of(self, image_ids: Iterable[int]) -> list[int]:
        """The shard's images, ascending, and ascending from shard to shard; in equal numbers.

        Args:
            image_ids: of the whole split, in any order.

        Raises:
            LpovodError: if there is no such shard.
        """
        if not 0 <= self.number < self.total:
            raise LpovodError(f"shard {self.number} is not one of 0 ... {self.total - 1}")
        ordered = sorted(image_ids)
        start, stop = (len(ordered) * n // self.total for n in (self.number, self.number + 1))
        return ordered[start:stop]


WHOLE = Shard()


@dataclass(frozen=True)
class Regions:
    """Regions of one image, or a block of regions of several.

    Attributes:
        image_id: (n,) int64.
        index: (n,) int64, position of the region among the regions of its image.
        box: (n, 4) float32, xyxy.
        objectness: (n,) float32.
        columns: vectors by name, (n, d).
    """

    image_id: np.ndarray
    index: np.ndarray
    box: np.ndarray
    objectness: np.ndarray
    columns: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.box)

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]


class RegionWriter:
    """Appends regions, one image after another; made by `write_regions`."""

    def __init__(self, file: h5py.File):
        self._file = file
        # Kept open: a dataset that is closed after every image does not report a failed write.
        self._data: dict[str, h5py.Dataset] = dict(file.items())
        self._seen: set[int] = set()

    def add(
        self, image_id: int, box: np.ndarray, objectness: np.ndarray, **columns: np.ndarray
    ) -> None:
        """Append all regions of one image; there may be none.

        Args:
            image_id: of the image.
            box: (n, 4) xyxy.
            objectness: (n,).
            **columns: vectors by name, (n, d).

        Raises:
            LpovodError: if the image was added before, lengths or columns differ, a value is not
                finite, or the disk is full.
        """
        arrays = {"box": np.asarray(box).reshape(-1, 4), "objectness": objectness, **columns}
        for name, array in arrays.items():
            if len(array) != len(arrays["box"]):
                raise LpovodError(
                    f"image {image_id}: {len(array)} rows of {name} for {len(arrays['box'])} boxes"
                )
            if not np.isfinite(array).all():
                raise LpovodError(f"image {image_id}: {name} holds NaN or infinite values")
        start = self._data["box"].shape[0]
        self._check_columns(image_id, columns, len(arrays["box"]), start)
        count = len(arrays["box"])
        need_room(Path(self._file.filename), sum(a.nbytes for a in arrays.values()) + MARGIN)
        self._list(image_id, start, count)
        for name, array in arrays.items():
            dataset = self._data[name] if name in self._data else self._column(name, array)
            dataset.resize(start + count, axis=0)
            dataset[start:] = array

    def _list(self, image_id: int, start: int, count: int) -> None:
        if image_id in self._seen:
            raise LpovodError(f"image {image_id} is written to {self._file.filename} twice")
        self._seen.add(image_id)
        for name, value in (("image_id", image_id), ("start", start), ("count", count)):
            self._data[name].resize(len(self._seen), axis=0)
            self._data[name][-1] = value

    def _check_columns(self, image_id: int, columns: dict, rows: int, start: int) -> None:
        """Refuse other columns than before: a shorter column would shift the rows."""
        expected = {n: d.shape[1:] for n, d in self._data.items() if n not in _FIXED}
        shapes = {name: array.shape[1:] for name, array in columns.items()}
        if shapes != expected and (start > 0 or expected) and (rows > 0 or shapes):
            raise LpovodError(
                f"image {image_id} has columns {shapes}, the images before it have {expected}"
            )

    def _column(self, name: str, like: np.ndarray) -> h5py.Dataset:
        shape = like.shape[1:]
        # Earlier images have no regions, so no rows need filling.
        self._data[name] = self._file.create_dataset(
            name, (0, *shape), like.dtype, maxshape=(None, *shape), chunks=(CHUNK_ROWS, *shape)
        )
        return self._data[name]


@contextmanager
def write_regions(path: Path, ident: Identity, shard: Shard = WHOLE) -> Iterator[RegionWriter]:
    """Write a shard of a store, or all of it.

    The file appears under its name when the block ends without an error.
    """
    with atomic(path) as partial, h5py.File(partial, "w") as file:
        file.attrs["identity"] = json.dumps(ident, sort_keys=True)
        file.attrs["format"] = FORMAT
        file.attrs["shard"] = shard
        for name, shape, dtype in (
            ("box", (4,), "f4"),
            ("objectness", (), "f4"),
            ("image_id", (), "i8"),
            ("start", (), "i8"),
            ("count", (), "i8"),
        ):
            chunk = (CHUNK_ROWS * (8 if shape == () else 1), *shape)
            file.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=chunk)
        writer = RegionWriter(file)
        yield writer
        file.flush()


class RegionStore:
    """Reads a store, or the shards of one, by image or in blocks.

    The headers are read immediately; each process opens the files on first use, so a store may be
    passed to the workers of a data loader.

    Args:
        paths: one file, or several with different images.
        stage: the stage that must have written them.

    Raises:
        LpovodError: if a file is missing, damaged, or has another stage or format, or if two files
            hold the same image or were made with different settings.
    """

    def __init__(self, paths: Path | Iterable[Path], stage: str):
        self.paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]
        self._files: dict[tuple[int, int], dict[str, h5py.Dataset]] = {}
        self._where: dict[int, tuple[int, int, int]] = {}
        self.identities: list[Identity] = []
        self.shards: list[Shard] = []
        for number, path in enumerate(self.paths):
            self._read_header(number, path, stage)

    def _read_header(self, number: int, path: Path, stage: str) -> None:
        with _open(path) as file:
            self.shards.append(_shard(path, file))
            ident = json.loads(file.attrs["identity"])
            if ident["stage"] != stage:
                raise LpovodError(f"{path} was written by stage {ident['stage']}, not {stage}")
            self.identities.append(ident)
            if ident != {**self.identities[0], "inputs": ident["inputs"]}:
                raise LpovodError(f"{path} and {self.paths[0]} were made with different settings")
            columns = (file[name][:].tolist() for name in ("image_id", "start", "count"))
            for image_id, start, count in zip(*columns, strict=True):
                if image_id in self._where:
                    other = self.paths[self._where[image_id][0]]
                    raise LpovodError(f"image {image_id} is both in {other} and in {path}")
                self._where[image_id] = (number, start, count)

    @property
    def identity(self) -> Identity:
        """The identity of the first file; those of other shards are equivalent."""
        return self.identities[0]

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images in the order of writing, including those without regions."""
        return list(self._where)

    def __len__(self) -> int:
        """Number of regions."""
        return sum(count for _, _, count in self._where.values())

    def __contains__(self, image_id: int) -> bool:
        return image_id in self._where

    def count(self, image_id: int) -> int:
        """Number of regions of one image."""
        return self._find(image_id)[2]

    def read(self, image_id: int, columns: Iterable[str] | None = None) -> Regions:
        """All regions of one image, with all vectors or only the named ones.

        Raises:
            LpovodError: if the image is not in the store.
        """
        number, start, count = self._find(image_id)
        ids = np.full(count, image_id, np.int64)
        return self._rows(number, start, start + count, ids, np.arange(count), columns)

    def blocks(self, rows: int, columns: Iterable[str] | None = None) -> Iterator[Regions]:
        """All regions in order, `rows` at once, wherever files end; the last may be smaller."""
        parts: list[Regions] = []
        for number in range(len(self.paths)):
            images = [(i, count) for i, (n, _, count) in self._where.items() if n == number]
            ids = np.repeat([i for i, _ in images], [n for _, n in images]).astype(np.int64)
            index = np.concatenate([np.arange(n) for _, n in images] or [np.arange(0)])
            stop = 0
            while stop < len(ids):
                start, stop = stop, min(stop + rows - sum(map(len, parts)), len(ids))
                part = slice(start, stop)
                parts.append(self._rows(number, start, stop, ids[part], index[part], columns))
                if sum(map(len, parts)) == rows:
                    yield _join(parts)
                    parts = []
        if parts:
            yield _join(parts)

    def _rows(
        self,
        number: int,
        start: int,
        stop: int,
        ids: np.ndarray,
        index: np.ndarray,
        columns: Iterable[str] | None,
    ) -> Regions:
        file = self._file(number)
        names = [n for n in file if n not in _FIXED] if columns is None else list(columns)
        missing = [n for n in names if n not in file]
        if missing and len(file["box"]) > 0:  # a store without regions has no columns
            raise LpovodError(f"{self.paths[number]} has no column {', '.join(missing)}")
        vectors = {n: file[n][start:stop] for n in names if n in file}
        return Regions(ids, index, file["box"][start:stop], file["objectness"][start:stop], vectors)

    def _find(self, image_id: int) -> tuple[int, int, int]:
        try:
            return self._where[image_id]
        except KeyError:
            raise LpovodError(
                f"image {image_id} is not in {', '.join(map(str, self.paths))} "
                f"({len(self._where)} images)"
            ) from None

    def _file(self, number: int) -> dict[str, h5py.Dataset]:
        key = os.getpid(), number  # a forked worker must not use the files of its parent
        if key not in self._files:
            self._files[key] = dict(_open(self.paths[number]))  # a lookup costs more than a read
        return self._files[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def _join(parts: list[Regions]) -> Regions:
    if len(parts) == 1:
        return parts[0]
    return Regions(
        image_id=np.concatenate([part.image_id for part in parts]),
        index=np.concatenate([part.index for part in parts]),
        box=np.concatenate([part.box for part in parts]),
        objectness=np.concatenate([part.objectness for part in parts]),
        columns={n: np.concatenate([part[n] for part in parts]) for n in parts[0].columns},
    )


_FIXED = ("box", "objectness", "image_id", "start", "count")


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(existing(path), "r")
    except OSError as error:
        raise LpovodError(f"{path} is not a whole HDF5 file ({error}). Delete it.") from None


def _shard(path: Path, file: h5py.File) -> Shard:
    if "identity" not in file.attrs or file.attrs.get("format") != FORMAT:
        raise LpovodError(
            f"{path} is not a region store of format {FORMAT}. Make it again: "
            f"snakemake --forcerun {path}"
        )
    return Shard(*file.attrs["shard"].tolist())


INDEX_BITS = 20  # for a region's position in its image; the image id has the other 43


def region_key(image_id: np.ndarray, index: np.ndarray) -> np.ndarray:
    """A region's key in the index, int64: image_id * 2**20 + its position in the image.

    Raises:
        LpovodError: naming the first image id or position that does not fit.
    """
    image_id, index = np.broadcast_arrays(np.asarray(image_id), np.asarray(index))
    for name, values, bits in (("image id", image_id, 43), ("region", index, INDEX_BITS)):
        outside = (values < 0) | (values >= 1 << bits)
        if outside.any():
            first = np.atleast_1d(values)[np.atleast_1d(outside)][0]
            raise LpovodError(f"{name} {first} is not in 0 ... 2**{bits} - 1")
    return (image_id.astype(np.int64) << INDEX_BITS) | index.astype(np.int64)


def split_key(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image ids and positions in the image of region keys, both int64."""
    key = np.asarray(key, np.int64)
    return key >> INDEX_BITS, key & ((1 << INDEX_BITS) - 1)


def open_shards(paths: Iterable[Path], stage: str) -> RegionStore:
    """All shards of a split as one store, in the order of the shards.

    Args:
        paths: ``0.h5``, ``1.h5`` and so on, in any order.
        stage: the stage that must have written them.

    Raises:
        LpovodError: if a shard is missing or damaged, or if the shards do not all belong to one
            division and have the same inputs.
    """
    paths = sorted(map(Path, paths), key=lambda path: (len(path.name), path))
    if not paths:
        raise LpovodError(f"no shard of {stage.replace('_', ' ')} was given")
    store = RegionStore(paths, stage)
    again = "Make them again: snakemake --forcerun"
    for path, ident in zip(paths, store.identities, strict=True):
        for name, digest in ident["inputs"].items():
            if digest != store.identity["inputs"][name]:
                raise LpovodError(
                    f"{path} and {paths[0]} were made from different {name}. "
                    f"{again} {paths[0]} {path}"
                )
    for path, shard, expected in zip(paths, store.shards, range(len(paths)), strict=True):
        if shard.total != len(paths):
            raise LpovodError(f"{len(paths)} shards were given, but {path} is one of {shard.total}")
        if shard.number != expected:
            raise LpovodError(
                f"{path} is shard {shard.number}, not shard {expected}. {again} {path}"
            )
    return store


def shards_in(folder: Path) -> list[Path]:
    """The shards of a split in a run's folder, without any that a finer division left behind."""
    first = folder / "0.h5"
    with _open(first) as file:
        return [folder / f"{number}.h5" for number in range(_shard(first, file).total)]


def digest_of_shards(store: RegionStore) -> str:
    """Digest of the shards' inputs and of their regions, whatever the number of shards.

    The vectors themselves are not read: at the paper's scale they take 40 GB.
    """
    counts = [[image_id, store.count(image_id)] for image_id in store.image_ids]
    boxes, objectness = hashlib.sha256(), hashlib.sha256()
    for block in store.blocks(DIGESTED_ROWS, []):
        boxes.update(block.box.tobytes())
        objectness.update(block.objectness.tobytes())
    regions = {"box": boxes.hexdigest(), "objectness": objectness.hexdigest()}
    return fingerprint({"identity": store.identity, "counts": counts} | regions)


def read_proposals(paths: Iterable[Path], dataset: Path) -> RegionStore:
    """Open the proposals of a split, computed or imported: all its shards.

    Raises:
        LpovodError: as `open_shards` does, and if they were made for another split or other images.
    """
    store = open_shards(paths, "proposals")
    _check_dataset(store, dataset)
    return store


def read_shard(path: Path, dataset: Path, image_ids: Iterable[int]) -> tuple[RegionStore, Shard]:
    """Open one shard of the proposals of a split.

    Args:
        path: the shard.
        dataset: json of the split.
        image_ids: all images of the split.

    Raises:
        LpovodError: if it was made for another split, or does not hold exactly the shard's images.
    """
    store = RegionStore(path, "proposals")
    (shard,) = store.shards
    _check_dataset(store, dataset)
    listed, proposed = set(shard.of(image_ids)), set(store.image_ids)
    if listed != proposed:
        first = min(listed ^ proposed)
        holder, other = (dataset, path) if first in listed else (path, dataset)
        raise LpovodError(
            f"{dataset} has {len(listed)} images in shard {shard.number} of {shard.total}, {path} "
            f"has {len(proposed)}; image {first} is in {holder} but not in {other}. Make it "
            f"again: snakemake --forcerun {path}"
        )
    return store, shard


def _check_dataset(store: RegionStore, dataset: Path) -> None:
    if store.identity["inputs"].get("dataset") != sha256(dataset):
        raise LpovodError(
            f"{store.paths[0]} holds proposals of other images than those of {dataset}"
        )
