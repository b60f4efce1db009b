import subprocess
import sys

import numpy as np
import pytest
import yaml
from conftest import make_clip, make_world, write_proposals
from PIL import Image

from lpovod.apps.search import search
from lpovod.clip import load_clip
from lpovod.config import RegionEmbeddingsSettings, RegionIndexSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.index import Piece
from lpovod.formats.regions import RegionStore, Shard
from lpovod.search import best_rows
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_index import build_region_index

COUNTS = {7: 4, 3: 9, 900: 0, 41: 1, 20: 6}


@pytest.fixture
def run(tmp_path, tiny_clip, monkeypatch):
    """A folder as a run leaves it, with index but without detector."""
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "results" / "tried"
    world = make_world(results / "dataset", COUNTS, name="train.images.json")
    settings = RegionEmbeddingsSettings(batch_size=16)
    shards = [results / "region_embeddings" / "train" / f"{n}.h5" for n in range(2)]
    for number, path in enumerate(shards):
        proposals, checkpoint = tmp_path / f"{number}.h5", path.with_suffix(".checkpoint")
        shard = Shard(number, 2)
        write_proposals(proposals, world.dataset, world.boxes, world.objectness, shard)
        embed_regions(world.dataset, proposals, tiny_clip, settings, checkpoint, "", path)
    build_region_index(shards, RegionIndexSettings(), results / "region_index" / "train.index")
    content = {
        "name": "other",
        "classes": {"base": ["square"], "novel": ["star"]},
        "clip": tiny_clip.model_dump(mode="json"),
        "text_embeddings": {"templates": ["a photo of a {}"]},
        "pseudo_labels": {"objectness": 0.99},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "mine.yaml").write_text("name: tried\npseudo_labels: {objectness: 0}\n")
    return world, RegionStore(shards, "region_embeddings")


@pytest.mark.parametrize("centred", [False, True])
def test_the_regions_nearest_to_each_text_are_printed_and_drawn(
    run, tmp_path, tiny_clip, capsys, centred
):
    world, store = run
    texts, sheet = ("a unicycle", "dog"), tmp_path / "drawn" / "sheet.png"
    overlay = {"name": "tried", "pseudo_labels": {"objectness": 0, "centred": centred}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    found = search(texts, (tmp_path / "mine.yaml",), k=7, output=sheet)
    blocks = list(store.blocks(100))
    vectors = np.concatenate([b["embedding"] for b in blocks]).astype(np.float64)
    boxes, image_ids = (
        np.concatenate([getattr(b, a) for b in blocks]) for a in ("box", "image_id")
    )
    prompts = [f"a photo of a {t}" for t in (*texts, "square")]
    text = load_clip(tiny_clip).encode_texts(prompts).numpy()
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    if centred:
        text -= text[2]
        text /= np.linalg.norm(text, axis=1, keepdims=True).clip(1e-9)
    printed = capsys.readouterr().out
    for regions, vector, name in zip(found, text[:2], texts, strict=True):
        best = np.argsort(-(vectors @ vector))[:7]
        assert [r["image_id"] for r in regions] == image_ids[best].tolist()
        np.testing.assert_allclose([r["bbox"][:2] for r in regions], boxes[best][:, :2])
        np.testing.assert_allclose(
            [r["cosine"] for r in regions], (vectors @ vector)[best], atol=1e-6
        )
        assert name in printed
        assert all(f"{r['cosine']:.4f}" in printed for r in regions)
    picture = np.asarray(Image.open(sheet)).astype(int)
    assert ((picture - [255, 0, 0]) == 0).all(axis=2).sum() > 14 * 20  # outlines of the boxes


def test_the_floor_and_the_folder_can_be_given(run, tmp_path):
    world, _ = run
    floor = float(np.sort(np.concatenate(list(world.objectness.values())))[-3])
    (regions,) = search(("dog",), results=tmp_path / "results" / "tried", objectness=floor)
    assert len(regions) == 3
    assert min(r["score"] for r in regions) == np.float32(floor)


def test_a_run_without_an_index_is_named(run, tmp_path):
    with pytest.raises(LpovodError, match=r"other/region_index/train.index: no such file"):
        search(("dog",))


def test_other_clip_weights_are_refused(run, tmp_path):
    (tmp_path / "clip").mkdir()
    other = make_clip(tmp_path / "clip", seed=1).model_dump(mode="json")
    overlay = yaml.safe_load((tmp_path / "mine.yaml").read_text()) | {"clip": other}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    with pytest.raises(LpovodError, match="other clip_weights"):
        search(("dog",), (tmp_path / "mine.yaml",))


def half_products(vectors: np.ndarray, rows: np.ndarray, k: int) -> tuple:
    """A card's search, rounded far more than a card would: inputs and products to float16."""
    halves = vectors.astype(np.float16).astype(np.float32), rows.astype(np.float32)
    products = (halves[0] @ halves[1].T).astype(np.float16).astype(np.float32)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(products, order, axis=1), order


@pytest.mark.parametrize("k", [1, 20, 300])
def test_a_card_that_rounds_changes_no_bit_and_no_tie(k):
    random = np.random.default_rng(0)
    rows = random.standard_normal((9000, 32))
    near = (
        rows[:1] + random.standard_normal((1000, 32)) * 1e-3
    )  # products closer than float16 tells
    # Equal ones far apart, and more in one piece than a card returns.
    rows = np.concatenate([near[:50], rows, near, near[:50]])
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    queries = random.standard_normal((3, 32))
    queries = np.concatenate([near[:1], queries])
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    allowed = np.flatnonzero(random.random(len(rows)) < 0.8)
    pieces = [
        Piece(part, allowed[(allowed >= start) & (allowed < start + 700)] - start)
        for start in range(0, len(rows), 700)
        for part in [rows[start : start + 700]]
    ]
    pieces.insert(4, Piece(rows[:0], np.empty(0, np.int64)))
    calls = []

    def rough(*arguments):
        calls.append(arguments[2])
        return half_products(*arguments)

    expected, found = best_rows(queries, pieces, k), best_rows(queries, pieces, k, rough=rough)
    exact = rows[allowed].astype(np.float64) @ queries.astype(np.float64).T
    for query, (one, other) in enumerate(zip(expected, found, strict=True)):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
        kth = np.sort(exact[:, query].astype(np.float32))[-k]
        assert set(other[1]) == set(np.flatnonzero(exact[:, query].astype(np.float32) >= kth))
    assert len(calls) > 5 and max(calls) <= 128


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong():
    command = [sys.executable, "-m", "lpovod.apps.main", "search", "dog"]
    done = subprocess.run(
        [*command, "--configfile", "nowhere.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "error: nowhere.yaml: no such file" in done.stderr
