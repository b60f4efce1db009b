"""The training loop: one, visible, resumable, for every network of the workflow."""

import fcntl
import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lpovod.artifacts import Identity, atomic, fingerprint, write_tensors
from lpovod.config import TrainingSettings
from lpovod.distributed import (
    LossesOfRanks,
    largest,
    rank,
    ranks,
    start_alike,
    state_of,
    total,
    update,
)
from lpovod.exceptions import LpovodError
from lpovod.precision import computing_in
from lpovod.progress import log, progress
from lpovod.schedule import rate_at


def train(
    model: nn.Module,
    losses: Callable[[Any], dict[str, Tensor]],
    batches: Callable[[int, int], Iterable[Any]],
    steps_per_epoch: int,
    settings: TrainingSettings,
    checkpoint: Path,
    fingerprint: str,
) -> list[dict[str, float]]:
    """Train a model in place and return its history, one dictionary per epoch.

    A killed run resumes after its last whole epoch, one that was asked to end (SIGTERM, SIGINT)
    after its last step: the checkpoint holds the weights, the optimizer and the history, and is
    used only if its fingerprint (of settings, inputs and code) is this run's. `write_training`
    writes the final artifact and then removes the checkpoint.

    On several ranks each step is divided over them; the result is that of one rank, but for
    rounding, and any number of ranks, on any device, can resume a checkpoint.

    With `images_at_once` a rank takes its images of a step in parts. The step goes down the mean
    over the parts, weighted by images, of losses that are each normalised within one part: that of
    all images at once, if whatever a loss is divided by is proportional to the images and if norms
    do not use a batch's statistics. (It is, but for the number of positives in the classification
    loss. The original divides and, but for its shared norms, computes by two images too: those of
    one of its GPUs.)

    Args:
        model: in training mode as the caller wants it.
        losses: the named losses of this rank's part of a batch; their sum over all ranks is
            minimised. What it draws at random is a function of the batch alone.
        batches: this rank's parts of the batches of an epoch from a step on, a function of the two
            numbers alone.
        steps_per_epoch: how many they are from step 0 on.
        settings: the schedule.
        checkpoint: file of the unfinished training.
        fingerprint: what the training is made from (`resumable`).

    Raises:
        LpovodError: at the first loss that is not finite, or if the checkpoint is in use.
        SystemExit: when it was asked to end, with the checkpoint saved.
    """
    if settings.images_per_step < ranks():
        raise LpovodError(f"{ranks()} GPUs cannot share {settings.images_per_step} images_per_step")
    optimizer = build_optimizer(model, settings)
    with _alone_with(checkpoint), _noting_signals() as signals:
        history, first, sums = _resume(model, optimizer, checkpoint, fingerprint)
        start_alike(model, optimizer, len(history) * steps_per_epoch + first)
        shared = LossesOfRanks(model, losses)
        for epoch in range(len(history), settings.epochs):
            started, name = time.perf_counter(), f"epoch {epoch + 1}/{settings.epochs}"
            bar = progress(batches(epoch, first), name, "step", steps_per_epoch, initial=first)
            for number, batch in enumerate(bar, start=first):
                step = epoch * steps_per_epoch + number
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(step, steps_per_epoch, settings)
                values = _step(model, shared, batch, optimizer, settings, step)
                sums |= {key: sums.get(key, 0.0) + value for key, value in values.items()}
                (received,) = largest([max(signals, default=0)])
                if received:
                    _save(model, optimizer, history, number + 1, sums, checkpoint, fingerprint)
                    largest([0])  # wait for rank 0: the first to end ends the others
                    log.info(f"signal {received} in step {step}: saved to {checkpoint}")
                    raise SystemExit(128 + received)
            means = {key: value / steps_per_epoch for key, value in sums.items()}
            history.append({"epoch": epoch + 1, **means})
            summary = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
            log.info(f"{name}: {summary}, {time.perf_counter() - started:.0f} s")
            first, sums = 0, {}
            _save(model, optimizer, history, first, sums, checkpoint, fingerprint)
    return history


def _step(
    model: nn.Module,
    losses: LossesOfRanks,
    batch: Any,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    step: int,
) -> dict[str, float]:
    """Go down the sum of the losses; returns their values over all ranks."""
    device = str(next(model.parameters()).device)
    optimizer.zero_grad()
    means: dict[str, Tensor] = {}
    parts = _parts(settings)
    for number, (part, weight) in enumerate(parts, start=1):
        with losses.adding_up(number == len(parts)):
            with computing_in(settings.precision, device):
                named = losses(batch[part])
            weighted = torch.stack(list(named.values())) * weight
            losses.backward(weighted.sum())
        for name, value in zip(named, weighted.detach(), strict=True):
            means[name] = means[name] + value if name in means else value
    # After all that was sent to a GPU: the host waits for it here.
    values = total(torch.stack(list(means.values()))).tolist()
    by_name = dict(zip(means, values, strict=True))
    if not all(map(math.isfinite, values)):
        raise LpovodError(f"step {step}: a loss is not finite: {by_name}. Lower the learning rate.")
    update(model, optimizer, settings.gradient_norm)
    return by_name


def _parts(settings: TrainingSettings) -> list[tuple[slice, float]]:
    """The parts that this rank takes its images of a step in, and each one's share of all images.

    Every rank has as many parts as the others, and an image in each: if a step's images cannot be
    divided evenly, a part may have one image more than `images_at_once`.
    """
    images, count = settings.images_per_step, ranks()
    of_ranks = [len(range(number, images, count)) for number in range(count)]
    at_once = settings.images_at_once or images
    parts = min(-(-of_ranks[0] // at_once), of_ranks[-1])
    if parts <= 1:
        return [(slice(None), 1.0)]
    starts = [[own * part // parts for part in range(parts + 1)] for own in of_ranks]
    shares = [sum(s[part + 1] - s[part] for s in starts) / images for part in range(parts)]
    return [(slice(*starts[rank()][part : part + 2]), share) for part, share in enumerate(shares)]


@contextmanager
def _alone_with(checkpoint: Path) -> Iterator[None]:
    """Refuse a second training with the same checkpoint: each would overwrite the other's.

    The lock ends with its process, however that ends; its empty file stays.
    """
    if rank() > 0:
        yield
        return
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with open(checkpoint.with_name(f".{checkpoint.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LpovodError(
                f"{checkpoint} is in use by another training. Wait for it, or stop it"
            ) from None
        except OSError as error:
            log.warning(f"{checkpoint} cannot be locked ({error}): let no other training use it")
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


Network = TypeVar("Network", bound=nn.Module)


def ready(model: Network, device: str, precision: str = "float32") -> Network:
    """The model on a device, in training mode, in the layout of memory that is fastest there."""
    # A step on a CPU takes a tenth less time; the gradient of the proposal network is off by 2e-6
    # of its norm then, instead of 2e-7. A GPU's units for bfloat16 read this layout alone.
    last = device == "cpu" or precision == "bfloat16"
    layout = torch.channels_last if last else torch.preserve_format
    return model.to(device).to(memory_format=layout).train()


MAY_CHANGE = {"precision"}
"""Settings of a training that may change when it is resumed: how it is computed, not what."""


def resumable(made_from: Identity, code: str) -> str:
    """The fingerprint of a training's checkpoint, the same on every device.

    Args:
        made_from: the identity of what is trained; its settings have a block ``training``.
        code: digest of the source code.
    """
    settings = made_from["settings"]
    training = {k: v for k, v in settings["training"].items() if k not in MAY_CHANGE}
    return fingerprint(made_from | {"settings": settings | {"training": training}, "code": code})


def build_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer of a schedule, over all parameters."""
    # Fused: one pass over the weights, which is a fifth of a small network's step on a CPU.
    rate: dict[str, Any] = {"lr": settings.learning_rate, "fused": True}
    rate["weight_decay"] = settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), **rate)
    return torch.optim.SGD(model.parameters(), momentum=settings.momentum, **rate)


def write_training(
    model: nn.Module,
    lines: list[dict[str, float]],
    made_from: Identity,
    weights: Path,
    history: Path,
    checkpoint: Path,
) -> None:
    """Write the weights and the history, one JSON line per epoch; remove the checkpoint."""
    if rank() > 0:
        return
    with atomic(history) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    write_tensors(weights, tensors, made_from)
    checkpoint.unlink(missing_ok=True)


def _save(model, optimizer, history, steps, sums, checkpoint: Path, fingerprint: str) -> None:
    """Write the checkpoint: `steps` of the next epoch are done, their losses add up to `sums`."""
    state = state_of(optimizer)
    if rank() > 0:
        return
    with atomic(checkpoint) as partial:
        content = {
            "fingerprint": fingerprint,
            "history": history,
            "steps": steps,
            "sums": sums,
            "model": model.state_dict(),
            "optimizer": state,
        }
        torch.save(content, partial)


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's state its parameters' layouts in memory.

    They differ between devices and precisions (`ready`), and a fused step takes one for the other.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def _resume(
    model, optimizer, checkpoint: Path, fingerprint: str
) -> tuple[list[dict[str, float]], int, dict[str, float]]:
    if not checkpoint.exists():
        return [], 0, {}
    try:
        content = torch.load(checkpoint, weights_only=True, map_location="cpu")
    except Exception as error:
        log.warning(f"{checkpoint} cannot be read ({error}): starting from the beginning")
        return [], 0, {}
    if content["fingerprint"] != fingerprint:
        log.info(f"{checkpoint} has other settings, inputs or code: starting from the beginning")
        return [], 0, {}
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    _lay_out(optimizer)
    history, steps = content["history"], content["steps"]
    done = f"epoch {len(history)}" + f" and {steps} steps" * bool(steps)
    log.info(f"resuming after {done} of {checkpoint}")
    return history, steps, content["sums"]
