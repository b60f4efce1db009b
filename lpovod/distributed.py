"""One training on several ranks (processes), computing what a single one would compute.

Every rank works on its part of each batch. A loss is a sum over the rank's own items divided by a
number counted over all ranks (`total`), so the losses of the ranks add up to the loss of the whole
batch, and so do the gradients; batch norms share their statistics (`BatchNorm2d`). With one rank
all of this does nothing.

On GPUs and on several nodes a launcher (`lpovod.launcher`, or torchrun itself) starts the ranks; it
sets WORLD_SIZE, RANK and LOCAL_RANK. Torch's DistributedDataParallel adds up their gradients while
the backward pass still computes (`LossesOfRanks`), and on GPUs its SyncBatchNorm shares statistics.
On the CPU of one node a training forks its ranks itself (`training_ranks`). Those meet within
microseconds, not milliseconds, and each updates its share of the parameters, where the launcher's
ranks each update all.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lpovod.devices import device_of, own_device
from lpovod.exceptions import LpovodError
from lpovod.precision import precise
from lpovod.shared_ranks import SharedParameters, current, fork_ranks


@contextmanager
def training_ranks(device: str, threads: int, images_per_step: int) -> Iterator[str]:
    """The block runs on the launcher's ranks or, on a CPU without launcher, on as many as it can.

    Forking ranks takes milliseconds, and each takes the memory of a process without its parameters.

    Args:
        device: cpu or cuda; the block gets this rank's own.
        threads: processors to use on a CPU: each rank has one, or several if there are more of them
            than images. Nothing may have used several threads before.
        images_per_step: the most ranks a step can be divided over.

    Raises:
        LpovodError: if another rank ended, or there is no such device.
    """
    if device != "cpu" or _launched():
        yield join(device)
        return
    count = max(1, min(threads, images_per_step))
    with fork_ranks(count) if count > 1 else nullcontext():
        torch.set_num_threads(max(1, threads // count))
        yield device


def _launched() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def join(device: str) -> str:
    """Meet the other ranks, if a launcher started some; returns this rank's own device.

    Args:
        device: cpu or cuda; of several GPUs a rank takes the one with its local number.

    Raises:
        LpovodError: if there is no such device.
    """
    if not _launched():
        return own_device(device)
    cuda = device == "cuda"
    if cuda:
        device = device_of(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(distributed.destroy_process_group)
    return device


def rank() -> int:
    """This process's number, from 0."""
    if forked := current():
        return forked.rank
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    """How many processes share the training."""
    if forked := current():
        return forked.count
    return distributed.get_world_size() if distributed.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum over all ranks, elementwise; a constant to autograd if there are several.

    All ranks get the same bits. Forked ranks take 0.03 ms for it after the last of them has come.
    """
    if ranks() == 1:
        return value
    if forked := current():
        return forked.gather(value).sum(0)
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value


def gather(value: Tensor) -> Tensor:
    """Every rank's tensor of one shape, (ranks, ...), at the cost of `total`."""
    if forked := current():
        return forked.gather(value)
    gathered = [torch.empty_like(value) for _ in range(ranks())]
    distributed.all_gather(gathered, value.detach().contiguous())
    return torch.stack(gathered)


def largest(values: list[int]) -> list[int]:
    """Largest value over all ranks, place by place."""
    if ranks() == 1:
        return values
    if forked := current():
        return forked.gather(torch.tensor(values)).amax(0).tolist()
    shared = torch.tensor(values)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return shared.tolist()


def start_alike(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give every forked rank the parameters and buffers of rank 0.

    They share the parameters from now on: each keeps the optimizer's state of its own. A launcher's
    ranks start from the same files.

    Raises:
        LpovodError: if a rank does not start with the same step: they see different files.
    """
    if ranks() == 1:
        return
    last = largest([step, -step])
    if last[0] != -last[1]:
        raise LpovodError(
            f"ranks go on after different steps, {-last[1]} to {last[0]}: is the folder of the "
            "training's state shared by all nodes?"
        )
    if forked := current():
        forked.parameters = SharedParameters(forked, _trained(model))
        forked.parameters.forget_others(optimizer)
        for buffer in model.buffers():
            buffer.copy_(forked.gather(buffer)[0])


class _Losses(nn.Module):
    """The losses of a model as a module of its own."""

    def __init__(self, model: nn.Module, losses: Callable[[Any], dict[str, Tensor]]):
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.losses(batch)


class LossesOfRanks:
    """The losses of a model; of a launcher's ranks, their backward pass adds up the gradients.

    Args:
        model: alike on every rank, as all start or resume from the same files; on GPUs it gets
            torch's norms in the place of ours, but for timm's that include an activation.
        losses: of this rank's part of a batch.
    """

    def __init__(self, model: nn.Module, losses: Callable[[Any], dict[str, Tensor]]):
        self.losses = losses
        self.parallel: DistributedDataParallel | None = None
        if distributed.is_initialized() and ranks() > 1 and not current():
            if next(model.parameters()).is_cuda:
                synchronise_norms(model)
            self.parallel = DistributedDataParallel(
                _Losses(model, losses),
                broadcast_buffers=False,  # norms share their statistics
                find_unused_parameters=True,  # of the CLIP head, if no image has a proposal
                gradient_as_bucket_view=True,
            )

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        return self.parallel(batch) if self.parallel else self.losses(batch)

    def backward(self, loss: Tensor) -> None:
        """Add this rank's gradients of a loss, or those of all ranks, to what there is."""
        # DistributedDataParallel takes the mean over the ranks.
        (loss * ranks() if self.parallel else loss).backward()

    def adding_up(self, wanted: bool) -> AbstractContextManager[Any]:
        """A context for losses and their backward pass that adds up all ranks' gradients, or not.

        What was not added up then, is at the next time.
        """
        return nullcontext() if wanted or not self.parallel else self.parallel.no_sync()


def synchronise_norms(module: nn.Module) -> None:
    """Turn batch norms, in place, into torch's, which GPUs share by NCCL."""
    for name, child in module.named_children():
        if type(child) is BatchNorm2d:
            setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
        else:
            synchronise_norms(child)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, gradient_norm: float) -> None:
    """One step of the optimizer down the sum of all ranks' gradients, clipped to a norm.

    A missing gradient is zero. Of forked ranks each updates its share of the parameters; those of a
    launcher have added up their gradients before.
    """
    for parameter in _trained(model):
        # Fused, torch's SGD cannot do without on its first step.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    forked = current()
    if forked and forked.parameters:
        forked.parameters.step(optimizer, gradient_norm)
        return
    nn.utils.clip_grad_norm_(model.parameters(), gradient_norm)
    optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """On rank 0 the whole `state_dict`, whoever holds its parts; every rank has to call it."""
    forked = current()
    if forked and forked.parameters:
        return forked.parameters.whole_state(optimizer)
    return optimizer.state_dict()


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the batches of all ranks together.

    torch's own SyncBatchNorm takes its place on GPUs (`synchronise_norms`), and works there alone.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or ranks() == 1:
            return super().forward(x)
        return _Normalise.apply(x, self.weight, self.bias, self)


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias with mean and variance over all ranks; keeps x alone.

    The ranks meet once forward and once backward. What is computed on each is torch's own kernels,
    which pass over x as often as they must; written as arithmetic it takes three times as long.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, norm):
        values = precise(x)
        mean, variance, count = _statistics(values)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = norm.eps
        return functional.batch_norm(values, mean, variance, weight, bias, eps=norm.eps).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, variance, count = ctx.saved_tensors
        values, of_y = precise(x), precise(gradient)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(weight)
        if x.numel():  # torch divides by it
            _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
                of_y,
                values,
                weight,
                mean,
                variance,
                None,
                None,
                False,
                ctx.eps,
                (False, True, True),
            )
        shared_weight, shared_bias = total(torch.stack([of_weight, of_bias])).unbind()
        # (of_y - shared_bias / count - unit * shared_weight / count) * weight / std
        # with unit = (x - mean) / std, as a sum of multiples of of_y, of x and of one.
        over_std = (variance + ctx.eps).rsqrt_()
        factor = weight * over_std
        part = factor / -count
        slope = part * over_std * shared_weight
        shift = torch.addcmul(part * shared_bias, slope, mean, value=-1)
        of_x = torch.addcmul(_wide(shift), _wide(factor), of_y).addcmul_(_wide(slope), values)
        return of_x.to(x.dtype), of_weight, of_bias, None


def _statistics(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of each channel, and how many values it has, over all ranks.

    Ranks' variances about their own means add up with those of the means (Chan et al. 1979,
    "Updating formulae and a pairwise algorithm for computing sample variances").
    """
    channels = values.shape[1]
    own = values.new_zeros(2 * channels + 1)
    if values.numel():
        statistics = torch.batch_norm_update_stats(values, None, None, 0)
        own = torch.cat([*statistics, own.new_full((1,), values.numel() // channels)])
    means, variances, counts = gather(own).split([channels, channels, 1], dim=1)
    count = counts.sum()
    part = counts / count
    mean = (part * means).sum(0)
    distance = means - mean
    return mean, (part * torch.addcmul(variances, distance, distance)).sum(0), count


def _wide(channels: Tensor) -> Tensor:
    return channels.view(-1, 1, 1)
