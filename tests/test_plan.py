"""The plan: its arithmetic done again by hand, and that it needs neither data nor torch."""

import subprocess
import sys

import pytest

CONFIGS = ["config.yaml", "configs/coco.yaml"]


def plan(*arguments: str) -> subprocess.CompletedProcess:
    program = "import sys, lpovod.plan as plan; plan.main(); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_hours_and_bytes_of_the_paper():
    done = plan(*CONFIGS, "--tflops", "10")
    assert done.returncode == 0, done.stderr
    rows = {line[:18].strip(): line[18:].split() for line in done.stdout.splitlines()}
    # 123,287 images, 300 regions, two crops of 8.8 GFLOP, 1 KB and a box and its objectness
    crops = 123_287 * 300 * 2
    assert float(rows["region_embeddings"][0]) == pytest.approx(
        crops * 8.8e9 / 1e13 / 3600, abs=0.1
    )
    assert float(rows["region_embeddings"][3]) == pytest.approx(crops / 2 * 1044 / 1e9, abs=0.1)
    # 20 epochs, three passes; pyramid, RPN, and a head of four convolutions (256 x 256 x 9 weights
    # on 7 x 7 cells) and a linear layer (12,544 x 1,024) on 512 + 300 regions
    head = 2 * (4 * 256 * 256 * 9 * 49 + 12_544 * 1_024)
    hours = 20 * 118_287 * 3 * (232.4e9 + 85.7e9 + 812 * head) / 1e13 / 3600
    assert float(rows["base_detector"][0]) == pytest.approx(hours, rel=0.01)
    # Eight GPUs divide a training and the shards, and not the one job that proposes.
    assert float(rows["base_detector"][1]) == pytest.approx(hours / 8, abs=0.06)
    assert rows["proposals"][0] == rows["proposals"][1]
    assert float(rows["download"][3]) == pytest.approx(20.4, abs=0.1)
    assert done.stdout.splitlines()[-1] == "False"


def test_a_stage_takes_no_less_than_one_core_needs_for_its_images():
    """With ever faster GPUs, decoding and resizing 123,287 photographs at 27.6 ms remain."""
    done = plan(*CONFIGS, "--tflops", "1e9")
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("proposals ")]
    assert float(row.split()[1]) == pytest.approx(123_287 * 0.0276 / 3600, abs=0.06)


def test_other_numbers_of_images_can_be_planned():
    twice = plan(*CONFIGS, "--images", str(2 * 118_287), "10000").stdout
    rows = [
        [line for line in text.splitlines() if line.startswith("region_embeddings")][0].split()
        for text in (plan(*CONFIGS).stdout, twice)
    ]
    assert float(rows[1][4]) == pytest.approx(2 * float(rows[0][4]), abs=0.15)


def test_more_proposals_cost_more(tmp_path):
    (tmp_path / "mine.yaml").write_text("proposals: {per_image: 600}")
    few, many = (
        float(plan(*paths).stdout.partition("\nregion_embeddings")[2].split()[0])
        for paths in (CONFIGS, [*CONFIGS, str(tmp_path / "mine.yaml")])
    )
    assert many == pytest.approx(2 * few, abs=0.15)  # both are rounded


def test_there_is_no_plan_for_the_miniature_world():
    done = plan("config.yaml")
    assert done.returncode != 0 and "configs/coco.yaml" in done.stderr
