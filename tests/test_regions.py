import pickle

import numpy as np
import pytest
import torch

from lpovod.artifacts import identity
from lpovod.exceptions import LpovodError
from lpovod.formats import regions
from lpovod.formats.regions import (
    RegionStore,
    Shard,
    digest_of_shards,
    open_shards,
    shards_in,
    write_regions,
)

IDENT = identity("region_embeddings", {"scales": [1.0]}, proposals="p")


def regions_of(image_id: int, count: int) -> dict:
    """Boxes, objectness and vectors that tell which image and place they belong to."""
    place = np.arange(count)
    box = image_id + np.stack([place, place, place + 1, place + 2], axis=1)
    return {
        "box": box.astype(np.float32),
        "objectness": (place / 100).astype(np.float32),
        "embedding": np.full((count, 3), image_id, np.float16) + place[:, None].astype(np.float16),
    }


def write(path, counts, ident=IDENT):
    with write_regions(path, ident) as writer:
        for image_id, count in counts.items():
            writer.add(image_id, **regions_of(image_id, count))
    return path


def assert_is(regions, image_id, count):
    expected = regions_of(image_id, count)
    assert len(regions) == count
    assert regions.image_id.tolist() == [image_id] * count
    assert regions.index.tolist() == list(range(count))
    for name in ("box", "objectness"):
        np.testing.assert_array_equal(getattr(regions, name), expected[name])
        assert getattr(regions, name).dtype == np.float32
    np.testing.assert_array_equal(regions["embedding"], expected["embedding"])
    assert regions["embedding"].dtype == np.float16


def test_regions_are_read_by_image_id_in_any_order(tmp_path):
    counts = {50: 3, 7: 0, 9: 200, 8: 1}
    store = RegionStore(write(tmp_path / "a.h5", counts), "region_embeddings")
    assert store.image_ids == [50, 7, 9, 8]
    assert len(store) == 204
    assert store.identity == IDENT
    for image_id in (8, 9, 7, 50):
        assert image_id in store
        assert store.count(image_id) == counts[image_id]
        assert_is(store.read(image_id), image_id, counts[image_id])
    assert 1 not in store


def test_columns_are_read_only_when_asked_for(tmp_path):
    store = RegionStore(write(tmp_path / "a.h5", {1: 2}), "region_embeddings")
    assert store.read(1, []).columns == {}
    assert list(store.read(1, ["embedding"]).columns) == ["embedding"]
    with pytest.raises(LpovodError, match="no column feature"):
        store.read(1, ["feature"])


@pytest.mark.parametrize("rows", [1, 4, 5, 1000])
def test_blocks_hold_every_region_once_with_its_key(tmp_path, rows):
    counts = [{3: 4, 2: 0, 8: 5}, {}, {1: 2}, {6: 0}]
    paths = [write(tmp_path / f"{n}.h5", c) for n, c in enumerate(counts)]
    blocks = list(RegionStore(paths, "region_embeddings").blocks(rows))
    assert all(0 < len(block) <= rows for block in blocks)
    image_id = np.concatenate([b.image_id for b in blocks])
    index = np.concatenate([b.index for b in blocks])
    assert list(zip(image_id, index, strict=True)) == [
        (i, n) for c in counts for i, count in c.items() for n in range(count)
    ]
    vectors = np.concatenate([b["embedding"] for b in blocks])
    np.testing.assert_array_equal(vectors[:, 0], image_id + index)
    np.testing.assert_array_equal(np.concatenate([b.box for b in blocks])[:, 0], image_id + index)


def test_a_store_without_regions_reads_as_empty(tmp_path):
    with write_regions(tmp_path / "a.h5", identity("proposals")) as writer:
        writer.add(4, np.empty((0, 4), np.float32), np.empty(0, np.float32))
    store = RegionStore(tmp_path / "a.h5", "proposals")
    assert (len(store), store.image_ids) == (0, [4])
    assert len(store.read(4)) == 0
    assert list(store.blocks(10)) == []


def test_shards_read_as_one_store(tmp_path):
    paths = [write(tmp_path / "a.h5", {5: 2}), write(tmp_path / "b.h5", {4: 3})]
    store = RegionStore(paths, "region_embeddings")
    assert store.image_ids == [5, 4]
    assert_is(store.read(4), 4, 3)
    assert_is(store.read(5), 5, 2)


def test_a_store_travels_to_a_worker_after_its_files_were_opened(tmp_path):
    store = RegionStore(write(tmp_path / "a.h5", {5: 2}), "region_embeddings")
    store.read(5)
    assert_is(pickle.loads(pickle.dumps(store)).read(5), 5, 2)


def test_the_same_regions_are_the_same_bytes(tmp_path):
    one, two = (write(tmp_path / name, {5: 2, 6: 300}) for name in ("a.h5", "b.h5"))
    assert one.read_bytes() == two.read_bytes()


def test_nothing_stands_under_the_name_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), write_regions(tmp_path / "a.h5", IDENT) as writer:
        writer.add(1, **regions_of(1, 4))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


BOX = np.zeros((2, 4), np.float32)
ONE = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"image_id": 1, "box": BOX, "objectness": ONE, "v": np.ones((2, 3))}, "image 1 .* twice"),
        ({"image_id": 2, "box": BOX, "objectness": ONE[:1], "v": np.ones((2, 3))}, "1 rows of obj"),
        ({"image_id": 2, "box": BOX, "objectness": ONE, "v": np.ones((3, 3))}, "3 rows of v for 2"),
        (
            {"image_id": 2, "box": BOX, "objectness": ONE, "v": np.full((2, 3), np.nan)},
            "v holds NaN",
        ),
        (
            {"image_id": 2, "box": BOX + np.inf, "objectness": ONE, "v": np.ones((2, 3))},
            "box holds",
        ),
        ({"image_id": 2, "box": BOX, "objectness": ONE}, "image 2 has columns"),
        ({"image_id": 2, "box": BOX, "objectness": ONE, "v": np.ones((2, 1))}, "image 2 has col"),
        ({"image_id": 2, "box": BOX, "objectness": ONE, "w": np.ones((2, 3))}, "image 2 has col"),
    ],
)
def test_rows_that_would_shift_are_refused(tmp_path, second, message):
    with (
        pytest.raises(LpovodError, match=message),
        write_regions(tmp_path / "a.h5", IDENT) as writer,
    ):
        writer.add(1, BOX, ONE, v=np.ones((2, 3)))
        writer.add(**second)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    one = write(tmp_path / "a.h5", {5: 2})
    with pytest.raises(LpovodError, match=r"image 5 is both in .*a.h5 and in .*b.h5"):
        RegionStore([one, write(tmp_path / "b.h5", {6: 1, 5: 2})], "region_embeddings")
    other = identity("region_embeddings", {"scales": [1.0, 1.5]}, proposals="p")
    with pytest.raises(LpovodError, match="different settings"):
        RegionStore([one, write(tmp_path / "c.h5", {6: 1}, other)], "region_embeddings")
    with pytest.raises(LpovodError, match="written by stage region_embeddings, not proposals"):
        RegionStore(one, "proposals")


class Rows(torch.utils.data.Dataset):
    """Reads a store in the workers of a data loader."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store.image_ids)

    def __getitem__(self, number):
        image_id = self.store.image_ids[number]
        return image_id, self.store.read(image_id)["embedding"]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_what_is_there(tmp_path, start):
    paths = [write(tmp_path / f"{n}.h5", {2 * n + 1: 40, 2 * n: 300}) for n in range(3)]
    store = RegionStore(paths, "region_embeddings")
    store.read(0)  # a file is open when the workers start
    loader = torch.utils.data.DataLoader(
        Rows(store), batch_size=None, num_workers=2, multiprocessing_context=start
    )
    read = [(i, v.numpy()) for i, v in loader]
    assert [i for i, _ in read] == store.image_ids
    for image_id, vectors in read:
        expected = regions_of(image_id, store.count(image_id))["embedding"]
        np.testing.assert_array_equal(vectors, expected)


def test_a_missing_image_or_file_is_named(tmp_path):
    path = write(tmp_path / "a.h5", {5: 2})
    with pytest.raises(LpovodError, match=r"image 6 is not in .*a.h5"):
        RegionStore(path, "region_embeddings").read(6)
    with pytest.raises(LpovodError, match=r"b.h5: no such file"):
        RegionStore(tmp_path / "b.h5", "region_embeddings")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(LpovodError, match="not a whole HDF5 file"):
        RegionStore(path, "region_embeddings")
    import h5py

    with h5py.File(tmp_path / "c.h5", "w"):
        pass
    with pytest.raises(LpovodError, match="not a region store"):
        RegionStore(tmp_path / "c.h5", "region_embeddings")


def test_a_full_disk_is_named_before_hdf5_meets_it(tmp_path, monkeypatch):
    monkeypatch.setattr(regions, "MARGIN", 1 << 62)  # no disk has that much room
    path = tmp_path / "regions.h5"
    with (
        pytest.raises(LpovodError, match="No space left on device. Free some disk space and rerun"),
        write_regions(path, identity("proposals")) as writer,
    ):
        writer.add(1, np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_images_are_divided_in_equal_numbers():
    image_ids = np.random.default_rng(0).permutation(1000).tolist()
    divided = [Shard(number, 7).of(image_ids) for number in range(7)]
    assert [i for part in divided for i in part] == sorted(image_ids)
    assert {len(part) for part in divided} == {142, 143}
    assert Shard().of([9, 1, 5]) == [1, 5, 9]
    assert sorted(len(Shard(number, 3).of([4])) for number in range(3)) == [0, 0, 1]
    for number in (-1, 3):
        with pytest.raises(LpovodError, match=rf"shard {number} is not one of 0 ... 2"):
            Shard(number, 3).of(image_ids)


def write_shards(folder, counts, shards):
    """The images of a store, divided."""
    paths = []
    for number in range(shards):
        shard = Shard(number, shards)
        path = folder / f"{number}.h5"
        with write_regions(path, IDENT, shard) as writer:
            for image_id in shard.of(counts):
                writer.add(image_id, **regions_of(image_id, counts[image_id]))
        paths.append(path)
    return paths


def test_shards_are_one_store_in_their_own_order(tmp_path):
    """Ten come after nine, and not after one."""
    counts = {image_id: image_id % 4 for image_id in range(100, 136)}
    paths = write_shards(tmp_path, counts, 12)
    store = open_shards(sorted(paths, key=str), "region_embeddings")
    assert store.paths == paths
    assert store.image_ids == list(counts)
    for image_id, count in counts.items():
        assert_is(store.read(image_id), image_id, count)


def test_shards_that_a_finer_division_left_behind_are_passed_over(tmp_path):
    write_shards(tmp_path, {1: 2, 2: 3, 3: 0}, 3)
    paths = write_shards(tmp_path, {1: 2, 2: 3, 3: 0}, 2)
    assert (tmp_path / "2.h5").exists()
    assert shards_in(tmp_path) == paths
    assert open_shards(paths, "region_embeddings").image_ids == [1, 2, 3]


def test_shards_that_are_no_whole_division_are_refused(tmp_path):
    paths = write_shards(tmp_path, {1: 2, 2: 3, 3: 0}, 3)
    with pytest.raises(LpovodError, match="2 shards were given, but .*0.h5 is one of 3"):
        open_shards(paths[:2], "region_embeddings")
    paths[1].rename(tmp_path / "3.h5")
    moved = [paths[0], paths[2], tmp_path / "3.h5"]
    with pytest.raises(LpovodError, match="2.h5 is shard 2, not shard 1"):
        open_shards(moved, "region_embeddings")
    with pytest.raises(LpovodError, match="no such file"):
        shards_in(tmp_path / "nowhere")


def test_the_digest_of_shards_is_that_of_their_regions(tmp_path):
    def digest(shards, change=None):
        (tmp_path / "s").mkdir(exist_ok=True)
        counts = {1: 2, 5: 3, 9: 0, 12: 40}
        paths = write_shards(tmp_path / "s", counts, shards)
        if change:
            changed = regions_of(5, 3)
            changed[change][1] += 0.5
            with write_regions(paths[0], IDENT) as writer:
                for image_id, count in counts.items():
                    of_image = changed if image_id == 5 else regions_of(image_id, count)
                    writer.add(image_id, **of_image)
        return digest_of_shards(open_shards(paths, "region_embeddings"))

    assert digest(1) == digest(2) == digest(5)
    assert len({digest(1), digest(1, "box"), digest(1, "objectness")}) == 3
