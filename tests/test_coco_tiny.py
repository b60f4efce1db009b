"""Real photographs through the whole DAG: that it swallows them, not what it learns."""

import json
from pathlib import Path

import pytest
from project import copy_project, snakemake

COCO_TINY = Path("../shared/data/coco_tiny")


@pytest.mark.slow
@pytest.mark.skipif(not COCO_TINY.exists(), reason="needs the COCO photographs")
def test_the_dag_runs_on_coco_photographs(tmp_path):
    folder = copy_project(tmp_path / "project")
    few = {"epochs": 1, "milestones": [], "short_sides": [128]}
    overlay = {
        "dataset": {"coco": {"root": str(COCO_TINY.resolve())}},
        "classes": {"novel": ["cup", "knife", "cow"]},  # of 17, for time
        "proposals": {"training": few, "per_image": 20},
        "base_detector": {"training": few},
    }
    snakemake(folder, "coco_tiny.yaml", overlay, "--cores", "2")
    results = folder / "results/coco_tiny"
    metrics = json.loads((results / "evaluation/metrics.json").read_text())
    assert {"cup", "knife", "cow", "person"} <= set(metrics["per_class"])
    assert metrics["rows"]["full"]["all"] is not None
    assert "cup" in (results / "report/report.html").read_text()
