"""The training loop: one, visible, resumable, for every network of the workflow."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpovod.artifacts import Identity, LpovodError, atomic, write_tensors
from lpovod.config import Training
from lpovod.distributed import add_up_gradients, rank, ranks, start_alike, total
from lpovod.progress import progress, say


def rate_at(step: int, steps_per_epoch: int, settings: Any) -> float:
    """Learning rate of a step: linear warm-up, then divided by ten after each of the drops.

    As in the original's mmcv hook: warm-up scales the rate of the current epoch.

    Args:
        step: counted from 0 over all epochs.
        steps_per_epoch: steps of one epoch.
        settings: learning_rate, warmup_steps, warmup_ratio, drops.
    """
    epoch = step // steps_per_epoch
    rate = settings.learning_rate * 0.1 ** sum(epoch >= drop for drop in settings.drops)
    if step < settings.warmup_steps:
        rate *= 1 - (1 - step / settings.warmup_steps) * (1 - settings.warmup_ratio)
    return rate


def train(
    model: nn.Module,
    losses: Callable[[Any], dict[str, Tensor]],
    batches: Callable[[int], Iterable[Any]],
    steps_per_epoch: int,
    settings: Training,
    seed: int,
    state: Path,
    fingerprint: str,
) -> list[dict[str, float]]:
    """Train a model in place and return its history, one dictionary per epoch.

    A killed run goes on after its last whole epoch: `state` holds the weights, the optimiser and
    the history, and is used again only if its `fingerprint` (of settings, inputs and code) is this
    run's. `write_training` writes the final artefact and then removes `state`.

    On several ranks each step is divided over them; the result is that of one rank, but for
    rounding, and a state is gone on from by any number of ranks.

    Args:
        model: in training mode as the caller wants it.
        losses: the named losses of this rank's part of a batch; their sum over all ranks is
            minimised.
        batches: this rank's parts of the batches of an epoch, a function of the epoch's number.
        steps_per_epoch: how many they are.
        settings: the schedule.
        seed: with the epoch it seeds every random choice of the epoch.
        state: file of the unfinished training.
        fingerprint: what the training is made from.

    Raises:
        LpovodError: at the first loss that is not finite.
    """
    if settings.images_per_step < ranks():
        raise LpovodError(f"{ranks()} GPUs cannot share {settings.images_per_step} images_per_step")
    optimiser = build_optimiser(model, settings)
    history = _resume(model, optimiser, state, fingerprint)
    start_alike(model, len(history))
    for epoch in range(len(history), settings.epochs):
        torch.manual_seed(seed * 100_003 + epoch)
        started, sums = time.perf_counter(), {}
        name = f"epoch {epoch + 1}/{settings.epochs}"
        for number, batch in enumerate(progress(batches(epoch), name, "step", steps_per_epoch)):
            step = epoch * steps_per_epoch + number
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step, steps_per_epoch, settings)
            named = losses(batch)
            found = total(torch.stack([value.detach() for value in named.values()])).tolist()
            found = dict(zip(named, found, strict=True))
            if not all(map(math.isfinite, found.values())):
                raise LpovodError(f"step {step}: a loss is not finite: {found}. Lower the rate.")
            optimiser.zero_grad()
            sum(named.values()).backward()
            add_up_gradients(model)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
            optimiser.step()
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + value
        means = {key: value / steps_per_epoch for key, value in sums.items()}
        history.append({"epoch": epoch + 1, **means})
        seconds = time.perf_counter() - started
        say(
            f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in means.items()) + f", {seconds:.0f} s"
        )
        _save(model, optimiser, history, state, fingerprint)
    return history


def build_optimiser(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimiser of a schedule, over all parameters."""
    # Fused: one pass over the weights, which is a fifth of a small network's step on a CPU.
    rate = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay, "fused": True}
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), **rate)
    return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **rate)


def write_training(
    model: nn.Module,
    lines: list[dict[str, float]],
    made_from: Identity,
    weights: Path,
    history: Path,
    state: Path,
) -> None:
    """Write what a training ends with: the weights, and one JSON line per epoch; remove `state`."""
    if rank() > 0:
        return
    with atomic(history) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    write_tensors(weights, tensors, made_from)
    state.unlink(missing_ok=True)


def _save(model, optimiser, history, state: Path, fingerprint: str) -> None:
    if rank() > 0:
        return
    with atomic(state) as partial:
        content = {
            "fingerprint": fingerprint,
            "history": history,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(content, partial)


def _resume(model, optimiser, state: Path, fingerprint: str) -> list[dict[str, float]]:
    if not state.exists():
        return []
    try:
        content = torch.load(state, weights_only=True, map_location="cpu")
    except Exception as error:
        say(f"{state} cannot be read ({error}): training starts afresh")
        return []
    if content["fingerprint"] != fingerprint:
        say(f"{state} belongs to other settings, inputs or code: training starts afresh")
        return []
    model.load_state_dict(content["model"])
    optimiser.load_state_dict(content["optimiser"])
    say(f"going on after epoch {len(content['history'])} of {state}")
    return content["history"]
