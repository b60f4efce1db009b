"""Devices: which exist, whose card is whose, and the stages on another device than the CPU."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lpovod.apps.detect import detect
from lpovod.apps.learn import learn
from lpovod.apps.serve import serve
from lpovod.config import (
    BackboneSettings,
    BaseDetectorSettings,
    ClipSettings,
    ProposalsSettings,
    RegionEmbeddingsSettings,
    RegionFeaturesSettings,
)
from lpovod.devices import VISIBLE, device_of, explaining_memory, own_device, see_own_cards
from lpovod.exceptions import LpovodError
from lpovod.stages.base_detector import train_base_detector
from lpovod.stages.proposal_network import train_proposal_network
from lpovod.stages.proposals import propose
from lpovod.stages.region_embeddings import embed_regions
from lpovod.stages.region_features import extract_retrieved, extract_split

NOWHERE = Path("nowhere")
BACKBONE, HEADS, FINDER = BackboneSettings(), BaseDetectorSettings(), ProposalsSettings()


@pytest.mark.slow
def test_every_stage_computes_the_same_on_another_device():
    """In a process of its own: a backend is registered for a whole process."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/device_cases.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    print(done.stdout)


# -------------------------------------------------------------------------- a card of its own

LOCK = """
import json, sys
from pathlib import Path
from lpovod.devices import lock_cards
print(json.dumps(lock_cards(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))), flush=True)
"""
HOLD = LOCK + "sys.stdin.read()"
BECOME_ANOTHER = LOCK + "import os; os.execvp('cat', ['cat'])"


@contextmanager
def job(number: int, cards: int, folder: Path, program: str = HOLD):
    """A process that locks cards, and what it locked; it ends with the block."""
    command = [sys.executable, "-c", program, str(number), str(cards), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield process, json.loads(process.stdout.readline())
        process.stdin.close()


def locked(number: int, cards: int, folder: Path) -> list[int]:
    """What a job gets that ends at once."""
    with job(number, cards, folder) as (_, taken):
        return taken


def test_two_jobs_have_a_card_each(tmp_path):
    with job(1, 2, tmp_path) as (_, one), job(1, 2, tmp_path) as (_, other):
        assert sorted(one + other) == [0, 1]


def test_a_killed_job_s_card_is_free(tmp_path):
    with job(1, 2, tmp_path) as (killed, first), job(1, 2, tmp_path) as (_, second):
        killed.kill()
        killed.wait()
        assert locked(1, 2, tmp_path) == first != second


def test_a_training_has_as_many_cards_as_ranks_and_no_card_of_others(tmp_path):
    with job(1, 4, tmp_path) as (_, one), job(3, 4, tmp_path) as (_, training):
        assert sorted(one + training) == [0, 1, 2, 3]


def test_jobs_beyond_the_cards_share_those_with_the_fewest(tmp_path):
    with job(1, 2, tmp_path), job(1, 2, tmp_path), job(1, 2, tmp_path) as (_, third):
        assert third == [0]
        assert locked(1, 2, tmp_path) == [1]
        assert locked(2, 2, tmp_path) == [0, 1]


def test_the_cards_of_a_training_are_different_however_busy(tmp_path):
    with job(1, 2, tmp_path), job(1, 2, tmp_path) as (ending, second), job(1, 2, tmp_path):
        ending.kill()
        ending.wait()
        assert second == [1]
        assert locked(2, 2, tmp_path) == [0, 1]


def test_a_program_that_a_job_becomes_keeps_its_card(tmp_path):
    with job(1, 2, tmp_path, BECOME_ANOTHER) as (_, one):
        assert locked(1, 2, tmp_path) == [1 - one[0]]


def test_every_user_can_open_a_lock_whatever_the_umask_of_its_maker(tmp_path):
    """Otherwise another user's job would take the card as well."""
    others = tmp_path / "lpovod-gpu-0-0.lock"
    others.touch(0o604)
    umask = os.umask(0o077)
    try:
        assert locked(2, 2, tmp_path) == [0, 1]
    finally:
        os.umask(umask)
    modes = [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())]
    assert modes == [0o604, 0o644]  # and that of others is left as it is


def test_locks_that_cannot_be_made_are_no_failure(tmp_path, logged):
    from lpovod.devices import lock_cards

    assert lock_cards(1, 2, tmp_path / "absent") == [0]
    assert "another job may use the same GPU" in logged.text


@pytest.fixture
def two_cards(monkeypatch, tmp_path):
    """A machine with two cards, whose locks are in a folder of the test's own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(VISIBLE, raising=False)
    yield tmp_path
    os.environ.pop(VISIBLE, None)


def test_a_job_sees_its_card_alone(two_cards):
    with job(1, 2, two_cards):
        assert own_device("cuda") == "cuda"
        assert os.environ[VISIBLE] == "1"
    assert own_device("cuda") == "cuda"  # it keeps the one that it has
    assert os.environ[VISIBLE] == "1"


@pytest.mark.parametrize(
    "start",
    [
        lambda: detect(("docs/pictures/serve.png",), model=NOWHERE),
        lambda: learn("otter", NOWHERE, output=NOWHERE, device="cuda"),
        lambda: serve(model=NOWHERE, port=0),
    ],
    ids=["detect", "learn", "serve"],
)
def test_a_program_sees_a_card_of_its_own_before_it_reads_anything(two_cards, start):
    assert device_of(None) == "cuda"  # as a library does
    assert VISIBLE not in os.environ
    with job(1, 2, two_cards), pytest.raises(LpovodError, match="nowhere.*: no such file"):
        start()
    assert os.environ[VISIBLE] == "1"


@pytest.mark.parametrize("given", ["0,1", ""])
def test_a_choice_of_somebody_else_is_left_alone(two_cards, monkeypatch, given):
    monkeypatch.setenv(VISIBLE, given)
    own_device("cuda")
    see_own_cards(2)
    assert os.environ[VISIBLE] == given
    assert not list(two_cards.iterdir())


def test_ranks_without_enough_cards_are_left_to_say_so(two_cards):
    see_own_cards(3)
    assert VISIBLE not in os.environ
    with pytest.raises(LpovodError, match=r"'cuda:2': this machine has cpu, cuda, cuda:0, cuda:1"):
        device_of("cuda:2")


def test_the_cpu_needs_no_card(two_cards):
    assert own_device("cpu") == "cpu"
    assert VISIBLE not in os.environ


# --------------------------------------------------------------------------------- messages


def stages() -> dict:
    """Every stage that takes a device, with inputs that do not exist: it must not get so far."""
    files = (NOWHERE,) * 2
    retrieved = (BACKBONE, HEADS, RegionFeaturesSettings(), 0, 1, *files, "code")
    return {
        "proposal_network": lambda device: train_proposal_network(
            NOWHERE, BACKBONE, FINDER, 0, NOWHERE, "code", *files, device
        ),
        "base_detector": lambda device: train_base_detector(
            NOWHERE, [], NOWHERE, BACKBONE, HEADS, 0, NOWHERE, "code", *files, device
        ),
        "proposals": lambda device: propose(*files, BACKBONE, FINDER, 0, 1, NOWHERE, device),
        "region_embeddings": lambda device: embed_regions(
            *(*files, ClipSettings(), RegionEmbeddingsSettings(), NOWHERE, "code", NOWHERE),
            device,
        ),
        "split": lambda device: extract_split(
            *(*files, NOWHERE, BACKBONE, HEADS, RegionFeaturesSettings(), NOWHERE, device)
        ),
        "retrieved": lambda device: extract_retrieved(
            *(NOWHERE, [NOWHERE], *files, *retrieved, device)
        ),
    }


@pytest.mark.parametrize("stage", stages())
def test_a_stage_without_its_gpu_says_so_before_it_reads_anything(stage, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(VISIBLE, "")
    with pytest.raises(LpovodError) as caught:
        stages()[stage]("cuda")
    assert str(caught.value).startswith("device 'cuda': this machine has cpu")
    assert "Set gpu: false, or give the device cpu" in str(caught.value)


@pytest.mark.parametrize("device", ["gpu", "cudas", "cuda:x", "mps"])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(LpovodError, match=f"device '{device}': this machine has cpu"):
        device_of(device)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
)
def test_a_lack_of_memory_names_the_key_of_the_stage(error):
    with pytest.raises(LpovodError, match="Lower a.b$") as caught, explaining_memory("a.b"):
        raise error
    assert str(caught.value).startswith("not enough memory: ")
    assert "more\n" not in str(caught.value)


class Killed(torch.utils.data.Dataset):
    """Ends whoever loads from it, as Linux does when memory is used up."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def test_a_killed_loading_process_is_a_lack_of_memory():
    with (
        pytest.raises(LpovodError, match="killed by signal.*\nLower a.b$"),
        explaining_memory("a.b"),
    ):
        list(torch.utils.data.DataLoader(Killed(), num_workers=1))


def test_another_error_is_passed_on():
    with pytest.raises(RuntimeError, match="a defect"), explaining_memory("a.b"):
        raise RuntimeError("a defect")
