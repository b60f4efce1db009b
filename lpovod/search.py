"""Search: the regions of an index that are most similar to a query.

An exact index is read once from end to end, whatever the number of queries. Needs no torch. With a
GPU, and FAISS's package for it, the card finds the rows that come near the best ones of a query,
and the processor decides among them; so the result has the same bits.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path

import faiss
import numpy as np

from lpovod.artifacts import check_made_from
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import ClassEmbeddings
from lpovod.formats.coco import corners
from lpovod.formats.index import READ_ROWS, Piece, RegionIndex
from lpovod.formats.regions import RegionStore, digest_of_shards, split_key
from lpovod.overlaps import overlaps

LISTS_PER_PROBE = 8  # a search visits one in eight lists of an inverted file
CANDIDATES_PER_REGION = 4  # fetched where some may be dropped or the order is only approximate

FETCHED = 128  # rows of a piece that a card returns for each query
CARD_MEMORY = 1 << 28  # bytes that FAISS may reserve on a card: others compute there, too
ROUGH = np.float32(2.0**-9)
"""What a card's product of two unit vectors may be off: twice what rounding one of them to float16
(2**-11), or both to TF32 (2**-10), can do."""

Rough = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""Of queries (q, D) and rows (n, D): the k largest products of each query, (q, k), descending, each
at most `ROUGH` off, and their rows, (q, k)."""

Hits = tuple[np.ndarray, np.ndarray]
"""Inner products (n,) float32, descending, and rows of the index (n,) int64."""


@cache
def on_card() -> Rough | None:
    """FAISS's search on a GPU; None without a card, or without FAISS's package for it.

    Not tested on a GPU.
    """
    # Without a driver FAISS would abort when it counts the cards.
    driver = Path("/proc/driver/nvidia/version").exists()
    if not (hasattr(faiss, "StandardGpuResources") and driver and faiss.get_num_gpus()):
        return None
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(CARD_MEMORY)

    def search(vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        # Half the bytes on their way to the card; FAISS wants one type of both.
        vectors = vectors.astype(rows.dtype)
        return faiss.knn_gpu(resources, vectors, rows, k, metric=faiss.METRIC_INNER_PRODUCT)

    return search


def best_rows(
    vectors: np.ndarray,
    pieces: Iterable[Piece],
    k: int,
    threads: int = 1,
    rough: Rough | None = None,
) -> list[Hits]:
    """The k rows with the largest inner product with each vector, and all that tie with the k-th.

    A float32 sum over D products of two unit vectors is at most D * 2**-24 from the true value, in
    any order of summation. Rows within four times that distance of the k-th best so far are summed
    again in float64 and rounded, so that equal rows have equal sums.

    Args:
        vectors: (q, D) float32, of unit norm, like the rows (up to float16's rounding).
        pieces: the rows in order.
        k: number of rows.
        threads: that compare; the result is the same with any number of them.
        rough: finds the rows that may be among the best; None for a GPU, if there is one. The
            result is the same with and without.

    Returns:
        For each vector, inner products, descending, and rows, int64, ascending among equals: k of
        them, and all that equal the k-th.
    """
    rough = rough or on_card()
    best = _Best(vectors, k, rough)
    threads = 1 if rough else threads  # a card's resources are those of one thread
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[int, list[_Near]]]] = deque()
        for piece in pieces:
            pending.append(pool.submit(best.near, piece))
            # A piece that waits holds memory, and would be compared with a floor that is too low.
            if len(pending) > threads:
                best.add(pending.popleft().result())
        while pending:
            best.add(pending.popleft().result())
    return [_descending(*candidates, k) for candidates in zip(best.scores, best.rows, strict=True)]


_Near = tuple[int, np.ndarray, np.ndarray]
"""A query, and the products and rows of a block that come near its best k."""


class _Best:
    """The candidates for the best k rows of each query so far."""

    def __init__(self, vectors: np.ndarray, k: int, rough: Rough | None = None):
        self.k, self.start, self.vectors, self.rough = k, 0, vectors, rough
        self.margin = np.float32(4 * vectors.shape[1] * 2.0**-24)
        self.columns, self.exact = np.ascontiguousarray(vectors.T), vectors.astype(np.float64)
        self.scores = [np.empty(0, np.float32) for _ in vectors]
        self.rows = [np.empty(0, np.int64) for _ in vectors]
        self.floor = np.full(len(vectors), -np.inf, np.float32)

    def near(self, piece: Piece) -> tuple[int, list[_Near]]:
        """Number of rows of a piece, and its candidates; the floor rises while it is compared."""
        if self.rough and np.isfinite(self.floor).all():
            return len(piece), self._near_on_card(piece, self.rough)
        candidates, start = [], 0
        for block in piece.blocks():
            products = block @ self.columns
            above = products.max(axis=0, initial=-np.inf) > self.floor
            for query in np.flatnonzero(above).tolist():
                column = products[:, query]
                near = np.flatnonzero(column > self.floor[query])
                if len(near) > self.k:  # the first pieces find no floor yet
                    kth = np.partition(column[near], -self.k)[-self.k]
                    near = near[column[near] >= kth - self.margin]
                candidates.append((query, self._sums(block[near], query), start + near))
            start += len(block)
        return start, candidates

    def _near_on_card(self, piece: Piece, rough: Rough) -> list[_Near]:
        if not len(piece):
            return []
        rows, limit = piece.vectors[piece.rows], self.floor - ROUGH
        products, places = rough(self.vectors, rows, min(FETCHED, len(rows)))
        candidates = []
        for query in np.flatnonzero(products[:, 0] > limit).tolist():
            near = np.sort(places[query][products[query] > limit[query]])
            if len(near) == FETCHED:  # perhaps not all that come near
                near = np.arange(len(rows))
            candidates.append((query, self._sums(rows[near], query), near))
        return candidates

    def _sums(self, rows: np.ndarray, query: int) -> np.ndarray:
        return (rows.astype(np.float64) @ self.exact[query]).astype(np.float32)

    def add(self, found: tuple[int, list[_Near]]) -> None:
        """Take the candidates of the next piece, in order, and raise the floor."""
        count, candidates = found
        for query, summed, places in candidates:
            scores = np.concatenate([self.scores[query], summed])
            rows = np.concatenate([self.rows[query], self.start + places])
            if len(scores) >= 2 * self.k:
                kth = np.partition(scores, -self.k)[-self.k]
                self.floor[query] = kth - self.margin
                scores, rows = scores[scores >= kth], rows[scores >= kth]
            self.scores[query], self.rows[query] = scores, rows
        self.start += count


def _descending(scores: np.ndarray, rows: np.ndarray, k: int) -> Hits:
    order = np.argsort(-scores, kind="stable")
    if len(order) > k:
        order = order[scores[order] >= scores[order[k - 1]]]
    return scores[order], rows[order]


def search_index(
    index: RegionIndex, vectors: np.ndarray, k: int, allowed: np.ndarray, threads: int = 1
) -> list[Hits]:
    """The k allowed rows with the largest inner product with each vector.

    An exact index is read once from end to end, whatever the number of vectors.

    Args:
        index: to search.
        vectors: (q, D) float32.
        k: largest number of rows.
        allowed: (rows,) bool.
        threads: that compare the rows of an exact index.

    Returns:
        For each vector, inner products (n,) float32, descending, and rows (n,) int64.
        For an exact index the products are computed in float64 and rounded, and all rows that
        equal the k-th are included; for other indices n <= k, and the products are FAISS's.
    """
    vectors = np.ascontiguousarray(vectors, np.float32)
    if index.exact:
        rows = np.flatnonzero(allowed)
        hits = best_rows(vectors, index.stream(allowed), k, threads)
        return [(scores, rows[places]) for scores, places in hits]
    return [_search_parts(index, vector[None], k, allowed) for vector in vectors]


def _search_parts(index: RegionIndex, query: np.ndarray, k: int, allowed: np.ndarray) -> Hits:
    scores, rows, start = [np.empty(0, np.float32)], [np.empty(0, np.int64)], 0
    for part in index.parts:
        stop = start + part.ntotal
        if allowed[start:stop].any():
            inner = faiss.downcast_index(part.index)
            parameters = _parameters(inner, allowed[start:stop])
            products, places = inner.search(query, min(k, part.ntotal), params=parameters)
            valid = places[0] >= 0
            scores.append(products[0][valid])
            rows.append(start + places[0][valid])
        start = stop
    merged = np.concatenate(scores)
    best = np.argsort(-merged, kind="stable")[:k]
    return merged[best], np.concatenate(rows)[best]


def _parameters(inner: faiss.Index, allowed: np.ndarray) -> faiss.SearchParameters:
    selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    if isinstance(inner, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=-(-inner.nlist // LISTS_PER_PROBE))
    return faiss.SearchParameters(sel=selector)


def queries(vectors: np.ndarray, base: np.ndarray, settings: PseudoLabelsSettings) -> np.ndarray:
    """Query vectors for the regions that match each name.

    Text embeddings have a large component in common, and a region's cosine with that component
    measures how much it resembles any name at all. A centred query leaves the component out and
    ranks by what is particular to the name. This is ours, not the paper's.

    Args:
        vectors: (q, D) unit text embeddings of the names.
        base: (b, D) text embeddings of the base classes.
        settings: whether queries are centred.

    Returns:
        (q, D) float32, unit rows: the embeddings themselves, or their normalised difference from
        the mean of the base classes.

    Raises:
        LpovodError: if an embedding equals that mean.
    """
    if not settings.centred:
        return vectors
    beyond = vectors - base.mean(axis=0)
    lengths = np.linalg.norm(beyond, axis=1, keepdims=True)
    if lengths.min() < 1e-6:
        raise LpovodError(
            "the embedding of a name equals the mean of the base classes, so nothing is left of it "
            "after centring. Set pseudo_labels.centred to false"
        )
    return beyond / lengths


def apart(
    ranked: list[dict],
    near: Callable[[np.ndarray, np.ndarray], bool],
    better: Sequence[dict] = (),
) -> Iterator[dict]:
    """The regions that are not near a better region of the same image, best first.

    Args:
        ranked: regions, best first.
        near: whether a box, (4,), is near the better boxes of its image, (n, 4).
        better: regions that rank above all of `ranked`.
    """
    by_image: dict[int, list[np.ndarray]] = defaultdict(list)
    for region in better:
        by_image[region["image_id"]].append(corners(region["bbox"]))
    for region in ranked:
        box, boxes = corners(region["bbox"]), by_image[region["image_id"]]
        if not (boxes and near(box, np.array(boxes))):
            boxes.append(box)
            yield region


def check_belong(
    embedded: Iterable[ClassEmbeddings], store: RegionStore, index: RegionIndex, dataset: Path
) -> None:
    """Refuse text embeddings, shards, an index and a dataset that do not belong together.

    Raises:
        LpovodError: naming the file and the input that differs.
    """
    shard, ident = store.paths[0], store.identity
    for classes in embedded:
        check_made_from(shard, ident, "clip_weights", classes.clip_weights)
        check_made_from(shard, ident, "clip_architecture", classes.clip_architecture)
    check_made_from(shard, ident, "dataset", Path(dataset))
    check_made_from(index.path, index.identity, "region_embeddings", digest_of_shards(store))


def top_regions(
    index: RegionIndex,
    store: RegionStore,
    vectors: np.ndarray,
    settings: PseudoLabelsSettings,
    exact: bool = False,
    threads: int = 1,
) -> list[list[dict]]:
    """The best regions for each of several vectors, in one pass over an exact index.

    A limit on the regions of one image may exhaust the candidates; the search then repeats with
    more of them.

    Args:
        index: to search.
        store: the shards that the index was made from; read only if the index is inexact.
        vectors: (q, D) float32 of unit norm.
        settings: K, the floor, and how different the regions must be.
        exact: search the shards themselves, whatever the index.
        threads: that compare the rows of an exact search.

    Returns:
        For each vector, at most K annotations, each with its ``key``; best first.
    """
    exact = exact or index.exact
    limited = settings.per_image is not None or settings.nms is not None
    candidates = settings.k if exact and not limited else CANDIDATES_PER_REGION * settings.k
    floor = np.float32(settings.objectness)
    allowed = index.objectness >= floor
    selected: dict[int, list[dict]] = {}
    while pending := [query for query in range(len(vectors)) if query not in selected]:
        if exact and not index.exact:
            blocks = store.blocks(READ_ROWS)
            pieces = (Piece(b["embedding"], np.flatnonzero(b.objectness >= floor)) for b in blocks)
            hits = best_rows(vectors[pending], pieces, candidates, threads)
            hits = [(cosines, np.flatnonzero(allowed)[places]) for cosines, places in hits]
        else:
            hits = search_index(index, vectors[pending], candidates, allowed, threads)
        for query, (cosines, rows) in zip(pending, hits, strict=True):
            if not exact:
                cosines = _cosines(store, index.keys[rows], vectors[query])
            regions = _take(_ranked(index, rows, cosines)[:candidates], settings)
            if len(regions) == settings.k or len(rows) < candidates:
                selected[query] = regions
        candidates *= CANDIDATES_PER_REGION
    return [selected[query] for query in range(len(vectors))]


def _cosines(store: RegionStore, keys: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Summed in float64 and rounded, as in an exact search."""
    image_ids, places = split_key(keys)
    content = {i: store.read(i, ["embedding"]) for i in np.unique(image_ids).tolist()}
    cosines = [
        content[image_id]["embedding"][place].astype(np.float64) @ vector.astype(np.float64)
        for image_id, place in zip(image_ids.tolist(), places.tolist(), strict=True)
    ]
    return np.array(cosines, np.float32)


def as_annotation(key: int, box: np.ndarray, objectness: float, cosine: float) -> dict:
    """A region as COCO's annotation, with its key and its cosine with a query.

    Args:
        key: of the region (`region_key`).
        box: (4,) xyxy.
        objectness: of the region.
        cosine: with the query.
    """
    x1, y1, x2, y2 = box.astype(float).tolist()
    return {
        "key": int(key),
        "image_id": int(split_key(np.array(key))[0]),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "score": float(objectness),
        "cosine": float(cosine),
    }


def _ranked(index: RegionIndex, rows: np.ndarray, cosines: np.ndarray) -> list[dict]:
    """Annotations in the order of cosine, descending, then key."""
    order = np.lexsort((index.keys[rows], -cosines))
    return [
        as_annotation(index.keys[row], index.box[row], index.objectness[row], cosine)
        for row, cosine in zip(rows[order], cosines[order], strict=True)
    ]


def _take(ranked: list[dict], settings: PseudoLabelsSettings) -> list[dict]:
    """The first K regions, without those too close to a better region of their image."""

    def near(box: np.ndarray, better: np.ndarray) -> bool:
        full = settings.per_image is not None and len(better) >= settings.per_image
        return full or (settings.nms is not None and overlaps(box, better)[0].max() > settings.nms)

    return list(islice(apart(ranked, near), settings.k))
