"""The training loop: one, visible, resumable, for every network of the workflow."""

import fcntl
import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lpovod.artifacts import Identity, LpovodError, atomic, write_tensors
from lpovod.config import Training
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
    batches: Callable[[int, int], Iterable[Any]],
    steps_per_epoch: int,
    settings: Training,
    seed: int,
    state: Path,
    fingerprint: str,
) -> list[dict[str, float]]:
    """Train a model in place and return its history, one dictionary per epoch.

    A killed run goes on after its last whole epoch, one that was asked to end (SIGTERM, SIGINT)
    after its last step: `state` holds the weights, the optimiser and the history, and is used again
    only if its `fingerprint` (of settings, inputs and code) is this run's. The caller writes the
    final artefact and then removes `state`.

    Args:
        model: in training mode as the caller wants it.
        losses: the named losses of a batch; their sum is minimised.
        batches: the batches of an epoch from a step on, a function of the two numbers alone.
        steps_per_epoch: how many they are.
        settings: the schedule.
        seed: with the epoch it seeds every random choice of the epoch.
        state: file of the unfinished training.
        fingerprint: what the training is made from.

    Raises:
        LpovodError: at the first loss that is not finite, or if another process uses `state`.
        SystemExit: when it was asked to end, with the state saved.
    """
    optimiser = build_optimiser(model, settings)
    with _alone_with(state), _noting_signals() as asked_to_end:
        history, begun = _resume(model, optimiser, state, fingerprint)
        for epoch in range(len(history), settings.epochs):
            torch.manual_seed(seed * 100_003 + epoch)
            started, first, sums = time.perf_counter(), begun.get("steps", 0), begun.get("sums", {})
            name = f"epoch {epoch + 1}/{settings.epochs}"
            bar = progress(batches(epoch, first), name, "step", steps_per_epoch, initial=first)
            for number, batch in enumerate(bar, start=first):
                if begun:  # after the loader was made, which draws a number itself
                    _set_random_state(begun["random"])
                    begun = {}
                step = epoch * steps_per_epoch + number
                for group in optimiser.param_groups:
                    group["lr"] = rate_at(step, steps_per_epoch, settings)
                named = losses(batch)
                total = sum(named.values())
                if not torch.isfinite(total):
                    found = {k: float(v.detach()) for k, v in named.items()}
                    raise LpovodError(
                        f"step {step}: a loss is not finite: {found}. Lower the rate."
                    )
                optimiser.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_norm)
                optimiser.step()
                for key, value in named.items():
                    sums[key] = sums.get(key, 0.0) + float(value.detach())
                if asked_to_end:
                    begun = {"steps": number + 1, "sums": sums, "random": _random_state()}
                    _save(model, optimiser, history, begun, state, fingerprint)
                    say(f"signal {asked_to_end[0]} in step {step}: saved to {state}")
                    raise SystemExit(128 + asked_to_end[0])
            means = {key: value / steps_per_epoch for key, value in sums.items()}
            history.append({"epoch": epoch + 1, **means})
            seconds = time.perf_counter() - started
            told = ", ".join(f"{k} {v:.4f}" for k, v in means.items())
            say(f"{name}: {told}, {seconds:.0f} s")
            _save(model, optimiser, history, {}, state, fingerprint)
    return history


@contextmanager
def _alone_with(state: Path) -> Iterator[None]:
    """Refuse a second training with the same state: each would overwrite the other's.

    The lock ends with its process, however that ends; its empty file stays.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    with open(state.with_name(f".{state.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LpovodError(
                f"{state} is in use: another process trains the same. Wait for it, or end it"
            ) from None
        except OSError as error:
            say(f"{state} cannot be locked ({error}): see that nothing else trains the same")
        yield


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT do nothing but append their number to the list."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda received, _: noted.append(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def build_optimiser(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """The optimiser of a schedule, over all parameters."""
    rate = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), **rate)
    return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **rate)


def write_training(
    model: nn.Module,
    lines: list[dict[str, float]],
    made_from: Identity,
    weights: Path,
    history: Path,
) -> None:
    """Write what a training ends with: the weights, and one JSON line per epoch."""
    with atomic(history) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    write_tensors(weights, tensors, made_from)


def _random_state() -> dict[str, Any]:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "gpus": gpus}


def _set_random_state(random: dict[str, Any]) -> None:
    torch.set_rng_state(random["cpu"])
    if random["gpus"]:
        torch.cuda.set_rng_state_all(random["gpus"])


def _save(model, optimiser, history, begun: dict, state: Path, fingerprint: str) -> None:
    """Write the state; `begun` tells of an epoch that was left after some of its steps."""
    with atomic(state) as partial:
        content = {
            "fingerprint": fingerprint,
            "history": history,
            "begun": begun,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        torch.save(content, partial)


def _resume(
    model, optimiser, state: Path, fingerprint: str
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    if not state.exists():
        return [], {}
    try:
        content = torch.load(state, weights_only=True)
    except Exception as error:
        say(f"{state} cannot be read ({error}): training starts afresh")
        return [], {}
    if content["fingerprint"] != fingerprint:
        say(f"{state} belongs to other settings, inputs or code: training starts afresh")
        return [], {}
    model.load_state_dict(content["model"])
    optimiser.load_state_dict(content["optimiser"])
    history, begun = content["history"], content["begun"]
    steps = f" and {begun['steps']} steps" if begun else ""
    say(f"going on after epoch {len(history)}{steps} of {state}")
    return history, begun
