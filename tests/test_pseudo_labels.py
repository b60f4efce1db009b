import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shards
from torchvision.ops import box_area, box_iou

from lpovod.artifacts import identity, read_json, write_tensors
from lpovod.config import PseudoLabelsSettings, RegionIndexSettings
from lpovod.exceptions import LpovodError
from lpovod.formats.pseudo_labels import read_ignored, read_pseudo_labels
from lpovod.stages.pseudo_labels import retrieve
from lpovod.stages.region_index import build_region_index

SHARED = Path(__file__).parents[2] / "shared" / "data"
DIMENSION = 32


@dataclass
class Retrieval:
    """All inputs of the stage on disk, and the dense form of the regions."""

    folder: Path
    text: np.ndarray
    dataset: Path
    shards: list[Path]
    rows: list[tuple[int, int]]
    vectors: np.ndarray
    boxes: np.ndarray
    objectness: np.ndarray

    def run(self, k=10, floor=0.0, per_image=None, nms=None, **changed) -> dict:
        given = {
            "names": ["traffic light"],
            "text_embeddings": self.folder / "text.safetensors",
            "base_text_embeddings": self.folder / "base.safetensors",
            "index": self.folder / "index",
            "shards": self.shards,
            "dataset": self.dataset,
            "settings": PseudoLabelsSettings(k=k, objectness=floor, per_image=per_image, nms=nms),
            "output": self.folder / "out.json",
            "store": self.folder / "store",
            "code": "c",
        } | changed
        retrieve(**given)
        return read_json(given["output"])

    def dense(self, k, floor=0.0, query=None):
        """Rows of the exact answer."""
        cosine = self.vectors.astype(np.float32) @ (self.text if query is None else query)
        allowed = [n for n in range(len(cosine)) if self.objectness[n] >= np.float32(floor)]
        return sorted(allowed, key=lambda n: (-cosine[n], self.rows[n]))[:k], cosine


def make(folder, seed=0, images=30, factory="SQfp16", vectors=None, text=None, clip="w" * 64):
    random = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    if text is None:
        text = random.standard_normal(DIMENSION)
        text = (text / np.linalg.norm(text)).astype(np.float32)
    if vectors is None:
        vectors = {}
        for image_id in random.choice(500_000, images, replace=False).tolist():
            rows = random.standard_normal((int(random.integers(0, 12)), len(text)))
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            vectors[image_id] = rows.astype(np.float16)
    boxes, objectness = {}, {}
    for image_id, rows in vectors.items():
        low = random.uniform(0, 50, (len(rows), 2))
        box = np.concatenate([low, low + random.uniform(1, 50, low.shape)], axis=1)
        boxes[image_id] = box.astype(np.float32)
        objectness[image_id] = random.uniform(0, 1, len(rows)).astype(np.float32)
    listed = [
        {"id": i, "file_name": f"{i}.jpg", "width": 100, "height": 101} for i in sorted(vectors)
    ]
    dataset = folder / "train.json"
    content = {"images": listed, "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    dataset.write_text(json.dumps(content))
    made_from = identity("text_embeddings", clip_weights=clip, clip_architecture="a")
    tensors = {"traffic light": text, "other": np.eye(len(text), dtype=np.float32)[0]}
    write_tensors(folder / "text.safetensors", tensors, made_from | {"logit_scale": 100.0})
    base = {"dog": text[::-1].copy(), "cat": np.eye(len(text), dtype=np.float32)[1]}
    write_tensors(folder / "base.safetensors", base, made_from | {"logit_scale": 100.0})
    shards = write_shards(folder, dataset, vectors, boxes, objectness)
    build_region_index(
        shards, RegionIndexSettings(factory=factory, block_rows=64), folder / "index"
    )
    rows = [(i, n) for i, v in vectors.items() for n in range(len(v))]
    dense = (np.concatenate(list(d.values())) for d in (vectors, boxes, objectness))
    return Retrieval(folder, text, dataset, shards, rows, *dense)


@pytest.mark.parametrize("factory", ["SQfp16", "Flat"])
@pytest.mark.parametrize(("k", "floor"), [(1, 0.0), (10, 0.0), (25, 0.6), (100, 0.3)])
def test_retrieval_is_the_dense_top_k(tmp_path, factory, k, floor):
    data = make(tmp_path, images=60, factory=factory)
    content = data.run(k, floor)
    best, cosine = data.dense(k, floor)
    labels = content["annotations"]
    assert [a["image_id"] for a in labels] == [data.rows[n][0] for n in best]
    assert [a["cosine"] for a in labels] == pytest.approx(cosine[best].tolist(), abs=1e-6)
    assert [a["score"] for a in labels] == data.objectness[best].tolist()
    assert [a["id"] for a in labels] == list(range(1, k + 1))
    low = data.boxes[best].astype(np.float64)
    np.testing.assert_allclose([a["bbox"][:2] for a in labels], low[:, :2])
    np.testing.assert_allclose([a["bbox"][2:] for a in labels], low[:, 2:] - low[:, :2])


def test_the_layout_is_the_original_s(tmp_path):
    data = make(tmp_path)
    content = data.run(20)
    category = {"id": 1, "name": "traffic light", "split": "novel"}
    assert content["categories"] == [category]
    for label in content["annotations"]:
        assert label["category_id"] == 1
        assert label["iscrowd"] == 0
        assert label["segmentation"] == []
        assert label["area"] == pytest.approx(label["bbox"][2] * label["bbox"][3])
    retrieved = {a["image_id"] for a in content["annotations"]}
    assert {i["id"] for i in content["images"]} == retrieved
    assert len(content["images"]) == len(retrieved) < 20
    assert content["images"][0].keys() == {"id", "file_name", "width", "height"}
    assert content["info"]["identity"]["settings"] == {
        "k": 20,
        "objectness": 0.0,
        "centred": False,
        "ignored": 0,
        "per_image": None,
        "nms": None,
        "file": None,
    }
    assert content["annotations"][0].keys() == {
        *("id", "image_id", "category_id", "iscrowd", "segmentation"),
        *("bbox", "area", "score", "cosine"),
    }


def test_a_centred_query_is_the_name_less_the_mean_of_the_base_classes(tmp_path):
    data = make(tmp_path, images=60)
    base = np.stack([data.text[::-1], np.eye(DIMENSION)[1]])
    query = data.text - base.mean(axis=0)
    query /= np.linalg.norm(query)
    best, cosine = data.dense(25, 0.3, query)
    assert best != data.dense(25, 0.3)[0]
    settings = PseudoLabelsSettings(k=25, objectness=0.3, centred=True)
    labels = data.run(settings=settings)["annotations"]
    assert [a["image_id"] for a in labels] == [data.rows[n][0] for n in best]
    assert [a["cosine"] for a in labels] == pytest.approx(cosine[best].tolist(), abs=1e-6)
    with pytest.raises(LpovodError, match="Set pseudo_labels.centred to false"):
        data.run(settings=settings, base_text_embeddings=same_as_the_name(data))


def same_as_the_name(data: Retrieval) -> Path:
    """Embeddings of one base class, which is the class that is looked for."""
    path = data.folder / "same.safetensors"
    ident = identity("text_embeddings", clip_weights="w" * 64, clip_architecture="a")
    write_tensors(path, {"dog": data.text}, ident | {"logit_scale": 100.0})
    return path


def test_the_most_similar_objects_of_any_objectness_are_ignored(tmp_path):
    """Down the ranking, by torchvision's areas: regions of an object that has none yet."""
    data = make(tmp_path, images=20)
    content = data.run(settings=PseudoLabelsSettings(k=10, objectness=0.6, ignored=60))
    better, cosine = data.dense(10, 0.6)
    boxes = torch.from_numpy(data.boxes)
    area = box_area(boxes)
    iou = box_iou(boxes, boxes)
    shared = iou * (area[:, None] + area) / (1 + iou)
    part = shared / torch.minimum(area[:, None], area)
    expected = []
    for n in data.dense(60)[0]:
        here = [m for m in better + expected if data.rows[m][0] == data.rows[n][0]]
        if all(part[n, m] < 0.6 for m in here):
            expected.append(n)
    assert 10 < len(expected) < 45 and min(data.objectness[expected]) < 0.6
    ignored = [a for a in content["annotations"] if a["iscrowd"]]
    assert [a["image_id"] for a in ignored] == [data.rows[n][0] for n in expected]
    assert [a["cosine"] for a in ignored] == pytest.approx(cosine[expected].tolist(), abs=1e-6)
    assert [a["id"] for a in content["annotations"]] == list(range(1, 11 + len(expected)))
    assert {i["id"] for i in content["images"]} == {a["image_id"] for a in content["annotations"]}
    labels = read_pseudo_labels(data.folder / "out.json")["traffic light"]
    assert sum(len(found) for found, _ in labels.values()) == 10
    read = read_ignored(data.folder / "out.json")
    for image_id, found in read.items():
        rows = [n for n in expected if data.rows[n][0] == image_id]
        assert {*map(tuple, found)} == {*map(tuple, data.boxes[rows])}
    assert sum(len(found) for found in read.values()) == len(expected)


def test_equal_regions_are_ordered_by_image_id_and_place(tmp_path):
    text = np.eye(DIMENSION, dtype=np.float32)[3]
    same = np.tile(text, (40, 1)).astype(np.float16)
    data = make(tmp_path, vectors={9: same, 300: same, 4: same[:1], 7: -same}, text=text)
    labels = data.run(50)["annotations"]
    assert [a["image_id"] for a in labels] == [4] + [9] * 40 + [300] * 9
    np.testing.assert_allclose(labels[-1]["bbox"][:2], data.boxes[48][:2])
    assert {a["cosine"] for a in labels} == {1.0}


@pytest.mark.parametrize(("per_image", "nms"), [(1, None), (2, None), (None, 0.2), (2, 0.1)])
@pytest.mark.parametrize("k", [15, 40])
def test_regions_of_one_image_are_limited(tmp_path, per_image, nms, k):
    """The definition: down the exact ranking of all regions, against torchvision's IoU."""
    data = make(tmp_path, images=12)
    ranked, _ = data.dense(len(data.rows), 0.2)
    iou = box_iou(torch.from_numpy(data.boxes), torch.from_numpy(data.boxes)).numpy()
    taken = []
    for n in ranked:
        mine = [m for m in taken if data.rows[m][0] == data.rows[n][0]]
        if len(mine) < (per_image or 99) and all(iou[n, m] <= (nms or 1) for m in mine):
            taken.append(n)
    assert taken[:k] != ranked[:k]
    labels = data.run(k, 0.2, per_image, nms)["annotations"]
    assert [a["image_id"] for a in labels] == [data.rows[n][0] for n in taken[:k]]
    corners = np.array([a["bbox"][:2] for a in labels])
    np.testing.assert_allclose(corners, data.boxes[taken[:k]][:, :2])


def test_a_limit_is_kept_where_one_image_has_all_that_is_near(tmp_path):
    """More than what is asked for at first: 4 * K regions of image 9 come first."""
    text = np.eye(DIMENSION, dtype=np.float32)[3]
    same = np.tile(text, (60, 1)).astype(np.float16)
    data = make(tmp_path, vectors={9: same, 300: same / 2, 4: -same}, text=text)
    labels = data.run(3, per_image=1)["annotations"]
    assert [a["image_id"] for a in labels] == [9, 300, 4]


def test_an_index_that_is_not_exact_states_its_recall(tmp_path, logged):
    exact = make(tmp_path / "a", images=80).run(50)
    assert "recall" not in exact["info"]
    rough = make(tmp_path / "b", images=80, factory="IVF32,PQ2x4").run(50)
    pairs = [{(a["image_id"], *a["bbox"]) for a in c["annotations"]} for c in (exact, rough)]
    recall = len(pairs[0] & pairs[1]) / 50
    assert rough["info"]["recall"] == {"traffic light": recall}
    assert 0 < recall < 1
    assert f"recall {recall:.3f} of the exact ones" in logged.text


def test_the_floor_itself_is_above_the_floor(tmp_path):
    data = make(tmp_path)
    floor = float(np.sort(data.objectness)[-5])
    assert len(data.run(100, floor)["annotations"]) == 5


def test_fewer_than_k_regions_are_kept_with_a_warning(tmp_path, logged):
    data = make(tmp_path)
    floor = float(np.sort(data.objectness)[-5])
    best, _ = data.dense(5, floor)
    labels = data.run(6, floor)["annotations"]
    assert [a["image_id"] for a in labels] == [data.rows[n][0] for n in best]
    (warning,) = warnings(logged)
    assert warning.startswith("fewer than 6 regions: traffic light;")
    assert f"objectness of {floor}" in warning
    logged.clear()
    data.run(5, floor)
    assert warnings(logged) == []


def warnings(logged) -> list[str]:
    return [r.getMessage() for r in logged.records if r.levelno >= logging.WARNING]


def test_classes_of_one_search_are_limited_one_by_one(tmp_path):
    """Each class as if it were alone, although some need another, wider search."""
    text = np.eye(DIMENSION, dtype=np.float32)[3]
    same = np.tile(text, (60, 1)).astype(np.float16)
    other = np.tile(np.eye(DIMENSION)[0], (2, 1)).astype(np.float16)
    data = make(tmp_path, vectors={9: same, 300: same / 2, 4: -same, 5: other}, text=text)
    together = data.run(3, per_image=1, names=["other", "traffic light"])["annotations"]
    for category, name in enumerate(["other", "traffic light"], 1):
        alone = data.run(3, per_image=1, names=[name], store=tmp_path / name)["annotations"]
        mine = [a for a in together if a["category_id"] == category]
        assert [a["image_id"] for a in mine] == [a["image_id"] for a in alone]
        assert len(mine) == 3


def test_no_region_above_the_floor_is_an_error(tmp_path):
    data = make(tmp_path)
    floor = float(np.nextafter(data.objectness.max(), np.float32(1)))
    with pytest.raises(LpovodError, match=f"none of .*{floor}.*pseudo_labels.objectness"):
        data.run(5, floor)
    assert not (tmp_path / "out.json").exists()


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    data = make(tmp_path)
    data.run(10)
    for name, store in (("stored", "store"), ("again", "new")):
        shards = data.shards[::-1]
        data.run(10, output=tmp_path / f"{name}.json", shards=shards, store=tmp_path / store)
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "stored.json").read_bytes()
    assert (tmp_path / "out.json").read_bytes() == (tmp_path / "again.json").read_bytes()


def test_inputs_that_do_not_belong_together_are_refused(tmp_path):
    data, other = make(tmp_path / "a"), make(tmp_path / "b", seed=1)
    with pytest.raises(LpovodError, match="other dataset"):
        data.run(dataset=other.dataset)
    with pytest.raises(LpovodError, match="index was made from other region_embeddings"):
        data.run(index=tmp_path / "b" / "index")
    with pytest.raises(LpovodError, match="class 'dog' has no text embedding"):
        data.run(names=["dog"])
    make(tmp_path / "c", clip="v" * 64)
    for changed in (
        {"text_embeddings": tmp_path / "c" / "text.safetensors"},
        {"base_text_embeddings": tmp_path / "c" / "base.safetensors"},
    ):
        with pytest.raises(LpovodError, match="other clip_weights"):
            data.run(**changed)


def test_labels_are_read_by_class_name_and_image(tmp_path):
    data = make(tmp_path)
    content = data.run(10, names=["traffic light", "other"])
    assert [c["name"] for c in content["categories"]] == ["traffic light", "other"]
    assert [a["category_id"] for a in content["annotations"]] == [1] * 10 + [2] * 10
    assert [a["id"] for a in content["annotations"]] == list(range(1, 21))
    read = read_pseudo_labels(tmp_path / "out.json")
    assert list(read) == ["traffic light", "other"]
    best, _ = data.dense(10)
    for image_id, (boxes, scores) in read["traffic light"].items():
        mine = [n for n in best if data.rows[n][0] == image_id]
        assert (boxes.dtype, scores.dtype) == (np.float32, np.float32)
        np.testing.assert_allclose(boxes, data.boxes[mine], rtol=1e-6)
        np.testing.assert_array_equal(scores, data.objectness[mine])
    best, _ = data.dense(10, query=np.eye(DIMENSION)[0])
    for image_id, (boxes, _) in read["other"].items():
        mine = [n for n in best if data.rows[n][0] == image_id]
        np.testing.assert_allclose(boxes, data.boxes[mine], rtol=1e-6)
    assert sum(len(s) for _, s in read["other"].values()) == 10
    data.run(4, names=["other"])
    assert list(read_pseudo_labels(tmp_path / "out.json")) == ["other"]


def test_a_file_of_many_classes_is_read_as_the_original_wrote_it(tmp_path):
    label = {"segmentation": [], "area": 6.0, "iscrowd": 0, "cosine": 0.3}
    content = {
        "images": [{"file_name": f"{i}.jpg", "width": 50, "height": 60, "id": i} for i in (8, 3)],
        "annotations": [
            label | {"id": 1, "image_id": 8, "category_id": 5, "bbox": [1, 2, 3, 2], "score": 0.7},
            label | {"id": 2, "image_id": 3, "category_id": 17, "bbox": [0, 0, 2, 3], "score": 0.6},
            label | {"id": 3, "image_id": 8, "category_id": 5, "bbox": [4, 4, 6, 1], "score": 0.9},
        ],
        "categories": [
            {"supercategory": "person", "id": 1, "name": "person", "split": "seen"},
            {"supercategory": "vehicle", "id": 5, "name": "airplane", "split": "unseen"},
            {"supercategory": "animal", "id": 17, "name": "cat", "split": "unseen"},
        ],
    }
    (tmp_path / "all.json").write_text(json.dumps(content))
    read = read_pseudo_labels(tmp_path / "all.json")
    assert {name: list(images) for name, images in read.items()} == {"airplane": [8], "cat": [3]}
    boxes, scores = read["airplane"][8]
    assert boxes.tolist() == [[1, 2, 4, 4], [4, 4, 10, 5]]
    np.testing.assert_allclose(scores, [0.7, 0.9])
    del content["annotations"][1]["score"]
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(LpovodError, match="annotation 2 has no score"):
        read_pseudo_labels(tmp_path / "all.json")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the original's file")
def test_the_file_that_the_original_shipped():
    read = read_pseudo_labels(SHARED / "lp_ovod" / "retrieve_proposal_onl100.json")
    assert len(read) == 17
    assert all(sum(len(s) for _, s in images.values()) == 100 for images in read.values())
    assert min(s.min() for images in read.values() for _, s in images.values()) >= 0.6


@pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded retrieval")
def test_the_recorded_top_100_of_the_original_s_retrieval(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SHARED / "goldens")
    import oracle_inputs

    text, proposals, features, image_ids = oracle_inputs.retrieval_inputs()
    sys.modules.pop("oracle_inputs")
    golden = np.load(SHARED / "goldens" / "golden_retrieval.npz")
    ids = image_ids.tolist()
    number = 16
    data = make(
        tmp_path / str(number), vectors=dict(zip(ids, features, strict=True)), text=text[number]
    )
    objectness = {i: p[:, 4] for i, p in zip(ids, proposals, strict=True)}
    boxes = {i: p[:, :4] for i, p in zip(ids, proposals, strict=True)}
    vectors = dict(zip(ids, features, strict=True))
    data.shards = write_shards(data.folder, data.dataset, vectors, boxes, objectness)
    build_region_index(data.shards, RegionIndexSettings(), data.folder / "index")
    labels = data.run(100, 0.5)["annotations"]
    taken = [boxes[i][n][:2].tolist() for i, n in golden["exact_top100"][number].tolist()]
    assert sorted(a["bbox"][:2] for a in labels) == sorted(taken)
    # Recorded of fp16 rows brought to unit length again, which moves them by this much.
    cosines = [a["cosine"] for a in labels]
    np.testing.assert_allclose(cosines, golden["exact_cosine"][number], atol=2e-5)
