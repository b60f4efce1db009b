"""The store gives back what was put under a key, or nothing."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lpovod.artifacts import identity, write_json, write_tensors
from lpovod.formats.store import Store, key_of

SHAPE = {
    "code": "0a",
    "weights": "b" * 64,
    "vocabulary": None,
    "texts": ["a dog", "many dogs"],
    "settings": {"k": 100, "objectness": 0.6, "per_image": None},
}
ARRAYS = {"vector": np.arange(12, dtype=np.float32).reshape(3, 4), "box": np.ones(2, np.float16)}
IDENT = identity("some_stage") | {"logit_scale": 100.0}


@pytest.mark.parametrize(
    "change",
    [
        {"code": "0b"},
        {"weights": "c" * 64},
        {"vocabulary": "b" * 64},
        {"texts": ["a dog", "many cats"]},
        {"texts": ["many dogs", "a dog"]},
        {"texts": ["a dogmany dogs"]},
        {"settings": {**SHAPE["settings"], "k": 101}},
        {"settings": {**SHAPE["settings"], "objectness": 0.6000000001}},
        {"settings": {**SHAPE["settings"], "per_image": 0}},
        {"further": None},
    ],
)
def test_a_key_changes_with_each_value(change):
    assert key_of(**SHAPE | change) != key_of(**SHAPE)


def test_a_key_is_that_of_the_values_in_any_order():
    settings = dict(reversed(SHAPE["settings"].items()))
    assert key_of(**dict(reversed((SHAPE | {"settings": settings}).items()))) == key_of(**SHAPE)
    assert len(key_of(**SHAPE)) == 32


def test_what_was_put_is_given_back_also_in_another_process(tmp_path):
    content = [{"name": "狗", "score": 0.1}, None]
    for _ in range(2):  # an existing file is replaced
        Store(tmp_path / "new" / "folder", "some_stage").put_json("k", content)
        Store(tmp_path / "new" / "folder", "some_stage").put_tensors("k", ARRAYS, IDENT)
    store = Store(tmp_path / "new" / "folder", "some_stage")
    assert store.json("k") == content
    arrays, ident = store.tensors("k")
    assert ident["logit_scale"] == 100 and arrays.keys() == ARRAYS.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    assert store.json("other") is None and store.tensors("other") is None
    assert sorted(path.name for path in store.folder.iterdir()) == ["k.json", "k.safetensors"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def under_another_key(path: Path) -> None:
    shutil.copy(path.with_name("other" + path.suffix), path)


BAD = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "foreign bytes": lambda path: path.write_bytes(b"\xff\xfe\x00 not lpovod's"),
    "another key": under_another_key,
}


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_bad_file_counts_as_none_with_a_warning(tmp_path, logged, kind, damage):
    put = {
        "json": lambda store, key: store.put_json(key, [1.5, "a"]),
        "tensors": lambda store, key: store.put_tensors(key, ARRAYS, IDENT),
    }[kind]
    path = tmp_path / {"json": "k.json", "tensors": "k.safetensors"}[kind]
    store = Store(tmp_path, "some_stage")
    put(store, "k")
    put(store, "other")
    whole = path.read_bytes()
    BAD[damage](path)
    assert getattr(store, kind)("k") is None
    (warning,) = (r.getMessage() for r in logged.records if r.levelname == "WARNING")
    assert warning.startswith("made again: ") and str(tmp_path / "k") in warning
    logged.clear()
    put(store, "k")
    assert path.read_bytes() == whole
    assert getattr(store, kind)("k") is not None and not logged.records


@pytest.mark.parametrize("content", [[], "text", 3, {"key": "k"}, {"content": 1}, {"key": 1}])
def test_json_of_another_layout_counts_as_none(tmp_path, logged, content):
    write_json(tmp_path / "k.json", content)
    assert Store(tmp_path, "some_stage").json("k") is None
    assert "made again" in logged.text


def test_arrays_of_another_stage_count_as_none(tmp_path, logged):
    write_tensors(tmp_path / "k.safetensors", ARRAYS, identity("other_stage") | {"key": "k"})
    assert Store(tmp_path, "some_stage").tensors("k") is None
    assert "made again" in logged.text and "other_stage" in logged.text


@pytest.mark.parametrize("meanwhile", ["another writes", "another starts", "deleted"])
def test_two_writers_of_a_key_leave_a_whole_file(tmp_path, monkeypatch, meanwhile):
    """The second one comes when the first has written, and not yet moved its file."""
    store, fsync, events = Store(tmp_path / "store", "some_stage"), os.fsync, []

    def interrupted(file: int) -> None:
        fsync(file)
        if not events:
            events.append(meanwhile)
            if meanwhile == "deleted":
                shutil.rmtree(store.folder)
            else:
                other = "k" if meanwhile == "another writes" else "other"
                Store(store.folder, "some_stage").put_json(other, [1, 2])
                assert Store(store.folder, "some_stage").json(other) == [1, 2]

    monkeypatch.setattr(os, "fsync", interrupted)
    store.put_json("k", [1, 2])
    assert events and store.json("k") == [1, 2]
    names = {"k.json", "other.json"} if meanwhile == "another starts" else {"k.json"}
    assert {path.name for path in store.folder.iterdir()} == names


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".half.json").write_text("{")
    (tmp_path / "..half.json.partial").write_text("{")
    store = Store(tmp_path, "some_stage")
    store.put_json("k", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["k.json"]
