"""Forked ranks: what they tell each other, what they learn, and how they end.

The blocks run in this process and in its copies, which end with the block; what the copies find
reaches this one through files, or as the error that they raise.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import normalise
from torch import nn

from lpovod.config import TrainingSettings
from lpovod.distributed import (
    BatchNorm2d,
    largest,
    rank,
    ranks,
    start_alike,
    total,
    training_ranks,
    update,
)
from lpovod.exceptions import LpovodError
from lpovod.shared_ranks import LostRank, fork_ranks
from lpovod.training import train

ITEMS = 7


def fit(
    checkpoint: Path,
    threads: int,
    optimizer: str = "sgd",
    disturb=lambda epoch, step: None,
    at_once: int | None = None,
    frozen: bool = False,
):
    """Four epochs of a small regression with a norm, on so many ranks; its weights and history.

    `disturb` is called before each step on every rank; a `frozen` norm keeps its statistics.
    """
    with training_ranks("cpu", threads, ITEMS):
        torch.manual_seed(0)
        # A bias before a norm would have no gradient but rounding, which AdamW makes large.
        layers = (nn.Conv2d(2, 4, 1, bias=False), BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 1))
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
        model[1].train(not frozen)

        def batches(epoch, step):
            drawn = torch.Generator().manual_seed(epoch)
            whole = torch.randn(3, ITEMS, 2, 2, 2, generator=drawn)
            for number, batch in enumerate(whole[step:], start=step):
                disturb(epoch, number)
                yield batch[rank() :: ranks()]

        def losses(images):
            assert len(images), "a norm could not do with nothing"
            error = (model(images)[:, 0] - images.sum((1, 2, 3))).square().sum()
            return {"square": error / total(torch.tensor(float(len(images))))}

        schedule = TrainingSettings(
            epochs=4,
            images_per_step=ITEMS,
            images_at_once=at_once,
            learning_rate=0.02,
            optimizer=optimizer,
            milestones=[3],
            warmup_steps=3,
            gradient_norm=0.5,  # less than most of this model's
        )
        history = train(model, losses, batches, 3, schedule, checkpoint, "a")
        return {name: value.clone() for name, value in model.state_dict().items()}, history


def same(found: tuple, expected: tuple) -> None:
    for name, value in expected[0].items():
        error = float((found[0][name].float() - value.float()).abs().max())
        assert error <= 1e-5 * float(value.abs().max()), (name, error)
    assert found[1] == [pytest.approx(line, rel=1e-5) for line in expected[1]]


def at(epoch: int, step: int, number: int, act):
    """A disturbance of one rank at one step."""
    return lambda *now: act() if (*now, rank()) == (epoch, step, number) else None


def children() -> set[str]:
    """Ids of this process's children; a loader of an earlier test may have left a helper."""
    lists = Path("/proc/self/task").glob("*/children")
    return {child for path in lists for child in path.read_text().split()}


@pytest.fixture(autouse=True)
def no_child_is_left():
    """Every test ends with the children that it began with, running or not yet waited for."""
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize("count", [2, 3])
def test_all_ranks_get_the_same_sum_and_the_same_largest(tmp_path, count):
    values = torch.randn(count, 3, 10_000, generator=torch.Generator().manual_seed(0))
    with fork_ranks(count):
        summed = total(values[rank()])  # more than one packet
        counts = [largest([rank(), -rank(), 7]), total(torch.tensor(rank())).item(), ranks()]
        torch.save((summed, counts), tmp_path / str(rank()))
    results = [torch.load(tmp_path / str(number)) for number in range(count)]
    for summed, counts in results:
        assert torch.equal(summed, results[0][0])
        assert torch.allclose(summed, values.sum(0), atol=1e-6)
        assert counts == [[count - 1, 0, 7], count * (count - 1) // 2, count]
    assert (rank(), ranks()) == (0, 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_has_the_statistics_of_all_ranks(tmp_path, layout):
    torch.manual_seed(1)
    images, weights = torch.randn(4, 3, 5, 6) * 3 + 7, torch.randn(4, 3, 5, 6)
    images = images.to(memory_format=layout)
    expected = normalise(images.clone(), weights, nn.BatchNorm2d(3))
    parts = [slice(0, 1), slice(1, 1), slice(1, None)]  # one rank has no item at all
    with fork_ranks(3):
        part = parts[rank()]
        result = normalise(images[part].clone(), weights[part], BatchNorm2d(3))
        torch.save(result, tmp_path / str(rank()))
    results = [torch.load(tmp_path / str(number)) for number in range(3)]
    for key, value in expected.items():
        if key in ("y", "of_images"):
            assert torch.allclose(torch.cat([r[key] for r in results]), value, atol=1e-5), key
        else:
            assert torch.allclose(results[0][key], value, rtol=1e-5, atol=1e-5), key
            assert all(torch.equal(r[key], results[0][key]) for r in results)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("threads", [2, 3])
def test_several_ranks_learn_what_one_learns(tmp_path, optimizer, threads):
    expected = fit(tmp_path / "one", 1, optimizer)
    same(fit(tmp_path / "several", threads, optimizer), expected)


@pytest.mark.parametrize(("threads", "at_once"), [(1, 2), (2, 1), (2, 2), (3, 1), (3, 2)])
def test_ranks_take_a_step_in_parts(tmp_path, threads, at_once):
    """Seven images cannot be divided evenly: every part has an image on every rank all the same."""
    expected = fit(tmp_path / "whole", 1, frozen=True)
    same(fit(tmp_path / "parts", threads, at_once=at_once, frozen=True), expected)


def test_parameters_keep_their_layout():
    """Or convolutions would lose theirs, and an optimizer's state from a checkpoint be misread."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    before = model.weight.detach().clone()
    with fork_ranks(2):
        start_alike(model, torch.optim.SGD(model.parameters()), 0)
        assert model.weight.stride() == before.stride()
        assert torch.equal(model.weight, before)


def test_a_gradient_that_a_rank_lacks_or_all_lack_is_zero():
    def step(gradients: list[tuple[int, float]]) -> list[float]:
        """Of parameters 0 ... 3 these have these gradients; two steps, for the momentum."""
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.ones(size)) for size in (1, 2, 3, 4)])
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.5)
        start_alike(model, optimizer, 0)
        for _ in range(2):
            optimizer.zero_grad()
            for number, value in gradients:
                model[number].grad = torch.full_like(model[number], value)
            update(model, optimizer, 1000)
        return [round(p.max().item(), 6) for p in model]

    expected = step([(0, 4.0), (1, 2.0), (2, 3.0)])
    with fork_ranks(2):
        parts = [[(0, 1.0), (1, 2.0)], [(0, 3.0), (2, 3.0)]]
        assert step(parts[rank()]) == expected
    # By hand: the weight decay alone, then with the momentum of its first step.
    assert expected[3] == pytest.approx(1 - 0.05 - 0.1 * (0.9 * 0.5 + 0.5 * 0.95))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("counts", [(1, 2, 1), (2, 1, 3), (3, 2, 2)])
def test_another_number_of_ranks_resumes_a_checkpoint(tmp_path, optimizer, counts):
    expected = fit(tmp_path / "whole", 1, optimizer)
    for threads, epoch in zip(counts, (1, 2), strict=False):
        # The signal reaches one of the ranks alone, the last.
        end = at(epoch, 1, threads - 1, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            fit(tmp_path / "state", threads, optimizer, end)
        assert ended.value.code == 128 + signal.SIGTERM
    steps = []
    last = fit(tmp_path / "state", counts[2], optimizer, lambda *now: steps.append(now))
    same(last, expected)
    assert steps[0] == (2, 2)


def test_a_checkpoint_of_ranks_is_one_of_a_single_process(tmp_path):
    """So torch's launcher and earlier versions read it."""

    def end():
        raise KeyboardInterrupt

    for threads in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / str(threads), threads, "adamw", lambda *now: now < (2, 0) or end())
    one, three = (torch.load(tmp_path / str(threads)) for threads in (1, 3))
    assert one["optimizer"]["param_groups"] == three["optimizer"]["param_groups"]
    assert list(one["optimizer"]["state"]) == list(three["optimizer"]["state"])
    for number, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.allclose(three["optimizer"]["state"][number][name], value, rtol=1e-3)
    assert (tmp_path / "3").stat().st_size < 1.1 * (tmp_path / "1").stat().st_size


def test_a_killed_rank_ends_the_training_which_can_be_resumed(tmp_path):
    expected = fit(tmp_path / "whole", 1)
    kill = at(2, 1, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LostRank, match="process 2 of 3 .* by signal 9"):
        fit(tmp_path / "state", 3, disturb=kill)
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name) == [
        ".state.lock",
        "state",
    ]
    same(fit(tmp_path / "state", 2), expected)


@pytest.mark.slow
def test_a_killed_first_process_leaves_no_other(tmp_path):
    """The pipe that all of them write to ends when the last of them does."""
    code = (
        "import os, signal, sys; from pathlib import Path; from test_shared_ranks import at, fit; "
        "kill = at(2, 1, 0, lambda: os.kill(os.getpid(), signal.SIGKILL)); "
        "fit(Path(sys.argv[1]), 3, disturb=kill)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state"],
        env=os.environ | {"PYTHONPATH": ".:tests", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".state.lock", "state"]
    expected = fit(tmp_path / "whole", 1)
    same(fit(tmp_path / "state", 2), expected)


def test_what_a_killed_rank_started_does_not_hide_its_end():
    """Processes that load images may live on for a while."""
    waits, ends = os.pipe()
    with pytest.raises(LostRank), fork_ranks(2):
        if rank() == 1:
            if os.fork() == 0:
                os.close(ends)
                os.read(waits, 1)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)
        largest([0])
    os.close(ends)
    os.close(waits)


def test_the_error_of_any_rank_is_the_training_s(tmp_path):
    def refuse():
        raise LpovodError("7.png is no image")

    def fail():
        raise KeyError("seven")

    with pytest.raises(LpovodError, match=r"^7.png is no image$"):
        fit(tmp_path / "state", 3, disturb=at(0, 1, 2, refuse))
    with pytest.raises(RuntimeError, match="in process 3 of the training(.|\n)*KeyError: 'seven'"):
        fit(tmp_path / "state", 3, disturb=at(0, 1, 2, fail))
    with pytest.raises(KeyError, match="seven"):
        fit(tmp_path / "state", 3, disturb=at(0, 1, 0, fail))


@pytest.mark.slow
def test_only_the_first_process_reports(tmp_path):
    code = (
        "import sys; from pathlib import Path; from test_shared_ranks import fit; "
        "from lpovod.progress import start_logging; start_logging(); "
        "print('buffered'); fit(Path(sys.argv[1]), 2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state"],
        env=os.environ | {"PYTHONPATH": ".:tests", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "buffered\n"
    assert done.stderr.count("epoch 3/4: square") == 1
    assert done.stderr.count("3/3") == 4  # bars
