"""One training on several ranks (processes), computing what a single one would compute.

Every rank works on its part of each batch. A loss is a sum over the rank's own items divided by a
number counted over all ranks (`total`), so the losses of the ranks add up to the loss of the whole
batch, and so do the gradients (`add_up_gradients`); batch norms share their statistics
(`BatchNorm2d`). Without a launcher there is one rank, and all of this does nothing.

A launcher (`lpovod.launcher`, or torchrun itself) sets WORLD_SIZE, RANK and LOCAL_RANK.
"""

import atexit
import os

import torch
from torch import Tensor, distributed, nn

from lpovod.exceptions import LpovodError


def join(device: str) -> str:
    """Meet the other ranks, if a launcher started some; returns this rank's own device.

    Args:
        device: cpu or cuda; of several GPUs a rank takes the one with its local number.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    cuda = device == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(distributed.destroy_process_group)
    return device


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    """How many processes share the training."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """Sum over all ranks, elementwise; a constant to autograd if there are several."""
    if ranks() == 1:
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value


def largest(values: list[int]) -> list[int]:
    """Largest value over all ranks, place by place."""
    if ranks() == 1:
        return values
    shared = torch.tensor(values)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return shared.tolist()


def start_alike(model: nn.Module, step: int) -> None:
    """Give every rank the parameters and buffers of rank 0.

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
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, 0)


def add_up_gradients(model: nn.Module) -> None:
    """Replace every gradient by its sum over all ranks; one that a rank lacks counts as zero."""
    if ranks() == 1:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for work in [distributed.all_reduce(p.grad, async_op=True) for p in trained]:
        work.wait()


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of the batches of all ranks together.

    torch's own SyncBatchNorm works on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or ranks() == 1:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


class _Normalise(torch.autograd.Function):
    """(x - mean) / std * weight + bias with mean and variance over all ranks; keeps x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        values = _precise(x)
        count = total(values.new_tensor(x[:, 0].numel()))
        mean = total(values.sum((0, 2, 3))) / count
        variance = total((values - _wide(mean)).square().sum((0, 2, 3))) / count
        scale = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        y = (values - _wide(mean)) * _wide(scale * weight) + _wide(bias)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, scale, count = ctx.saved_tensors
        unit, of_y = (_precise(x) - _wide(mean)) * _wide(scale), _precise(gradient)
        of_bias, of_weight = of_y.sum((0, 2, 3)), (of_y * unit).sum((0, 2, 3))
        shared = total(torch.stack([of_bias, of_weight])) / count
        of_x = (of_y - _wide(shared[0]) - unit * _wide(shared[1])) * _wide(weight * scale)
        return of_x.to(x.dtype), of_weight, of_bias, None


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide(channels: Tensor) -> Tensor:
    return channels[:, None, None]
