"""Numbers on their way to a device, for which the host does not wait."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    """Numbers as a float32 tensor on a device, sent there once; not to be written to."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def send(tensor: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """A tensor or array on a device. To a GPU it goes by way of pinned memory, asynchronously."""
    tensor = torch.as_tensor(tensor)
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
