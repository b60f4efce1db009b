"""Two real processes learn what one learns; torch's own norm on the whole batch is the reference.

`ranks.py` holds what runs on one rank and on two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_world, write_shards
from ranks import STEP, fit, learn_detector, learn_proposals, learn_with_timm, normalise
from timm.layers import BatchNormAct2d
from torch import nn

from lpovod.artifacts import read_tensors
from lpovod.distributed import BatchNorm2d, synchronise_norms
from lpovod.exceptions import LpovodError
from lpovod.launcher import command
from lpovod.networks.timm_backbone import share_statistics


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three images of different shapes, one without proposals, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("ranks")
    world = make_world(folder, {7: 9, 3: 4, 900: 0})
    objects = [(7, *world.boxes[7][0]), (7, *world.boxes[7][3]), (3, *world.boxes[3][1])]
    objects.append((900, 5, 5, 35, 30))
    annotations = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": [float(v) for v in (x, y, r - x, b - y)]}
        for n, (i, x, y, r, b) in enumerate(objects)
    ]
    content = json.loads(world.dataset.read_text()) | {"annotations": annotations}
    world.dataset.write_text(json.dumps(content))
    draw = np.random.default_rng(0)
    vectors = {i: draw.normal(size=(len(b), 8)) for i, b in world.boxes.items()}
    vectors = {i: v / np.linalg.norm(v, axis=1, keepdims=True) for i, v in vectors.items()}
    vectors = {i: v.astype(np.float16) for i, v in vectors.items()}
    write_shards(folder, world.dataset, vectors, world.boxes, world.objectness)
    (folder / "two").mkdir()
    learn_proposals(folder, folder)
    torch.manual_seed(1)
    inputs = {"images": torch.randn(4, 3, 5, 6) * 3 + 7, "weights": torch.randn(4, 3, 5, 6)}
    torch.save(inputs, folder / "norm.pt")
    with pytest.raises(KeyboardInterrupt):
        fit(folder / "one_then_two.checkpoint", stop_at=2)
    done = subprocess.run(
        [sys.executable, "-m", "lpovod.launcher", "1", "2", "ranks", str(folder)],
        env=os.environ | {"PYTHONPATH": ".:tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    error = float((found - expected).abs().max())
    # Means of normalised values are zero, but for rounding.
    assert error <= tolerance * float(expected.abs().max()) + 1e-12, error


@pytest.mark.parametrize(
    ("norm", "reference"),
    [("norm", torch.nn.BatchNorm2d), ("norm_with_activation", BatchNormAct2d)],
)
@pytest.mark.slow
def test_a_norm_has_the_statistics_of_all_ranks(folder, norm, reference):
    inputs = torch.load(folder / "norm.pt")
    expected = normalise(inputs["images"], inputs["weights"], reference(3))
    one, other = (torch.load(folder / f"{norm}.{rank}.pt") for rank in (0, 1))
    for key, value in expected.items():
        if key in ("y", "of_images"):
            close(torch.cat([one[key], other[key]]), value)
        else:
            close(one[key], value)
            assert torch.equal(one[key], other[key])


@pytest.mark.slow
@pytest.mark.parametrize("forked", [None, 2, 3])
@pytest.mark.parametrize(
    ("stage", "tolerance"), [("proposals", 1e-9), ("timm", 1e-9), ("base_detector", 1e-4)]
)
def test_a_step_of_several_ranks_is_a_step_of_one(folder, tmp_path, stage, tolerance, forked):
    learn = {
        "proposals": learn_proposals,
        "timm": learn_with_timm,
        "base_detector": learn_detector,
    }[stage]
    learn(folder, tmp_path)
    (tmp_path / "start").mkdir()
    learn(folder, tmp_path / "start", STEP.model_copy(update={"learning_rate": 1e-30}))
    several = folder / "two"
    if forked:
        several = tmp_path / "forked"
        several.mkdir()
        learn(folder, several, threads=forked)
    start, one, two = (
        read_tensors(path / f"{stage}.safetensors", stage.replace("timm", "proposals"))[0]
        for path in (tmp_path / "start", tmp_path, several)
    )
    names = [name for name in one if "running" not in name and "tracked" not in name]
    steps, errors = (
        np.array([np.linalg.norm(a[n].astype(float) - one[n]) for n in names]) for a in (start, two)
    )
    assert (steps > 0).mean() > 0.9  # a level without a region learns nothing
    assert np.linalg.norm(errors) <= tolerance * np.linalg.norm(steps)
    for name in one.keys() - set(names):
        close(torch.tensor(two[name]), torch.tensor(one[name]), 10 * tolerance)
    losses, expected = (
        json.loads((path / f"{stage}.jsonl").read_text()) for path in (several, tmp_path)
    )
    assert len(expected) == {"proposals": 3, "timm": 3, "base_detector": 6}[stage]
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_killed_training_resumes_with_another_number_of_ranks(folder, tmp_path):
    expected = fit(tmp_path / "checkpoint")
    found = [torch.load(folder / f"one_then_two.{rank}.pt") for rank in (0, 1)]
    found.append(fit(folder / "two_then_one.checkpoint"))
    for weights in found:
        for name, value in expected.items():
            close(weights[name].float(), value.float())


@pytest.mark.slow
def test_gradients_of_several_parts_are_added_up_once(folder, tmp_path):
    expected = fit(tmp_path / "checkpoint", at_once=7)
    for number in (0, 1):
        found = torch.load(folder / f"parts.{number}.pt")
        for name, value in expected.items():
            close(found[name].float(), value.float())


def test_norms_of_gpus_are_torch_s_with_the_same_names_and_modes():
    """They cannot compute here: torch refuses its norm on a CPU."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(BatchNorm2d(4), BatchNorm2d(4)))
    timm_s = BatchNormAct2d(4)
    share_statistics(nn.Sequential(timm_s))
    model.append(timm_s)
    model[1][0].eval()
    names, parameters = list(model.state_dict()), list(model.parameters())
    synchronise_norms(model)
    assert [type(norm) for norm in model[1]] == [nn.SyncBatchNorm] * 2
    assert [norm.training for norm in model[1]] == [False, True]
    assert model[2] is timm_s  # which has an activation, too
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_a_launcher_is_needed_for_several_processes_alone():
    module = ["workflow_scripts.proposal_network", "--seed", "3"]
    for few in (0, 1):
        assert command(1, few, module, {}) == [sys.executable, "-m", *module]
    found = command(1, 4, module, {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_NODES": "1"})
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    assert found == [*torchrun, "--standalone", "--nproc-per-node=4", "-m", *module]


def test_several_nodes_of_a_slurm_job_start_the_launcher_each():
    launcher = [sys.executable, "-m", "lpovod.launcher", "3", "24", "stage"]
    for step in ({}, {"SLURM_STEP_NUM_NODES": "1"}):
        found = command(3, 24, ["stage"], {"SLURM_JOB_ID": "123456"} | step)
        assert found[:3] == ["srun", "--nodes=3", "--ntasks-per-node=1"]
        assert found[-6:] == launcher


@pytest.mark.parametrize(("gpus", "processes"), [(24, "gpu"), (0, "1")])
def test_nodes_of_a_slurm_step_meet_at_the_first(gpus, processes):
    step = {"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_ID": "123456"}
    found = command(3, gpus, ["stage"], step | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7"})
    assert found[3:] == (
        ["--nnodes=3", "--node-rank=2", "--master-addr=10.0.0.7", "--master-port=23456"]
        + [f"--nproc-per-node={processes}", "-m", "stage"]
    )


def test_several_nodes_without_slurm_are_refused():
    with pytest.raises(LpovodError, match="training_nodes: 1"):
        command(2, 0, ["stage"], {})
