"""The training loop: the original's schedule, and resuming after a kill."""

import fcntl
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lpovod.artifacts import identity
from lpovod.config import LinearProbeSettings, ProposalsSettings, TrainingSettings
from lpovod.exceptions import LpovodError
from lpovod.schedule import rate_at
from lpovod.training import resumable, train

RECORDED = Path("../shared/data/goldens/golden_lr.npz")

# Some of the original's recorded rates, 60 steps per epoch: warm-up, plateau, both milestones.
BASE = TrainingSettings(
    learning_rate=0.02, epochs=20, milestones=[16, 19], warmup_steps=500, warmup_ratio=0.001
)
STEPS = {0: 2e-5, 250: 0.01001, 499: 0.01996004, 500: 0.02, 959: 0.02, 960: 0.002, 1140: 0.0002}


@pytest.mark.parametrize(("step", "rate"), STEPS.items())
def test_rates_are_the_original_s(step, rate):
    assert math.isclose(rate_at(step, 60, BASE), rate, rel_tol=1e-6)


@pytest.mark.skipif(not RECORDED.exists(), reason="needs the recorded values")
def test_every_recorded_rate():
    recorded = np.load(RECORDED)
    base = [rate_at(i, 60, BASE) for i in range(1200)]
    assert np.allclose(base, recorded["base_ipe60"], rtol=1e-6)
    probe = LinearProbeSettings(
        learning_rate=0.001, milestones=[8, 11], warmup_steps=20, warmup_ratio=0.1
    )
    found = [rate_at(i, 7, probe) for i in range(84)]
    assert np.allclose(found, recorded["ft_ipe7"], rtol=1e-6)


def fit(
    checkpoint: Path,
    stop_at: int | None = None,
    fingerprint: str = "a",
    optimizer: str = "sgd",
    signal_at: tuple[int, int, int] | None = None,
    precision: str = "float32",
):
    """Fit a small random regression; optionally end abruptly in an epoch.

    `signal_at` is epoch, step and number of a signal that the process sends itself.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    started = []

    def batches(epoch, step):
        started.append((epoch, step))
        if epoch == stop_at:
            raise KeyboardInterrupt
        torch.randn(1)  # as torch's loader does
        drawn = torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(epoch))
        for number, batch in enumerate(drawn[step:], start=step):
            if signal_at and signal_at[:2] == (epoch, number):
                signal.raise_signal(signal_at[2])
            yield batch

    def losses(batch):
        return {"square": (model(batch[:, :3]) - batch.sum(1, keepdim=True)).square().mean()}

    schedule = TrainingSettings(
        epochs=4, learning_rate=0.05, milestones=[3], warmup_steps=3, optimizer=optimizer
    ).model_copy(update={"precision": precision})
    history = train(model, losses, batches, 5, schedule, checkpoint, fingerprint)
    return model.state_dict(), history, started


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_training_resumes_to_the_same_result(tmp_path, optimizer):
    whole, history, _ = fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=2, optimizer=optimizer)
    resumed, resumed_history, started = fit(tmp_path / "killed", optimizer=optimizer)
    assert started == [(2, 0), (3, 0)]
    assert resumed_history == history
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_training_goes_on_with_weights_in_another_layout(tmp_path, optimizer):
    """As on another device or in another precision, on which the layout depends (`ready`)."""
    drawn = torch.randn(4, 3, 8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    schedule = TrainingSettings(
        epochs=4, learning_rate=0.05, milestones=[3], warmup_steps=3, optimizer=optimizer
    )

    def learn(name: str, layout: torch.memory_format, stop_at: int = -1) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
        model.to(memory_format=layout)

        def batches(epoch, step):
            if epoch == stop_at:
                raise KeyboardInterrupt
            return drawn[epoch, step:]

        def losses(batch):
            return {"square": (model(batch) - batch[:, :1, 2:4, 2:4]).square().mean()}

        train(model, losses, batches, 3, schedule, tmp_path / name, "a")
        return model.state_dict()

    whole = learn("whole", torch.contiguous_format)
    for layout in (torch.contiguous_format, torch.channels_last):
        with pytest.raises(KeyboardInterrupt):
            learn(str(layout), torch.contiguous_format, stop_at=2)
        resumed = learn(str(layout), layout)
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spoil", ["fingerprint", "damage"])
def test_a_foreign_or_damaged_checkpoint_is_not_resumed(tmp_path, spoil):
    checkpoint = tmp_path / "checkpoint"
    fit(checkpoint)
    if spoil == "damage":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    _, _, started = fit(checkpoint, fingerprint="b" if spoil == "fingerprint" else "a")
    assert started == [(0, 0), (1, 0), (2, 0), (3, 0)]


def build_network() -> nn.Module:
    """With a norm that uses its running statistics; double, to see more than rounding."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 1))
    model = nn.Sequential(*layers).double()
    model[1].eval()
    return model


@pytest.mark.parametrize("at_once", [1, 2, 4, 6])
def test_a_step_in_parts_is_the_step_of_all_images_at_once(tmp_path, at_once):
    images = torch.randn(3, 7, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    largest = []

    def learn(images_at_once: int | None):
        model = build_network()

        def losses(part):
            largest.append(len(part))
            error = model(part)[:, 0] - part.sum((1, 2, 3))
            return {"square": error.square().mean(), "size": error.abs().mean()}

        schedule = TrainingSettings(
            epochs=2,
            images_per_step=7,
            images_at_once=images_at_once,
            learning_rate=0.02,
            milestones=[2],
            warmup_steps=0,
            gradient_norm=0.5,  # less than most of this model's
        )
        path = tmp_path / str(images_at_once)
        history = train(model, losses, lambda epoch, step: images[step:], 3, schedule, path, "a")
        return model.state_dict(), history

    expected, expected_history = learn(None)
    largest.clear()
    found, history = learn(at_once)
    assert max(largest) <= at_once
    assert sum(largest) == 2 * 3 * 7
    assert history == [pytest.approx(line, rel=1e-12) for line in expected_history]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_that_the_first_step_does_not_use_is_learned_later(tmp_path, optimizer):
    """As the CLIP head, if no image of the first step has a proposal."""
    model = nn.ModuleList([nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)])
    for layer in model:
        nn.init.ones_(layer.weight)
    schedule = TrainingSettings(
        epochs=1, learning_rate=0.1, milestones=[], warmup_steps=0, weight_decay=0.5
    ).model_copy(update={"optimizer": optimizer})

    def losses(batch):
        used = list(model)[: batch[0]]
        return {"sum": sum(layer.weight.sum() for layer in used)}

    train(model, losses, lambda epoch, step: [[1], [2]], 2, schedule, tmp_path / "c", "a")
    if optimizer == "sgd":  # by hand: the weight decay; then it with a gradient and the momentum
        second = 1 - 0.05 - 0.1 * (0.9 * 0.5 + 1 + 0.5 * 0.95)
        assert model[1].weight.item() == pytest.approx(second)
    assert model[1].weight.item() < 0.95


def test_a_training_is_resumed_in_another_precision_and_with_other_parts(tmp_path):
    settings = ProposalsSettings(training=TrainingSettings())
    made_from = identity("proposals", settings)

    def changed(**values) -> str:
        training = settings.training.model_copy(update=values)
        return resumable(
            identity("proposals", settings.model_copy(update={"training": training})), "code"
        )

    same = resumable(made_from, "code")
    assert changed(precision="bfloat16", images_at_once=2) == same
    assert len({same, changed(learning_rate=0.1), changed(images_per_step=4)}) == 3
    assert resumable(made_from, "other code") != same
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", stop_at=2)
    weights, history, started = fit(tmp_path / "killed", precision="bfloat16")
    assert started == [(2, 0), (3, 0)]
    assert all(weight.dtype in (torch.float32, torch.int64) for weight in weights.values())
    assert len(history) == 4


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    model = nn.Linear(1, 1)
    with pytest.raises(LpovodError, match="step 0: a loss is not finite"):
        train(
            model,
            lambda batch: {"bad": model(batch).sum() / 0},
            lambda epoch, step: torch.ones(1, 1, 1),
            1,
            TrainingSettings(),
            tmp_path / "checkpoint",
            "a",
        )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_end_resumes_after_its_last_step(tmp_path, optimizer, number):
    whole, history, _ = fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(SystemExit) as ended:
        fit(tmp_path / "ended", optimizer=optimizer, signal_at=(2, 1, number))
    assert ended.value.code == 128 + number
    resumed, resumed_history, started = fit(tmp_path / "ended", optimizer=optimizer)
    assert started == [(2, 2), (3, 0)]
    assert resumed_history == history
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_two_trainings_never_share_a_checkpoint(tmp_path):
    checkpoint = tmp_path / "network.checkpoint"
    with open(tmp_path / ".network.checkpoint.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        message = "network.checkpoint is in use by another training. Wait for it, or stop it"
        with pytest.raises(LpovodError, match=message):
            fit(checkpoint)
    fit(checkpoint)
