import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_clip

from lpovod.artifacts import identity, read_identity, sha256, write_tensors
from lpovod.clip import load_clip
from lpovod.config import ClassSettings, ClipSettings, TextEmbeddingsSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.class_embeddings import read_text_embeddings
from lpovod.stages.text_embeddings import embed_classes

BARE = TextEmbeddingsSettings()
ENSEMBLE = TextEmbeddingsSettings(templates=["{}", "a photo of a {}", "many {}s"])


def embed(
    names: list[str], clip: ClipSettings, settings: TextEmbeddingsSettings, output: Path
) -> None:
    """Embed base classes; the one novel class and the store are beside the output."""
    beside = output.with_name(f"{output.name}.novel"), output.with_name("store")
    classes = ClassSettings(base=names, novel=["zebra"])
    embed_classes(classes, clip, settings, output, *beside, code="c")


def test_a_bare_name_is_its_unit_vector(tiny_clip, tmp_path):
    names = ["traffic light", "dog"]
    embed(names, tiny_clip, BARE, tmp_path / "t")
    read = read_text_embeddings(tmp_path / "t")
    model = load_clip(tiny_clip)
    assert sorted(read.names) == ["dog", "traffic light"]
    assert read.vectors.dtype == np.float32
    assert read.logit_scale == pytest.approx(model.logit_scale)
    assert read.clip_weights == sha256(tiny_clip.weights)
    for name, vector in zip(read.names, read.vectors, strict=True):
        raw = model.encode_texts([name]).numpy()[0]
        np.testing.assert_allclose(vector, raw / np.linalg.norm(raw), atol=1e-5)


def test_templates_are_averaged_as_unit_vectors(tiny_clip, tmp_path):
    embed(["dog", "cat"], tiny_clip, ENSEMBLE, tmp_path / "t")
    read = read_text_embeddings([tmp_path / "t"])
    raw = load_clip(tiny_clip).encode_texts(["dog", "a photo of a dog", "many dogs"]).numpy()
    mean = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).mean(axis=0)
    expected = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(read.vectors[read.names.index("dog")], expected, atol=1e-5)
    assert np.linalg.norm(read.vectors, axis=1) == pytest.approx(1, abs=1e-6)


def test_the_file_says_what_it_was_made_from(tiny_clip, tmp_path):
    embed(["dog"], tiny_clip, ENSEMBLE, tmp_path / "t")
    ident = read_identity(tmp_path / "t")
    assert ident["settings"]["templates"] == ENSEMBLE.templates
    assert ident["inputs"] == {
        "clip_weights": sha256(tiny_clip.weights),
        "clip_architecture": sha256(tmp_path / tiny_clip.architecture),
    }
    assert ident["logit_scale"] == pytest.approx(load_clip(tiny_clip).logit_scale)


def test_a_class_made_alone_equals_the_class_among_others(tiny_clip, tmp_path):
    for folder in ("a", "b"):  # each with a store of its own
        (tmp_path / folder).mkdir()
    embed(["dog", "cat", "bus"], tiny_clip, ENSEMBLE, tmp_path / "a/all")
    embed(["cat"], tiny_clip, ENSEMBLE, tmp_path / "b/one")
    together = read_text_embeddings(tmp_path / "a/all")
    alone = read_text_embeddings(tmp_path / "b/one")
    np.testing.assert_array_equal(alone.vectors[0], together.vectors[together.names.index("cat")])


def test_base_and_novel_classes_have_a_file_each(tiny_clip, tmp_path):
    classes = ClassSettings(
        base=["dog", "traffic light"], novel=["cat", {"name": "狗", "prompt": "a red dog"}]
    )
    outputs = tmp_path / "base", tmp_path / "novel"
    embed_classes(classes, tiny_clip, ENSEMBLE, *outputs, tmp_path / "store", code="c")
    base, novel = (read_text_embeddings(path) for path in outputs)
    assert (sorted(base.names), sorted(novel.names)) == (classes.base, ["cat", "狗"])
    texts = ["a red dog", "a photo of a a red dog", "many a red dogs"]
    raw = load_clip(tiny_clip).encode_texts(texts).numpy()
    mean = (raw / np.linalg.norm(raw, axis=1, keepdims=True)).mean(axis=0)
    vector = novel.vectors[novel.names.index("狗")]
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)


def test_files_are_merged(tiny_clip, tmp_path):
    embed(["dog"], tiny_clip, BARE, tmp_path / "a")
    embed(["cat", "bus"], tiny_clip, BARE, tmp_path / "b")
    merged = read_text_embeddings([tmp_path / "a", tmp_path / "b"])
    assert merged.names == ["dog", "bus", "cat"]
    alone = read_text_embeddings(tmp_path / "b")
    np.testing.assert_array_equal(merged.vectors[1:], alone.vectors)


def test_files_that_do_not_belong_together_are_refused(tiny_clip, tmp_path):
    embed(["dog"], tiny_clip, BARE, tmp_path / "a")
    embed(["dog", "cat"], tiny_clip, BARE, tmp_path / "b")
    with pytest.raises(LpovodError, match=r"class 'dog' is both in .*a and in .*b"):
        read_text_embeddings([tmp_path / "a", tmp_path / "b"])
    embed(["bus"], tiny_clip, ENSEMBLE, tmp_path / "c")
    with pytest.raises(LpovodError, match=r"c and .*a were made with different templates"):
        read_text_embeddings([tmp_path / "a", tmp_path / "c"])
    (tmp_path / "other").mkdir()
    embed(["bus"], make_clip(tmp_path / "other", seed=1), BARE, tmp_path / "d")
    with pytest.raises(LpovodError, match=r"d and .*a were made with different clip_weights"):
        read_text_embeddings([tmp_path / "a", tmp_path / "d"])
    with pytest.raises(LpovodError, match="no file"):
        read_text_embeddings([])


@pytest.mark.parametrize("vector", [[3.0, 4.0], [np.nan, 0.0], [[0.6, 0.8]]])
def test_a_vector_that_is_not_of_unit_length_is_refused(tmp_path, vector):
    ident = identity("text_embeddings", clip_weights="w", clip_architecture="a")
    tensors = {"cat": np.array([0.6, 0.8], np.float32), "dog": np.array(vector, np.float32)}
    write_tensors(tmp_path / "t", tensors, ident | {"logit_scale": 100.0})
    with pytest.raises(LpovodError, match="embedding of 'dog'"):
        read_text_embeddings(tmp_path / "t")


def test_rows_of_a_file_stand_in_for_prompts(tiny_clip, tmp_path):
    names = ["dog", "cat", "bus", "traffic light", "zebra"]
    raw = load_clip(tiny_clip).encode_texts(names).numpy() * 10
    np.save(tmp_path / "rows.npy", raw)
    (tmp_path / "names.json").write_text(json.dumps(names))
    settings = TextEmbeddingsSettings(file=tmp_path / "rows.npy", classes=tmp_path / "names.json")
    embed(["bus", "dog"], tiny_clip, settings, tmp_path / "t")
    read = read_text_embeddings(tmp_path / "t")
    for name, vector in zip(read.names, read.vectors, strict=True):
        row = raw[names.index(name)]
        np.testing.assert_allclose(vector, row / np.linalg.norm(row), atol=1e-6)
    assert read.clip_weights == sha256(tiny_clip.weights)  # retrieval checks it
    with pytest.raises(LpovodError, match="does not list the class 'cow'"):
        embed(["cow"], tiny_clip, settings, tmp_path / "u")

    without = tiny_clip.model_copy(update={"weights": None})
    embed(["bus"], without, settings, tmp_path / "v")
    alone = read_text_embeddings(tmp_path / "v")
    assert alone.logit_scale is None and alone.clip_weights == "none"

    (tmp_path / "names.json").write_text(json.dumps(names[1:] + names[:1]))
    with pytest.raises(LpovodError, match="of 5 rows are most similar"):
        embed(["bus"], tiny_clip, settings, tmp_path / "w")


def test_reading_and_retrieval_load_no_torch():
    code = (
        "import sys, lpovod.formats.class_embeddings;"
        "import lpovod.stages.region_index, lpovod.stages.pseudo_labels;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
