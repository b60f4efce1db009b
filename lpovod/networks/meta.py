"""Networks without memory, to compare names and shapes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def on_meta(build: Callable[[], Network]) -> Network:
    """Build a network on torch's meta device: shapes without numbers.

    Some of timm's models compute with numbers while they are built; they are built on the CPU.
    """
    try:
        with torch.device("meta"):
            return build()
    except Exception:  # each family has its own way to fail; a real fault is raised again below
        return build()
