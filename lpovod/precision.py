"""The precision that networks compute in: one place for autocast and for both TF32 flags."""

import torch
from torch import Tensor


def computing_in(precision: str, device: str) -> torch.autocast:
    """A context in which networks compute in a precision; parameters stay in float32.

    float32 means float32: TF32, which torch permits in convolutions and not in products, is off in
    both. bfloat16 is autocast: convolutions and products compute in it, and what sums or divides
    (norms, softmax, losses) in float32. Boxes are not autocast's to convert: give box arithmetic
    float32 values.

    Args:
        precision: float32 or bfloat16.
        device: cpu, cuda or cuda:N.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.autocast(
        torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"
    )


def precise(x: Tensor) -> Tensor:
    """The values in float32 at least: what networks computed in bfloat16, for losses and boxes."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
