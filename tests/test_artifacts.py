import errno
import os

import numpy as np
import pytest

from lpovod.artifacts import (
    atomic,
    check_made_from,
    fingerprint,
    identity,
    read_identity,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from lpovod.config import PseudoLabelsSettings
from lpovod.exceptions import LpovodError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(RuntimeError), atomic(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with atomic(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_attempt_leaves_the_earlier_file_and_its_remains_are_overwritten(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("earlier")
    (tmp_path / ".file.txt.partial").write_text("of a killed attempt")
    with pytest.raises(RuntimeError), atomic(path) as partial:
        assert not partial.exists()
        raise RuntimeError
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_a_folder_is_moved_too(tmp_path):
    (tmp_path / "folder").mkdir()
    for _ in range(2):
        with atomic(tmp_path / "link") as partial:
            partial.symlink_to(tmp_path / "folder")
    assert (tmp_path / "link").resolve() == (tmp_path / "folder").resolve()


def test_identity_digests_files_and_states_settings(tmp_path):
    path = tmp_path / "input"
    path.write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(path) == abc
    ident = identity("pseudo_labels", PseudoLabelsSettings(k=5), shard=path, weights="digest")
    assert ident["inputs"] == {"shard": abc, "weights": "digest"}
    assert ident["settings"].items() >= {"k": 5, "objectness": 0.6}.items()
    assert ident["stage"] == "pseudo_labels"


def test_fingerprint_depends_on_content_alone():
    one = {"stage": "x", "inputs": {"a": "1", "b": "2"}}
    assert fingerprint(one) == fingerprint({"inputs": {"b": "2", "a": "1"}, "stage": "x"})
    assert fingerprint(one) != fingerprint({**one, "stage": "y"})


def test_an_artifact_of_another_input_is_refused(tmp_path):
    ours, others = tmp_path / "ours", tmp_path / "others"
    ours.write_text("ours")
    others.write_text("others")
    ident = identity("region_embeddings", proposals=ours)
    check_made_from(tmp_path / "shard", ident, "proposals", ours)
    check_made_from(tmp_path / "shard", ident, "proposals", sha256(ours))
    with pytest.raises(LpovodError) as error:
        check_made_from(tmp_path / "shard", ident, "proposals", others)
    for part in (
        "shard",
        str(others),
        sha256(ours)[:12],
        sha256(others)[:12],
        f"--forcerun {tmp_path}",
    ):
        assert part in str(error.value)
    with pytest.raises(LpovodError, match="other dataset"):
        check_made_from(tmp_path / "shard", ident, "dataset", ours)


def test_tensors_come_back_with_their_identity(tmp_path):
    path, ident = tmp_path / "t.safetensors", identity("linear_probe")
    tensors = {
        "traffic light": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.array([1, 2], np.float16),
        "scalar": np.array(3, np.int64),
    }
    write_tensors(path, tensors, ident)
    read, found = read_tensors(path, "linear_probe")
    assert found == ident == read_identity(path)
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    rows = {name: np.ones(3, np.float32) for name in ("b", "a", "c")}
    write_tensors(tmp_path / "1", rows, identity("s", {"x": 1, "y": 2}))
    write_tensors(tmp_path / "2", rows, identity("s", {"y": 2, "x": 1}))
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_tensor_files_that_cannot_be_trusted_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(LpovodError, match="no such file"):
        read_tensors(path, "linear_probe")
    write_tensors(path, {"a": np.ones(100)}, identity("linear_probe"))
    with pytest.raises(LpovodError, match="written by stage linear_probe, expected text"):
        read_tensors(path, "text_embeddings")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(LpovodError, match="not a whole"):
        read_tensors(path, "linear_probe")
    from safetensors.numpy import save_file

    save_file({"a": np.ones(3)}, path)
    with pytest.raises(LpovodError, match="no identity"):
        read_identity(path)


def test_json_is_sorted_and_damage_is_named(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [1.5, None]})
    assert path.read_text() == '{"a":[1.5,null],"b":1}\n'
    assert read_json(path) == {"a": [1.5, None], "b": 1}
    path.write_text('{"a": ')
    with pytest.raises(LpovodError, match=r"x.json is not valid json"):
        read_json(path)
    with pytest.raises(LpovodError, match="no such file"):
        read_json(tmp_path / "y.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_is_named_and_the_old_file_stays(tmp_path, number, kind):
    path = tmp_path / "a.json"
    write_json(path, 1)
    message = r"a\.json cannot be written: .*Free some disk space and rerun the command"
    with pytest.raises(LpovodError, match=message), atomic(path):
        raise kind(f"write failed, errno = {number}, '{os.strerror(number)}'")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert read_json(path) == 1


def test_another_error_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), atomic(tmp_path / "a"):
        raise RuntimeError("something else")
