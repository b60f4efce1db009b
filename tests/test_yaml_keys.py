"""A key given twice is named with its line, before yaml drops the first."""

import pytest

from lpovod.exceptions import LpovodError
from lpovod.yaml_keys import check_repeated


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: {b: 1}\nc: 1\na: {d: 2}", "line 3: a"),
        ("a:\n  b: 1\n  b: 2", "line 3: b"),
        ("a:\n- {b: 1, b: 2}", "line 2: b"),
    ],
)
def test_it_is_named(tmp_path, text, place):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(LpovodError, match=f"mine.yaml, {place}$"):
        check_repeated([tmp_path / "mine.yaml"])


@pytest.mark.parametrize("text", ["a: {b: 1}\nc: {b: 1}", "", "- a\n- a", "a: ["])
def test_other_files_are_left_to_their_reader(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    check_repeated([tmp_path / "mine.yaml", tmp_path / "none.yaml"])
