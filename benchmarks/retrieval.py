"""Time and memory of exact retrieval from 1, 2 and 5 million regions, over one read of the index.

Run as ``python -m benchmarks.retrieval``; 5 million regions need 11 GB in the temporary folder.
Ends with one JSON line.

Every run starts with the files out of the page cache (posix_fadvise, DONTNEED), as if they exceeded
the memory: retrieval and the sequential read are both cold. Times are the minimum of several runs
of alternating kinds. A retrieval opens index and shards, applies the objectness floor and returns
the top 100 of each query with their boxes, in a separate process with one thread beside the reading
thread, like a job of the workflow.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import tyro

from lpovod.artifacts import identity
from lpovod.config import PseudoLabelsSettings, RegionIndexSettings
from lpovod.formats.index import READ_ROWS, open_index
from lpovod.formats.regions import RegionStore, Shard, open_shards, write_regions
from lpovod.search import top_regions
from lpovod.stages.region_index import build_region_index

DIMENSION = 512
PER_IMAGE = 250
THREADS = 2  # as the rule asks for
QUERIES = 17  # novel classes of COCO
LVIS_QUERIES = (337, 1203)  # its novel classes, and all of them
SETTINGS = PseudoLabelsSettings(k=100, objectness=0.6)
BLOCK_IMAGES, BLOCK_TOP = 5000, 300  # of the original


@dataclass
class Options:
    millions: tuple[int, ...] = (1, 2, 5)
    """numbers of regions, in millions"""
    repeats: int = 3
    """runs of each measurement"""


def make_files(folder: Path, rows: int) -> None:
    """Two shards of random unit vectors, and their index."""
    random = np.random.default_rng(rows)
    noise = random.standard_normal((1 << 16, DIMENSION), np.float32)
    noise = (noise / np.linalg.norm(noise, axis=1, keepdims=True)).astype(np.float16)
    images = rows // PER_IMAGE
    ident = identity("region_embeddings", {"scales": [1.0, 1.5], "precision": "float32"})
    for path, number in zip(shards_of(folder), range(2), strict=True):
        shard = Shard(number, 2)
        with write_regions(path, ident, shard) as file:
            for image in shard.of(range(images)):
                place = image * PER_IMAGE % (len(noise) - PER_IMAGE)
                vectors = np.roll(noise[place : place + PER_IMAGE], image // 200, axis=1)
                box = np.tile(np.float32([0, 0, 9, 9]), (PER_IMAGE, 1))
                file.add(image, box, random.random(PER_IMAGE, np.float32), embedding=vectors)
    build_region_index(shards_of(folder), RegionIndexSettings(), folder / "index")


def shards_of(folder: Path) -> list[Path]:
    return [folder / "0.h5", folder / "1.h5"]


def queries(count: int) -> np.ndarray:
    rows = np.random.default_rng(1).standard_normal((count, DIMENSION), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_cold(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(folder: Path) -> float:
    """Seconds to read the index from end to end."""
    make_cold(folder)
    buffer = bytearray(4 << 20)
    start = time.perf_counter()
    with open(folder / "index", "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def retrieve(folder: Path, count: int) -> tuple[float, float, list[list[int]]]:
    """Seconds and GiB of a retrieval in a separate process, and the keys of the regions."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_retrieve, (folder, count))


def _retrieve(folder: Path, count: int) -> tuple[float, float, list[list[int]]]:
    make_cold(folder)
    start = time.perf_counter()
    store, index = open_shards(shards_of(folder), "region_embeddings"), open_index(folder / "index")
    regions_of = top_regions(index, store, queries(count), SETTINGS, threads=THREADS)
    seconds = time.perf_counter() - start
    return seconds, peak_gib(), [[region["key"] for region in regions] for regions in regions_of]


def peak_gib() -> float:
    """Peak memory of this process; getrusage would include its parent's at the time of the fork."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def flat_index(store: RegionStore) -> tuple[float, np.ndarray]:
    """Seconds of FAISS's IndexFlatIP, filled and in memory, and the rows that it returns."""
    index = faiss.IndexFlatIP(DIMENSION)
    reached = []
    for block in store.blocks(1 << 16, ["embedding"]):
        index.add(block["embedding"].astype(np.float32))
        reached.append(block.objectness >= np.float32(SETTINGS.objectness))
    bits = np.packbits(np.concatenate(reached), bitorder="little")
    only = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
    start = time.perf_counter()
    _, rows = index.search(queries(QUERIES), SETTINGS.k, params=only)
    return time.perf_counter() - start, rows


def original(store: RegionStore) -> tuple[float, np.ndarray]:
    """Seconds of the original's block procedure, and the rows that it returns.

    A flat index per 5,000 images holds their regions above the floor; the best 300 of each index
    are merged to the best 300, and the first 100 of these count (prepare/, retrieval by blocks).
    """
    start, before = time.perf_counter(), 0
    scores, rows = [], []
    for block in store.blocks(BLOCK_IMAGES * PER_IMAGE, ["embedding"]):
        reached = np.flatnonzero(block.objectness >= np.float32(SETTINGS.objectness))
        index = faiss.IndexFlatIP(DIMENSION)
        index.add(block["embedding"][reached].astype(np.float32))
        score, row = index.search(queries(QUERIES), BLOCK_TOP)
        scores.append(score)
        rows.append(before + reached[row])
        before += len(block)
    merged, rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    best = np.argsort(-merged, axis=1)[:, :BLOCK_TOP]
    top = np.take_along_axis(rows, best, axis=1)[:, : SETTINGS.k]
    return time.perf_counter() - start, top


def main(options: Options) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # in the retrieving processes, like the workflow's jobs
    ratios, peak = {}, 0.0
    for millions in options.millions:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_files(folder, millions * 1_000_000)
            reads, searches = [], []
            for _ in range(options.repeats):
                reads.append(read_once(folder))
                seconds, memory, keys = retrieve(folder, QUERIES)
                searches.append(seconds)
                peak = max(peak, memory)
            read, search = min(reads), min(searches)
            ratios[f"ratio_to_read_{millions}M"] = round(search / read, 3)
            size = (folder / "index").stat().st_size
            print(
                f"{millions} M regions: reading {read:.2f} s ({size / read / 1e9:.2f} GB/s), "
                f"{QUERIES} queries {search:.2f} s, ratio {search / read:.2f}, {memory:.2f} GiB",
                flush=True,
            )
            if millions == min(options.millions):
                compare(folder, keys, search)
    print(json.dumps(ratios | {"peak_memory_gib": round(peak, 3)}))


def product_alone(count: int, rows: int) -> float:
    """Seconds of the inner products of queries and rows that are compared: nothing is read."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_product_alone, (count, rows))


def _product_alone(count: int, rows: int) -> float:
    block = np.random.default_rng(2).standard_normal((READ_ROWS, DIMENSION), np.float32)
    columns = np.ascontiguousarray(queries(count).T)
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda _: (block @ columns).shape, range(0, rows, READ_ROWS)))
    return time.perf_counter() - start


def compare(folder: Path, keys: list[list[int]], seconds: float) -> None:
    """Compare with more queries, and with other ways to the same regions."""
    store = open_shards(shards_of(folder), "region_embeddings")
    index = open_index(folder / "index")
    floor = SETTINGS.objectness
    rows = sum(np.count_nonzero(b.objectness >= floor) for b in store.blocks(1 << 16, []))
    for count in LVIS_QUERIES:
        many, memory, _ = retrieve(folder, count)
        product = product_alone(count, rows)
        print(
            f"    {count} queries: {many:.1f} s, {memory:.2f} GiB; the matrix product alone, in "
            f"memory and float32, {product:.1f} s, ratio {many / product:.2f}",
            flush=True,
        )
    for name, find in (("IndexFlatIP in memory", flat_index), ("the original's blocks", original)):
        make_cold(folder)
        other, rows = find(store)
        same = [set(index.keys[r]) == set(k) for r, k in zip(rows, keys, strict=True)]
        print(
            f"    {name}: {other:.2f} s (ours {seconds:.2f}); the same regions for "
            f"{sum(same)} of {QUERIES} queries",
            flush=True,
        )


if __name__ == "__main__":
    main(tyro.cli(Options))
