"""Other projects' files, made here in their true layouts: read, refused, and written again."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from recorded import original_name

from lpovod.artifacts import identity, read_identity, read_json, sha256, write_tensors
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    LinearProbeSettings,
    ProposalsSettings,
    PseudoLabelsSettings,
    RegionEmbeddingsSettings,
    RegionFeaturesSettings,
    RegionIndexSettings,
    TrainingSettings,
)
from lpovod.exceptions import LpovodError
from lpovod.formats.pseudo_labels import read_pseudo_labels
from lpovod.formats.regions import RegionStore, open_shards, read_proposals
from lpovod.importers.backbone import start_from
from lpovod.importers.checkpoints import (
    export_checkpoint,
    import_base_detector,
    import_linear_probe,
)
from lpovod.importers.openmmlab import read_checkpoint
from lpovod.importers.pickles import read_pickled_arrays
from lpovod.importers.proposals import import_proposals
from lpovod.importers.pseudo_labels import import_pseudo_labels
from lpovod.importers.text_rows import check_rows, read_rows
from lpovod.networks.backbone import ResNet
from lpovod.networks.detector import Detector
from lpovod.networks.detector_inference import load_detector
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.scoring import read_class_weights
from lpovod.stages.base_detector import train_base_detector
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_features import extract_split
from lpovod.stages.region_index import build_region_index

SHARED = Path("../shared/data")
SMALL = BackboneSettings(channels=8)
HEAD = BaseDetectorSettings(head_convolutions=1, dimension=12)
CATEGORIES = {1: "person", 3: "car", 5: "airplane", 13: "stop sign", 17: "cat", 86: "vase"}
BASE, NOVEL = ["vase", "person", "car"], ["cat", "airplane"]  # as a user may list them
IN_ORDER = {"base": ["person", "car", "vase"], "novel": ["airplane", "cat"]}


class Evil:
    """A pickle of this creates a file when it is loaded the ordinary way."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# ------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickled_arrays_of_every_protocol(tmp_path, protocol):
    content = [np.arange(10, dtype=np.float32).reshape(2, 5), np.zeros((0, 5), np.float64), "a", 1]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = read_pickled_arrays(tmp_path / "a.pkl")
    assert found[2:] == ["a", 1]
    for array, expected in zip(found[:2], content[:2], strict=True):
        np.testing.assert_array_equal(array, expected)
        assert array.dtype == expected.dtype


def test_arrays_pickled_before_numpy_2(tmp_path):
    # What numpy 1 wrote differs in the module's name alone.
    content = pickle.dumps([np.eye(2, dtype=np.float32)], 2)
    assert b"numpy._core.multiarray" in content
    old = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "a.pkl").write_bytes(old)
    np.testing.assert_array_equal(read_pickled_arrays(tmp_path / "a.pkl")[0], np.eye(2))


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    ran = tmp_path / "ran"
    content = pickle.dumps([np.zeros(3), Evil(ran)])
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(LpovodError, match=r"a.pkl is not a pickle of only numpy arrays \(it names"):
        read_pickled_arrays(tmp_path / "a.pkl")
    assert not ran.exists()
    pickle.loads(content)
    assert ran.exists()  # it would have


def test_a_damaged_pickle_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([np.zeros(300)])[:90])
    with pytest.raises(LpovodError, match="a.pkl is not a pickle"):
        read_pickled_arrays(tmp_path / "a.pkl")
    with pytest.raises(LpovodError, match="no such file"):
        read_pickled_arrays(tmp_path / "b.pkl")


# ----------------------------------------------------------------------------------- proposals


def rows_of(world) -> dict[int, np.ndarray]:
    return {i: np.hstack([world.boxes[i], world.objectness[i][:, None]]) for i in world.images}


def imported(world, tmp_path, content, id_map=None, name="p.pkl", **settings):
    file = tmp_path / name
    if name.endswith(".pkl"):
        file.write_bytes(pickle.dumps(content, 2))
    else:
        file.write_text(json.dumps(content))
    places = None
    if id_map is not None:
        places = tmp_path / "map.json"
        places.write_text(json.dumps(id_map))
    output = [tmp_path / f"imported/{number}.h5" for number in range(2)]
    import_proposals(world.dataset, file, ProposalsSettings(**settings), output, places)
    return read_proposals(output, world.dataset)


def check_same(store, world) -> None:
    assert set(store.image_ids) == set(world.images)
    for image_id in world.images:
        found, best = store.read(image_id), np.argsort(-world.objectness[image_id])
        np.testing.assert_array_equal(found.box, world.boxes[image_id][best])
        np.testing.assert_array_equal(found.objectness, world.objectness[image_id][best])


def test_proposals_in_annotation_order(world, tmp_path):
    check_same(imported(world, tmp_path, list(rows_of(world).values())), world)


def test_imported_proposals_are_divided_as_computed_ones(world, tmp_path):
    store = imported(world, tmp_path, list(rows_of(world).values()))
    assert [path.name for path in store.paths] == ["0.h5", "1.h5"]
    assert [RegionStore(path, "proposals").image_ids for path in store.paths] == [
        [3, 7],
        [20, 41, 900],
    ]


def test_proposals_by_the_map_of_image_ids(world, tmp_path):
    rows = rows_of(world)
    order = [20, 900, 3, 41, 7]
    unused = np.zeros((4, 5), np.float32)
    content = [unused, *(rows[i] for i in order)]
    places = {str(i): place for place, i in enumerate(order, 1)} | {"77": 0}
    check_same(imported(world, tmp_path, content, places), world)


def test_a_map_may_count_the_boxes_of_every_array(world, tmp_path):
    rows = rows_of(world)
    order = [20, 900, 3, 41, 7]
    content = [rows[i] for i in order]
    places = {str(i): place for place, i in enumerate(order)}
    places["num_proposal"] = [len(boxes) for boxes in content]
    check_same(imported(world, tmp_path, content, places), world)


@pytest.mark.parametrize("form", ["pickle", "results"])
def test_images_that_the_file_lacks_have_no_proposals_and_are_named(world, tmp_path, logged, form):
    rows = rows_of(world)
    if form == "pickle":
        store = imported(world, tmp_path, list(rows.values()), {"7": 0, "41": 3, "20": 4})
    else:
        results = [{"image_id": i, "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.5} for i in (7, 41, 20)]
        store = imported(world, tmp_path, results, name="p.json")
    assert set(store.image_ids) == set(world.images)
    assert [i for i in world.images if not store.count(i)] == [3, 900]
    (warning,) = [r.getMessage() for r in logged.records if r.levelname == "WARNING"]
    assert warning.startswith("2 of 5 images of ") and warning.endswith(": 3, 900")


@pytest.mark.parametrize("regions", ["rpn", "proposals"])
def test_images_without_proposals_go_through_all_stages(world, tmp_path, tiny_clip, regions):
    """Alone in a step of the training too, which then has nothing to imitate."""
    content = json.loads(world.dataset.read_text())
    box = {"category_id": 1, "bbox": [4.0, 5.0, 20.0, 15.0]}
    content["annotations"] = [box | {"id": i, "image_id": i} for i in world.images]
    world.dataset.write_text(json.dumps(content))
    proposals = [tmp_path / f"imported/{number}.h5" for number in range(2)]
    imported(world, tmp_path, list(rows_of(world).values()), {"7": 0, "41": 3, "20": 4})
    shards, features = ([tmp_path / f"{name}{n}.h5" for n in range(2)] for name in "ef")
    for given, shard in zip(proposals, shards, strict=True):
        settings = RegionEmbeddingsSettings(batch_size=16)
        embed_regions(world.dataset, given, tiny_clip, settings, tmp_path / "c", "", shard)
    build_region_index(shards, RegionIndexSettings(), tmp_path / "index")
    network = tmp_path / "network.safetensors"
    weights = ProposalNetwork(SMALL, 8.0).state_dict().items()
    write_tensors(network, {k: v.numpy() for k, v in weights}, identity("proposals"))
    schedule = TrainingSettings(epochs=1, milestones=[], images_per_step=1, short_sides=[64])
    head = HEAD.model_copy(update={"regions": regions, "training": schedule})
    outputs = (tmp_path / "c", "", tmp_path / "detector.safetensors", tmp_path / "history")
    train_base_detector(world.dataset, shards, network, SMALL, head, 0, *outputs)
    assert json.loads((tmp_path / "history").read_text())["distillation"] > 0
    for given, output in zip(proposals, features, strict=True):
        settings = RegionFeaturesSettings()
        extract_split(world.dataset, given, outputs[2], SMALL, head, settings, output)
    for paths, stage in ((shards, "region_embeddings"), (features, "region_features")):
        store = open_shards(paths, stage)
        counts = {i: store.count(i) for i in world.images}
        assert counts == {7: 4, 3: 0, 900: 0, 41: 1, 20: 6}


def test_proposals_in_coco_s_results_format(world, tmp_path):
    results = [
        {
            "image_id": image_id,
            "category_id": 1,
            "bbox": [float(v) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": float(score),
        }
        for image_id, rows in rows_of(world).items()
        for x1, y1, x2, y2, score in rows.astype(np.float64)
    ]
    check_same(imported(world, tmp_path, results[::-1], name="p.json"), world)
    with pytest.raises(LpovodError, match="detection 2: .*train.json has no image 5"):
        imported(world, tmp_path, [*results[:2], results[2] | {"image_id": 5}], name="p.json")
    with pytest.raises(LpovodError, match="detection 0 is not of the form image_id"):
        imported(world, tmp_path, [{"image_id": 7, "bbox": [1, 2, 3, 4]}], name="p.json")


def test_the_best_proposals_are_kept(world, tmp_path):
    store = imported(world, tmp_path, list(rows_of(world).values()), per_image=2)
    assert [store.count(i) for i in (7, 3, 900, 41, 20)] == [2, 2, 0, 1, 2]
    best = np.sort(world.objectness[3])[::-1][:2]
    np.testing.assert_array_equal(store.read(3).objectness, best)


def test_rounding_at_the_edge_is_clipped_and_thin_boxes_are_dropped(world, tmp_path):
    rows = rows_of(world)
    height, width = world.images[41].shape[:2]
    rows[41] = np.array(
        [[-0.4, 0, width + 0.4, height + 0.4, 0.9], [5, 5, 5.2, 30, 0.8]], np.float32
    )
    store = imported(world, tmp_path, list(rows.values()))
    assert store.read(41).box.tolist() == [[0, 0, width, height]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 1, 9, np.nan, 0.5], "is not finite"),
        ([9, 1, 1, 9, 0.5], "is inverted"),
        ([1, 1, 400, 9, 0.5], "lies outside the image"),
        ([-5, 1, 9, 9, 0.5], "lies outside the image"),
        ([1, 1, 9, 9, 1.5], r"has an objectness outside \[0, 1\]"),
    ],
)
def test_impossible_proposals_are_named(world, tmp_path, row, message):
    rows = rows_of(world)
    rows[20][4] = row
    with pytest.raises(LpovodError, match=f"image 20: proposal 4, .*{message}"):
        imported(world, tmp_path, list(rows.values()))


@pytest.mark.parametrize(
    ("change", "id_map", "message"),
    [
        (lambda rows: rows[:-1], None, "has 4 arrays, .*train.json 5 images"),
        (lambda rows: {"a": 1}, None, "holds a dict, expected a list"),
        (lambda rows: [rows[0][:, :4], *rows[1:]], None, r"image 7\) has shape \(4, 4\)"),
        (lambda rows: [[1], *rows[1:]], None, r"entry 0 \(image 7\) is not an array of floats"),
        (lambda rows: rows, {"7": 0, "3": 1}, "map.json has 2 of the 5 images of .*another split"),
        (lambda rows: rows, {}, "map.json has 0 of the 5 images of .*another split"),
        (
            lambda rows: rows,
            {"7": 0, "3": 1, "900": 2, "num_proposal": [4, 9, 0, 1, 5]},
            "map.json belongs to another file: its 'num_proposal' are not those of .*p.pkl",
        ),
        (lambda rows: rows, {"7": 0, "3": [1]}, "is not of the form"),
        (
            lambda rows: rows,
            {"7": 0, "3": 1, "900": 2, "41": 3, "20": 5},
            "image 20 has place 5 in .*map.json, .* has 5 arrays",
        ),
        (
            lambda rows: rows,
            {"7": 0, "3": 1, "900": 2, "41": 3, "20": 3},
            "gives several images one place",
        ),
    ],
)
def test_proposals_that_do_not_cover_the_images_are_refused(
    world, tmp_path, change, id_map, message
):
    with pytest.raises(LpovodError, match=message):
        imported(world, tmp_path, change(list(rows_of(world).values())), id_map)


# --------------------------------------------------------------------------------- checkpoints


def original_state(novel: bool = True) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    model = Detector(SMALL, HEAD, 3, 16)
    state = {}
    for name, tensor in model.state_dict().items():
        noise = torch.randn_like(tensor) if tensor.is_floating_point() else torch.tensor(7)
        state[original_name(name)] = noise
    state["rpn_head.rpn_conv.weight"] = torch.randn(8, 8, 3, 3)
    state["rpn_head.rpn_cls.bias"] = torch.randn(3)
    if novel:
        state["roi_head.prototype_novel"] = torch.randn(2, 12)
    return state


@pytest.fixture
def files(tmp_path):
    """A dataset's categories and a fine-tuned checkpoint as OpenMMLab's runner saves it."""
    content = {"images": [], "annotations": []}
    content["categories"] = [
        {"id": i, "name": n, "split": "base"} for i, n in sorted(CATEGORIES.items(), reverse=True)
    ]
    (tmp_path / "val.json").write_text(json.dumps(content))
    save(tmp_path, original_state())
    return tmp_path


def save(folder: Path, state: dict, meta: dict | None = None) -> None:
    meta = {"CLASSES": tuple(CATEGORIES.values()), "epoch": 12} if meta is None else meta
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    content = {"meta": meta, "state_dict": state, "optimizer": optimizer}
    torch.save(content, folder / "ft.pth")


def read_detector(files: Path, base: list[str] = BASE) -> Path:
    import_base_detector(
        files / "val.json",
        files / "ft.pth",
        base,
        SMALL,
        HEAD,
        files / "detector.safetensors",
        files / "history.jsonl",
    )
    return files / "detector.safetensors"


def read_probe(files: Path, novel: list[str] = NOVEL) -> Path:
    arguments = (files / "val.json", files / "ft.pth", files / "detector.safetensors")
    import_linear_probe(*arguments, novel, LinearProbeSettings(), files / "weights.safetensors")
    return files / "weights.safetensors"


def test_a_checkpoint_is_written_again_bit_for_bit(files):
    export_checkpoint(
        files / "val.json", read_detector(files), files / "out.pth", read_probe(files)
    )
    expected, found = original_state(), torch.load(files / "out.pth", weights_only=True)
    assert found["meta"]["CLASSES"] == tuple(CATEGORIES.values())
    assert found["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found["state_dict"][name], tensor), name
        assert found["state_dict"][name].dtype == tensor.dtype


@pytest.mark.parametrize("meta", [None, {}], ids=["classes stated", "classes of the dataset"])
def test_rows_go_to_their_classes(files, meta):
    state = original_state()
    save(files, state, meta)
    detector, probe = read_detector(files), read_probe(files)
    assert (files / "history.jsonl").read_text() == ""
    model, ident = load_detector(detector, SMALL, HEAD)
    assert ident["classes"] == IN_ORDER["base"]
    assert torch.equal(model.prototypes, state["roi_head.prototype"])
    ident = identity("text_embeddings", clip_weights="w", clip_architecture="a")
    rows = {n: np.eye(5, dtype=np.float32)[i] for i, n in enumerate([*BASE, *NOVEL])}
    write_tensors(files / "text", rows, ident | {"logit_scale": 100.0})
    from lpovod.config import EvaluationSettings

    classes = read_class_weights(detector, probe, [files / "text"], EvaluationSettings())
    assert classes.names == [*IN_ORDER["base"], *IN_ORDER["novel"]]
    weights = torch.cat([state["roi_head.prototype"], state["roi_head.prototype_novel"]])
    assert torch.equal(classes.weights, weights)


def test_another_order_of_classes_in_the_checkpoint_is_followed(files):
    save(files, original_state(), {"CLASSES": ("cat", "vase", "airplane", "car", "person")})
    assert read_identity(read_detector(files))["classes"] == ["vase", "car", "person"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neck.fpn_convs.0.conv.weight": None}, "missing: neck.fpn_convs.0.conv.weight"),
        ({"roi_head.mask.weight": torch.zeros(1)}, "unknown: roi_head.mask.weight"),
        (
            {"roi_head.bbox_head.fc_reg.bias": torch.zeros(8)},
            r"fc_reg.bias is \(8,\) float32, expected \(4,\) float32",
        ),
        (
            {"roi_head.bbox_head.fc_reg.bias": torch.zeros(4).half()},
            r"fc_reg.bias is \(4,\) float16, expected \(4,\) float32",
        ),
        (
            {"roi_head.prototype": None},
            "has no roi_head.prototype: it is not a checkpoint of LP-OVOD",
        ),
    ],
)
def test_every_tensor_is_used_or_named(files, change, message):
    state = original_state() | change
    save(files, {k: v for k, v in state.items() if v is not None})
    with pytest.raises(LpovodError, match=message):
        read_detector(files)


def test_classes_that_do_not_fit_are_refused(files):
    with pytest.raises(LpovodError, match="has 3 base classes and classes.base does not fit: 2"):
        read_detector(files, ["person", "car"])
    with pytest.raises(LpovodError, match="'dog' is none of its classes"):
        read_detector(files, ["person", "car", "dog"])
    read_detector(files)
    with pytest.raises(LpovodError, match="has 2 novel classes and classes.novel does not fit: 1"):
        read_probe(files, ["cat"])


def test_novel_weights_of_another_detector_are_refused(files):
    read_detector(files)
    state = original_state()
    state["neck.lateral_convs.1.bn.bias"][0] += 1e-6
    save(files, state)
    with pytest.raises(
        LpovodError, match="another detector .*neck.lateral_convs.1.bn.bias differs"
    ):
        read_probe(files)
    save(files, original_state(novel=False))
    with pytest.raises(LpovodError, match="has no roi_head.prototype_novel"):
        read_probe(files)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(files):
    save(files, original_state(), {"config": Evil(files / "ran")})
    with pytest.raises(
        LpovodError, match="ft.pth is not a checkpoint of only tensors and plain values"
    ):
        read_detector(files)
    assert not (files / "ran").exists()
    (files / "ft.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(LpovodError, match="ft.pth is not a checkpoint"):
        read_detector(files)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the original's list of tensors")
@pytest.mark.parametrize("kind", ["base", "ft"])
def test_the_original_s_own_list_of_tensors(files, kind):
    listed = json.loads((SHARED / f"goldens/state_dict_{kind}.json").read_text())
    torch.manual_seed(0)
    state = {
        name: torch.tensor(3) if dtype == "int64" else torch.randn(shape)
        for name, shape, dtype in listed
    }
    names = read_json(SHARED / "lp_ovod/retrieve_proposal_onl100.json")["categories"]
    base, novel = ([c["name"] for c in names if c["split"] == s] for s in ("seen", "unseen"))
    (files / "val.json").write_text(
        json.dumps({"images": [], "annotations": [], "categories": names})
    )
    torch.save({"meta": {}, "state_dict": state}, files / "ft.pth")
    large = (BackboneSettings(architecture="resnet50", channels=256), BaseDetectorSettings())
    outputs = (files / "detector.safetensors", files / "history.jsonl")
    import_base_detector(files / "val.json", files / "ft.pth", base, *large, *outputs)
    probe = read_probe(files, novel) if kind == "ft" else None
    export_checkpoint(files / "val.json", outputs[0], files / "out.pth", probe)
    found, _ = read_checkpoint(files / "out.pth")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


# ------------------------------------------------------------------------------------ backbones


def test_training_starts_from_openmmlab_s_weights(tmp_path, logged):
    """As SoCo's file: backbone, pyramid, the region head's parts, and what nothing here has."""
    torch.manual_seed(2)
    state = {
        name: tensor
        for name, tensor in original_state().items()
        if name.startswith(("backbone.", "neck.", "roi_head.bbox_head.shared_"))
        and "num_batches_tracked" not in name
    }
    extra = {"roi_head.mask_head.convs.0.weight": torch.zeros(1)}
    torch.save({"state_dict": state | extra, "meta": {}}, tmp_path / "soco.pth")
    for model in (Detector(SMALL, HEAD, 3, 16), ProposalNetwork(SMALL, 8.0)):
        start_from(model, tmp_path / "soco.pth", "small")
        own = model.state_dict()
        assert torch.equal(own["backbone.conv1.weight"], state["backbone.conv1.weight"])
        assert torch.equal(own["neck.fpn_convs.3.bn.bias"], state["neck.fpn_convs.3.bn.bias"])
        assert "not used:" in logged.text
        logged.clear()
    detector = Detector(SMALL, HEAD, 3, 16)
    start_from(detector, tmp_path / "soco.pth", "small")
    shared = state["roi_head.bbox_head.shared_fcs.0.weight"]
    assert torch.equal(detector.region_head.fc.weight, shared)
    assert "not used: roi_head.mask_head.convs.0.weight" in logged.text
    del state["backbone.layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "soco.pth")
    with pytest.raises(LpovodError, match="lacks backbone.layer2.0.conv1.weight of the backbone"):
        start_from(detector, tmp_path / "soco.pth", "small")
    state["backbone.layer2.0.conv1.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "soco.pth")
    with pytest.raises(LpovodError, match=r"layer2.0.conv1.weight is \(2,\), expected"):
        start_from(detector, tmp_path / "soco.pth", "small")


class Whole(torch.nn.Module):
    def __init__(self, architecture: str):
        super().__init__()
        self.backbone = ResNet(architecture)


@torch.inference_mode()
def test_torchvision_s_weights_give_torchvision_s_features(tmp_path):
    torch.manual_seed(3)
    theirs = torchvision.models.resnet50().eval()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    torch.save(theirs.state_dict(), tmp_path / "r50.pth")
    ours = Whole("resnet50_torchvision").eval()
    start_from(ours, tmp_path / "r50.pth", "resnet50_torchvision")
    pixels = torch.randint(0, 256, (1, 3, 256, 256)).float()
    means = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviations = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x = theirs.relu(theirs.bn1(theirs.conv1((pixels / 255 - means) / deviations)))
    mean = torch.tensor([122.770935, 116.74601, 104.093735]).view(3, 1, 1)
    std = torch.tensor([68.500534, 66.63216, 70.323166]).view(3, 1, 1)
    y = torch.relu(ours.backbone.bn1(ours.backbone.conv1((pixels - mean) / std)))
    # Equal inside; at the border zeros stand for another mean.
    torch.testing.assert_close(y[..., 2:-2, 2:-2], x[..., 2:-2, 2:-2], rtol=1e-4, atol=1e-4)
    # Layer by layer from the same input, strides and all.
    x = theirs.maxpool(x)
    for number in range(1, 5):
        layer, reference = (getattr(m, f"layer{number}") for m in (ours.backbone, theirs))
        expected = reference(x)
        torch.testing.assert_close(layer(x), expected)
        x = expected


def test_torchvision_s_weights_are_refused_where_the_stride_is_elsewhere(tmp_path):
    state = {f"{n}": t for n, t in ResNet("resnet50").state_dict().items()}
    torch.save(state | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "r50.pth")
    with pytest.raises(LpovodError, match="stride is on the 3 x 3 .*resnet50_torchvision"):
        start_from(Whole("resnet50"), tmp_path / "r50.pth", "resnet50")
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(LpovodError, match="neither OpenMMLab's names .* but encoder.conv1.weight"):
        start_from(Whole("resnet50"), tmp_path / "other.pth", "resnet50")


# ------------------------------------------------------------------------------------ text rows


def test_rows_of_every_form(tmp_path):
    rows = np.random.default_rng(0).normal(size=(3, 8)) * 10
    names = ["cat", "traffic light", "dog"]
    np.save(tmp_path / "a.npy", rows.astype(np.float16))
    torch.save(torch.from_numpy(rows).float(), tmp_path / "a.pth")
    (tmp_path / "list.json").write_text(json.dumps(names))
    ids = [{"id": 7, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 3, "name": "traffic light"}]
    (tmp_path / "coco.json").write_text(json.dumps({"categories": ids}))
    for file in ("a.npy", "a.pth"):
        for classes in ("list.json", "coco.json"):
            found = read_rows(tmp_path / file, tmp_path / classes)
            assert list(found) == names
            expected = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            np.testing.assert_allclose(np.stack(list(found.values())), expected, atol=1e-3)
            lengths = np.linalg.norm(np.stack(list(found.values())), axis=1)
            np.testing.assert_allclose(lengths, 1, atol=1e-12)


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        (np.ones((3, 4)), ["a", "b"], r"has shape \(3, 4\) and .* lists 2 classes"),
        (np.ones(3), ["a", "b", "c"], "has shape"),
        (np.array([[1.0, 2], [0, 0]]), ["a", "b"], "the row of 'b' has length 0"),
        (np.array([[1.0, np.nan], [0, 1]]), ["a", "b"], "the row of 'a' has length nan"),
        (np.ones((2, 4)), ["a", "a"], "lists 'a' twice"),
        (np.ones((2, 4)), {"a": 1}, "neither a list of class names nor COCO's json"),
        (np.array([Path("a")]), ["a"], "does not hold a single numeric matrix"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path, rows, names, message):
    np.save(tmp_path / "a.npy", rows)
    (tmp_path / "names.json").write_text(json.dumps(names))
    with pytest.raises(LpovodError, match=message):
        read_rows(tmp_path / "a.npy", tmp_path / "names.json")


def test_a_pth_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    torch.save(Evil(tmp_path / "ran"), tmp_path / "a.pth")
    (tmp_path / "names.json").write_text('["a"]')
    with pytest.raises(LpovodError, match="does not hold a single numeric matrix"):
        read_rows(tmp_path / "a.pth", tmp_path / "names.json")
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the two real files")
def test_the_real_rows_of_two_prompts_belong_together_and_a_shift_is_noticed(tmp_path):
    """Detic's 80 rows against another project's of another prompt: an independent CLIP."""
    names = [f"class {n}" for n in range(80)]
    (tmp_path / "names.json").write_text(json.dumps(names))
    file = SHARED / "clip_text/coco80_clip_a+cname.npy"
    rows = read_rows(file, tmp_path / "names.json")
    other = np.load(SHARED / "clip_text/coco80_clip_a+photo+of+cname.npy").astype(np.float64)
    check_rows(file, rows, other)
    with pytest.raises(LpovodError, match="of 80 rows are most similar .* of their own name"):
        check_rows(file, rows, np.roll(other, 1, axis=0))
    with pytest.raises(LpovodError, match="has 512 columns, the configured CLIP 256"):
        check_rows(file, rows, other[:, :256])


# --------------------------------------------------------------------------------- pseudo-labels


def labels_file(folder: Path, world, **change) -> Path:
    images = json.loads(world.dataset.read_text())["images"]
    labels = [
        {
            "segmentation": [],
            "area": 50.0,
            "bbox": [1.0, 2.0, 5.0, 10.0],
            "image_id": image_id,
            "id": number,
            "category_id": category,
            "iscrowd": 0,
            "score": 0.5 + number / 100,
            "cosine": cosine,
        }
        for number, (image_id, category, cosine) in enumerate(
            [(7, 5, 0.31), (20, 5, 0.33), (7, 17, 0.3), (3, 5, 0.32)], 1
        )
    ]
    labels[3] |= change
    kinds = [{"id": i, "name": n, "split": "unseen"} for i, n in CATEGORIES.items()]
    content = {"images": images, "annotations": labels, "categories": kinds}
    (folder / "labels.json").write_text(json.dumps(content))
    return folder / "labels.json"


def labels_of(names: list[str], file: Path, world, output: Path) -> dict:
    import_pseudo_labels(names, file, world.dataset, PseudoLabelsSettings(file=file), output)
    return json.loads(output.read_text())


def test_the_novel_classes_are_taken_from_a_file_of_all(world, tmp_path):
    file = labels_file(tmp_path, world)
    content = labels_of(["airplane"], file, world, tmp_path / "airplane.json")
    assert [a["image_id"] for a in content["annotations"]] == [20, 3, 7]  # best cosine first
    assert [c["name"] for c in content["categories"]] == ["airplane"]
    assert content["info"]["identity"]["inputs"] == {
        "dataset": sha256(world.dataset),
        "file": sha256(file),
    }
    content = labels_of(["cat", "airplane"], file, world, tmp_path / "both.json")
    assert [c["name"] for c in content["categories"]] == ["cat", "airplane"]
    assert [a["id"] for a in content["annotations"]] == [1, 2, 3, 4]
    assert [a["category_id"] for a in content["annotations"]] == [1, 2, 2, 2]
    whole, taken = read_pseudo_labels(file), read_pseudo_labels(tmp_path / "both.json")
    assert whole.keys() == {"airplane", "cat"} and list(taken) == ["cat", "airplane"]
    for name, images in whole.items():
        assert images.keys() == taken[name].keys()
        for image_id, (boxes, scores) in images.items():
            np.testing.assert_array_equal(boxes, taken[name][image_id][0])
            np.testing.assert_array_equal(scores, taken[name][image_id][1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dog", {}, "has no category 'dog'"),
        ("car", {}, "has no label of class 'car'"),
        ("airplane", {"bbox": [1, 1, 500, 4]}, "annotation 4: bbox .* outside its image"),
    ],
)
def test_labels_that_do_not_fit_are_refused(world, tmp_path, name, change, message):
    file = labels_file(tmp_path, world, **change)
    with pytest.raises(LpovodError, match=message):
        labels_of(["cat", name], file, world, tmp_path / "out.json")


def test_labels_of_other_images_are_refused(world, tmp_path):
    file = labels_file(tmp_path, world)
    content = json.loads(world.dataset.read_text())
    content["images"][0]["width"] += 1
    world.dataset.write_text(json.dumps(content))
    with pytest.raises(LpovodError, match="annotation 1: its image is"):
        labels_of(["airplane"], file, world, tmp_path / "out.json")
    content["images"] = content["images"][1:]
    world.dataset.write_text(json.dumps(content))
    with pytest.raises(LpovodError, match="annotation 1: .*train.json has no image 7"):
        labels_of(["airplane"], file, world, tmp_path / "out.json")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the original's file")
def test_all_of_the_original_s_1700_labels_arrive_with_their_names(tmp_path):
    file = SHARED / "lp_ovod/retrieve_proposal_onl100.json"
    content = json.loads(file.read_text())
    train = tmp_path / "train.json"
    train.write_text(json.dumps({**content, "annotations": []}))
    novel = [c["name"] for c in content["categories"] if c["split"] == "unseen"]
    output = tmp_path / "novel.json"
    import_pseudo_labels(novel, file, train, PseudoLabelsSettings(file=file), output)
    found = read_pseudo_labels(output)
    assert len(novel) == 17 and list(found) == novel
    counts = {n: sum(len(boxes) for boxes, _ in found[n].values()) for n in novel}
    assert counts == dict.fromkeys(novel, 100)
    ids = {c["id"]: c["name"] for c in content["categories"]}
    for label in content["annotations"]:
        x, y, width, height = label["bbox"]
        boxes, scores = found[ids[label["category_id"]]][label["image_id"]]
        place = np.abs(boxes - np.array([x, y, x + width, y + height])).max(axis=1).argmin()
        assert np.abs(boxes[place] - [x, y, x + width, y + height]).max() < 1e-3
        assert scores[place] == np.float32(label["score"])
    whole = read_pseudo_labels(file)
    assert {n: sum(len(b) for b, _ in i.values()) for n, i in whole.items()} == counts
