import numpy as np
import pytest
from conftest import write_shards

from lpovod.config import RegionIndexSettings
from lpovod.exceptions import LpovodError
from lpovod.formats import index as index_format
from lpovod.formats.index import Piece, open_index, widen
from lpovod.formats.regions import INDEX_BITS, open_shards, region_key, split_key
from lpovod.search import best_rows, search_index
from lpovod.stages.region_index import build_region_index

SETTINGS = RegionIndexSettings(block_rows=50)


def random_shards(folder, images=20, dimension=24, seed=0, **more):
    """Shards of random unit vectors, and all of them with their keys, in the dense form."""
    random = np.random.default_rng(seed)
    vectors, boxes, objectness = {}, {}, {}
    for image_id in random.choice(500_000, images, replace=False).tolist():
        count = int(random.integers(0, 15))
        rows = random.standard_normal((count, dimension))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        vectors[image_id] = rows.astype(np.float16)
        boxes[image_id] = np.tile([0, 0, 5, 5], (count, 1)).astype(np.float32)
        objectness[image_id] = random.uniform(0, 1, count).astype(np.float32)
    dataset = folder / "train.json"
    dataset.write_text("{}")
    paths = write_shards(folder, dataset, vectors, boxes, objectness, **more)
    keys = np.concatenate([region_key(i, np.arange(len(v))) for i, v in vectors.items()])
    return paths, keys, np.concatenate(list(vectors.values())).astype(np.float32)


def everything(rows):
    return np.ones(rows, bool)


def test_keys_are_unique_and_reversible():
    image_id = np.array([0, 1, 1, 581929, 2**43 - 1])
    index = np.array([5, 0, 2**INDEX_BITS - 1, 999, 2**INDEX_BITS - 1])
    keys = region_key(image_id, index)
    assert keys.dtype == np.int64
    assert keys.tolist() == [5, 2**20, 2**21 - 1, 581929 * 2**20 + 999, 2**63 - 1]
    for given, found in zip((image_id, index), split_key(keys), strict=True):
        np.testing.assert_array_equal(given, found)


@pytest.mark.parametrize(
    ("image_id", "index", "message"),
    [(2**43, 0, "image id 8796093022208"), (-1, 0, "image id -1"), (1, 2**20, "region 1048576")],
)
def test_a_key_out_of_range_is_refused(image_id, index, message):
    with pytest.raises(LpovodError, match=message):
        region_key(np.array([3, image_id]), np.array([0, index]))


@pytest.mark.parametrize("factory", ["Flat", "SQfp16", "IVF1,Flat"])
def test_search_equals_the_dense_product(tmp_path, factory):
    shards, keys, vectors = random_shards(tmp_path)
    settings = RegionIndexSettings(factory=factory, block_rows=50)
    build_region_index(shards, settings, tmp_path / "i")
    index = open_index(tmp_path / "i")
    assert sorted(index.keys) == sorted(keys)
    query = np.random.default_rng(1).standard_normal(24).astype(np.float32)
    query /= np.linalg.norm(query)
    ((scores, found),) = search_index(index, query[None], 10, everything(len(keys)))
    best = np.argsort(-(vectors @ query))[:10]
    assert index.keys[found].tolist() == keys[best].tolist()
    np.testing.assert_allclose(scores, (vectors @ query)[best], atol=1e-5)


@pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
def test_many_vectors_are_searched_at_once(tmp_path, factory, monkeypatch):
    """Pieces smaller than the index's parts, and results that are pruned on the way."""
    monkeypatch.setattr(index_format, "READ_ROWS", 30)
    monkeypatch.setattr(index_format, "COMPARED_ROWS", 8)
    shards, keys, vectors = random_shards(tmp_path, images=60)
    build_region_index(shards, RegionIndexSettings(factory=factory, block_rows=64), tmp_path / "i")
    index = open_index(tmp_path / "i")
    assert index.exact
    place = {key: n for n, key in enumerate(keys.tolist())}
    allowed = np.random.default_rng(3).uniform(size=len(keys)) < 0.7
    mine = np.array([place[key] for key in index.keys[allowed].tolist()])
    queries = np.random.default_rng(4).standard_normal((9, 24)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    hits = search_index(index, queries, 7, allowed)
    for query, (scores, found) in zip(queries, hits, strict=True):
        dense = vectors[mine] @ query
        best = keys[mine[np.argsort(-dense)[:7]]]
        assert index.keys[found].tolist() == best.tolist()
        np.testing.assert_allclose(scores, -np.sort(-dense)[:7], atol=1e-6)


def test_every_finite_half_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    half = bits[np.isfinite(bits)].reshape(-1, 2)
    wide = widen(half, np.empty(half.shape, np.float32))
    np.testing.assert_array_equal(wide.view(np.uint32), half.astype(np.float32).view(np.uint32))


def test_rows_that_float32_cannot_tell_apart_are_ranked_by_exact_sums():
    random = np.random.default_rng(0)
    query = random.standard_normal((1, 512)).astype(np.float32)
    query /= np.linalg.norm(query)
    rows = np.tile(query, (900, 1)) + random.uniform(-3e-5, 3e-5, (900, 512)).astype(np.float32)
    rows[300:600] *= 0.9
    rows[700] = rows[20]
    exact = (rows.astype(np.float64) @ query[0].astype(np.float64)).astype(np.float32)
    expected = sorted(range(900), key=lambda n: (-exact[n], n))
    pieces = [Piece(part, np.arange(len(part))) for part in np.split(rows, 9)]
    for k, threads in ((1, 1), (5, 2), (60, 3)):
        ((scores, found),) = best_rows(query, pieces, k, threads)
        assert found.tolist()[:k] == expected[:k]
        assert len(found) >= k
        assert (exact[found[k:]] == exact[found[k - 1]]).all()
        np.testing.assert_array_equal(scores, exact[found])


def test_quantised_indices_are_not_exact(tmp_path):
    shards, _, _ = random_shards(tmp_path, images=80)
    for factory, exact in (("SQ8", False), ("IVF2,SQfp16", False), ("SQfp16", True)):
        settings = RegionIndexSettings(factory=factory, block_rows=50)
        build_region_index(shards, settings, tmp_path / "i")
        assert open_index(tmp_path / "i").exact == exact


def test_search_returns_allowed_rows_alone(tmp_path):
    shards, keys, vectors = random_shards(tmp_path)
    build_region_index(shards, SETTINGS, tmp_path / "i")
    index = open_index(tmp_path / "i")
    allowed = np.random.default_rng(2).uniform(size=len(keys)) < 0.1
    ((scores, found),) = search_index(index, vectors[:1], 50, allowed)
    assert sorted(found) == np.flatnonzero(allowed).tolist()
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("factory", ["IVF4,SQfp16", "IVF2,PQ4x4"])
def test_trained_factories_find_most_of_what_is_near(tmp_path, factory):
    shards, keys, vectors = random_shards(tmp_path, images=80)
    settings = RegionIndexSettings(factory=factory, block_rows=50)
    build_region_index(shards, settings, tmp_path / "i")
    index = open_index(tmp_path / "i")
    key_of = keys.tolist()
    found = search_index(index, vectors[:50], 20, everything(len(keys)))
    hits = [key_of[n] in index.keys[rows] for n, (_, rows) in enumerate(found)]
    assert np.mean(hits) > 0.8


def test_the_same_shards_give_the_same_bytes_in_any_order_and_block_size(tmp_path):
    shards, _, _ = random_shards(tmp_path)
    build_region_index(shards, SETTINGS, tmp_path / "a")
    build_region_index(shards[::-1], SETTINGS, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    build_region_index(shards, RegionIndexSettings(block_rows=7), tmp_path / "c")
    one, two = open_index(tmp_path / "a"), open_index(tmp_path / "c")
    assert (len(one.parts), len(two.parts)) != (1, 1)
    np.testing.assert_array_equal(one.keys, two.keys)


def test_a_damaged_or_foreign_index_is_refused(tmp_path):
    shards, _, _ = random_shards(tmp_path)
    build_region_index(shards, SETTINGS, tmp_path / "i")
    whole = (tmp_path / "i").read_bytes()
    third = len(whole) // 3
    for part in (whole[:-1], whole[:third], b"", whole + b"x", whole[:third] + whole[third + 9 :]):
        (tmp_path / "i").write_bytes(part)
        with pytest.raises(LpovodError, match="not a whole index"):
            open_index(tmp_path / "i")
    (tmp_path / "i").write_bytes(b"X" * third + whole[third:])
    with pytest.raises(LpovodError, match="cannot be read"):
        open_index(tmp_path / "i")
    with pytest.raises(LpovodError, match="no such file"):
        open_index(tmp_path / "j")


def test_a_factory_that_cannot_be_searched_is_refused(tmp_path):
    shards, _, _ = random_shards(tmp_path)
    for factory in ("Flatt", "HNSW32", "PQ4x4"):
        settings = RegionIndexSettings(factory=factory)
        with pytest.raises(LpovodError, match=f"region_index.factory = '{factory}'"):
            build_region_index(shards, settings, tmp_path / "i")
    assert not (tmp_path / "i").exists()


def test_shards_that_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, _, _ = random_shards(tmp_path / "a")
    other, _, _ = random_shards(tmp_path / "b", seed=1, proposals="q" * 64)
    with pytest.raises(LpovodError, match="different proposals"):
        open_shards([ours[0], other[1]], "region_embeddings")
    with pytest.raises(LpovodError, match=r"1 shards were given, .* one of 2"):
        open_shards(ours[:1], "region_embeddings")
    with pytest.raises(LpovodError, match="no shard"):
        open_shards([], "region_embeddings")


def test_shards_without_regions_are_refused(tmp_path):
    (tmp_path / "train.json").write_text("{}")
    nothing = {1: np.empty((0, 4), np.float16), 2: np.empty((0, 4), np.float16)}
    boxes, objectness = dict.fromkeys((1, 2), np.empty((0, 4))), dict.fromkeys((1, 2), np.empty(0))
    shards = write_shards(tmp_path, tmp_path / "train.json", nothing, boxes, objectness)
    with pytest.raises(LpovodError, match="no region"):
        build_region_index(shards, SETTINGS, tmp_path / "i")
