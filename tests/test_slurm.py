"""The workflow on a real SLURM of two nodes, cpu1 and gpu1, on this machine (tests/slurm/).

Starting it needs root, slurm-wlm and munge; the packages are installed under CI or with
LPOVOD_INSTALL=1, and otherwise missing programs skip the tests.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from project import copy_project, digests, install, snakemake, start_snakemake, wait_until

from lpovod.artifacts import read_tensors

pytestmark = pytest.mark.slow

HERE = Path("tests/slurm").resolve()
SLURM = ["--workflow-profile", "profiles/slurm", "--slurm-init-seconds-before-status-checks", "2"]
# The fewest classes; two devices for stages that compute on the CPU all the same.
FEW = {
    "classes": {"novel": ["star", "ring"]},
    "base_detector": {"training": {"epochs": 3, "milestones": [3]}},
}
# Eight steps of a training; AdamW would divide the rounding of small gradients by their size.
SHORT = {
    "dataset": {"miniature": {"train_images": 16, "val_images": 1, "tune_images": 1}},
    "proposals": {"training": {"optimizer": "sgd", "learning_rate": 0.02, "warmup_steps": 0}},
}
GPU_STAGES = ["proposal_network", "base_detector", "region_embeddings"]
ON_GPU = ["--set-resources", *(f"{stage}:gpu=1" for stage in GPU_STAGES)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A running SLURM; the folder holds the list of its jobs."""
    if os.geteuid() != 0:
        pytest.skip("needs root to start SLURM")
    install({"slurmctld": "slurm-wlm", "munged": "munge"})
    # The daemons' users must reach it, which pytest's folders do not allow.
    folder = Path("/var/tmp/lpovod_slurm")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        # The daemons keep what they inherit: pipes would never end.
        with open(tmp_path_factory.mktemp("slurm") / "log", "w+") as log:
            done = subprocess.run([HERE / "start.sh", folder], stdout=log, stderr=log)
            log.seek(0)
            assert done.returncode == 0, log.read()
        yield folder
    finally:
        subprocess.run([HERE / "stop.sh", folder])


@pytest.fixture(scope="module")
def probed(cluster, tmp_path_factory):
    """A project in which probe.smk has been started."""
    folder = copy_project(tmp_path_factory.mktemp("probe") / "project")
    probe = ["--snakefile", str(HERE / "probe.smk")]
    return folder, start_snakemake(folder, "smallest.yaml", FEW, *SLURM, *probe)


@pytest.fixture(scope="module")
def dag(cluster, probed, tmp_path_factory):
    """A project whose DAG ran on SLURM, with a job cancelled and a Ctrl-C on the way; its output.

    The probes run beside it: they wait most of the time.
    """
    folder = copy_project(tmp_path_factory.mktemp("dag") / "project")
    logs = folder / "results/smallest/logs"
    process = start_snakemake(folder, "smallest.yaml", FEW, *SLURM, *ON_GPU)
    wait_until(lambda: "epoch 1/2" in read(logs / "proposal_network.log"), process)
    subprocess.run(["scancel", *running_on("gpu1", folder)], check=True)
    wait_until(lambda: "epoch 1/3" in read(logs / "base_detector.log"), process)
    process.send_signal(signal.SIGINT)
    process.wait()
    interrupted = read(folder / "printed")
    assert process.returncode != 0, interrupted
    # A cancelled job has some seconds to save.
    wait_until(lambda: not running_on("gpu1", folder), seconds=60, pause=1)
    # The same command again.
    process = start_snakemake(folder, "smallest.yaml", FEW, *SLURM, *ON_GPU)
    process.wait()
    printed = read(folder / "printed")
    assert process.returncode == 0, printed
    return folder, interrupted + printed


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def running_on(node: str, folder: Path) -> list[str]:
    """Ids of the jobs of a project that run on a node."""
    listed = subprocess.run(
        ["squeue", "-h", "-w", node, "-o", "%A %Z"], capture_output=True, text=True, check=True
    )
    lines = (line.split() for line in listed.stdout.splitlines())
    return [job for job, where in lines if Path(where) == folder]


def jobs_of(stage: str, printed: str, cluster: Path) -> list[dict[str, str]]:
    """What SLURM noted about the jobs of a stage."""
    ids = re.findall(rf"SLURM jobid (\d+) \(log: \S*rule_{stage}/", printed)
    lines = (cluster / "jobs.txt").read_text().splitlines()
    noted = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]
    return [job for job in noted if job["JobId"] in ids]


def test_jobs_that_ask_for_a_gpu_run_side_by_side_each_with_its_own(probed):
    folder, process = probed
    wait_until(lambda: all((folder / f"probe/gpu_{n}").exists() for n in range(2)), process)
    wait_until(lambda: all(read(folder / f"probe/gpu_{n}").strip() for n in range(2)), process)
    seen = sorted(read(folder / f"probe/gpu_{n}").split() for n in range(2))
    assert seen == [["gpu1", "0"], ["gpu1", "1"]]


def test_a_job_killed_for_memory_runs_again_with_more_on_the_cpu_node(probed):
    folder, process = probed
    wait_until((folder / "probe/memory").exists, process)
    assert read(folder / "probe/memory").splitlines() == ["1200 cpu1", "2400 cpu1"]


def test_the_dag_gives_what_it_gives_locally(dag, tmp_path):
    folder, _ = dag
    local = copy_project(tmp_path / "project")
    snakemake(local, "smallest.yaml", FEW, "--cores", "2")
    assert len(digests(local)) > 25
    assert digests(folder) == digests(local)


def test_stages_with_a_gpu_land_on_its_node_and_the_others_do_not(dag, cluster):
    _, printed = dag
    for stage in GPU_STAGES:
        nodes = {job["NodeList"] for job in jobs_of(stage, printed, cluster)}
        assert nodes == {"gpu1"}, stage
    for stage in ("dataset", "region_index", "evaluation"):
        assert {job["NodeList"] for job in jobs_of(stage, printed, cluster)} == {"cpu1"}, stage


def test_shards_run_side_by_side(dag, cluster):
    _, printed = dag
    jobs = sorted(
        (job["StartTime"], job["EndTime"]) for job in jobs_of("region_embeddings", printed, cluster)
    )
    assert len(jobs) == 3
    assert any(later[0] < earlier[1] for earlier, later in zip(jobs, jobs[1:], strict=False))


def test_a_cancelled_job_was_submitted_again_and_resumed(dag, cluster):
    folder, printed = dag
    states = [job["JobState"] for job in jobs_of("proposal_network", printed, cluster)]
    assert states == ["CANCELLED", "COMPLETED"]
    assert "resuming after epoch" in read(folder / "results/smallest/logs/proposal_network.log")


def test_ctrl_c_cancels_the_jobs_and_the_same_command_resumes(dag, cluster):
    folder, printed = dag
    states = [job["JobState"] for job in jobs_of("base_detector", printed, cluster)]
    assert states == ["CANCELLED", "COMPLETED"]
    assert "resuming after epoch" in read(folder / "results/smallest/logs/base_detector.log")


def test_a_job_past_its_time_saves_and_resumes_with_more(probed, cluster, tmp_path):
    folder, process = probed
    process.wait()
    printed = read(folder / "printed")
    assert process.returncode == 0, printed
    states = [job["JobState"] for job in jobs_of("time", printed, cluster)]
    assert states == ["TIMEOUT", "COMPLETED"]
    found = json.loads(read(folder / "probe/time"))
    (epoch, step), *later = found["begun"]
    assert epoch == 2 and step > 0 and later == [[3, 0]]
    # What it would have been without an end; with a foreign checkpoint nothing is slow.
    (tmp_path / "checkpoint").write_text("")
    subprocess.run(
        [sys.executable, HERE / "slow_training.py", tmp_path / "checkpoint", tmp_path / "whole"],
        env=os.environ | {"PYTHONPATH": "."},
        check=True,
    )
    assert json.loads(read(tmp_path / "whole"))["history"] == found["history"]


def what_biases_learned(network: Path) -> np.ndarray:
    """Values of all biases that start at zero."""
    tensors, _ = read_tensors(network, "proposals")
    names = [n for n in tensors if n.endswith(".bias") and n != "conv.bias"]
    return np.concatenate([tensors[name].ravel() for name in sorted(names)])


def test_a_training_on_two_nodes_cancelled_on_the_way_gives_what_one_process_gives(
    cluster, tmp_path
):
    one, stage = copy_project(tmp_path / "one"), "results/smallest/proposals"
    network, log = f"{stage}/network.safetensors", "results/smallest/logs/proposal_network.log"
    snakemake(one, "smallest.yaml", SHORT, "results/smallest/dataset/train.json", "--cores", "2")
    two = shutil.copytree(one, tmp_path / "two")
    partition = ["--set-resources", "proposal_network:slurm_partition=both"]
    overlay = SHORT | {"training_nodes": 2}
    process = start_snakemake(two, "smallest.yaml", overlay, network, *SLURM, *partition)
    wait_until(lambda: "epoch 1/2" in read(two / log), process)
    subprocess.run(["scancel", *running_on("gpu1", two)], check=True)
    snakemake(one, "smallest.yaml", SHORT, network, "--cores", "2")
    process.wait()
    printed = read(two / "printed")
    assert process.returncode == 0, printed
    jobs = jobs_of("proposal_network", printed, cluster)
    assert [job["JobState"] for job in jobs] == ["CANCELLED", "COMPLETED"]
    assert {job["NodeList"] for job in jobs} == {"cpu1,gpu1"}
    assert re.search(r"resuming after epoch \d+ and \d+ steps", read(two / log))
    history, expected = (
        [json.loads(line) for line in read(folder / stage / "history.jsonl").splitlines()]
        for folder in (two, one)
    )
    assert history == [pytest.approx(line, rel=1e-5) for line in expected]
    found, learned = (what_biases_learned(folder / network) for folder in (two, one))
    assert np.linalg.norm(found - learned) <= 1e-3 * np.linalg.norm(learned)
