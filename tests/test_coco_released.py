"""The released model's files through the real DAG: nothing is trained, and AP50 comes out."""

import json
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from project import copy_project, snakemake
from recorded import original_name

from lpovod.config import BackboneSettings, BaseDetectorSettings
from lpovod.networks.detector import Detector

SIZES = {"head_convolutions": 1, "dimension": 16, "finest_scale": 14}
BASE = ["person", "car", "bench", "bird", "book", "vase"]
NOVEL = ["cat", "airplane", "cup"]  # of 48 + 17, for time; in no order
OVERLAY = {
    "dataset": {"coco": {"download": False}},  # drawn images, which do not count as published
    "classes": {"base": BASE, "novel": NOVEL},
    "backbone": {"short_side": 64, "long_side": 96},
    "base_detector": SIZES,
    "evaluation": {"score_threshold": 0},
    "report": {"images": 2},
}


def original_layout() -> dict[str, torch.Tensor]:
    """A random model under the original's names."""
    torch.manual_seed(0)
    backbone = BackboneSettings(architecture="resnet50", channels=256)
    model = Detector(backbone, BaseDetectorSettings(**SIZES), len(BASE), 512)
    state = {}
    for name, tensor in model.state_dict().items():
        # Else sixteen blocks would double the features sixteen times.
        state[original_name(name)] = tensor * 0.2 if name.endswith("bn3.weight") else tensor
    shapes = {"rpn_conv": (256, 256, 3, 3), "rpn_cls": (3, 256, 1, 1), "rpn_reg": (12, 256, 1, 1)}
    for part, shape in shapes.items():
        state[f"rpn_head.{part}.weight"] = torch.randn(shape)
        state[f"rpn_head.{part}.bias"] = torch.randn(shape[0])
    return state | {"roi_head.prototype_novel": torch.randn(len(NOVEL), SIZES["dimension"])}


def write_files(folder: Path) -> None:
    """Everything that configs/coco_released.yaml names, for five drawn images."""
    draw = np.random.default_rng(0)
    coco, released = folder / "data/coco", folder / "data/lp_ovod"
    for place in (coco / "val2017", coco / "annotations", released):
        place.mkdir(parents=True)
    listed = json.loads((folder / "resources/coco/classes.json").read_text())["categories"]
    other = {"id": 13, "name": "stop sign"}  # of COCO's 80, in neither split
    categories = sorted(
        [{"id": c["id"], "name": c["name"]} for c in listed] + [other], key=lambda c: c["id"]
    )
    ids = {c["name"]: c["id"] for c in categories}
    images, annotations, proposals = [], [], []
    for image_id in (9, 4, 25, 31, 7):
        name = f"{image_id:012}.jpg"
        pixels = draw.integers(0, 256, (64, 96, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(coco / "val2017" / name)
        images.append({"id": image_id, "file_name": name, "width": 96, "height": 64})
        low = draw.uniform(0, (60, 30), (6, 2))
        boxes = np.hstack([low, low + draw.uniform(8, 30, (6, 2))])
        proposals.append(np.hstack([boxes, draw.uniform(0.3, 1, (6, 1))]).astype(np.float32))
        for x1, y1, x2, y2 in boxes[:4].tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[([*NOVEL, *BASE, "stop sign"])[len(annotations) % 10]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    content = {"images": images, "annotations": annotations, "categories": categories}
    (coco / "annotations/instances_val2017.json").write_text(json.dumps(content))
    # As released: the list is in another order than the images, and a json says in which, and how
    # many boxes each array has.
    order = [3, 0, 4, 1, 2]
    with open(released / "val_coco_proposals.pkl", "wb") as file:
        pickle.dump([proposals[i] for i in order], file, protocol=2)
    id_map = {str(images[i]["id"]): place for place, i in enumerate(order)}
    id_map["num_proposal"] = [len(proposals[i]) for i in order]
    (released / "val_coco_id_map.json").write_text(json.dumps(id_map))
    torch.save(torch.randn(65, 512), released / "ovd_coco_text_embedding.pth")
    names = tuple(c["name"] for c in categories)
    torch.save(
        {"meta": {"CLASSES": names, "epoch": 12}, "state_dict": original_layout()},
        released / "vild_sigmoid_ft.pth",
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = copy_project(tmp_path_factory.mktemp("released") / "project")
    write_files(folder)
    return folder


@pytest.mark.slow
def test_the_released_model_is_evaluated_without_training(project):
    printed = snakemake(project, "coco_released.yaml", OVERLAY, "--cores", "2")
    for rule in ("proposal_network", "region_embeddings", "pseudo_labels"):
        assert f"rule {rule}:" not in printed
    results = project / "results/coco_released"
    metrics = json.loads((results / "evaluation/metrics.json").read_text())
    assert metrics["classes"]["base"] == BASE  # in COCO's order
    assert metrics["rows"]["full"]["novel"] is not None
    assert metrics["temperature"] == 0.01
    assert "stop sign" not in metrics["per_class"]
    assert metrics["proposal_recall"]["base"]["10"] == 100  # the first four are the objects
    assert "true_clip_without_probe" not in metrics["rows"]
    found = json.loads((results / "evaluation/detections.json").read_text())
    assert {d["image_id"] for d in found} == {9, 4, 25, 31, 7}
    assert (results / "report/report.html").exists()

    # Nothing is stale, then exactly what hangs on a file that was replaced.
    assert "Nothing to be done" in snakemake(project, "coco_released.yaml", OVERLAY, "-n")
    id_map = project / "data/lp_ovod/val_coco_id_map.json"
    id_map.write_text(id_map.read_text().replace(" ", ""))
    printed = snakemake(project, "coco_released.yaml", OVERLAY, "-n")
    stats = printed.partition("Job stats:")[2].partition("total")[0]
    rules = {line.split()[0] for line in stats.splitlines() if line[-1:].isdigit()}
    assert rules == {"proposals_val", "region_features", "evaluation", "report", "all"}


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ({"clip": {"weights": None}}, "without CLIP this is needed: text_embeddings.file"),
        pytest.param(
            {"backbone": {"weights": None}, "proposals": {"files": {"val": "x.pkl"}}},
            "nothing to start from: give backbone.weights",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"proposals": {"files": {"test": "x.pkl"}}},
            "proposals.files.test",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"text_embeddings": {"file": "x.npy"}},
            "file and classes belong together",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["without CLIP", "nothing to start from", "of no split", "rows without names"],
)
def test_files_that_leave_a_gap_are_refused_before_any_job(project, overlay, message):
    (project / "gap.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run(
        ["snakemake", "-n", "--configfile", "gap.yaml"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
