"""Numbers on their way to a device, for which the host does not wait, and back, in one copy."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def numbers(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor of another's dtype and device.

    `new_tensor` would send them there, and the host would wait until the device has done all else.
    """
    return torch.stack([like.new_full((), value) for value in values])


def send(tensor: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """A tensor or array on a device. To a GPU it goes by way of pinned memory, asynchronously."""
    tensor = torch.as_tensor(tensor)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_all(tensors: list[Tensor], device: torch.device | str) -> tuple[Tensor, ...]:
    """Tensors of the host, alike but for their first dimension, on a device, in one copy."""
    return send(torch.cat(tensors), device).split([len(tensor) for tensor in tensors])


def fetch(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the host, in one copy, for which the host waits once.

    Args:
        tensors: those whose numbers have the most bytes first, so that each is aligned.
    """
    parts = [tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]
    copied = torch.cat(parts).cpu().split([len(part) for part in parts])
    return [
        part.view(tensor.dtype).view(tensor.shape)
        for part, tensor in zip(copied, tensors, strict=True)
    ]
