"""The paper's configuration: it resolves without data, and its numbers are the original's."""

import resource
from pathlib import Path

import numpy as np
import pytest
import yaml
from project import announced, copy_project, keys_of, snakemake

from lpovod.catalogue import COCO_IDS
from lpovod.config import load_config, merge, slug
from lpovod.exceptions import LpovodError
from lpovod.sources import check_classes

SPLIT = "resources/coco/classes.json"
ARCHIVES = {"download": 3}
CLIP = {"download_data_clip_vit_b_32_pt": 1}
PROPOSALS = [
    f"{split}_coco_{part}"
    for split in ("train", "val")
    for part in ("id_map_json", "proposals_pkl")
]


def coco(name: str = "coco", **overlay) -> dict:
    files = ("config.yaml", f"configs/{name}.yaml")
    content = [yaml.safe_load(Path(p).read_text()) for p in files]
    return merge(merge(*content), overlay)


def test_the_settings_are_the_original_s():
    config = load_config(coco())
    assert (len(config.classes.base), len(config.classes.novel)) == (48, 17)
    training = config.base_detector.training.model_dump()
    original = {
        "optimizer": "sgd",
        "epochs": 20,
        "images_per_step": 16,
        "learning_rate": 0.02,
        "momentum": 0.9,
        "weight_decay": 2.5e-5,
        "warmup_steps": 500,
        "warmup_ratio": 0.001,
        "milestones": [16, 19],
        "gradient_norm": 15,
        "short_sides": [640, 672, 704, 736, 768, 800],
        "flip": 0.5,
    }
    assert {key: training[key] for key in original} == original
    detector = config.base_detector
    assert detector.regions == "rpn"
    assert (detector.samples_per_image, detector.positive_fraction) == (512, 0.25)
    assert (detector.head_convolutions, detector.dimension) == (4, 1024)
    assert (detector.finest_scale, detector.sampling_ratio) == (56, 0)
    assert detector.distillation_weight == 256
    backbone = config.backbone
    assert (backbone.architecture, backbone.channels) == ("resnet50", 256)
    assert (backbone.short_side, backbone.long_side) == (800, 1333)
    assert config.region_embeddings.scales == [1.0, 1.5]
    assert config.text_embeddings.templates == ["{}"]
    assert (config.pseudo_labels.k, config.pseudo_labels.objectness) == (100, 0.6)
    probe = config.linear_probe
    assert (probe.epochs, probe.images_per_step, probe.learning_rate) == (12, 2, 0.001)
    assert (probe.warmup_steps, probe.warmup_ratio, probe.milestones) == (20, 0.1, [8, 11])
    assert probe.negatives_per_positive == 10
    evaluation = config.evaluation
    assert (evaluation.alpha, evaluation.beta, evaluation.per_image) == (0, 0.8, 100)
    assert (evaluation.score_threshold, evaluation.nms) == (0.05, 0.5)
    # The original's pipelines take all proposals (num_max_proposals=None); OLN keeps 1,500.
    assert config.proposals.per_image == detector.distillation_regions == 1500
    assert config.proposals.files.keys() == config.proposals.id_maps.keys() == {"train", "val"}
    assert backbone.weights.name == "current_mmdetection_Head.pth"


def test_the_learned_proposals_have_oln_s_settings_and_nothing_else_differs():
    paper, learned = load_config(coco()), load_config(coco("coco_learned"))
    proposals = learned.proposals
    assert (proposals.training.epochs, proposals.training.milestones) == (8, [6, 7])
    assert (proposals.training.learning_rate, proposals.training.images_per_step) == (0.02, 16)
    assert (proposals.box_iou, proposals.samples_per_image) == (0.7, 256)
    assert (proposals.per_level, proposals.files) == (2000, {})
    assert learned.backbone.weights is None
    assert {path.parts[:2] for path in learned.files()} == {
        ("data", "clip")
    }  # and not data/lp_ovod
    paper, learned = (
        config.model_dump(exclude={"name", "proposals"}) for config in (paper, learned)
    )
    for config in (paper, learned):
        del config["backbone"]["weights"], config["base_detector"]["distillation_regions"]
    assert paper == learned


def test_clip_is_downloaded_in_the_form_that_is_named(tmp_path):
    for name in ("ViT-B-32.pt", "ViT-B-32.safetensors"):
        path = f"data/clip/{name}"
        jobs = snakemake(
            copy_project(tmp_path / name), "coco.yaml", {"clip": {"weights": path}}, "-n", path
        )
        assert announced(jobs) == {f"download_{slug(path)}": 1}


@pytest.mark.parametrize("name", ["coco", "coco_learned", "coco_released", "coco_tiny"])
def test_the_split_is_one_file(name):
    """Of 48 and 17 classes, in the order of COCO's ids."""
    classes = load_config(coco(name)).classes
    assert coco(name)["classes"]["base"] == coco(name)["classes"]["novel"] == SPLIT
    assert (len(classes.base), len(classes.novel)) == (48, 17)
    assert (classes.base[:3], classes.base[-1]) == (["person", "bicycle", "car"], "toothbrush")
    assert ", ".join(classes.novel) == (
        "airplane, bus, cat, dog, cow, elephant, umbrella, tie, snowboard, skateboard, cup, knife, "
        "cake, couch, keyboard, sink, scissors"
    )
    for names in (classes.base, classes.novel):
        assert sorted(names, key=COCO_IDS.__getitem__) == names


def test_the_images_that_are_downloaded_are_counted():
    counts = {
        name: [load_config(coco(name)).dataset.image_count(split) for split in ("train", "val")]
        for name in ("coco", "coco_released")
    }
    # The released model trains on nothing: validation images stand in for training images.
    assert counts == {"coco": [118_287, 5_000], "coco_released": [5_000, 5_000]}


def test_an_overlay_changes_the_split_and_adds_to_it():
    classes = load_config(coco(classes={"novel": ["cup"], "add_novel": ["tie"]})).classes
    assert (len(classes.base), classes.novel) == (48, ["cup", "tie"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "classes.base: split.json: no such file"),
        ("[", "classes.base: split.json is no json with categories that have name and split"),
        ('{"categories": [{"name": "a"}]}', "classes.base: split.json is no json"),
        ('{"categories": [{"name": "a", "split": "novel"}]}', "classes.base.*at least 1 item"),
    ],
)
def test_a_file_that_is_no_split(tmp_path, monkeypatch, content, message):
    config = coco(classes={"base": "split.json", "novel": ["b"]})
    monkeypatch.chdir(tmp_path)
    if content:
        Path("split.json").write_text(content)
    with pytest.raises(LpovodError, match=message):
        load_config(config)


def test_digests_are_of_published_files():
    digest = "0" * 64
    content = coco(download={"digests": {"proposals.zip": digest, "val2017.zip": digest[:40]}})
    assert load_config(content).download.digests["proposals.zip"] == digest
    with pytest.raises(LpovodError, match="'proposal.zip' is none of .*did you mean proposals.zip"):
        load_config(coco(download={"digests": {"proposal.zip": digest}}))
    with pytest.raises(LpovodError, match="download.digests"):
        load_config(coco(download={"digests": {"proposals.zip": "0"}}))


def test_classes_are_checked_before_the_annotations_are_there():
    with pytest.raises(LpovodError, match="classes.base: COCO 2017 has no class 'sofa'"):
        check_classes(load_config(coco(classes={"base": ["sofa"]})), {})
    warnings = check_classes(load_config(coco(classes={"novel": ["unicycle"]})), {})
    assert warnings == [
        "not annotated, so their AP cannot be measured: 'unicycle' (did you mean bicycle?)"
    ]
    with pytest.raises(LpovodError, match="download needs a root"):
        load_config(coco(dataset={"coco": {"root": None}}))


@pytest.mark.parametrize(
    ("name", "downloads"),
    [
        (
            "coco",
            ARCHIVES
            | CLIP
            | {
                "download_data_lp_ovod_current_mmdetection_head_pth": 1,
                "download_data_lp_ovod_proposals_zip": 1,
            }
            | {f"extract_data_lp_ovod_{name}": 1 for name in PROPOSALS},
        ),
        ("coco_learned", ARCHIVES | CLIP),
        (
            "coco_released",
            {
                "download": 2,  # the validation images and the annotations
                "download_data_lp_ovod_vild_sigmoid_ft_pth": 1,
                "download_data_lp_ovod_ovd_coco_text_embedding_pth": 1,
                "download_data_lp_ovod_proposals_zip": 1,
            }
            | {f"extract_data_lp_ovod_{name}": 1 for name in PROPOSALS[2:]},
        ),
    ],
)
def test_the_graph_resolves_without_data_and_shows_the_downloads(tmp_path, name, downloads):
    folder = copy_project(tmp_path / "project")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = [used.ru_utime + used.ru_stime]
    for _ in range(2):
        printed = snakemake(folder, f"{name}.yaml", {}, "-n", "--quiet", "reason")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(used.ru_utime + used.ru_stime)
    first, second = np.diff(times)
    # Of CPU; 5 with the preflight and 2 without here, and machines differ.
    assert first < 9 and second < 6
    jobs = announced(printed)
    assert {rule: n for rule, n in jobs.items() if rule.startswith(("down", "extr"))} == downloads
    trained = {"region_embeddings": 64 + 3, "pseudo_labels": 1, "retrieved_region_features": 1}
    trained |= {"model": 1, "proposal_network": 1} if name == "coco_learned" else {}
    expected = {"text_embeddings": 1, "linear_probe": 1, "evaluation": 1}
    expected |= {} if name == "coco_released" else trained
    assert expected.items() <= jobs.items()


def test_the_earlier_release_of_the_proposals_needs_no_map(tmp_path):
    """As docs/coco.md says: the list of the training images is in the order of COCO's."""
    folder = copy_project(tmp_path / "project")
    content = yaml.safe_load((folder / "configs/coco.yaml").read_text())
    content["proposals"]["files"]["train"] = "data/lp_ovod/coco_proposals.pkl"
    del content["proposals"]["id_maps"]["train"]
    (folder / "configs/earlier.yaml").write_text(yaml.safe_dump(content))
    proposals = "results/coco/proposals/train/0.h5"
    jobs = announced(snakemake(folder, "earlier.yaml", {}, "-n", proposals))
    assert jobs == ARCHIVES | {
        "dataset": 1,
        "download_data_lp_ovod_coco_proposals_pkl": 1,
        "proposals_train": 1,
    }


def test_nothing_of_the_default_run_reaches_the_paper_s():
    """Overlays are laid over config.yaml: what it sets, the paper's has to set again."""

    default = keys_of("config.yaml")
    drawn = {key for key in default if key[:2] == ("dataset", "miniature")}
    assert default - drawn <= keys_of("configs/coco_learned.yaml")
    # Proposals that are read from files have no network.
    network = {key for key in default if key[0] == "proposals" and key[1] != "per_image"}
    assert default - drawn - network <= keys_of("configs/coco.yaml")
