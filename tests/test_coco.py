"""The paper's configuration: it resolves without data, and its numbers are the original's."""

import resource
from collections import Counter
from pathlib import Path

import pytest
import yaml
from project import copy_project, keys_of, snakemake

from lpovod.config import load_config, merge
from lpovod.exceptions import LpovodError
from lpovod.sources import check_classes


def coco(**overlay) -> dict:
    content = [yaml.safe_load(Path(p).read_text()) for p in ("config.yaml", "configs/coco.yaml")]
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
    proposals = config.proposals
    assert (proposals.training.epochs, proposals.training.milestones) == (8, [6, 7])
    assert (proposals.box_iou, proposals.samples_per_image) == (0.7, 256)
    assert proposals.per_level == 2000


def test_classes_are_checked_before_the_annotations_are_there():
    with pytest.raises(LpovodError, match="classes.base: COCO 2017 has no class 'sofa'"):
        check_classes(load_config(coco(classes={"base": ["sofa"]})), {})
    warnings = check_classes(load_config(coco(classes={"novel": ["unicycle"]})), {})
    assert warnings == [
        "not annotated, so their AP cannot be measured: 'unicycle' (did you mean bicycle?)"
    ]
    with pytest.raises(LpovodError, match="download needs a root"):
        load_config(coco(dataset={"coco": {"root": None}}))


def test_the_graph_resolves_without_data(tmp_path):
    folder = copy_project(tmp_path / "project")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    printed = snakemake(folder, "coco.yaml", {}, "-n", "--quiet", "reason")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    jobs = Counter(dict(line.split() for line in printed.splitlines() if _counts(line)))
    assert jobs["download"] == "3" and jobs["download_weights"] == "1"
    assert jobs["region_embeddings"] == str(2 * 64)
    assert jobs["pseudo_labels"] == jobs["retrieved_region_features"] == "1"
    assert jobs["text_embeddings"] == jobs["linear_probe"] == jobs["evaluation"] == "1"
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    assert seconds < 10  # of CPU; 4 here, and machines differ


def _counts(line: str) -> bool:
    words = line.split()
    return len(words) == 2 and words[1].isdigit()


def test_nothing_of_the_default_run_reaches_the_paper_s():
    """Overlays are laid over config.yaml: what it sets, the paper's has to set again."""

    default = keys_of("config.yaml")
    drawn = {key for key in default if key[:2] == ("dataset", "miniature")}
    assert default - drawn <= keys_of("configs/coco.yaml")
