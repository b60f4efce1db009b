"""The real DAG at its smallest: it runs, and after an edit exactly the stale stages run again.

What is stale is asked of Snakemake itself, by dry-runs in a copy of the project.
"""

import ast
import contextlib
import io
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALLEST
from project import copy_project, snakemake, stale_jobs
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lpovod.apps.score import score_table
from lpovod.artifacts import sha256
from lpovod.formats.coco import read_dataset
from lpovod.formats.regions import read_proposals

pytestmark = pytest.mark.slow

RUN = SMALLEST
NOVEL = RUN["classes"]["novel"]
BASE = yaml.safe_load(Path("config.yaml").read_text())["classes"]["base"]
DRAWN = {"train_images": 48, "val_images": 16, "tune_images": 8}  # as in configs/smallest.yaml

EVERYTHING = {
    "dataset": 2,
    "annotations": 3,
    "text_embeddings": 1,
    "proposal_network": 1,
    "proposals": 3,
    "region_embeddings": 3,
    "region_index": 1,
    "base_detector": 1,
    "pseudo_labels": 1,
    "region_features": 1,
    "retrieved_region_features": 1,
    "linear_probe": 1,
    "evaluation": 1,
    "model": 1,
    "report": 1,
}


def stages(*names: str, **counts: int) -> dict[str, int]:
    return {name: EVERYTHING[name] for name in names} | counts


def without(*names: str) -> dict[str, int]:
    return {name: count for name, count in EVERYTHING.items() if name not in names}


SCORED = stages("linear_probe", "evaluation", "model", "report")
RETRIEVED = stages("pseudo_labels", "retrieved_region_features") | SCORED
EXTRACTED = stages("region_features", "retrieved_region_features") | SCORED
DETECTED = stages("base_detector", "region_features", "retrieved_region_features") | SCORED
EMBEDDED = stages("region_embeddings", "region_index") | DETECTED | RETRIEVED
PROPOSED = stages("proposals") | EMBEDDED
TRAINED = stages("proposal_network") | PROPOSED


def stale(folder: Path, **overlay) -> dict[str, int]:
    """How many jobs of each rule a dry-run announces."""
    return stale_jobs(folder, "smallest.yaml", RUN | overlay)


@pytest.fixture(scope="module")
def project(smallest_run) -> Path:
    return smallest_run


@pytest.fixture()
def edited(project):
    """Edit files of the project for one test; they are restored afterwards."""
    saved: dict[Path, bytes] = {}

    def edit(path: str | Path, change: Callable[[bytes], bytes]) -> None:
        file = project / path
        saved.setdefault(file, file.read_bytes())
        file.write_bytes(change(saved[file]))

    yield edit
    for file, content in saved.items():
        file.write_bytes(content)


def test_everything_is_stale_before_a_run(tmp_path):
    assert stale(copy_project(tmp_path / "project")) == EVERYTHING


def test_nothing_is_stale_after_a_run(project):
    assert stale(project) == {}


def test_the_metrics_have_their_layout(project):
    metrics = json.loads((project / "results/smallest/evaluation/metrics.json").read_text())
    means = {"novel", "base", "all"}
    rows = metrics["rows"]
    for row in ("full", "without_probe", "without_clip_head", "without_objectness"):
        assert set(rows[row]) == means
    assert set(rows["without_probe_best_temperature"]) == means | {"temperature"}
    assert len(metrics["per_class"]) > 12  # with 16 images a class may have no object
    assert set(metrics["proposal_recall"]["novel"]) == {"10", "50", "100"}
    evaluated = metrics["evaluated"]
    assert (evaluated["protocol"], evaluated["images"]) == ("all_images", 16)


# The last one is the default, which the tests below expect.
@pytest.mark.parametrize("protocol", ["annotated_images", "all_images"])
def test_recall_evaluation_report_and_score_agree(project, tmp_path, protocol):
    """The same classes, images and boxes everywhere, without an option; AP by pycocotools too."""
    results = project / "results/smallest"
    overlay = {"evaluation": {"protocol": protocol}}
    snakemake(project, "smallest.yaml", RUN | overlay, "--cores", "2")
    metrics = json.loads((results / "evaluation/metrics.json").read_text())
    files = (results / "evaluation/ground_truth.json", results / "evaluation/detections.json")
    table = score_table(*files)
    for split in ("novel", "base", "all"):
        value = metrics["rows"]["full"][split]
        assert re.search(rf"^mean of {split} +{value:.2f}$", table, re.MULTILINE)
    truth, val = json.loads(files[0].read_text()), read_dataset(results / "dataset/val.json")
    names = {c["id"]: c["name"] for c in truth["categories"]}
    assert sorted(names.values()) == sorted([*BASE, *NOVEL])
    boxes = [a for i in val.images for a in val.annotations[i] if a["category_id"] in names]
    images = {a["image_id"] for a in boxes} if protocol == "annotated_images" else {*val.images}
    assert {i["id"] for i in truth["images"]} == images
    assert len(truth["annotations"]) == metrics["evaluated"]["boxes"] == len(boxes)
    # Recall by hand, from the stored proposals.
    store = read_proposals([results / "proposals/val/0.h5"], results / "dataset/val.images.json")
    covered = {"base": [], "novel": []}
    for a in boxes:
        x, y, w, h = a["bbox"]
        left, top, right, bottom = store.read(a["image_id"], []).box[:10].T
        inner = np.maximum(0, np.minimum(right, x + w) - np.maximum(left, x))
        inner *= np.maximum(0, np.minimum(bottom, y + h) - np.maximum(top, y))
        iou = inner / (w * h + (right - left) * (bottom - top) - inner)
        covered["novel" if names[a["category_id"]] in NOVEL else "base"].append((iou >= 0.5).any())
    for split, flags in covered.items():
        assert metrics["proposal_recall"][split]["10"] == pytest.approx(
            100 * np.mean(flags), abs=0.01
        )
    by_class = by_pycocotools(*files)
    expected = np.mean([by_class[n] for n in NOVEL if n in by_class])
    assert metrics["rows"]["full"]["novel"] == pytest.approx(expected, abs=0.006)


def by_pycocotools(truth: Path, detections: Path) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        evaluator = COCOeval(coco, coco.loadRes(str(detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][0, :, :, 0, 2]
    names = [coco.cats[c]["name"] for c in evaluator.params.catIds]
    return {n: 100 * precision[:, k].mean() for k, n in enumerate(names) if precision[0, k] > -1}


def test_the_report_is_one_file(project):
    page = (project / "results/smallest/report/report.html").read_text()
    assert "AP50" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_every_job_left_a_log_and_a_benchmark(project):
    results = project / "results/smallest"
    logs = Counter(path.suffix for path in (results / "logs").rglob("*") if path.is_file())
    assert logs == {".log": sum(EVERYTHING.values())}
    benchmarks = list((results / "benchmarks").rglob("*.tsv"))
    assert len(benchmarks) == sum(EVERYTHING.values()) - 1  # all but the report


@pytest.mark.parametrize(
    ("overlay", "expected"),
    [
        ({"pseudo_labels": {"k": 11, "objectness": 0}}, RETRIEVED),
        ({"pseudo_labels": {"k": 10, "objectness": 0.01}}, RETRIEVED),
        ({"classes": {"novel": [*NOVEL, "cup"]}}, stages("text_embeddings") | RETRIEVED),
        ({"classes": {"novel": NOVEL[1:]}}, stages("text_embeddings") | RETRIEVED),
        ({"base_detector": {"distillation_weight": 100}}, DETECTED),
        (
            {"text_embeddings": {"templates": ["a photo of a {}"]}},
            stages("text_embeddings") | RETRIEVED,
        ),
        ({"linear_probe": {"epochs": 3, "milestones": [2]}}, SCORED),
        ({"evaluation": {"beta": 0.6}}, stages("evaluation", "model", "report")),
        ({"region_index": {"factory": "Flat"}}, stages("region_index") | RETRIEVED),
        ({"region_embeddings": {"scales": [1.0]}}, EMBEDDED),
        ({"proposals": {"nms": 0.6}}, PROPOSED),
        ({"proposals": {"box_iou": 0.6}}, TRAINED),
        ({"base_detector": {"training": {"workers": 1, "images_at_once": 1}}}, {}),
        ({"proposals": {"precision": "bfloat16"}}, PROPOSED),
        ({"region_features": {"precision": "bfloat16"}}, EXTRACTED | stages("model")),
        ({"report": {"images": 3}}, stages("report")),
        (
            {"dataset": {"miniature": {**DRAWN, "val_images": 17}}},
            stages("evaluation", "report", "region_features", dataset=1, annotations=1)
            | {"proposals": 1, "region_embeddings": 1},
        ),
        (
            {"dataset": {"miniature": {**DRAWN, "train_images": 49}}},
            TRAINED | {"dataset": 1, "annotations": 2},
        ),
        ({"evaluation": {"protocol": "annotated_images"}}, stages("evaluation", "report")),
        (
            {"classes": {"novel": NOVEL, "prompts": {"star": "a star"}}},
            stages("text_embeddings") | RETRIEVED,
        ),
        (
            {"classes": {"novel": NOVEL, "base": BASE[1:]}},
            TRAINED | stages("text_embeddings", annotations=1),
        ),
        ({"seed": 1}, {k: v for k, v in EVERYTHING.items() if k != "text_embeddings"}),
    ],
    ids=lambda value: next(iter(value), "nothing"),
)
def test_a_changed_setting_makes_exactly_its_stages_stale(project, overlay, expected):
    assert stale(project, **overlay) == expected


EXPECTED = {
    # Each stage's own file.
    "lpovod/stages/dataset.py": without("text_embeddings"),
    "lpovod/stages/text_embeddings.py": stages("text_embeddings") | RETRIEVED,
    "lpovod/stages/proposal_network.py": TRAINED,
    "lpovod/stages/proposals.py": PROPOSED,
    "lpovod/stages/region_embeddings.py": EMBEDDED,
    "lpovod/stages/region_index.py": stages("region_index") | RETRIEVED,
    "lpovod/stages/base_detector.py": DETECTED,
    "lpovod/stages/pseudo_labels.py": RETRIEVED,
    "lpovod/stages/region_features.py": EXTRACTED,
    "lpovod/stages/linear_probe.py": SCORED,
    "lpovod/stages/evaluation.py": stages("evaluation", "report"),
    "lpovod/stages/report/retrieved.py": stages("report"),
    "workflow_scripts/linear_probe.py": SCORED,
    # What several share.
    "lpovod/formats/regions.py": PROPOSED,
    "lpovod/formats/index.py": stages("region_index") | RETRIEVED,
    "lpovod/formats/image_features.py": EXTRACTED,
    "lpovod/formats/store.py": stages("text_embeddings", "region_features") | RETRIEVED,
    "lpovod/search.py": RETRIEVED,
    "lpovod/crops.py": EMBEDDED,
    "lpovod/training.py": TRAINED,
    "lpovod/networks/backbone.py": TRAINED,
    "lpovod/networks/proposal_network.py": TRAINED,
    "lpovod/networks/proposal_inference.py": PROPOSED,
    "lpovod/networks/detector.py": DETECTED,
    "lpovod/networks/detector_inference.py": EXTRACTED,
    "lpovod/scoring.py": stages("evaluation", "report"),
    "lpovod/measures/mistakes.py": stages("evaluation", "report"),
    "lpovod/miniature/scenes.py": without("text_embeddings"),
    # What shapes no result of this run.
    "lpovod/progress.py": {},
    "lpovod/exceptions.py": {},
    "lpovod/catalogue.py": {},
    "lpovod/config.py": {},
    "lpovod/command_line.py": {},
    "lpovod/importers/checkpoints.py": {},
    "lpovod/stages/small_clip/training.py": {},
    "lpovod/apps/search.py": {},
}


@pytest.mark.parametrize("path", EXPECTED)
def test_a_changed_line_makes_exactly_what_it_shapes_stale(project, edited, path):
    edited(path, lambda content: content + b"\nEDITED = True\n")
    assert stale(project) == EXPECTED[path]


def _reworded(content: bytes) -> bytes:
    """The same code with a comment, another docstring, other blank lines and other line breaks."""
    tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body[0] = ast.Expr(ast.Constant("Reworded."))
    return b"# A comment.\n\n\n" + ast.unparse(tree).encode() + b"\n\n\n\n"


def test_comments_docstrings_and_layout_of_every_module_make_nothing_stale(project, edited):
    modules = [
        path.relative_to(project)
        for folder in ("lpovod", "workflow_scripts")
        for path in sorted((project / folder).rglob("*.py"))
    ]
    assert len(modules) > 70
    for module in modules:
        edited(module, _reworded)
    assert stale(project) == {}


def test_touching_or_reverting_a_module_makes_nothing_stale(project):
    for path in sorted((project / "lpovod").rglob("*.py")):
        content = path.read_bytes()
        path.write_bytes(content + b"\nEDITED = True\n")
        path.write_bytes(content)
    assert stale(project) == {}


def other_number(content: bytes) -> bytes:
    """The same tensors, but for one bit of the last number: the checks before a run accept them."""
    return content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]


def test_other_clip_weights_make_everything_that_reads_them_stale(project, edited):
    edited("resources/small_clip/weights.safetensors", other_number)
    assert stale(project) == stages("text_embeddings") | EMBEDDED


def test_other_weights_to_start_from_make_what_is_trained_from_them_stale(project, edited):
    edited("resources/small_backbone/weights.safetensors", other_number)
    assert stale(project) == TRAINED


def test_touching_weights_makes_nothing_stale(project):
    os.utime(project / "resources/small_clip/weights.safetensors")
    os.utime(project / "resources/small_backbone/weights.safetensors")
    assert stale(project) == {}


def test_a_deleted_intermediate_is_made_again_when_it_is_needed(project):
    index = project / "results/smallest/region_index/train.index"
    content = index.read_bytes()
    index.unlink()
    try:
        assert stale(project) == {}
        needed = stages("region_index") | RETRIEVED
        assert stale(project, pseudo_labels={"k": 11, "objectness": 0}) == needed
    finally:
        index.write_bytes(content)
        os.utime(index, (0, 0))


def test_a_wrong_setting_ends_before_any_job(project):
    (project / "overlay.yaml").write_text("pseudo_labels: {kk: 3}")
    done = subprocess.run(
        ["snakemake", "-n", "--configfile", "configs/smallest.yaml", "overlay.yaml"],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "pseudo_labels.kk: unknown key; did you mean k?" in done.stdout + done.stderr


def test_a_second_run_from_scratch_is_identical(project, tmp_path):
    again = copy_project(tmp_path / "project")
    snakemake(again, "smallest.yaml", RUN, "--cores", "2")
    first, second = (
        {
            str(path.relative_to(folder)): sha256(path)
            for part in ("safetensors", "h5", "json", "jsonl", "index", "jpg")
            for path in (folder / "results").rglob(f"*.{part}")
            if "benchmarks" not in path.parts
        }
        for folder in (project, again)
    )
    assert len(first) > 40
    assert first == second
