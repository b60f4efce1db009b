"""Before the first job: every fault of models, weights, index and GPU, all at once."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_clip
from project import copy_project, snakemake
from safetensors.torch import save_file

from lpovod.config import Config, load_config, merge
from lpovod.devices import check_gpu
from lpovod.exceptions import LpovodError
from lpovod.importers.backbone import start_from
from lpovod.networks.proposal_network import ProposalNetwork
from lpovod.stages.preflight import preflight

BASE = yaml.safe_load(Path("config.yaml").read_text())


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> dict:
    return make_clip(tmp_path_factory.mktemp("clip"), seed=0).model_dump(mode="json")


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory) -> Path:
    """Random weights with timm's names."""
    import timm

    path = tmp_path_factory.mktemp("timm") / "resnet18.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    return path


def config(**overlay) -> Config:
    return load_config(merge(BASE, overlay))


def problems(configured: Config) -> list[str]:
    with pytest.raises(LpovodError) as caught:
        preflight(configured)
    return str(caught.value).split("\nerror: ")


def test_the_shipped_models_pass():
    preflight(config())


def test_a_tiny_clip_and_a_model_of_timm_s_pass(clip, resnet18):
    backbone = {"architecture": "timm:resnet18", "weights": str(resnet18)}
    preflight(config(clip=clip, backbone=backbone))


def test_an_unknown_clip_is_named():
    (problem,) = problems(config(clip={"architecture": "ViT-B-33", "vocabulary": None}))
    assert "open_clip knows no model named 'ViT-B-33'; did you mean ViT-B-32" in problem


def test_clip_weights_of_another_architecture_are_refused(clip):
    shipped = BASE | {"clip": {"architecture": clip["architecture"], "vocabulary": None}}
    (problem,) = problems(load_config(shipped))
    assert "do not fit the architecture" in problem and "missing: " in problem


def test_half_a_file_of_clip_weights_is_refused(clip, tmp_path):
    half = tmp_path / "half.safetensors"
    half.write_bytes(Path(clip["weights"]).read_bytes()[:5000])
    (problem,) = problems(config(clip=clip | {"weights": str(half)}))
    assert f"{half} is not a complete file of CLIP weights" in problem


def test_a_vocabulary_of_another_clip_is_refused(clip):
    vocabulary = "resources/small_clip/vocabulary.txt.gz"
    (problem,) = problems(config(clip=clip | {"vocabulary": vocabulary}))
    assert f"the vocabulary {vocabulary} has " in problem and "embeds 49408" in problem


def test_an_architecture_with_a_wrong_number_is_refused_in_words(clip, tmp_path):
    document = tmp_path / "architecture.json"
    document.write_text(Path(clip["architecture"]).read_text().replace('"layers"', '"layer"'))
    (problem,) = problems(config(clip=clip | {"architecture": str(document)}))
    assert problem.startswith("clip: cannot be built: TypeError") and "'layer'" in problem


def test_an_unknown_backbone_is_named():
    (problem,) = problems(config(backbone={"architecture": "timm:resnet19", "weights": None}))
    assert "timm has no model 'resnet19'; did you mean timm:resnet18" in problem


def test_backbone_weights_of_another_architecture_are_refused(resnet18):
    backbone = {"architecture": "timm:resnet34", "weights": str(resnet18)}
    (problem,) = problems(config(backbone=backbone))
    assert str(resnet18) in problem and "timm:resnet34" in problem


def test_backbone_weights_of_other_channels_are_refused():
    (problem,) = problems(config(backbone={"channels": 32}))
    assert "does not fit the settings of backbone" in problem and "expected (32," in problem


@pytest.mark.parametrize(
    ("factory", "words"),
    [("SQfp17", "could not parse index string"), ("HNSW32", "can search only"), ("PQ5", "PQ5")],
)
def test_a_factory_that_faiss_cannot_make_is_refused(clip, factory, words):
    (problem,) = problems(config(clip=clip, region_index={"factory": factory}))
    assert f"region_index.factory = {factory!r}" in problem and words in problem
    assert ".cpp" not in problem


def test_a_gpu_is_required_only_where_the_jobs_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    preflight(config(gpu=True))
    with pytest.raises(LpovodError, match="gpu: true.*set gpu: false"):
        check_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpu()


def test_all_problems_are_listed_at_once():
    wrong = {
        "clip": {"architecture": "ViT-B-33", "vocabulary": None},
        "backbone": {"architecture": "timm:resnet19"},
        "region_index": {"factory": "SQfp17"},
    }
    assert len(problems(config(**wrong))) == 3


def test_weights_to_be_downloaded_are_not_compared(tmp_path):
    clip = {"architecture": "ViT-B-32-quickgelu", "vocabulary": None}
    backbone = {
        "architecture": "resnet50_torchvision",
        "weights": str(tmp_path / "resnet50-0676ba61.pth"),
    }
    preflight(config(clip=clip | {"weights": str(tmp_path / "ViT-B-32.pt")}, backbone=backbone))


def test_what_is_imported_is_not_compared():
    imported = {
        "proposals": {"files": {"train": "a.pkl", "val": "b.pkl"}},
        "base_detector": {"checkpoint": "detector.pth"},
        "linear_probe": {"checkpoint": "detector.pth"},
        "region_index": {"factory": "SQfp17"},
        "backbone": {"channels": 32},
    }
    preflight(config(**imported))


def test_what_passes_can_be_trained_from():
    """The comparison without memory accepts what the loader accepts, and the same tensors."""
    settings = config().backbone
    network = ProposalNetwork(settings, 8.0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start_from(network, settings.weights, settings.architecture)
    changed = [n for n, t in network.state_dict().items() if not torch.equal(t, before[n])]
    assert any(name.startswith("backbone.") for name in changed)


@pytest.mark.slow
def test_the_workflow_checks_once_and_refuses_before_any_job(tmp_path):
    folder = copy_project(tmp_path / "project")
    passed = folder / ".snakemake/lpovod/preflight"
    snakemake(folder, "smallest.yaml", {}, "-n")
    program = folder / "lpovod/networks/meta.py"
    content = program.read_text()
    # A second call starts no process.
    (first,) = passed.iterdir()
    written = first.stat().st_mtime_ns
    snakemake(folder, "smallest.yaml", {"seed": 7}, "-n")
    assert [path.stat().st_mtime_ns for path in passed.iterdir()] == [written]
    # Code, settings and files are looked at again once they change.
    program.write_text(content + "\nraise SystemExit(3)\n")
    done = _try(folder)
    assert done.returncode == 1
    # What passed before stays so: neither other code in between nor another configuration counts.
    program.write_text(content)
    for factory in ("Flat", "SQfp16"):
        snakemake(folder, "smallest.yaml", {"region_index": {"factory": factory}}, "-n")
    assert len(list(passed.iterdir())) == 2 and first.stat().st_mtime_ns == written
    (folder / "overlay.yaml").write_text("{gpu: true, region_index: {factory: SQfp17}}")
    printed = _try(folder).stdout.splitlines()
    assert printed[-2].startswith("error: region_index.factory = 'SQfp17'")
    # A plan can be printed anywhere; a run needs the GPU, and says so beside every other problem.
    printed = _try(folder, "--cores", "1").stdout
    assert "error: gpu: true" in printed and "error: region_index.factory" in printed
    (folder / "overlay.yaml").write_text("gpu: true")
    assert _try(folder).returncode == 0
    done = _try(folder, "--cores", "1")
    assert done.returncode == 1 and "error: gpu: true" in done.stdout
    # Whether there is a GPU is a question of its own: for that, nothing else was checked again.
    assert len(list(passed.iterdir())) == 2
    assert not (folder / "results").exists()


def _try(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        "snakemake",
        *(arguments or ["-n"]),
        "--configfile",
        "configs/smallest.yaml",
        "overlay.yaml",
    ]
    # An empty list of devices, as on a machine without a GPU.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    output = {
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    return subprocess.run(command, cwd=folder, **output)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\n<html>404</html>", "it is a web page"),
        (b"\x80\x02cos\nsystem\n.", "it names os.system, which is no tensor"),
        (b"\x80\x02c", "it is damaged, or holds more than tensors"),
    ],
)
@pytest.mark.parametrize("block", ["clip", "backbone"])
def test_a_file_that_holds_no_weights_is_told_from_a_damaged_one(tmp_path, block, content, reason):
    (tmp_path / "weights.pt").write_bytes(content)
    change = {"weights": str(tmp_path / "weights.pt")}
    if block == "backbone":
        change |= {"architecture": "resnet50", "channels": 256}
    default = yaml.safe_load(Path("config.yaml").read_text())
    with pytest.raises(LpovodError, match=reason) as error:
        preflight(load_config(merge(default, {block: change})))
    assert "weights_only" not in str(error.value)


def test_a_name_that_is_longer_than_clip_reads_is_refused():
    default = yaml.safe_load(Path("config.yaml").read_text())
    novel = {"classes": {"novel": ["a cup " * 9 + "a"]}}
    with pytest.raises(LpovodError, match="tokens and this CLIP reads 14"):
        preflight(load_config(merge(default, novel)))
