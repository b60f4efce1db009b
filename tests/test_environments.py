"""envs/ and the lock file must tell of the same versions."""

import re
from pathlib import Path

import pytest
import yaml

LINES = Path("requirements.lock").read_text().splitlines()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.lower())


LOCKED = {normal(n): v for n, _, v in (line.partition("==") for line in LINES) if v}


@pytest.mark.parametrize("path", sorted(Path("envs").glob("*.yaml")), ids=lambda path: path.stem)
def test_versions_are_those_of_the_lock_file(path):
    pip = yaml.safe_load(path.read_text())["dependencies"][-1]["pip"]
    pinned = dict(requirement.split("==") for requirement in pip)
    assert pinned == {name: LOCKED[normal(name)] for name in pinned}


@pytest.mark.parametrize("path", sorted(Path("envs").glob("*.yaml")), ids=lambda path: path.stem)
def test_torch_and_faiss_for_gpus_are_never_together(path):
    """Each brings a CUDA of its own."""
    *conda, pip = yaml.safe_load(path.read_text())["dependencies"]
    names = {re.split("[=<>]", requirement)[0] for requirement in [*conda, *pip["pip"]]}
    assert len(names & {"torch", "faiss-gpu", "faiss-cpu"}) == 1


def test_every_rule_names_an_environment_that_exists():
    for path in Path("rules").glob("*.smk"):
        for named in re.findall(r"envs/(\w+)\.yaml", path.read_text()):
            assert Path(f"envs/{named}.yaml").is_file(), path
